"""What a server refuses, and with which error."""

from __future__ import annotations

import pytest
from blockferry.common.nbd.protocol import Command, CommandFlag, Errno
from blockferry.common.nbd.rules import DF_SIZE, refusal

MIB = 1024 * 1024
SIZE = 100 * MIB + 7
FUA, DF = CommandFlag.FUA, CommandFlag.DF
ALL_ZERO = FUA | CommandFlag.NO_HOLE | CommandFlag.FAST_ZERO

FINE = [
    (Command.READ, 0, 0, 32 * MIB),
    (Command.READ, 0, SIZE - 1, 1),
    (Command.READ, 0, SIZE, 0),
    (Command.READ, DF, 0, DF_SIZE),
    (Command.READ, FUA, 0, 1),
    (Command.WRITE, FUA, SIZE - 5, 5),
    (Command.TRIM, FUA, 0, SIZE),
    (Command.WRITE_ZEROES, ALL_ZERO, 0, SIZE),
    (Command.FLUSH, 0, 0, 0),
    (Command.FLUSH, FUA, 1 << 60, 1),
    (Command.CACHE, 0, 0, SIZE),
    (Command.BLOCK_STATUS, CommandFlag.REQ_ONE, 0, SIZE),
]

REFUSED = [
    (99, 0, 0, 1, Errno.EINVAL),
    (Command.DISC, 0, 0, 0, Errno.EINVAL),
    (Command.READ, CommandFlag.NO_HOLE, 0, 1, Errno.EINVAL),
    (Command.READ, 1 << 15, 0, 1, Errno.EINVAL),
    (Command.READ, 0, 0, 32 * MIB + 1, Errno.EINVAL),
    (Command.READ, 0, SIZE, 1, Errno.EINVAL),
    (Command.READ, 0, (1 << 64) - 1, 1, Errno.EINVAL),
    (Command.READ, DF, 0, DF_SIZE + 1, Errno.EOVERFLOW),
    (Command.WRITE, 0, SIZE, 1, Errno.ENOSPC),
    (Command.WRITE, DF, 0, 1, Errno.EINVAL),
    (Command.WRITE_ZEROES, 0, SIZE - 1, 2, Errno.ENOSPC),
    (Command.TRIM, 0, SIZE - 1, 2, Errno.EINVAL),
    (Command.CACHE, 0, SIZE - 1, 2, Errno.EINVAL),
    (Command.BLOCK_STATUS, 0, 0, 0, Errno.EINVAL),
    (Command.BLOCK_STATUS, 0, SIZE, 1, Errno.EINVAL),
]


@pytest.mark.parametrize(("command", "flags", "offset", "length"), FINE)
def test_what_is_fine(command: int, flags: int, offset: int, length: int) -> None:
    assert refusal(command, flags, offset, length, SIZE, read_only=False, status=True) is None


@pytest.mark.parametrize(("command", "flags", "offset", "length", "expected"), REFUSED)
def test_what_is_refused(command: int, flags: int, offset: int, length: int, expected: Errno) -> None:
    found = refusal(command, flags, offset, length, SIZE, read_only=False, status=True)
    assert found is not None and found[0] is expected and found[1]


@pytest.mark.parametrize("command", list(Command))
def test_a_read_only_export(command: Command) -> None:
    found = refusal(command, 0, 0, 1, SIZE, read_only=True, status=True)
    changes = command in (Command.WRITE, Command.TRIM, Command.WRITE_ZEROES)
    assert (found is not None and found[0] is Errno.EPERM) == changes


def test_a_status_without_contexts() -> None:
    found = refusal(Command.BLOCK_STATUS, 0, 0, 1, SIZE, read_only=True, status=False)
    assert found is not None and found[0] is Errno.EINVAL
