"""Compare any two volumes without writing to either.

Both sides hash with a key drawn for this one run, so that no cached or prepared digest can answer for the data.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field

from blockferry.client.compare import Refiner
from blockferry.client.report import SCHEMA, Phase
from blockferry.common.digests import KEY_SIZE, REGION_DIGEST_SIZE, differing_pieces
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.regions import BLOCK_SIZE, DEFAULT_REGION_SIZE, Geometry, Run, group_runs, runs_of
from blockferry.common.volumes import ReplicaVolume, Volume

BATCH_SIZE = 8 * 1024 * 1024
"""Bytes compared at a time."""


@dataclass
class Differences:
    """What `verify` found: (offset, length) in bytes, ascending and merged, in whole blocks."""

    ranges: list[tuple[int, int]] = field(default_factory=list)
    bytes_compared: int = 0
    bytes_skipped: int = 0

    def add(self, offset: int, length: int) -> None:
        """Add a range behind all others."""
        if self.ranges and sum(self.ranges[-1]) == offset:
            offset, length = self.ranges[-1][0], self.ranges.pop()[1] + length
        self.ranges.append((offset, length))

    def report(self, left: Volume, right: Volume) -> dict[str, object]:
        """The report of `verify`."""
        return {
            "schema": SCHEMA,
            "a": left.uri,
            "b": right.uri,
            "outcome": "different" if self.ranges else "equal",
            "volume_size": left.size,
            "bytes": {
                "compared": self.bytes_compared,
                "proven_zero": self.bytes_skipped,
                "different": sum(length for _, length in self.ranges),
            },
            "ranges": [{"offset": offset, "length": length} for offset, length in self.ranges],
        }


def _region_size(*volumes: Volume) -> int:
    """A replica's own where there is one, so that its server hashes instead of sending data."""
    sizes = [volume.region_size for volume in volumes if isinstance(volume, ReplicaVolume)]
    return sizes[0] if sizes else DEFAULT_REGION_SIZE


async def verify(left: Volume, right: Volume, phase: Phase) -> Differences:
    """Compare whatever either side's map does not prove to be zeros. Raises SIZE_MISMATCH for different sizes."""
    if left.size != right.size:
        raise BlockferryError(
            Code.SIZE_MISMATCH,
            f"{left.uri} and {right.uri} have different sizes",
            cause=f"{left.size} against {right.size} bytes",
            next="compare volumes of one size",
            expected=str(left.size),
            found=str(right.size),
        )
    geometry = Geometry(left.size, _region_size(left, right))
    size = geometry.region_size
    left_map, right_map = await asyncio.gather(left.allocation(size), right.allocation(size))
    regions = left_map.regions | right_map.regions
    differences = Differences(bytes_skipped=geometry.size - geometry.bytes_in(regions))
    phase.total = geometry.bytes_in(regions)
    key = secrets.token_bytes(KEY_SIZE)
    refiner = Refiner(key, size)

    async def ask(piece_size: int, runs: Sequence[Run]) -> bytes:
        return await right.digests(piece_size, runs, key, size)

    for runs in group_runs(runs_of(regions, geometry.count), max(BATCH_SIZE // size, 1)):
        ours, theirs = await asyncio.gather(left.digests(size, runs, key, size), right.digests(size, runs, key, size))
        numbers = [region for first, count in runs for region in range(first, first + count)]
        for index in differing_pieces(ours, theirs, REGION_DIGEST_SIZE):
            offset, length = geometry.extent(numbers[index])
            data = memoryview(bytearray(length))
            await left.read_into(offset, data)

            (blocks,) = await refiner.differing_blocks([(offset, data)], ask)
            for start, number in blocks:
                begin = start * BLOCK_SIZE
                differences.add(offset + begin, min(number * BLOCK_SIZE, length - begin))
        length = sum(geometry.extent(*run)[1] for run in runs)
        differences.bytes_compared += length
        phase.done += length
    return differences
