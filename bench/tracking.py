"""What a replication costs where shared extents tell what has changed, against comparing everything by digests; and
what a trim costs.

A source of 4 GiB full of random data on XFS with reflinks is replicated to a pool on the same kind of file system. Then
1 % of it is overwritten in single blocks at random places of the regions that change, and it is replicated again, by
either way of tracking in turn. For the trim 90 % of another source hold data, of which all but 10 % are punched out
before the second replication. Everything is on loop devices over memory-backed files, and the page cache is warm; the
agent's code runs in this process, the server in its own. Every replication ends with a comparison of the newest image
with the source.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blockferry.client.cycle import Member, Terms, run_cycle
from blockferry.common.agent_config import Policy

from bench import workload
from bench.peers import Server, serving
from bench.sparse import BLOCK, GIB, MIB, REGION

NAME = "tracking"

SIZE = 4 * GIB
CHANGED_SHARE = 0.01
RUNS = 3
MOST_READ_SHARE = 0.05
"""Bytes read at both sites with shared extents over those with digests: 1 % was changed, in whole regions."""

BEFORE, AFTER = 0.9, 0.1
"""Shares of the source that hold data before and after the trim."""


@contextlib.contextmanager
def _cloning(base: Path, name: str, size: int) -> Iterator[Path]:
    image, mount = base / f"{name}.img", base / name
    with image.open("wb") as file:
        file.truncate(size)
    subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", str(image)], check=True)
    mount.mkdir()
    subprocess.run(["mount", "-o", "loop", str(image), str(mount)], check=True)
    try:
        yield mount
    finally:
        subprocess.run(["umount", str(mount)], check=True)
        image.unlink()


def _fill(path: Path, share: float) -> None:
    draw = random.Random("filled")
    with path.open("wb") as file:
        file.truncate(SIZE)
        for offset in range(0, int(SIZE * share), 4 * MIB):
            os.pwrite(file.fileno(), draw.randbytes(4 * MIB), offset)
        os.fsync(file.fileno())


def _change(path: Path, seed: str) -> None:
    """Overwrite every block of the regions that change: what a guest that writes files does."""
    draw = random.Random(seed)
    regions = draw.sample(range(SIZE // REGION), int(SIZE // REGION * CHANGED_SHARE))
    blocks = [region * REGION + block for region in regions for block in range(0, REGION, BLOCK)]
    draw.shuffle(blocks)
    with path.open("r+b") as file:
        for offset in blocks:
            os.pwrite(file.fileno(), draw.randbytes(BLOCK), offset)
        os.fsync(file.fileno())


def _replicate(source: Path, server: Server, tracking: str, state: Path) -> tuple[dict[str, Any], float]:
    """The report of one replication, and the seconds that it took, snapshot and all."""
    destination = f"{server.address}/bench"
    policy = Policy(source=str(source), destination=destination, rpo=300, tracking=tracking, snapshot_floor=0)
    began = time.perf_counter()
    report: dict[str, Any] = asyncio.run(run_cycle([Member("bench", policy)], Terms(state)))["bench"]
    return report, time.perf_counter() - began


def _images(pool: Path) -> list[Path]:
    return sorted((pool / "bench").glob("*.img"), key=lambda path: path.stat().st_mtime_ns)


def _both(source: Path, pool: Path, state: Path, tracking: str, seed: str) -> tuple[dict[str, Any], float]:
    """A first replication, a change, and the second one, which counts."""
    try:
        with serving(pool) as server:
            _replicate(source, server, tracking, state)
            if seed:
                _change(source, seed)
            else:
                length = int(SIZE * (BEFORE - AFTER))
                subprocess.run(
                    [
                        "fallocate",
                        "--punch-hole",
                        "--offset",
                        str(int(SIZE * AFTER)),
                        "--length",
                        str(length),
                        str(source),
                    ],
                    check=True,
                )
            report, seconds = _replicate(source, server, tracking, state)
            assert workload.same_content(source, _images(pool)[-1]), "the replica differs"
            return report, seconds
    finally:
        shutil.rmtree(pool, ignore_errors=True)
        shutil.rmtree(state, ignore_errors=True)
        shutil.rmtree(source.parent / ".blockferry-snapshots", ignore_errors=True)


def measure() -> dict[str, Any]:
    """Run everything; the result with its figures, its bounds and `broken`, a list of sentences."""
    if os.getuid() != 0:
        raise OSError("mounting file systems needs root")
    found: dict[str, list[tuple[dict[str, Any], float]]] = {"reflink": [], "digests": []}
    with contextlib.ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="blockferry-bench-", dir="/dev/shm")))
        home = stack.enter_context(_cloning(base, "source", 6 * GIB))
        away = stack.enter_context(_cloning(base, "destination", 6 * GIB))
        source = home / "source.raw"
        _fill(source, 1.0)
        for run in range(RUNS):
            for tracking, results in found.items():
                results.append(_both(source, away / "pool", base / "state", tracking, f"{tracking} {run}"))
        _fill(source, BEFORE)
        trimmed, trim_seconds = _both(source, away / "pool", base / "state", "reflink", "")

    def read(report: dict[str, Any]) -> int:
        return int(report["bytes"]["source_read"] + report["bytes"]["destination_read"])

    rows: list[dict[str, Any]] = [
        {
            "what": "1 % changed",
            "tracking": tracking,
            "read MiB": f"{statistics.median(read(report) for report, _ in results) / MIB:.1f}",
            "sent MiB": f"{statistics.median(report['bytes']['data_sent'] for report, _ in results) / MIB:.1f}",
            "seconds": f"{statistics.median(seconds for _, seconds in results):.2f}",
        }
        for tracking, results in found.items()
    ]
    rows.append(
        {
            "what": f"trimmed from {BEFORE:.0%} to {AFTER:.0%}",
            "tracking": "reflink",
            "read MiB": f"{read(trimmed) / MIB:.1f}",
            "sent MiB": f"{trimmed['bytes']['data_sent'] / MIB:.1f}",
            "seconds": f"{trim_seconds:.2f}",
        }
    )
    shares = statistics.median(read(report) for report, _ in found["reflink"]) / statistics.median(
        read(report) for report, _ in found["digests"]
    )
    broken = [
        f"{tracking}: {report['full_compare']}"
        for tracking, results in found.items()
        for report, _ in results
        if tracking == "reflink" and report["full_compare"]
    ]
    if shares >= MOST_READ_SHARE:
        broken.append(
            f"with shared extents {shares:.1%} of the bytes were read; under {MOST_READ_SHARE:.0%} is promised"
        )
    if trimmed["bytes"]["data_sent"]:
        broken.append(f"a trim sent {trimmed['bytes']['data_sent']} bytes of data; none is promised")
    return {
        "name": NAME,
        "title": "the second replication of 4 GiB: shared extents and digests (XFS to XFS)",
        "rows": rows,
        "summary": f"shared extents read {shares:.1%} of what digests read (bound {MOST_READ_SHARE:.0%}); medians of "
        f"{RUNS}, both in turn, memory-backed, page cache warm",
        "read_share": shares,
        "broken": broken,
    }
