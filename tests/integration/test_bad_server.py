"""A server that cannot serve says why in one line and touches nothing; a source in use is refused naming the holder."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ServerFactory
from tests.images import MIB, build, noise
from tests.support import Finished, Server, refused, refused_json, run_cli, tree


def run_server(pool: Path, *flags: str, listen: str = "grpc://127.0.0.1:0") -> Finished:
    """Run a server that must not start."""
    words = Server(pool, listen=listen, flags=flags).words
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert not done.stdout, done.stdout
    return Finished(done.returncode, done.stdout, done.stderr)


def refuse_server(done: Finished, *words: str) -> None:
    """One line, status 1."""
    refused(done, *words, program="blockferry-server")


# --- pools ----------------------------------------------------------------------------------------------------------


def test_a_pool_that_does_not_exist(tmp_path: Path) -> None:
    pool = tmp_path / "missing"
    refuse_server(run_server(pool), str(pool), "no such directory", "create it")
    assert not pool.exists()


def test_a_pool_that_is_a_file(tmp_path: Path) -> None:
    pool = tmp_path / "file"
    pool.write_bytes(b"precious")
    refuse_server(run_server(pool), str(pool), "it is not a directory", "name an existing directory")
    assert pool.read_bytes() == b"precious"


@pytest.fixture
def read_only_directory(tmp_path: Path) -> Iterator[Path]:
    """A directory that cannot be written: a read-only mount for root, whom permissions do not stop."""
    directory = tmp_path / "read-only"
    directory.mkdir()
    if os.geteuid() != 0:
        directory.chmod(0o555)
        yield directory
        directory.chmod(0o755)
        return
    subprocess.run(["mount", "--bind", str(directory), str(directory)], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(directory)], check=True)
        yield directory
    finally:
        subprocess.run(["umount", str(directory)], check=True)


def test_a_pool_that_is_read_only(read_only_directory: Path) -> None:
    cause = "read-only file system" if os.geteuid() == 0 else "permission denied"
    refuse_server(run_server(read_only_directory), str(read_only_directory), cause)
    assert tree(read_only_directory) == {}


def test_a_pool_that_another_server_uses(start_server: ServerFactory) -> None:
    first = start_server()
    refuse_server(run_server(first.pool), str(first.pool), "another blockferry-server has it open", "stop that server")
    # The first one is none the worse for it.
    assert run_cli("replica", "list", first.address).status == 0


# --- addresses ------------------------------------------------------------------------------------------------------


def test_an_address_that_is_taken(start_server: ServerFactory, tmp_path: Path) -> None:
    address = start_server().address
    refuse_server(run_server(tmp_path, listen=address), address, "the address is taken", "choose another port")


@pytest.mark.parametrize("listen", ["127.0.0.1:9870", "http://127.0.0.1:9870", "grpc://127.0.0.1", "grpc://:0"])
def test_an_address_that_is_none(tmp_path: Path, listen: str) -> None:
    refuse_server(run_server(tmp_path, listen=listen), "is not a usable address", "write grpc://HOST:PORT")


def test_plaintext_for_other_machines_is_refused(tmp_path: Path) -> None:
    refuse_server(run_server(tmp_path, listen="grpc://0.0.0.0:0"), "without TLS", "--insecure")


# --- sources in use -------------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A source of 2 MiB."""
    return build(tmp_path / "source.img", 2 * MIB, [(0, noise("held", MIB))])


def check_held(server: Server, volume: str, source: Path, holder: str) -> None:
    """A sync is refused naming the holder and changes nothing; `--live` syncs all the same."""
    before = tree(server.pool)
    done = run_cli("sync", source, server.url(volume), "--json")
    error = refused_json(done, "in-use", str(source), holder, "--live")
    assert error["volume"] == str(source)
    assert tree(server.pool) == before
    assert holder in " ".join(map(str, run_cli("volume", "show", source, "--json").report["writers"]))
    server.sync(source, volume, "--live")
    assert server.image(volume).read_bytes() == source.read_bytes()


def test_a_source_opened_for_writing(server: Server, volume: str, source: Path) -> None:
    with source.open("r+b") as file:
        holder = subprocess.Popen(["sleep", "600"], stdin=file)
    try:
        check_held(server, volume, source, f"sleep ({holder.pid})")
    finally:
        holder.terminate()
        holder.wait()
    assert server.sync(source, volume)["generation"] == 2


def test_a_source_opened_for_reading_is_free(server: Server, volume: str, source: Path) -> None:
    with source.open("rb"):
        assert server.sync(source, volume)["generation"] == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="attaching a loop device needs root")
def test_a_source_attached_to_a_loop_device(server: Server, volume: str, source: Path) -> None:
    done = subprocess.run(["losetup", "-f", "--show", str(source)], capture_output=True, text=True, check=True)
    device = done.stdout.strip()
    try:
        check_held(server, volume, source, f"{device} (loop device)")
    finally:
        subprocess.run(["losetup", "-d", device], check=True)
    assert server.sync(source, volume)["generation"] == 2
