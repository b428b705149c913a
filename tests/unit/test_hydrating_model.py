"""A hydrating volume against a plain array of bytes: whatever is read, written, zeroed, flushed, crashes, goes away or
fails, no byte is lost and none is older than it may be. The sweep runs all the while."""

from __future__ import annotations

import asyncio
import os
import random
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import pytest
from blockferry.common.errors import BlockferryError
from blockferry.server.rehydrate import fetch, sources, volume
from blockferry.server.rehydrate.map import HydrationMap
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.unit.rehydration import SECTOR, B, Primary, Site, World, disk_of, new_map, pattern, read

T = TypeVar("T")

SIZE = 61 * B + 700
SECTORS = -(-SIZE // SECTOR)
UNIT_BLOCKS = 4

offsets = st.one_of(st.integers(0, SIZE - 1), st.integers(0, SIZE // B).map(lambda block: block * B))
lengths = st.one_of(st.integers(1, 3 * B), st.sampled_from([B, 2 * B, 5 * B, 17 * B]))


class Rehydrating(RuleBasedStateMachine):
    """`content` is what must be read. `possible`: for each sector what it may be after a crash: what it was when it was
    last flushed, and whatever it was since."""

    def __init__(self) -> None:
        super().__init__()
        self._directory = tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
        self._patch = pytest.MonkeyPatch()
        for module in (fetch, volume):
            self._patch.setattr(module, "UNIT_BLOCKS", UNIT_BLOCKS)
        self._patch.setattr(fetch, "DEFAULT_REGION_SIZE", 64 * 1024)
        self._patch.setattr(fetch, "WINDOW_BLOCKS", 16)
        self._patch.setattr(fetch, "HOLE_BLOCKS", {"punch-hole": 5})
        self._patch.setattr(fetch, "RETRY_SECONDS", 0.001)
        self._patch.setattr(sources, "RETRY_SECONDS", 0.0)
        self._runner = asyncio.Runner()
        self._sweep: asyncio.Task[None] | None = None

    def run(self, work: Callable[[], Awaitable[T]]) -> T:
        async def running() -> T:
            return await work()

        return self._runner.run(running())

    @initialize(seed=st.integers(0, 5), pauses=st.integers(0, 3), old=st.booleans())
    def begin(self, seed: int, pauses: int, old: bool) -> None:
        source = bytearray(pattern(seed, SIZE))
        rng = random.Random(seed)
        for start in range(0, SIZE, 16 * B):
            if rng.random() < 0.4:
                source[start : start + 16 * B] = bytes(len(source[start : start + 16 * B]))
        for start in range(0, SIZE, B):
            if rng.random() < 0.2:
                source[start : start + B] = bytes(len(source[start : start + B]))
        self.site = Site(bytes(source))
        self.other = Site(bytes(source))
        self.world = World(a=self.site, b=self.other)
        self.content = bytearray(source)
        self.possible = [[self._sector(number)] for number in range(SECTORS)]
        self.primary = Primary(pattern(77, SIZE) if old else bytes(SIZE), pauses)
        self.rng = random.Random(seed)

        async def opened() -> None:
            self.disk = disk_of(self.primary, new_map(self.directory, SIZE), self.world, fresh=not old, timeout=0.05)
            self._sweep = asyncio.create_task(self.disk.fetcher.sweep())

        self.run(opened)

    @property
    def directory(self) -> Path:
        return Path(self._directory.name)

    def _sector(self, number: int) -> bytes:
        return bytes(self.content[number * SECTOR : (number + 1) * SECTOR])

    def _changed(self, offset: int, data: bytes) -> None:
        self.content[offset : offset + len(data)] = data
        for number in range(offset // SECTOR, -(-(offset + len(data)) // SECTOR)):
            self.possible[number].append(self._sector(number))

    @property
    def _reachable(self) -> bool:
        return not (self.site.down and self.other.down)

    def _try(self, work: Callable[[], Awaitable[T]]) -> T | None:
        """The answer, or None where it failed for want of a source."""
        try:
            return self.run(work)
        except BlockferryError as error:
            if "source is down" not in error.line() or self._reachable:
                raise
            return None

    # --- what a guest does ------------------------------------------------------------------------------------------

    @rule(offset=offsets, length=lengths)
    def read(self, offset: int, length: int) -> None:
        length = min(length, SIZE - offset)
        found = self._try(lambda: read(self.disk, offset, length))
        assert found is None or found == self.content[offset : offset + length]

    @rule(offset=offsets, length=lengths)
    def read_at_once(self, offset: int, length: int) -> None:
        buffer = bytearray(min(length, SIZE - offset))
        if self.disk.read_now(offset, memoryview(buffer)):
            assert buffer == self.content[offset : offset + len(buffer)]

    @rule(offset=offsets, length=lengths, seed=st.integers(0, 1000))
    def write(self, offset: int, length: int, seed: int) -> None:
        data = pattern(seed, min(length, SIZE - offset))

        async def writing() -> bool:
            await self.disk.write([(offset, data)])
            return True

        if self._try(writing):
            self._changed(offset, data)

    @rule(offset=offsets, length=lengths)
    def zero(self, offset: int, length: int) -> None:
        length = min(length, SIZE - offset)

        async def zeroing() -> bool:
            await self.disk.unmap([(offset, length)])
            return True

        if self._try(zeroing):
            self._changed(offset, bytes(length))

    @rule(offset=offsets, length=lengths)
    def trim(self, offset: int, length: int) -> None:
        length = min(length, SIZE - offset)
        _, left = self.run(lambda: self.disk.deallocate([(offset, length)]))
        position = offset
        for start, size in [*sorted(left), (offset + length, 0)]:
            if start > position:
                self._changed(position, bytes(start - position))
            position = start + size

    @rule(
        offset=offsets, length=lengths, others=st.lists(st.tuples(offsets, lengths), max_size=4), seed=st.integers(0, 9)
    )
    def write_among_reads(self, offset: int, length: int, others: list[tuple[int, int]], seed: int) -> None:
        """Each sector that is read meanwhile is the old or the new one."""
        data = pattern(seed, min(length, SIZE - offset))
        before = bytes(self.content)

        async def together() -> list[bytes | BaseException | None]:
            return await asyncio.gather(
                self.disk.write([(offset, data)]),
                *(read(self.disk, at, min(size, SIZE - at)) for at, size in others),
                return_exceptions=True,
            )

        written, *found = self.run(together)
        if written is None:
            self._changed(offset, data)
        for (at, size), one in zip(others, found, strict=True):
            if isinstance(one, BaseException):
                assert not self._reachable
                continue
            assert one is not None
            for start in range(at, at + min(size, SIZE - at), SECTOR):
                part = one[start - at : start - at + SECTOR]
                now, old = self.content[start : start + len(part)], before[start : start + len(part)]
                halves = {bytes(now), bytes(old)}
                border = -start % SECTOR or SECTOR
                mixed = {bytes(a[:border] + b[border:]) for a in (now, old) for b in (now, old)}
                assert part in halves | mixed

    @rule()
    def flush(self) -> None:
        self.run(lambda: self.disk.flush())
        self.possible = [[self._sector(number)] for number in range(SECTORS)]

    # --- what happens to it -----------------------------------------------------------------------------------------

    @rule(site=st.booleans(), down=st.booleans())
    def source(self, site: bool, down: bool) -> None:
        (self.site if site else self.other).down = down

    @rule(turns=st.integers(1, 60))
    def time_goes_by(self, turns: int) -> None:
        async def going() -> None:
            for _ in range(turns):
                await asyncio.sleep(0)

        self.run(going)

    @rule(offset=offsets, length=lengths, kind=st.sampled_from(["write", "unmap"]), seed=st.integers(0, 9))
    def fail(self, offset: int, length: int, kind: str, seed: int) -> None:
        """A guest's change fails half-way; or, if the sweep is quicker, what that wanted to write through."""
        length = min(length, SIZE - offset)
        data = pattern(seed, length) if kind == "write" else bytes(length)
        before = bytes(self.content)
        self.primary.failing = {kind}

        async def changing() -> bool:
            try:
                await (self.disk.write([(offset, data)]) if kind == "write" else self.disk.unmap([(offset, length)]))
                return True
            except BlockferryError as error:
                if "fails" not in error.line() and self._reachable:
                    raise
                return False

        done = self.run(changing)
        self.primary.failing = set()
        if done:
            self._changed(offset, data)
            return
        # Sector by sector it is the old or the new, and from now on what it turns out to be.
        downs = self.site.down, self.other.down
        self.site.down = self.other.down = False
        found = self.run(lambda: read(self.disk, 0, SIZE))
        self.site.down, self.other.down = downs
        after = bytearray(before)
        after[offset : offset + length] = data
        for number in range(SECTORS):
            start, stop = number * SECTOR, (number + 1) * SECTOR
            assert found[start:stop] in (before[start:stop], bytes(after[start:stop]))
            if found[start:stop] != before[start:stop]:
                self._changed(start, found[start:stop])
            elif number in range(offset // SECTOR, -(-(offset + length) // SECTOR)):
                self.possible[number].append(bytes(after[start:stop]))

    @rule(seed=st.integers(0, 1000))
    def crash(self, seed: int) -> None:
        """Whatever was not flushed is there or not, sector by sector; what was is there."""

        async def dying() -> None:
            if self._sweep is not None:
                self._sweep.cancel()
                await asyncio.gather(self._sweep, return_exceptions=True)
            self.primary = self.primary.crashed(random.Random(seed))
            await self.disk.close()
            self.disk = disk_of(self.primary, HydrationMap.open(self.directory), self.world, timeout=0.05)

        self.run(dying)
        downs = self.site.down, self.other.down
        self.site.down = self.other.down = False
        found = self.run(lambda: read(self.disk, 0, SIZE))
        self.site.down, self.other.down = downs
        for number in range(SECTORS):
            sector = found[number * SECTOR : (number + 1) * SECTOR]
            assert sector in self.possible[number], f"sector {number} is neither what was flushed nor newer"
        self.content[:] = found
        # It has happened to the disk, and does not happen again.
        self.possible = [[self._sector(number)] for number in range(SECTORS)]

        async def sweeping() -> None:
            self._sweep = asyncio.create_task(self.disk.fetcher.sweep())

        self.run(sweeping)

    @precondition(lambda self: self._reachable)
    @rule()
    def complete(self) -> None:
        async def finishing() -> None:
            assert self._sweep is not None
            await asyncio.wait_for(asyncio.shield(self._sweep), 20)

        self.run(finishing)
        assert bytes(self.primary.data) == self.content

    @invariant()
    def holes_are_zeros(self) -> None:
        if not hasattr(self, "disk"):
            return
        found = self.run(lambda: self.disk.data_extents(0, SIZE))
        position = 0
        for start, length in [*found, (SIZE, 0)]:
            assert not any(self.content[position:start]), "a hole is not zeros"
            position = start + length

    def teardown(self) -> None:
        async def ending() -> None:
            if self._sweep is not None:
                self._sweep.cancel()
                await asyncio.gather(self._sweep, return_exceptions=True)
            if hasattr(self, "disk"):
                await self.disk.close()

        self.run(ending)
        self._runner.close()
        self._patch.undo()
        self._directory.cleanup()


Rehydrating.TestCase.settings = settings(
    max_examples=int(os.environ.get("BLOCKFERRY_REHYDRATE_EXAMPLES", "25")),
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestRehydrating = Rehydrating.TestCase
