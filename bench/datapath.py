"""The data path against its peers: same data, one run, tools in turn, medians and ratios.

Source and destination lie on memory-backed file systems, so that the tools are measured and not a disk: the source on
tmpfs, the destination on XFS with reflinks on a loop device over tmpfs where we are root. A full copy is measured to
tmpfs too: there it pays for every page it fills, while the loop device's pages have all been there since the first run.
The page cache is warm: every source is read once before. Every run ends with an fsync at the destination, and its
result is compared byte by byte with the source.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import workload
from bench.tools import Blockferry, Nbdcopy, QemuImg, Rsync, Tool

RUNS = 5
SLOW_SECONDS = 30.0
"""A tool that takes longer the first time is not asked again: no bound hangs on it, and it would take the hour."""


@dataclass(frozen=True)
class Row:
    """One question: from which old state to which source, with which tools, and what is expected."""

    name: str
    source: Path
    old: Path | None
    tools: list[Tool]
    expectations: list[tuple[str, str, float]]
    """(tool, peer, the most its median may be as a multiple of the peer's)"""
    export: str = ""
    """The NBD URI under which the tools read the source; empty: they read the file."""


@contextlib.contextmanager
def destination_directory(base: Path) -> Iterator[tuple[Path, str]]:
    """A directory for destinations and what it is."""
    if os.getuid() != 0:
        yield base / "destination", "tmpfs (not root: no XFS)"
        return
    image, mount = base / "destination.xfs", base / "destination"
    with image.open("wb") as file:
        file.truncate(12 << 30)
    subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", image], check=True)
    mount.mkdir()
    subprocess.run(["mount", "-o", "loop", image, mount], check=True)
    try:
        yield mount, "XFS with reflinks on a loop device over tmpfs"
    finally:
        subprocess.run(["umount", mount], check=True)


def _once(tool: Tool, row: Row) -> float:
    """Wall seconds of one run."""
    tool.prepare(row.source, row.old)
    try:
        os.sync()
        began = time.perf_counter()
        subprocess.run(
            tool.command(row.export or row.source), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        seconds = time.perf_counter() - began
        if not workload.same_content(row.source, tool.image):
            raise AssertionError(f"{tool.name}: the destination differs from the source after {row.name!r}")
        return seconds
    finally:
        tool.stop()
        shutil.rmtree(tool.directory, ignore_errors=True)


@dataclass
class Result:
    """Wall seconds of every run by tool."""

    row: Row
    seconds: dict[str, list[float]]

    @property
    def medians(self) -> dict[str, float]:
        """Median seconds by tool."""
        return {name: statistics.median(found) for name, found in self.seconds.items()}


def run_all(rows: Sequence[Row], runs: int, say: Callable[[str], None]) -> list[Result]:
    """Run all tools of each row in turn."""
    results = []
    for row in rows:
        result = Result(row, {tool.name: [] for tool in row.tools})
        for number in range(runs):
            for tool in row.tools:
                if max(result.seconds[tool.name], default=0) > SLOW_SECONDS:
                    continue
                say(f"{row.name}: {tool.name}, run {number + 1} of {runs}")
                result.seconds[tool.name].append(_once(tool, row))
        results.append(result)
    return results


def _tools(destination: Path) -> list[Tool]:
    return [
        Blockferry(destination / "bf"),
        Nbdcopy(destination / "nbd"),
        Nbdcopy(destination / "nbdz", told_empty=True),
        QemuImg(destination / "qemu"),
        Rsync(destination / "rsync"),
    ]


def _authority(directory: Path) -> Path:
    """An authority with a certificate for both ends."""
    program = Path(sys.executable).parent / "blockferry"
    subprocess.run([program, "pki", "init", directory / "pki", "--quiet"], check=True)
    both = directory / "pki" / "both"
    subprocess.run([program, "pki", "issue", directory / "pki", "127.0.0.1", "--out", both, "--quiet"], check=True)
    return directory / "pki"


def _rows(sources: Path, destination: Path, tmpfs: Path, only: Sequence[str], *, tls: bool) -> list[Row]:
    extents = workload.scattered_extents(1)
    base, changed, other = sources / "base.raw", sources / "changed.raw", sources / "other.raw"
    thick = sources / "thick.raw"
    workload.make_image(base, 2, extents)
    ours, *peers = _tools(destination)
    cached = Blockferry(destination / "bfc", cached=True)
    untold = [peers[0], *peers[2:]]
    rsync = peers[-1]

    def wanted(name: str) -> bool:
        return not only or any(one in name for one in only)

    if tls:
        pki = _authority(sources)
        rows = _rows(sources, destination, tmpfs, only, tls=False)
        for row in rows:
            mine = [tool for tool in row.tools if isinstance(tool, Blockferry)]
            row.tools[:] = [*mine, *(tool.over_tls(pki) for tool in mine)]
            row.expectations.clear()
        return rows

    rows = []
    if wanted(name := "full copy into an empty image on tmpfs"):
        rows.append(Row(name, base, None, _tools(tmpfs), [("blockferry", "nbdcopy", 1.25)]))
    if wanted(name := "full copy into an empty image"):
        rows.append(Row(name, base, None, [ours, *peers], []))
    if wanted(name := "full copy into a filled, all-different image"):
        workload.make_image(other, 3, extents)
        rows.append(Row(name, base, other, [ours, *untold], []))
    if wanted(name := "nothing changed"):
        expected = [("blockferry", "rsync", 1 / 3), ("blockferry, digest cache", "rsync", 1 / 5)]
        rows.append(Row(name, base, base, [ours, cached, *untold], expected))
    if wanted(name := "200 random 4 KiB blocks changed"):
        subprocess.run(["cp", "--sparse=always", base, changed], check=True)
        workload.change_blocks(changed, 4, extents)
        expected = [("blockferry", "rsync", 1 / 4), ("blockferry, digest cache", "rsync", 1 / 4)]
        rows.append(Row(name, changed, base, [ours, cached, rsync], expected))
    if wanted(name := "thick source, half its blocks zero"):
        workload.make_thick_image(thick, 5)
        rows.append(Row(name, thick, None, [ours, *peers], [("blockferry", "nbdcopy", 1.0)]))
    return rows


NAME = "datapath"
TLS_NAME = "datapath-tls"


def measure_tls() -> dict[str, Any]:
    """The same rows over TLS beside plaintext: what it costs. It has no bounds yet."""
    return measure(tls=True)


def measure(
    runs: int = RUNS, only: Sequence[str] = (), tools: Sequence[str] = (), *, tls: bool = False
) -> dict[str, Any]:
    """All rows (or those whose name contains one of `only`) with all tools (or those named), as a table; `tls`: ours
    alone, with and without it."""
    with contextlib.ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="blockferry-bench-", dir="/dev/shm")))
        destination, kind = stack.enter_context(destination_directory(base))
        sources = base / "sources"
        tmpfs = base / "tmpfs"
        sources.mkdir()
        tmpfs.mkdir()
        rows = _rows(sources, destination, tmpfs, only, tls=tls)
        for row in rows:
            row.tools[:] = [tool for tool in row.tools if not tools or tool.name in tools]
        results = run_all(rows, runs, lambda text: print(f"  {text}", file=sys.stderr, flush=True))
    table, broken = tabulated(results)
    return {
        "title": "the data path over TLS and without" if tls else "the data path against its peers",
        "rows": table,
        "summary": f"sources on tmpfs, page cache warm; destinations on {kind}; every run ends with an fsync at the "
        f"destination and a comparison; medians of {runs}, one run of what takes over {SLOW_SECONDS:.0f} s",
        "broken": broken,
    }


def tabulated(results: Sequence[Result]) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of a table, and a sentence for every expectation that was not met."""
    table: list[dict[str, Any]] = []
    broken: list[str] = []
    for result in results:
        for name, median in result.medians.items():
            table.append(
                {
                    "what": result.row.name,
                    "tool": name,
                    "median s": f"{median:.2f}",
                    "all s": " ".join(f"{one:.2f}" for one in result.seconds[name]),
                    "to ours": f"{median / result.medians.get('blockferry', median):.2f}",
                }
            )
        for tool, peer, most in result.row.expectations:
            if tool in result.medians and peer in result.medians:
                ratio = result.medians[tool] / result.medians[peer]
                if ratio > most:
                    broken.append(f"{result.row.name}: {tool} took {ratio:.2f} x {peer}, expected at most {most:.2f}")
    return table, broken


def main(argv: list[str] | None = None) -> int:
    """Measure a part; `python -m bench datapath` measures everything and keeps the figures."""
    parser = argparse.ArgumentParser(description="Measure a part of the data path.")
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--only", action="append", default=[], help="rows whose name contains this")
    parser.add_argument("--tools", default="", help="comma-separated names; default all")
    parser.add_argument("--tls", action="store_true", help="blockferry over TLS beside plaintext, and nothing else")
    arguments = parser.parse_args(argv)
    tools = [name for name in arguments.tools.split(",") if name]
    found = measure(arguments.runs, arguments.only, tools, tls=arguments.tls)
    for row in found["rows"]:
        print(" | ".join(str(value) for value in row.values()))
    print("\n".join(found["broken"]))
    return 1 if found["broken"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
