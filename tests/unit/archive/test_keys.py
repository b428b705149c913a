"""Key files and passphrases wrap the archive's key, each for itself."""

from __future__ import annotations

import msgspec
import pytest
from blockferry.common.archive.format import Key
from blockferry.common.archive.keys import Secret, unwrap, wrap
from blockferry.common.errors import BlockferryError, Code

from tests.unit.archive.examples import ARCHIVE, KEY, KEY_FILE, PASSPHRASE, some
from tests.unit.archive.test_format import refused

QUICK = (16, 1, 1)


def made(secret: Secret) -> Key:
    return wrap(secret, KEY, ARCHIVE.id, scrypt=QUICK)


def test_each_secret_opens_its_own_object_and_no_other() -> None:
    file, phrase = made(KEY_FILE), made(PASSPHRASE)
    assert unwrap(KEY_FILE, file, "object-1") == unwrap(PASSPHRASE, phrase, "object-1") == KEY
    assert unwrap(KEY_FILE, phrase, "object-1") is unwrap(PASSPHRASE, file, "object-1") is None
    assert unwrap(Secret("key file", some("another", 32)), file, "object-1") is None
    assert unwrap(Secret("passphrase", b"another"), phrase, "object-1") is None
    assert KEY.hex() not in file.wrapped and file.id != made(KEY_FILE).id


@pytest.mark.parametrize("secret", [KEY_FILE, PASSPHRASE], ids=["key file", "passphrase"])
def test_what_was_altered_opens_nothing(secret: Secret) -> None:
    key = made(secret)
    for field in ("id", "archive", "salt", "nonce", "wrapped"):
        value = getattr(key, field)
        altered = msgspec.structs.replace(key, **{field: ("1" if value[0] == "0" else "0") + value[1:]})
        assert unwrap(secret, altered, "object-1") is None, field
    for field in ("nonce", "wrapped"):
        with refused():
            unwrap(secret, msgspec.structs.replace(key, **{field: getattr(key, field)[2:]}), "object-1")


@pytest.mark.parametrize("values", [(0, 8, 1), (1000, 8, 1), (16, 0, 1), (16, 8, 0), (16, 8, 17), (1 << 21, 8, 1)])
def test_parameters_of_scrypt_that_are_none_or_ask_for_too_much_are_refused(values: tuple[int, int, int]) -> None:
    n, r, p = values
    key = msgspec.structs.replace(made(PASSPHRASE), n=n, r=r, p=p)
    with refused():
        unwrap(PASSPHRASE, key, "object-1")


def test_other_parameters_of_scrypt_give_another_key() -> None:
    assert unwrap(PASSPHRASE, msgspec.structs.replace(made(PASSPHRASE), n=32), "object-1") is None


def test_key_files_have_at_least_the_bytes_of_a_key() -> None:
    assert Secret.key_file(bytes(32), "k").value == bytes(32)
    for content in (b"", bytes(31), bytes((1 << 20) + 1)):
        with pytest.raises(BlockferryError) as told:
            Secret.key_file(content, "k")
        assert told.value.code is Code.USAGE and "/dev/urandom" in told.value.next


def test_a_passphrase_is_the_first_line() -> None:
    for content in (b"pass phrase", b"pass phrase\n", b"pass phrase\r\nand more"):
        assert Secret.passphrase(content, "p").value == b"pass phrase"
    assert Secret.passphrase(b" spaces stay \n", "p").value == b" spaces stay "
    for content in (b"", b"\n", b"\r\nx", b"x" * (1 << 20) + b"x"):
        with pytest.raises(BlockferryError) as told:
            Secret.passphrase(content, "p")
        assert told.value.code is Code.USAGE
