"""Handing over, on real servers with both kinds of pools: XFS (clones) and ext4 (a journal).

Proves that what is promoted is the point that was asked for and can be mounted, that nothing written to it reaches a
point, that syncs are refused and running ones fenced meanwhile, that demotion makes a generation of the right content
and refuses what is in use, that nothing is deleted by mistake, and that an adopted image is compared and never lost.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from blockferry.v1 import replicas_pb2 as replicas

from tests.fault.raw import REGION, Raw, Refused
from tests.filesystems import mounted
from tests.images import BLOCK, KIB, MIB, Hole, Snapshot, build, change, differing_blocks, expect, noise
from tests.integration.handovers import SIZE, demoting, held, replicated, sync, work_on
from tests.processes import holding, loop_device
from tests.support import Server, finish, ok, own_directory, refused, refused_json, run_cli, start_cli, tree, until
from tests.terminal import on_terminal

KINDS = {"clones": "xfs_pool_root", "journal": "ext4_pool_root"}


@pytest.fixture(scope="module", params=KINDS)
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """Tests restart it as they like, and use volumes of their own."""
    pool = own_directory(request.getfixturevalue(KINDS[request.param]), "pool-of-handovers")
    (pool / ".seeds").mkdir()
    server = Server(pool, flags=("--lease", "0.2", "--keep-at-least", "last=1")).start()
    yield server
    server.stop()


@pytest.fixture
def raw(server: Server) -> Iterator[Raw]:
    with Raw(server.address) as raw:
        yield raw


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return build(tmp_path / "source", SIZE, [(0, noise(1, SIZE)), (4 * REGION, Hole(2 * REGION))])


in_one_kind = pytest.mark.parametrize("server", ["clones"], indirect=True)
"""For what is about the command line, and costs many processes."""


@contextlib.contextmanager
def running_sync(server: Server, raw: Raw, source: Path, volume: str) -> Iterator[subprocess.Popen[str]]:
    """A sync with much to send, under way and slow."""
    generation = raw.show(volume).generation
    change(source, [(0, noise("much", SIZE))])
    process = start_cli("sync", source, server.url(volume), "--quiet", "--bwlimit", "100K")
    try:
        until(lambda: raw.state(volume) == "UPDATING", "the sync has begun")
        yield process
    finally:
        process.kill()
        process.communicate()
    assert raw.show(volume).generation == generation


# --- promote ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [2, 1], ids=["newest", "older"])
def test_a_point_is_handed_out(server: Server, raw: Raw, volume: str, source: Path, number: int) -> None:
    contents = replicated(raw, source, volume)
    address = f"{server.url(volume)}@{number}" if number == 1 else server.url(volume)
    report = ok("replica", "promote", address, "--yes")
    assert set(report) == {"schema", "volume", "generation", "commit_id", "promoted_at", "path"}
    assert (report["schema"], report["volume"], report["generation"]) == (1, volume, number)
    known = {point.commit_id.hex() for point in raw.points(volume)}
    assert len(report["commit_id"]) == 32 and report["commit_id"] not in known
    promoted = Path(report["path"])
    assert promoted.parent == server.pool / volume and promoted.read_bytes() == contents[number]

    shown = server.show(volume)
    assert (shown["state"], shown["generation"], shown["commit_id"] in known) == ("PROMOTED", 2, True)
    assert shown["promotion"] == {name: report[name] for name in ("generation", "commit_id", "promoted_at", "path")}
    assert {point.number: "in use" in point.kept_by for point in raw.points(volume)} == {2: number == 2, 1: number == 1}

    # Again, by its number: the same. Another one: not as long as this one is out.
    assert ok("replica", "promote", f"{server.url(volume)}@{number}", "--yes") == report
    other = f"{server.url(volume)}@1" if number == 2 else server.url(volume)
    refused_json(
        run_cli("replica", "promote", other, "--yes", "--json", "--quiet"), "wrong-state", volume, "PROMOTED", "demote"
    )

    work_on(promoted)
    assert held(raw, volume) == contents
    refused(run_cli("sync", source, server.url(volume), "--quiet"), volume, "PROMOTED", "demote it first")
    assert held(raw, volume) == contents


@in_one_kind
def test_what_cannot_be_promoted(server: Server, raw: Raw, volume: str, source: Path) -> None:
    url = server.url(volume)
    refused_json(run_cli("replica", "promote", url, "--yes", "--json", "--quiet"), "not-found", volume)
    opened = raw.open(volume, SIZE)
    refused(run_cli("replica", "promote", url, "--yes", "--quiet"), volume, "its first sync has not finished")
    raw.abort(opened.session)
    assert raw.state(volume) == "SYNCING"
    replicated(raw, source, volume, 1)
    refused(run_cli("replica", "promote", f"{url}@7", "--yes", "--quiet"), volume, "no generation 7")
    refused(run_cli("replica", "demote", url, "--discard", "--yes", "--quiet"), volume, "CONSISTENT")
    # Nobody is asked at a terminal, and nobody has said it.
    for words in (("promote", url), ("demote", url, "--discard")):
        refused(run_cli("replica", *words, "--quiet"), volume, "--yes", status=2)
    request = replicas.DemoteReplicaRequest(volume=volume, confirm=f"{volume} ")
    with pytest.raises(Refused, match="repeats") as caught:
        raw.call("Replicas/DemoteReplica", request, replicas.DemoteReplicaResponse)
    assert caught.value.reason == "INVALID_ARGUMENT"
    assert raw.state(volume) == "CONSISTENT"


def test_a_running_sync_is_fenced(server: Server, raw: Raw, volume: str, source: Path) -> None:
    contents = replicated(raw, source, volume)
    with running_sync(server, raw, source, volume) as syncing:
        promoted = Path(raw.promote(volume).path)
        done = finish(syncing)
    assert "promoted" in refused(done, volume, "demote")
    assert promoted.read_bytes() == contents[2] and held(raw, volume) == contents
    assert raw.state(volume) == "PROMOTED"
    assert [path.name for path in (server.pool / volume).glob("work*")] == [], "its work takes space"


@pytest.mark.parametrize("end", [Server.stop, Server.kill], ids=["stopped", "killed"])
def test_a_promotion_outlives_the_server(
    server: Server, raw: Raw, volume: str, source: Path, end: Callable[[Server], object]
) -> None:
    contents = replicated(raw, source, volume)
    promotion = raw.promote(volume, 1)
    content = work_on(Path(promotion.path))
    for _ in range(2):
        end(server)
        server.start()
    assert raw.state(volume) == "PROMOTED" and raw.show(volume).promotion == promotion
    assert raw.promote(volume, 1) == promotion
    assert Path(promotion.path).read_bytes() == content
    assert raw.demote(volume, keep_changes=True).generation == 3
    assert held(raw, volume) == {**contents, 3: content}


def test_no_room_for_a_copy_is_noticed_before_anything_ends(tmp_path: Path) -> None:
    size = 10 * MIB
    source = build(tmp_path / "large", size, [(0, noise(1, size))])
    with mounted("ext4", tmp_path, 20 * MIB) as mount:
        pool = mount / "pool"
        pool.mkdir()
        server = Server(pool, flags=("--keep-at-least", "last=1")).start()
        try:
            server.sync(source, "v")
            with Raw(server.address) as raw:
                session = raw.open("v", size, region_size=0).session
                raw.write(session, 0, noise(2, MIB))
                before = tree(pool)
                with pytest.raises(Refused, match=rf"has to be copied: {size} bytes, and \d+ are free") as caught:
                    raw.promote("v")
                assert caught.value.reason == "OUT_OF_SPACE" and "nothing was changed" in caught.value.line
                assert tree(pool) == before and raw.state("v") == "UPDATING"
                # The session goes on, to its commit.
                raw.write(session, MIB, noise(3, MIB))
                raw.commit("v", session, bytes(16))
                assert raw.read("v", 0, 0, 2 * MIB) == noise(2, MIB) + noise(3, MIB)
        finally:
            server.stop()


# --- a real file system -------------------------------------------------------------------------------------------


def run(*words: object) -> str:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


@contextlib.contextmanager
def mounted_image(image: Path, at: Path) -> Iterator[Path]:
    at.mkdir(exist_ok=True)
    run("mount", "-o", "loop", image, at)
    try:
        yield at
    finally:
        run("umount", at)


def test_a_promoted_file_system_is_used(server: Server, raw: Raw, volume: str, tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    (files / "kept").write_bytes(noise("kept", 300 * KIB))
    image = tmp_path / "volume.raw"
    run("mke2fs", "-q", "-t", "ext4", "-b", BLOCK, "-d", files, image, "16M")
    server.sync(image, volume)
    size, content = image.stat().st_size, image.read_bytes()

    promoted = Path(raw.promote(volume).path)
    run("e2fsck", "-f", "-n", promoted)
    with mounted_image(promoted, tmp_path / "mnt") as there:
        assert (there / "kept").read_bytes() == noise("kept", 300 * KIB)
        (there / "new").write_bytes(noise("new", MIB))
        os.sync()
        device = run("losetup", "--list", "--noheadings", "--output", "NAME", "--associated", promoted).strip()
        refused_json(demoting(server, volume, "--keep-changes"), "in-use", volume, f"{device} (loop device)", "unmount")
        assert raw.read(volume, 1, 0, size) == content
    run("e2fsck", "-f", "-n", promoted)
    changed = promoted.read_bytes()
    assert changed != content and raw.read(volume, 1, 0, size) == content

    assert ok("replica", "demote", server.url(volume), "--keep-changes", "--yes")["generation"] == 2
    assert held(raw, volume) == {1: content, 2: changed}
    # And once more: what was kept is a file system with both files.
    promoted = Path(raw.promote(volume).path)
    run("e2fsck", "-f", "-n", promoted)
    with mounted_image(promoted, tmp_path / "mnt") as there:
        assert sorted(path.name for path in there.iterdir() if path.is_file()) == ["kept", "new"]


# --- demote -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [2, 1], ids=["newest", "older"])
@pytest.mark.parametrize("fate", ["--keep-changes", "--discard"])
def test_a_promoted_replica_is_taken_back(
    server: Server, raw: Raw, volume: str, source: Path, number: int, fate: str
) -> None:
    contents = replicated(raw, source, volume)
    promotion = raw.promote(volume, number)
    changed = work_on(Path(promotion.path))
    report = ok("replica", "demote", server.url(volume), fate, "--yes")
    contents[3] = changed if fate == "--keep-changes" else contents[2]
    points = raw.points(volume)
    assert report == {
        "schema": 1, "volume": volume, "generation": 3, "commit_id": points[0].commit_id.hex(),
        "kept_changes": fate == "--keep-changes",
    }  # fmt: skip
    assert len({promotion.commit_id, *(point.commit_id for point in points)}) == 4, "an identity is there twice"
    assert held(raw, volume) == contents
    shown = raw.show(volume)
    assert raw.state(volume) == "CONSISTENT" and not shown.HasField("promotion")
    assert not Path(promotion.path).exists()

    # The next sync takes nothing for granted: what differs from generation 3 is sent, and nothing else.
    change(source, [(2 * REGION, noise("later", BLOCK))])
    content = source.read_bytes()
    differing = differing_blocks(content, contents[3])
    report = sync(server, source, volume)
    assert report["generation"] == 4 and report["regions"]["send"] == (fate == "--keep-changes")
    assert report["bytes"]["data_sent"] == sum(
        len(block) for at in differing if any(block := content[at * BLOCK : (at + 1) * BLOCK])
    )
    assert held(raw, volume) == {**contents, 4: content}


def test_what_is_in_use_is_not_taken_back(server: Server, raw: Raw, volume: str, source: Path) -> None:
    contents = replicated(raw, source, volume, 1)
    promoted = Path(raw.promote(volume).path)
    with loop_device(promoted) as device, pytest.raises(Refused, match=f"{device} .loop device.") as caught:
        raw.demote(volume, keep_changes=False)
    assert caught.value.reason == "IN_USE"
    with holding(promoted, os.O_RDWR) as pid:
        refused_json(demoting(server, volume, "--discard"), "in-use", volume, f"({pid})", "nothing was changed")
        with pytest.raises(Refused, match=rf"\({pid}\)"):
            raw.demote(volume, keep_changes=True)
    assert raw.state(volume) == "PROMOTED" and promoted.read_bytes() == contents[1]
    # Whoever only reads is in nobody's way.
    with holding(promoted, os.O_RDONLY):
        raw.demote(volume, keep_changes=True)
    assert held(raw, volume) == {1: contents[1], 2: contents[1]}


def test_a_promoted_file_that_has_grown(server: Server, raw: Raw, volume: str, source: Path) -> None:
    contents = replicated(raw, source, volume, 1)
    promoted = Path(raw.promote(volume).path)
    os.truncate(promoted, SIZE + 3 * REGION + 7)
    change(promoted, [(SIZE - 50, noise("over the old end", 100)), (SIZE + 3 * REGION, b"the end")])
    grown = promoted.read_bytes()
    raw.demote(volume, keep_changes=True)
    assert held(raw, volume) == {1: contents[1], 2: grown}
    assert raw.show(volume).size == len(grown)
    refused(run_cli("sync", source, server.url(volume), "--quiet"), volume, str(SIZE), "never shrinks")
    os.truncate(source, len(grown))
    sync(server, source, volume)
    assert held(raw, volume)[3] == source.read_bytes()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: os.truncate(path, SIZE - 1), "SIZE_MISMATCH"),
        (lambda path: os.truncate(path, 0), "SIZE_MISMATCH"),
        (Path.unlink, "NOT_FOUND"),
    ],
    ids=["shorter", "empty", "gone"],
)
def test_a_promoted_file_that_is_no_use_any_more(
    server: Server, raw: Raw, volume: str, source: Path, damage: Callable[[Path], None], reason: str
) -> None:
    contents = replicated(raw, source, volume, 1)
    damage(Path(raw.promote(volume).path))
    with pytest.raises(Refused, match="--discard") as caught:
        raw.demote(volume, keep_changes=True)
    assert caught.value.reason == reason and raw.state(volume) == "PROMOTED"
    raw.demote(volume, keep_changes=False)
    assert held(raw, volume) == {1: contents[1], 2: contents[1]}


# --- delete -------------------------------------------------------------------------------------------------------


@in_one_kind
def test_nothing_is_deleted_unless_it_is_meant(server: Server, raw: Raw, volume: str, source: Path) -> None:
    contents = replicated(raw, source, volume)
    uuid = raw.show(volume).replica_uuid
    before = tree(server.pool / volume)
    url = server.url(volume)
    refused_json(run_cli("replica", "delete", url, "--json", "--quiet"), "usage", volume, "--yes", status=2)
    # One generation cannot be deleted, and all of them are not meant.
    refused(run_cli("replica", "delete", f"{url}@1", "--yes", "--quiet"), volume, "generation 1", status=2)
    with on_terminal("replica", "delete", url, typing=True) as terminal:
        terminal.type(volume[:-1], after="Type the name")
        status, drawn = terminal.finish()
    assert status == 2 and "something else was typed" in " ".join(drawn.split())
    assert "all its recovery points" in drawn and "newest generation 2" in drawn
    assert tree(server.pool / volume) == before and held(raw, volume) == contents

    with on_terminal("replica", "delete", url, typing=True) as terminal:
        terminal.type(volume, after="Type the name")
        assert terminal.finish()[0] == 0
    assert not (server.pool / volume).exists() and not list(server.pool.glob(".deleted-*"))
    with pytest.raises(Refused) as caught:
        raw.show(volume)
    assert caught.value.reason == "NOT_FOUND"
    refused(run_cli("replica", "delete", url, "--yes", "--quiet"), volume, "no replica")
    # The name is free, and what comes under it now is another replica.
    assert replicated(raw, source, volume, 1) == held(raw, volume)
    assert raw.show(volume).replica_uuid != uuid
    report = ok("replica", "delete", url, "--yes")
    assert set(report) == {"schema", "volume", "deleted", "bytes_held"}
    assert (report["volume"], report["deleted"], report["bytes_held"] > 0) == (volume, True, True)


def test_what_is_in_use_is_not_deleted(server: Server, raw: Raw, volume: str, source: Path) -> None:
    contents = replicated(raw, source, volume, 1)
    with running_sync(server, raw, source, volume):
        with pytest.raises(Refused, match="open session") as caught:
            raw.delete(volume)
        assert caught.value.reason == "IN_USE" and raw.state(volume) == "UPDATING"
    raw.promote(volume)
    with pytest.raises(Refused, match=r"it is promoted.*demote it first") as caught:
        raw.delete(volume)
    assert caught.value.reason == "WRONG_STATE" and held(raw, volume) == contents


def test_what_is_left_of_a_deleted_replica_goes_with_the_next_start(server: Server) -> None:
    server.stop()
    grave = server.pool / ".deleted-0123"
    grave.mkdir()
    (grave / "image.raw").write_bytes(noise(1, MIB))
    server.start()
    assert not grave.exists()


# --- adopt --------------------------------------------------------------------------------------------------------


def planted(server: Server, volume: str, source: Path) -> Path:
    """An older state of the source as a seed: it lacks some, has some more, and some differs."""
    seed = server.pool / ".seeds" / f"{volume}.raw"
    shutil.copyfile(source, seed)
    change(
        seed,
        [
            (2 * REGION, noise("old", 2 * BLOCK)),
            (4 * REGION, noise("only here", REGION)),
            (7 * REGION, Hole(REGION)),
            (8 * REGION, bytes(BLOCK)),
            (SIZE - 100, noise("old end", 100)),
        ],
    )
    return seed


def test_an_adopted_image_is_compared(server: Server, raw: Raw, volume: str, source: Path) -> None:
    seed = planted(server, volume, source)
    expected = expect(Snapshot.of(source), Snapshot.of(seed), REGION, cached=False)
    report = ok("replica", "adopt", server.url(volume), "--seed", seed.name, "--region-size", REGION)
    assert report == {"schema": 1, "volume": volume, "size": SIZE, "region_size": REGION}
    assert not seed.exists()
    shown = server.show(volume)
    assert (shown["state"], shown["size"], shown["generation"], shown["path"]) == ("SYNCING", SIZE, 0, None)
    assert ok("plan", source, server.url(volume))["regions"] == expected.regions

    report = sync(server, source, volume)
    assert (report["generation"], report["regions"], report["results"]) == (1, expected.regions, expected.results)
    found = {name: report["bytes"][name] for name in expected.bytes()}
    assert found == expected.bytes()
    # Two blocks and the end; the region that was a hole; the block that was zeros.
    assert expected.data_sent == 2 * BLOCK + 100 + REGION + BLOCK
    assert held(raw, volume) == {1: source.read_bytes()}
    assert sync(server, source, volume)["bytes"]["data_sent"] == 0


@pytest.mark.parametrize("name", ["", "..", "../seed", "/etc/passwd", "a/b", ".hidden", "seed\0", "x" * 129])
def test_a_seed_is_a_name_and_never_a_path(server: Server, raw: Raw, volume: str, name: str) -> None:
    (server.pool / "seed").write_bytes(noise(1, REGION))
    with pytest.raises(Refused) as caught:
        raw.adopt(volume, name)
    assert caught.value.reason == "INVALID_ARGUMENT"
    with pytest.raises(Refused, match="no replica"):
        raw.show(volume)
    assert (server.pool / "seed").read_bytes() == noise(1, REGION)


def test_what_cannot_be_adopted(server: Server, raw: Raw, volume: str, source: Path, tmp_path: Path) -> None:
    seeds = server.pool / ".seeds"
    seed = planted(server, volume, source)
    (seeds / "link").symlink_to(seed)
    (seeds / "outside").symlink_to(source)
    (seeds / "directory").mkdir(exist_ok=True)
    (seeds / "empty").write_bytes(b"")
    (seeds / "twice").write_bytes(b"1")
    (seeds / "twice-again").hardlink_to(seeds / "twice")
    if not (seeds / "pipe").exists():
        os.mkfifo(seeds / "pipe")
    before = tree(server.pool)
    try:
        for name, reason in {
            "missing": "NOT_FOUND", "link": "UNSUPPORTED", "outside": "UNSUPPORTED", "directory": "UNSUPPORTED",
            "empty": "UNSUPPORTED", "twice": "UNSUPPORTED", "pipe": "UNSUPPORTED",
        }.items():  # fmt: skip
            with pytest.raises(Refused) as caught:
                raw.adopt(volume, name)
            assert caught.value.reason == reason, name
        with holding(seed, os.O_WRONLY) as pid, pytest.raises(Refused, match=rf"\({pid}\)") as caught:
            raw.adopt(volume, seed.name)
        assert caught.value.reason == "IN_USE"
        with loop_device(seed) as device, pytest.raises(Refused, match=f"{device} "):
            raw.adopt(volume, seed.name)
        assert tree(server.pool) == before, "nothing was made or changed"
    finally:
        for path in seeds.iterdir():
            if path != seed:
                path.rmdir() if path.is_dir() else path.unlink()
    raw.adopt(volume, seed.name)


def test_only_a_replica_without_anything_adopts(server: Server, raw: Raw, volume: str, source: Path) -> None:
    seed = planted(server, volume, source)
    session = raw.open(volume, SIZE).session
    with pytest.raises(Refused, match="holds data already") as caught:
        raw.adopt(volume, seed.name)
    raw.write(session, 0, noise(2, REGION))
    raw.abort(session)
    with pytest.raises(Refused, match="holds data already"):
        raw.adopt(volume, seed.name)
    # What it had is given up: then it may, with the region size it has.
    raw.abort(raw.open(volume, SIZE).session, discard=True)
    with pytest.raises(Refused) as caught:
        raw.adopt(volume, seed.name, region_size=2 * REGION)
    assert caught.value.reason == "REGION_SIZE_MISMATCH" and seed.exists()
    assert raw.adopt(volume, seed.name, region_size=0).region_size == REGION
    other = planted(server, f"{volume}-other", source)
    content = other.read_bytes()
    for state in ("SYNCING", "CONSISTENT"):
        assert raw.state(volume) == state
        with pytest.raises(Refused, match="delete the replica first") as caught:
            raw.adopt(volume, other.name)
        assert caught.value.reason == "WRONG_STATE" and other.read_bytes() == content
        if state == "SYNCING":
            assert replicated(raw, source, volume, 1) == held(raw, volume)
    other.unlink()


@in_one_kind
def test_an_adopted_image_of_another_size(server: Server, raw: Raw, volume: str, source: Path, tmp_path: Path) -> None:
    seed = planted(server, volume, source)
    raw.adopt(volume, seed.name)
    smaller = build(tmp_path / "smaller", SIZE - REGION, [(0, noise(1, REGION))])
    done = run_cli("sync", smaller, server.url(volume), "--grow", "--json", "--quiet")
    error = refused_json(done, "size-mismatch", volume, "never shrinks")
    assert (error["expected"], error["found"]) == (str(SIZE), str(SIZE - REGION))
    larger = tmp_path / "larger"
    shutil.copyfile(source, larger)
    os.truncate(larger, SIZE + REGION)
    refused_json(run_cli("sync", larger, server.url(volume), "--json", "--quiet"), "size-mismatch", volume, "--grow")
    assert raw.state(volume) == "SYNCING"
    report = sync(server, larger, volume, "--grow")
    # What was the short last block is a whole one now.
    assert report["bytes"]["data_sent"] == 2 * BLOCK + BLOCK + REGION + BLOCK
    assert held(raw, volume) == {1: larger.read_bytes()}


def unfinished(server: Server, volume: str) -> Path:
    """The image of a first sync."""
    (found,) = [path for name in ("work.img", "image.raw") if (path := server.pool / volume / name).exists()]
    return found


def test_a_first_sync_that_is_given_up_keeps_the_adopted_image(
    server: Server, raw: Raw, volume: str, source: Path
) -> None:
    seed = planted(server, volume, source)
    inode, content = seed.stat().st_ino, seed.read_bytes()
    raw.adopt(volume, seed.name)
    for _ in range(2):
        raw.abort(raw.open(volume, SIZE).session, discard=True)
        assert (unfinished(server, volume).stat().st_ino, unfinished(server, volume).read_bytes()) == (inode, content)
    server.kill()
    server.start()
    session = raw.open(volume, SIZE).session
    raw.write(session, 3 * REGION, noise("wrong", REGION))
    raw.abort(session, discard=True)
    assert unfinished(server, volume).stat().st_ino == inode
    # What the session had written stays with it, and is compared like everything else.
    assert sync(server, source, volume)["bytes"]["data_sent"] == 2 * BLOCK + 100 + 2 * REGION + BLOCK
    assert held(raw, volume) == {1: source.read_bytes()}


def test_a_full_disk_keeps_the_adopted_image(tmp_path: Path) -> None:
    size = 16 * MIB
    source = build(tmp_path / "large", size, [(0, noise(1, 12 * MIB))])
    with mounted("ext4", tmp_path, 20 * MIB) as mount:
        pool = mount / "pool"
        (pool / ".seeds").mkdir(parents=True)
        build(pool / ".seeds/old", size, [(0, noise(1, 4 * MIB))])
        (mount / "in-the-way").write_bytes(noise(2, 8 * MIB))
        server = Server(pool).start()
        try:
            with Raw(server.address) as raw:
                raw.adopt("v", "old", region_size=0)
                inode = unfinished(server, "v").stat().st_ino
                refused_json(run_cli("sync", source, server.url("v"), "--json", "--quiet"), "out-of-space", "v", "free")
                image = unfinished(server, "v")
                assert image.stat().st_ino == inode and image.read_bytes()[: 4 * MIB] == noise(1, 4 * MIB)
                (mount / "in-the-way").unlink()
                report = server.sync(source, "v")
                assert report["generation"] == 1 and report["results"]["equal"] >= 4
                assert raw.read("v", 1, 0, size) == source.read_bytes()
        finally:
            server.stop()


# --- looking ------------------------------------------------------------------------------------------------------


def test_what_programs_are_told(server: Server, raw: Raw, volume: str, source: Path) -> None:
    replicated(raw, source, volume)
    raw.promote(volume, 1)
    shown = server.show(volume)
    assert set(shown) == {
        "schema", "volume", "pool", "uuid", "state", "size", "region_size", "generation", "commit_id", "committed_at",
        "bytes_held", "path", "kind", "session_client", "promotion", "scrub", "notice",
    }  # fmt: skip
    kind = "clones" if raw.show(volume).kind == "clones" else "journal"
    assert (shown["kind"], shown["state"], shown["size"], shown["session_client"]) == (kind, "PROMOTED", SIZE, None)
    listed = ok("replica", "list", server.address)
    (found,) = [one for one in listed["replicas"] if one["volume"] == volume]
    assert {**found, "schema": 1} == shown
    # A journal has one whole image; where points are clones each has its own.
    points = ok("replica", "points", server.url(volume))["points"]
    assert [point["number"] for point in points] == [2, 1]
    for point in points:
        assert set(point) == {
            "number", "commit_id", "committed_at", "size", "bytes_held", "path", "kept_by", "problem",
        }  # fmt: skip
        assert (point["size"], point["problem"]) == (SIZE, None)
    assert points[0]["path"] == shown["path"] and Path(shown["path"]).read_bytes() == source.read_bytes()
    assert bool(points[1]["path"]) == (kind == "clones")
    words = run_cli("replica", "show", server.url(volume)).stdout
    assert re.search(
        rf"^  promoted +generation 1, .* ago: {re.escape(shown['promotion']['path'])}$", words, re.MULTILINE
    )
