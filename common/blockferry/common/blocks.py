"""Sets of blocks of a volume, and their runs (pure). For volumes of any size: 64-bit numbers."""

from __future__ import annotations

from collections.abc import Iterator

from blockferry.common.regions import BLOCK_SIZE, Run
from pyroaring import BitMap64

_CONTAINER = 1 << 16
"""Numbers that a bitmap keeps together."""


def blocks_of(offset: int, length: int) -> range:
    """The blocks that a byte range touches."""
    return range(offset // BLOCK_SIZE, -(-(offset + length) // BLOCK_SIZE))


def clip(blocks: BitMap64, wanted: range) -> BitMap64:
    """Those of `blocks` in `wanted`; costs what is found, not what there is."""
    window = BitMap64()
    window.add_range(wanted.start, wanted.stop)
    return blocks & window


def runs(blocks: BitMap64) -> Iterator[Run]:
    """The maximal runs of consecutive members, ascending."""
    position = 0
    while True:
        try:
            first = blocks.next_set_bit(position)
        except ValueError:
            return
        position = _end_of_run(blocks, first)
        yield first, position - first


def _end_of_run(blocks: BitMap64, position: int) -> int:
    """The first number from `position` on that is no member. Costs the logarithm of its distance within a container,
    and so much again for each whole one."""
    while True:
        # Never across containers: CRoaring's 64-bit contains_range (5.2) passes over one that is missing in between.
        end = position - position % _CONTAINER + _CONTAINER
        step = 1
        while position < end and blocks.contains_range(position, min(position + step, end)):
            position, step = min(position + step, end), 2 * step
        if position == end:
            continue
        while step > 1:
            step //= 2
            if position + step <= end and blocks.contains_range(position, position + step):
                position += step
        return position
