"""Every command and every flag does what it says: each test sees a result that would be another one without it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from tests.conftest import ServerFactory
from tests.images import BLOCK, KIB, MIB, Hole, Zeros, build, change, noise
from tests.support import Server, ok, refused, refused_json, run_cli, tree, until


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """4 MiB: data, a hole, zeros as data, a hole."""
    return build(tmp_path / "source.img", 4 * MIB, [(0, noise("source", MIB)), (2 * MIB, Zeros(MIB))])


# --- flags of every command -----------------------------------------------------------------------------------------

COMMANDS = (
    ("plan", "SOURCE", "ADDRESS/VOLUME"),
    ("sync", "SOURCE", "ADDRESS/VOLUME"),
    ("verify", "SOURCE", "ADDRESS/VOLUME"),
    ("volume", "show", "SOURCE"),
    ("replica", "list", "ADDRESS"),
    ("replica", "show", "ADDRESS/VOLUME"),
)


def filled(words: tuple[str, ...], source: Path, server: Server, volume: str, address: str = "") -> list[str]:
    """A command with its places filled in."""
    found = {"SOURCE": str(source), "ADDRESS": address or server.address, "VOLUME": volume}
    for name, value in found.items():
        words = tuple(word.replace(name, value) for word in words)
    return list(words)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_json_quiet_and_words_for_people(server: Server, volume: str, source: Path, words: tuple[str, ...]) -> None:
    server.sync(source, volume)
    command = filled(words, source, server, volume)
    as_json = run_cli(*command, "--json")
    assert as_json.status == 0
    assert as_json.report["schema"] == 1
    quiet = run_cli(*command, "--quiet")
    assert (quiet.status, quiet.stdout, quiet.stderr) == (0, "", "")
    plain = run_cli(*command)
    assert plain.status == 0
    shown = source if words[0] == "volume" else volume
    assert str(shown) in plain.stdout
    with pytest.raises(json.JSONDecodeError):
        json.loads(plain.stdout)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_insecure(server: Server, volume: str, source: Path, words: tuple[str, ...]) -> None:
    server.sync(source, volume)
    # This machine too, but not an address that says so.
    address = server.address.replace("127.0.0.1", "0.0.0.0")
    command = filled(words, source, server, volume, address)
    if words[0] != "volume":
        refused(run_cli(*command), address, "without TLS", "--insecure")
    else:
        command[-1] = f"{address}/{volume}"
    assert ok(*command, "--insecure")["schema"] == 1


# --- sync -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "region_size"),
    [((), MIB), (("--region-size", "64K"), 64 * KIB), (("--region-size=16M",), 16 * MIB)],
)
def test_region_size(server: Server, volume: str, source: Path, flags: tuple[str, ...], region_size: int) -> None:
    report = server.sync(source, volume, *flags)
    assert report["region_size"] == server.show(volume)["region_size"] == region_size
    assert sum(report["regions"].values()) == -(-4 * MIB // region_size)


def test_bwlimit(server: Server, volume: str, tmp_path: Path) -> None:
    source = build(tmp_path / "full.img", 8 * MIB, [(0, noise("full", 8 * MIB))])
    report = server.sync(source, volume, "--bwlimit", "4M")
    assert report["bytes"]["data_sent"] == 8 * MIB
    # Two seconds' worth, less the burst a limiter allows: no sleep ends early, so this bound cannot fail by chance.
    assert report["seconds"]["transfer"] > 1.0


def test_grow(server: Server, volume: str, source: Path) -> None:
    server.sync(source, volume)
    os.truncate(source, 6 * MIB)
    change(source, [(5 * MIB, noise("end", BLOCK))])
    assert run_cli("sync", source, server.url(volume)).status == 1
    report = server.sync(source, volume, "--grow")
    assert report["volume_size"] == server.show(volume)["size"] == 6 * MIB
    assert report["regions"] == {"skip": 3, "unmap": 0, "send": 2, "compare": 1}
    assert report["bytes"]["data_sent"] == BLOCK
    assert server.image(volume).read_bytes() == source.read_bytes()


def test_live(server: Server, volume: str, source: Path) -> None:
    with source.open("r+b"):
        refused(run_cli("sync", source, server.url(volume)), str(source), "--live")
        assert server.sync(source, volume, "--live")["generation"] == 1


def test_state_dir(server: Server, volume: str, source: Path, tmp_path: Path) -> None:
    state = tmp_path / "deep" / "state"
    report = server.sync(source, volume, "--state-dir", state)
    (record,) = (path for path in state.rglob("*") if path.is_file())
    assert record.name == f"{server.show(volume)['uuid']}.json"
    kept = json.loads(record.read_text())
    assert (kept["commit_id"], kept["confirmed"]) == (report["commit_id"], True)
    # Without the flag it goes elsewhere.
    before = tree(tmp_path / "deep")
    server.sync(source, volume)
    assert tree(tmp_path / "deep") == before


def test_a_state_dir_that_cannot_be_written_stops_before_the_commit(
    server: Server, volume: str, source: Path, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.touch()
    done = run_cli("sync", source, server.url(volume), "--state-dir", file, "--json", "--quiet")
    refused_json(done, "not-found", "cannot keep the commit id", str(file), "check the path")
    found = server.show(volume)
    assert (found["generation"], found["session_client"]) == (0, None)


def test_a_file_uri_and_a_unix_socket(start_server: ServerFactory, volume: str, source: Path) -> None:
    # The name of a socket is at most 107 bytes: relative to where both sides run, it is short.
    directory = os.open(source.parent, os.O_RDONLY)
    try:
        socket = f"grpc+unix:///proc/{os.getpid()}/fd/{directory}/socket"
        server = start_server(listen=socket)
        assert server.address == socket
        report = ok("sync", f"file://{source}", f"{socket}?volume={volume}")
        assert report["generation"] == 1
        assert Path(ok("replica", "show", f"{socket}?volume={volume}")["path"]).read_bytes() == source.read_bytes()
    finally:
        os.close(directory)


def test_a_committed_generation_is_a_source_too(
    server: Server, start_server: ServerFactory, volume: str, source: Path
) -> None:
    server.sync(source, volume)
    third = start_server()
    report = ok("sync", server.url(f"{volume}@1"), third.url("copy"))
    assert report["regions"] == {"skip": 3, "unmap": 0, "send": 1, "compare": 0}
    assert third.image("copy").read_bytes() == source.read_bytes()


# --- plan -----------------------------------------------------------------------------------------------------------


def test_plan_of_a_replica_that_does_not_exist_is_a_full_sync(server: Server, volume: str, source: Path) -> None:
    before = tree(server.pool)
    planned = ok("plan", source, server.url(volume), "--region-size", "2M")
    assert planned["outcome"] == "planned"
    assert planned["regions"] == {"skip": 0, "unmap": 0, "send": 2, "compare": 0}
    assert planned["region_size"] == 2 * MIB
    assert planned["bytes"]["source_read"] == 4 * MIB
    assert planned["bytes"]["destination_read"] == 0
    assert (planned["bytes"]["data_sent_min"], planned["bytes"]["data_sent_max"]) == (0, 4 * MIB)
    assert tree(server.pool) == before


def test_plan_says_what_sync_then_does_and_writes_nothing(server: Server, volume: str, source: Path) -> None:
    server.sync(source, volume)
    change(source, [(0, Hole(MIB)), (MIB, noise("new", BLOCK)), (3 * MIB, noise("new", MIB))])
    before = tree(server.pool)
    planned = ok("plan", source, server.url(volume))
    assert planned["regions"] == {"skip": 0, "unmap": 1, "send": 3, "compare": 0}
    assert planned["bytes"]["unmapped_max"] == MIB
    assert tree(server.pool) == before
    found = server.show(volume)
    assert (found["state"], found["session_client"]) == ("CONSISTENT", None)
    report = server.sync(source, volume)
    assert report["regions"] == planned["regions"]
    # A plan counts regions; a sync leaves out the holes inside them.
    assert planned["bytes"]["source_read"] == 3 * MIB
    assert report["bytes"]["source_read"] == 2 * MIB + BLOCK
    assert planned["bytes"]["data_sent_min"] <= report["bytes"]["data_sent"] <= planned["bytes"]["data_sent_max"]


def test_plan_with_grow(server: Server, volume: str, source: Path) -> None:
    server.sync(source, volume)
    os.truncate(source, 6 * MIB)
    done = run_cli("plan", source, server.url(volume), "--json")
    refused_json(done, "size-mismatch", str(4 * MIB), str(6 * MIB), "--grow")
    planned = ok("plan", source, server.url(volume), "--grow")
    assert planned["volume_size"] == 6 * MIB
    assert planned["regions"] == {"skip": 4, "unmap": 0, "send": 1, "compare": 1}


@pytest.mark.parametrize("flag", ["--bwlimit", "--live", "--state-dir"])
def test_plan_does_not_take_flags_that_mean_nothing_to_it(source: Path, flag: str) -> None:
    refused(run_cli("plan", source, "grpc://127.0.0.1:1/v", flag), flag, status=2)


# --- verify ---------------------------------------------------------------------------------------------------------

EDITS = [(0, b"!"), (5 * BLOCK - 1, b"!!"), (MIB - 1, b"!!"), (3 * MIB + 7 * BLOCK, b"!")]
RANGES = [(0, BLOCK), (4 * BLOCK, 2 * BLOCK), (MIB - BLOCK, 2 * BLOCK), (3 * MIB + 7 * BLOCK, BLOCK)]


@pytest.mark.parametrize("left", ["image", "replica"])
@pytest.mark.parametrize("right", ["image", "replica"])
@pytest.mark.parametrize("differ", [False, True])
def test_verify_any_two(
    server: Server, volume: str, source: Path, tmp_path: Path, left: str, right: str, differ: bool
) -> None:
    other = build(tmp_path / "other.img", 4 * MIB, [(0, noise("source", MIB))])
    if differ:
        change(other, EDITS)
    server.sync(source, f"{volume}-a", "--region-size", "64K")
    server.sync(other, f"{volume}-b")
    a = source if left == "image" else server.url(f"{volume}-a")
    b = other if right == "image" else server.url(f"{volume}-b")
    before = tree(server.pool)
    done = run_cli("verify", a, b, "--json", "--quiet")
    assert tree(server.pool) == before
    assert done.status == (3 if differ else 0)
    assert done.stderr == ""
    report = done.report
    assert report["outcome"] == ("different" if differ else "equal")
    wanted = RANGES if differ else []
    assert [(found["offset"], found["length"]) for found in report["ranges"]] == wanted
    assert report["bytes"]["different"] == sum(length for _, length in wanted)
    assert report["bytes"]["compared"] + report["bytes"]["proven_zero"] == 4 * MIB
    plain = run_cli("verify", a, b)
    assert plain.status == (3 if differ else 0)
    assert [line for line in plain.stdout.splitlines() if "differs at" in line] == [
        f"  differs at {offset}, {length} bytes" for offset, length in wanted
    ]


def test_verify_sees_what_changed_behind_the_servers_back(server: Server, volume: str, source: Path) -> None:
    server.sync(source, volume)
    assert run_cli("verify", source, server.url(volume)).status == 0
    change(server.image(volume), [(9 * BLOCK + 5, b"rot")])
    done = run_cli("verify", source, server.url(volume), "--json", "--quiet")
    assert done.status == 3
    assert done.report["ranges"] == [{"offset": 9 * BLOCK, "length": BLOCK}]


def test_verify_of_odd_sizes_reports_a_short_last_block(tmp_path: Path) -> None:
    size = MIB + 5
    one = build(tmp_path / "one.img", size, [(0, noise("odd", size))])
    other = build(tmp_path / "other.img", size, [(0, noise("odd", size)), (size - 1, b"!")])
    done = run_cli("verify", one, other, "--json", "--quiet")
    assert (done.status, done.report["ranges"]) == (3, [{"offset": MIB, "length": 5}])


def test_verify_that_cannot_compare(server: Server, volume: str, source: Path, tmp_path: Path) -> None:
    missing = run_cli("verify", source, server.url(volume), "--json", "--quiet")
    refused_json(missing, "not-found", volume, "there is no replica")
    other = build(tmp_path / "other.img", 5 * MIB)
    sizes = run_cli("verify", source, other, "--json", "--quiet")
    refused_json(sizes, "size-mismatch", str(4 * MIB), str(5 * MIB))


# --- looking --------------------------------------------------------------------------------------------------------


def test_volume_show_of_an_image(source: Path) -> None:
    found = ok("volume", "show", source)
    assert found["uri"] == str(source)
    assert (found["size"], found["regions"], found["allocated_regions"]) == (4 * MIB, 4, 2)
    assert (found["allocated_bytes"], found["runs"]) == (2 * MIB, 2)
    assert (found["map"], found["writers"]) == ("exact", [])


def test_volume_show_of_a_replica(server: Server, volume: str, source: Path) -> None:
    report = server.sync(source, volume)
    found = ok("volume", "show", server.url(volume))
    # The zeros of the source are no data here.
    assert (found["size"], found["allocated_bytes"], found["runs"]) == (4 * MIB, MIB, 1)
    assert found["zeroing"] == "read-only"
    assert report["commit_id"] in found["snapshot_id"]


def test_replica_show_follows_its_life(server: Server, volume: str, source: Path) -> None:
    refused_json(run_cli("replica", "show", server.url(volume), "--json"), "not-found", volume, "replica list")
    began = time.time()
    first = server.sync(source, volume)
    found = server.show(volume)
    assert found["volume"] == volume
    assert (found["state"], found["generation"], found["commit_id"]) == ("CONSISTENT", 1, first["commit_id"])
    assert (found["size"], found["region_size"], found["pool"]) == (4 * MIB, MIB, "main")
    assert (found["kind"], found["session_client"], found["promotion"]) in (
        ("clones", None, None),
        ("journal", None, None),
    )
    assert found["bytes_held"] >= MIB
    assert found["committed_at"] >= time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(began))
    assert Path(found["path"]).is_relative_to(server.pool / volume)
    second = server.sync(source, volume)
    again = server.show(volume)
    assert (again["generation"], again["commit_id"]) == (2, second["commit_id"])
    assert again["uuid"] == found["uuid"]
    assert first["commit_id"] != second["commit_id"]


def test_replica_list(start_server: ServerFactory, source: Path) -> None:
    server = start_server()
    assert ok("replica", "list", server.address)["replicas"] == []
    assert "holds no replicas" in run_cli("replica", "list", server.address).stdout
    for name in ("b", "a", "c"):
        server.sync(source, name)
    found = ok("replica", "list", server.address)["replicas"]
    assert [(replica["volume"], replica["generation"]) for replica in found] == [("a", 1), ("b", 1), ("c", 1)]
    shown = server.show("b")
    assert {key: value for key, value in shown.items() if key != "schema"} == found[1]
    lines = run_cli("replica", "list", server.address).stdout.splitlines()
    assert [line.split()[:3] for line in lines] == [
        ["VOLUME", "STATE", "GENERATION"], ["a", "CONSISTENT", "1"], ["b", "CONSISTENT", "1"], ["c", "CONSISTENT", "1"],
    ]  # fmt: skip


def test_a_server_that_is_told_to_stop_keeps_everything(start_server: ServerFactory, source: Path) -> None:
    server = start_server()
    report = server.sync(source, "kept")
    assert server.stop() == 0
    server.start()
    assert server.show("kept")["commit_id"] == report["commit_id"]
    assert server.image("kept").read_bytes() == source.read_bytes()
    assert server.sync(source, "kept")["bytes"]["data_sent"] == 0


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_server_whose_starter_closed_a_standard_descriptor_serves_and_ends_cleanly(
    tmp_path: Path, source: Path, number: int
) -> None:
    """The event loop aborts a process in which one of its own descriptors took such a number."""
    (tmp_path / "pool").mkdir()
    # Where nothing is read from stdout the address must be known; the name of a socket must not be long.
    directory = tempfile.mkdtemp()
    socket = Path(directory, "socket")
    words = Server(tmp_path / "pool", listen=f"grpc+unix://{socket}").words
    process = subprocess.Popen(
        ["sh", "-c", f'exec "$@" {number}>&-', "sh", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        until(socket.exists, "the server listens")
        assert ok("sync", source, f"grpc+unix://{socket}?volume=v")["generation"] == 1
        process.terminate()
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(directory)
    assert (process.returncode, b"Assertion" in stderr) == (0, False)
    assert stdout.startswith(b"listening on") is (number != 1)
