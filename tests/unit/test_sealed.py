"""Sealed files: what went in comes out, and whatever happened to the bytes is noticed."""

from __future__ import annotations

import msgspec
import pytest
from blake3 import blake3
from blockferry.server.sealed import CHECKSUM_SIZE, MAGIC_SIZE, seal, unseal
from hypothesis import given
from hypothesis import strategies as st

MAGIC = b"BFTEST\x00\x00"


class Header(msgspec.Struct, frozen=True):
    """A header with a number and a text."""

    number: int
    text: str = ""


class Other(msgspec.Struct, frozen=True):
    """Another kind of header."""

    other: int


headers = st.builds(Header, st.integers(0, 2**63), st.text(max_size=20))
bodies = st.lists(st.binary(max_size=50), max_size=4)


@given(headers, bodies)
def test_what_is_sealed_comes_out_again(header: Header, parts: list[bytes]) -> None:
    assert unseal(MAGIC, Header, seal(MAGIC, header, parts)) == (header, b"".join(parts))


def test_the_layout() -> None:
    head = b'{"number":7,"text":"x"}'
    content = MAGIC + len(head).to_bytes(4, "little") + head + b"onetwo"
    assert seal(MAGIC, Header(7, "x"), [b"one", b"two"]) == content + blake3(content).digest()
    assert (len(MAGIC), len(blake3(content).digest())) == (MAGIC_SIZE, CHECKSUM_SIZE)


WHOLE = seal(MAGIC, Header(2**40, "a header"), [bytes(range(100)), b"tail"])


@pytest.mark.parametrize("change", [0x01, 0x80, 0xFF])
def test_every_changed_byte_is_noticed(change: int) -> None:
    for position in range(len(WHOLE)):
        damaged = bytearray(WHOLE)
        damaged[position] ^= change
        assert unseal(MAGIC, Header, bytes(damaged)) is None, position


def test_every_cut_and_every_addition_is_noticed() -> None:
    for length in range(len(WHOLE)):
        assert unseal(MAGIC, Header, WHOLE[:length]) is None, length
        assert unseal(MAGIC, Header, WHOLE[length + 1 :]) is None, length
    assert unseal(MAGIC, Header, WHOLE + b"\x00") is None
    assert unseal(MAGIC, Header, b"\x00" + WHOLE) is None


@given(st.binary(max_size=200))
def test_garbage_is_nothing(garbage: bytes) -> None:
    assert unseal(MAGIC, Header, garbage) is None
    assert unseal(MAGIC, Header, MAGIC + garbage) is None


def resealed(content: bytes) -> bytes:
    """A file whose checksum is right, whatever is in it."""
    return content + blake3(content).digest()


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(MAGIC, id="magic alone"),
        pytest.param(MAGIC + b"\x01\x00", id="half a length"),
        pytest.param(MAGIC + b"\xff\xff\xff\xff" + b"{}", id="header longer than the file"),
        pytest.param(MAGIC + b"\x02\x00\x00\x00" + b"{}", id="header without its fields"),
        pytest.param(MAGIC + b"\x04\x00\x00\x00" + b"null", id="header that is no object"),
        pytest.param(MAGIC + b"\x0e\x00\x00\x00" + b'{"number":"1"}', id="field of another type"),
        pytest.param(MAGIC + b"\x17\x00\x00\x00" + b'{"number":1,"text":"\xff"}', id="text that is not UTF-8"),
    ],
)
def test_what_was_never_sealed_like_this_is_nothing(content: bytes) -> None:
    assert unseal(MAGIC, Header, resealed(content)) is None


def test_another_kind_of_file_is_nothing() -> None:
    assert unseal(b"BFOTHER\x00", Header, WHOLE) is None
    assert unseal(MAGIC, Other, WHOLE) is None


def test_fields_that_were_added_later_are_passed_over() -> None:
    class Later(msgspec.Struct, frozen=True):
        number: int
        text: str
        added: list[int]

    assert unseal(MAGIC, Header, seal(MAGIC, Later(1, "t", [1]), [b"b"])) == (Header(1, "t"), b"b")
