"""Raw images on real file systems: maps, zeroing and reads are exact at every size, and nothing is ever guessed."""

from __future__ import annotations

import asyncio
import errno
import os
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from blockferry.common import linux
from blockferry.common.digests import digest_size, digests
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.regions import Provenance
from blockferry.common.volumes import ImageVolume
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.filesystems import KINDS, MUTE, FileSystems, Unavailable, allocate_exactly
from tests.processes import holding, loop_device
from tests.unit.conftest import Place

BLOCK = 4096
REGION = 65536
MIB = 1024 * 1024

SIZES = [1, 511, 4095, 4096, 4097, 65535, 65536, 65537, 131071, 3 * REGION + 1, 10 * REGION + 4095, 2**20 + 4097]


@asynccontextmanager
async def writable(path: Path, size: int) -> AsyncIterator[ImageVolume]:
    volume = await ImageVolume.create(path, size)
    try:
        yield volume
    finally:
        await volume.close()


@asynccontextmanager
async def readable(path: Path) -> AsyncIterator[ImageVolume]:
    volume = await ImageVolume.open(path)
    try:
        yield volume
    finally:
        await volume.close()


def held_on_disk(path: Path) -> int:
    """Bytes of disk the file occupies, after everything delayed has happened."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        return os.fstat(fd).st_blocks * 512
    finally:
        os.close(fd)


async def regions_of(volume: ImageVolume) -> list[int]:
    found = await volume.allocation(REGION)
    assert found.provenance is Provenance.EXACT
    assert (found.geometry.size, found.geometry.region_size) == (volume.size, REGION)
    return list(found.regions)


async def content(volume: ImageVolume) -> bytes:
    buffer = bytearray(volume.size)
    await volume.read_into(0, memoryview(buffer))
    return bytes(buffer)


# --- maps -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
async def test_an_image_without_data_has_an_empty_map_and_one_full_of_data_a_full_one(
    directory: Path, size: int
) -> None:
    async with writable(directory / "empty", size) as empty:
        assert await regions_of(empty) == []
        assert await content(empty) == bytes(size)
        assert await empty.unmap([(0, size)]) == 0
    async with writable(directory / "full", size) as full:
        await full.write([(0, b"x" * size)])
        assert await regions_of(full) == list(range(-(-size // REGION)))
        assert await content(full) == b"x" * size


@pytest.mark.parametrize("size", SIZES)
async def test_the_map_knows_writes_that_were_never_synced(directory: Path, size: int) -> None:
    # The first and last byte and one in every third region, through another descriptor, and no fsync.
    offsets = sorted({0, size - 1, *range(REGION + 5000, size, 3 * REGION)})
    async with writable(directory / "image", size) as volume:
        with (directory / "image").open("r+b", buffering=0) as other:
            for offset in offsets:
                os.pwrite(other.fileno(), b"x", offset)
            assert await regions_of(volume) == sorted({offset // REGION for offset in offsets})


async def test_zeros_written_as_data_are_data(directory: Path) -> None:
    async with writable(directory / "image", 4 * REGION) as volume:
        await volume.write([(REGION, bytes(BLOCK))])
        assert await regions_of(volume) == [1]


@pytest.mark.parametrize(("kind", "size"), [("tmpfs", 2**44), ("xfs", 2**46)])
async def test_a_huge_sparse_image_costs_what_it_holds(place: Place, kind: str, size: int) -> None:
    async with writable(place(kind) / "image", size) as volume:
        await volume.write([(0, b"x"), (size - 1, b"x")])
        found = await volume.allocation(2**20)
        assert list(found.runs()) == [(0, 1), (size // 2**20 - 1, 1)]
        assert await volume.unmap([(0, size)]) == 2 * BLOCK
        assert await volume.allocation(2**20) == type(found).from_runs(found.geometry, [], Provenance.EXACT)


@pytest.mark.parametrize("number", sorted(linux.NOT_SUPPORTED), ids=errno.errorcode.get)
async def test_where_the_file_system_cannot_tell_everything_counts_as_allocated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(fd: int, start: int, end: int) -> list[tuple[int, int]]:
        raise OSError(number, "injected")

    monkeypatch.setattr(linux, "data_extents", fail)
    async with writable(tmp_path / "image", 3 * REGION + 1) as volume:
        found = await volume.allocation(REGION)
        assert (list(found.regions), found.provenance) == ([0, 1, 2, 3], Provenance.ABSENT)
        # Nobody knows what was data: all of it may have been.
        assert await volume.unmap([(REGION, REGION)]) == REGION


@pytest.mark.parametrize("exactly", [False, True])
async def test_what_xfs_sets_aside_around_a_write_to_a_clone_counts_as_data_once_it_was_read(
    place: Place, exactly: bool
) -> None:
    """Why an update may read holes of its destination again; and how tests keep that from happening."""
    directory = place("xfs")
    if exactly:
        allocate_exactly(directory)
    async with writable(directory / "image", 64 * BLOCK) as image:
        await image.write([(block * BLOCK, b"x" * BLOCK) for block in (0, 10, 40)])
        await image.flush()
    async with writable(directory / "clone", 64 * BLOCK) as clone:
        with (directory / "image").open("rb") as source:
            linux.reflink(source.fileno(), clone._fd)
        held = [(0, BLOCK), (10 * BLOCK, BLOCK), (40 * BLOCK, BLOCK)]
        assert await clone.data_extents(0, 64 * BLOCK) == held
        await content(clone)
        # Holes remain holes, also with their zeros in the page cache.
        assert await clone.data_extents(0, 64 * BLOCK) == held
        await clone.write([(10 * BLOCK, b"y" * BLOCK)])
        set_aside = [(0, 32 * BLOCK), (40 * BLOCK, BLOCK)]
        assert await clone.data_extents(0, 64 * BLOCK) == (held if exactly else set_aside)
        expected = bytearray(64 * BLOCK)
        for block, data in ((0, b"x"), (10, b"y"), (40, b"x")):
            expected[block * BLOCK : (block + 1) * BLOCK] = data * BLOCK
        assert await content(clone) == expected


async def test_where_the_file_system_calls_everything_data_that_is_not_taken_for_knowledge(
    file_systems: FileSystems,
) -> None:
    try:
        path = file_systems.directory(MUTE) / uuid.uuid4().hex
    except Unavailable as error:
        pytest.skip(str(error))
    async with writable(path, 3 * REGION + 1) as volume:
        await volume.write([(REGION, b"x" * BLOCK)])
        found = await volume.allocation(REGION)
        assert (list(found.regions), found.provenance) == ([0, 1, 2, 3], Provenance.ABSENT)
        # Nobody knows what was data: all of it may have been.
        assert await volume.deallocate([(REGION, REGION)]) == (REGION, [])
        assert await content(volume) == bytes(3 * REGION + 1)
        # When all of it takes space there is nothing to be known.
        await volume.write([(0, b"x" * volume.size)])
        assert await regions_of(volume) == [0, 1, 2, 3]
    path.unlink()


@pytest.mark.parametrize(("target", "name"), [(linux, "data_extents"), (os, "fsync")])
async def test_a_disk_that_fails_while_the_map_is_read_is_an_error_not_a_map(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: object, name: str
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(errno.EIO, "injected")

    async with writable(tmp_path / "image", REGION) as volume:
        monkeypatch.setattr(target, name, fail)
        with pytest.raises(BlockferryError) as caught:
            await volume.allocation(REGION)
        assert (caught.value.code, caught.value.volume) == (Code.IO_ERROR, str(tmp_path / "image"))


# --- unmapping --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
async def test_unmapping_everything_counts_every_byte_and_frees_every_page(directory: Path, size: int) -> None:
    path = directory / "image"
    async with writable(path, size) as volume:
        await volume.write([(0, b"x" * size)])
        await volume.flush()
        assert held_on_disk(path) > 0
        assert await volume.unmap([(0, size)]) == size
        assert await regions_of(volume) == []
        assert await content(volume) == bytes(size)
        assert await volume.unmap([(0, size)]) == 0
    assert path.stat().st_size == size
    assert held_on_disk(path) == 0


@pytest.mark.parametrize("tail", [1, 511, 512, 4095, 4096, 4097, 65535])
async def test_unmapping_the_tail_frees_the_last_partial_page(directory: Path, tail: int) -> None:
    path = directory / "image"
    size = 2 * REGION + tail
    async with writable(path, size) as volume:
        await volume.write([(0, b"x" * size)])
        await volume.flush()
        assert await volume.unmap([(2 * REGION, tail)]) == tail
        assert await regions_of(volume) == [0, 1]
        assert await content(volume) == b"x" * 2 * REGION + bytes(tail)
    assert path.stat().st_size == size
    assert held_on_disk(path) == 2 * REGION


@pytest.mark.parametrize(
    ("written", "unmapped", "count"),
    [
        ([(0, BLOCK)], [(0, BLOCK)], BLOCK),
        ([(0, BLOCK)], [(BLOCK, BLOCK)], 0),
        ([(100, 1)], [(0, 2 * BLOCK)], BLOCK),
        ([(0, BLOCK), (2 * BLOCK, BLOCK)], [(0, 4 * BLOCK)], 2 * BLOCK),
        ([(0, 4 * BLOCK)], [(0, BLOCK), (2 * BLOCK, BLOCK)], 2 * BLOCK),
        ([(0, 10 * REGION)], [(REGION, REGION), (REGION, REGION)], REGION),
    ],
)
async def test_unmap_counts_the_bytes_that_held_data(
    directory: Path, written: list[tuple[int, int]], unmapped: list[tuple[int, int]], count: int
) -> None:
    async with writable(directory / "image", 10 * REGION) as volume:
        await volume.write([(offset, b"x" * length) for offset, length in written])
        assert await volume.unmap(unmapped) == count


steps = st.lists(
    st.tuples(st.sampled_from(["write", "unmap", "flush"]), st.integers(0, 70), st.integers(1, 40), st.integers(0, 9)),
    max_size=8,
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(steps, st.integers(1, 300_000))
async def test_any_history_of_writes_and_unmaps_reads_counts_and_maps_as_a_model_does(
    file_systems: FileSystems, kind: str, history: list[tuple[str, int, int, int]], size: int
) -> None:
    try:
        path = file_systems.directory(kind) / uuid.uuid4().hex
    except Unavailable as error:
        pytest.skip(str(error))
    model = bytearray(size)
    held: set[int] = set()
    try:
        async with writable(path, size) as volume:
            for number, (kind_of_step, first, count, skew) in enumerate(history):
                offset = first * BLOCK
                if offset >= size:
                    continue
                if kind_of_step == "write":
                    # Writes may start and end anywhere.
                    offset = min(offset + skew * 455, size - 1)
                    data = bytes([number + 1]) * min(count * 1000, size - offset)
                    await volume.write([(offset, data)])
                    model[offset : offset + len(data)] = data
                    held.update(range(offset // BLOCK, (offset + len(data) - 1) // BLOCK + 1))
                elif kind_of_step == "unmap":
                    length = min(count * BLOCK, size - offset)
                    blocks = held & set(range(offset // BLOCK, -(-(offset + length) // BLOCK)))
                    expected = sum(min(BLOCK, size - block * BLOCK) for block in blocks)
                    assert await volume.unmap([(offset, length)]) == expected
                    model[offset : offset + length] = bytes(length)
                    # Where zeros are written out instead, the blocks stay.
                    assert volume.zeroing == "punch-hole"
                    held -= blocks
                else:
                    await volume.flush()
            assert await content(volume) == model
            assert await regions_of(volume) == sorted({block * BLOCK // REGION for block in held})
        assert path.stat().st_size == size
    finally:
        path.unlink(missing_ok=True)


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(
    pieces=st.lists(st.tuples(st.integers(0, 4 * 256), st.integers(1, 300)), max_size=6),
    size=st.integers(1, 4 * MIB),
    piece_size=st.sampled_from([BLOCK, REGION, MIB, 2 * MIB]),
    first=st.integers(0, 3),
)
async def test_digests_made_while_reading_are_those_of_what_was_read(
    tmp_path: Path, pieces: list[tuple[int, int]], size: int, piece_size: int, first: int
) -> None:
    """Whatever the holes, and wherever they lie to what is read in one go."""
    model = bytearray(size)
    key, region_size = bytes(range(32)), max(piece_size, REGION)
    width = digest_size(piece_size, region_size)
    path = tmp_path / uuid.uuid4().hex
    async with writable(path, size) as volume:
        for number, (block, count) in enumerate(pieces):
            data = (bytes([number + 1]) * (count * BLOCK))[: max(size - block * BLOCK, 0)]
            await volume.write([(block * BLOCK, data)] if data else [])
            model[block * BLOCK : block * BLOCK + len(data)] = data
        count = -(-size // piece_size)
        first = min(first, count - 1)
        start = first * piece_size
        expected = digests(memoryview(model)[start:], piece_size, key, width)
        buffer = memoryview(bytearray(b"?" * (size - start)))
        held, found = await volume.read_and_digest([(start, buffer)], piece_size, key, width)
        assert (found, bytes(buffer)) == (expected, bytes(model[start:]))
        assert held == [await volume.read_data_into(start, memoryview(bytearray(size - start)))]
        again = await volume.read_digests(piece_size, [(first, count - first)], key, region_size)
        assert again == (expected, sum(length for _, length in held[0]))
    path.unlink()


# --- the ladder, seen through a volume --------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENODEV], ids=errno.errorcode.get)
@pytest.mark.parametrize(
    ("refused", "zeroing", "tries"),
    [((0x03,), "zero-range", [0x03, 0x11, 0x11]), ((0x03, 0x11), "write", [0x03, 0x11])],
    ids=["no punching", "neither"],
)
async def test_unmap_falls_back_once_and_for_all(
    place: Place, monkeypatch: pytest.MonkeyPatch, refused: tuple[int, ...], zeroing: str, tries: list[int], number: int
) -> None:
    real, modes = linux.fallocate, list[int]()

    def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
        modes.append(mode)
        if mode in refused:
            raise OSError(number, "injected")
        real(fd, mode, offset, length)

    monkeypatch.setattr(linux, "fallocate", fallocate)
    size = 3 * REGION + 17
    path = place("ext4") / "image"
    async with writable(path, size) as volume:
        await volume.write([(0, b"x" * size)])
        assert volume.zeroing == "punch-hole"
        assert await volume.unmap([(REGION, REGION)]) == REGION
        assert volume.zeroing == zeroing
        assert await volume.unmap([(3 * REGION, 17)]) == 17
        assert (volume.zeroing, modes) == (zeroing, tries)
        assert await content(volume) == b"x" * REGION + bytes(REGION) + b"x" * REGION + bytes(17)
    assert path.stat().st_size == size


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENODEV], ids=errno.errorcode.get)
async def test_deallocating_leaves_what_only_writing_could_zero(
    place: Place, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    real, refusing = linux.fallocate, False

    def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
        if refusing:
            raise OSError(number, "injected")
        real(fd, mode, offset, length)

    monkeypatch.setattr(linux, "fallocate", fallocate)
    size = 3 * REGION + 17
    whole = [(0, REGION), (3 * REGION, 17)]
    async with writable(place("ext4") / "image", size) as volume:
        await volume.write([(0, b"x" * size)])
        assert await volume.deallocate(whole) == (REGION + 17, [])
        assert volume.zeroing == "punch-hole"
        await volume.write([(0, b"x" * size)])
        # The very first one that is refused is left as it is, and so is everything after it.
        refusing = True
        for _ in range(2):
            assert await volume.deallocate(whole) == (0, whole)
            assert volume.zeroing == "write"
        assert await content(volume) == b"x" * size


async def test_a_failing_disk_is_no_reason_to_step_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
        raise OSError(errno.EIO, "injected")

    monkeypatch.setattr(linux, "fallocate", fallocate)
    async with writable(tmp_path / "image", REGION) as volume:
        with pytest.raises(BlockferryError) as caught:
            await volume.unmap([(0, REGION)])
        assert (caught.value.code, caught.value.offset, caught.value.length) == (Code.IO_ERROR, 0, REGION)
        assert volume.zeroing == "punch-hole"


# --- reading and writing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("left", "missing_at"), [(0, 0), (100, 100), (65536, 65536), (99_999, 99_999)])
async def test_an_image_that_shrinks_while_it_is_read_is_an_error_not_zeros(
    directory: Path, left: int, missing_at: int
) -> None:
    path = directory / "image"
    path.write_bytes(b"x" * 100_000)
    async with readable(path) as volume:
        os.truncate(path, left)
        assert await volume.current_size() == left
        with pytest.raises(BlockferryError) as caught:
            await content(volume)
        error = caught.value
        assert (error.code, error.offset, error.length) == (Code.SOURCE_CHANGED, missing_at, 100_000 - left)
        assert str(left) in error.cause
        if left:
            buffer = bytearray(left)
            await volume.read_into(0, memoryview(buffer))
            assert buffer == b"x" * left


async def test_short_reads_and_writes_of_the_kernel_are_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_read, real_write = os.preadv, os.pwrite

    def preadv(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        return real_read(fd, [buffers[0][:1000]], offset)

    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real_write(fd, data[:999], offset))
    data = os.urandom(10_001)
    async with writable(tmp_path / "image", 20_000) as volume:
        await volume.write([(5_000, data), (19_999, b"y")])
        assert await content(volume) == bytes(5_000) + data + bytes(4_998) + b"y"


@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.ENOSPC, Code.OUT_OF_SPACE), (errno.EDQUOT, Code.OUT_OF_SPACE), (errno.EIO, Code.IO_ERROR)],
)
async def test_a_write_that_fails_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: Code
) -> None:
    real = os.pwrite

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        if offset >= 6_000:
            raise OSError(number, "injected")
        return real(fd, data[:1000], offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    async with writable(tmp_path / "image", 20_000) as volume:
        with pytest.raises(BlockferryError) as caught:
            await volume.write([(5_000, bytes(3_000))])
        assert (caught.value.code, caught.value.offset, caught.value.length) == (code, 6_000, 2_000)


async def test_a_read_or_flush_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> int:
        raise OSError(errno.EIO, "injected")

    async with writable(tmp_path / "image", 20_000) as volume:
        monkeypatch.setattr(os, "preadv", fail)
        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(BlockferryError) as caught:
            await volume.read_into(4_096, memoryview(bytearray(10)))
        assert (caught.value.code, caught.value.offset, caught.value.length) == (Code.IO_ERROR, 4_096, 10)
        with pytest.raises(BlockferryError) as caught:
            await volume.flush()
        assert caught.value.code is Code.IO_ERROR


# --- opening ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("missing", Code.NOT_FOUND),
        ("file/below", Code.NOT_FOUND),
        ("directory", Code.UNSUPPORTED),
        ("fifo", Code.UNSUPPORTED),
        ("null", Code.UNSUPPORTED),
        ("empty", Code.INVALID_ARGUMENT),
    ],
)
async def test_what_is_no_image_is_refused_and_left_alone(tmp_path: Path, name: str, code: Code, write: bool) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "empty").touch()
    (tmp_path / "null").symlink_to("/dev/null")
    os.mkfifo(tmp_path / "fifo")
    before = sorted(os.listdir(tmp_path))
    # An open that waits for the other end of a FIFO would hang.
    async with asyncio.timeout(60):
        with pytest.raises(BlockferryError) as caught:
            await ImageVolume.open(tmp_path / name, writable=write)
    assert caught.value.code is code
    assert str(tmp_path / name) in caught.value.line()
    assert sorted(os.listdir(tmp_path)) == before


async def test_an_image_without_permission_is_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*arguments: object, **named: object) -> int:
        raise OSError(errno.EACCES, "injected")

    (tmp_path / "image").write_bytes(b"x")
    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(BlockferryError) as caught:
        await ImageVolume.open(tmp_path / "image")
    assert caught.value.code is Code.UNREADABLE
    assert "permission" in caught.value.next


async def test_create_makes_grows_and_never_shrinks(tmp_path: Path) -> None:
    path = tmp_path / "image"
    async with writable(path, 5_000) as volume:
        await volume.write([(0, b"x" * 5_000)])
    async with writable(path, 9_000) as volume:
        assert await content(volume) == b"x" * 5_000 + bytes(4_000)
    with pytest.raises(BlockferryError) as caught:
        await ImageVolume.create(path, 8_999)
    assert caught.value.code is Code.SIZE_MISMATCH
    assert path.read_bytes() == b"x" * 5_000 + bytes(4_000)


@pytest.mark.parametrize("size", [-1, 2**63 - 1])
async def test_create_says_so_where_the_size_is_impossible(place: Place, size: int) -> None:
    with pytest.raises(BlockferryError):
        await ImageVolume.create(place("ext4") / "image", size)


async def test_no_descriptor_is_left_behind(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "image").write_bytes(b"x")
    before = set(os.listdir("/proc/self/fd"))
    for path in (tmp_path, tmp_path / "empty", tmp_path / "missing"):
        with pytest.raises(BlockferryError):
            await ImageVolume.open(path)
    async with readable(tmp_path / "image") as volume:
        await volume.allocation(REGION)
        await volume.writers()
    await volume.close()
    assert set(os.listdir("/proc/self/fd")) == before


# --- who else is there ------------------------------------------------------------------------------------------


async def test_a_writer_in_another_process_is_named(directory: Path) -> None:
    path = directory / "image"
    path.write_bytes(b"x")
    async with readable(path) as volume:
        assert await volume.writers() == []
        with holding(path, os.O_RDONLY):
            assert await volume.writers() == []
        with holding(path, os.O_RDWR) as process:
            (found,) = await volume.writers()
            assert found.endswith(f"({process})")
        assert await volume.writers() == []


async def test_a_loop_device_over_the_image_is_named(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(2**20))
    async with readable(path) as volume:
        try:
            with loop_device(path) as device:
                assert f"{device} (loop device)" in await volume.writers()
        except Unavailable as error:
            pytest.skip(str(error))
        assert await volume.writers() == []


@pytest.mark.parametrize("read", [False, True])
@pytest.mark.parametrize("kind", ["ext4", "xfs"])
async def test_what_was_reserved_and_not_written_is_given_back(place: Place, kind: str, read: bool) -> None:
    volume = await ImageVolume.create(place(kind) / "image", 64 * 4096)
    await volume.write([(0, b"a" * 4096)])
    if read:
        # A hole that was read is in the page cache, as zeros.
        await volume.read_into(0, memoryview(bytearray(64 * 4096)))
    await volume.reserve([(2 * 4096, 20 * 4096), (40 * 4096, 4096)])
    assert volume.path.stat().st_blocks * 512 == 22 * 4096
    # Written, and not flushed: the file system may still call it reserved.
    await volume.write([(5 * 4096, b"b" * 8192), (41 * 4096, b"c" * 4096)])
    await volume.release()
    content = b"a" * 4096 + bytes(4 * 4096) + b"b" * 8192 + bytes(34 * 4096) + b"c" * 4096 + bytes(22 * 4096)
    assert volume.path.read_bytes() == content
    await volume.flush()
    # ext4 keeps the block in which it had noted the many pieces.
    assert volume.path.stat().st_blocks * 512 in (4 * 4096, 5 * 4096 if kind == "ext4" else 0)
    # More than once is as good.
    await volume.release()
    assert volume.path.read_bytes() == content
    await volume.close()
