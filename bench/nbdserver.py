"""Our NBD server against qemu-nbd, over the same image and with the same client: random reads of 4 KiB, thirty-two at a
time (fio), and the whole image one after the other (nbdcopy).

The page cache is warm, so that the servers are measured and not a disk: on XFS on a loop device, as in datapath.py, and
on tmpfs, where nothing ever waits. All connections are UNIX sockets.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import uvloop
from blockferry.common import linux
from blockferry.common.nbd.export import Export
from blockferry.common.nbd.server import NbdServer
from blockferry.common.nbd.uri import NbdListen
from blockferry.common.volumes import ImageVolume

from bench import workload
from bench.datapath import destination_directory

NAME = "nbdserver"
RUNS = 3
SECONDS = 5
"""Of each run of fio."""
SIZE = 512 * workload.MIB
"""Bytes of the image, all of it data."""

LEAST_RANDOM = 1.0
"""Median random reads a second, as a multiple of qemu-nbd's, that are promised."""
LEAST_SEQUENTIAL = 0.7
"""The same for the bytes a second of a copy."""


async def _serve(image: Path, path: Path) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    volume = await ImageVolume.open(image)
    server = NbdServer([Export("disk", volume, read_only=True)])
    await server.listen(NbdListen(str(path), "", 0))
    await stop.wait()
    await server.close()
    await volume.close()


def _ours(image: Path, path: Path) -> list[str]:
    return [sys.executable, "-m", "bench.nbdserver", str(image), str(path)]


def _qemu(image: Path, path: Path) -> list[str]:
    return ["qemu-nbd", "-r", "-t", "-e", "8", "-f", "raw", "-x", "disk", f"--socket={path}", str(image)]


SERVERS: dict[str, Callable[[Path, Path], list[str]]] = {"blockferry": _ours, "qemu-nbd": _qemu}


@contextlib.contextmanager
def _serving(name: str, image: Path, directory: Path) -> Iterator[str]:
    path = directory / f"{name}.sock"
    process = subprocess.Popen(SERVERS[name](image, path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 20
        while not path.exists():
            if time.monotonic() > deadline or process.poll() is not None:
                raise TimeoutError(f"{name} does not listen")
            time.sleep(0.02)
        yield f"nbd+unix:///disk?socket={path}"
    finally:
        process.terminate()
        process.wait()
        path.unlink(missing_ok=True)


def _random(uri: str, directory: Path, seconds: int) -> float:
    """Reads of 4 KiB a second."""
    done = subprocess.run(
        [
            "fio", "--name=random", "--ioengine=nbd", f"--uri={uri}", "--rw=randread", "--bs=4k", "--iodepth=32",
            f"--size={SIZE}", "--time_based", f"--runtime={seconds}", "--norandommap", "--randrepeat=1",
            "--output-format=json", f"--aux-path={directory}",
        ],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    # Notes come before it.
    found = json.loads(done.stdout[done.stdout.index("{") :])
    return float(found["jobs"][0]["read"]["iops"])


def _sequential(uri: str, connections: int) -> float:
    """Bytes a second of a whole copy to nowhere."""
    began = time.perf_counter()
    subprocess.run(["nbdcopy", f"--connections={connections}", uri, "null:"], check=True)
    return SIZE / (time.perf_counter() - began)


def _measured(image: Path, directory: Path, runs: int, seconds: int) -> dict[str, dict[str, float]]:
    """Medians, by what and by server."""
    found: dict[str, dict[str, list[float]]] = {}
    for _ in range(runs):
        # In turn: whatever else happens on the machine meets all of them.
        for name in SERVERS:
            with _serving(name, image, directory) as uri:
                _sequential(uri, 1)
                for what, value in (
                    ("random 4 KiB reads, depth 32, per second", _random(uri, directory, seconds)),
                    ("sequential, 1 connection, MB/s", _sequential(uri, 1) / 1e6),
                    ("sequential, 4 connections, MB/s", _sequential(uri, 4) / 1e6),
                ):
                    found.setdefault(what, {}).setdefault(name, []).append(value)
    return {
        what: {name: statistics.median(values) for name, values in by_server.items()}
        for what, by_server in found.items()
    }


def measure(runs: int = RUNS, seconds: int = SECONDS) -> dict[str, Any]:
    """All rows, and what is promised."""
    rows: list[dict[str, str]] = []
    broken: list[str] = []
    with contextlib.ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="blockferry-bench-", dir="/dev/shm")))
        mounted, kind = stack.enter_context(destination_directory(base))
        mounted.mkdir(exist_ok=True)
        places: Sequence[tuple[str, Path]] = [("tmpfs", base), (kind.split()[0], mounted)]
        for place, directory in places:
            image = directory / "image.raw"
            workload.make_image(image, 11, [(0, SIZE)], SIZE)
            for what, medians in _measured(image, base, runs, seconds).items():
                ratio = medians["blockferry"] / medians["qemu-nbd"]
                least = LEAST_RANDOM if what.startswith("random") else LEAST_SEQUENTIAL
                rows.append(
                    {
                        "on": place,
                        "what": what,
                        **{name: f"{value:.0f}" for name, value in medians.items()},
                        "ratio": f"{ratio:.2f}",
                        "promised": f"{least:.1f}",
                    }
                )
                if ratio < least:
                    broken.append(f"{what} on {place}: {ratio:.2f} x qemu-nbd, expected at least {least:.2f}")
            image.unlink()
    return {
        "title": f"NBD servers, the same image of {SIZE // workload.MIB} MiB",
        "rows": rows,
        "summary": f"page cache warm, UNIX sockets, fio and nbdcopy; medians of {runs}",
        "broken": broken,
    }


if __name__ == "__main__":
    linux.keep_freed_memory()
    uvloop.run(_serve(Path(sys.argv[1]), Path(sys.argv[2])))
