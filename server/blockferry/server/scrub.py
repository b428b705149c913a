"""Re-read a committed generation and compare it with the digests recorded when it was committed.

What came of the newest generation is kept in `scrub.json`, whoever asked for it.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator

import msgspec
import structlog
from blockferry.common.digests import REGION_DIGEST_SIZE
from blockferry.common.durable import write_atomic
from blockferry.common.regions import Geometry, group_runs, runs_of
from blockferry.common.volumes import in_thread
from blockferry.server.cache import DigestCache
from blockferry.server.replica import Replica
from blockferry.server.store import SCRUB, Store
from blockferry.v1 import replicas_pb2 as pb
from pyroaring import BitMap

log = structlog.get_logger("blockferry.scrub")

BATCH_SIZE = 8 * 1024 * 1024
"""Bytes read and hashed between two messages."""

NAME = SCRUB


class ScrubRecord(msgspec.Struct, frozen=True):
    """The last time a newest generation was re-read. `at_us` in microseconds since 1970; `rotten` are (offset, length);
    `problem` says why it could not be read to its end."""

    at_us: int
    generation: int
    bytes: int = 0
    rotten: list[tuple[int, int]] = []
    problem: str = ""


def last_scrub(store: Store) -> ScrubRecord | None:
    """What came of the last one, or None where nothing usable is known."""
    try:
        return msgspec.json.decode((store.directory / NAME).read_bytes(), type=ScrubRecord)
    except (OSError, UnicodeDecodeError, msgspec.MsgspecError):
        return None


def record_scrub(store: Store, record: ScrubRecord) -> None:
    """Keep what came of one, durably. A disk that does not take it is logged: what was found is true all the same."""
    try:
        write_atomic(store.directory / NAME, msgspec.json.encode(record))
    except OSError as error:
        log.warning("cannot keep what a scrub found", path=str(store.directory), error=str(error))


def now_us() -> int:
    """Microseconds since 1970."""
    return time.time_ns() // 1000


async def verify_point(replica: Replica, number: int) -> AsyncGenerator[pb.VerifyReplicaResponse, None]:
    """Progress and rotten ranges. Every region is read that is allocated now or had data when it was committed."""
    point = replica.points.resolve(number)
    store = replica.store
    region_size = store.identity.region_size
    geometry = Geometry(point.size, region_size)
    is_newest = point == store.generations.newest
    all_rotten = BitMap()
    recorded = await in_thread(store.recorded_digests, point) or DigestCache()
    async with replica.points.reading(point.number) as volume:
        await in_thread(store.content.forget_pages, point)
        regions = (await volume.allocation(region_size)).regions | recorded.known
        total = geometry.bytes_in(regions)
        done = 0
        yield pb.VerifyReplicaResponse(bytes_total=total)
        for runs in group_runs(runs_of(regions, geometry.count), max(BATCH_SIZE // region_size, 1)):
            found = await volume.digests(region_size, runs, store.identity.key, region_size)
            done += sum(geometry.extent(*run)[1] for run in runs)
            response = pb.VerifyReplicaResponse(bytes_done=done, bytes_total=total)
            rotten = BitMap()
            numbers = [region for first, count in runs for region in range(first, first + count)]
            for index, region in enumerate(numbers):
                expected = recorded.get(region)
                if expected is None:
                    response.bytes_unrecorded += geometry.extent(region)[1]
                elif expected != found[index * REGION_DIGEST_SIZE : (index + 1) * REGION_DIGEST_SIZE]:
                    rotten.add(region)
            for run in runs_of(rotten, geometry.count):
                offset, length = geometry.extent(*run)
                response.rotten.add(offset=offset, length=length)
            if rotten:
                store.distrust(point)
                all_rotten |= rotten
            yield response
    ranges = [geometry.extent(*run) for run in runs_of(all_rotten, geometry.count)]
    if ranges:
        log.error(
            "a generation is not what was committed",
            volume=replica.name,
            generation=point.number,
            ranges=len(ranges),
            bytes=sum(length for _, length in ranges),
            first_offset=ranges[0][0],
        )
    if is_newest:
        await in_thread(record_scrub, store, ScrubRecord(now_us(), point.number, total, ranges))
