"""Regions and allocation maps (pure).

A region is an aligned piece of `region_size` bytes; the last one of a volume may be short. An allocation map is the set
of regions that may hold data: *unallocated* means proven to read as zeros, and whatever is not proven is allocated.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from blockferry.common.errors import BlockferryError, Code
from pyroaring import BitMap

BLOCK_SIZE = 4096
"""The unit of change, in bytes: what file systems and guests write at least."""

MIN_REGION_SIZE = 64 * 1024
MAX_REGION_SIZE = 16 * 1024 * 1024
DEFAULT_REGION_SIZE = 1024 * 1024

MAX_REGIONS = 1 << 32
"""Region numbers are 32-bit: 4 PiB at the default region size."""

Run = tuple[int, int]
"""(first number, count)"""


class Provenance(enum.Enum):
    """How a map knows. `EXACT`: told by the file system or device. `CONSERVATIVE`: some zeros count as allocated.
    `ABSENT`: nothing is known and everything counts as allocated."""

    EXACT = "exact"
    CONSERVATIVE = "conservative"
    ABSENT = "absent"


def check_region_size(region_size: int) -> int:
    """Return `region_size`, or raise INVALID_ARGUMENT unless it is a power of two from 64 KiB to 16 MiB."""
    if not MIN_REGION_SIZE <= region_size <= MAX_REGION_SIZE or region_size & (region_size - 1):
        raise BlockferryError(
            Code.INVALID_ARGUMENT,
            f"region size {region_size} is not usable",
            cause="it must be a power of two from 64K to 16M",
            next="leave it out for the default of 1M",
        )
    return region_size


@dataclass(frozen=True)
class Geometry:
    """A volume's size and its division into regions. Sizes in bytes."""

    size: int
    region_size: int

    def __post_init__(self) -> None:
        check_region_size(self.region_size)
        if self.size < 1:
            raise BlockferryError(
                Code.INVALID_ARGUMENT,
                f"volume size {self.size} is not usable",
                cause="it is empty",
                next="name a volume of at least one byte",
            )
        if self.count > MAX_REGIONS:
            raise BlockferryError(
                Code.INVALID_ARGUMENT,
                f"a volume of {self.size} bytes has too many regions of {self.region_size} bytes",
                cause=f"at most {MAX_REGIONS} are possible",
                next="use a larger region size",
            )

    @property
    def count(self) -> int:
        """Number of regions."""
        return -(-self.size // self.region_size)

    def extent(self, first: int, count: int = 1) -> tuple[int, int]:
        """(offset, length) in bytes of `count` regions from `first`, cut at the end of the volume."""
        offset = first * self.region_size
        return offset, min(count * self.region_size, self.size - offset)

    def bytes_in(self, regions: BitMap) -> int:
        """Total length in bytes of `regions`."""
        total = len(regions) * self.region_size
        last = self.count - 1
        return total - (self.count * self.region_size - self.size) if last in regions else total


def runs_of(regions: BitMap, count: int, start: int = 0) -> Iterator[Run]:
    """The maximal runs of consecutive members from `start` below `count`, ascending. Costs per run, not per member."""
    gaps = regions.flip(start, count)
    position = start
    while position < count:
        try:
            first = regions.next_set_bit(position)
        except ValueError:
            return
        if first >= count:
            return
        try:
            position = min(gaps.next_set_bit(first), count)
        except ValueError:
            position = count
        yield first, position - first


def split_runs(runs: Iterable[Run], most: int) -> Iterator[Run]:
    """Cut runs so that none is longer than `most`."""
    for first, count in runs:
        while count > 0:
            yield first, min(count, most)
            first, count = first + most, count - most


def group_runs(runs: Iterable[Run], most: int) -> Iterator[list[Run]]:
    """Gather runs, in order and cut where need be, into groups of `most` numbers; the last may have fewer. What is
    scattered in short runs is handled in as few steps as what lies in one piece."""
    group: list[Run] = []
    room = most
    for first, count in runs:
        while count > 0:
            taken = min(count, room)
            group.append((first, taken))
            first, count, room = first + taken, count - taken, room - taken
            if room == 0:
                yield group
                group, room = [], most
    if group:
        yield group


@dataclass(frozen=True)
class AllocationMap:
    """Which regions of a volume may hold data, and how that is known."""

    geometry: Geometry
    regions: BitMap
    provenance: Provenance

    @classmethod
    def full(cls, geometry: Geometry, provenance: Provenance = Provenance.ABSENT) -> AllocationMap:
        """Everything allocated: what is said when nothing can be proven."""
        regions = BitMap()
        regions.add_range(0, geometry.count)
        return cls(geometry, regions, provenance)

    @classmethod
    def from_extents(
        cls, geometry: Geometry, extents: Iterable[tuple[int, int]], provenance: Provenance
    ) -> AllocationMap:
        """A region is allocated if any (offset, length) of `extents` touches it. Bytes past the volume are ignored."""
        regions = BitMap()
        for offset, length in extents:
            end = min(offset + length, geometry.size)
            if end > offset:
                regions.add_range(offset // geometry.region_size, -(-end // geometry.region_size))
        return cls(geometry, regions, provenance)

    @classmethod
    def from_runs(cls, geometry: Geometry, runs: Iterable[Run], provenance: Provenance) -> AllocationMap:
        """Rebuild a map from run lengths; raise PROTOCOL unless they ascend, are disjoint and lie in the volume."""
        regions = BitMap()
        end = 0
        for first, count in runs:
            if count < 1 or first < end or first + count > geometry.count:
                raise BlockferryError(
                    Code.PROTOCOL,
                    "the allocation map is not usable",
                    cause=f"run ({first}, {count}) after {end} of {geometry.count} regions",
                    next="check that both sides run a released version of blockferry",
                )
            end = first + count
            regions.add_range(first, end)
        return cls(geometry, regions, provenance)

    def cut_to(self, geometry: Geometry) -> AllocationMap:
        """What is known of those of the regions that a volume of another size has, too. Costs what is allocated."""
        return AllocationMap(geometry, self.regions & AllocationMap.full(geometry).regions, self.provenance)

    def runs(self) -> Iterator[Run]:
        """Allocated run lengths, ascending."""
        return runs_of(self.regions, self.geometry.count)

    @property
    def allocated_bytes(self) -> int:
        """Bytes in allocated regions."""
        return self.geometry.bytes_in(self.regions)
