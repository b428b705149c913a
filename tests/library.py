"""The client library in the test's own process, for tests that would spend their time starting interpreters."""

from __future__ import annotations

import asyncio
from pathlib import Path

from blockferry.client.report import Phase, Progress
from blockferry.client.sync import SyncOptions, sync
from blockferry.client.verify import verify
from blockferry.common.address import Address
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.volumes import ReplicaVolume, Volume

from tests.fault.raw import Raw
from tests.support import Report, Server


async def synced(
    source: Volume, server: Server, volume: str, state: Path, *, region_size: int = 0, grow: bool = False
) -> Report:
    """Sync, as soon as the lease of a client that has died is over; `state`: where commit ids are kept."""
    while True:
        try:
            options = SyncOptions(state_directory=state, region_size=region_size, grow=grow)
            return await sync(source, Address.parse(server.url(volume)), options, Progress())
        except BlockferryError as error:
            if error.code is not Code.IN_USE:
                raise
            await asyncio.sleep(0.01)


async def differences(source: Volume, server: Server, volume: str) -> list[tuple[int, int]]:
    """Where `verify` finds that the replica differs, by digests of its server's."""
    replica = await ReplicaVolume.open(server.url(volume))
    try:
        return (await verify(source, replica, Phase("verify"))).ranges
    finally:
        await replica.close()


def generation(server: Server, volume: str) -> int:
    """The number of the newest generation."""
    with Raw(server.address) as raw:
        return raw.show(volume).generation


def replica_image(server: Server, volume: str) -> Path:
    """The image of the newest generation."""
    with Raw(server.address) as raw:
        return Path(raw.show(volume).path)


def replicated(server: Server, volume: str) -> bytes:
    """What the newest generation holds."""
    return replica_image(server, volume).read_bytes()
