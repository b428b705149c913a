"""What a commit costs where generations are clones, and where they go through a journal.

The same image with the same changes is synced to a pool on XFS with reflinks and to one on ext4, both on loop devices
over memory-backed files, in turn. `sync` is the whole process of the source; `commit` the part of it from the request
to the answer; `whole` the time from then until the newest generation is one complete image, which nobody waits for.
Every run ends with a comparison of that image with the source, and the commit's own flushes are in the time. The page
cache is warm.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import workload
from bench.peers import blockferry, serving
from bench.sparse import GIB, MIB

NAME = "commits"

SIZE = 4 * GIB
DATA = 2 * GIB
RUNS = 3
POLL_SECONDS = 0.02

MAKERS = {"clones": ["mkfs.xfs", "-q", "-m", "reflink=1"], "journal": ["mkfs.ext4", "-q", "-b", "4096"]}
"""How the file system of each kind is made."""

MOST_RATIO = 3.0
"""Sync of 1 GiB of changes through the journal over that of a clone: it writes the changes twice, and the before-images
once."""


@dataclass(frozen=True)
class Measured:
    """One update. Seconds, and bytes that the older point holds."""

    sync: float
    commit: float
    whole: float
    point: int


@contextlib.contextmanager
def _pool(base: Path, kind: str) -> Iterator[Path]:
    image, mount = base / f"{kind}.img", base / kind
    with image.open("wb") as file:
        file.truncate(12 * GIB)
    subprocess.run([*MAKERS[kind], str(image)], check=True)
    mount.mkdir()
    subprocess.run(["mount", "-o", "loop", str(image), str(mount)], check=True)
    try:
        yield mount
    finally:
        subprocess.run(["umount", str(mount)], check=True)
        image.unlink()


def _changes() -> dict[str, list[tuple[int, int]]]:
    """(offset, length) of what each update changes, by its name."""
    generator = random.Random("changes")
    pieces = generator.sample(range(DATA // MIB), 1024)
    blocks = generator.sample(range(DATA // 4096), 64 * MIB // 4096)
    return {
        "1 GiB in pieces of 1 MiB": [(piece * MIB, MIB) for piece in sorted(pieces)],
        "64 MiB in single blocks": [(block * 4096, 4096) for block in sorted(blocks)],
    }


def _write(path: Path, seed: str, extents: list[tuple[int, int]]) -> None:
    generator = random.Random(seed)
    with path.open("r+b") as file:
        for offset, length in extents:
            file.seek(offset)
            file.write(generator.randbytes(length))
        os.fsync(file.fileno())


def _measure(base: Path, mount: Path, kind: str) -> dict[str, Measured]:
    source, pool, state = base / "source.raw", mount / "pool", base / "state"
    with source.open("wb") as file:
        file.truncate(SIZE)
    _write(source, "base", [(offset, 4 * MIB) for offset in range(0, DATA, 4 * MIB)])
    pool.mkdir()
    found = {}
    try:
        with serving(pool) as server:
            target = f"{server.address}/bench"
            blockferry("sync", source, target, "--keep", "last=2", state=state)
            for name, extents in _changes().items():
                _write(source, f"{kind} {name}", extents)
                os.sync()
                done = blockferry("sync", source, target, state=state)
                answered = time.perf_counter()
                while (shown := blockferry("replica", "show", target, state=state).report)["path"] is None:
                    time.sleep(POLL_SECONDS)
                whole = time.perf_counter() - answered
                assert shown["kind"] == kind, shown
                assert workload.same_content(source, Path(shown["path"])), f"{kind}, {name}: the replica differs"
                points = blockferry("replica", "points", target, state=state).report["points"]
                found[name] = Measured(done.seconds, done.report["seconds"]["commit"], whole, points[1]["bytes_held"])
    finally:
        shutil.rmtree(pool)
        shutil.rmtree(state, ignore_errors=True)
    return found


def measure() -> dict[str, Any]:
    """Run everything; the result with its figures, its bounds and `broken`, a list of sentences."""
    if os.getuid() != 0:
        raise OSError("mounting file systems needs root")
    runs: dict[str, list[dict[str, Measured]]] = {kind: [] for kind in MAKERS}
    with contextlib.ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="blockferry-bench-", dir="/dev/shm")))
        mounts = {kind: stack.enter_context(_pool(base, kind)) for kind in MAKERS}
        for _ in range(RUNS):
            for kind, mount in mounts.items():
                runs[kind].append(_measure(base, mount, kind))

    def median(kind: str, name: str, field: str) -> float:
        return float(statistics.median(getattr(run[name], field) for run in runs[kind]))

    rows: list[dict[str, Any]] = [
        {
            "changed": name,
            "kind": kind,
            "sync s": f"{median(kind, name, 'sync'):.2f}",
            "of it commit s": f"{median(kind, name, 'commit'):.2f}",
            "then until whole s": f"{median(kind, name, 'whole'):.2f}",
            "older point holds MiB": f"{median(kind, name, 'point') / MIB:.1f}",
        }
        for name in _changes()
        for kind in MAKERS
    ]
    ratios = {name: median("journal", name, "sync") / median("clones", name, "sync") for name in _changes()}
    broken = [
        f"{name}: through the journal a sync took {ratio:.2f} times that of a clone; at most {MOST_RATIO} is expected"
        for name, ratio in ratios.items()
        if ratio > MOST_RATIO
    ]
    return {
        "name": NAME,
        "title": "an update of 4 GiB of which 2 GiB hold data: clones (XFS) and journal (ext4)",
        "rows": rows,
        "summary": "; ".join(f"{name}: journal / clones {ratio:.2f}" for name, ratio in ratios.items())
        + f"; medians of {RUNS}, both kinds in turn, memory-backed, page cache warm",
        "ratios": ratios,
        "broken": broken,
    }
