"""Errors are one line for people and fields for programs, whatever text gets into them."""

from __future__ import annotations

import errno

import pytest
from blockferry.common.errors import BlockferryError, Code, from_os_error
from hypothesis import given
from hypothesis import strategies as st

texts = st.text(st.characters(), max_size=40)


@given(st.sampled_from(Code), texts, texts, texts, st.none() | texts, st.none() | st.integers(0, 2**63))
def test_the_whole_story_is_one_line(
    code: Code, what: str, cause: str, next: str, volume: str | None, offset: int | None
) -> None:
    error = BlockferryError(code, what, cause=cause, next=next, volume=volume, offset=offset, length=offset)
    assert len(error.line().splitlines()) <= 1
    assert str(error) == error.line()
    for part in (what, cause, next):
        assert " ".join(part.split()) in error.line()
    if offset is not None:
        assert f"at offset {offset}, length {offset}" in error.line()


def test_a_line_tells_volume_place_cause_and_next_step() -> None:
    error = BlockferryError(
        Code.IO_ERROR, "cannot read", cause="input/output error", next="see the log", volume="db", offset=0, length=512
    )  # fmt: skip
    assert error.line() == "db: cannot read at offset 0, length 512: input/output error; see the log"


def test_a_volume_that_is_named_already_is_not_named_twice() -> None:
    assert BlockferryError(Code.IN_USE, "db has a writer already", volume="db").line() == "db has a writer already"


def test_the_volume_can_be_named_later() -> None:
    error = BlockferryError(Code.IO_ERROR, "cannot write", volume="/srv/pool/db/work.img")
    error.volume = "db"
    assert str(error) == "db: cannot write"


def test_fields_are_those_of_the_json_error_object() -> None:
    error = BlockferryError(Code.SIZE_MISMATCH, "other size", volume="db", offset=0, expected="1", found="2")
    assert error.fields() == {
        "code": "size-mismatch",
        "message": "other size",
        "volume": "db",
        "offset": 0,
        "length": None,
        "cause": None,
        "next": None,
        "expected": "1",
        "found": "2",
    }


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.ENOENT, Code.NOT_FOUND),
        (errno.ENOTDIR, Code.NOT_FOUND),
        (errno.EACCES, Code.UNREADABLE),
        (errno.EPERM, Code.UNREADABLE),
        (errno.ENOSPC, Code.OUT_OF_SPACE),
        (errno.EDQUOT, Code.OUT_OF_SPACE),
        (errno.EROFS, Code.READ_ONLY),
        (errno.EFBIG, Code.UNSUPPORTED),
        (errno.EIO, Code.IO_ERROR),
    ],
)
def test_every_os_error_says_what_to_do(number: int, code: Code) -> None:
    error = from_os_error(OSError(number, "ignored"), "cannot write", volume="db", offset=1, length=2)
    assert (error.code, error.volume, error.offset, error.length) == (code, "db", 1, 2)
    assert error.cause and error.cause == error.cause.lower()
    assert error.next


def test_an_os_error_without_a_number_keeps_its_text() -> None:
    error = from_os_error(OSError("the device is gone"), "cannot write")
    assert (error.code, error.cause) == (Code.IO_ERROR, "the device is gone")
