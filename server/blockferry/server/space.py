"""The arithmetic of room: what sessions may write before a reserve or a quota is reached (pure). Sizes in bytes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

LOOK_BYTES = 256 * 1024 * 1024
"""Bytes written until one looks again at what is free: as much as a checkpoint covers, so that others who fill the same
file system are noticed no later than that."""

DEFAULT_RESERVE = 1 << 30
"""Room for what must go on without asking: logs, sessions, other services. Linux file systems slow down when fuller."""
DEFAULT_RESERVE_SHARE = 20
"""Of a small file system no more than this fraction (1/20; what ext4 keeps for root) is reserved by default."""


@dataclass(frozen=True)
class Limits:
    """What an administrator allows: `reserve` stays free in a pool's file system (None: the default), a replica holds
    no more than `quota`, and a session no more than `journal` of changes that go through one (0: any amount)."""

    reserve: int | None = None
    quota: int = 0
    journal: int = 0


UNLIMITED = Limits(reserve=0)


def reserve_of(limits: Limits, total: int) -> int:
    """The bytes to keep free in a file system of `total` bytes."""
    return min(DEFAULT_RESERVE, total // DEFAULT_RESERVE_SHARE) if limits.reserve is None else limits.reserve


class Allowance:
    """What may still be written until one has to look again, for any number of writers who share some room.

    `take` before a write and `done` after it. Where `take` refuses, look: `pause`, then measure, then `looked`. Nothing
    begins between `pause` and `looked`, and whatever was under way at `pause` counts as not yet measured. So the room
    that was measured is never overdrawn: at worst bytes under way count twice, and one looks earlier.
    """

    def __init__(self) -> None:
        self.left = 0
        self.under_way = 0

    def take(self, amount: int) -> bool:
        """Whether `amount` may be written now; if so it is under way."""
        if amount > self.left:
            return False
        self.left -= amount
        self.under_way += amount
        return True

    def done(self, amount: int) -> None:
        """What was taken is written, or given up."""
        self.under_way -= amount

    def pause(self) -> int:
        """Let nothing begin, and return what is under way: for `looked`."""
        self.left = 0
        return self.under_way

    def looked(self, room: int, under_way: int, wanted: int) -> None:
        """`room` was measured after `pause` returned `under_way`. `wanted` is what somebody waits to take: it is
        allowed at once if there is room for it, however large it is."""
        self.left = max(0, min(room - under_way, max(LOOK_BYTES, wanted)))


def union_length(ranges: Iterable[tuple[int, int]]) -> int:
    """Bytes covered by (start, length) ranges that may overlap."""
    total = end = 0
    for start, length in sorted(ranges):
        total += max(0, start + length - max(start, end))
        end = max(end, start + length)
    return total
