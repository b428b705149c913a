"""Which ranges of which chunks to read for a set of blocks or nodes (pure).

A request costs about as much time as 100 KiB of data, and money besides: what lies close together in a chunk is read as
one. One range is never longer than what may be held in memory many times over.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

RANGE_SIZE = 8 * 1024 * 1024
"""Bytes of one range at most: object stores give their full speed to ranges of 8 to 16 MiB."""
RANGE_ITEMS = 32
"""Blocks of one range at most, however small they have become: 8 MiB unpacked."""
GAP = 128 * 1024
"""Bytes between two things that are read and thrown away rather than asked for apart."""


class Located(Protocol):
    """Something in a chunk: an `Entry` or a `NodeRef`."""

    @property
    def attempt(self) -> bytes: ...
    @property
    def chunk(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def length(self) -> int: ...


T = TypeVar("T", bound=Located)


@dataclass
class Range(Generic[T]):
    """One request: bytes `offset` to `offset + length` of a chunk, and what is in them, each with a number."""

    attempt: bytes
    chunk: int
    offset: int
    length: int
    items: list[tuple[int, T]] = field(default_factory=list)

    @property
    def end(self) -> int:
        """Where it ends in the chunk."""
        return self.offset + self.length


def ranges(
    items: Iterable[tuple[int, T]], *, size: int = RANGE_SIZE, count: int = RANGE_ITEMS, gap: int = GAP
) -> list[Range[T]]:
    """The ranges that hold all `items`, (number, where it is), in the order of chunks: none longer than `size` bytes,
    if no item is, or with more than `count` items."""
    found: list[Range[T]] = []
    for number, item in sorted(items, key=_place):
        last = found[-1] if found else None
        end = item.offset + item.length
        if (
            last is None
            or (last.attempt, last.chunk) != (item.attempt, item.chunk)
            or item.offset > last.end + gap
            or max(end, last.end) - last.offset > size
            or len(last.items) == count
        ):
            last = Range(item.attempt, item.chunk, item.offset, item.length)
            found.append(last)
        last.length = max(end, last.end) - last.offset
        last.items.append((number, item))
    return found


def _place(numbered: tuple[int, Located]) -> tuple[bytes, int, int, int]:
    number, item = numbered
    return item.attempt, item.chunk, item.offset, number
