"""Block devices as sources and as volumes: real loop devices, mounted, claimed, held, cut off, and read exactly."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import struct
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from blockferry.common import blockdev, disk, linux
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.regions import Provenance
from blockferry.common.volumes import DeviceVolume, ImageVolume, Volume, open_volume
from blockferry.common.volumes.device import ThinProof

from tests.images import BLOCK, MIB, Snapshot, build, change, expect, noise
from tests.processes import holding, loop_device
from tests.support import Server, ok, refused_json, run_cli, tree

REGION = 65536
SIZE = 8 * MIB + 4096 + 512
"""No multiple of a block or a region, as a partition may be."""


class Opening:
    """Opens devices as volumes, and closes at the end of the test those that are still open."""

    def __init__(self) -> None:
        self._opened: list[Volume] = []

    async def __call__(self, device: str | Path, *, writable: bool = False) -> DeviceVolume:
        volume = await DeviceVolume.open(Path(device), writable=writable)
        self._opened.append(volume)
        return volume

    async def close(self) -> None:
        for volume in self._opened:
            await volume.close()


@pytest.fixture
async def opening() -> AsyncIterator[Opening]:
    found = Opening()
    yield found
    await found.close()


@contextlib.contextmanager
def descriptor(device: str, flags: int = os.O_RDONLY) -> Iterator[int]:
    fd = os.open(device, flags | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def run(*words: str | Path) -> None:
    subprocess.run(words, check=True, capture_output=True)


def rename(path: Path, name: Path) -> None:
    path.rename(name)


def remove(path: Path) -> None:
    path.unlink()


def bytes_of(path: Path) -> bytes:
    return path.read_bytes()


async def content(volume: Volume) -> bytes:
    buffer = bytearray(volume.size)
    await volume.read_into(0, memoryview(buffer))
    return bytes(buffer)


async def refused_for_writing(device: str, code: Code) -> BlockferryError:
    with pytest.raises(BlockferryError) as caught:
        await DeviceVolume.open(Path(device), writable=True)
    assert (caught.value.code, caught.value.volume) == (code, device)
    return caught.value


# --- syncs from devices -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sector", [512, 4096])
def test_a_device_is_synced_exactly(server: Server, volume: str, backing: Path, sector: int) -> None:
    size = SIZE - 512 if sector == 4096 else SIZE
    build(backing, size, [(0, noise(1, 100)), (3 * MIB + 8192, noise(2, MIB)), (size - 1, b"\xff")])
    with loop_device(backing, "--sector-size", str(sector)) as device:
        source = Snapshot.of(backing)
        report = server.sync(Path(device), volume)
        assert report["source"] == device
        assert report["bytes"] | expect(source, Snapshot.empty(size), MIB).bytes() == report["bytes"]
        assert report["regions"] == expect(source, Snapshot.empty(size), MIB).regions
        assert bytes_of(server.image(volume)) == source.content
        assert ok("verify", device, server.url(volume))["outcome"] == "equal"
    # Changed and trimmed through the file, and synced again: only that is looked at and sent.
    before = server.snapshot(volume)
    change(backing, [(4 * MIB, noise(3, BLOCK))])
    with loop_device(backing, "--sector-size", str(sector)) as device:
        planned = expect(Snapshot.of(backing), before, MIB)
        report = server.sync(f"file://{device}", volume)  # type: ignore[arg-type]
        assert report["regions"] == planned.regions
        assert report["bytes"]["data_sent"] == BLOCK
        assert bytes_of(server.image(volume)) == bytes_of(backing)


def test_alternating_data_and_holes_cost_what_they_hold(server: Server, volume: str, backing: Path) -> None:
    build(backing, 8 * MIB, [(offset, noise(offset, BLOCK)) for offset in range(0, 8 * MIB, 2 * BLOCK)])
    with loop_device(backing) as device:
        report = server.sync(Path(device), volume)
        moved = report["bytes"]
        assert (moved["source_read"], moved["data_sent"], moved["destination_read"]) == (4 * MIB, 4 * MIB, 0)
        assert bytes_of(server.image(volume)) == bytes_of(backing)
        again = server.sync(Path(device), volume)["bytes"]
        assert (again["source_read"], again["data_sent"], again["destination_read"]) == (4 * MIB, 0, 0)


def test_a_device_without_proof_is_read_whole_and_sends_what_is_not_zero(
    server: Server, volume: str, backing: Path
) -> None:
    build(backing, SIZE, [(3 * MIB, noise(1, BLOCK))])
    expected = bytes_of(backing)
    with loop_device(backing) as device:
        backing.unlink()
        report = server.sync(Path(device), volume)
        assert (report["bytes"]["source_read"], report["bytes"]["data_sent"]) == (SIZE, BLOCK)
        assert bytes_of(server.image(volume)) == expected


# --- mounted, held, claimed -------------------------------------------------------------------------------------------


@pytest.fixture
def formatted(backing: Path) -> Iterator[str]:
    """A loop device with an ext4 on it."""
    build(backing, 16 * MIB)
    run("mkfs.ext4", "-q", str(backing))
    with loop_device(backing) as device:
        yield device


async def test_a_mounted_device_is_named_with_its_mount_point(
    server: Server, volume: str, formatted: str, tmp_path: Path
) -> None:
    point = tmp_path / "mount point"
    point.mkdir()
    run("mount", formatted, point)
    try:
        (point / "file").write_bytes(noise("file", 100_000))
        error = await refused_for_writing(formatted, Code.IN_USE)
        assert f"mounted on {point}" in error.cause
        before = tree(server.pool)
        done = run_cli("sync", formatted, server.url(volume), "--json")
        refused_json(done, "in-use", formatted, f"mounted on {point}", "--live")
        assert tree(server.pool) == before
        run("sync", "--file-system", point)
        assert server.sync(Path(formatted), volume, "--live")["generation"] == 1
    finally:
        run("umount", point)
    # Mounted read-only it may be read, and not written.
    run("mount", "-o", "ro", formatted, point)
    try:
        shown = ok("volume", "show", formatted)
        assert (shown["writers"], shown["holders"]) == ([], [f"mounted read-only on {point}"])
        assert "mounted read-only" in (await refused_for_writing(formatted, Code.IN_USE)).cause
        assert server.sync(Path(formatted), volume)["generation"] == 2
    finally:
        run("umount", point)
    assert bytes_of(server.image(volume)) == bytes_of(Path(formatted))


async def test_every_device_of_a_mounted_btrfs_is_held(backing: Path, tmp_path: Path) -> None:
    """Its mount has a device number of its own, and names only one of the devices."""
    second = backing.with_suffix(".second")
    for path in (backing, second):
        build(path, 128 * MIB)
    try:
        with loop_device(backing) as one, loop_device(second) as two:
            run("mkfs.btrfs", "-q", one, two)
            run("mount", one, tmp_path)
            try:
                causes = [(await refused_for_writing(device, Code.IN_USE)).cause for device in (one, two)]
                assert f"mounted on {tmp_path}" in causes[0]
                assert all("is part of the mounted Btrfs" in cause for cause in causes)
                assert f"{Path(two).name} is part" in causes[1]
            finally:
                run("umount", tmp_path)
    finally:
        remove(second)


async def test_a_writable_volume_keeps_others_from_mounting_and_writing(
    opening: Opening, formatted: str, tmp_path: Path
) -> None:
    volume = await opening(formatted, writable=True)
    try:
        with pytest.raises(subprocess.CalledProcessError):
            run("mount", formatted, tmp_path)
        error = await refused_for_writing(formatted, Code.IN_USE)
        assert "cannot be seen" in error.cause
        reading = await opening(formatted)
        # The claim of another volume in this process is nobody's that could be named.
        assert await reading.writers() == ["somebody who cannot be seen from here"]
        await reading.close()
    finally:
        await volume.close()
    again = await opening(formatted, writable=True)
    await again.close()


@pytest.mark.parametrize("flags", [os.O_RDWR, os.O_WRONLY, os.O_RDWR | os.O_EXCL])
async def test_a_process_that_writes_is_named(
    opening: Opening, formatted: str, server: Server, volume: str, flags: int
) -> None:
    other = Path("/dev") / f"other-name-of-{Path(formatted).name}"
    os.mknod(other, 0o600 | 0o060000, os.stat(formatted).st_rdev)
    try:
        # It has the device open under another name.
        with holding(other, flags) as process:
            assert f"({process})" in (await refused_for_writing(formatted, Code.IN_USE)).cause
            refused_json(run_cli("sync", formatted, server.url(volume), "--json"), "in-use", formatted, f"({process})")
        with holding(other, os.O_RDONLY):
            assert server.sync(Path(formatted), volume)["generation"] == 1
            await (await opening(formatted, writable=True)).close()
    finally:
        other.unlink()


async def test_whoever_writes_to_the_file_behind_is_named(opening: Opening, formatted: str, backing: Path) -> None:
    reading = await opening(formatted)
    try:
        with holding(backing, os.O_RDWR) as process:
            (found,) = await reading.writers()
            assert f"({process}) writes to {backing}" in found
            assert found in (await refused_for_writing(formatted, Code.IN_USE)).cause
        with loop_device(backing) as other:
            assert await reading.writers() == [f"{other} (loop device over the same file)"]
            assert other in (await refused_for_writing(formatted, Code.IN_USE)).cause
        with loop_device(Path(formatted)) as above:
            assert await reading.writers() == [f"{above} (loop device)"]
            assert above in (await refused_for_writing(formatted, Code.IN_USE)).cause
        assert await reading.writers() == []
    finally:
        await reading.close()


async def test_swap_is_named(formatted: str) -> None:
    run("mkswap", formatted)
    run("swapon", formatted)
    try:
        assert f"swap on {formatted}" in (await refused_for_writing(formatted, Code.IN_USE)).cause
    finally:
        run("swapoff", formatted)


async def test_a_read_only_device_is_read_and_never_written(opening: Opening, backing: Path) -> None:
    data = noise("read-only", MIB)
    build(backing, MIB, [(0, data)])
    with loop_device(backing, "--read-only") as device:
        assert (await refused_for_writing(device, Code.READ_ONLY)).cause == "the device is read-only"
        volume = await opening(device)
        assert await content(volume) == data
        assert len((await volume.allocation(REGION)).regions) == 16
        await volume.close()


async def test_a_device_with_nothing_attached(backing: Path) -> None:
    build(backing, MIB)
    with loop_device(backing) as device:
        name = device
    with pytest.raises(BlockferryError) as caught:
        await DeviceVolume.open(Path(name))
    assert caught.value.code is Code.INVALID_ARGUMENT and "nothing is attached" in caught.value.cause


@pytest.mark.parametrize(
    ("path", "code"), [("/dev/null", Code.UNSUPPORTED), ("/dev/missing", Code.NOT_FOUND), ("/etc", Code.UNSUPPORTED)]
)
async def test_what_is_no_block_device(path: str, code: Code) -> None:
    for writable in (False, True):
        with pytest.raises(BlockferryError) as caught:
            await DeviceVolume.open(Path(path), writable=writable)
        assert caught.value.code is code


async def test_opening_by_path_finds_out_what_it_is(backing: Path) -> None:
    build(backing, MIB)
    with loop_device(backing) as device:
        link = backing.with_suffix(".link")
        link.symlink_to(device)
        for uri, kind in [
            (str(backing), "ImageVolume"), (backing.as_uri(), "ImageVolume"), (device, "DeviceVolume"),
            (f"file://{device}", "DeviceVolume"), (str(link), "DeviceVolume"),
        ]:  # fmt: skip
            volume = await open_volume(uri)
            await volume.close()
            assert type(volume).__name__ == kind
        link.unlink()
        with pytest.raises(BlockferryError) as caught:
            await ImageVolume.open(Path(device))
        assert "not a raw image" in caught.value.what


async def test_no_descriptor_is_left_behind(opening: Opening, formatted: str, tmp_path: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    (tmp_path / "dump").write_text("none")
    for writable in (False, True):
        volume = await opening(formatted, writable=writable)
        await volume.allocation(REGION)
        await volume.writers()
        await volume.close()
    with holding(Path(formatted), os.O_RDWR):
        await refused_for_writing(formatted, Code.IN_USE)
    with pytest.raises(BlockferryError):
        await DeviceVolume.open(Path(formatted), thin=ThinProof(tmp_path / "dump", "0 32768 thin 254:0 1"))
    # What others had left open until then may be closed meanwhile.
    assert not set(os.listdir("/proc/self/fd")) - before


# --- what is proven ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "limit"), [(0, 0), (MIB, 0), (MIB + 512, 4 * MIB - 512), (512, 0)])
async def test_a_part_of_a_file_is_proven_through_its_part(
    opening: Opening, backing: Path, start: int, limit: int
) -> None:
    pieces = [(0, noise(1, BLOCK)), (MIB, noise(2, BLOCK)), (3 * MIB, noise(3, 512)), (SIZE - 1, b"\xff")]
    build(backing, SIZE, pieces)
    shown = bytes_of(backing)[start : start + limit if limit else SIZE]
    with loop_device(backing, "--offset", str(start), "--sizelimit", str(limit)) as device:
        volume = await opening(device, writable=True)
        assert await content(volume) == shown
        found = await volume.allocation(REGION)
        assert found.provenance is Provenance.EXACT
        held = [(offset - start, length) for offset, length in Snapshot.of(backing).data]
        expected = {
            number
            for number in range(found.geometry.count)
            if any(at < (number + 1) * REGION and at + length > number * REGION for at, length in held)
        }
        assert set(found.regions) == expected
        assert 0 < len(expected) <= 6
        # What is unmapped through the device is zero in its part of the file, and nothing else is.
        whole = bytes_of(backing)
        await volume.unmap([(0, volume.size)])
        await volume.flush()
        assert bytes_of(backing) == whole[:start] + bytes(len(shown)) + whole[start + len(shown) :]
        await volume.close()


async def test_what_is_written_but_not_flushed_is_in_the_map(opening: Opening, backing: Path) -> None:
    build(backing, SIZE)
    with loop_device(backing) as device:
        volume = await opening(device)
        with descriptor(device, os.O_RDWR) as other:
            os.pwrite(other, b"x", 5 * MIB)
            assert list((await volume.allocation(REGION)).regions) == [5 * MIB // REGION]
            os.pwrite(other, b"y", 6 * MIB)
            buffer = memoryview(bytearray(2 * MIB))
            found = await volume.read_data_into(5 * MIB, buffer)
            assert found == [(0, BLOCK), (MIB, BLOCK)]
            assert (buffer[0], buffer[MIB]) == (ord("x"), ord("y"))
        await volume.close()


async def test_a_map_is_not_proven_any_more_when_the_device_shows_something_else(
    opening: Opening, backing: Path
) -> None:
    build(backing, SIZE, [(MIB, noise(1, BLOCK))])
    with loop_device(backing) as device:
        volume = await opening(device)
        assert (await volume.allocation(REGION)).provenance is Provenance.EXACT
        os.truncate(backing, SIZE - 4096)
        # What is missing is no hole.
        assert (await volume.allocation(REGION)).provenance is Provenance.ABSENT
        os.truncate(backing, SIZE)
        assert (await volume.allocation(REGION)).provenance is Provenance.EXACT
        with descriptor(device) as other:
            status = bytearray(232)
            fcntl.ioctl(other, 0x4C05, status)
            struct.pack_into("=Q", status, 24, 4096)
            fcntl.ioctl(other, 0x4C04, bytes(status))
        assert (await volume.allocation(REGION)).provenance is Provenance.ABSENT
        assert await volume.current_size() == SIZE - 4096
        await volume.close()


async def test_another_file_of_the_same_name_proves_nothing(opening: Opening, backing: Path) -> None:
    build(backing, SIZE, [(MIB, noise(1, BLOCK))])
    with loop_device(backing) as device:
        remove(backing)
        build(backing, SIZE)
        volume = await opening(device)
        found = await volume.allocation(REGION)
        assert (found.provenance, len(found.regions)) == (Provenance.ABSENT, found.geometry.count)
        assert volume.identity == ""


async def test_a_file_that_was_renamed_still_proves(opening: Opening, backing: Path) -> None:
    build(backing, SIZE, [(MIB, noise(1, BLOCK))])
    with loop_device(backing) as device:
        rename(backing, backing.with_suffix(".moved"))
        try:
            found = await (await opening(device)).allocation(REGION)
            assert (found.provenance, list(found.regions)) == (Provenance.EXACT, [MIB // REGION])
        finally:
            rename(backing.with_suffix(".moved"), backing)


async def test_a_device_over_a_device_proves_nothing(opening: Opening, backing: Path) -> None:
    build(backing, SIZE)
    with loop_device(backing) as below, loop_device(Path(below)) as device:
        volume = await opening(device)
        assert (await volume.allocation(REGION)).provenance is Provenance.ABSENT
        await volume.close()


async def test_what_the_page_cache_holds_is_not_what_is_read(opening: Opening, backing: Path) -> None:
    build(backing, MIB, [(0, noise("old", BLOCK))])
    with loop_device(backing) as device, descriptor(device) as other:
        assert os.pread(other, BLOCK, 0) == noise("old", BLOCK)
        change(backing, [(0, noise("new", BLOCK))])
        assert os.pread(other, BLOCK, 0) == noise("old", BLOCK), "the kernel keeps them equal by itself"
        volume = await opening(device)
        assert (await content(volume))[:BLOCK] == noise("new", BLOCK)
        await volume.close()


async def test_without_the_right_to_flush_a_device_its_pages_are_dropped(
    opening: Opening, backing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fcntl.ioctl

    def ioctl(fd: int, request: int, argument: bytearray | int = 0) -> object:
        if request == 0x1261:
            raise OSError(errno.EACCES, "injected")
        return real(fd, request, argument)

    monkeypatch.setattr("fcntl.ioctl", ioctl)
    await test_what_the_page_cache_holds_is_not_what_is_read(opening, backing)


async def test_the_identity_is_that_of_what_is_shown(opening: Opening, backing: Path) -> None:
    build(backing, SIZE)
    info = os.stat(backing)
    with loop_device(backing) as one, loop_device(backing, "--offset", "4096") as other:
        found = []
        for device in (one, other):
            volume = await opening(device)
            found.append(volume.identity)
            await volume.close()
    assert found == [f"file:{info.st_dev}:{info.st_ino}:{offset}" for offset in (0, 4096)]


@pytest.mark.parametrize("sector", [512, 4096])
async def test_limits_are_those_of_the_device(opening: Opening, backing: Path, sector: int) -> None:
    build(backing, MIB)
    with loop_device(backing, "--sector-size", str(sector)) as device:
        volume = await opening(device)
        queue = Path("/sys/block") / Path(device).name / "queue"
        names = ("physical_block_size", "minimum_io_size", "optimal_io_size")
        assert volume.preferred_size == max(int((queue / name).read_text()) for name in names)
        assert volume.sector_size == sector
        await volume.close()


# --- zeroing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refused", [(), ("punch",), ("punch", "zero_out")], ids=["punch", "zero-out", "write"])
async def test_each_way_of_zeroing_zeroes_and_only_what_deallocates_is_a_deallocation(
    opening: Opening, backing: Path, monkeypatch: pytest.MonkeyPatch, refused: tuple[str, ...]
) -> None:
    calls: list[str] = []
    real: dict[str, Callable[..., None]] = {"punch": linux.fallocate, "zero_out": disk.zero_out}

    def stand_in(name: str, *arguments: int) -> None:
        calls.append(name)
        if name in refused:
            raise OSError(errno.EOPNOTSUPP, "injected")
        real[name](*arguments)

    monkeypatch.setattr(linux, "fallocate", functools.partial(stand_in, "punch"))
    monkeypatch.setattr(disk, "zero_out", functools.partial(stand_in, "zero_out"))
    whole = noise("whole", SIZE)
    build(backing, SIZE, [(0, whole)])
    extent = (REGION, SIZE - REGION)
    with loop_device(backing) as device:
        volume = await opening(device, writable=True)
        freed, left = await volume.deallocate([extent])
        assert (freed, list(left)) == ((0, [extent]) if refused else (SIZE - REGION, []))
        assert await content(volume) == (whole if refused else whole[:REGION] + bytes(SIZE - REGION))
        # Compared meanwhile, and found to differ:
        assert await volume.unmap([extent]) == (SIZE - REGION if refused else 512)
        assert await content(volume) == whole[:REGION] + bytes(SIZE - REGION)
        assert volume.zeroing == {0: "punch-hole", 1: "zero-out", 2: "write"}[len(refused)]
        await volume.flush()
        await volume.close()
    assert calls == {0: ["punch", "punch"], 1: ["punch", "zero_out"], 2: ["punch", "zero_out"]}[len(refused)]
    assert bytes_of(backing) == whole[:REGION] + bytes(SIZE - REGION)
    # Punched, the file keeps its first region and the block at its end, which cannot be punched through a device.
    if not refused:
        assert os.stat(backing).st_blocks * 512 == REGION + BLOCK


async def test_an_unproven_device_is_compared_before_it_is_zeroed(opening: Opening, backing: Path) -> None:
    build(backing, SIZE, [(0, noise(1, MIB))])
    with loop_device(backing) as device:
        remove(backing)
        volume = await opening(device, writable=True)
        extents = [(0, REGION), (REGION, REGION)]
        assert await volume.deallocate(extents) == (0, extents)
        assert await content(volume) == noise(1, MIB) + bytes(SIZE - MIB)
        assert await volume.unmap(extents) == 2 * REGION
        assert await content(volume) == bytes(2 * REGION) + noise(1, MIB)[2 * REGION :] + bytes(SIZE - MIB)
        await volume.close()


# --- partitions -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def partition_of(device: str, start: int, length: int) -> Iterator[Path]:
    """The first partition of a device, told to the kernel without a table; bytes."""
    run("addpart", device, "1", str(start // 512), str(length // 512))
    try:
        yield Path(f"{device}p1")
    finally:
        run("delpart", device, "1")


async def test_a_partition_is_read_proven_and_held_as_part_of_its_disk(opening: Opening, backing: Path) -> None:
    build(backing, 16 * MIB, [(2 * MIB, noise("inside", MIB)), (12 * MIB, noise("behind", MIB))])
    with loop_device(backing, "--partscan") as device, partition_of(device, MIB, 8 * MIB) as partition:
        volume = await opening(partition, writable=True)
        assert volume.size == 8 * MIB
        assert await content(volume) == bytes(MIB) + noise("inside", MIB) + bytes(6 * MIB)
        found = await volume.allocation(MIB)
        assert (found.provenance, list(found.regions)) == (Provenance.EXACT, [1])
        assert volume.identity.endswith(f":{MIB}")
        # The disk is claimed with its partition.
        assert "cannot be seen" in (await refused_for_writing(device, Code.IN_USE)).cause
        assert await volume.unmap([(0, 8 * MIB)]) == MIB
        assert list((await volume.allocation(MIB)).regions) == []
        await volume.flush()
        await volume.close()
        assert bytes_of(backing) == bytes(12 * MIB) + noise("behind", MIB) + bytes(3 * MIB)
        with holding(Path(device), os.O_RDWR) as process:
            assert f"({process})" in (await refused_for_writing(str(partition), Code.IN_USE)).cause
        with holding(partition, os.O_RDWR) as process:
            assert f"({process})" in (await refused_for_writing(device, Code.IN_USE)).cause


# --- showing ----------------------------------------------------------------------------------------------------------


def test_volume_show_says_all_that_is_known(backing: Path) -> None:
    build(backing, 128 * MIB, [(0, noise(1, MIB)), (127 * MIB, noise(2, BLOCK))])
    info = backing.stat()
    with loop_device(backing, "--sector-size", "4096") as device:
        assert ok("volume", "show", device) == {
            "schema": 1,
            "uri": device,
            "size": 128 * MIB,
            "block_size": 4096,
            "sector_size": 4096,
            "preferred_size": 4096,
            "region_size": MIB,
            "regions": 128,
            "allocated_regions": 2,
            "allocated_bytes": 2 * MIB,
            "runs": 2,
            "map": "exact",
            "zeroing": "punch-hole",
            "snapshot_id": "",
            "identity": f"file:{info.st_dev}:{info.st_ino}:0",
            "writers": [],
            "holders": [],
        }
        lines = run_cli("volume", "show", device).stdout.splitlines()
        assert lines[-2:] == ["  |█" + " " * 63 + "|", "  |" + " " * 63 + "█|"]
        assert "sectors of 4096" in lines[2]
        assert lines[-3].split()[0] == "identity"


def test_ioctls_say_what_sysfs_says(backing: Path) -> None:
    build(backing, SIZE)
    with loop_device(backing) as device, descriptor(device) as fd:
        assert (blockdev.size(fd), blockdev.is_read_only(fd)) == (SIZE, False)
