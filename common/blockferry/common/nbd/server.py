"""An NBD server: exports, where it listens, and how many clients it takes.

Fixed newstyle handshake, TLS where it is configured (then nothing is told without), structured replies, block status.
docs/nbd.md says what is promised.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import ssl
import stat
from collections.abc import Callable, Sequence
from pathlib import Path

from blockferry.common.disk import unlink
from blockferry.common.errors import BlockferryError, Code, from_os_error
from blockferry.common.nbd.answers import ARENA, PIECE, Answers, Arenas
from blockferry.common.nbd.export import Export
from blockferry.common.nbd.offer import Negotiation
from blockferry.common.nbd.peer import Limits, Peer, Room
from blockferry.common.nbd.uri import NbdListen

BACKLOG = 256
"""Connections that wait for the event loop."""

CLOSE_SECONDS = 5.0
"""How long requests in flight may take when the server is stopped."""

_POOLED = PIECE + 64 * 1024
"""Bytes: a whole piece, and the headers of the reads that share it."""


class NbdServer:
    """Serves `exports`; the first is also served by the empty name. `tls` makes it demand TLS: it is asked for a
    context at each handshake, so that certificates may change."""

    def __init__(
        self,
        exports: Sequence[Export],
        *,
        tls: Callable[[], ssl.SSLContext] | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.limits = limits or Limits()
        self.room = Room(self.limits.bytes_in_flight)
        self._exports = {one.name: one for one in exports}
        self._tls = tls
        self._inline, self._pieces = Arenas(ARENA), Arenas(_POOLED)
        self._listening: list[asyncio.Server] = []
        self._sockets: list[tuple[Path, int, int]] = []
        self._handshaking: dict[Peer, None] = {}
        self._clients: dict[Peer, str] = {}
        self._leaving: set[asyncio.Task[None]] = set()
        self._closing = False

    # --- listening ----------------------------------------------------------------------------------------------------

    async def listen(self, where: NbdListen, *, insecure: bool = False) -> NbdListen:
        """Take clients; where they find the server. Raises UNSUPPORTED for plaintext to other machines, unless it is
        `insecure`; IN_USE; or what `from_os_error` makes of a place that cannot be had."""
        if self._tls is None and not where.local and not insecure:
            raise BlockferryError(
                Code.UNSUPPORTED,
                f"cannot listen on {where.host}:{where.port}",
                cause="without TLS anybody on the way could read and change whole disks",
                next="listen on a loopback address or a socket, use TLS, or say --insecure if the network itself is "
                "trusted",
            )
        loop = asyncio.get_running_loop()
        what = f"cannot listen on {where.socket or f'{where.host}:{where.port}'}"
        try:
            if where.socket:
                own = self._bind(Path(where.socket))
                self._listening.append(await loop.create_unix_server(lambda: Peer(self), sock=own, backlog=BACKLOG))
                return where
            server = await loop.create_server(lambda: Peer(self), where.host, where.port, backlog=BACKLOG)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise BlockferryError(
                    Code.IN_USE, what, cause="somebody listens there already", next="choose another place"
                ) from error
            raise from_os_error(error, what) from error
        self._listening.append(server)
        port = server.sockets[0].getsockname()[1]
        return NbdListen("", where.host, port)

    def _bind(self, path: Path) -> socket.socket:
        """A socket at `path`. One that a server has left behind is replaced; one that somebody listens on is not."""
        own = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            with contextlib.suppress(FileNotFoundError):
                if stat.S_ISSOCK(path.lstat().st_mode) and _is_abandoned(path):
                    unlink(path)
            own.bind(str(path))
            made = path.lstat()
        except BaseException:
            own.close()
            raise
        self._sockets.append((path, made.st_dev, made.st_ino))
        return own

    async def close(self) -> None:
        """Take no more clients, refuse what is asked from now on, finish what is under way, for `CLOSE_SECONDS` at
        most, flush, and let go. The volumes are left open."""
        self._closing = True
        for server in self._listening:
            server.close()
        for path, device, inode in self._sockets:
            with contextlib.suppress(OSError):
                found = path.lstat()
                if (found.st_dev, found.st_ino) == (device, inode):
                    unlink(path)
        for peer in list(self._handshaking):
            peer.broken("the server is being stopped")
        answers = [peer.answers for peer in self._clients if peer.answers is not None]
        for one in answers:
            one.close()
        under_way = [*self._leaving, *(asyncio.create_task(one.finished()) for one in answers)]
        if under_way:
            await asyncio.wait(under_way, timeout=CLOSE_SECONDS)
        for peer in list(self._clients):
            peer.broken("the server is being stopped")
        for one in answers:
            # Reads that are still waiting for something; what has to be written is waited for.
            one.abandon()
        await asyncio.gather(*under_way)
        for export in self._exports.values():
            if export.failed is None:
                await export.flush()

    # --- clients ------------------------------------------------------------------------------------------------------

    @property
    def clients(self) -> int:
        """Clients that use an export."""
        return len(self._clients)

    def context(self) -> ssl.SSLContext:
        assert self._tls is not None
        return self._tls()

    def begun(self, peer: Peer) -> Negotiation:
        while len(self._handshaking) >= self.limits.handshakes:
            oldest = next(iter(self._handshaking))
            del self._handshaking[oldest]
            oldest.broken("it had to make room for another client before it had chosen an export")
        self._handshaking[peer] = None
        if self._closing:
            peer.broken("the server is being stopped")
        offers = {name: export.offer for name, export in self._exports.items()}
        return Negotiation(offers, tls=self._tls is not None, full=self._full)

    def _full(self) -> str:
        if self._closing:
            return "the server is being stopped"
        if len(self._clients) >= self.limits.connections:
            return f"the server has {len(self._clients)} clients, and takes no more"
        return ""

    def chosen(self, peer: Peer, name: str) -> Callable[[bool, Sequence[str]], Answers]:
        self._handshaking.pop(peer, None)
        self._clients[peer] = name
        export = self._exports[name]
        export.mention("client connected", client=peer.name, clients=len(self._clients))

        def make(structured: bool, contexts: Sequence[str]) -> Answers:
            return Answers(
                export, peer, structured=structured, contexts=contexts, inline=self._inline, pieces=self._pieces
            )

        return make

    def over(self, peer: Peer, cause: str) -> None:
        self._handshaking.pop(peer, None)
        name = self._clients.pop(peer, None)
        if name is not None:
            self._exports[name].mention("client gone", client=peer.name, cause=cause or "it said goodbye")
            if peer.answers is not None:
                # What it had written is still on its way.
                task = asyncio.create_task(peer.answers.finished(), name="nbd-leaving")
                self._leaving.add(task)
                task.add_done_callback(self._leaving.discard)
        elif cause and not self._closing:
            first = next(iter(self._exports.values()))
            first.say("handshake failed", client=peer.name, cause=cause)


def _is_abandoned(path: Path) -> bool:
    """Whether nobody listens on a socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        return probe.connect_ex(str(path)) == errno.ECONNREFUSED
