"""Death of blockferry-rehydrate: at every crash point of its source, and at random instants. What a guest was told to
be durable is there afterwards, and nothing is older than it may be."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import blockferry.server.rehydrate
import pytest
from blockferry.common.errors import BlockferryError
from blockferry.common.nbd.client import NbdClient
from blockferry.common.nbd.uri import NbdUri
from blockferry.common.regions import BLOCK_SIZE

from tests.images import KIB, MIB, build, noise
from tests.rehydrators import Rehydrator
from tests.support import Server, run_cli

B = BLOCK_SIZE
SIZE = 3 * MIB
KILLED = -9
KILLS = int(os.environ.get("BLOCKFERRY_SOAK_KILLS", "6"))
SECONDS = 0.35
"""A life lasts about this long: kills are spread over it."""

MOST_PASSES = 2
"""Passes of a crash point that are tried."""

_POINT = re.compile(r"crash_point\(\s*\"([^\"]+)\"")
OWN = {
    name
    for path in Path(blockferry.server.rehydrate.__path__[0]).glob("*.py")
    for name in _POINT.findall(path.read_text())
}
COMMON = {"log-before-fsync", "atomic-before-rename", "rename-before-fsync"}
"""Of common/durable.py, where this program passes them, too."""


@pytest.fixture(scope="module")
def replica(server: Server, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, bytes]:
    """A replica, and what it holds."""
    pieces = [(0, noise(1, 400 * KIB)), (MIB, noise(2, 20 * KIB)), (2 * MIB - 100, noise(3, MIB))]
    path = build(tmp_path_factory.mktemp("source") / "vm.raw", SIZE, pieces)
    server.sync(path, "crashes")
    return server.url("crashes"), path.read_bytes()


@dataclass
class Guest:
    """What a guest knows: what it was told to be durable, and what it has asked for since."""

    durable: bytearray
    since: list[tuple[int, bytes]] = field(default_factory=list)

    def current(self) -> bytes:
        """What must be read while nothing dies."""
        found = bytearray(self.durable)
        for offset, data in self.since:
            found[offset : offset + len(data)] = data
        return bytes(found)

    def check(self, found: bytes) -> None:
        """After a death: each block is what was durable, or something newer."""
        for start in range(0, SIZE, B):
            allowed = {bytes(self.durable[start : start + B])}
            for offset, data in self.since:
                if offset < start + B and start < offset + len(data):
                    for one in tuple(allowed):
                        now = bytearray(one)
                        low, high = max(offset, start), min(offset + len(data), start + B)
                        now[low - start : high - start] = data[low - offset : high - offset]
                        allowed.add(bytes(now))
            assert found[start : start + B] in allowed, f"the block at {start} is lost, or older than it may be"
        self.durable, self.since = bytearray(found), []

    async def live(self, client: NbdClient, rng: random.Random, turns: int) -> None:
        """Write, trim, read and flush until somebody dies."""
        for _ in range(turns):
            offset = rng.randrange(0, SIZE - 40 * KIB) // 512 * 512
            length = rng.choice((512, B, 3 * B, 32 * KIB))
            if rng.random() < 0.5:
                offset, length = offset // B * B, -(-length // B) * B
            match rng.choice(("write", "write", "fua", "zero", "read", "flush")):
                case "write":
                    data = rng.randbytes(length)
                    self.since.append((offset, data))
                    await client.write([(offset, data)], fua=False)
                case "fua":
                    data = rng.randbytes(length)
                    self.since.append((offset, data))
                    await client.write([(offset, data)], fua=True)
                    # Of this range alone; what lies under it is gone with it.
                    self.durable[offset : offset + length] = data
                    self.since = [one for one in self.since if not _within(one, offset, length)]
                    self.since = [piece for one in self.since for piece in _outside(one, offset, length)]
                case "zero":
                    self.since.append((offset, bytes(length)))
                    await client.write_zeroes(offset, length, fua=False, fast=False)
                case "read":
                    found = bytearray(length)
                    await client.read_into(offset, memoryview(found))
                    assert found == self.current()[offset : offset + length]
                case _:
                    now = self.current()
                    await client.flush()
                    self.durable, self.since = bytearray(now), []


def _within(one: tuple[int, bytes], offset: int, length: int) -> bool:
    return offset <= one[0] and one[0] + len(one[1]) <= offset + length


def _outside(one: tuple[int, bytes], offset: int, length: int) -> list[tuple[int, bytes]]:
    """The parts of a change that lie before and behind a range."""
    start, data = one
    before, behind = data[: max(offset - start, 0)], data[max(offset + length - start, 0) :]
    if offset + length <= start or start + len(data) <= offset:
        return [one]
    parts = [(start, before), (start + len(data) - len(behind), behind)]
    return [(at, part) for at, part in parts if part]


async def _live(disk: Rehydrator, guest: Guest, rng: random.Random, turns: int) -> bool:
    """Whether it lived on to the end of what the guest does."""
    try:
        client = await NbdClient.connect(NbdUri.parse(disk.uri))
    except BlockferryError:
        return False
    lived = False
    try:
        with contextlib.suppress(BlockferryError):
            await guest.live(client, rng, turns)
            lived = True
    finally:
        await client.close()
    assert lived or disk.died() == KILLED
    return lived


async def _found(disk: Rehydrator) -> bytes:
    client = await NbdClient.connect(NbdUri.parse(disk.uri))
    try:
        found = bytearray(SIZE)
        await client.read_into(0, memoryview(found))
        return bytes(found)
    finally:
        await client.close()


async def _whole_life(disk: Rehydrator, guest: Guest) -> bool:
    """Begin, be used, take a snapshot, complete, stop; whether it lived."""
    if disk.try_to_start() is not None:
        return False
    rng = random.Random(5)
    if not await _live(disk, guest, rng, 12):
        return False
    await asyncio.to_thread(run_cli, "rehydration", "snapshot", disk.state, "--name", "copy")
    if disk.is_dead() or not await _live(disk, guest, rng, 6):
        return False
    if not disk.says(b"everything is hydrated"):
        return False
    now = guest.current()
    status = disk.stop()
    if status == 0:
        guest.durable, guest.since = bytearray(now), []
    return status == 0


async def _recovers(disk: Rehydrator, guest: Guest) -> None:
    """Another process goes on, and the primary is whole by itself in the end."""
    disk.doom = ""
    disk.kill()
    disk.start()
    guest.check(await _found(disk))
    disk.hydrated()
    assert await _found(disk) == bytes(guest.durable)
    assert disk.stop() == 0
    assert disk.content() == bytes(guest.durable)


@pytest.fixture
def home(xfs_pool_root: Path, tmp_path: Path) -> Iterator[Path]:
    """Where snapshots can be taken."""
    path = xfs_pool_root / tmp_path.name
    path.mkdir()
    yield path
    for one in list(Rehydrator.running):
        one.kill()
    shutil.rmtree(path)


@pytest.mark.parametrize("name", sorted(OWN | COMMON))
async def test_it_dies(home: Path, replica: tuple[str, bytes], name: str) -> None:
    uri, content = replica
    hits = 0
    for number in range(1, MOST_PASSES + 1):
        disk = Rehydrator(home / str(number), uri, doom=f"{name}:{number}")
        guest = Guest(bytearray(content))
        if await _whole_life(disk, guest):
            break
        hits += 1
        await _recovers(disk, guest)
    assert hits, f"{name} is never passed"
    print(f"{hits} deaths at {name}")


async def test_it_dies_at_random_instants(home: Path, replica: tuple[str, bytes]) -> None:
    uri, content = replica
    rng = random.Random(11)
    guest = Guest(bytearray(content))
    disk = Rehydrator(home / "disk", uri, flags=["--bwlimit", "3M"])
    deaths = 0
    for number in range(KILLS):
        if number % 3 == 0:
            # Sooner or later everything is hydrated: begin anew.
            disk.kill()
            shutil.rmtree(disk.directory)
            disk = Rehydrator(home / "disk", uri, flags=["--bwlimit", "3M"])
            guest = Guest(bytearray(content))
        disk.start()
        if number % 3:
            guest.check(await _found(disk))
        using = asyncio.create_task(_live(disk, guest, rng, 1 << 30))
        await asyncio.sleep(rng.uniform(0, SECONDS))
        os.kill(disk.pid, 9)
        assert not await using
        disk.kill()
        deaths += 1
    await _recovers(disk, guest)
    print(f"{deaths} deaths survived")
