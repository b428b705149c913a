"""NBD exports as sources: a fragmented one against one in one piece, and qcow2 against the tools made for it.

Everything lies on memory, as in datapath.py, and the page cache is warm: every image is written, or read once, before.
Peers read the very same export (qemu-nbd, over TCP) and write to a server of their own kind, a plain file behind it.
Every run ends with an fsync at the destination, and its result is compared byte by byte with the source.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench import workload
from bench.datapath import RUNS, Result, Row, destination_directory, run_all, tabulated
from bench.tools import Blockferry, Cp, Nbdcopy, QemuImg, Tool, free_port, wait_for_port

NAME = "nbd"

SIZE = 1024 * workload.MIB
"""Bytes of the volume, half of which is data."""

BLOCK = 4096
MOST_RATIO = 3.0
"""Median seconds for data in alternating blocks over those for the same data in one piece: what is promised."""


@contextlib.contextmanager
def exported(image: Path, driver: str) -> Iterator[str]:
    """An image behind qemu-nbd on a free port; its URI."""
    port = free_port()
    words = ["qemu-nbd", "-r", "-t", "-e", "8", "-f", driver, "-b", "127.0.0.1", "-p", str(port), str(image)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for_port(port)
        yield f"nbd://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def _say(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


def _fragmented(sources: Path, tmpfs: Path, destination: Path, size: int, runs: int) -> tuple[list[Result], list[str]]:
    """Every second block of a volume, against its first half: as a file and through NBD, to tmpfs, where the bound is.
    A file system that keeps extents on a disk has a price of its own for every hole: the same to XFS, beside cp."""
    shapes = {
        "one piece": [(0, size // 2)],
        "alternating 4 KiB": [(offset, BLOCK) for offset in range(0, size, 2 * BLOCK)],
    }
    images = {shape: sources / f"{shape.split()[0]}.raw" for shape in shapes}
    for shape, extents in shapes.items():
        workload.make_image(images[shape], 7, extents, size)
    results: list[Result] = []
    broken: list[str] = []
    with contextlib.ExitStack() as stack:
        exports = {shape: stack.enter_context(exported(image, "raw")) for shape, image in images.items()}

        def measured(how: str, tools: list[Tool], shape: str, *, nbd: bool = False) -> Row:
            return Row(f"{how}, {shape}", images[shape], None, tools, [], exports[shape] if nbd else "")

        for how, nbd in (("a raw image to tmpfs", False), ("NBD to tmpfs", True)):
            rows = [measured(how, [Blockferry(tmpfs / "bf")], shape, nbd=nbd) for shape in shapes]
            whole, alternating = run_all(rows, runs, _say)
            results += [whole, alternating]
            ratio = alternating.medians["blockferry"] / whole.medians["blockferry"]
            if ratio > MOST_RATIO:
                broken.append(
                    f"{how}: alternating blocks took {ratio:.2f} x the same data in one piece, expected at most "
                    f"{MOST_RATIO:.2f}"
                )
        kept: list[Tool] = [Blockferry(destination / "bf"), Cp(destination / "cp")]
        results += run_all([measured("a raw image to XFS", kept, shape) for shape in shapes], runs, _say)
    for image in images.values():
        image.unlink()
    return results, broken


def _qcow2(sources: Path, destination: Path, size: int, runs: int) -> list[Result]:
    """A used qcow2 image into an empty destination, and into one that has all of it."""
    raw, image = sources / "used.raw", sources / "used.qcow2"
    workload.make_image(raw, 8, workload.scattered_extents(8, size, size // 2), size)
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, image], check=True)

    def tools(*, empty: bool) -> list[Tool]:
        told = [Nbdcopy(destination / "nbdz", told_empty=True)] if empty else []
        return [Blockferry(destination / "bf"), Nbdcopy(destination / "nbd"), *told, QemuImg(destination / "qemu")]

    with exported(image, "qcow2") as export:
        rows = [
            Row("qcow2 into an empty destination", raw, None, tools(empty=True), [], export),
            Row("qcow2, nothing changed", raw, raw, tools(empty=False), [], export),
        ]
        return run_all(rows, runs, _say)


def measure(runs: int = RUNS, size: int = SIZE) -> dict[str, Any]:
    """All rows as a table; `size` in bytes."""
    with contextlib.ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="blockferry-bench-", dir="/dev/shm")))
        destination, kind = stack.enter_context(destination_directory(base))
        sources, tmpfs = base / "sources", base / "tmpfs"
        for directory in (sources, tmpfs):
            directory.mkdir()
        results, broken = _fragmented(sources, tmpfs, destination, size, runs)
        results += _qcow2(sources, destination, size, runs)
    table, unmet = tabulated(results)
    return {
        "title": f"NBD exports as sources, {size // workload.MIB} MiB of which half is data",
        "rows": table,
        "summary": f"sources on tmpfs, page cache warm, behind qemu-nbd over TCP; destinations on {kind}, or "
        f"tmpfs where it is said; every run ends with an fsync at the destination and a comparison; medians of {runs}",
        "broken": [*broken, *unmet],
    }


def main(argv: list[str] | None = None) -> int:
    """Measure with another size; `python -m bench nbd` keeps the figures."""
    parser = argparse.ArgumentParser(description="Measure NBD exports as sources.")
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--mib", type=int, default=SIZE // workload.MIB, help="size of the volume in MiB")
    arguments = parser.parse_args(argv)
    found = measure(arguments.runs, arguments.mib * workload.MIB)
    for row in found["rows"]:
        print(" | ".join(str(value) for value in row.values()))
    print("\n".join(found["broken"]))
    return 1 if found["broken"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
