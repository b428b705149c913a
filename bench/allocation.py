"""Cost follows allocation: a 16 TiB volume that holds 1 GiB costs what an 8 GiB volume with the same data costs.

Both volumes have the same number of allocated regions, the same bytes in them, and the same number of runs. Each run
makes a fresh replica with a fresh server; what is timed is the whole `blockferry sync` process from start to exit, its
commit's fsync at the destination included. Runs of the two sizes take turns, so that a disturbance hits both.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.peers import blockferry, serving
from bench.sparse import GIB, MIB, REGION, TIB, place_for_huge_files, same_bytes, scattered_regions, write_image

NAME = "allocation"

SIZES = {"8 GiB": 8 * GIB, "16 TiB": 16 * TIB}
DATA = GIB
REGIONS = 2048
"""Regions that hold data: every fourth one of the small volume, half filled."""

RUNS = 7
MOST_RATIO = 1.2
"""Median seconds of the huge volume over those of the small one: what the product promises."""

MOST_RESIDENT = 300 * MIB
"""Bytes either process may ever have resident."""


@dataclass(frozen=True)
class Measured:
    """One run. Seconds, bytes."""

    seconds: float
    map_seconds: float
    client_peak: int
    server_peak: int
    wire: int


def _measure(image: Path, size: int, directory: Path) -> Measured:
    try:
        with serving(directory / "pool") as server:
            target = f"{server.address}/bench"
            done = blockferry("sync", image, target, state=directory / "state")
            regions, moved = done.report["regions"], done.report["bytes"]
            assert regions == {"skip": size // REGION - REGIONS, "unmap": 0, "send": REGIONS, "compare": 0}, regions
            assert moved["data_sent"] == DATA, moved
            replica = blockferry("replica", "show", target, state=directory / "state").report
            assert same_bytes(image, Path(replica["path"])), "the replica is not equal to the source"
            return Measured(
                done.seconds,
                done.report["seconds"]["map"],
                done.peak_bytes,
                server.peak_bytes(),
                moved["wire_sent"] + moved["wire_received"],
            )
    finally:
        shutil.rmtree(directory / "pool", ignore_errors=True)


def measure() -> dict[str, Any]:
    """Run everything; the result with its figures, its bounds and `broken`, a list of sentences."""
    place = place_for_huge_files()
    need = 4 * DATA
    if shutil.disk_usage(place).free < need:
        raise OSError(f"{place} has less than {need // GIB} GiB free")
    with tempfile.TemporaryDirectory(prefix="blockferry-bench-", dir=place) as name:
        directory = Path(name)
        images: dict[str, Path] = {}
        for label, size in SIZES.items():
            images[label] = directory / f"{size}.raw"
            write_image(images[label], size, scattered_regions(size, REGIONS), DATA // REGIONS)
        runs: dict[str, list[Measured]] = {label: [] for label in SIZES}
        for _ in range(RUNS):
            for label, size in SIZES.items():
                runs[label].append(_measure(images[label], size, directory))

    rows: list[dict[str, Any]] = [
        {
            "volume": label,
            "median_seconds": round(statistics.median(run.seconds for run in found), 3),
            "fastest_seconds": round(min(run.seconds for run in found), 3),
            "slowest_seconds": round(max(run.seconds for run in found), 3),
            "median_map_seconds": round(statistics.median(run.map_seconds for run in found), 3),
            "client_peak_mib": round(max(run.client_peak for run in found) / MIB, 1),
            "server_peak_mib": round(max(run.server_peak for run in found) / MIB, 1),
            "wire_mib": round(max(run.wire for run in found) / MIB, 2),
        }
        for label, found in runs.items()
    ]
    small, huge = rows
    ratio = huge["median_seconds"] / small["median_seconds"]
    broken = []
    if ratio > MOST_RATIO:
        broken.append(f"16 TiB took {ratio:.2f} times as long as 8 GiB; at most {MOST_RATIO} is promised")
    for label, found in runs.items():
        for who, peak in (
            ("the source", max(run.client_peak for run in found)),
            ("the server", max(run.server_peak for run in found)),
        ):
            if peak > MOST_RESIDENT:
                broken.append(f"{who} had {peak / MIB:.0f} MiB resident with {label}; at most 300 are promised")
    return {
        "name": NAME,
        "title": "cost follows allocation: first sync of 1 GiB of scattered data",
        "place": str(place),
        "rows": rows,
        "summary": f"16 TiB / 8 GiB: {ratio:.2f} (bound {MOST_RATIO}), {RUNS} runs each, medians",
        "ratio": round(ratio, 3),
        "runs": {label: [asdict(run) for run in found] for label, found in runs.items()},
        "broken": broken,
    }
