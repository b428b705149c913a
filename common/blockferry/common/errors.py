"""Errors that carry fields for machines and one sentence for people.

Every failure a user can meet is a `BlockferryError`: what happened, to which volume, where, why, and what to do next.
Its text is one line; its fields travel unchanged through gRPC (`rpc.py`) and into `--json` output.
"""

from __future__ import annotations

import enum
import errno
import os
from typing import Any, TypeVar


class Code(enum.StrEnum):
    """What kind of failure it is; stable names for programs."""

    USAGE = "usage"
    INVALID_ARGUMENT = "invalid-argument"
    NOT_FOUND = "not-found"
    EXISTS = "exists"
    UNREADABLE = "unreadable"
    PERMISSION = "permission"
    TLS = "tls"
    UNSUPPORTED = "unsupported"
    SIZE_MISMATCH = "size-mismatch"
    REGION_SIZE_MISMATCH = "region-size-mismatch"
    IN_USE = "in-use"
    STALE_EPOCH = "stale-epoch"
    WRONG_STATE = "wrong-state"
    OUT_OF_SPACE = "out-of-space"
    LIMITED = "limited"
    READ_ONLY = "read-only"
    IO_ERROR = "io-error"
    SOURCE_CHANGED = "source-changed"
    DATA_MISMATCH = "data-mismatch"
    CORRUPT_STATE = "corrupt-state"
    HOOK = "hook"
    UNAVAILABLE = "unavailable"
    PROTOCOL = "protocol"
    INTERNAL = "internal"


class BlockferryError(Exception):
    """A failure with everything the operator needs.

    `what` says what could not be done, `cause` why, `next` what to do about it. `offset` and `length` are bytes within
    `volume`. `expected` and `found` are set where two things should have been equal.
    """

    def __init__(
        self,
        code: Code,
        what: str,
        *,
        cause: str = "",
        next: str = "",
        volume: str | None = None,
        offset: int | None = None,
        length: int | None = None,
        expected: str | None = None,
        found: str | None = None,
    ) -> None:
        self.code = code
        self.what = what
        self.cause = cause
        self.next = next
        self.volume = volume
        self.offset = offset
        self.length = length
        self.expected = expected
        self.found = found
        super().__init__(self.line())

    def line(self) -> str:
        """The whole story in one line."""
        text = self.what if self.volume is None or self.volume in self.what else f"{self.volume}: {self.what}"
        if self.offset is not None:
            text += f" at offset {self.offset}"
            if self.length is not None:
                text += f", length {self.length}"
        if self.cause:
            text += f": {self.cause}"
        if self.next:
            text += f"; {self.next}"
        return " ".join(text.split())

    def lines(self) -> list[str]:
        """What people are shown: one line, or one for each of several things that are wrong."""
        return [self.line()]

    def __str__(self) -> str:
        return self.line()

    def fields(self) -> dict[str, Any]:
        """The `error` object of `--json` output."""
        return {
            "code": self.code.value,
            "message": self.what,
            "volume": self.volume,
            "offset": self.offset,
            "length": self.length,
            "cause": self.cause or None,
            "next": self.next or None,
            "expected": self.expected,
            "found": self.found,
        }


E = TypeVar("E", bound=BaseException)


def first_of(group: BaseExceptionGroup[E]) -> E:
    """The first failure of tasks that ran side by side."""
    error = group.exceptions[0]
    return first_of(error) if isinstance(error, BaseExceptionGroup) else error


_OS_CODES = {
    errno.ENOENT: (Code.NOT_FOUND, "check the path"),
    errno.ENOTDIR: (Code.NOT_FOUND, "check the path"),
    errno.EACCES: (Code.UNREADABLE, "check the permissions, or run as a user who has them"),
    errno.EPERM: (Code.UNREADABLE, "check the permissions, or run as a user who has them"),
    errno.ENOSPC: (Code.OUT_OF_SPACE, "free or add space, then run it again"),
    errno.EDQUOT: (Code.OUT_OF_SPACE, "raise the quota or free space, then run it again"),
    errno.EROFS: (Code.READ_ONLY, "remount it writable or use another place"),
    errno.EFBIG: (Code.UNSUPPORTED, "the file system cannot hold a file of this size; use XFS for very large volumes"),
}


def from_os_error(
    error: OSError,
    what: str,
    *,
    volume: str | None = None,
    offset: int | None = None,
    length: int | None = None,
) -> BlockferryError:
    """Say what an `OSError` means for a volume."""
    number = error.errno or 0
    code, next_step = _OS_CODES.get(number, (Code.IO_ERROR, "check the disk and the system log, then run it again"))
    cause = os.strerror(number).lower() if number else str(error)
    return BlockferryError(code, what, cause=cause, next=next_step, volume=volume, offset=offset, length=length)
