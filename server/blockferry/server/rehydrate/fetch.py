"""Fetching what is missing: on demand first, then what lies beside that, then everything else.

    demand      a guest waits for it: at once, whatever else is going on
    neighbours  behind what was demanded, as a guest that reads on will want it
    sweep       the rest, front to back: what holds data at the source, then its holes

A unit is under way at most once, and whoever else wants it waits for the same fetch. Neighbours and sweep pause while a
guest waits, have few fetches under way, smaller ones the slower the line is, and keep to the bandwidth limit, against
which demand counts without being held up by it.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import time
from collections.abc import Awaitable, Callable

import structlog
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.flow import ByteBudget, RateLimiter
from blockferry.common.regions import BLOCK_SIZE, DEFAULT_REGION_SIZE, Run, runs_of
from blockferry.server.rehydrate.map import HydrationMap
from blockferry.server.rehydrate.sources import RETRY_SECONDS, RETURN_SECONDS, TOUCH_SECONDS, TRANSIENT, Sources
from pyroaring import BitMap

log = structlog.get_logger("blockferry.rehydrate")

UNIT_BLOCKS = 64
"""Blocks fetched on demand: 256 KiB, the block of an archive; a quarter of a replica's region."""

SWEEP_UNITS = 4
"""Units of one fetch of the sweep at most: 1 MiB, the largest message of a replica's server."""

SWEEP_FETCHES = 4
"""Fetches of the sweep under way: with 20 ms to the source and back that is 200 MB/s."""

SLOW_SECONDS = 0.1
"""A sweep's fetch that takes longer makes the next one smaller: a guest would have to wait behind it."""

PATIENCE_SECONDS = 0.05
"""A guest that reads without end holds up each fetch of the sweep for this long, not for ever."""

NEIGHBOURS = 4
"""Units fetched beforehand behind a guest that reads on; one where it does not seem to."""

MOST_NEIGHBOURS = 64
"""Units that wait to be fetched for that reason; older ones are left to the sweep."""

WINDOW_BLOCKS = 64 * 1024
"""Blocks looked at in one go for what is missing."""

HOLE_BLOCKS = {"punch-hole": 1 << 18}
HOLE_BLOCKS_WRITTEN = 1 << 12
"""Blocks of a hole zeroed in one go: 1 GiB where space is only given back, else 16 MiB, since a guest may wait."""

BYTES_IN_FLIGHT = 64 * 1024 * 1024
"""Fetched and not yet written through."""

DAMAGE_SECONDS = 30.0
"""Before the sweep tries again what no source could give for another reason than being away."""

LATENCIES = 1000
"""Demands whose latency is remembered."""

Store = Callable[[int, int, memoryview | None], Awaitable[None]]
"""Writes blocks [first, stop) through to the primary, those that are still missing there; None: they are zeros."""


class Fetch:
    """Blocks [first, stop) on their way. `arrived` is done once `data` is there, `settled` once it is in the primary;
    both may fail."""

    def __init__(self, first: int, stop: int) -> None:
        loop = asyncio.get_running_loop()
        self.first = first
        self.stop = stop
        self.data = memoryview(b"")
        self.arrived: asyncio.Future[None] = loop.create_future()
        self.settled: asyncio.Future[None] = loop.create_future()
        for one in (self.arrived, self.settled):
            # Perhaps nobody waits for it.
            one.add_done_callback(lambda future: future.cancelled() or future.exception())

    def fail(self, error: BlockferryError) -> None:
        """Whatever has not come to pass never will."""
        for one in (self.arrived, self.settled):
            if not one.done():
                one.set_exception(error)


class Fetcher:
    """Of one disk. `source_timeout`: seconds a demand waits for a source that is away; `bandwidth`: bytes per second of
    neighbours and sweep, 0 for any number; `zeroing` as the primary says it."""

    def __init__(
        self,
        hydration: HydrationMap,
        sources: Sources,
        store: Store,
        *,
        source_timeout: float,
        bandwidth: int = 0,
        zeroing: Callable[[], str] = lambda: "",
    ) -> None:
        self.limiter = RateLimiter(bandwidth)
        self.latencies: collections.deque[float] = collections.deque(maxlen=LATENCIES)
        """Seconds from a demand to the arrival of its data, the last ones."""
        self.demands = 0
        self.bytes_fetched = 0
        """From sources, for whatever reason."""
        self.problem = ""
        """What holds up the sweep, for people."""
        self.damaged: set[int] = set()
        """Units that no source could give, though it answered."""
        self.allocated: BitMap | None = None
        """Blocks that may hold data at the source; None while that is not known."""
        self._map = hydration
        self._sources = sources
        self._store = store
        self._timeout = source_timeout
        self._zeroing = zeroing
        self._budget = ByteBudget(BYTES_IN_FLIGHT)
        self._inflight: dict[int, Fetch] = {}
        self._running: set[asyncio.Task[None]] = set()
        self._waiting = 0
        self._calm = asyncio.Event()
        self._calm.set()
        self._neighbours: collections.deque[int] = collections.deque(maxlen=MOST_NEIGHBOURS)
        self._last_demand = -NEIGHBOURS - 2
        self._units = SWEEP_UNITS

    # --- on demand --------------------------------------------------------------------------------------------------

    async def demand(self, first: int, stop: int, *, settled: bool = False) -> tuple[list[Run], memoryview, int] | None:
        """Blocks of one unit for somebody who waits: (runs of those that are missing, data that has them, the first
        block of it), or None where nothing is missing. What was not missing when that was looked at is in the primary.
        `settled`: come back only when none is missing any more.

        Raises UNAVAILABLE after `source_timeout`, or what the sources or the primary have failed with.
        """
        began = time.monotonic()
        unit = first // UNIT_BLOCKS
        failure: BlockferryError | None = None
        self.demands += 1
        self._waiting += 1
        self._calm.clear()
        try:
            while missing := self._map.missing(first, stop):
                # Nothing happens between that look and this: what is missing now is in the fetch, whoever began it.
                fetch = self._inflight.get(unit) or self._begin(unit, unit + 1)
                try:
                    async with asyncio.timeout(max(began + self._timeout - time.monotonic(), 0)):
                        await asyncio.shield(fetch.settled if settled else fetch.arrived)
                except TimeoutError as error:
                    raise failure or self._waited_in_vain(first, stop) from error
                except BlockferryError as error:
                    failure = error
                    left = began + self._timeout - time.monotonic()
                    if error.code not in TRANSIENT or left <= 0:
                        raise
                    await asyncio.sleep(min(RETRY_SECONDS, left))
                    continue
                self.latencies.append(time.monotonic() - began)
                if not settled:
                    return missing, fetch.data, fetch.first
            return None
        finally:
            self._waiting -= 1
            if not self._waiting:
                self._calm.set()
            reads_on = 0 <= unit - self._last_demand <= NEIGHBOURS + 1
            self.soon(unit + 1, NEIGHBOURS if reads_on else 1)
            self._last_demand = unit

    def _waited_in_vain(self, first: int, stop: int) -> BlockferryError:
        return BlockferryError(
            Code.UNAVAILABLE,
            "no source has answered in time",
            cause=f"it took longer than {self._timeout:g} s",
            next="bring a source back; what is hydrated is served all the same",
            offset=first * BLOCK_SIZE,
            length=(stop - first) * BLOCK_SIZE,
        )

    def soon(self, unit: int, count: int) -> None:
        """These units will probably be wanted."""
        for one in range(unit, min(unit + count, -(-self._map.blocks // UNIT_BLOCKS))):
            if one not in self._neighbours:
                self._neighbours.append(one)

    # --- one fetch --------------------------------------------------------------------------------------------------

    def _begin(self, unit: int, stop_unit: int, *, demanded: bool = True) -> Fetch:
        """Start to fetch what is missing of these units, none of which is under way."""
        missing = self._map.missing(unit * UNIT_BLOCKS, min(stop_unit * UNIT_BLOCKS, self._map.blocks))
        fetch = Fetch(missing[0][0], sum(missing[-1]))
        units = range(fetch.first // UNIT_BLOCKS, -(-fetch.stop // UNIT_BLOCKS))
        for one in units:
            self._inflight[one] = fetch
        task = asyncio.create_task(self._run(fetch, units, demanded), name="fetch")
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return fetch

    async def _run(self, fetch: Fetch, units: range, demanded: bool) -> None:
        offset = fetch.first * BLOCK_SIZE
        length = min(fetch.stop * BLOCK_SIZE, self._sources.size) - offset
        try:
            await self._budget.acquire(length)
            try:
                data = memoryview(bytearray(length))
                if not self._is_hole(fetch.first, fetch.stop):
                    if demanded:
                        # It counts, and waits for nobody.
                        self.limiter.delay(length)
                    await self._sources.read_into(offset, data)
                    self.bytes_fetched += length
                fetch.data = data
                fetch.arrived.set_result(None)
                await self._store(fetch.first, fetch.stop, data)
                fetch.settled.set_result(None)
            finally:
                self._budget.release(length)
        except BlockferryError as error:
            fetch.fail(error)
        except Exception as error:
            log.error("bug", exc_info=error)
            fetch.fail(BlockferryError(Code.INTERNAL, "cannot fetch", cause=repr(error), next="report this"))
        finally:
            # Of what was cancelled; nothing happens where both are done.
            fetch.fail(BlockferryError(Code.WRONG_STATE, "the disk is being let go", next="start it again"))
            for one in units:
                del self._inflight[one]

    def _is_hole(self, first: int, stop: int) -> bool:
        return self.allocated is not None and not self.allocated.range_cardinality(first, stop)

    # --- the sweep --------------------------------------------------------------------------------------------------

    async def sweep(self) -> None:
        """Fetch everything. Comes back when nothing is missing."""
        while not self._map.complete:
            try:
                if self.allocated is None:
                    await self._learn()
                await self._sweep_data()
                await self._sweep_holes()
                self.problem = ""
            except BlockferryError as error:
                if not self.problem:
                    log.warning("the sweep is held up", error=error.line())
                self.problem = error.line()
                await asyncio.sleep(RETRY_SECONDS)
            else:
                if not self._map.complete:
                    # Units that are damaged, or are being fetched for somebody.
                    await asyncio.sleep(DAMAGE_SECONDS if self.damaged else RETRY_SECONDS)
                    self.damaged.clear()

    async def _learn(self) -> None:
        found = await self._sources.allocation(DEFAULT_REGION_SIZE)
        allocated = BitMap()
        for first, count in found.runs():
            offset, length = found.geometry.extent(first, count)
            allocated.add_range(offset // BLOCK_SIZE, -(-(offset + length) // BLOCK_SIZE))
        self.allocated = allocated

    async def _sweep_data(self) -> None:
        """All that may hold data; raises the first failure that is no matter of one unit."""
        cursor = _Cursor(self._map, self.allocated)
        failures: list[BlockferryError] = []

        async def work() -> None:
            while not failures and (part := self._next(cursor)) is not None:
                try:
                    await self._sweep_part(*part)
                except BlockferryError as error:
                    if error.code in (Code.DATA_MISMATCH, Code.CORRUPT_STATE):
                        log.error("no source has this part whole", error=error.line(), unit=part[0])
                        self.damaged.update(range(*part))
                    else:
                        failures.append(error)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(SWEEP_FETCHES):
                tasks.create_task(work(), name="sweep")
        if failures:
            raise failures[0]

    def _next(self, cursor: _Cursor) -> tuple[int, int] | None:
        """(first unit, the one behind the last) to be fetched next, None at the end."""
        while self._neighbours:
            unit = self._neighbours.popleft()
            if self._wanted(unit):
                return unit, unit + 1
        while (first := cursor.next_unit()) is not None:
            if self._wanted(first):
                stop = first + 1
                while stop - first < self._most_units and cursor.follows(stop) and self._wanted(stop):
                    cursor.next_unit()
                    stop += 1
                return first, stop
        return None

    @property
    def _most_units(self) -> int:
        """Of one fetch: about a second's worth where the bandwidth is limited."""
        limit = self.limiter.rate // (UNIT_BLOCKS * BLOCK_SIZE) if self.limiter.rate else self._units
        return max(1, min(self._units, limit))

    def _wanted(self, unit: int) -> bool:
        first, stop = unit * UNIT_BLOCKS, min((unit + 1) * UNIT_BLOCKS, self._map.blocks)
        return unit not in self._inflight and unit not in self.damaged and not self._map.is_hydrated(first, stop)

    async def _sweep_part(self, unit: int, stop: int) -> None:
        await self.limiter.acquire((stop - unit) * UNIT_BLOCKS * BLOCK_SIZE)
        if self._waiting:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._calm.wait(), PATIENCE_SECONDS)
        # Somebody may have wanted it meanwhile.
        while unit < stop and not self._wanted(unit):
            unit += 1
        end = unit
        while end < stop and self._wanted(end):
            end += 1
        if unit == end:
            return
        began = time.monotonic()
        fetch = self._begin(unit, end, demanded=False)
        await asyncio.shield(fetch.arrived)
        slow = time.monotonic() - began > SLOW_SECONDS
        self._units = max(1, self._units // 2) if slow else min(SWEEP_UNITS, self._units + 1)
        await asyncio.shield(fetch.settled)

    async def _sweep_holes(self) -> None:
        step = HOLE_BLOCKS.get(self._zeroing(), HOLE_BLOCKS_WRITTEN)
        assert self.allocated is not None
        holes = BitMap()
        holes.add_range(0, self._map.blocks)
        holes -= self.allocated
        for first, count in list(runs_of(holes, self._map.blocks)):
            for start in range(first, first + count, step):
                stop = min(start + step, first + count)
                if not self._map.is_hydrated(start, stop):
                    await self._store(start, stop, None)

    # --- life -------------------------------------------------------------------------------------------------------

    async def touch(self) -> None:
        """Keep the sources' points from being dropped, until everything is hydrated."""
        while not self._map.complete:
            await self._sources.touch()
            await asyncio.sleep(TOUCH_SECONDS if self._sources.whole else RETURN_SECONDS)

    async def idle(self) -> None:
        """Wait for what is under way."""
        while self._running:
            await asyncio.wait(self._running)

    async def close(self) -> None:
        """End what is under way; whoever waits for it is told so."""
        running = set(self._running)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


class _Cursor:
    """Goes once through the units that may hold data and are missing, as they are when it comes there."""

    def __init__(self, hydration: HydrationMap, allocated: BitMap | None) -> None:
        assert allocated is not None
        self._map = hydration
        self._allocated = allocated
        self._position = 0
        self._missing: list[int] = []

    def next_unit(self) -> int | None:
        """The next one; None at the end."""
        while not self._missing:
            try:
                first = self._allocated.next_set_bit(self._position)
            except ValueError:
                return None
            stop = min((first // WINDOW_BLOCKS + 1) * WINDOW_BLOCKS, self._map.blocks)
            wanted = BitMap()
            for start, count in self._map.missing(first, stop):
                wanted.add_range(start, start + count)
            wanted &= self._allocated
            self._missing = sorted({block // UNIT_BLOCKS for block in _starts(wanted, stop)}, reverse=True)
            self._position = stop
        return self._missing.pop()

    def follows(self, unit: int) -> bool:
        """Whether the next one is this."""
        return bool(self._missing) and self._missing[-1] == unit


def _starts(blocks: BitMap, stop: int) -> list[int]:
    """A block of every unit that has one of `blocks`."""
    found = []
    for first, count in runs_of(blocks, stop, blocks.min() if blocks else 0):
        found += [first, *range((first // UNIT_BLOCKS + 1) * UNIT_BLOCKS, first + count, UNIT_BLOCKS)]
    return found
