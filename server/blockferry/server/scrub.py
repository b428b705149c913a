"""Re-read a committed generation and compare it with the digests recorded when it was committed."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from blockferry.common.digests import REGION_DIGEST_SIZE
from blockferry.common.regions import Geometry, runs_of, split_runs
from blockferry.common.volumes import in_thread
from blockferry.server.cache import DigestCache
from blockferry.server.replica import Replica
from blockferry.v1 import replicas_pb2 as pb
from pyroaring import BitMap

BATCH_SIZE = 8 * 1024 * 1024
"""Bytes read and hashed between two messages."""


async def verify_point(replica: Replica, number: int) -> AsyncGenerator[pb.VerifyReplicaResponse, None]:
    """Progress and rotten ranges. Every region is read that is allocated now or had data when it was committed."""
    point = replica.points.resolve(number)
    store = replica.store
    region_size = store.identity.region_size
    geometry = Geometry(point.size, region_size)
    recorded = await in_thread(store.recorded_digests, point) or DigestCache()
    async with replica.points.reading(point.number) as volume:
        await in_thread(store.content.forget_pages, point)
        regions = (await volume.allocation(region_size)).regions | recorded.known
        total = geometry.bytes_in(regions)
        done = 0
        yield pb.VerifyReplicaResponse(bytes_total=total)
        for first, count in split_runs(runs_of(regions, geometry.count), max(BATCH_SIZE // region_size, 1)):
            found = await volume.digests(region_size, [(first, count)], store.identity.key, region_size)
            done += geometry.extent(first, count)[1]
            response = pb.VerifyReplicaResponse(bytes_done=done, bytes_total=total)
            rotten = BitMap()
            for index in range(count):
                expected = recorded.get(first + index)
                if expected is None:
                    response.bytes_unrecorded += geometry.extent(first + index)[1]
                elif expected != found[index * REGION_DIGEST_SIZE : (index + 1) * REGION_DIGEST_SIZE]:
                    rotten.add(first + index)
            for run in runs_of(rotten, geometry.count):
                offset, length = geometry.extent(*run)
                response.rotten.add(offset=offset, length=length)
            if rotten:
                store.distrust(point)
            yield response
