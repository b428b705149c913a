"""blockferry-rehydrate as people use it: real processes, real sources that come and go, clients of others."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from blockferry.common.regions import BLOCK_SIZE
from blockferry.common.volumes import NbdVolume

from tests.conftest import ServerFactory
from tests.fault.proxy import proxied
from tests.filesystems import Unavailable
from tests.images import KIB, MIB, build, noise
from tests.nbd import nbdkit
from tests.processes import loop_device
from tests.rehydrators import Rehydrator, left, rehydrating, wait_for_status
from tests.support import Server, ok, refused, run_cli

SIZE = 24 * MIB + 700
PIECES = [(0, noise(1, 5 * MIB)), (9 * MIB, noise(2, 300 * KIB)), (20 * MIB + 512, noise(3, 4 * MIB))]
B = BLOCK_SIZE


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the replicas are made of."""
    return build(tmp_path_factory.mktemp("source") / "vm.raw", SIZE, PIECES)


@pytest.fixture(scope="module")
def content(source: Path) -> bytes:
    return source.read_bytes()


@pytest.fixture(scope="module")
def replica(server: Server, source: Path) -> str:
    """A replica of it."""
    server.sync(source, "vm")
    return server.url("vm")


@pytest.fixture(autouse=True)
def _none_is_left() -> Iterator[None]:
    yield
    for one in list(Rehydrator.running):
        one.kill()


def qemu_io(uri: str, *commands: str) -> str:
    """qemu-io on an export, which must succeed."""
    words = [word for command in commands for word in ("-c", command)]
    done = subprocess.run(["qemu-io", "-f", "raw", *words, uri], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "fail" not in done.stdout.lower(), done.stdout + done.stderr
    return done.stdout


async def test_from_a_replica_to_a_primary_of_ones_own(tmp_path: Path, replica: str, content: bytes) -> None:
    """Used at once, filled behind, used when the source is gone, and then alone."""
    disk = Rehydrator(tmp_path / "disk", replica, flags=["--bwlimit", "2M"]).start()
    guest = await NbdVolume.open(disk.uri, writable=True)
    buffer = bytearray(B)
    await guest.read_into(20 * MIB + B, memoryview(buffer))
    assert buffer == content[20 * MIB + B :][:B]
    await guest.write([(9 * MIB + 5, b"of the guest"), (0, noise(9, B))])
    await guest.flush()
    expected = bytearray(content)
    expected[9 * MIB + 5 : 9 * MIB + 17], expected[:B] = b"of the guest", noise(9, B)
    shown = disk.show()
    assert shown["state"] == "hydrating" and shown["demand"]["demands"] >= 2
    assert 0 < left(disk) < SIZE and shown["size"] == SIZE
    assert shown["snapshot_id"].startswith("commit:")
    await guest.close()
    assert disk.stop() == 0

    # Resumed, with what was written, by the same words.
    disk = Rehydrator(tmp_path / "disk", replica).start().hydrated()
    shown = disk.show()
    assert (shown["state"], shown["percent"], shown["data_left"]) == ("complete", 100.0, 0)
    assert shown["sources"][0]["connected"] is False
    done = run_cli("rehydration", "watch", disk.state, "--quiet")
    assert (done.status, done.stderr) == (0, "")
    qemu_io(disk.uri, f"read -P {content[5 * B]} {5 * B} 1")
    assert disk.stop() == 0
    assert disk.content() == expected


def test_a_disk_is_complete_without_its_source(
    tmp_path: Path, start_server: ServerFactory, source: Path, content: bytes
) -> None:
    server = start_server()
    server.sync(source, "vm")
    disk = Rehydrator(tmp_path / "disk", server.url("vm")).start().hydrated()
    assert disk.stop() == 0
    server.stop()
    again = Rehydrator(tmp_path / "disk", server.url("vm")).start().hydrated()
    done = subprocess.run(["nbdcopy", again.uri, "-"], capture_output=True, check=True)
    assert hashlib.sha256(done.stdout).digest() == hashlib.sha256(content).digest()
    assert again.show()["fetched"] == 0
    assert again.stop() == 0


async def test_a_source_that_goes_away_and_returns(
    tmp_path: Path, server: Server, replica: str, content: bytes
) -> None:
    """What is hydrated is served all the while; what is not waits, fails after the bound, and works again."""
    with proxied(server.address) as proxy:
        flags = ["--source-timeout", "1s", "--bwlimit", "64K"]
        disk = Rehydrator(tmp_path / "disk", f"{proxy.address}/vm", flags=flags).start()
        guest = await NbdVolume.open(disk.uri, writable=True)
        buffer = bytearray(B)
        await guest.read_into(0, memoryview(buffer))
        assert buffer == content[:B]
        proxy.refusing = True
        proxy.cut()
        await guest.read_into(0, memoryview(buffer))
        await guest.write([(3 * MIB, noise(5, B))])
        await guest.flush()
        with pytest.raises(Exception, match=r"(?i)input/output error|cannot read"):
            await guest.read_into(21 * MIB, memoryview(buffer))
        wait_for_status(disk, "held-up")
        assert "cannot reach" in disk.show()["problem"] or "lost the connection" in disk.show()["problem"]
        before = disk.content()
        assert not any(before[21 * MIB : 22 * MIB])
        proxy.refusing = False
        wait_for_status(disk, "hydrating")
        await guest.read_into(21 * MIB, memoryview(buffer))
        assert buffer == content[21 * MIB :][:B]
        await guest.read_into(3 * MIB, memoryview(buffer))
        assert buffer == noise(5, B)
        await guest.close()
        assert disk.stop() == 0


def test_another_source_stands_in(tmp_path: Path, start_server: ServerFactory, source: Path, content: bytes) -> None:
    """Two servers with the same generation: a pool and its copy. One dies in the middle."""
    one = start_server()
    one.sync(source, "vm")
    other = start_server()
    # The same commit id at another site: the pool's directory travels.
    other.stop()
    subprocess.run(["cp", "-a", "--reflink=auto", str(one.pool / "vm"), str(other.pool / "vm")], check=True)
    other.start()
    flags = ["--bwlimit", "1M"]
    disk = Rehydrator(tmp_path / "disk", one.url("vm"), other.url("vm"), flags=flags).start()
    qemu_io(disk.uri, f"read -P {content[5]} 5 1")
    one.kill()
    qemu_io(disk.uri, f"read -P {content[21 * MIB]} {21 * MIB} 1")
    shown = disk.show()
    assert [bool(found["problem"]) for found in shown["sources"]] == [True, False]
    disk.kill()
    faster = Rehydrator(tmp_path / "disk", one.url("vm"), other.url("vm")).start().hydrated()
    assert faster.stop() == 0
    assert disk.content() == content


def test_sources_must_be_the_same(tmp_path: Path, start_server: ServerFactory, source: Path, replica: str) -> None:
    other = start_server()
    other.sync(source, "vm")
    disk = Rehydrator(tmp_path / "disk", replica, other.url("vm"))
    refused(disk.refuse(), "is another snapshot", program="blockferry-rehydrate")
    assert not Path(disk.primary).exists()
    # The same when it is resumed, with one that has something else.
    with rehydrating(tmp_path / "disk", replica, flags=["--bwlimit", "1"]):
        pass
    refused(Rehydrator(tmp_path / "disk", other.url("vm")).refuse(), "does not have", program="blockferry-rehydrate")


def test_the_generation_that_was_begun_with_is_found_again(
    tmp_path: Path, start_server: ServerFactory, source: Path, content: bytes
) -> None:
    """The source is synced again meanwhile: what is rehydrated stays what it was."""
    server = start_server(flags=("--keep-at-least", "last=3"))
    server.sync(source, "vm")
    with rehydrating(tmp_path / "disk", server.url("vm"), flags=["--bwlimit", "1"]):
        pass
    changed = build(tmp_path / "changed.raw", SIZE, [(0, noise(8, MIB))])
    server.sync(changed, "vm")
    disk = Rehydrator(tmp_path / "disk", server.url("vm")).start().hydrated()
    assert disk.stop() == 0
    assert disk.content() == content


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_primary_and_its_map_belong_together(tmp_path: Path, replica: str) -> None:
    with rehydrating(tmp_path / "disk", replica, flags=["--bwlimit", "1"]) as disk:
        other = Rehydrator(tmp_path / "other", replica, primary=disk.primary)
        refused(other.refuse(), "exists already", "--overwrite", program="blockferry-rehydrate")
        same = Rehydrator(tmp_path / "disk", replica)
        same.socket = tmp_path / "other.sock"
        refused(same.refuse(), "another blockferry-rehydrate works with it", program="blockferry-rehydrate")
    image = Path(disk.primary)
    copy = tmp_path / "copy.raw"
    subprocess.run(["cp", "--sparse=always", str(image), str(copy)], check=True)
    foreign = Rehydrator(tmp_path / "disk", replica, primary=copy)
    refused(foreign.refuse(), "is not what the map in --state is about", program="blockferry-rehydrate")
    image.rename(tmp_path / "elsewhere.raw")
    gone = Rehydrator(tmp_path / "disk", replica)
    refused(gone.refuse(), "no such file", program="blockferry-rehydrate")
    moved = Rehydrator(tmp_path / "disk", replica, primary=tmp_path / "elsewhere.raw")
    with open(moved.primary, "r+b"):
        refused(moved.refuse(), "is in use", program="blockferry-rehydrate")
    assert moved.start().stop() == 0


def test_a_damaged_map_is_refused(tmp_path: Path, replica: str) -> None:
    with rehydrating(tmp_path / "disk", replica, flags=["--bwlimit", "1"]) as disk:
        qemu_io(disk.uri, f"write -P 7 {8 * B} 4k", "flush")
    path = disk.state / "hydration.map"
    whole = path.read_bytes()
    image = disk.content()
    for position in (3, len(whole) // 2, len(whole) - 2):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        refused(disk.refuse(), "hydration.map is damaged", program="blockferry-rehydrate")
    path.write_bytes(b"")
    refused(disk.refuse(), "hydration.map is damaged", program="blockferry-rehydrate")
    path.unlink()
    refused(disk.refuse(), "exists already", program="blockferry-rehydrate")
    assert disk.content() == image
    path.write_bytes(whole)
    disk.start()
    qemu_io(disk.uri, f"read -P 7 {8 * B} 4k")
    assert disk.stop() == 0


def test_beginning_anew_on_an_image(tmp_path: Path, replica: str, content: bytes) -> None:
    old = tmp_path / "old.raw"
    old.write_bytes(noise(4, MIB))
    refused(
        Rehydrator(tmp_path / "disk", replica, primary=old).refuse(), "exists already", program="blockferry-rehydrate"
    )
    assert old.read_bytes() == noise(4, MIB)
    disk = Rehydrator(tmp_path / "disk", replica, primary=old, flags=["--overwrite"]).start().hydrated()
    assert disk.stop() == 0 and old.read_bytes() == content


def test_a_device_must_be_empty_or_given_up(tmp_path: Path, replica: str, content: bytes) -> None:
    backing = build(tmp_path / "backing.raw", 32 * MIB, [(10 * MIB, noise(6, MIB)), (31 * MIB, noise(7, B))])
    try:
        with loop_device(backing) as device:
            refused(
                Rehydrator(tmp_path / "disk", replica, primary=device).refuse(),
                "would be overwritten", "it holds data", program="blockferry-rehydrate",
            )  # fmt: skip
            disk = Rehydrator(tmp_path / "disk", replica, primary=device, flags=["--overwrite"]).start().hydrated()
            assert disk.show()["size"] == SIZE
            assert disk.stop() == 0
            with open(device, "rb") as file:
                assert file.read(SIZE) == content
                file.seek(31 * MIB)
                # What lies behind is somebody else's.
                assert file.read(B) == noise(7, B)
    except Unavailable as error:
        pytest.skip(f"no loop device: {error}")


def test_an_export_as_primary(tmp_path: Path, replica: str, content: bytes) -> None:
    with nbdkit(tmp_path, "memory", str(32 * MIB)) as export:
        disk = Rehydrator(tmp_path / "disk", replica, primary=export.uri).start()
        qemu_io(disk.uri, f"read -P {content[5]} 5 1", f"write -P 9 {12 * MIB} 64k", "flush")
        disk.hydrated()
        qemu_io(disk.uri, f"read -P 9 {12 * MIB} 64k", f"read -P 0 {13 * MIB} 1M")
        assert disk.stop() == 0
        done = subprocess.run(["nbdcopy", export.uri, "-"], capture_output=True, check=True)
    expected = bytearray(content)
    expected[12 * MIB : 12 * MIB + 64 * KIB] = b"\x09" * (64 * KIB)
    assert done.stdout[:SIZE] == expected


def test_a_source_must_not_change(tmp_path: Path, source: Path) -> None:
    disk = Rehydrator(tmp_path / "disk", str(source))
    refused(disk.refuse(), "is no snapshot", program="blockferry-rehydrate")
    nowhere = Rehydrator(tmp_path / "disk", "grpc://127.0.0.1:1/vm")
    refused(nowhere.refuse(), "cannot reach", program="blockferry-rehydrate")
    assert not Path(disk.primary).exists()


# --- looking at it ----------------------------------------------------------------------------------------------------


def test_what_it_says_as_json(tmp_path: Path, replica: str) -> None:
    disk = Rehydrator(tmp_path / "disk", replica, flags=["--json", "--export", "vm"])
    disk._process = disk._popen(stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    Rehydrator.running.append(disk)
    assert disk.says(b'"event": "hydrated"')
    first, *_, last = map(json.loads, disk.said.splitlines())
    assert first == {"event": "listening", "address": f"nbd+unix:///vm?socket={disk.socket}"}
    assert (last["event"], last["state"], last["percent"]) == ("hydrated", "complete", 100.0)
    assert disk.stop() == 0
    wrong = Rehydrator(tmp_path / "other", "grpc://127.0.0.1:1/vm", flags=["--json"]).refuse()
    assert json.loads(wrong.stdout)["error"]["code"] == "unavailable"


def test_what_is_hydrated_can_be_asked_by_nbd(tmp_path: Path, replica: str) -> None:
    """And what is not is never called a hole."""
    with rehydrating(tmp_path / "disk", replica, flags=["--bwlimit", "1"]) as disk:
        qemu_io(disk.uri, f"discard {12 * MIB} 1M")
        done = subprocess.run(
            ["nbdinfo", "--map=blockferry:hydrated", "--json", disk.uri], capture_output=True, text=True, check=True
        )
        found = [(one["offset"], one["length"], one["type"]) for one in json.loads(done.stdout)]
        assert (12 * MIB, MIB, 1) in found and found[0][2] == 0
        done = subprocess.run(["nbdinfo", "--map", "--json", disk.uri], capture_output=True, text=True, check=True)
        holes = [(one["offset"], one["length"]) for one in json.loads(done.stdout) if one["type"] == 3]
        assert holes == [(12 * MIB, MIB)]


def test_a_snapshot_while_it_is_used(tmp_path: Path, xfs_pool_root: Path, replica: str, content: bytes) -> None:
    """It can be rehydrated on by itself, and holds what the disk held then."""
    # A short name: a socket's path may have 107 bytes.
    home = xfs_pool_root / "used"
    with rehydrating(home, replica, flags=["--bwlimit", "1"]) as disk:
        qemu_io(disk.uri, f"write -P 7 {8 * B} 4k")
        made = ok("rehydration", "snapshot", disk.state, "--name", "before")
        qemu_io(disk.uri, f"write -P 8 {8 * B} 4k", "flush")
        assert made["hydrated"] >= B
        refused(
            run_cli("rehydration", "snapshot", disk.state, "--name", "before"), "there is a snapshot before already"
        )
    copy = Rehydrator(tmp_path / "copy", replica, primary=made["path"])
    copy.state = Path(made["state"])
    copy.start().hydrated()
    assert copy.stop() == 0
    expected = bytearray(content)
    expected[8 * B : 9 * B] = b"\x07" * B
    assert Path(made["path"]).read_bytes() == expected
    disk = Rehydrator(home, replica).start().hydrated()
    assert disk.stop() == 0
    expected[8 * B : 9 * B] = b"\x08" * B
    assert disk.content() == expected


def test_nothing_answers_where_no_disk_is_served(tmp_path: Path) -> None:
    refused(run_cli("rehydration", "show", tmp_path), "no server answers there", "check that blockferry-rehydrate runs")


def test_a_snapshot_needs_a_file_system_that_can(tmp_path: Path, ext4_pool_root: Path, replica: str) -> None:
    home = ext4_pool_root / tmp_path.name
    with rehydrating(home, replica, flags=["--bwlimit", "1"]) as disk:
        refused(run_cli("rehydration", "snapshot", disk.state, "--name", "x"), "cannot share extents", "XFS or Btrfs")
        assert sorted(path.name for path in home.iterdir()) == ["disk.raw", "log", "nbd.sock", "state"]


# --- under load -------------------------------------------------------------------------------------------------------


FIO_SIZE = int(os.environ.get("BLOCKFERRY_REHYDRATE_MIB", "4")) * MIB
"""Bytes read and written under load."""


def test_verified_while_the_source_comes_and_goes(tmp_path: Path, server: Server, replica: str, content: bytes) -> None:
    """A real client writes with checksums and reads back, all over the disk, while it is filled behind."""
    with proxied(server.address) as proxy:
        flags = ["--source-timeout", "60s", "--bwlimit", "1M"]
        disk = Rehydrator(tmp_path / "disk", f"{proxy.address}/vm", flags=flags).start()
        job = [
            "fio", "--name=verify", "--ioengine=nbd", f"--uri={disk.uri}", "--rw=randrw", "--bs=4k,4k,4k",
            "--bssplit=4k/60:12k/20:64k/20", f"--size={16 * MIB}", "--verify=crc32c", "--verify_backlog=64",
            "--iodepth=16", "--verify_fatal=1", "--fsync=32", "--output-format=json",
            "--blockalign=512", f"--io_size={FIO_SIZE}", "--verify_state_save=0",
        ]  # fmt: skip
        running = subprocess.Popen(job, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        cuts = 0
        while running.poll() is None:
            proxy.refusing = True
            proxy.cut()
            cuts += 1
            try:
                running.wait(0.2)
            except subprocess.TimeoutExpired:
                proxy.refusing = False
            try:
                running.wait(1.0)
            except subprocess.TimeoutExpired:
                continue
        assert running.stdout is not None
        said = running.stdout.read()
        running.stdout.close()
        proxy.refusing = False
        assert running.returncode == 0, said
        assert cuts
        job = json.loads(said[said.index("{") :])["jobs"][0]
        assert job["error"] == 0 and job["read"]["io_bytes"] + job["write"]["io_bytes"] >= FIO_SIZE
        assert disk.stop() == 0
        whole = Rehydrator(tmp_path / "disk", replica).start().hydrated()
        assert whole.stop() == 0
        # Where fio has not been it is what it was.
        assert disk.content()[16 * MIB :] == content[16 * MIB :]
