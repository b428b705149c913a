"""Real processes for tests: blockferry-server with a pool of its own, and the blockferry command line.

Nothing here imports blockferry: whatever a test sees of it comes out of a process.
"""

from __future__ import annotations

import hashlib
import json
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from tests import zygote
from tests.images import Snapshot
from tests.zygote import PROGRAMS as PROGRAMS

START_SECONDS = 30
STOP_SECONDS = 20

Report = dict[str, Any]


@dataclass(frozen=True)
class Finished:
    """What a command left: its exit status and everything it printed."""

    status: int
    stdout: str
    stderr: str

    @property
    def report(self) -> Report:
        """The one JSON object on stdout; anything else there fails the test."""
        found = json.loads(self.stdout)
        assert isinstance(found, dict) and self.stdout.count("\n") == 1, self.stdout
        return found


def own_directory(root: Path, name: str) -> Path:
    """A new directory whose name begins with `name`: fixtures of a module are set up again where tests that another
    worker gave back come to it."""
    return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=root))


def command(*args: object) -> list[str]:
    """The words that run `blockferry`."""
    return [str(PROGRAMS / "blockferry"), *map(str, args)]


def run_cli(*args: object, unprivileged: bool = False, timeout: float = 120) -> Finished:
    """Run `blockferry` to its end; `unprivileged` so that file permissions count even for root.

    Root stays root then, without the capabilities that override permissions: another user might not be able to reach
    the interpreter.
    """
    words = command(*args)
    if unprivileged and os.geteuid() == 0:
        words = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *words]
    return finish(zygote.popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True), timeout)


def start_cli(*args: object) -> subprocess.Popen[str]:
    """Start `blockferry` and leave it running; the test ends it."""
    return zygote.popen(command(*args), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str], timeout: float = 60) -> Finished:
    """Wait for a command that was started; kill it if it does not end."""
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    return Finished(process.returncode, stdout, stderr)


def ok(*args: object) -> Report:
    """Run a command with --json that must succeed; its report."""
    done = run_cli(*args, "--json", "--quiet")
    assert done.status == 0, done.stderr
    assert not done.stderr, done.stderr
    return done.report


def refused(done: Finished, *words: str, status: int = 1, program: str = "blockferry") -> str:
    """Assert that a command failed with one clear line which contains all `words`; return the line."""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, f"{len(lines)} lines on stderr:\n{done.stderr}"
    assert done.status == status, f"status {done.status}: {lines[0]}"
    assert lines[0].startswith(f"{program}: "), lines[0]
    assert "Traceback" not in done.stderr
    assert ";" in lines[0], f"no next step in: {lines[0]}"
    for word in words:
        assert word in lines[0], f"{word!r} is not in: {lines[0]}"
    return lines[0]


def refused_json(done: Finished, code: str, *words: str, status: int = 1) -> Report:
    """As `refused`, and the error object on stdout; returns it."""
    line = refused(done, *words, status=status)
    found = done.report
    assert set(found) == {"error"}
    error: Report = found["error"]
    assert {"code", "volume", "offset", "length", "cause", "next"} <= set(error)
    assert error["code"] == code, error
    assert error["cause"] and error["cause"] in line
    assert error["next"] and error["next"] in line
    return error


def until(condition: Callable[[], bool], what: str, timeout: float = 60) -> None:
    """Wait until `condition` holds; fail naming `what`."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"waited in vain until {what}"
        time.sleep(0.01)


def tree(directory: Path) -> dict[str, tuple[int, int, str]]:
    """Everything in a directory, by relative name: size, blocks held and content digest."""
    found = {}
    for path in sorted(directory.rglob("*")):
        info = path.stat()
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        found[str(path.relative_to(directory))] = (info.st_size if path.is_file() else 0, info.st_blocks, content)
    return found


class Server:
    """One blockferry-server process over one pool directory. Ended by its process id only."""

    running: ClassVar[list[Server]] = []

    def __init__(self, pool: Path, *, listen: str = "grpc://127.0.0.1:0", flags: Sequence[str] = ()) -> None:
        self.pool = pool
        self.log = pool.with_name(pool.name + ".log")
        self.address = listen
        self._flags = list(flags)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The process id."""
        assert self._process is not None
        return self._process.pid

    @property
    def words(self) -> list[str]:
        """The command line."""
        return [
            str(PROGRAMS / "blockferry-server"), "--pool", str(self.pool), "--listen", self.address, *self._flags,
        ]  # fmt: skip

    @property
    def environment(self) -> dict[str, str]:
        """What the process has for its environment."""
        return zygote.environment()

    def start(self) -> Server:
        """Start and wait until it says where it listens; a later start takes the same port again."""
        with self.log.open("ab") as log:
            self._process = zygote.popen(self.words, stdout=subprocess.PIPE, stderr=log, env=self.environment)
        Server.running.append(self)
        assert self._process.stdout is not None
        line = b""
        end = time.monotonic() + START_SECONDS
        while b"\n" not in line:
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, end - time.monotonic()))
            part = os.read(self._process.stdout.fileno(), 4096) if ready else b""
            if not part:
                self.kill()
                raise AssertionError(f"the server did not start:\n{self.log.read_text()}")
            line += part
        said, _, self.address = line.decode().splitlines()[0].rpartition(" ")
        assert said == "listening on", line
        return self

    def _end(self, number: int) -> int:
        process, self._process = self._process, None
        if process is None:
            return 0
        process.send_signal(number)
        try:
            return process.wait(STOP_SECONDS)
        finally:
            if process.returncode is None:
                process.kill()
                process.wait()
            assert process.stdout is not None
            process.stdout.close()
            Server.running.remove(self)

    def stop(self) -> int:
        """SIGTERM; the exit status."""
        return self._end(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL, as a power cut of the process."""
        self._end(signal.SIGKILL)

    def url(self, volume: str) -> str:
        """Address of a replica."""
        return f"{self.address}/{volume}"

    # --- what tests do most -----------------------------------------------------------------------------------------

    def sync(self, source: Path, volume: str, *flags: object) -> Report:
        """A sync by the command line that must succeed; its report."""
        return ok("sync", source, self.url(volume), *flags)

    def show(self, volume: str) -> Report:
        """`replica show --json`."""
        return ok("replica", "show", self.url(volume))

    def image(self, volume: str) -> Path:
        """The image of the newest committed generation."""
        return Path(self.show(volume)["path"])

    def snapshot(self, volume: str) -> Snapshot:
        """Bytes and extents of the newest committed generation."""
        return Snapshot.of(self.image(volume))

    def bytes_written(self) -> int:
        """Bytes the process has handed to write calls so far: tells how far a sync is, whatever files it goes to."""
        return int(Path(f"/proc/{self.pid}/io").read_text().split("wchar:")[1].split()[0])
