"""The tools that are measured: ours and its peers, each behind the same three steps.

`prepare` brings the destination to its starting state and starts the destination's daemon, untimed. `run` is timed as a
whole process at the source and ends with an fsync at the destination. `image` is what must equal the source then.
"""

from __future__ import annotations

import abc
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

BIN = Path(sys.executable).parent


def free_port() -> int:
    """A TCP port on loopback nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_port(port: int, seconds: float = 10) -> None:
    """Wait until somebody listens."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        if time.monotonic() > deadline:
            raise TimeoutError(f"nobody listens on port {port}")
        time.sleep(0.02)


class Tool(abc.ABC):
    """One way to bring a destination to a source's content."""

    name: str

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._daemon: subprocess.Popen[bytes] | None = None

    @abc.abstractmethod
    def prepare(self, source: Path, old: Path | None) -> None:
        """Make the destination empty, or equal to `old`, and start the daemon."""

    @abc.abstractmethod
    def command(self, source: Path | str) -> list[str]:
        """What is timed; `source` is a file or an NBD URI."""

    @property
    @abc.abstractmethod
    def image(self) -> Path:
        """The destination's image."""

    def _start(self, command: list[str]) -> None:
        self._daemon = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def daemon_pid(self) -> int:
        """The process at the destination."""
        assert self._daemon is not None
        return self._daemon.pid

    def stop(self) -> None:
        """End the daemon."""
        if self._daemon is not None:
            self._daemon.send_signal(signal.SIGTERM)
            self._daemon.wait()
            self._daemon = None


class Blockferry(Tool):
    """blockferry sync to a blockferry-server. `cached`: the server may use the digests of the last generation; `pki`:
    the directory of an authority that has issued `both.crt`, for TLS."""

    def __init__(self, directory: Path, *, cached: bool = False, pki: Path | None = None) -> None:
        super().__init__(directory)
        self.name = "blockferry" + (", digest cache" if cached else "") + (", TLS" if pki else "")
        self._cached = cached
        self._scheme, self._tls = "grpc", list[str]()
        if pki is not None:
            self._scheme = "grpcs"
            self._tls = [f"--tls-cert={pki}/both.crt", f"--tls-key={pki}/both.key", f"--tls-ca={pki}/ca.crt"]
        self._address = ""

    def over_tls(self, pki: Path) -> Blockferry:
        """The same over TLS, in a directory of its own."""
        return Blockferry(self.directory.with_name(self.directory.name + "-tls"), cached=self._cached, pki=pki)

    def prepare(self, source: Path, old: Path | None) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir(parents=True)
        self._serve()
        if old is not None:
            subprocess.run(self.command(old), check=True, stdout=subprocess.DEVNULL)
            if not self._cached:
                assert self._daemon is not None
                # Without a clean shutdown nothing is taken from the cache.
                self._daemon.kill()
                self._daemon.wait()
                self._serve()

    def _serve(self) -> None:
        server = subprocess.Popen(
            [
                BIN / "blockferry-server",
                "--pool",
                self.directory,
                "--listen",
                f"{self._scheme}://127.0.0.1:0",
                *self._tls,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert server.stdout is not None
        self._address = server.stdout.readline().split()[-1]
        self._daemon = server  # type: ignore[assignment]

    def command(self, source: Path | str) -> list[str]:
        state = self.directory.with_name(self.directory.name + "-state")
        return [
            str(BIN / "blockferry"), "sync", str(source), f"{self._address}/bench", "--json", "--quiet",
            "--state-dir", str(state), *self._tls,
        ]  # fmt: skip

    @property
    def image(self) -> Path:
        shown = subprocess.run(
            [BIN / "blockferry", "replica", "show", f"{self._address}/bench", "--json", *self._tls],
            check=True,
            capture_output=True,
        )
        return Path(json.loads(shown.stdout)["path"])


class _FileTool(Tool):
    """A tool whose destination is a plain file."""

    @property
    def image(self) -> Path:
        return self.directory / "image.raw"

    def _reset(self, source: Path, old: Path | None) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir(parents=True)
        if old is None:
            with self.image.open("wb") as file:
                file.truncate(source.stat().st_size)
        else:
            subprocess.run(["cp", "--sparse=always", old, self.image], check=True)
        with self.image.open("rb") as file:
            os.fsync(file.fileno())


class Nbdcopy(_FileTool):
    """nbdcopy to nbdkit's file plugin over TCP."""

    def __init__(self, directory: Path, *, told_empty: bool = False) -> None:
        super().__init__(directory)
        self.name = "nbdcopy, told of an empty target" if told_empty else "nbdcopy"
        self._told_empty = told_empty

    def prepare(self, source: Path, old: Path | None) -> None:
        self._reset(source, old)
        self._port = free_port()
        self._start(["nbdkit", "-f", "-i", "127.0.0.1", "-p", str(self._port), "file", str(self.image)])
        wait_for_port(self._port)

    def command(self, source: Path | str) -> list[str]:
        extra = ["--destination-is-zero"] if self._told_empty else []
        return ["nbdcopy", "--flush", *extra, str(source), f"nbd://127.0.0.1:{self._port}"]


class QemuImg(_FileTool):
    """qemu-img convert to qemu-nbd over TCP."""

    name = "qemu-img"

    def prepare(self, source: Path, old: Path | None) -> None:
        self._reset(source, old)
        self._port = free_port()
        self._empty = old is None
        self._start(
            ["qemu-nbd", "-f", "raw", "-b", "127.0.0.1", "-p", str(self._port), "-t", "--cache=writeback",
             "--discard=unmap", "--detect-zeroes=unmap", str(self.image)]
        )  # fmt: skip
        wait_for_port(self._port)

    def command(self, source: Path | str) -> list[str]:
        extra = ["--target-is-zero"] if self._empty else []
        return ["qemu-img", "convert", "-n", *extra, "-f", "raw", "-O", "raw", str(source),
                f"nbd://127.0.0.1:{self._port}"]  # fmt: skip


class Rsync(_FileTool):
    """rsync to an rsync daemon over TCP, comparing contents."""

    name = "rsync"

    def prepare(self, source: Path, old: Path | None) -> None:
        self._reset(source, old)
        self._port = free_port()
        configuration = self.directory.with_name(self.directory.name + ".conf")
        configuration.write_text(
            f"use chroot = no\nuid = {os.getuid()}\ngid = {os.getgid()}\nread only = no\n"
            f"[bench]\npath = {self.directory}\n"
        )
        self._start(
            ["rsync", "--daemon", "--no-detach", f"--config={configuration}", "--address=127.0.0.1",
             f"--port={self._port}"]
        )  # fmt: skip
        wait_for_port(self._port)

    def command(self, source: Path | str) -> list[str]:
        return ["rsync", "--inplace", "--sparse", "--checksum", "--no-whole-file", "--fsync", str(source),
                f"rsync://127.0.0.1:{self._port}/bench/image.raw"]  # fmt: skip


class Cp(_FileTool):
    """cp and an fsync: what the file system itself takes for such writes, with no other site and nothing compared."""

    name = "cp, on one file system"

    def prepare(self, source: Path, old: Path | None) -> None:
        self._reset(source, old)

    def command(self, source: Path | str) -> list[str]:
        return ["sh", "-c", 'cp --sparse=always "$1" "$2" && sync "$2"', "sh", str(source), str(self.image)]
