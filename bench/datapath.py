"""The data path against its peers: same data, one run, tools in turn, medians and ratios.

Source and destination lie on memory-backed file systems (the destination on XFS with reflinks where we are root), so
that the tools are measured and not a disk. The page cache is warm: every source is read once before. Every run ends
with an fsync at the destination, and its result is compared byte by byte with the source.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench import workload
from bench.tools import Blockferry, Nbdcopy, QemuImg, Rsync, Tool


@dataclass(frozen=True)
class Row:
    """One question: from which old state to which source, with which tools, and what is expected."""

    name: str
    source: Path
    old: Path | None
    tools: list[Tool]
    expectations: list[tuple[str, str, float]]
    """(tool, peer, the most its median may be as a multiple of the peer's)"""


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


def _once(tool: Tool, row: Row) -> dict[str, float]:
    """Time one run: wall seconds, and CPU seconds of the source's process."""
    tool.prepare(row.source, row.old)
    try:
        os.sync()
        before = os.times()
        began = time.perf_counter()
        subprocess.run(tool.command(row.source), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        seconds = time.perf_counter() - began
        after = os.times()
        if not workload.same_content(row.source, tool.image):
            raise SystemExit(f"{tool.name}: the destination differs from the source after {row.name!r}")
    finally:
        tool.stop()
        shutil.rmtree(tool.directory, ignore_errors=True)
    cpu = (after.children_user + after.children_system) - (before.children_user + before.children_system)
    return {"seconds": seconds, "source_cpu": cpu}


def measure(rows: list[Row], runs: int, say: Callable[[str], None]) -> list[dict[str, object]]:
    """Run all tools of each row in turn."""
    results: list[dict[str, object]] = []
    for row in rows:
        times: dict[str, list[dict[str, float]]] = {tool.name: [] for tool in row.tools}
        for number in range(runs):
            for tool in row.tools:
                say(f"{row.name}: {tool.name}, run {number + 1} of {runs}")
                times[tool.name].append(_once(tool, row))
        medians = {name: statistics.median(one["seconds"] for one in found) for name, found in times.items()}
        checks = [
            {"tool": tool, "peer": peer, "at_most": most, "ratio": medians[tool] / medians[peer],
             "kept": medians[tool] <= most * medians[peer]}
            for tool, peer, most in row.expectations
            if tool in medians and peer in medians
        ]  # fmt: skip
        results.append({"row": row.name, "median_seconds": medians, "runs": times, "expectations": checks})
    return results


def _rows(sources: Path, destination: Path, only: list[str]) -> list[Row]:
    extents = workload.scattered_extents(1)
    base, changed, other = sources / "base.raw", sources / "changed.raw", sources / "other.raw"
    thick = sources / "thick.raw"
    workload.make_image(base, 2, extents)
    ours, cached = Blockferry(destination / "bf"), Blockferry(destination / "bfc", cached=True)
    peers: list[Tool] = [Nbdcopy(destination / "nbd"), QemuImg(destination / "qemu"), Rsync(destination / "rsync")]
    rsync = peers[2]

    def wanted(name: str) -> bool:
        return not only or any(one in name for one in only)

    rows = []
    if wanted(name := "full copy into an empty image"):
        rows.append(Row(name, base, None, [ours, *peers], [("blockferry", "nbdcopy", 1.25)]))
    if wanted(name := "full copy into a filled, all-different image"):
        workload.make_image(other, 3, extents)
        rows.append(Row(name, base, other, [ours, *peers], []))
    if wanted(name := "nothing changed"):
        expected = [("blockferry", "rsync", 1 / 3), ("blockferry, digest cache", "rsync", 1 / 5)]
        rows.append(Row(name, base, base, [ours, cached, *peers], expected))
    if wanted(name := "200 random 4 KiB blocks changed"):
        subprocess.run(["cp", "--sparse=always", base, changed], check=True)
        workload.change_blocks(changed, 4, extents)
        expected = [("blockferry", "rsync", 1 / 4), ("blockferry, digest cache", "rsync", 1 / 4)]
        rows.append(Row(name, changed, base, [ours, cached, rsync], expected))
    if wanted(name := "thick source, half its blocks zero"):
        workload.make_thick_image(thick, 5)
        rows.append(Row(name, thick, None, [ours, *peers], [("blockferry", "nbdcopy", 1.0)]))
    return rows


def render(results: list[dict[str, object]]) -> str:
    """The table in Markdown."""
    lines = []
    for result in results:
        medians = result["median_seconds"]
        assert isinstance(medians, dict)
        lines += [
            f"### {result['row']}",
            "",
            "| tool | median s | all runs | ratio to blockferry |",
            "|---|---|---|---|",
        ]
        runs = result["runs"]
        assert isinstance(runs, dict)
        for name, median in medians.items():
            every = ", ".join(f"{one['seconds']:.2f}" for one in runs[name])
            lines.append(f"| {name} | {median:.2f} | {every} | {median / medians['blockferry']:.2f} |")
        checks = result["expectations"]
        assert isinstance(checks, list)
        for check in checks:
            verdict = "kept" if check["kept"] else "MISSED"
            lines.append(
                f"\nexpected {check['tool']} at most {check['at_most']:.2f} x {check['peer']}: "
                f"{check['ratio']:.2f}, {verdict}"
            )
        lines.append("")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table, write JSON; exit status 1 if an expectation is missed."""
    parser = argparse.ArgumentParser(description="The data path against its peers.")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", action="append", default=[], help="rows whose name contains this")
    parser.add_argument("--tools", default="", help="comma-separated names; default all")
    parser.add_argument("--json", type=Path, help="write raw figures here")
    arguments = parser.parse_args(argv)
    with contextlib.ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="blockferry-bench-", dir="/dev/shm")))
        destination, kind = stack.enter_context(destination_directory(base))
        sources = base / "sources"
        sources.mkdir()
        print(f"sources on tmpfs, page cache warm; destinations on {kind}; medians of {arguments.runs}", flush=True)
        rows = _rows(sources, destination, arguments.only)
        if arguments.tools:
            names = arguments.tools.split(",")
            for row in rows:
                row.tools[:] = [tool for tool in row.tools if tool.name in names]
        results = measure(rows, arguments.runs, lambda text: print(f"  {text}", file=sys.stderr, flush=True))
    print(render(results))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))
    checks = [check for result in results for check in result["expectations"]]  # type: ignore[attr-defined]
    return 0 if all(check["kept"] for check in checks) else 1


if __name__ == "__main__":
    raise SystemExit(main())
