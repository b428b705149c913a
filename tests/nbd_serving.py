"""Our NBD server for tests: on an event loop of its own in a thread, or in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import uvloop
from blockferry.common.nbd.export import Export
from blockferry.common.nbd.peer import Limits
from blockferry.common.nbd.server import NbdServer
from blockferry.common.nbd.uri import NbdListen
from blockferry.common.settings import Tls
from blockferry.common.tls import server_context
from blockferry.common.volumes import ImageVolume, Volume

T = TypeVar("T")
BOUND = 20.0
"""Seconds after which something hangs."""

_numbers = itertools.count(1)


def opener(image: Path, *, writable: bool = True) -> Callable[[], Awaitable[Volume]]:
    """What opens an image, again and again."""
    return functools.partial(ImageVolume.open, image, writable=writable)


# Its module is for the distribution's Python alone, which nbdsh looks for in PATH.
PEERS = {**os.environ, "PATH": f"/usr/bin:{os.environ['PATH']}"}


def run(*words: object) -> str:
    """A peer that must succeed; what it printed."""
    done = subprocess.run(
        [str(word) for word in words], env=PEERS, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, f"{words}\n{done.stdout}{done.stderr}"
    return done.stdout


@dataclass
class Serving:
    """A server at work. `uri` names its export."""

    uri: str
    socket: Path
    server: NbdServer
    export: Export
    volume: Volume
    loop: asyncio.AbstractEventLoop

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Do something on the server's event loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(BOUND)

    def look(self, function: Callable[[], T]) -> T:
        """Call something there."""

        async def call() -> T:
            return function()

        return self.run(call())


@contextlib.contextmanager
def serving(
    make: Callable[[], Awaitable[Volume]],
    *,
    read_only: bool = False,
    files: Tls | None = None,
    tcp: bool = False,
    limits: Limits | None = None,
    name: str = "disk",
) -> Iterator[Serving]:
    """Serve the volume that `make` opens, and close it at the end."""
    with tempfile.TemporaryDirectory(prefix="blockferry-nbd-") as directory:
        path = Path(directory) / "nbd.sock"
        ready: Future[Serving] = Future()
        stop: list[Callable[[], object]] = []

        async def main() -> None:
            ending = asyncio.Event()
            loop = asyncio.get_running_loop()
            stop.append(lambda: loop.call_soon_threadsafe(ending.set))
            try:
                volume = await make()
                export = Export(name, volume, read_only=read_only, description="a disk")
                context = None if files is None else server_context(files)
                server = NbdServer([export], tls=None if context is None else lambda: context, limits=limits)
                where = await server.listen(NbdListen("", "127.0.0.1", 0) if tcp else NbdListen(str(path), "", 0))
                ready.set_result(Serving(where.uri(name, tls=files is not None), path, server, export, volume, loop))
            except BaseException as error:
                ready.set_exception(error)
                return
            await ending.wait()
            await server.close()
            await volume.close()

        thread = threading.Thread(target=lambda: uvloop.run(main()), name=f"nbd-{next(_numbers)}")
        thread.start()
        try:
            yield ready.result(BOUND)
        finally:
            stop[0]()
            thread.join(BOUND)
            assert not thread.is_alive(), "the server does not end"


@contextlib.contextmanager
def process(image: Path, socket: Path, **limits: float) -> Iterator[subprocess.Popen[str]]:
    """Serve an image, writable, in a process of its own."""
    words = [sys.executable, "-m", "tests.nbd_serving", str(image), str(socket)]
    words += [f"{name}={value}" for name, value in limits.items()]
    root = Path(__file__).resolve().parents[1]
    found = subprocess.Popen(words, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert found.stdout is not None
        assert found.stdout.readline() == "ready\n"
        yield found
    finally:
        found.terminate()
        found.communicate(timeout=BOUND)


async def _main(image: Path, socket: Path, limits: Limits) -> None:
    import signal

    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    volume = await ImageVolume.open(image, writable=True)
    server = NbdServer([Export("disk", volume, read_only=False)], limits=limits)
    await server.listen(NbdListen(str(socket), "", 0))
    print("ready", flush=True)
    await stop.wait()
    await server.close()
    await volume.close()


if __name__ == "__main__":
    given = dict(word.split("=") for word in sys.argv[3:])
    bounds = {name: float(value) if name == "handshake" else int(value) for name, value in given.items()}
    uvloop.run(_main(Path(sys.argv[1]), Path(sys.argv[2]), Limits(**bounds)))  # type: ignore[arg-type]
