"""Pools in practice, on real servers and file systems: several of them, reserve, quota, forecast, scrubs on a schedule,
and pools that were moved or restored. docs/pools.md is what is checked here."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.filesystems import Unavailable, mounted
from tests.images import KIB, MIB, build, noise
from tests.support import Finished, Report, Server, ok, refused, refused_json, run_cli, tree, until

NAME = "vm"


@pytest.fixture
def ext4(tmp_path: Path) -> Iterator[Path]:
    """A small ext4 of its own."""
    with contextlib.ExitStack() as stack:
        try:
            yield stack.enter_context(mounted("ext4", tmp_path, 96 * MIB))
        except Unavailable as error:
            pytest.skip(str(error))


@pytest.fixture
def xfs(xfs_pool_root: Path, tmp_path: Path) -> Path:
    """A directory of its own on XFS, for pools."""
    directory = xfs_pool_root / tmp_path.name
    directory.mkdir(exist_ok=True)
    return directory


class Sites:
    """Starts servers of one test, and ends them."""

    def __init__(self) -> None:
        self._servers: list[Server] = []

    def __call__(self, pool: Path, *flags: str) -> Server:
        pool.mkdir(exist_ok=True)
        server = Server(pool, flags=flags)
        self._servers.append(server)
        return server.start()

    def stop(self) -> None:
        for server in self._servers:
            server.stop()


@pytest.fixture
def serve() -> Iterator[Sites]:
    sites = Sites()
    yield sites
    sites.stop()


def pools_of(server: Server) -> dict[str, Report]:
    """`pool list --json`, by name."""
    found = ok("pool", "list", server.address)
    assert found["schema"] == 1
    return {pool["name"]: pool for pool in found["pools"]}


def free(path: Path) -> int:
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


def refuses_to_start(*flags: object) -> str:
    """Run a server that must not start; the line it says."""
    words = [Server(Path("/nowhere")).words[0], "--listen", "grpc://127.0.0.1:0", *map(str, flags)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    return refused(Finished(done.returncode, done.stdout, done.stderr), program="blockferry-server")


# --- several pools ----------------------------------------------------------------------------------------------------


def test_pools_on_xfs_and_on_ext4(xfs: Path, ext4: Path, serve: Sites, tmp_path: Path) -> None:
    (ext4 / "bulk").mkdir()
    server = serve(xfs / "fast", "--pool", f"bulk={ext4 / 'bulk'}")
    source = build(tmp_path / "source", 4 * MIB, [(0, noise(1, MIB))])
    server.sync(source, "first")
    server.sync(source, "second", "--pool", "bulk")
    assert [server.show(name)["pool"] for name in ("first", "second")] == ["main", "bulk"]
    assert (xfs / "fast/first").is_dir() and (ext4 / "bulk/second").is_dir()
    assert server.image("second").read_bytes() == source.read_bytes()

    found = pools_of(server)
    assert list(found) == ["main", "bulk"]
    assert [found[name]["kind"] for name in found] == ["clones", "journal"]
    assert [found[name]["path"] for name in found] == [str(xfs / "fast"), str(ext4 / "bulk")]
    assert [found[name]["replicas"] for name in found] == [1, 1]
    assert all(MIB <= found[name]["bytes_held"] < 2 * MIB for name in found)
    for name, path in (("main", xfs), ("bulk", ext4)):
        info = os.statvfs(path)
        assert found[name]["total"] == info.f_blocks * info.f_frsize
        assert abs(found[name]["free"] - free(path)) < 4 * MIB
        assert found[name]["reserve"] == found[name]["total"] // 20
        assert [found[name][key] for key in ("quota", "problem", "notice")] == [None, None, None]

    listed = run_cli("replica", "list", server.address).stdout.splitlines()
    ends = [(line.split()[0], line.split()[-1]) for line in listed]
    assert ends == [("VOLUME", "POOL"), ("first", "main"), ("second", "bulk")]
    shown = run_cli("pool", "list", server.address).stdout.splitlines()
    assert [line.split()[:3] for line in shown] == [
        ["POOL", "KIND", "REPLICAS"], ["main", "clones", "1"], ["bulk", "journal", "1"],
    ]  # fmt: skip

    before = tree(xfs / "fast/first")
    other = ("sync", source, server.url("first"), "--pool", "bulk", "--json", "--quiet")
    refused_json(run_cli(*other), "invalid-argument", "first is not in pool bulk", "--pool main")
    unknown = ("sync", source, server.url("third"), "--pool", "slow", "--json", "--quiet")
    refused_json(run_cli(*unknown), "not-found", "there is no pool slow", "main, bulk")
    assert tree(xfs / "fast/first") == before
    assert not any((place / "third").exists() for place in (xfs / "fast", ext4 / "bulk"))


def test_pools_that_a_server_refuses(tmp_path: Path, serve: Sites) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    source = build(tmp_path / "source", MIB, [])
    for path in (one, other):
        server = serve(path)
        server.sync(source, NAME)
        server.stop()
    line = refuses_to_start("--pool", f"a={one}", "--pool", f"b={other}")
    assert str(one / NAME) in line and str(other / NAME) in line and "move one" in line
    (one / "in").mkdir()
    assert "is inside" in refuses_to_start("--pool", f"a={one}", "--pool", f"b={one / 'in'}")
    # Nothing is left locked or broken.
    (other / NAME).rename(other / "vm2")
    server = serve(one, "--pool", f"b={other}")
    assert [server.show(name)["pool"] for name in (NAME, "vm2")] == ["main", "b"]


# --- reserve and quota ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def watched(path: Path) -> Iterator[list[int]]:
    """What was free in a file system, again and again while the body runs."""
    found, over = [free(path)], threading.Event()

    def watch() -> None:
        while not over.wait(0.005):
            found.append(free(path))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


def test_the_reserve_is_kept_and_so_is_the_generation(tmp_path: Path, serve: Sites) -> None:
    with contextlib.ExitStack() as stack:
        try:
            mount = stack.enter_context(mounted("xfs", tmp_path))
        except Unavailable as error:
            pytest.skip(str(error))
        pool, log = mount / "pool", tmp_path / "pool.log"
        first = build(tmp_path / "first", 64 * MIB, [(0, noise(1, 8 * MIB))])
        second = build(tmp_path / "second", 64 * MIB, [(0, noise(2, 40 * MIB))])

        def start(reserve: int) -> Server:
            pool.mkdir(exist_ok=True)
            server = Server(pool, flags=("--reserve", str(reserve)))
            server.log = log
            stack.callback(server.stop)
            return server.start()

        server = start(0)
        server.sync(first, NAME)
        assert pools_of(server)["main"]["reserve"] == 0
        server.stop()

        subprocess.run(["sync", "-f", mount], check=True)
        reserve = free(mount) - 16 * MIB
        server = start(reserve)
        assert pools_of(server)["main"]["reserve"] == reserve
        with watched(mount) as seen:
            done = run_cli("sync", second, server.url(NAME), "--json", "--quiet")
        refused_json(done, "out-of-space", "are reserved", "--reserve")
        # The file system's own records (a directory, an inode, a journal) are not data of the session.
        assert min(seen) >= reserve - MIB
        assert min(seen) < reserve + 15 * MIB, "it gave up before there was any need"
        assert not (pool / NAME / "work.img").exists()
        assert (server.show(NAME)["generation"], server.show(NAME)["state"]) == (1, "CONSISTENT")
        assert server.image(NAME).read_bytes() == first.read_bytes()
        server.stop()

        server = start(free(mount) + MIB)
        before = tree(pool / NAME)
        refused(run_cli("sync", first, server.url(NAME), "--quiet"), f"cannot open a session of {NAME}", "are reserved")
        refused(run_cli("sync", first, server.url("new"), "--quiet"), "cannot create new", "are reserved")
        assert tree(pool / NAME) == before and not (pool / "new").exists()
        server.stop()

        server = start(0)
        assert server.sync(second, NAME)["generation"] == 2
        server.stop()


def test_a_quota_counts_points_and_what_they_share_once(xfs: Path, serve: Sites, tmp_path: Path) -> None:
    contents = [noise(number, 8 * MIB) for number in range(3)]
    sources = [build(tmp_path / f"source-{number}", 16 * MIB, [(0, contents[number])]) for number in range(3)]
    small = build(tmp_path / "small", 16 * MIB, [(0, contents[0][: 7 * MIB] + contents[1][7 * MIB :])])
    server = serve(xfs / "pool", "--quota", "20M")
    server.sync(sources[0], NAME)
    server.sync(small, NAME)
    held = server.show(NAME)["bytes_held"]
    assert 9 * MIB <= held < 9 * MIB + 512 * KIB, "two points share seven of eight MiB"
    assert pools_of(server)["main"]["quota"] == 20 * MIB
    server.sync(sources[1], NAME)
    assert 16 * MIB <= server.show(NAME)["bytes_held"] < 17 * MIB

    done = run_cli("sync", sources[2], server.url(NAME), "--json", "--quiet")
    refused_json(done, "out-of-space", "with its recovery points, and 20.0 MiB are its quota", "--quota")
    assert [point["number"] for point in ok("replica", "points", server.url(NAME))["points"]] == [3, 2, 1]
    assert server.image(NAME).read_bytes() == sources[1].read_bytes()
    assert server.show(NAME)["bytes_held"] < 17 * MIB, "the space of what had arrived was not given back"
    server.stop()
    assert serve(xfs / "pool").sync(sources[2], NAME)["generation"] == 4


# --- forecast ---------------------------------------------------------------------------------------------------------


def test_a_plan_says_whether_it_fits(xfs: Path, ext4: Path, serve: Sites, tmp_path: Path) -> None:
    (ext4 / "bulk").mkdir()
    source = build(tmp_path / "source", 400 * MIB, [(0, noise(1, MIB)), (300 * MIB, noise(2, MIB))])
    server = serve(xfs / "pool", "--pool", f"bulk={ext4 / 'bulk'}", "--quota", "3M")
    new = ok("plan", source, server.url(NAME))["forecast"]
    room = pools_of(server)["main"]
    assert abs(new.pop("free") - room["free"]) < 4 * MIB
    assert new == {
        "pool": "main", "reserve": room["reserve"], "quota": 3 * MIB, "held": 0,
        "needed_max": 2 * MIB, "fits": True,
    }  # fmt: skip
    assert not (xfs / "pool" / NAME).exists()
    bulk = ok("plan", source, server.url(NAME), "--pool", "bulk")["forecast"]
    assert (bulk["pool"], bulk["needed_max"], bulk["fits"]) == ("bulk", 2 * MIB, True)

    server.sync(source, NAME)
    again = ok("plan", source, server.url(NAME))["forecast"]
    assert (again["held"], again["needed_max"], again["fits"]) == (server.show(NAME)["bytes_held"], 2 * MIB, False)
    done = run_cli("plan", source, server.url(NAME))
    assert (done.status, done.stderr) == (0, "")
    line = done.stdout.splitlines()[-1]
    assert "at most 2.0 MiB more on the disk: it MAY NOT FIT (pool main has " in line
    assert "of its quota of 3.0 MiB" in line

    huge = tmp_path / "huge"
    huge.touch()
    os.truncate(huge, 200 * MIB)
    with huge.open("r+b") as file:
        for offset in range(0, 200 * MIB, MIB):
            os.pwrite(file.fileno(), b"x", offset)
    plain = serve(ext4 / "other")
    done = run_cli("plan", huge, plain.url("big"))
    assert done.status == 0 and "at most 200.0 MiB more on the disk: it MAY NOT FIT" in done.stdout


# --- scrubs -----------------------------------------------------------------------------------------------------------


def spoil(image: Path, offset: int) -> None:
    with image.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def test_rot_is_found_on_schedule_and_repaired_by_the_next_sync(xfs: Path, serve: Sites, tmp_path: Path) -> None:
    source = build(tmp_path / "source", 8 * MIB, [(0, noise(1, 4 * MIB))])
    server = serve(xfs / "pool", "--scrub-every", "1s")
    server.sync(source, NAME)

    def scrub() -> Report:
        return server.show(NAME)["scrub"] or {}

    until(lambda: bool(scrub()), "the first scrub is over")
    assert {**scrub(), "at": ""} == {"at": "", "generation": 1, "bytes": 4 * MIB, "rotten": [], "problem": None}

    spoil(server.image(NAME), 2 * MIB + 7)
    until(lambda: bool(scrub().get("rotten")), "the rot is found")
    assert scrub()["rotten"] == [{"offset": 2 * MIB, "length": MIB}]
    shown = run_cli("replica", "show", server.url(NAME)).stdout
    assert "1.0 MiB in 1 ranges were ROTTEN" in shown
    assert " ROTTEN 0:0" in run_cli("replica", "list", server.address).stdout
    (line,) = [
        line for line in server.log.read_text().splitlines() if "is not what was committed" in line
    ][:1]  # fmt: skip
    assert "error" in line and NAME in line and str(2 * MIB) in line

    server.sync(source, NAME)
    until(lambda: scrub()["generation"] == 2, "the next generation is scrubbed")
    assert scrub()["rotten"] == []


def test_without_a_schedule_only_verify_scrubs_and_its_result_stays(xfs: Path, serve: Sites, tmp_path: Path) -> None:
    source = build(tmp_path / "source", 4 * MIB, [(0, noise(1, MIB))])
    server = serve(xfs / "pool")
    server.sync(source, NAME)
    server.sync(source, NAME)
    assert server.show(NAME)["scrub"] is None
    assert "scrubbed    never" in run_cli("replica", "show", server.url(NAME)).stdout
    ok("replica", "verify", server.url(f"{NAME}@1"))
    assert server.show(NAME)["scrub"] is None, "an older generation says nothing of the newest"
    ok("replica", "verify", server.url(NAME))
    found = server.show(NAME)["scrub"]
    assert (found["generation"], found["bytes"], found["rotten"]) == (2, MIB, [])
    server.stop()
    # Scrubbed not long ago: a schedule leaves it alone.
    server = serve(xfs / "pool", "--scrub-every", "1d")
    assert server.show(NAME)["scrub"] == found
    spoil(server.image(NAME), 5)
    assert run_cli("replica", "verify", server.url(NAME)).status == 3
    assert server.show(NAME)["scrub"]["rotten"] == [{"offset": 0, "length": MIB}]


# --- moved and restored -----------------------------------------------------------------------------------------------


def test_a_moved_pool_goes_on_as_if_nothing_had_happened(xfs: Path, serve: Sites, tmp_path: Path) -> None:
    source = build(tmp_path / "source", 4 * MIB, [(0, noise(1, 2 * MIB))])
    server = serve(xfs / "old")
    server.sync(source, NAME)
    server.stop()
    subprocess.run(["mv", xfs / "old", xfs / "new"], check=True)
    server = serve(xfs / "new")
    assert "the pool was moved" in server.log.read_text()
    assert (server.show(NAME)["notice"], pools_of(server)["main"]["notice"]) == (None, None)
    report = server.sync(source, NAME)
    assert (report["bytes"]["destination_read"], report["generation"], report["warning"]) == (0, 2, None)
    server.stop()
    server.start()
    assert server.log.read_text().count("the pool was moved") == 1


def test_a_restored_pool_says_so_until_the_next_commit(xfs: Path, serve: Sites, tmp_path: Path) -> None:
    source = build(tmp_path / "source", 4 * MIB, [(0, noise(1, 2 * MIB))])
    changed = build(tmp_path / "changed", 4 * MIB, [(0, noise(2, 2 * MIB))])
    server = serve(xfs / "pool")
    server.sync(source, NAME)
    server.sync(source, "other")
    server.stop()
    subprocess.run(["cp", "-a", xfs / "pool", xfs / "backup"], check=True)
    server.start()
    assert server.sync(changed, NAME)["warning"] is None
    server.stop()
    # Restored in the same place, perhaps even into the same inodes.
    subprocess.run(["rm", "-r", xfs / "pool"], check=True)
    subprocess.run(["cp", "-a", xfs / "backup", xfs / "pool"], check=True)
    server.start()
    assert "restored from a backup or copied" in server.log.read_text()
    # Until the next commit, and not until the next start.
    server.stop()
    server.start()
    assert "generations newer than the backup are lost" in server.show(NAME)["notice"]
    assert "NOTICE      its pool was restored" in run_cli("replica", "show", server.url(NAME)).stdout
    shown = run_cli("pool", "list", server.address).stdout
    assert "main: restored from a backup" in shown and "2 of 2 replicas have not been synced since" in shown

    done = run_cli("sync", changed, server.url(NAME))
    assert done.status == 0
    (line,) = [line for line in done.stdout.splitlines() if "WARNING" in line]
    assert "the replica was at generation 1, although generation 2 had been committed from here" in line
    assert server.image(NAME).read_bytes() == changed.read_bytes()
    assert server.show(NAME)["notice"] is None
    assert "1 of 2 replicas" in pools_of(server)["main"]["notice"]

    report = server.sync(source, "other")
    assert report["bytes"]["destination_read"] == 2 * MIB, "something vouched for content in a restored pool"
    assert report["warning"] is None, "that one has lost nothing"
    assert pools_of(server)["main"]["notice"] is None
    again = server.sync(changed, NAME)
    assert (again["warning"], again["bytes"]["destination_read"]) == (None, 0)
