"""The order of changes that overlap (pure).

Changes under way are disjoint. One that overlaps another that is under way, or that has been waiting for longer, waits
until those are over; all others go on. So two writes to the same place end as if one had come after the other, in the
order in which they arrived, whatever connection they took; and whoever has to read a block to change a part of it is
alone with it.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable

from blockferry.common.regions import BLOCK_SIZE

Span = tuple[int, int]
"""(start, end) in bytes, in whole blocks"""


class Ordering:
    """Of the changes of one volume. Costs the logarithm of what is under way, and the number of those that wait."""

    def __init__(self) -> None:
        self._running: list[Span] = []
        self._waiting: list[tuple[Span, Callable[[Span], None]]] = []

    @property
    def running(self) -> int:
        """Changes under way."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Changes that wait."""
        return len(self._waiting)

    def enter(self, offset: int, length: int, later: Callable[[Span], None]) -> Span | None:
        """A change of `length` bytes, at least one, is to begin. The span it takes, to be given to `leave`; or None: it
        waits, and `later` is called with the span when its turn has come."""
        span = offset // BLOCK_SIZE * BLOCK_SIZE, -(-(offset + length) // BLOCK_SIZE) * BLOCK_SIZE
        if self._taken(span) or any(_overlap(span, other) for other, _ in self._waiting):
            self._waiting.append((span, later))
            return None
        bisect.insort(self._running, span)
        return span

    def leave(self, span: Span) -> None:
        """A change is over; whoever may begin now is called."""
        del self._running[bisect.bisect_left(self._running, span)]
        if not self._waiting:
            return
        still: list[tuple[Span, Callable[[Span], None]]] = []
        begun: list[tuple[Span, Callable[[Span], None]]] = []
        for one in self._waiting:
            if self._taken(one[0]) or any(_overlap(one[0], other) for other, _ in still):
                still.append(one)
            else:
                bisect.insort(self._running, one[0])
                begun.append(one)
        self._waiting = still
        for begins, later in begun:
            later(begins)

    def _taken(self, span: Span) -> bool:
        # Those under way are disjoint and sorted: only two can be the nearest.
        index = bisect.bisect_left(self._running, span)
        return (index < len(self._running) and self._running[index][0] < span[1]) or (
            index > 0 and self._running[index - 1][1] > span[0]
        )


def _overlap(one: Span, other: Span) -> bool:
    return one[0] < other[1] and other[0] < one[1]
