"""Where missing blocks come from: one snapshot, in one place or several that are interchangeable.

Sources are the same only if they have the same commit id and size; one that has not is never read. They are opened when
they are first needed, tried in the order in which they were named, beginning with the one that answered last, and
opened anew when they come back. Each is asked for a byte now and then, so that whoever returns is noticed.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TypeVar

import structlog
from blockferry.common.address import Address, is_address
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.regions import AllocationMap
from blockferry.common.rpc import Connection
from blockferry.common.settings import Tls
from blockferry.common.volumes import ReplicaVolume, Volume, open_volume
from blockferry.v1 import replicas_pb2 as replicas

T = TypeVar("T")

log = structlog.get_logger("blockferry.rehydrate")

Opener = Callable[[str, str], Awaitable[Volume]]
"""Opens (uri, snapshot id wanted; empty: whatever is the newest)."""

FETCH_SECONDS = 10.0
"""For one fetch from one source. On a line of 1 Mbit/s the largest takes this long."""

OPEN_SECONDS = 30.0
"""For opening a source, which tells its allocation: that of a large fragmented volume takes a while."""

RETRY_SECONDS = 0.5
"""After a failure a source is left alone for this long."""

MISMATCH_SECONDS = 30.0
"""The same where it is another snapshot: somebody has to act."""

TOUCH_SECONDS = 15.0
"""Between two looks at each source."""

RETURN_SECONDS = 1.0
"""The same while one is away."""

TRANSIENT = frozenset({Code.UNAVAILABLE, Code.LIMITED})
"""What may be over if one waits."""


def source_opener(*, insecure: bool, tls: Tls | None) -> Opener:
    """Opens real sources. A replica without @NUMBER is looked through for the generation that is wanted: its newest may
    be another one by now."""

    async def opener(uri: str, wanted: str) -> Volume:
        volume = await open_volume(uri, insecure=insecure, tls=tls)
        if not wanted or volume.snapshot_id == wanted or not is_address(uri) or Address.parse(uri).number:
            return volume
        await volume.close()
        number = await _number_of(Address.parse(uri), wanted, insecure=insecure, tls=tls)
        place, mark, query = uri.partition("?")
        return await ReplicaVolume.open(
            f"{place}{mark}{query}@{number}" if mark else f"{place}@{number}", insecure=insecure, tls=tls
        )

    return opener


async def _number_of(address: Address, wanted: str, *, insecure: bool, tls: Tls | None) -> int:
    connection = Connection(address, insecure=insecure, tls=tls)
    try:
        found = await connection.call(
            "Replicas/ListRecoveryPoints",
            replicas.ListRecoveryPointsRequest(volume=address.volume),
            replicas.ListRecoveryPointsResponse,
        )
    finally:
        await connection.close()
    for point in found.points:
        if f"commit:{point.commit_id.hex()}" == wanted:
            return point.number
    raise BlockferryError(
        Code.NOT_FOUND,
        f"{address.uri} does not have the snapshot that is being rehydrated",
        cause="retention has dropped it, or it never came there",
        next="name another source that has it",
        expected=wanted,
    )


class Source:
    """One of them."""

    def __init__(self, uri: str, opener: Opener) -> None:
        self.uri = uri
        self.problem = ""
        """Why it cannot be used now, for people; empty while it can."""
        self.bytes_fetched = 0
        self._opener = opener
        self._volume: Volume | None = None
        self._opening: asyncio.Task[Volume] | None = None
        self._users: dict[Volume, int] = {}
        self._holding: asyncio.Task[None] | None = None
        self._not_before = 0.0

    @property
    def resting(self) -> bool:
        """It has failed just now."""
        return time.monotonic() < self._not_before

    @property
    def is_open(self) -> bool:
        """Whether it is connected."""
        return self._volume is not None

    @contextlib.asynccontextmanager
    async def using(self, size: int, snapshot_id: str) -> AsyncIterator[Volume]:
        """The volume, opened if need be."""
        volume = self._volume
        if volume is None:
            if self._opening is None:
                self._opening = asyncio.create_task(self._open(size, snapshot_id), name="open-source")
                self._opening.add_done_callback(_retrieve)
            # To its end, whoever gives up waiting: a large map would never arrive.
            volume = await asyncio.shield(self._opening)
        self._users[volume] = self._users.get(volume, 0) + 1
        try:
            yield volume
        finally:
            self._users[volume] -= 1
            await self._close_unused(volume)

    async def open_any(self) -> Volume:
        """Whatever snapshot it has now."""
        try:
            async with asyncio.timeout(OPEN_SECONDS):
                volume = await self._opener(self.uri, "")
        except TimeoutError as error:
            raise _silent(self.uri) from error
        self._keep(volume)
        return volume

    def _keep(self, volume: Volume) -> None:
        """It is the one that is read from now on. A replica's server is told to keep the point, whatever its retention
        says, however seldom it is read."""
        self._volume = volume
        if isinstance(volume, ReplicaVolume):
            self._holding = asyncio.create_task(self._hold(volume), name="hold-point")

    async def _hold(self, volume: ReplicaVolume) -> None:
        try:
            await volume.keep(lambda error: None)
        except BlockferryError as error:
            # A server that does not know the call keeps what is read for its lease.
            if error.code is not Code.PROTOCOL and volume is self._volume:
                self._holding = None
                await self.failed(error)

    async def _let_go(self) -> None:
        holding, self._holding = self._holding, None
        if holding is not None:
            holding.cancel()
            await asyncio.wait([holding])

    async def _open(self, size: int, snapshot_id: str) -> Volume:
        try:
            async with asyncio.timeout(OPEN_SECONDS):
                volume = await self._opener(self.uri, snapshot_id)
            try:
                check_same(volume, self.uri, size, snapshot_id)
            except BlockferryError:
                await volume.close()
                raise
        except TimeoutError as error:
            raise _silent(self.uri) from error
        finally:
            self._opening = None
        self._keep(volume)
        return volume

    async def _close_unused(self, volume: Volume) -> None:
        if not self._users.get(volume) and volume is not self._volume:
            self._users.pop(volume, None)
            with contextlib.suppress(BlockferryError, OSError):
                await volume.close()

    async def failed(self, error: BlockferryError) -> None:
        """It could not be read. What is no matter of the range alone has it opened anew, a while later."""
        if error.code in (Code.DATA_MISMATCH, Code.CORRUPT_STATE, Code.IO_ERROR):
            return
        waiting = RETRY_SECONDS if error.code in TRANSIENT else MISMATCH_SECONDS
        self._not_before = time.monotonic() + waiting
        if not self.problem:
            log.warning("a source is out of reach", source=self.uri, error=error.line())
        self.problem = error.line()
        volume, self._volume = self._volume, None
        await self._let_go()
        if volume is not None:
            await self._close_unused(volume)

    def worked(self, length: int) -> None:
        """So many bytes came from it."""
        self.bytes_fetched += length
        if self.problem:
            log.info("a source is back", source=self.uri)
            self.problem = ""

    async def close(self) -> None:
        """Let go of it; whoever still reads is cut off."""
        if self._opening is not None:
            self._opening.cancel()
            await asyncio.wait([self._opening])
        await self._let_go()
        volume, self._volume = self._volume, None
        for one in {*self._users, *([volume] if volume is not None else [])}:
            with contextlib.suppress(BlockferryError, OSError):
                await one.close()


class Sources:
    """All of them, as one. `size` in bytes."""

    def __init__(self, uris: Sequence[str], size: int, snapshot_id: str, opener: Opener) -> None:
        self.all = [Source(uri, opener) for uri in uris]
        self.size = size
        self.snapshot_id = snapshot_id
        self._preferred = 0

    @classmethod
    async def first(cls, uris: Sequence[str], opener: Opener) -> Sources:
        """Sources of which nothing is known yet: what the first one that answers has is what is rehydrated. Raises
        WRONG_STATE or SIZE_MISMATCH where another one that answers has something else, UNSUPPORTED where it may change,
        and what the first one has failed with where none answers."""
        found = cls(uris, 0, "", opener)
        opened = await asyncio.gather(*(one.open_any() for one in found.all), return_exceptions=True)
        volumes = [(one, volume) for one, volume in zip(found.all, opened, strict=True) if isinstance(volume, Volume)]
        try:
            if not volumes:
                raise next(one for one in opened if isinstance(one, BaseException))
            reference = volumes[0][1]
            found.size, found.snapshot_id = reference.size, reference.snapshot_id
            for source, volume in volumes:
                if not volume.snapshot_id:
                    raise BlockferryError(
                        Code.UNSUPPORTED,
                        f"{source.uri} cannot be rehydrated from",
                        cause="it is no snapshot: it may change meanwhile",
                        next="name an archived snapshot (STORE#NAME) or a committed generation (grpc://HOST:PORT/VOLUME)",
                        volume=source.uri,
                    )
                check_same(volume, source.uri, found.size, found.snapshot_id)
        except BaseException:
            await found.close()
            raise
        return found

    async def check(self, seconds: float) -> None:
        """Raise what is wrong with a source that answers within this time; the others are opened when they are
        needed."""

        async def look(source: Source) -> None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds), source.using(self.size, self.snapshot_id):
                    pass

        for found in await asyncio.gather(*map(look, self.all), return_exceptions=True):
            if isinstance(found, BlockferryError) and found.code not in TRANSIENT:
                await self.close()
                raise found

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from the first source that can. Raises UNAVAILABLE where that may be different in a while, and
        else what the last of them has failed with."""
        await self._any(lambda volume: volume.read_into(offset, buffer), FETCH_SECONDS, len(buffer))

    async def allocation(self, region_size: int) -> AllocationMap:
        """Of the first source that can tell."""
        return await self._any(lambda volume: volume.allocation(region_size), OPEN_SECONDS, 0)

    async def touch(self) -> None:
        """Read a byte of each, so that its point is kept and whoever comes back is noticed."""
        for source in self.all:
            if not source.resting:
                with contextlib.suppress(BlockferryError):
                    await self._ask(source, _first_byte, FETCH_SECONDS, 1)

    async def _any(self, ask: Callable[[Volume], Awaitable[T]], seconds: float, length: int) -> T:
        failures: list[BlockferryError] = []
        count = len(self.all)
        for step in range(count):
            index = (self._preferred + step) % count
            source = self.all[index]
            if source.resting:
                failures.append(BlockferryError(Code.UNAVAILABLE, source.problem))
                continue
            try:
                answer = await self._ask(source, ask, seconds, length)
            except BlockferryError as error:
                failures.append(error)
                continue
            self._preferred = index
            return answer
        raise next((one for one in failures if one.code in TRANSIENT), failures[-1])

    async def _ask(self, source: Source, ask: Callable[[Volume], Awaitable[T]], seconds: float, length: int) -> T:
        try:
            async with asyncio.timeout(seconds), source.using(self.size, self.snapshot_id) as volume:
                answer = await ask(volume)
            source.worked(length)
            return answer
        except TimeoutError as error:
            silent = _silent(source.uri)
            await source.failed(silent)
            raise silent from error
        except BlockferryError as error:
            await source.failed(error)
            raise

    @property
    def whole(self) -> bool:
        """Whether none of them is away, as far as is known."""
        return not any(source.problem for source in self.all)

    async def close(self) -> None:
        """Let go of all."""
        for source in self.all:
            await source.close()


async def _first_byte(volume: Volume) -> None:
    await volume.read_into(0, memoryview(bytearray(1)))


def check_same(volume: Volume, uri: str, size: int, snapshot_id: str) -> None:
    """Raise WRONG_STATE or SIZE_MISMATCH unless a volume is this snapshot."""
    if volume.snapshot_id != snapshot_id:
        raise BlockferryError(
            Code.WRONG_STATE,
            f"{uri} is another snapshot",
            cause=f"it is {volume.snapshot_id or 'none'}, and what is being rehydrated is {snapshot_id}",
            next="name sources with the same commit id, such as VOLUME@NUMBER",
            expected=snapshot_id,
            found=volume.snapshot_id,
        )
    if volume.size != size:
        raise BlockferryError(
            Code.SIZE_MISMATCH,
            f"{uri} has {volume.size} bytes, and what is being rehydrated {size}",
            next="name sources with the same commit id",
            expected=str(size),
            found=str(volume.size),
        )


def _silent(uri: str) -> BlockferryError:
    return BlockferryError(
        Code.UNAVAILABLE, f"{uri} does not answer", cause="it took too long", next="check it and the network"
    )


def _retrieve(task: asyncio.Task[Volume]) -> None:
    if not task.cancelled():
        # Whoever still waits is told; perhaps nobody does.
        task.exception()
