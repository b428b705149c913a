"""The two processes of a measurement: a server of its own, and one `blockferry` command, each with its peak memory."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

START_SECONDS = 30.0
STOP_SECONDS = 30.0
SAMPLE_SECONDS = 0.02


def script(name: str) -> Path:
    """A console script of the environment that runs this."""
    return Path(sys.executable).with_name(name)


def peak_bytes(pid: int) -> int:
    """The most memory a process had resident since it was executed, in bytes; 0 once it is gone."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


class Server:
    """A `blockferry-server` of its own on a free port."""

    def __init__(self, process: subprocess.Popen[bytes], address: str) -> None:
        self._process = process
        self.address = address

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def peak_bytes(self) -> int:
        """The most memory it ever had resident, in bytes. Files on tmpfs are not part of it."""
        return peak_bytes(self._process.pid)


@contextlib.contextmanager
def serving(pool: Path) -> Iterator[Server]:
    """Serve the directory `pool`, made if need be, for as long as the body runs."""
    pool.mkdir(exist_ok=True)
    with (pool.parent / f"{pool.name}.log").open("wb") as log:
        process = subprocess.Popen(
            [script("blockferry-server"), "--pool", pool, "--listen", "grpc://127.0.0.1:0"],
            stdout=subprocess.PIPE,
            stderr=log,
        )
    assert process.stdout is not None
    try:
        ready, _, _ = select.select([process.stdout], [], [], START_SECONDS)
        line = process.stdout.readline().decode() if ready else ""
        if not line.startswith("listening on "):
            raise AssertionError(f"the server did not start: {(pool.parent / f'{pool.name}.log').read_text()}")
        yield Server(process, line.removeprefix("listening on ").strip())
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


@dataclass(frozen=True)
class Run:
    """One finished command: its report, whole-process seconds, peak resident bytes, and pages it made the kernel
    provide."""

    report: dict[str, Any]
    seconds: float
    peak_bytes: int
    page_faults: int


def blockferry(*arguments: str | Path, state: Path) -> Run:
    """Run `blockferry ... --json` to its end. Raises AssertionError unless it succeeds."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [script("blockferry"), *arguments, "--json", "--quiet"],
        env={**os.environ, "XDG_STATE_HOME": str(state)},
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    output, peak = b"", 0
    with process.stdout:
        while True:
            # Looked at while it runs: the peak that wait4 reports is at least what the parent had when it forked.
            peak = max(peak, peak_bytes(process.pid))
            if select.select([process.stdout], [], [], SAMPLE_SECONDS)[0]:
                part = os.read(process.stdout.fileno(), 1 << 16)
                if not part:
                    break
                output += part
    # wait4 gives the page faults of exactly this child; Popen must be told that it is gone.
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise AssertionError(f"blockferry {arguments[0]} ended with status {process.returncode}: {output.decode()}")
    return Run(json.loads(output), seconds, peak, usage.ru_minflt)
