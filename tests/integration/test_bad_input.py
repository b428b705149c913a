"""Bad input: one clear line on stderr with the cause and the next step, the right exit status, the same as JSON, and
nothing changed at the destination."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ServerFactory
from tests.images import KIB, MIB, build, change, noise
from tests.support import Finished, Server, finish, refused, refused_json, run_cli, start_cli, tree, until

CLOSED_PORT = "grpc://127.0.0.1:1"
"""An address at which no server answers: the port is reserved (tcpmux) and nobody uses it."""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A good source of 2 MiB."""
    return build(tmp_path / "source.img", 2 * MIB, [(0, noise("source", 2 * MIB))])


def refuse_sync(server: Server, source: object, destination: str, *flags: object) -> Finished:
    """A sync that fails and changes nothing in the pool."""
    before = tree(server.pool)
    done = run_cli("sync", source, destination, *flags, "--json")
    assert tree(server.pool) == before
    return done


# --- sources --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "code", "cause"),
    [
        ("missing", "not-found", "no such file or directory"),
        ("directory", "unsupported", "it is a directory"),
        ("fifo", "unsupported", "it is not a regular file"),
        ("empty", "invalid-argument", "empty"),
        ("below-a-file", "not-found", "not a directory"),
    ],
)
def test_a_source_that_is_no_image(
    server: Server, volume: str, tmp_path: Path, kind: str, code: str, cause: str
) -> None:
    path = tmp_path / kind
    match kind:
        case "directory":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "empty":
            path.touch()
        case "below-a-file":
            path.touch()
            path = path / "image"
    done = refuse_sync(server, path, server.url(volume))
    error = refused_json(done, code, str(path), cause)
    assert error["volume"] == str(path)
    assert not (server.pool / volume).exists()


def test_a_source_that_may_not_be_read(server: Server, volume: str, tmp_path: Path) -> None:
    path = build(tmp_path / "secret.img", MIB)
    path.chmod(0)
    before = tree(server.pool)
    done = run_cli("sync", path, server.url(volume), "--json", unprivileged=True)
    error = refused_json(done, "unreadable", str(path), "permission denied", "check the permissions")
    assert error["volume"] == str(path)
    assert tree(server.pool) == before
    # Permission is all that was missing.
    path.chmod(0o444)
    assert run_cli("volume", "show", path, unprivileged=True).status == 0


# --- destinations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "a/b",
        "a/../b",
        ".",
        "..",
        ".hidden",
        "-dash",
        "a b",
        "a%2Fb",
        "%2e%2e",
        "a%00",
        "v\u00f6l",
        "x" * 129,
        "x" * 300,
    ],
)
def test_a_volume_name_that_is_not_allowed(server: Server, source: Path, name: str) -> None:
    done = refuse_sync(server, source, server.url(name))
    refused_json(done, "invalid-argument", "is not a volume name", "1 to 128 letters", "choose another name")


def test_a_volume_name_that_is_as_long_as_possible(server: Server, source: Path) -> None:
    assert server.sync(source, "x" * 128)["generation"] == 1


@pytest.mark.parametrize("end", ["", "/"])
def test_a_destination_without_a_volume(server: Server, source: Path, end: str) -> None:
    done = refuse_sync(server, source, server.address + end)
    refused_json(done, "invalid-argument", "it names no volume", "grpc://HOST:PORT/VOLUME")


@pytest.mark.parametrize(
    "address",
    [
        "nonsense",
        "",
        "/some/path",
        "http://127.0.0.1:9870/v",
        "grpc://127.0.0.1/v",
        "grpc://:9870/v",
        "grpc://127.0.0.1:port/v",
        "grpc://127.0.0.1:99999/v",
        "grpc://user@127.0.0.1:9870/v",
        "grpc://127.0.0.1:9870/v?x=1",
        "grpc://127.0.0.1:9870/v#x",
        "grpc://127.0.0.1:9870/v@0",
        "grpc://127.0.0.1:9870/v@one",
        "grpc+unix:///?volume=v",
        "grpc+unix://host/socket?volume=v",
        "grpc+unix:///socket?other=v",
    ],
)
def test_a_destination_that_is_no_address(source: Path, address: str) -> None:
    done = run_cli("sync", source, address, "--json")
    refused_json(done, "invalid-argument", "is not a usable address", "write grpc://HOST:PORT/VOLUME")


def test_a_generation_cannot_be_written(server: Server, volume: str, source: Path) -> None:
    server.sync(source, volume)
    done = refuse_sync(server, source, server.url(f"{volume}@1"))
    refused_json(done, "invalid-argument", "a committed generation never changes", "leave out the @number")


@pytest.mark.parametrize(
    "words",
    [("sync", "SOURCE", "ADDRESS/v"), ("plan", "SOURCE", "ADDRESS/v"), ("verify", "SOURCE", "ADDRESS/v"),
     ("replica", "list", "ADDRESS"), ("replica", "show", "ADDRESS/v"), ("volume", "show", "ADDRESS/v")],
)  # fmt: skip
def test_no_server_at_the_address(source: Path, words: tuple[str, ...]) -> None:
    replaced = [word.replace("SOURCE", str(source)).replace("ADDRESS", CLOSED_PORT) for word in words]
    done = run_cli(*replaced, "--json")
    refused_json(done, "unavailable", CLOSED_PORT, "no server answers there", "check that blockferry-server runs there")


def test_plaintext_to_another_machine_is_refused_before_anything_is_sent(source: Path) -> None:
    # An address of the documentation range: it would not answer, so only a refusal comes back at once.
    done = run_cli("sync", source, "grpc://192.0.2.1:9870/v", "--json", timeout=10)
    refused_json(done, "unsupported", "192.0.2.1:9870", "without TLS", "--insecure")


# --- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2 * MIB + 1, 3 * MIB])
def test_a_larger_source_needs_grow(server: Server, volume: str, source: Path, size: int) -> None:
    server.sync(source, volume)
    os.truncate(source, size)
    change(source, [(size - 1, b"!")])
    done = refuse_sync(server, source, server.url(volume))
    error = refused_json(done, "size-mismatch", str(2 * MIB), str(size), "--grow")
    assert (error["volume"], error["expected"], error["found"]) == (volume, str(2 * MIB), str(size))
    server.sync(source, volume, "--grow")
    assert server.show(volume)["size"] == size
    assert server.image(volume).read_bytes() == source.read_bytes()


@pytest.mark.parametrize("flags", [(), ("--grow",)])
def test_a_smaller_source_is_always_refused(server: Server, volume: str, source: Path, flags: tuple[str, ...]) -> None:
    server.sync(source, volume)
    os.truncate(source, MIB)
    done = refuse_sync(server, source, server.url(volume), *flags)
    refused_json(done, "size-mismatch", str(2 * MIB), str(MIB), "a replica never shrinks")


def test_another_region_size_than_the_replica_has(server: Server, volume: str, source: Path) -> None:
    server.sync(source, volume, "--region-size", "64K")
    done = refuse_sync(server, source, server.url(volume), "--region-size", "128K")
    error = refused_json(done, "region-size-mismatch", str(64 * KIB), str(128 * KIB), "leave --region-size out")
    assert error["volume"] == volume
    # Naming the replica's own is no contradiction.
    assert server.sync(source, volume, "--region-size", "64K")["region_size"] == 64 * KIB


@pytest.mark.parametrize(
    "flags",
    [("--region-size", value) for value in ("0", "1", "3M", "32K", "65537", "32M", "1X", "-1M", "")]
    + [("--bwlimit", value) for value in ("0", "-1", "fast", "1.5M", "")],
)
def test_a_size_that_is_not_usable_is_a_usage_error(
    server: Server, volume: str, source: Path, flags: tuple[str, str]
) -> None:
    done = refuse_sync(server, source, server.url(volume), f"{flags[0]}={flags[1]}")
    refused_json(done, "usage", flags[0], "see blockferry sync --help", status=2)


@pytest.mark.parametrize(
    "words",
    [(), ("ferry",), ("sync",), ("sync", "one"), ("sync", "one", "two", "three"), ("replica",), ("replica", "eat"),
     ("plan", "--bwlimit", "1M", "one", "two"), ("verify", "one"), ("sync", "one", "two", "--unknown")],
)  # fmt: skip
def test_usage_errors_are_one_line_too(words: tuple[str, ...]) -> None:
    refused(run_cli(*words), "--help", status=2)


# --- things that change while a sync runs ---------------------------------------------------------------------------


def start_slow_sync(server: Server, volume: str, source: Path, rate: str = "2M") -> subprocess.Popen[str]:
    """A sync that has written a MiB, and has seconds to go."""
    before = server.bytes_written()
    process = start_cli("sync", source, server.url(volume), "--bwlimit", rate, "--json", "--quiet")
    until(lambda: server.bytes_written() >= before + MIB, "the sync has written something")
    assert process.poll() is None, "the sync was too quick"
    return process


@pytest.fixture
def slow_source(tmp_path: Path) -> Path:
    """16 MiB of data: eight seconds at 2 MiB/s, so that every event comes in the middle."""
    return build(tmp_path / "slow.img", 16 * MIB, [(0, noise("slow", 16 * MIB))])


def test_a_server_that_dies_half_way(start_server: ServerFactory, volume: str, slow_source: Path) -> None:
    server = start_server()
    process = start_slow_sync(server, volume, slow_source)
    server.kill()
    refused_json(finish(process), "unavailable", server.address, "run this again")
    server.start()
    assert server.sync(slow_source, volume)["generation"] == 1
    assert server.image(volume).read_bytes() == slow_source.read_bytes()


def test_a_server_that_dies_half_way_through_an_update(
    start_cloning_server: ServerFactory, volume: str, slow_source: Path
) -> None:
    server = start_cloning_server()
    server.sync(slow_source, volume)
    old = slow_source.read_bytes()
    change(slow_source, [(0, noise("new", 16 * MIB))])
    process = start_slow_sync(server, volume, slow_source)
    server.kill()
    refused_json(finish(process), "unavailable", server.address, "run this again")
    server.start()
    check_first_generation(server, volume, old)
    assert server.sync(slow_source, volume)["generation"] == 2
    assert server.image(volume).read_bytes() == slow_source.read_bytes()


def check_first_generation(server: Server, volume: str, content: bytes) -> None:
    """The first generation is the newest, nobody writes, and its image has these bytes."""
    found = server.show(volume)
    assert (found["generation"], found["state"], found["session_client"]) == (1, "CONSISTENT", None)
    assert Path(found["path"]).read_bytes() == content


SHRINKING = [
    # All of it is in buffers when it shrinks: noticed at the end. Or most of it is still to be read: noticed there.
    (8 * MIB, "4M"),
    (48 * MIB, "16M"),
]


def shrink(server: Server, volume: str, source: Path, rate: str) -> None:
    """Cut a source off while it is read; the sync must notice."""
    size = source.stat().st_size
    process = start_slow_sync(server, volume, source, rate)
    os.truncate(source, 5 * MIB)
    error = refused_json(finish(process), "source-changed", str(source), str(size), str(5 * MIB), "snapshot")
    assert error["volume"] == str(source)
    if size > 32 * MIB:
        assert error["offset"] >= 8 * MIB
        assert error["offset"] + error["length"] <= size


@pytest.mark.parametrize(("size", "rate"), SHRINKING)
def test_a_source_that_shrinks_while_it_is_read(
    server: Server, volume: str, tmp_path: Path, size: int, rate: str
) -> None:
    source = build(tmp_path / "shrinks.img", size, [(0, noise("old", size))])
    shrink(server, volume, source, rate)
    found = server.show(volume)
    assert (found["generation"], found["state"], found["path"]) == (0, "SYNCING", None)
    assert found["session_client"] is None


@pytest.mark.parametrize(("size", "rate"), SHRINKING)
def test_a_source_that_shrinks_during_an_update(
    start_cloning_server: ServerFactory, volume: str, tmp_path: Path, size: int, rate: str
) -> None:
    server = start_cloning_server()
    source = build(tmp_path / "shrinks.img", size, [(0, noise("old", size))])
    old = source.read_bytes()
    server.sync(source, volume)
    change(source, [(0, noise("new", size))])
    shrink(server, volume, source, rate)
    check_first_generation(server, volume, old)


@pytest.mark.parametrize(("name", "number", "status"), [("SIGINT", 2, 130), ("SIGTERM", 15, 143)])
def test_an_interrupted_sync_ends_its_session(
    server: Server, volume: str, slow_source: Path, name: str, number: int, status: int
) -> None:
    process = start_slow_sync(server, volume, slow_source)
    process.send_signal(number)
    done = finish(process, timeout=20)
    refused(done, f"interrupted by {name}", "nothing was committed", "run it again", status=status)
    found = server.show(volume)
    assert (found["generation"], found["state"], found["session_client"]) == (0, "SYNCING", None)
    # At once: nobody waits for a lease to run out.
    assert server.sync(slow_source, volume)["generation"] == 1
    assert server.image(volume).read_bytes() == slow_source.read_bytes()


def test_a_second_writer_is_refused_while_the_first_one_works(
    server: Server, volume: str, slow_source: Path, source: Path
) -> None:
    first = start_slow_sync(server, volume, slow_source, "4M")
    other = build(source, 16 * MIB)
    error = refused_json(run_cli("sync", other, server.url(volume), "--json"), "in-use", volume, "has a writer already")
    assert f"process {first.pid}" in error["cause"]
    assert finish(first).status == 0
    assert server.image(volume).read_bytes() == slow_source.read_bytes()
