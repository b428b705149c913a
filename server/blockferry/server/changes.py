"""One ApplyChanges stream at the server: receive, apply in order, acknowledge, and make durable from time to time.

    receive --(bytes in flight)--> apply --> acknowledge "received"
                                     |
                                     +--> flush --> acknowledge "durable"

Receiving stops while the bytes that wait to be applied reach the client's bound, or the server's for all clients, so a
disk that stalls stops the sender: its own bound fills, and it reads no further. A flush runs beside the applying of
later changes and vouches only for what was applied before it began.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence

from blockferry.common.errors import BlockferryError, Code
from blockferry.common.flow import Share
from blockferry.common.framing import Incoming, decode_request
from blockferry.common.rpc import to_status
from blockferry.common.wire import runs_from_wire
from blockferry.server.apply import Result
from blockferry.server.replica import Replica
from blockferry.v1 import replication_pb2 as pb

CHECKPOINT_BYTES = 256 * 1024 * 1024
"""Bytes applied until they are made durable: an interrupted sync repeats no more than this, and no commit waits for a
whole disk's worth of dirty pages."""

PARTING_SECONDS = 5.0
"""Seconds a client has to end a stream that has failed, once it was told."""

CHECKPOINT_SECONDS = 5.0
"""Seconds after which applied changes are made durable however few they are."""


class ChangeReceiver:
    """Serves one stream. `budget` is shared by all streams of a client."""

    def __init__(self, replica: Replica, ref: pb.SessionRef, budget: Share) -> None:
        self._replica = replica
        self._ref = ref
        self._budget = budget
        self._queue: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._pending: pb.ApplyChangesResponse | None = None
        self._wake = asyncio.Event()
        self._flush_due = asyncio.Event()
        self._applied = 0
        self._durable = 0
        self._unflushed = 0
        self._expected = 1
        self._dropping = False
        self.ended_well = False
        """The sender said that nothing follows. A lost connection may look just like the end of its requests."""

    async def responses(
        self, first: bytes, requests: AsyncIterator[bytes]
    ) -> AsyncGenerator[pb.ApplyChangesResponse, None]:
        """Acknowledgements, as many as there is something to say; ends when all requests are applied."""
        receive = asyncio.create_task(self._receive(first, requests), name="receive")
        work = asyncio.create_task(self._apply(), name="apply")
        flush = asyncio.create_task(self._flush(), name="flush")
        tasks = {receive, work, flush}
        for task in tasks:
            task.add_done_callback(lambda _: self._wake.set())
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                for task in tasks:
                    if task.done() and not task.cancelled() and task.exception() is not None:
                        raise task.exception() or AssertionError
                response, self._pending = self._pending, None
                if response is not None:
                    yield response
                    # It may have been the last one.
                    self._wake.set()
                elif work.done():
                    return
        except (BlockferryError, OSError) as error:
            await self._stop(work, flush)
            yield pb.ApplyChangesResponse(error=to_status(error).SerializeToString())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PARTING_SECONDS):
                    await asyncio.gather(receive, return_exceptions=True)
            raise
        finally:
            await self._stop(*tasks)

    async def _stop(self, *tasks: asyncio.Task[None]) -> None:
        """End tasks; what has arrived and what still arrives is dropped."""
        self._dropping = True
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        while not self._queue.empty():
            item = self._queue.get_nowait()
            if item is not None:
                self._budget.release(len(item))

    async def _receive(self, first: bytes, requests: AsyncIterator[bytes]) -> None:
        await self._take(first)
        async for request in requests:
            await self._take(request)
        self._queue.put_nowait(None)

    async def _take(self, message: bytes) -> None:
        await self._budget.acquire(len(message))
        if self._dropping:
            self._budget.release(len(message))
        else:
            self._queue.put_nowait(message)

    async def _apply(self) -> None:
        while (message := await self._queue.get()) is not None:
            try:
                await self._apply_one(message)
            finally:
                self._budget.release(len(message))

    async def _apply_one(self, message: bytes) -> None:
        request, changes = decode_request(message)
        if request.sequence != self._expected:
            raise BlockferryError(
                Code.INVALID_ARGUMENT,
                f"change message {request.sequence} is out of order",
                cause=f"{self._expected} was due",
                next="number the messages of a stream from 1",
                volume=self._replica.name,
            )
        if request.HasField("session") and request.session != self._ref:
            raise BlockferryError(
                Code.INVALID_ARGUMENT,
                "a stream belongs to one session",
                cause="a later message names another one",
                next="use a stream for each session",
                volume=self._replica.name,
            )
        self._expected += 1
        self.ended_well = request.last
        response = self._response()
        if not changes:
            await self._replica.renew(self._ref)
        for together in _together(changes):
            results = await self._apply_together(together)
            response = self._response()
            for change, result in zip(together, results, strict=True):
                result.add_to(response.totals)
                if result.mismatch and change.request is not None:
                    response.mismatched_offsets.append(change.request.offset)
        if request.settled:
            await self._replica.settle(self._ref, list(runs_from_wire(request.settled)))
        if request.flush:
            await self._replica.flush(self._ref)
            self._durable = self._response().durable = request.sequence
        self._applied = self._response().received = request.sequence
        self._unflushed += len(message)
        if self._unflushed >= CHECKPOINT_BYTES:
            self._flush_due.set()
        self._wake.set()

    async def _apply_together(self, changes: Sequence[Incoming]) -> list[Result]:
        match changes[0].request:
            case pb.WriteRegionRequest():
                writes = [(one.request, one.data) for one in changes if isinstance(one.request, pb.WriteRegionRequest)]
                return await self._replica.write_regions(writes, self._ref)
            case pb.UnmapRegionRequest() as unmap:
                return [await self._replica.unmap_region(unmap, self._ref)]
            case _:
                raise BlockferryError(
                    Code.INVALID_ARGUMENT,
                    "a change without content",
                    cause="it is neither a write nor an unmap",
                    next="nothing was changed; correct the request",
                    volume=self._replica.name,
                )

    async def _flush(self) -> None:
        while True:
            try:
                async with asyncio.timeout(CHECKPOINT_SECONDS):
                    await self._flush_due.wait()
            except TimeoutError:
                if self._applied == self._durable:
                    continue
            self._flush_due.clear()
            applied, self._unflushed = self._applied, 0
            await self._replica.flush(self._ref)
            # A flush that a message asked for may have overtaken this one.
            self._durable = self._response().durable = max(self._durable, applied)
            self._wake.set()

    def _response(self) -> pb.ApplyChangesResponse:
        """The acknowledgement that goes out next. While one waits for the wire, later ones are summed into it."""
        if self._pending is None:
            self._pending = pb.ApplyChangesResponse(received=self._applied, durable=self._durable)
        return self._pending


def _together(changes: Sequence[Incoming]) -> Iterator[list[Incoming]]:
    """Split changes, in order, into what may be applied together: writes of different regions, or one unmap."""
    gathered: dict[int, Incoming] = {}
    for change in changes:
        request = change.request
        if not isinstance(request, pb.WriteRegionRequest) or request.offset in gathered:
            if gathered:
                yield list(gathered.values())
            gathered = {}
        if isinstance(request, pb.WriteRegionRequest):
            gathered[request.offset] = change
        else:
            yield [change]
    if gathered:
        yield list(gathered.values())
