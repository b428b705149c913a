"""What the extents of two files prove about their content (pure).

Files of one file system that share an extent hold the same bytes there. So the extents of a snapshot and of the one
before it tell, without reading either, what cannot have changed in between. Nothing else about extents is ever proof:

    unchanged   at the same place in both files, and in the older one looked at again afterwards, there is a hole; or
                an extent at the same physical place, SHARED in all three, written in all three or in none, and none of
                ENCODED, ENCRYPTED, INLINE, TAIL, NOT_ALIGNED, DELALLOC, UNKNOWN
    changed     everything else

The older file is looked at twice because file systems move extents (balance, defragmentation): its place could be
somebody else's by the time the newer one is looked at. Source: ioctl_fiemap(2), linux/fiemap.h.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from blockferry.common.regions import Geometry
from pyroaring import BitMap

Extent = tuple[int, int, int, int]
"""(logical offset, physical offset, length, flags), in bytes, as FIEMAP gives it."""

UNKNOWN = 0x0002
DELALLOC = 0x0004
ENCODED = 0x0008
ENCRYPTED = 0x0080
NOT_ALIGNED = 0x0100
INLINE = 0x0200
TAIL = 0x0400
UNWRITTEN = 0x0800
SHARED = 0x2000

_NO_PROOF = UNKNOWN | DELALLOC | ENCODED | ENCRYPTED | NOT_ALIGNED | INLINE | TAIL

_HOLE = "hole"
_NOTHING = "nothing"
_Key = tuple[int, bool] | str
"""What a stretch of a file is: where on the disk its first byte would be if it began at 0, and whether it is unwritten;
or a hole; or nothing that proves anything."""

_Stretch = tuple[int, _Key]
"""(end, key)"""


def unchanged(
    base: Iterable[Extent], new: Iterable[Extent], again: Iterable[Extent], start: int, end: int
) -> Iterator[tuple[int, int]]:
    """(offset, length) within [start, end) of what cannot have changed between two files. `base`, `new`, and `base`
    once more, each ascending, hold every extent that reaches into that range."""
    files = [_Reader(_cut(extents, start, end)) for extents in (base, new, again)]
    position = begun = start
    while position < end:
        heads = [file.reaching(position) for file in files]
        stop = min(head[0] for head in heads)
        keys = {head[1] for head in heads}
        if len(keys) > 1 or _NOTHING in keys:
            if begun < position:
                yield begun, position - begun
            begun = stop
        position = stop
    if begun < position:
        yield begun, position - begun


class _Reader:
    """The stretches of one file; together they cover the range that is looked at."""

    def __init__(self, stretches: Iterator[_Stretch]) -> None:
        self._stretches = stretches
        self._head = next(stretches)

    def reaching(self, position: int) -> _Stretch:
        """The stretch that holds this offset; offsets never go back."""
        while self._head[0] <= position:
            self._head = next(self._stretches)
        return self._head


def _cut(extents: Iterable[Extent], start: int, end: int) -> Iterator[_Stretch]:
    """The whole of a file between two offsets, piece by piece."""
    position = start
    for logical, physical, length, flags in extents:
        low, high = max(logical, start), min(logical + length, end)
        if low >= high:
            continue
        if low < position:
            # Out of order: whoever told this may have told anything.
            yield end, _NOTHING
            return
        if low > position:
            yield low, _HOLE
        proof = flags & SHARED and not flags & _NO_PROOF
        yield high, (physical - logical, bool(flags & UNWRITTEN)) if proof else _NOTHING
        position = high
    if position < end:
        yield end, _HOLE


def changed_regions(
    base: Iterable[Extent],
    new: Iterable[Extent],
    again: Iterable[Extent],
    geometry: Geometry,
    start: int,
    end: int,
) -> BitMap:
    """The regions of `new` that have a byte in [start, end) which may not be what `base` has there; `unchanged` says
    what is asked of the extents."""
    changed = BitMap()
    position = start
    for offset, length in unchanged(base, new, again, start, end):
        _add(changed, position, offset, geometry)
        position = offset + length
    _add(changed, position, end, geometry)
    return changed


def _add(regions: BitMap, start: int, end: int, geometry: Geometry) -> None:
    if start < end:
        regions.add_range(start // geometry.region_size, -(-end // geometry.region_size))


def coarsened(regions: BitMap, fine: Geometry, region_size: int) -> BitMap:
    """The regions of `region_size` bytes that hold any of `regions`, which are those of `fine`: no larger ones. Costs
    what is in it."""
    ratio = region_size // fine.region_size
    found = BitMap()
    position = 0
    while True:
        try:
            position = regions.next_set_bit(position)
        except ValueError:
            return found
        found.add(position // ratio)
        position = (position // ratio + 1) * ratio
