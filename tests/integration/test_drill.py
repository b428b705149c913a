"""The worst day, as README.md describes it: every command there, in its order, between two sites with a real ext4 file
system as the volume. The source is lost, the replica is promoted, mounted and written to, and comes home to a server
that has adopted the old image; then the second site is kept up to date again. At every step exactly what differs is
sent, and no recovery point changes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.fault.raw import Raw
from tests.images import BLOCK, KIB, differing_blocks, noise
from tests.support import PROGRAMS, Report, Server

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()
START = README.index("### The worst day")
SECTION = README[START : README.index("\n##", START)]
LINES = "".join(re.findall(r"^```\n(.*?)^```$", SECTION, re.MULTILINE | re.DOTALL)).splitlines()


class Drill:
    """Takes the lines of the section one after the other, in the directory of the first site."""

    def __init__(self, site: Path, away: Server, home: Server, mount: Path) -> None:
        self.site = site
        self.away = away
        self.home = home
        self.mount = mount
        self._lines: Iterator[str] = iter(LINES)
        self.left = len(LINES)

    def words(self, beginning: str) -> list[str]:
        """The next line, with the places of this test for those it names."""
        line = next(self._lines)
        self.left -= 1
        assert line.startswith(beginning), line
        for name, place in {
            "grpc://127.0.0.1:9870": self.away.address,
            "grpc://127.0.0.1:9871": self.home.address,
            "/srv/replicas": self.away.pool,
            "/srv/home": self.home.pool,
            "/mnt": self.mount,
        }.items():
            line = line.replace(name, str(place))
        return line.split()

    def run(self, beginning: str) -> None:
        """A command of the system."""
        run(*self.words(beginning), cwd=self.site)

    def blockferry(self, beginning: str) -> Report:
        """A command of ours; its report."""
        return self.again(self.words(f"blockferry {beginning}"))

    def again(self, words: list[str]) -> Report:
        """A command of ours, in words."""
        found = json.loads(run(PROGRAMS / words[0], *words[1:], "--json", "--quiet", cwd=self.site))
        assert isinstance(found, dict)
        return found


def run(*words: object, cwd: Path) -> str:
    done = subprocess.run(
        [str(word) for word in words], cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


def to_send(new: bytes, old: bytes) -> int:
    """Bytes of the blocks that differ, without those that became zero: these are unmapped."""
    return sum(BLOCK for at in differing_blocks(new, old) if any(new[at * BLOCK : (at + 1) * BLOCK]))


def held(server: Server) -> dict[int, bytes]:
    """What every recovery point of `vm` holds, by number."""
    with Raw(server.address) as raw:
        return {point.number: raw.read("vm", point.number, 0, point.size) for point in raw.points("vm")}


def test_the_worst_day(ext4_pool_root: Path, xfs_pool_root: Path, tmp_path: Path) -> None:
    """The second site has a journal, the first one clones."""
    away_pool, home_pool = ext4_pool_root / "drill-away", xfs_pool_root / "drill-home"
    site, mount = tmp_path / "site", tmp_path / "mnt"
    for directory in (away_pool, site, mount):
        directory.mkdir()
    away, home = Server(away_pool).start(), Server(home_pool)
    drill = Drill(site, away, home, mount)
    try:
        go_through(drill)
    finally:
        subprocess.run(["umount", str(mount)], capture_output=True, check=False)
        away.stop()
        home.stop()
        for pool in (away_pool, home_pool):
            shutil.rmtree(pool, ignore_errors=True)
    assert drill.left == 0, "the test does not go through all of README.md"


def go_through(drill: Drill) -> None:
    site, away, home, mount = drill.site, drill.away, drill.home, drill.mount
    image = site / "vm.raw"
    files = site / "files"
    files.mkdir()
    for number in range(20):
        (files / f"file-{number}").write_bytes(noise(number, 50 * KIB))
    run("mke2fs", "-q", "-t", "ext4", "-b", BLOCK, "-d", files, image, "16M", cwd=site)

    def write(name: str, content: bytes) -> None:
        """Into the file system in the source's image."""
        (site / name).write_bytes(content)
        run("debugfs", "-w", "-R", f"write {name} {name}", image, cwd=site)

    # Day after day.
    words = drill.words("blockferry sync vm.raw")
    drill.again(words)
    first = image.read_bytes()
    write("monday", noise("monday", 100 * KIB))
    replicated = image.read_bytes()
    assert drill.again(words)["bytes"]["data_sent"] == to_send(replicated, first) > 100 * KIB
    # Something that never left the site, and then nothing does.
    write("unsent", noise("unsent", 150 * KIB))
    lost = image.read_bytes()
    image.rename(site / "lost")

    # The second site.
    promotion = drill.blockferry("replica promote")
    promoted = away.pool / "vm/promoted.img"
    assert (promotion["generation"], promotion["path"]) == (2, str(promoted))
    run("e2fsck", "-f", "-n", promoted, cwd=site)
    drill.run("mount")
    assert (mount / "monday").read_bytes() == noise("monday", 100 * KIB) and not (mount / "unsent").exists()
    (mount / "tuesday").write_bytes(noise("tuesday", 300 * KIB))
    (mount / "file-3").unlink()

    # The first site is back, with what it had, and the way home begins.
    (site / "lost").rename(image)
    drill.run("mkdir")
    drill.run("mv")
    served = drill.words("blockferry-server")
    assert served == ["blockferry-server", "--pool", str(home.pool), "--listen", home.address]
    home.start()
    adopted = drill.blockferry("replica adopt")
    assert adopted["size"] == len(lost)
    report = drill.blockferry("sync")
    assert (report["generation"], report["regions"]["send"]) == (1, 0)
    assert report["bytes"]["data_sent"] == to_send(replicated, lost)
    assert held(home) == {1: replicated}

    # Work stops for a moment.
    drill.run("umount")
    worked_on = promoted.read_bytes()
    assert held(away) == {1: first, 2: replicated}
    assert drill.blockferry("replica demote")["generation"] == 3
    report = drill.blockferry("sync")
    assert report["bytes"]["data_sent"] == to_send(worked_on, replicated) > 300 * KIB
    assert drill.blockferry("verify")["outcome"] == "equal"
    assert held(home) == {1: replicated, 2: worked_on}

    # At home.
    assert drill.blockferry("replica promote")["path"] == str(home.pool / "vm/promoted.img")
    drill.run("mount")
    names = {path.name for path in mount.iterdir() if path.is_file()}
    assert names == {f"file-{number}" for number in range(20) if number != 3} | {"monday", "tuesday"}
    assert (mount / "tuesday").read_bytes() == noise("tuesday", 300 * KIB)
    (mount / "wednesday").write_bytes(noise("wednesday", 400 * KIB))
    drill.run("umount")
    at_home = (home.pool / "vm/promoted.img").read_bytes()
    report = drill.blockferry("sync")
    assert report["generation"] == 4 and report["bytes"]["data_sent"] == to_send(at_home, worked_on) > 400 * KIB
    # The first one was read a moment ago, and may be there still.
    assert held(away) | {1: first} == {1: first, 2: replicated, 3: worked_on, 4: at_home}
    run("e2fsck", "-f", "-n", home.pool / "vm/promoted.img", cwd=site)
