"""How many policies one agent keeps: 200 with an RPO of 60 s, agent and server on this machine.

Each policy has an image of its own on XFS with reflinks, of which some blocks are overwritten before every round. The
first replications are not counted. Then for some minutes what the agent says of itself is looked at every second: how
far its replicas lag behind, and whether an RPO is missed; and how much processor time and memory both processes take.
Everything is on loop devices over memory-backed files.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.peers import START_SECONDS, STOP_SECONDS, peak_bytes, script, serving
from bench.tracking import _cloning as cloning

NAME = "agents"

POLICIES = 200
RPO = 60
TRANSFERS = 8
SIZE = 16 << 20
DATA = 4 << 20
CHANGED_BLOCKS = 8
SECONDS = 240
FIRST_SECONDS = 300
"""A bound on the first replications."""
BLOCK = 4096
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Process:
    """The agent."""

    pid: int
    page: str

    def metrics(self) -> dict[str, float]:
        """All of them, by their names and labels."""
        with urllib.request.urlopen(self.page, timeout=STOP_SECONDS) as answer:
            lines = answer.read().decode().splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[0] != "#"}

    def of_policies(self, name: str) -> list[float]:
        """One metric of all policies."""
        return [value for key, value in self.metrics().items() if key.startswith(f"blockferry_policy_{name}{{")]


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


@contextlib.contextmanager
def _agent(directory: Path, images: list[Path], address: str) -> Iterator[Process]:
    lines = [
        f'state_dir = "{directory}/state"',
        'listen = ["grpc://127.0.0.1:0"]',
        'status_page = "127.0.0.1:0"',
        f'[limits]\ntransfers = {TRANSFERS}\nbytes_in_flight = "{16 * TRANSFERS}M"',
    ]
    for image in images:
        lines.append(f'[policy.{image.stem}]\nsource = "{image}"\ndestination = "{address}/{image.stem}"')
        lines.append(f'rpo = "{RPO}s"\nsnapshot_floor = 0')
    (directory / "agent.toml").write_text("\n".join(lines))
    with (directory / "agent.log").open("wb") as log:
        process = subprocess.Popen(
            [script("blockferry-agent"), "--config", directory / "agent.toml"], stdout=subprocess.PIPE, stderr=log
        )
    assert process.stdout is not None
    try:
        said = ""
        while said.count("\n") < 2:
            if not select.select([process.stdout], [], [], START_SECONDS)[0]:
                raise AssertionError(f"the agent did not start: {(directory / 'agent.log').read_text()}")
            said += os.read(process.stdout.fileno(), 4096).decode()
        yield Process(process.pid, said.splitlines()[1].rpartition(" ")[2])
    finally:
        process.terminate()
        try:
            process.wait(2 * STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def _make(path: Path, draw: random.Random) -> Path:
    with path.open("wb") as file:
        file.truncate(SIZE)
        file.write(draw.randbytes(DATA))
    return path


def _change(path: Path, draw: random.Random) -> None:
    with path.open("r+b") as file:
        for _ in range(CHANGED_BLOCKS):
            os.pwrite(file.fileno(), draw.randbytes(BLOCK), draw.randrange(DATA // BLOCK) * BLOCK)


def measure() -> dict[str, Any]:
    """Run it; the result with its figures, its bounds and `broken`, a list of sentences."""
    if os.getuid() != 0:
        raise OSError("mounting file systems needs root")
    draw = random.Random("agents")
    lags: list[float] = []
    missed: list[float] = []
    with contextlib.ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="blockferry-bench-", dir="/dev/shm")))
        home = stack.enter_context(cloning(base, "source", 6 << 30))
        away = stack.enter_context(cloning(base, "destination", 6 << 30))
        images = [_make(home / f"p{number:03}.raw", draw) for number in range(POLICIES)]
        server = stack.enter_context(serving(away / "pool"))
        agent = stack.enter_context(_agent(base, images, server.address))
        began = time.monotonic()
        while min(agent.of_policies("generation"), default=0) < 1:
            if time.monotonic() - began > FIRST_SECONDS:
                raise AssertionError(f"not all were replicated: {(base / 'agent.log').read_text()[-2000:]}")
            time.sleep(1.0)
        first = time.monotonic() - began
        before, cpu = agent.metrics(), (_cpu_seconds(agent.pid), _cpu_seconds(server.pid))
        began = time.monotonic()
        changed = 0
        while (passed := time.monotonic() - began) < SECONDS:
            while changed < passed / RPO * POLICIES:
                _change(images[changed % POLICIES], draw)
                changed += 1
            lags.append(max(agent.of_policies("lag_seconds")))
            missed.append(sum(agent.of_policies("rpo_missed")))
            time.sleep(1.0)
        after = agent.metrics()
        used = [now - then for now, then in zip((_cpu_seconds(agent.pid), _cpu_seconds(server.pid)), cpu, strict=True)]
        peaks = peak_bytes(agent.pid), server.peak_bytes()

    def counted(name: str) -> float:
        return sum(value - before.get(key, 0.0) for key, value in after.items() if key.startswith(f"blockferry_{name}"))

    runs = counted("runs_committed_total")
    costs = [f"{seconds / SECONDS:.0%}, {seconds / max(runs, 1) * 1000:.0f} ms each" for seconds in used]
    rows = [
        {"what": "first replications of all", "value": f"{first:.1f} s"},
        {"what": "replications then", "value": f"{runs:.0f} in {SECONDS} s"},
        {"what": "of them compared in full", "value": f"{counted('full_compares_total'):.0f}"},
        {"what": "worst lag", "value": f"{max(lags):.1f} s"},
        {"what": "RPO missed, at the worst moment", "value": f"{max(missed):.0f} policies"},
        {"what": "agent: of one processor", "value": costs[0]},
        {"what": "server: of one processor", "value": costs[1]},
        {"what": "memory of the agent", "value": f"{peaks[0] / 2**20:.0f} MiB"},
        {"what": "memory of the server", "value": f"{peaks[1] / 2**20:.0f} MiB"},
    ]
    broken = []
    if max(missed):
        broken.append(f"{max(missed):.0f} policies missed their RPO of {RPO} s")
    if failed := counted("errors_total"):
        broken.append(f"{failed:.0f} replications failed")
    return {
        "name": NAME,
        "title": f"{POLICIES} policies with an RPO of {RPO} s, agent and server on one machine",
        "rows": rows,
        "summary": "lag: since the start of the newest replication that was committed, looked at every second",
        "worst_lag": max(lags),
        "broken": broken,
    }
