"""Which requests a server refuses before it does anything, and with which error (pure).

Source: doc/proto.md of NetworkBlockDevice/nbd, "Request types" and "Error values"; where it leaves a choice, that of
qemu-nbd.
"""

from __future__ import annotations

from blockferry.common.nbd.protocol import MAX_PAYLOAD, Command, CommandFlag, Errno

DF_SIZE = 1024 * 1024
"""Bytes of a READ with DF, whose reply may have one chunk only, that are answered. The protocol asks for 64 KiB."""

CHANGES = (Command.WRITE, Command.TRIM, Command.WRITE_ZEROES)

# FUA is let pass everywhere: by the protocol it is no error where it means nothing.
_FLAGS = {
    Command.READ: CommandFlag.FUA | CommandFlag.DF,
    Command.WRITE: CommandFlag.FUA,
    Command.FLUSH: CommandFlag.FUA,
    Command.TRIM: CommandFlag.FUA,
    Command.CACHE: CommandFlag.FUA,
    Command.WRITE_ZEROES: CommandFlag.FUA | CommandFlag.NO_HOLE | CommandFlag.FAST_ZERO,
    Command.BLOCK_STATUS: CommandFlag.FUA | CommandFlag.REQ_ONE,
}
_ALLOWED = {int(command): int(flags) for command, flags in _FLAGS.items()}

Refusal = tuple[Errno, str]


def refusal(
    command: int, flags: int, offset: int, length: int, size: int, *, read_only: bool, status: bool
) -> Refusal | None:
    """Why a request for an export of `size` bytes is refused, or None. `status`: metadata contexts were agreed upon.

    A request of no bytes is one for nothing, and done; of a block status it is an error.
    """
    allowed = _ALLOWED.get(command)
    if allowed is None:
        return Errno.EINVAL, f"no request {command} is known here"
    if flags & ~allowed:
        return Errno.EINVAL, f"flags {flags:#x} have no meaning for this request"
    if command == Command.FLUSH:
        return None
    if read_only and command in CHANGES:
        return Errno.EPERM, "the export is read-only"
    if offset + length > size:
        number = Errno.ENOSPC if command in (Command.WRITE, Command.WRITE_ZEROES) else Errno.EINVAL
        return number, f"it ends at {offset + length}, and the export at {size}"
    if command == Command.READ:
        if length > MAX_PAYLOAD:
            return Errno.EINVAL, f"a read has at most {MAX_PAYLOAD} bytes"
        if flags & CommandFlag.DF and length > DF_SIZE:
            return Errno.EOVERFLOW, f"a read in one chunk has at most {DF_SIZE} bytes"
    if command == Command.BLOCK_STATUS:
        if not status:
            return Errno.EINVAL, "no metadata context was agreed upon"
        if not length:
            return Errno.EINVAL, "the status of no bytes"
    return None
