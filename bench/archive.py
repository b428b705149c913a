"""Archiving and restoring against borg (fixed chunks of 4 MiB, lz4, no encryption) and restic, on the same image.

Each tool archives the same image into a directory three times: the first time, unchanged, and with 200 blocks of 4 KiB
changed; then it restores all of it. Nobody may go by the image's times: a disk in use has always just changed. What is
timed is the whole process; the tools take turns, and what is restored must equal the image.
"""

from __future__ import annotations

import abc
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from bench import workload
from bench.peers import script
from bench.sparse import place_for_huge_files

NAME = "archive"

RUNS = 3
LEAST_RATIO = 3.0
"""How many times as fast as borg each step is expected to be."""
STEPS = ("first archive", "unchanged", "200 x 4 KiB changed", "restore")
SEED = 20260101


class Archiver(abc.ABC):
    """A tool with a repository in a directory of its own. Commands are timed by whoever runs them."""

    name: str

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.repository = directory / "repository"

    @property
    def environment(self) -> dict[str, str]:
        """Of its processes: caches and state stay in the directory."""
        return {**os.environ, "HOME": str(self.directory), "XDG_CACHE_HOME": str(self.directory / "cache")}

    def prepare(self) -> None:
        """A new repository, untimed."""
        shutil.rmtree(self.directory, ignore_errors=True)
        self.repository.mkdir(parents=True)

    @abc.abstractmethod
    def archive(self, image: Path, number: int) -> list[str]:
        """Archive the image as the snapshot `number`."""

    @abc.abstractmethod
    def restore(self, image: Path, number: int) -> list[str]:
        """Restore a snapshot; run in an empty directory."""

    def restored(self, image: Path, target: Path) -> Path:
        """Where the restored image is then."""
        return target / image.relative_to("/")

    def run(self, command: list[str], cwd: Path) -> float:
        """Wall seconds of a process that must succeed."""
        os.sync()
        began = time.perf_counter()
        done = subprocess.run(command, cwd=cwd, env=self.environment, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - began
        if done.returncode:
            raise AssertionError(f"{self.name}: {' '.join(command)} failed: {done.stderr[-500:]}")
        return seconds


class Blockferry(Archiver):
    """Ours, in a directory whose objects are flushed."""

    name = "blockferry"

    def archive(self, image: Path, number: int) -> list[str]:
        return [
            str(script("blockferry")), "archive", "create", str(image), f"file://{self.repository}", "--volume", "vm",
            "--state-dir", str(self.directory / "state"), "--quiet",
        ]  # fmt: skip

    def restore(self, image: Path, number: int) -> list[str]:
        return [
            str(script("blockferry")), "archive", "restore", f"file://{self.repository}#vm@{number}", "restored.raw",
            "--state-dir", str(self.directory / "state"), "--quiet",
        ]  # fmt: skip

    def restored(self, image: Path, target: Path) -> Path:
        return target / "restored.raw"


class Borg(Archiver):
    """Holes are left out by `--sparse`, on both ways."""

    name = "borg"

    @property
    def environment(self) -> dict[str, str]:
        return {
            **super().environment,
            "BORG_BASE_DIR": str(self.directory),
            "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes",
        }

    def prepare(self) -> None:
        super().prepare()
        self.run(["borg", "init", "--encryption", "none", str(self.repository)], self.directory)

    def archive(self, image: Path, number: int) -> list[str]:
        return [
            "borg", "create", "--chunker-params", "fixed,4194304", "--compression", "lz4", "--sparse",
            "--files-cache", "disabled", f"{self.repository}::{number}", str(image),
        ]  # fmt: skip

    def restore(self, image: Path, number: int) -> list[str]:
        return ["borg", "extract", "--sparse", f"{self.repository}::{number}"]


class Restic(Archiver):
    """It always encrypts."""

    name = "restic"

    @property
    def environment(self) -> dict[str, str]:
        return {**super().environment, "RESTIC_PASSWORD": "benchmark", "RESTIC_REPOSITORY": str(self.repository)}

    def prepare(self) -> None:
        super().prepare()
        self.run(["restic", "init"], self.directory)

    def archive(self, image: Path, number: int) -> list[str]:
        return ["restic", "backup", "--force", "--tag", str(number), str(image)]

    def restore(self, image: Path, number: int) -> list[str]:
        return ["restic", "restore", "--sparse", "--tag", str(number), "latest", "--target", "."]


def _round(tool: Archiver, images: tuple[Path, Path], target: Path) -> dict[str, float]:
    """Seconds of each step. `images` are the image at first and with its changes, under one name in two directories:
    for the tools it is one."""
    before, after = images
    tool.prepare()
    found: dict[str, float] = {}
    place = target.parent / "image" / before.name
    place.parent.mkdir(exist_ok=True)
    for number, (step, image) in enumerate(zip(STEPS[:3], (before, before, after), strict=True), 1):
        place.unlink(missing_ok=True)
        os.link(image, place)
        found[step] = tool.run(tool.archive(place, number), tool.directory)
    target.mkdir()
    found[STEPS[3]] = tool.run(tool.restore(place, 3), target)
    if not workload.same_content(after, tool.restored(place, target)):
        raise AssertionError(f"{tool.name}: what was restored is not what was archived")
    return found


def measure() -> dict[str, Any]:
    """Run everything; the result with its figures, its bounds and `broken`, a list of sentences."""
    missing = [name for name in ("borg", "restic") if shutil.which(name) is None]
    if missing:
        raise OSError(f"{' and '.join(missing)} are not installed: deploy/packages borgbackup restic")
    console = Console(stderr=True, highlight=False)
    with tempfile.TemporaryDirectory(prefix="blockferry-bench-", dir=place_for_huge_files()) as name:
        base = Path(name)
        before, after = base / "before.raw", base / "after.raw"
        extents = workload.scattered_extents(SEED)
        workload.make_image(before, SEED, extents)
        subprocess.run(["cp", "--sparse=always", before, after], check=True)
        workload.change_blocks(after, SEED + 1, extents)
        tools: list[Archiver] = [Blockferry(base / "blockferry"), Borg(base / "borg"), Restic(base / "restic")]
        seconds: dict[str, list[dict[str, float]]] = {tool.name: [] for tool in tools}
        for number in range(RUNS):
            for tool in tools:
                console.print(f"{tool.name}, run {number + 1} of {RUNS}")
                target = base / "restored"
                try:
                    seconds[tool.name].append(_round(tool, (before, after), target))
                finally:
                    shutil.rmtree(target, ignore_errors=True)
                    shutil.rmtree(tool.directory, ignore_errors=True)
    return result(seconds)


def result(seconds: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """The table, and what is broken: medians of each step, and how many times as fast as borg we are."""
    rows, broken = [], []
    for step in STEPS:
        medians = {name: statistics.median(run[step] for run in runs) for name, runs in seconds.items()}
        ratio = medians["borg"] / medians["blockferry"]
        rows.append(
            {
                "step": step,
                **{f"{name}_s": round(found, 2) for name, found in medians.items()},
                "borg/ours": round(ratio, 1),
            }
        )
        if ratio < LEAST_RATIO:
            broken.append(f"{step}: {ratio:.1f} times as fast as borg; at least {LEAST_RATIO:g} is expected")
    return {
        "name": NAME,
        "title": f"archiving an image of {workload.IMAGE_SIZE >> 30} GiB, {workload.DATA_SIZE / 1e9:.2f} GB of it data",
        "rows": rows,
        "summary": f"medians of {RUNS} runs, whole processes, seconds; {sys.platform}, everything on tmpfs",
        "runs": seconds,
        "broken": broken,
    }
