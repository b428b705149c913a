"""`make demo`: a file system's image travels to a second site, changes, and travels again.

Three processes: this one plays the administrator, `blockferry-server` is the destination site and `blockferry sync` the
source site. Each site works in a directory of its own, and nothing passes between the two but gRPC. Needs no root: the
file system is made, changed and trimmed as a file, by mke2fs, debugfs and e2fsck. Exit status 0 only if every figure
and every byte is as expected.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

MIB = 1024 * 1024
VOLUME_SIZE = 1024 * MIB
SPACE_NEEDED = 2 * 1024 * MIB
"""Bytes free in the temporary directory: the files, their image, and the replica, of about 300 MiB each, and room."""

START_SECONDS = 30.0
STEP_SECONDS = 300.0
"""No step takes more than a few seconds; one that hangs should not hang the demo."""

METADATA = 2 * MIB
"""Bytes of bitmaps, inodes and directories that the changes below may touch at most; measured: about 100 KiB."""

ENVIRONMENT = {**os.environ, "PATH": os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin:/sbin"}


class DemoError(Exception):
    """Something is not as expected; the text says what."""


def expect(condition: bool, what: str) -> None:
    """Raise DemoError unless `condition`."""
    if not condition:
        raise DemoError(what)


def human(count: int) -> str:
    """Bytes with a binary unit."""
    for unit, size in (("GiB", 1024 * MIB), ("MiB", MIB), ("KiB", 1024)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def run(command: list[str | Path], cwd: Path, *, statuses: tuple[int, ...] = (0,), show: bool = False) -> bytes:
    """Run a program and return its standard output; `show` lets its progress through to a terminal."""
    stderr = None if show and sys.stderr.isatty() else subprocess.PIPE
    done = subprocess.run(
        command, cwd=cwd, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=stderr, timeout=STEP_SECONDS, check=False
    )
    if done.returncode not in statuses:
        said = (done.stderr or b"").decode(errors="replace").strip() or done.stdout.decode(errors="replace").strip()
        raise DemoError(f"{Path(command[0]).name} ended with status {done.returncode}: {said}")
    return done.stdout


def script(name: str) -> Path:
    """A console script of the environment that runs this."""
    return Path(sys.executable).with_name(name)


@dataclass
class Source:
    """The source site: a directory with an ext4 image in it."""

    site: Path
    random: random.Random = field(default_factory=lambda: random.Random("blockferry"))

    @property
    def image(self) -> Path:
        """The volume that is synced."""
        return self.site / "volume.raw"

    def build(self) -> int:
        """Make files and a file system that holds them; return the number of files."""
        tree = self.site / "files"
        words = ["region", "block", "map", "digest", "zero", "replica", "session", "commit", "site", "volume"]
        for number in range(3000):
            path = tree / "home" / f"user{number % 25:02}" / f"note-{number:04}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(" ".join(self.random.choices(words, k=self.random.randint(5, 1500))) + "\n")
        log = "".join(f"2026-01-01T00:00:00Z host service[{self.random.randint(1, 9999)}]: ok\n" for _ in range(20_000))
        (tree / "var/log").mkdir(parents=True)
        for number in range(24):
            (tree / f"var/log/service-{number:02}.log").write_text(log)
        (tree / "srv/media").mkdir(parents=True)
        for number in range(10):
            (tree / f"srv/media/{number:02}.bin").write_bytes(self.random.randbytes(16 * MIB))
        # A database's file: full pages, and pages that are allocated but were never used.
        pages = (self.random.randbytes(MIB // 2) + bytes(MIB // 2) for _ in range(48))
        (tree / "srv/data.db").write_bytes(b"".join(pages))
        count = sum(1 for path in tree.rglob("*") if path.is_file())
        run(["mke2fs", "-q", "-t", "ext4", "-L", "demo", "-d", tree, self.image, f"{VOLUME_SIZE // MIB}M"], self.site)
        shutil.rmtree(tree)
        return count

    def change(self, write: bytes) -> int:
        """Write one file, delete others inside the image, and trim; return the bytes the deleted ones had."""
        deleted = [f"/srv/media/{number:02}.bin" for number in range(4)]
        (self.site / "new.bin").write_bytes(write)
        (self.site / "commands").write_text(
            "".join(f"rm {path}\n" for path in deleted) + "cd /srv\nwrite new.bin new.bin\n"
        )
        run(["debugfs", "-w", "-f", "commands", self.image], self.site)
        before = self.image.stat().st_blocks
        run(["e2fsck", "-fy", "-E", "discard", self.image], self.site, statuses=(0, 1))
        expect(self.image.stat().st_blocks < before, f"trimming freed nothing: can {self.site} punch holes into files?")
        return len(deleted) * 16 * MIB

    def blockferry(self, *arguments: str, statuses: tuple[int, ...] = (0,)) -> dict[str, Any]:
        """Run `blockferry` here; return what it reports."""
        output = run([script("blockferry"), *arguments, "--json"], self.site, statuses=statuses, show=True)
        report = json.loads(output)
        assert isinstance(report, dict)
        return report


@contextlib.contextmanager
def serving(site: Path) -> Iterator[str]:
    """The destination site: its server's address, while it runs."""
    (site / "pool").mkdir()
    command: list[str | Path] = [script("blockferry-server"), "--pool", "pool", "--listen", "grpc://127.0.0.1:0"]
    with (site / "server.log").open("wb") as log:
        server = subprocess.Popen(command, cwd=site, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=log)
    try:
        assert server.stdout is not None
        ready, _, _ = select.select([server.stdout], [], [], START_SECONDS)
        line = server.stdout.readline().decode() if ready else ""
        expect(line.startswith("listening on "), f"the server did not start: {(site / 'server.log').read_text()}")
        yield line.removeprefix("listening on ").strip()
    finally:
        server.terminate()
        try:
            server.wait(START_SECONDS)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        if server.stdout is not None:
            server.stdout.close()


def show(console: Console, title: str, report: dict[str, Any]) -> None:
    """What a sync did, and what a plain copy would have done."""
    regions, results, moved = report["regions"], report["results"], report["bytes"]
    table = Table(box=SIMPLE_HEAD if console.is_terminal else None, pad_edge=False, header_style="dim")
    for name in ("regions", "count", "bytes", "why"):
        table.add_column(name, justify="right" if name in ("count", "bytes") else "left", no_wrap=True)
    rows = [
        ("skipped", "skip", "neither site holds data", "green"),
        ("compared", "compare", f"both do: {results['equal']} were equal", "cyan"),
        ("sent", "send", "only the source does", "yellow"),
        ("unmapped", "unmap", "only the destination did", "magenta"),
    ]
    for name, key, why, style in rows:
        table.add_row(name, str(regions[key]), human(regions[key] * report["region_size"]), why, style=style)
    crossed = moved["wire_sent"] + moved["wire_received"]
    saved = 1 - crossed / report["volume_size"]
    console.print(f"[bold]{title}[/bold]: generation {report['generation']}, {report['seconds']['total']:.1f} s")
    console.print(table)
    console.print(
        f"data sent {human(moved['data_sent'])}, unmapped {human(moved['unmapped'])}, "
        f"on the wire {human(crossed)} both ways\n"
        f"a plain copy sends {human(report['volume_size'])}: [bold green]{saved:.1%} saved[/bold green]\n"
    )


def check(report: dict[str, Any], generation: int) -> None:
    """What holds for every sync."""
    regions, results = report["regions"], report["results"]
    expect(report["outcome"] == "committed", f"the outcome is {report['outcome']}")
    expect(report["generation"] == generation, f"generation {report['generation']} instead of {generation}")
    expect(sum(regions.values()) == VOLUME_SIZE // report["region_size"], f"regions do not add up: {regions}")
    expect(sum(results.values()) == regions["send"] + regions["compare"], f"results do not add up: {results}")


def demonstrate(console: Console, root: Path) -> None:
    """The whole story; raises DemoError."""
    source, destination = Source(root / "source-site"), root / "destination-site"
    source.site.mkdir()
    destination.mkdir()
    ENVIRONMENT["XDG_STATE_HOME"] = str(source.site / "state")

    files = source.build()
    held = source.image.stat().st_blocks * 512
    console.print(f"built {human(VOLUME_SIZE)} of ext4 with {files} files; its image holds {human(held)}")
    with serving(destination) as address:
        console.print(f"server of the destination site is listening on {address}\n")
        target = f"{address}/demo"

        def sync() -> dict[str, Any]:
            return source.blockferry("sync", source.image.name, target)

        first = sync()
        check(first, 1)
        expect(first["regions"]["compare"] == first["regions"]["unmap"] == 0, "the replica was not empty")
        expect(first["bytes"]["data_sent"] <= held, "more was sent than the image holds")
        show(console, "first sync", first)

        new = random.Random("new").randbytes(6 * MIB + 12345)
        deleted = source.change(new)
        console.print(f"wrote a file of {human(len(new))}, deleted four of 16 MiB, trimmed\n")
        second = sync()
        check(second, 2)
        sent, unmapped = second["bytes"]["data_sent"], second["bytes"]["unmapped"]
        expect(len(new) <= sent <= len(new) + METADATA, f"{sent} bytes were sent for a file of {len(new)}")
        expect(unmapped >= deleted - len(new) - METADATA, f"{unmapped} bytes were unmapped of {deleted} deleted")
        expect(second["regions"]["unmap"] > 0, "no region was unmapped")
        show(console, "after changes and a trim", second)

        third = sync()
        check(third, 3)
        expect(
            third["results"]["changed"] == third["bytes"]["data_sent"] == third["bytes"]["unmapped"] == 0, "a change"
        )
        show(console, "nothing changed", third)

        verified = source.blockferry("verify", source.image.name, target, statuses=(0, 3))
        expect(verified["outcome"] == "equal", f"source and replica differ in {verified.get('ranges')}")
        console.print(f"verify: equal, {human(verified['bytes']['compared'])} compared, the rest proven zero")
        replica = source.blockferry("replica", "show", target)
        image = Path(replica["path"])
        run(["e2fsck", "-fn", image], destination)
        expect(run(["debugfs", "-R", "cat /srv/new.bin", image], destination) == new, "the new file is not the same")
        console.print(f"e2fsck: the replica ({human(replica['bytes_held'])} on disk) is a healthy file system")


def main() -> int:
    """Exit status: 0 as expected, 1 not."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 80)
    with tempfile.TemporaryDirectory(prefix="blockferry-demo-") as directory:
        try:
            free = shutil.disk_usage(directory).free
            expect(free >= SPACE_NEEDED, f"{directory} has {human(free)} free; set TMPDIR to a place with 2 GiB")
            demonstrate(console, Path(directory))
        except (DemoError, FileNotFoundError, subprocess.TimeoutExpired) as error:
            Console(stderr=True, highlight=False).print(f"[bold red]demo failed[/bold red]: {error}", soft_wrap=True)
            return 1
    console.print("[bold green]demo: everything is as expected[/bold green]")
    return 0


if __name__ == "__main__":
    sys.exit(main())
