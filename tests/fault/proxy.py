"""A TCP proxy on the loopback device that cuts, stalls and half-closes connections where a test says so."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator

UP, DOWN = "up", "down"
"""From the client to the server, and back."""

CHUNK = 16 * 1024
"""Bytes passed on at once: the precision of everything that happens at a byte count."""

Judge = Callable[[str, int, bytes], bool]
"""(direction, bytes passed on so far in that direction, what comes next): False cuts all connections instead."""


class Proxy:
    """Listens on a free port and passes everything on to `target`. Counters are sums over all connections."""

    def __init__(self, target: str) -> None:
        host, _, port = target.removeprefix("grpc://").rpartition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"grpc://127.0.0.1:{self._listener.getsockname()[1]}"
        self.passed = {UP: 0, DOWN: 0}
        self.connections = 0
        self.cuts = 0
        self.judge: Judge = lambda *_: True
        self.refusing = False
        """Close new connections at once."""
        self.stalled = threading.Event()
        """`stall_at` has come to pass."""
        self._going = {UP: threading.Event(), DOWN: threading.Event()}
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._half_closed: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        for direction in self._going:
            self._going[direction].set()
        self._spawn(self._accept)

    def _spawn(self, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=target, args=args, name="proxy", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.refusing:
                client.close()
                continue
            try:
                server = socket.create_connection(self._target)
            except OSError:
                client.close()
                continue
            with self._lock:
                self.connections += 1
                self._open |= {client, server}
            self._spawn(self._pump, client, server, UP)
            self._spawn(self._pump, server, client, DOWN)

    def _pump(self, source: socket.socket, sink: socket.socket, direction: str) -> None:
        try:
            while data := source.recv(CHUNK):
                self._going[direction].wait()
                if not self.judge(direction, self.passed[direction], data):
                    self.cut()
                    return
                if self._send(sink, data):
                    with self._lock:
                        self.passed[direction] += len(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            # What one side did to its connection happens to the other's: a reset is passed on.
            self._reset({source, sink})

    def _send(self, sink: socket.socket, data: bytes) -> bool:
        try:
            sink.sendall(data)
        except OSError:
            if sink not in self._half_closed:
                raise
            # Whoever goes on sending into the void is not told.
            return False
        return True

    def stall(self, *directions: str) -> None:
        """Pass nothing on in these directions until `go`. Connections stay open, as with a network that drops all."""
        for direction in directions:
            self._going[direction].clear()

    def stall_at(self, at: int, *directions: str) -> None:
        """Stall once `at` bytes have passed upwards, on however fast a machine."""

        def judge(way: str, passed: int, data: bytes) -> bool:
            if way == UP and passed >= at and not self.stalled.is_set():
                self.stall(*directions)
                self.stalled.set()
            return True

        self.judge = judge

    def go(self) -> None:
        """Pass everything on again."""
        for going in self._going.values():
            going.set()

    def half_close(self, direction: str) -> None:
        """Say to the receivers of a direction that nothing more comes."""
        with self._lock:
            for one in self._open:
                towards_server = one.getpeername() == self._target if one.fileno() >= 0 else None
                if towards_server == (direction == UP):
                    self._half_closed.add(one)
                    with contextlib.suppress(OSError):
                        one.shutdown(socket.SHUT_WR)

    def cut(self) -> None:
        """Reset every connection."""
        with self._lock:
            self.cuts += 1
            doomed = set(self._open)
        self._reset(doomed)

    def _reset(self, doomed: set[socket.socket]) -> None:
        with self._lock:
            doomed &= self._open
            self._open -= doomed
        for one in doomed:
            with contextlib.suppress(OSError):
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                # Wakes a thread that waits in recv, which close alone does not.
                one.shutdown(socket.SHUT_RD)
            one.close()

    def close(self) -> None:
        """End everything."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.go()
        self.cut()
        for thread in self._threads:
            thread.join(10)


@contextlib.contextmanager
def proxied(address: str) -> Iterator[Proxy]:
    """A proxy in front of a server's address."""
    proxy = Proxy(address)
    try:
        yield proxy
    finally:
        proxy.close()
