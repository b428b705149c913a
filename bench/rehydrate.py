"""A disk that is rehydrated: how soon it answers, how long the rest takes, what a guest waits for.

The replica, its server, the primary and the clients are on one machine, everything memory-backed and the page cache
warm, as in datapath.py. Distance is a proxy that holds every byte back for 10 ms in each direction.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blockferry.common.nbd.client import NbdClient
from blockferry.common.nbd.uri import NbdUri

from bench import workload
from bench.datapath import destination_directory
from bench.peers import blockferry, script, serving

NAME = "rehydrate"

SIZE = 4096 * workload.MIB
DATA = 960 * workload.MIB
"""Bytes of the volume, and what of it is data, scattered."""

RUNS = 3
DEMANDS = 400
"""Reads of 4 KiB, one after the other, at places nobody has been to, while the sweep runs."""

DELAY_SECONDS = 0.01
"""In each direction."""

MOST_COPIES = 1.25
"""Seconds until everything is hydrated, as a multiple of a plain copy of ours: what is promised."""

LEAST_RANDOM = 1.0
"""Random reads a second once everything is hydrated, as a multiple of qemu-nbd's: what is promised."""

FIO_SECONDS = 5


class Delay:
    """A TCP relay that passes everything on a little later, in a thread of its own."""

    def __init__(self, address: str, seconds: float) -> None:
        host, _, port = address.removeprefix("grpc://").rpartition(":")
        self._target = host, int(port)
        self._seconds = seconds
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self.address = ""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._ready.wait()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._relay, "127.0.0.1", 0))
        self.address = f"grpc://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._ready.set()
        self._loop.run_forever()
        server.close()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back, forth = await asyncio.open_connection(*self._target)
        await asyncio.gather(self._pump(reader, forth), self._pump(back, writer), return_exceptions=True)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 18):
            self._loop.call_later(self._seconds, writer.write, data)
        self._loop.call_later(self._seconds, writer.close)

    def close(self) -> None:
        """End it, and whatever goes through it."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()


@contextlib.contextmanager
def _rehydrating(source: str, directory: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[str], str, float]]:
    """A process with an empty primary; itself, the URI of its export, and when it was started."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [
            script("blockferry-rehydrate"), source, directory / "disk.raw", "--nbd", f"unix:{directory}/nbd.sock",
            "--state", directory / "state", "--quiet", *flags,
        ],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line.startswith("listening on "), line
        yield process, line.removeprefix("listening on ").strip(), began
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


async def _first_read(uri: str, offset: int) -> None:
    client = await NbdClient.connect(NbdUri.parse(uri))
    await client.read_into(offset, memoryview(bytearray(4096)))
    await client.close()


async def _demands(uri: str, extents: list[tuple[int, int]]) -> list[float]:
    """Seconds of each read of one block, one after the other, all over the data."""
    client = await NbdClient.connect(NbdUri.parse(uri))
    found, rng = [], random.Random(3)
    buffer = memoryview(bytearray(4096))
    for offset, length in rng.sample(extents, min(DEMANDS, len(extents))):
        began = time.perf_counter()
        await client.read_into(offset + rng.randrange(max(length // 4096, 1)) * 4096, buffer)
        found.append(time.perf_counter() - began)
    await client.close()
    return found


def _whole(source: str, directory: Path) -> tuple[float, float]:
    """Seconds to the first answered read, and until everything is hydrated."""
    directory.mkdir()
    with _rehydrating(source, directory) as (process, uri, began):
        asyncio.run(_first_read(uri, SIZE // 2))
        first = time.perf_counter() - began
        assert process.stdout is not None and process.stdout.readline().startswith("everything is hydrated")
        return first, time.perf_counter() - began


def _random_reads(uri: str, directory: Path, seconds: int) -> float:
    done = subprocess.run(
        [
            "fio", "--name=random", "--ioengine=nbd", f"--uri={uri}", "--rw=randread", "--bs=4k", "--iodepth=32",
            f"--size={SIZE // 4}", "--time_based", f"--runtime={seconds}", "--norandommap", "--output-format=json",
            f"--aux-path={directory}",
        ],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return float(json.loads(done.stdout)["jobs"][0]["read"]["iops"])


@contextlib.contextmanager
def _qemu_nbd(image: Path, directory: Path) -> Iterator[str]:
    path = directory / "qemu.sock"
    process = subprocess.Popen(["qemu-nbd", "-t", "-e", "8", "-f", "raw", f"--socket={path}", image])
    try:
        while not path.exists():
            time.sleep(0.02)
        yield f"nbd+unix:///?socket={path}"
    finally:
        process.terminate()
        process.wait()


def measure(runs: int = RUNS, seconds: int = FIO_SECONDS) -> dict[str, Any]:
    """All rows, and what is promised."""
    rows: list[dict[str, str]] = []
    broken: list[str] = []

    def row(what: str, value: str, compared: str = "", promised: str = "") -> None:
        rows.append({"what": what, "value": value, "compared with": compared, "promised": promised})

    with contextlib.ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="blockferry-bench-", dir="/dev/shm")))
        mounted, kind = stack.enter_context(destination_directory(base))
        mounted.mkdir(exist_ok=True)
        extents = workload.scattered_extents(12, SIZE, DATA)
        image, state = base / "source.raw", base / "commits"
        workload.make_image(image, 12, extents, SIZE)
        server = stack.enter_context(serving(base / "pool"))
        blockferry("sync", image, f"{server.address}/vm", state=state)
        image.unlink()
        source = f"{server.address}/vm"

        firsts, wholes, copies = [], [], []
        for run in range(runs):
            # In turn: whatever else happens on the machine meets both.
            first, whole = _whole(source, mounted / f"rehydrated-{run}")
            firsts.append(first)
            wholes.append(whole)
            with serving(mounted / f"copied-{run}") as other:
                copies.append(blockferry("sync", source, f"{other.address}/vm", state=state).seconds)
        whole, copy = statistics.median(wholes), statistics.median(copies)
        row("from the start to the first answered read", f"{statistics.median(firsts):.2f} s")
        row("until everything is hydrated", f"{whole:.2f} s", f"a plain copy: {copy:.2f} s", f"{MOST_COPIES:g} x")
        if whole > MOST_COPIES * copy:
            broken.append(f"rehydration took {whole / copy:.2f} x a plain copy, expected at most {MOST_COPIES:.2f}")

        delay = Delay(server.address, DELAY_SECONDS)
        stack.callback(delay.close)
        for name, where in (("local", server.address), ("20 ms away", delay.address)):
            directory = mounted / f"demands-{name.split()[0]}"
            directory.mkdir()
            with _rehydrating(f"{where}/vm", directory, "--bwlimit", "50M") as (_, uri, _began):
                found = sorted(asyncio.run(_demands(uri, extents)))
            row(
                f"reads of 4 KiB on demand, {name}",
                f"median {1000 * found[len(found) // 2]:.1f} ms, "
                f"99 % within {1000 * found[len(found) * 99 // 100]:.1f} ms",
            )

        directory = mounted / f"rehydrated-{runs - 1}"
        rates: dict[str, list[float]] = {"ours": [], "qemu-nbd": []}
        with _rehydrating(source, directory) as (process, ours, _):
            assert process.stdout is not None and process.stdout.readline().startswith("everything is hydrated")
            # Its primary is served by nobody else: qemu-nbd has a copy that shares all extents.
            copied = directory / "copy.raw"
            subprocess.run(["cp", "--reflink=auto", directory / "disk.raw", copied], check=True)
            with _qemu_nbd(copied, base) as theirs:
                for uri in (ours, theirs):
                    # Into the page cache, both.
                    subprocess.run(["nbdcopy", uri, "null:"], check=True)
                for _ in range(runs):
                    rates["ours"].append(_random_reads(ours, base, seconds))
                    rates["qemu-nbd"].append(_random_reads(theirs, base, seconds))
        mine, peer = statistics.median(rates["ours"]), statistics.median(rates["qemu-nbd"])
        row(
            "once hydrated, random reads of 4 KiB, depth 32",
            f"{mine:.0f}/s",
            f"qemu-nbd: {peer:.0f}/s",
            f"{LEAST_RANDOM:g} x",
        )
        if mine < LEAST_RANDOM * peer:
            broken.append(f"random reads: {mine / peer:.2f} x qemu-nbd, expected at least {LEAST_RANDOM:.2f}")
    return {
        "title": f"Rehydration of {SIZE // workload.MIB} MiB, of which {DATA // workload.MIB} MiB are data",
        "rows": rows,
        "summary": f"replica on tmpfs, primary on {kind}, {os.cpu_count()} processors; medians of {runs}",
        "broken": broken,
    }
