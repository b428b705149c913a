"""What the tests of handing over do again and again."""

from __future__ import annotations

import os
from pathlib import Path

from blockferry.v1 import replication_pb2 as pb

from tests.fault.raw import REGION, Raw
from tests.images import BLOCK, KIB, Hole, change, noise
from tests.support import Finished, Report, Server, run_cli

SIZE = 16 * REGION + 3 * BLOCK + 100
"""Bytes: the last region is short, and so is its last block."""


def sync(server: Server, source: Path, volume: str, *flags: object) -> Report:
    return server.sync(source, volume, "--region-size", REGION, "--keep", "last=9", *flags)


def replicated(raw: Raw, source: Path, volume: str, count: int = 2) -> dict[int, bytes]:
    """Make so many generations of a source that changes in between; what each holds, by number."""
    contents = {}
    for number in range(1, count + 1):
        change(source, [(number * REGION + 8 * KIB, noise(f"generation {number}", 24 * KIB))])
        contents[number] = content = source.read_bytes()
        session = raw.open(volume, SIZE).session
        for offset in range(0, SIZE, REGION):
            if any(region := content[offset : offset + REGION]):
                raw.write(session, offset, region)
            else:
                unmap = pb.UnmapRegionRequest(session=session, offset=offset, length=len(region))
                raw.call("Replication/UnmapRegion", unmap, pb.UnmapRegionResponse)
        assert raw.commit(volume, session, os.urandom(16), pb.Retention(last=9)).generation == number
    return contents


def held(raw: Raw, volume: str) -> dict[int, bytes]:
    """What every recovery point holds, by number."""
    return {point.number: raw.read(volume, point.number, 0, point.size) for point in raw.points(volume)}


def work_on(promoted: Path) -> bytes:
    """Use what was promoted: write, trim and zero; what it holds then."""
    change(promoted, [(0, noise("changed", BLOCK)), (6 * REGION, Hole(REGION)), (SIZE - 100, noise("end", 100))])
    change(promoted, [(9 * REGION + 100, b"not aligned"), (4 * REGION + BLOCK, noise("in a hole", BLOCK))])
    return promoted.read_bytes()


def demoting(server: Server, volume: str, fate: str) -> Finished:
    return run_cli("replica", "demote", server.url(volume), fate, "--yes", "--json", "--quiet")
