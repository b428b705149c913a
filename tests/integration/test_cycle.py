"""One replication of a policy, on real file systems: what changed is found by shared extents, every generation is what
its snapshot was, and whatever goes wrong is noticed, said, and cleared away."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import shutil
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from blockferry.client.cycle import Member, Terms, run_cycle
from blockferry.client.snapshots import Snapshots
from blockferry.client.sync import Syncing
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.flow import RateLimiter
from blockferry.common.retention import Retention
from blockferry.v1 import replication_pb2 as pb

from tests.cycles import REGION, SIZE, clones_of, cycle, image, kept, must, policy, refused, run, same
from tests.fault.raw import Raw
from tests.filesystems import FileSystems, Unavailable
from tests.images import MIB, build, change, noise
from tests.library import generation, replica_image, replicated
from tests.processes import loop_device
from tests.support import Server, run_cli

_numbers = itertools.count(1)


@pytest.fixture(scope="module", params=["xfs", "btrfs"])
def cloning(request: pytest.FixtureRequest, file_systems: FileSystems) -> Path:
    """A file system that clones files."""
    try:
        return file_systems.directory(request.param)
    except Unavailable as error:
        pytest.skip(f"no {request.param}: {error}")


@pytest.fixture
def home(xfs_pool_root: Path) -> Iterator[Path]:
    made = xfs_pool_root / f"cycles-{next(_numbers)}"
    made.mkdir()
    yield made
    shutil.rmtree(made)


# --- tracking ---------------------------------------------------------------------------------------------------------


async def test_only_what_was_written_is_looked_at(server: Server, volume: str, cloning: Path, tmp_path: Path) -> None:
    place = cloning / f"tracked-{next(_numbers)}"
    place.mkdir()
    source = image(place)
    policies = {"p": policy(source, server, volume)}
    first = (await cycle(policies, tmp_path))["p"]
    assert first["full_compare"] == "no changes were tracked"
    assert (first["tracked"], first["source"], first["policy"], first["attempts"]) == (None, str(source), "p", 1)
    assert [record.commit_id for record in Snapshots("p", policies["p"], tmp_path).records] == [first["commit_id"]]

    # A block in region 3, which was a hole; one in region 4; region 6 trimmed; the short last region.
    change(
        source, [(3 * REGION + 8192, noise("new", 4096)), (4 * REGION, noise("other", 4096)), (SIZE - 10, b"x" * 10)]
    )
    must("fallocate", "--punch-hole", "--offset", 6 * REGION, "--length", REGION, source)
    second = (await cycle(policies, tmp_path))["p"]
    assert second["full_compare"] is None
    assert second["regions"] == {"skip": 37, "unmap": 1, "send": 2, "compare": 1}
    assert second["tracked"] == {"regions": 4, "bytes_avoided": 18 * REGION}
    assert second["bytes"]["data_sent"] == 3 * 4096 - (4096 - 1000 % 4096)
    assert same(server, {volume: source})
    assert len(clones_of(source)) == 1

    # Nothing was written.
    third = (await cycle(policies, tmp_path))["p"]
    assert (third["regions"], third["full_compare"]) == ({"skip": 41, "unmap": 0, "send": 0, "compare": 0}, None)
    assert third["bytes"]["source_read"] == 0


@pytest.mark.parametrize("share", [0.3, 1.0])
async def test_extents_that_were_moved_prove_nothing(
    server: Server, volume: str, file_systems: FileSystems, tmp_path: Path, share: float
) -> None:
    """Balance gives every extent another place, defragmentation those of the source."""
    try:
        place = file_systems.directory("btrfs") / f"moved-{next(_numbers)}"
    except Unavailable as error:
        pytest.skip(f"no btrfs: {error}")
    place.mkdir()
    source = image(place)
    policies = {"p": policy(source, server, volume)}
    await cycle(policies, tmp_path)
    change(source, [(10 * REGION, noise("more", 3 * REGION))])
    if share < 1:
        words = ["btrfs", "filesystem", "defragment", "-f", str(source)]
    else:
        words = ["btrfs", "balance", "start", "--force", "-d", str(place.parent)]
    must(*words)
    report = (await cycle(policies, tmp_path))["p"]
    assert report["full_compare"] is None
    assert same(server, {volume: source})
    report = (await cycle(policies, tmp_path))["p"]
    assert same(server, {volume: source})
    assert report["tracked"]["regions"] == 0


async def test_a_balance_in_the_middle_of_looking_is_noticed(
    server: Server, volume: str, file_systems: FileSystems, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from blockferry.common import linux

    try:
        place = file_systems.directory("btrfs") / f"moved-{next(_numbers)}"
    except Unavailable as error:
        pytest.skip(f"no btrfs: {error}")
    place.mkdir()
    source = image(place)
    policies = {"p": policy(source, server, volume)}
    await cycle(policies, tmp_path)
    real, looks = linux.extents, itertools.count(1)

    def extents(fd: int, *arguments: int, sync: bool = False) -> Iterator[tuple[int, int, int, int]]:
        if next(looks) == 3:
            # The base and the new snapshot were looked at; now the base once more.
            must("btrfs", "balance", "start", "--force", "-d", place.parent)
        return real(fd, *arguments, sync=sync)

    monkeypatch.setattr(linux, "extents", extents)
    report = (await cycle(policies, tmp_path))["p"]
    # All that has an extent may have been moved; holes are holes.
    assert report["tracked"]["regions"] == 20
    assert report["results"] == {"zero": 0, "equal": 20, "changed": 0}


def _replace(clone: Path) -> None:
    clone.unlink()
    shutil.copy(clone.parent.parent / "a.raw", clone)
    clone.chmod(0o400)


BASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "touched": (lambda clone: os.utime(clone), "was touched"),
    "writable": (lambda clone: clone.chmod(0o600), "can be written to"),
    "gone": (lambda clone: clone.unlink(), "no such file"),
    "another": (_replace, "was touched"),
}


@pytest.mark.parametrize("case", BASES)
async def test_a_base_that_is_not_what_it_was_proves_nothing(
    server: Server, volume: str, home: Path, case: str
) -> None:
    source = image(home)
    policies = {"p": policy(source, server, volume)}
    await cycle(policies, home / "state")
    act, reason = BASES[case]
    (clone,) = clones_of(source)
    act(clone)
    change(source, [(0, noise("changed", 4096))])
    report = (await cycle(policies, home / "state"))["p"]
    assert reason in str(report["full_compare"])
    assert (report["tracked"], report["results"]) == (None, {"zero": 0, "equal": 19, "changed": 1})
    assert same(server, {volume: source})
    assert len(clones_of(source)) == 1


async def test_a_generation_of_somebody_else_is_compared_with_all_of_it(
    server: Server, volume: str, home: Path
) -> None:
    source, other = image(home), image(home, "b.raw")
    policies = {"p": policy(source, server, volume)}
    await cycle(policies, home / "state")
    server.sync(other, volume, "--region-size", "64K")
    report = (await cycle(policies, home / "state"))["p"]
    assert report["full_compare"] == "generation 2 is not one that changes are known since"
    assert same(server, {volume: source})
    assert (await cycle(policies, home / "state"))["p"]["full_compare"] is None


@pytest.mark.parametrize("kind", ["clones", "journal"])
async def test_what_an_interrupted_session_has_left_is_looked_at_too(
    xfs_pool_root: Path, ext4_pool_root: Path, volume: str, home: Path, kind: str
) -> None:
    """Its work is where the next session begins: regions in it that the source has never changed differ all the
    same."""
    pool = (xfs_pool_root if kind == "clones" else ext4_pool_root) / f"interrupted-{next(_numbers)}"
    pool.mkdir()
    server = Server(pool).start()
    try:
        source = image(home)
        policies = {"p": policy(source, server, volume)}
        await cycle(policies, home / "state")
        for restart in (False, True):
            with Raw(server.address) as raw:
                session = raw.open(volume, SIZE).session
                raw.write(session, 8 * REGION, noise("garbage", REGION))
                raw.call(
                    "Replication/UnmapRegion",
                    pb.UnmapRegionRequest(session=session, offset=20 * REGION, length=2 * REGION),
                    pb.UnmapRegionResponse,
                )
                raw.abort(session)
            if restart:
                assert server.stop() == 0
                server.start()
            change(source, [(14 * REGION, noise(f"changed {restart}", 4096))])
            report = (await cycle(policies, home / "state"))["p"]
            assert report["full_compare"] is None
            # Region 21 was a hole, and unmapping it left it one. A journal without a checkpoint ends with its server.
            left = 1 if kind == "journal" and restart else 3
            assert report["results"] == {"zero": 0, "equal": 0, "changed": left}
            assert report["tracked"]["regions"] == left
            assert same(server, {volume: source})
    finally:
        server.stop()


async def test_a_generation_that_rots_is_compared_with_all_of_it(server: Server, volume: str, home: Path) -> None:
    source = image(home)
    policies = {"p": policy(source, server, volume)}
    await cycle(policies, home / "state")
    there = replica_image(server, volume)
    times = there.stat()
    with there.open("r+b", 0) as file:
        os.pwrite(file.fileno(), b"rotten", 2 * REGION)
        os.fsync(file.fileno())
    os.utime(there, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert run_cli("replica", "verify", server.url(volume), "--quiet").status == 3
    report = (await cycle(policies, home / "state"))["p"]
    assert report["full_compare"] == "it was read again, and is not what was committed"
    assert same(server, {volume: source})
    assert (await cycle(policies, home / "state"))["p"]["full_compare"] is None


async def test_a_device_is_believed_for_as_long_as_its_server_holds_it(xfs_pool_root: Path, home: Path) -> None:
    backing = home / "device.img"
    build(backing, 64 * REGION)
    pool = xfs_pool_root / f"device-{next(_numbers)}"
    pool.mkdir()
    with contextlib.ExitStack() as stack:
        try:
            device = stack.enter_context(loop_device(backing))
        except Unavailable as error:
            pytest.skip(str(error))
        server = Server(pool, flags=["--device", f"db={device},journal={pool}"]).start()
        stack.callback(server.stop)
        source = image(home)
        policies = {"p": policy(source, server, "db")}
        whys: list[str | None] = []
        for restart in (False, False, True, False):
            if restart:
                assert server.stop() == 0
                server.start()
            change(source, [(4 * REGION, noise(f"round {len(whys)}", 4096))])
            whys.append((await cycle(policies, home / "state"))["p"]["full_compare"])
        assert whys == [
            "no changes were tracked",
            None,
            "its device was opened anew, and others may have written to it in between",
            None,
        ]
        with Raw(server.address) as raw:
            found = b"".join(raw.read("db", 4, at, min(REGION, SIZE - at)) for at in range(0, SIZE, REGION))
        assert found == source.read_bytes()


# --- a file system that is in use -------------------------------------------------------------------------------------


async def test_a_mounted_file_system_is_replicated_while_it_is_written(
    server: Server, volume: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every generation is its snapshot, byte for byte, and a file system that is whole once its journal is replayed."""
    source = home / "disk.raw"
    build(source, 48 * MIB)
    must("mkfs.ext4", "-q", "-b", "4096", source)
    mount = home / "mount"
    mount.mkdir()
    taken: list[bytes] = []
    real = Snapshots.take

    async def take(self: Snapshots, commit_id: str, cycle: str) -> object:
        record = await real(self, commit_id, cycle)
        taken.append(await asyncio.to_thread(Path(record.path).read_bytes))
        return record

    monkeypatch.setattr(Snapshots, "take", take)
    policies = {"p": policy(source, server, volume, keep=Retention(last=9))}
    ending = threading.Event()
    must("mount", "-o", "loop", source, mount)
    writer = threading.Thread(target=_write_until, args=(mount, ending))
    try:
        writer.start()
        reports = [(await cycle(policies, home / "state"))["p"] for _ in range(4)]
    finally:
        ending.set()
        writer.join()
        must("umount", mount)
    assert [report["full_compare"] for report in reports] == ["no changes were tracked", None, None, None]
    assert len({bytes(one) for one in taken}) == 4, "nothing was written meanwhile"
    with Raw(server.address) as raw:
        for number, content in enumerate(taken, 1):
            assert b"".join(raw.read(volume, number, at, MIB) for at in range(0, len(content), MIB)) == content
    copy = home / "copy.raw"
    for content in taken:
        copy.write_bytes(content)
        # 1: the journal was replayed.
        assert run("e2fsck", "-fp", copy) in (0, 1)
        assert run("e2fsck", "-fn", copy) == 0


def _write_until(mount: Path, ending: threading.Event) -> None:
    for number in itertools.count():
        path = mount / f"file-{number % 7}"
        path.write_bytes(noise(number, 40_000))
        with path.open("rb") as file:
            os.fsync(file.fileno())
        if number % 5 == 4:
            path.unlink()
        if ending.wait(0.02):
            return


async def test_a_first_replication_that_was_interrupted_goes_on_with_its_snapshot(
    server: Server, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"f{number}-{next(_numbers)}" for number in range(2)]
    sources = {name: image(home, f"{name}.raw") for name in names}
    before = {name: source.read_bytes() for name, source in sources.items()}
    policies = {name: policy(source, server, name, group="g") for name, source in sources.items()}
    real = Syncing.transfer

    async def transfer(self: Syncing) -> None:
        await real(self)
        raise BlockferryError(Code.UNAVAILABLE, "the line was cut", next="nothing")

    monkeypatch.setattr(Syncing, "transfer", transfer)
    await refused(cycle(policies, home / "state"), Code.UNAVAILABLE, "the line was cut")
    monkeypatch.undo()
    assert [kept(name, policies[name], home / "state") for name in names] == [["taken"], ["taken"]]
    taken = {name: Snapshots(name, policies[name], home / "state").records[0] for name in names}
    for source in sources.values():
        change(source, [(0, noise("later", 4096))])
    reports = await cycle(policies, home / "state")
    assert {name: report["commit_id"] for name, report in reports.items()} == {
        name: record.commit_id for name, record in taken.items()
    }
    assert {name: replicated(server, name) for name in names} == before
    reports = await cycle(policies, home / "state")
    assert [report["full_compare"] for report in reports.values()] == [None, None]
    assert same(server, sources)
    # What was interrupted later begins anew: it costs what has changed.
    change(sources[names[0]], [(0, noise("later still", 4096))])
    monkeypatch.setattr(Syncing, "transfer", transfer)
    await refused(cycle(policies, home / "state"), Code.UNAVAILABLE, "the line was cut")
    assert [kept(name, policies[name], home / "state") for name in names] == [["base"], ["base"]]


# --- groups -----------------------------------------------------------------------------------------------------------


async def test_a_group_is_committed_together(server: Server, home: Path) -> None:
    names = [f"g{number}-{next(_numbers)}" for number in range(3)]
    sources = {name: image(home, f"{name}.raw") for name in names}
    policies = {name: policy(source, server, name, group="g") for name, source in sources.items()}
    reports = await cycle(policies, home / "state")
    assert [report["generation"] for report in reports.values()] == [1, 1, 1]
    for source in sources.values():
        change(source, [(0, noise("all", 4096))])
    # One of them cannot be sent: none has a new generation.
    real = Syncing.transfer

    async def transfer(self: Syncing) -> None:
        await real(self)
        if self.destination.volume == names[1]:
            raise BlockferryError(Code.IO_ERROR, "broken", next="nothing")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Syncing, "transfer", transfer)
        await refused(cycle(policies, home / "state"), Code.IO_ERROR, "broken")
    assert [generation(server, name) for name in names] == [1, 1, 1]
    assert [kept(name, policies[name], home / "state") for name in names] == [["base"]] * 3
    reports = await cycle(policies, home / "state")
    assert [report["generation"] for report in reports.values()] == [2, 2, 2]
    assert [report["full_compare"] for report in reports.values()] == [None] * 3
    assert same(server, sources)


async def test_members_of_a_group_go_to_one_server(server: Server, home: Path) -> None:
    one, two = image(home), image(home, "b.raw")
    apart = {"p": policy(one, server, "v"), "q": policy(two, server, "v", destination="grpc://127.0.0.1:1/w")}
    await refused(cycle(apart, home / "state"), Code.INVALID_ARGUMENT, "different servers")
    twice = {"p": policy(one, server, "v"), "q": policy(two, server, "v")}
    await refused(cycle(twice, home / "state"), Code.INVALID_ARGUMENT, "the same replica")


async def test_bandwidth_is_shared_and_can_be_changed_while_it_runs(
    server: Server, volume: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = image(home)
    total, own = RateLimiter(40_000), RateLimiter(0)
    spent: list[int] = []
    delay = RateLimiter.delay

    def counted(self: RateLimiter, amount: int) -> float:
        spent.append(amount)
        found = delay(self, amount)
        if self is total:
            # It was slow for the first message, and is let go.
            self.rate = 0
        return found

    monkeypatch.setattr(RateLimiter, "delay", counted)
    began = time.monotonic()
    member = Member("p", policy(source, server, volume), own)
    report = (await run_cycle([member], Terms(home / "state", bandwidth=total)))["p"]
    # At the rate of its beginning it would have taken half a minute.
    assert time.monotonic() - began < 20
    assert sum(spent) >= 2 * report["bytes"]["data_sent"]
    assert total.rate == 0


# --- sources ----------------------------------------------------------------------------------------------------------


async def test_clones_need_a_file_system_that_clones(
    server: Server, volume: str, ext4_pool_root: Path, home: Path
) -> None:
    place = ext4_pool_root / f"source-{next(_numbers)}"
    place.mkdir()
    source = image(place)
    policies = {"p": policy(source, server, volume)}
    await refused(cycle(policies, home / "state"), Code.UNSUPPORTED, "cannot clone", "snapshot =")
    assert (clones_of(source), kept("p", policies["p"], home / "state")) == ([], [])
    elsewhere = {"p": policy(source, server, volume, snapshot_dir=home)}
    await refused(cycle(elsewhere, home / "state"), Code.UNSUPPORTED)


async def test_a_source_that_vanishes_or_is_resized(server: Server, volume: str, home: Path) -> None:
    source = image(home)
    policies = {"p": policy(source, server, volume)}
    await cycle(policies, home / "state")
    source.rename(home / "away")
    await refused(cycle(policies, home / "state"), Code.NOT_FOUND, "cannot clone")
    (home / "away").rename(source)
    for size, code in ((SIZE - 4096, Code.SIZE_MISMATCH), (SIZE + 4096, Code.SIZE_MISMATCH)):
        os.truncate(source, size)
        await refused(cycle(policies, home / "state"), code)
        assert len(clones_of(source)) == 1
    os.truncate(source, SIZE)
    change(source, [(SIZE - 4096, noise("back", 4096))])
    assert (await cycle(policies, home / "state"))["p"]["full_compare"] is None
    assert same(server, {volume: source})


async def test_a_clone_that_takes_too_long_is_given_up(
    server: Server, volume: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = home / "bin"
    slow.mkdir()
    (slow / "cp").write_text("#!/bin/sh\nsleep 1000\n")
    (slow / "cp").chmod(0o700)
    monkeypatch.setenv("PATH", f"{slow}:{os.environ['PATH']}")
    source = image(home)
    policies = {"p": policy(source, server, volume, clone_limit=0.3)}
    await refused(cycle(policies, home / "state"), Code.UNAVAILABLE, "longer than 0.3 s", "clone_limit")
    assert (clones_of(source), kept("p", policies["p"], home / "state")) == ([], [])


def _writing_transfer(source: Path, times: int) -> Callable[[Syncing], Awaitable[None]]:
    real, left = Syncing.transfer, [times]

    async def transfer(self: Syncing) -> None:
        await real(self)
        if left[0]:
            left[0] -= 1
            with source.open("r+b", 0) as file:
                file.write(noise(f"while {left}", 4096))

    return transfer


@pytest.mark.parametrize("kind", ["file", "device"])
async def test_a_source_at_rest_that_is_not_is_replicated_anew(
    server: Server, volume: str, home: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    source = image(home, size=40 * REGION)
    with contextlib.ExitStack() as stack:
        try:
            written = Path(stack.enter_context(loop_device(source))) if kind == "device" else source
        except Unavailable as error:
            pytest.skip(str(error))
        policies = {"p": policy(written, server, volume, snapshot="none")}
        monkeypatch.setattr(Syncing, "transfer", _writing_transfer(written, 1))
        report = (await cycle(policies, home / "state"))["p"]
        assert (report["attempts"], report["generation"], report["snapshot"]) == (2, 1, None)
        assert replicated(server, volume) == written.read_bytes()
        monkeypatch.setattr(Syncing, "transfer", _writing_transfer(written, 99))
        await refused(cycle(policies, home / "state"), Code.SOURCE_CHANGED, "was written to while it was read")
        assert generation(server, volume) == 1


async def test_what_makes_no_progress_is_ended(
    server: Server, volume: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def transfer(self: Syncing) -> None:
        self.progress.start("transfer")
        await asyncio.sleep(1000)

    monkeypatch.setattr(Syncing, "transfer", transfer)
    source = image(home)
    policies = {"p": policy(source, server, volume, stall_timeout=0.3)}
    await refused(cycle(policies, home / "state"), Code.UNAVAILABLE, "no progress", "0.3 s", "phase transfer")
    assert generation(server, volume) == 0
    monkeypatch.undo()
    await cycle(policies, home / "state")


async def test_files_of_others_are_never_removed(server: Server, volume: str, home: Path) -> None:
    source = image(home)
    policies = {"p": policy(source, server, volume)}
    place = source.parent / ".blockferry-snapshots"
    place.mkdir()
    theirs = [
        "blockferry-q-" + "0" * 32 + ".snapshot",
        "blockferry-p-x-" + "0" * 32 + ".snapshot",
        "blockferry-p-" + "0" * 31 + ".snapshot",
        "blockferry-p-" + "0" * 32 + ".snapshot.old",
        "precious",
    ]
    for name in theirs:
        (place / name).write_text("theirs")
    stray = place / ("blockferry-p-" + "0" * 32 + ".snapshot")
    stray.write_text("of a life before")
    await cycle(policies, home / "state")
    assert {path.name for path in place.iterdir()} >= set(theirs)
    assert not stray.exists()
    assert len(list(place.iterdir())) == len(theirs) + 1
