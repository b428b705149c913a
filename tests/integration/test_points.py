"""Recovery points of a real server: which are kept and why, what they hold, and that they can be relied on.

Proves that retention keeps exactly what the source's and the server's rules say, that points can be read while syncs go
on and are not dropped while they are, that an unchanged destination is not read again and a touched one is, that rot is
found by range and repaired by the next sync, and that a point is a source like any other.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from blockferry.v1 import replicas_pb2 as replicas
from blockferry.v1 import replication_pb2 as pb

from tests.conftest import ServerFactory
from tests.fault.raw import Raw, received
from tests.images import KIB, MIB, Hole, build, change, noise
from tests.support import Report, Server, finish, ok, own_directory, run_cli, start_cli, until

SIZE = 8 * MIB
LEASE = 0.2
"""Seconds for which a point that was read is kept."""


def points(server: Server, volume: str) -> list[Report]:
    """`replica points --json`, newest first."""
    found: list[Report] = ok("replica", "points", server.url(volume))["points"]
    return found


def numbers(server: Server, volume: str) -> list[int]:
    """The generations that exist, newest first."""
    return [point["number"] for point in points(server, volume)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return build(tmp_path / "source", SIZE, [(0, noise(1, SIZE))])


@pytest.fixture(scope="module")
def server(xfs_pool_root: Path) -> Iterator[Server]:
    """Tests restart it as they like, and use volumes of their own."""
    pool = own_directory(xfs_pool_root, "pool-of-points")
    server = Server(pool, flags=("--lease", str(LEASE), "--keep-at-least", "last=1")).start()
    yield server
    server.stop()


# --- retention --------------------------------------------------------------------------------------------------------

WHOLE = ["newest", "last", "hourly", "daily", "weekly", "monthly", "yearly"]


@pytest.mark.parametrize(
    ("floor", "keep", "expected"),
    [
        ((), (), {5: ["newest", "last"], 4: ["last"], 3: ["last"]}),
        (("last=1",), ("last=4",), {5: ["newest", "last"], 4: ["last"], 3: ["last"], 2: ["last"]}),
        (("last=1",), ("last=0",), {5: ["newest", "last"]}),
        (("last=0",), ("last=0",), {5: ["newest"]}),
        # The source cannot go below the server's floor.
        (("last=3",), ("last=1",), {5: ["newest", "last"], 4: ["last"], 3: ["last"]}),
        (("daily=1",), ("last=2",), {5: ["newest", "last", "daily"], 4: ["last"]}),
        (("last=0",), ("hourly=1,daily=1,weekly=1,monthly=1,yearly=1,last=1",), {5: WHOLE}),
    ],
)
def test_rules_of_the_source_and_the_server(
    start_cloning_server: ServerFactory,
    source: Path,
    floor: tuple[str, ...],
    keep: tuple[str, ...],
    expected: dict[int, list[str]],
) -> None:
    server = start_cloning_server(flags=("--lease", str(LEASE), *(("--keep-at-least", *floor) if floor else ())))
    for number in range(1, 6):
        # Said once: the replica remembers.
        flags = ("--keep", *keep) if keep and number == 2 else ()
        assert server.sync(source, "v", *flags)["generation"] == number
    assert {point["number"]: point["kept_by"] for point in points(server, "v")} == expected
    server.kill()
    server.start()
    assert server.sync(source, "v")["generation"] == 6
    assert numbers(server, "v") == [number + 1 for number in expected]


def test_new_rules_take_effect_with_the_sync_that_brings_them(server: Server, volume: str, source: Path) -> None:
    for _ in range(3):
        server.sync(source, volume)
    assert numbers(server, volume) == [3, 2, 1]
    server.sync(source, volume, "--keep", "last=2")
    assert numbers(server, volume) == [4, 3]
    files = sorted(path.name for path in (server.pool / volume).glob("*.img"))
    assert files == sorted(f"{point['commit_id']}.img" for point in points(server, volume))


def test_what_a_point_alone_holds(server: Server, volume: str, source: Path) -> None:
    server.sync(source, volume, "--keep", "last=4")
    assert [point["bytes_held"] for point in points(server, volume)] == [SIZE]
    change(source, [(MIB, noise(2, 64 * KIB)), (3 * MIB, noise(3, 128 * KIB))])
    server.sync(source, volume)
    assert [point["bytes_held"] for point in points(server, volume)] == [192 * KIB, 192 * KIB]
    change(source, [(MIB, noise(4, 64 * KIB)), (5 * MIB, Hole(MIB))])
    server.sync(source, volume)
    # Of generation 2 only the first change is its own: the second lives on in 3. The hole freed nothing that 2 has not.
    assert [point["bytes_held"] for point in points(server, volume)] == [64 * KIB, 64 * KIB, 192 * KIB]
    server.sync(source, volume)
    assert [point["bytes_held"] for point in points(server, volume)] == [0, 0, 64 * KIB, 192 * KIB]
    for point in points(server, volume):
        assert (point["size"], Path(point["path"]).stat().st_size) == (SIZE, SIZE)
        assert point["commit_id"] in point["path"]


def test_a_point_whose_image_is_missing_is_listed_as_that(server: Server, volume: str, source: Path) -> None:
    server.sync(source, volume, "--keep", "last=3")
    for number in (2, 3):
        change(source, [(number * MIB, noise(number, MIB))])
        server.sync(source, volume)
    before = points(server, volume)
    assert [point["problem"] for point in before] == [None] * 3
    Path(before[1]["path"]).unlink()

    # What the missing one shared with a neighbour is that neighbour's alone now, as soon as XFS has got round to it.
    expected = [
        {**before[0], "bytes_held": 2 * MIB},
        {**before[1], "bytes_held": None, "problem": "its image is missing"},
        {**before[2], "bytes_held": 2 * MIB},
    ]
    until(lambda: points(server, volume) == expected, f"the points are {expected}")
    words = run_cli("replica", "points", server.url(volume))
    lines = words.stdout.splitlines()
    assert words.status == 0 and [line.split()[0] for line in lines] == ["NUMBER", "3", "2", "1", "generation"]
    assert "unknown" in lines[2]
    assert lines[4] == f"generation 2: its image is missing ({before[1]['path']})"

    # The others go on, and retention gives it up like any other.
    for left in ([4, 3, 2], [5, 4, 3]):
        server.sync(source, volume)
        assert numbers(server, volume) == left
    assert [point["problem"] for point in points(server, volume)] == [None] * 3


# --- reading ----------------------------------------------------------------------------------------------------------


def test_points_are_read_while_a_sync_goes_on(server: Server, volume: str, source: Path, tmp_path: Path) -> None:
    copies = {}
    for number in (1, 2):
        change(source, [(number * MIB, noise(10 + number, MIB))])
        server.sync(source, volume, "--keep", "last=9")
        copies[number] = tmp_path / f"copy-{number}"
        copies[number].write_bytes(source.read_bytes())
    change(source, [(0, noise(20, SIZE))])
    syncing = start_cli("sync", source, server.url(volume), "--quiet", "--json", "--bwlimit", "1M")
    with Raw(server.address) as raw:
        until(lambda: raw.state(volume) == "UPDATING", "the sync has begun")
        for number, copy in copies.items():
            assert run_cli("verify", copy, f"{server.url(volume)}@{number}").status == 0
        found = ok("verify", copies[2], server.url(volume))
        assert found["bytes"]["compared"] == SIZE
        assert raw.state(volume) == "UPDATING" and syncing.poll() is None
    assert finish(syncing).report["generation"] == 3
    for number, copy in copies.items():
        assert run_cli("verify", copy, f"{server.url(volume)}@{number}").status == 0
    assert run_cli("verify", source, server.url(volume)).status == 0


def test_a_point_in_use_is_not_dropped(server: Server, volume: str, tmp_path: Path) -> None:
    size = 32 * MIB
    source = build(tmp_path / "large", size, [(0, noise(1, size))])
    server.sync(source, volume, "--keep", "last=1")
    first = source.read_bytes()
    # More than fits into the windows and buffers in between: the server goes on reading while we do not.
    with Raw(server.address, [("grpc.http2.lookahead_bytes", 4096), ("grpc.http2.bdp_probe", 0)]) as raw:
        request = replicas.ReadRegionsRequest(point=pb.PointRef(volume=volume, number=1))
        request.ranges.add(offset=0, length=size)
        reading = raw.stream("Replicas/ReadRegions", request, replicas.ReadRegionsResponse)
        start = next(reading)
        for number in (2, 3):
            change(source, [(number * MIB, noise(number, MIB))])
            server.sync(source, volume)
        assert {point["number"]: point["kept_by"] for point in points(server, volume)} == {
            3: ["newest", "last"],
            1: ["in use"],
        }
        parts = [start, *received(reading)]
    assert b"".join(part.data or bytes(part.zeros) for part in parts) == first
    # It stays for a lease after its last use, and goes with the commit after that.
    until(lambda: {p["number"]: p["kept_by"] for p in points(server, volume)}[1] == [], "the reader is forgotten")
    server.sync(source, volume)
    assert numbers(server, volume) == [4]


# --- what is known without reading ------------------------------------------------------------------------------------


def _nothing(server: Server, volume: str) -> None:
    """Leave everything alone."""


def _restart(server: Server, volume: str) -> None:
    server.stop()
    server.start()


def _kill(server: Server, volume: str) -> None:
    server.kill()
    server.start()


def _touch(server: Server, volume: str) -> None:
    os.utime(server.image(volume))


def _rewrite(server: Server, volume: str) -> None:
    """The same bytes and the same modification time: only the change time tells."""
    path = server.image(volume)
    before = path.stat()
    change(path, [(0, path.read_bytes()[:4096])])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _copy(server: Server, volume: str) -> None:
    """Another file with the same content under the name."""
    path = server.image(volume)
    other = path.with_suffix(".other")
    other.write_bytes(path.read_bytes())
    other.rename(path)


def _touch_between(server: Server, volume: str) -> None:
    """While nobody was looking."""
    path = server.image(volume)
    server.stop()
    os.utime(path)
    server.start()


def _digests_damaged(server: Server, volume: str) -> None:
    path = server.image(volume).with_suffix(".digests")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _digests_gone(server: Server, volume: str) -> None:
    server.image(volume).with_suffix(".digests").unlink()


@pytest.mark.parametrize(
    ("happening", "read"),
    [
        (_nothing, 0),
        (_restart, 0),
        (_kill, SIZE),
        (_touch, SIZE),
        (_rewrite, SIZE),
        (_copy, SIZE),
        (_touch_between, SIZE),
        (_digests_damaged, SIZE),
        (_digests_gone, SIZE),
    ],
)
def test_an_unchanged_destination_is_not_read(
    server: Server, volume: str, source: Path, happening: Callable[[Server, str], None], read: int
) -> None:
    server.sync(source, volume)
    happening(server, volume)
    for expected in (read, 0):
        report = server.sync(source, volume)
        assert report["bytes"]["destination_read"] == expected
        assert report["results"] == {"zero": 0, "equal": 8, "changed": 0}
        assert report["bytes"]["data_sent"] == 0
    # And what is known follows what changes.
    change(source, [(3 * MIB + 8 * KIB, noise(2, 4 * KIB)), (6 * MIB, Hole(MIB))])
    changed = server.sync(source, volume)
    assert changed["bytes"]["destination_written"] == 4 * KIB
    assert server.sync(source, volume)["bytes"]["destination_read"] == 0
    assert server.image(volume).read_bytes() == source.read_bytes()


def test_an_interrupted_session_leaves_nothing_to_believe(server: Server, volume: str, source: Path) -> None:
    server.sync(source, volume)
    with Raw(server.address) as raw:
        session = raw.open(volume, SIZE, region_size=0).session
        raw.write(session, 0, noise(9, MIB))
        raw.abort(session)
    report = server.sync(source, volume)
    assert report["bytes"]["data_sent"] == MIB
    assert server.image(volume).read_bytes() == source.read_bytes()


# --- rot --------------------------------------------------------------------------------------------------------------


def _flip(path: Path, *offsets: int) -> None:
    """Change single bytes as a failing disk does, without the server's knowledge; the change time cannot be helped."""
    with path.open("r+b", buffering=0) as image:
        for offset in offsets:
            image.seek(offset)
            (byte,) = image.read(1)
            image.seek(offset)
            image.write(bytes([byte ^ 1]))


def test_rot_is_found_by_range_and_repaired(server: Server, volume: str, tmp_path: Path) -> None:
    # The last region is short, and so is its last block.
    size = SIZE - 300 * KIB - 100
    source = build(tmp_path / "odd", size, [(0, noise(1, size)), (4 * MIB, Hole(MIB))])
    server.sync(source, volume)
    sound = ok("replica", "verify", server.url(volume))
    assert (sound["outcome"], sound["ranges"], sound["next"]) == ("sound", [], None)
    assert sound["bytes"] == {"checked": size - MIB, "rotten": 0, "unrecorded": 0}

    _flip(server.image(volume), 0, MIB - 1, 2 * MIB, 3 * MIB + 77, size - 1)
    done = run_cli("replica", "verify", server.url(volume), "--json", "--quiet")
    assert done.status == 3 and not done.stderr
    assert done.report["outcome"] == "rotten"
    assert done.report["ranges"] == [
        {"offset": 0, "length": MIB},
        {"offset": 2 * MIB, "length": 2 * MIB},
        {"offset": 7 * MIB, "length": size - 7 * MIB},
    ]
    assert done.report["bytes"] == {"checked": size - MIB, "rotten": size - 4 * MIB, "unrecorded": 0}
    words = run_cli("replica", "verify", server.url(volume))
    assert words.status == 3 and f"rotten at {2 * MIB}, {2 * MIB} bytes" in words.stdout
    assert "sync again to repair it" in words.stdout and words.stdout.splitlines()[-1][2:] == done.report["next"]
    # The newest one by its number is the newest one all the same.
    assert (
        run_cli("replica", "verify", f"{server.url(volume)}@1").stdout.splitlines()[1:]
        == (words.stdout.splitlines()[1:])
    )

    report = server.sync(source, volume)
    assert (report["generation"], report["results"]["changed"]) == (2, 4)
    assert report["bytes"]["destination_written"] == 4 * 4 * KIB + (size - size // (4 * KIB) * 4 * KIB)
    assert server.image(volume).read_bytes() == source.read_bytes()
    assert ok("replica", "verify", server.url(volume))["outcome"] == "sound"
    # The older one stays what it became, and says so; no sync can change it, and none is recommended.
    older = run_cli("replica", "verify", f"{server.url(volume)}@1")
    assert older.status == 3 and "sync again" not in older.stdout
    advice = older.stdout.splitlines()[-1]
    assert advice.startswith("  no sync repairs generation 1: ") and "replica points" in advice
    server.sync(source, volume)
    again = run_cli("replica", "verify", f"{server.url(volume)}@1", "--json", "--quiet")
    assert (again.status, again.report["next"]) == (3, advice[2:])
    assert again.report["ranges"] == done.report["ranges"]


def test_rot_that_left_no_trace_is_found_by_verify_and_then_repaired(server: Server, volume: str, source: Path) -> None:
    """A disk that loses bits does not touch the change time: the cache of digests is believed until verify has read."""
    server.sync(source, volume)
    image = server.image(volume)
    server.stop()
    _flip(image, 5 * MIB)
    clean = server.pool / volume / "clean.json"
    # As if the change time had stayed: the stamp of the clean shutdown is that of the image as it is now.
    stamp = image.stat()
    text = clean.read_text()
    before = text.split('"ctime_ns":')[1].split("}")[0]
    clean.write_text(text.replace(before, str(stamp.st_ctime_ns)))
    server.start()
    assert server.sync(source, volume)["bytes"]["destination_read"] == 0
    done = run_cli("replica", "verify", server.url(volume), "--json", "--quiet")
    assert (done.status, done.report["ranges"]) == (3, [{"offset": 5 * MIB, "length": MIB}])
    report = server.sync(source, volume)
    assert (report["bytes"]["destination_read"] >= SIZE, report["results"]["changed"]) == (True, 1)
    assert server.image(volume).read_bytes() == source.read_bytes()


def test_what_was_a_hole_and_is_none_any_more_cannot_be_vouched_for(
    server: Server, volume: str, tmp_path: Path
) -> None:
    source = build(tmp_path / "sparse", SIZE, [(0, noise(1, MIB))])
    server.sync(source, volume)
    change(server.image(volume), [(4 * MIB, noise(2, 4 * KIB))])
    found = run_cli("replica", "verify", server.url(volume), "--json", "--quiet")
    assert found.report["bytes"] == {"checked": 2 * MIB, "rotten": 0, "unrecorded": MIB}
    report = server.sync(source, volume)
    assert report["regions"] == {"skip": 6, "unmap": 1, "send": 0, "compare": 1}
    assert server.image(volume).read_bytes() == source.read_bytes()


# --- failback ---------------------------------------------------------------------------------------------------------


def test_a_point_is_a_source(start_cloning_server: ServerFactory, server: Server, volume: str, source: Path) -> None:
    other = start_cloning_server()
    server.sync(source, volume, "--keep", "last=9")
    first = source.read_bytes()
    change(source, [(2 * MIB, noise(2, 64 * KIB)), (6 * MIB, Hole(MIB))])
    server.sync(source, volume)

    origin = server.url(volume)
    planned = ok("plan", f"{origin}@1", other.url("back"))
    assert planned["regions"] == {"skip": 0, "unmap": 0, "send": 8, "compare": 0}
    report = ok("sync", f"{origin}@1", other.url("back"))
    assert report["bytes"]["source_read"] == SIZE and report["source"] == f"{origin}@1"
    assert other.image("back").read_bytes() == first
    assert run_cli("verify", f"{origin}@1", other.url("back")).status == 0

    differing = run_cli("verify", f"{origin}@1", origin, "--json", "--quiet")
    assert (differing.status, differing.report["ranges"]) == (
        3,
        [{"offset": 2 * MIB, "length": 64 * KIB}, {"offset": 6 * MIB, "length": MIB}],
    )
    # On to the newest one: what differs, and nothing else.
    assert ok("plan", origin, other.url("back"))["regions"] == {"skip": 0, "unmap": 1, "send": 0, "compare": 7}
    report = ok("sync", origin, other.url("back"))
    assert (report["bytes"]["data_sent"], report["bytes"]["unmapped"]) == (64 * KIB, MIB)
    assert other.image("back").read_bytes() == source.read_bytes()
    assert run_cli("verify", source, other.url("back")).status == 0


def test_a_point_that_is_gone_is_no_source(server: Server, volume: str, source: Path) -> None:
    for _ in range(2):
        server.sync(source, volume, "--keep", "last=1")
    for words in (("verify", source), ("plan",), ("sync",)):
        address = f"{server.url(volume)}@1"
        done = run_cli(*words, address, *(() if words[0] == "verify" else (server.url("elsewhere"),)), "--quiet")
        assert done.status == 1 and "no generation 1" in done.stderr and "replica points" in done.stderr
