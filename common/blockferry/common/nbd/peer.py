"""One client of an NBD server, from its first byte to its last.

    handshake      one option after the other, within `handshake` seconds, and then
    transmission   requests are taken where they lie, in the buffer they are received into; data of writes goes from the
                   kernel to its place, but for what came along with its header

What a client can make the server hold is bounded (`Limits`): when a request would need more than there is, nothing more
is received from its connection until there is room again. One request, or one step of it, is always let in, so that
clients who take all and never read their answers are in nobody's way.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

from blockferry.common.nbd import handshake, transmission
from blockferry.common.nbd.answers import PIECE, Answers, Request
from blockferry.common.nbd.offer import Negotiation, Step
from blockferry.common.nbd.protocol import MAX_OPTION_PAYLOAD, Buffer, Command, ProtocolError

SCRATCH_SIZE = 64 * 1024
"""Bytes received at once: two thousand requests, or sixteen writes of 4 KiB with their data."""

AT_ONCE = 128
"""Requests taken before other connections get their turn."""

STATUS_COST = 64 * 1024
"""Bytes that an answer to a block status may have."""

CLOSE_SECONDS = 5.0
"""How long a client that said goodbye may take to read what is left."""

_READ = int(Command.READ)  # comparing with an IntEnum takes three times as long
_OPTION_ROOM = handshake.OPTION_HEADER_SIZE + MAX_OPTION_PAYLOAD


@dataclass(frozen=True)
class Limits:
    """What clients may take of a server. Bytes, seconds and counts."""

    connections: int = 128
    """Clients that use an export."""
    handshakes: int = 64
    """Clients that have not chosen one yet. When another one comes, the one that has taken longest has to go: whoever
    means it is done in an instant."""
    handshake: float = 10.0
    """Seconds from connecting to an export."""
    bytes_in_flight: int = 64 * 1024 * 1024
    """Of all connections together. One step of a request (1 MiB) for each connection may come on top of it."""
    bytes_each: int = 16 * 1024 * 1024
    """Of one connection."""
    requests: int = 256
    """Of one connection that are not answered yet."""


class Room:
    """The bytes of all connections that are in flight."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.used = 0
        self.most = 0
        """The largest value `used` ever had."""
        self._waiting: dict[Callable[[], None], None] = {}

    def take(self, amount: int, waiter: Callable[[], None], *, always: bool) -> bool:
        """Take bytes, if there are so many, or `always`; else `waiter` is called once there may be."""
        if not always and self.used + amount > self._limit:
            self._waiting[waiter] = None
            return False
        self.used += amount
        self.most = max(self.most, self.used)
        return True

    def give(self, amount: int) -> None:
        """Give bytes back."""
        self.used -= amount
        if self._waiting and self.used < self._limit:
            waiting, self._waiting = self._waiting, {}
            for waiter in waiting:
                waiter()

    def forget(self, waiter: Callable[[], None]) -> None:
        """It needs no bytes any more."""
        self._waiting.pop(waiter, None)


class Host(Protocol):
    """The server, as far as one of its connections needs it."""

    limits: Limits
    room: Room

    def begun(self, peer: Peer) -> Negotiation:
        """It has connected."""
        ...

    def chosen(self, peer: Peer, name: str) -> Callable[[bool, Sequence[str]], Answers]:
        """It uses an export: what makes its answers."""
        ...

    def context(self) -> ssl.SSLContext:
        """For TLS."""
        ...

    def over(self, peer: Peer, cause: str) -> None:
        """It is gone."""
        ...


class Peer(asyncio.BufferedProtocol):
    """A connection."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._limits = host.limits
        self.name = ""
        self._transport: asyncio.Transport | None = None
        self._negotiation: Negotiation | None = None
        self.answers: Answers | None = None
        self._step: Callable[[], bool] = self._take_flags
        self._deadline: asyncio.TimerHandle | None = None
        self._starting_tls: asyncio.Task[None] | None = None
        self._cause = ""

        self._scratch = bytearray(_OPTION_ROOM)
        self._begin = self._end = 0  # what is in the scratch buffer and not yet looked at
        self._write: Request | None = None  # whose data is being received
        self._data: bytearray | None = None  # the piece of it under way; None: it is dropped
        self._target: memoryview | None = None  # the rest of that piece
        self._left = 0  # its bytes that are still to come
        self._rest = 0  # bytes of the write after this piece

        self._receiving = True
        self._paused = False  # the client does not read what was sent
        self._unsent: list[Buffer] = []
        self._unsent_cost = self._unsent_answers = 0
        self._stuck_cost = self._stuck_answers = 0  # handed to the transport, which has not got rid of it yet
        self._alone = False  # an answer is being sent that nothing may come into
        self._later: list[tuple[Sequence[Buffer], int, int]] = []  # what waits for its end
        self._sendable = asyncio.Event()
        self._sendable.set()
        self._held = 0
        self._requests = 0
        self._again = False  # a look at what has arrived is due
        self._going = False
        self._securing = False  # TLS is being agreed upon

    @property
    def held(self) -> int:
        """Bytes in flight."""
        return self._held

    # --- what the event loop calls ----------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # A cast: uvloop's transports are no subclasses of asyncio's.
        self._transport = cast(asyncio.Transport, transport)
        self._prepare(self._transport)
        kind = self._transport.get_extra_info("socket")
        if kind is not None and kind.family != socket.AF_UNIX:
            kind.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # A client that vanished is noticed after a minute and a half.
            for option, value in ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 6)):
                kind.setsockopt(socket.IPPROTO_TCP, option, value)
            kind.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        found = self._transport.get_extra_info("peername")
        self.name = f"{found[0]}:{found[1]}" if isinstance(found, tuple) else "a process on this machine"
        self._deadline = asyncio.get_running_loop().call_later(
            self._limits.handshake, self.broken, f"it chose no export within {self._limits.handshake:g} s"
        )
        self._negotiation = self._host.begun(self)
        self.send([self._negotiation.greeting()])

    @staticmethod
    def _prepare(transport: asyncio.Transport) -> None:
        # What the kernel does not take at once counts as stuck. Not 0: uvloop's TLS would count nothing as too much.
        transport.set_write_buffer_limits(1, 0)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._deadline is not None:
            self._deadline.cancel()
        if self._starting_tls is not None:
            self._starting_tls.cancel()
        self._host.room.forget(self._look_again)
        self._unsent = []
        # What has been held back has no transport any more, and is over at once.
        self.alone(False)
        self._over(self._unsent_cost + self._stuck_cost, self._unsent_answers + self._stuck_answers)
        self._unsent_cost = self._unsent_answers = self._stuck_cost = self._stuck_answers = 0
        if self._write is not None:
            self._release_piece()
        self._sendable.set()
        if self.answers is not None:
            self.answers.abandon()
        self._host.over(self, self._cause or (str(exc) if exc is not None else ""))

    def pause_writing(self) -> None:
        self._paused = True
        self._sendable.clear()

    def resume_writing(self) -> None:
        self._paused = False
        cost, answers, self._stuck_cost, self._stuck_answers = self._stuck_cost, self._stuck_answers, 0, 0
        self._over(cost, answers)
        if self._unsent and self._transport is not None:
            parts, cost, answers = self._unsent, self._unsent_cost, self._unsent_answers
            self._unsent, self._unsent_cost, self._unsent_answers = [], 0, 0
            self.send(parts, cost, answers)
        if not self._paused:
            self._sendable.set()
            self._look_again()

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._left and self._begin == self._end:
            return memoryview(self._scratch) if self._target is None else self._target
        return memoryview(self._scratch)[self._end :]

    def buffer_updated(self, nbytes: int) -> None:
        if self._left and self._begin == self._end:
            if self._target is None:
                self._begin, self._end = 0, nbytes
            else:
                self._target = self._target[nbytes:]
                self._left -= nbytes
                if self._left:
                    return
        else:
            self._end += nbytes
        self._go_on()

    # --- what answers need ------------------------------------------------------------------------------------------

    def send(self, parts: Sequence[Buffer], cost: int = 0, answered: int = 0, *, part: bool = False) -> bool:
        transport = self._transport
        if transport is None or transport.is_closing():
            self._over(cost, answered)
            return True
        if self._alone and not part:
            self._later.append((parts, cost, answered))
            return False
        if self._paused:
            self._unsent.extend(parts)
            self._unsent_cost += cost
            self._unsent_answers += answered
            return False
        if len(parts) == 1:
            transport.write(parts[0])
        else:
            transport.writelines(parts)
        if self._is_paused():
            self._stuck_cost += cost
            self._stuck_answers += answered
            return False
        self._over(cost, answered)
        return transport.get_write_buffer_size() == 0

    def alone(self, begins: bool) -> None:
        self._alone = begins
        if not begins:
            later, self._later = self._later, []
            for parts, cost, answered in later:
                self.send(parts, cost, answered)
            self._look_again()

    def _is_paused(self) -> bool:
        # Asked again after a write, which may have changed it.
        return self._paused

    def release(self, cost: int) -> None:
        if cost:
            self._held -= cost
            self._host.room.give(cost)
            self._look_again()

    async def sendable(self) -> None:
        await self._sendable.wait()

    def broken(self, cause: str) -> None:
        """Let go of the client, at once."""
        if self._transport is not None:
            self._cause = self._cause or cause
            self._transport.abort()

    def _over(self, cost: int, answers: int) -> None:
        self._requests -= answers
        self.release(cost)
        if answers:
            self._look_again()

    def _look_again(self) -> None:
        """There may be room for what has arrived."""
        if not self._receiving and not self._again and self._transport is not None:
            self._again = True
            asyncio.get_running_loop().call_soon(self._go_on)

    # --- from bytes to requests -------------------------------------------------------------------------------------

    def _go_on(self) -> None:
        """Do all that can be done with what has arrived."""
        self._again = False
        if self._transport is None or self._going or self._securing:
            return
        self._going = True
        try:
            while self._step():
                pass
        except ProtocolError as error:
            self.broken(f"it broke the NBD protocol: {error}")
        finally:
            self._going = False

    def _receive(self, go_on: bool) -> bool:
        """Receive more, or nothing until `_go_on` is called; False, for the steps to end with."""
        transport = self._transport
        if transport is None or transport.is_closing():
            return False
        if self._begin:
            rest = self._scratch[self._begin : self._end]
            self._scratch[: len(rest)] = rest
            self._begin, self._end = 0, len(rest)
        if go_on != self._receiving:
            self._receiving = go_on
            if go_on:
                transport.resume_reading()
            else:
                transport.pause_reading()
        return False

    def _taken(self, length: int) -> memoryview | None:
        """The next bytes, if they are here."""
        if self._end - self._begin < length:
            return None
        found = memoryview(self._scratch)[self._begin : self._begin + length]
        self._begin += length
        return found

    # --- handshake --------------------------------------------------------------------------------------------------

    def _take_flags(self) -> bool:
        found = self._taken(handshake.CLIENT_FLAGS_SIZE)
        if found is None:
            return self._receive(True)
        assert self._negotiation is not None
        self._negotiation.client_flags(found)
        self._step = self._take_option
        return True

    def _take_option(self) -> bool:
        assert self._negotiation is not None
        if self._paused:
            return self._receive(False)
        begin = self._begin
        found = self._taken(handshake.OPTION_HEADER_SIZE)
        if found is None:
            return self._receive(True)
        header = handshake.OptionHeader.decode(found)
        payload = self._taken(header.length)
        if payload is None:
            self._begin = begin
            return self._receive(True)
        replies, step = self._negotiation.option(header, bytes(payload))
        if step is Step.TLS:
            self._start_tls(replies)
            return False
        self.send(replies)
        match step:
            case Step.TRANSMISSION:
                self._start_transmission()
            case Step.END:
                self._say_goodbye()
                return False
        return True

    def _start_tls(self, replies: Sequence[bytes]) -> None:
        if self._begin != self._end:
            # It was not encrypted, and would be taken for something that was.
            raise ProtocolError("it sent something between asking for TLS and TLS")
        # What comes now is for TLS.
        self._receive(False)
        self.send(replies)
        self._securing = True
        self._starting_tls = asyncio.create_task(self._tls(), name="nbd-tls")

    async def _tls(self) -> None:
        assert self._transport is not None and self._negotiation is not None
        try:
            transport = await asyncio.get_running_loop().start_tls(
                self._transport,
                self,
                self._host.context(),
                server_side=True,
                ssl_handshake_timeout=self._limits.handshake,
            )
        except Exception as error:
            self.broken(f"TLS failed: {error}")
            return
        if transport is None:
            self.broken("it left during TLS")
            return
        self._transport = transport
        self._prepare(transport)
        self._negotiation.encrypted()
        self._securing, self._receiving, self._paused = False, True, False
        self._sendable.set()
        # Options may have come at once, while answers would still have gone out unencrypted.
        self._go_on()

    def _start_transmission(self) -> None:
        negotiation = self._negotiation
        assert negotiation is not None and negotiation.chosen is not None
        if self._deadline is not None:
            self._deadline.cancel()
        make = self._host.chosen(self, negotiation.chosen.name)
        self.answers = make(negotiation.structured, negotiation.contexts)
        self._step = self._take_requests
        self._negotiation = None

    def _say_goodbye(self) -> None:
        """Close when everything is sent."""
        if self._transport is not None:
            self._receive(False)
            self._transport.close()
            asyncio.get_running_loop().call_later(CLOSE_SECONDS, self.broken, "it said goodbye and stayed")

    # --- transmission -----------------------------------------------------------------------------------------------

    def _take_requests(self) -> bool:
        answers = self.answers
        assert answers is not None
        answers.begin()
        try:
            for _ in range(AT_ONCE):
                if not (self._take_data(answers) if self._write is not None else self._take_request(answers)):
                    # Whether there is something else to be done.
                    return self._step != self._take_requests
        finally:
            answers.settle()
        # Others want to be served, too.
        self._receive(False)
        self._look_again()
        return False

    def _take_request(self, answers: Answers) -> bool:
        begin = self._begin
        if self._end - begin < transmission.REQUEST_SIZE:
            return self._receive(True)
        if self._paused or self._alone or self._requests >= self._limits.requests:
            return self._receive(False)
        flags, command, cookie, offset, length = transmission.unpack_request(self._scratch, begin)
        # What is asked for most, and can be answered at once.
        if command == _READ and not flags and answers.read_now(cookie, offset, length):
            self._begin = begin + transmission.REQUEST_SIZE
            return True
        if command == Command.DISC:
            self._step = self._wait_for_the_last
            asyncio.get_running_loop().call_later(CLOSE_SECONDS, self.broken, "it said goodbye and stayed")
            return False
        refusal = answers.refusal(command, flags, offset, length)
        cost = 0
        if refusal is None and command == Command.READ:
            cost = min(length, PIECE)
        elif refusal is None and command == Command.BLOCK_STATUS:
            cost = STATUS_COST
        if not self._take_room(cost):
            return self._receive(False)
        self._begin = begin + transmission.REQUEST_SIZE
        request = Request(command, flags, cookie, offset, length, cost)
        self._requests += 1
        if command == Command.WRITE and length:
            request.problem = refusal
            self._write, self._rest = request, length
        elif refusal is not None:
            answers.refuse(request, refusal)
        else:
            answers.take(request)
        return True

    def _take_room(self, amount: int) -> bool:
        """Whether so many bytes may be held; if not, `_look_again` is called when they may."""
        if not amount:
            return True
        if self._held and self._held + amount > self._limits.bytes_each:
            return False
        if not self._host.room.take(amount, self._look_again, always=not self._held):
            return False
        self._held += amount
        return True

    def _take_data(self, answers: Answers) -> bool:
        """Data of a write; whether all that is needed to go on was there."""
        request = self._write
        assert request is not None
        if not self._left and self._data is None:
            if request.problem is not None:
                self._left, self._rest, self._target = self._rest, 0, None
            else:
                length = min(self._rest, PIECE)
                if not self._take_room(length):
                    return self._receive(False)
                self._data = bytearray(length)
                self._target = memoryview(self._data)
                self._left, self._rest = length, self._rest - length
        count = min(self._left, self._end - self._begin)
        if count:
            if self._target is not None:
                self._target[:count] = memoryview(self._scratch)[self._begin : self._begin + count]
                self._target = self._target[count:]
            self._begin += count
            self._left -= count
        if self._left:
            # What follows goes straight to its place.
            self._begin = self._end = 0
            return self._receive(True)
        data, self._data, self._target = self._data, None, None
        if not self._rest:
            self._write = None
        if data is None:
            assert request.problem is not None
            answers.refuse(request, request.problem)
        else:
            answers.take_piece(request, request.offset + request.length - self._rest - len(data), data)
        return True

    def _release_piece(self) -> None:
        """The data of this write will never come."""
        if self._data is not None:
            self.release(len(self._data))
        self._write = self._data = self._target = None

    def _wait_for_the_last(self) -> bool:
        """The client has said goodbye: it gets what it has asked for before."""
        if not (self._requests or self._unsent or self._paused or self._alone):
            self._say_goodbye()
        return self._receive(False)
