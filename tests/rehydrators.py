"""blockferry-rehydrate as a process, and guests that use its disk by NBD. Ended by its process id only."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from tests import zygote
from tests.support import PROGRAMS, START_SECONDS, STOP_SECONDS, Finished, Report, finish, ok

SOCKET = "nbd.sock"


class Rehydrator:
    """One disk in a directory of its own: `disk.raw`, unless another primary is named, and `state`."""

    running: ClassVar[list[Rehydrator]] = []

    def __init__(
        self, directory: Path, *sources: str, primary: str | Path = "", flags: Sequence[str] = (), doom: str = ""
    ) -> None:
        directory.mkdir(exist_ok=True)
        self.directory = directory
        self.sources = sources
        self.primary = str(primary or directory / "disk.raw")
        self.state = directory / "state"
        self.socket = directory / SOCKET
        self.log = directory / "log"
        self.doom = doom
        """`NAME:PASS` of the crash point where it dies."""
        self._flags = list(flags)
        self._process: subprocess.Popen[bytes] | None = None
        self.said = b""

    @property
    def uri(self) -> str:
        """Of its export."""
        return f"nbd+unix:///?socket={self.socket}"

    @property
    def words(self) -> list[str]:
        """The command line."""
        return [
            str(PROGRAMS / "blockferry-rehydrate"), *self.sources, self.primary, "--nbd", f"unix:{self.socket}",
            "--state", str(self.state), *self._flags,
        ]  # fmt: skip

    def _popen(self, **options: Any) -> subprocess.Popen[Any]:
        env = zygote.environment()
        if self.doom:
            env["BLOCKFERRY_CRASH_POINT"] = self.doom
        return zygote.popen(self.words, env=env, **options)

    def refuse(self) -> Finished:
        """Run it to its end: it does not start."""
        return finish(self._popen(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))

    def start(self) -> Rehydrator:
        """Start and wait until it says where it listens."""
        assert self.try_to_start() is None, self.log.read_text()
        return self

    def try_to_start(self) -> int | None:
        """As `start`; the exit status if it ended instead."""
        with self.log.open("ab") as log:
            self._process = self._popen(stdout=subprocess.PIPE, stderr=log)
        Rehydrator.running.append(self)
        self.said = b""
        if not self.says(b"listening on "):
            return self._end(0)
        return None

    def says(self, words: bytes, seconds: float = START_SECONDS) -> bool:
        """Wait until it has said something on stdout; False if it ends before."""
        assert self._process is not None and self._process.stdout is not None
        end = time.monotonic() + seconds
        while not any(words in line for line in self.said.splitlines(keepends=True) if line.endswith(b"\n")):
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"it has not said {words!r}: {self.log.read_text()}"
            part = os.read(self._process.stdout.fileno(), 4096)
            if not part:
                return False
            self.said += part
        return True

    def hydrated(self) -> Rehydrator:
        """Wait until everything is."""
        assert self.says(b"everything is hydrated"), self.log.read_text()
        return self

    @property
    def pid(self) -> int:
        """The process id."""
        assert self._process is not None
        return self._process.pid

    def content(self) -> bytes:
        """Of the primary, if that is an image."""
        return Path(self.primary).read_bytes()

    def show(self) -> Report:
        """`rehydration show --json`."""
        return ok("rehydration", "show", self.state)

    def died(self, seconds: float = STOP_SECONDS) -> int:
        """Wait for its end; the status."""
        assert self._process is not None
        self._process.wait(seconds)
        return self._end(0)

    def is_dead(self) -> bool:
        """Whether it has ended."""
        return self._process is None or self._process.poll() is not None

    def _end(self, number: int) -> int:
        process, self._process = self._process, None
        if process is None:
            return 0
        if number:
            process.send_signal(number)
        try:
            return process.wait(STOP_SECONDS)
        finally:
            if process.returncode is None:
                process.kill()
                process.wait()
            assert process.stdout is not None
            process.stdout.close()
            Rehydrator.running.remove(self)

    def stop(self) -> int:
        """SIGTERM; the exit status."""
        return self._end(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self._end(signal.SIGKILL)


@contextlib.contextmanager
def rehydrating(directory: Path, *sources: str, **options: Any) -> Iterator[Rehydrator]:
    """A disk that is served while the body runs, unless the body ends it."""
    found = Rehydrator(directory, *sources, **options).start()
    try:
        yield found
    finally:
        found.kill()


def left(rehydrator: Rehydrator) -> int:
    """Bytes that are not hydrated."""
    shown = rehydrator.show()
    size, hydrated = shown["size"], shown["hydrated"]
    assert isinstance(size, int) and isinstance(hydrated, int)
    return size - hydrated


def wait_for_status(rehydrator: Rehydrator, state: str) -> None:
    """Until `rehydration show` says so; asked seldom, since each time is a process."""
    end = time.monotonic() + START_SECONDS
    while rehydrator.show()["state"] != state:
        assert time.monotonic() < end, f"waited in vain until the disk is {state}"
        time.sleep(0.3)
