"""Every kind of volume keeps the contract of `Volume`, whatever it is made of (`tests/volumes.py` lists them)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping

import pytest
from blake3 import blake3
from blockferry.common.digests import digest_size
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.regions import Provenance
from blockferry.common.volumes import Volume
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.filesystems import FileSystems, Unavailable
from tests.images import noise
from tests.support import Server
from tests.volumes import KINDS, Kind, Made, Opener, Pieces, Site

BLOCK = 4096
REGION = 65536
KEY = bytes(range(32))

SIZES = [1, 513, BLOCK, REGION + 1, 5 * REGION + 3 * BLOCK + 512]
"""Sizes asked for; each kind makes the next one it can."""
SIZE = SIZES[-1]

FIXED = {"memory", "device", "qemu-raw", "qemu-qcow2", "nbdkit-memory", "recovery-point", "replica", "archive"}
"""Kinds of which nobody can take anything away unseen, or which do not tell."""


def _of(kinds: Mapping[str, Kind]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("kind", kinds.values(), ids=kinds)


all_kinds = _of(KINDS)
written_kinds = _of({name: kind for name, kind in KINDS.items() if kind.written})
read_kinds = _of({name: kind for name, kind in KINDS.items() if not kind.written})


@pytest.fixture(scope="module")
def site(file_systems: FileSystems, request: pytest.FixtureRequest) -> Site:
    """Where volumes are made; the server starts when the first replica is wanted."""

    def server() -> Server:
        found = request.getfixturevalue("server")
        assert isinstance(found, Server)
        return found

    return Site(file_systems, server)


@contextlib.contextmanager
def made(site: Site, kind: Kind, size: int, pieces: Pieces = ()) -> Iterator[Made]:
    try:
        with kind.make(site, size, pieces) as found:
            yield found
    except Unavailable as error:
        pytest.skip(str(error))


@contextlib.asynccontextmanager
async def opened(opener: Opener | None) -> AsyncIterator[Volume]:
    assert opener is not None
    volume = await opener()
    try:
        yield volume
    finally:
        await volume.close()


def pieces_for(size: int) -> list[tuple[int, bytes]]:
    """The first bytes, a few blocks inside, and the last byte of a volume, as far as there is room."""
    wanted = [(0, 10), (2 * BLOCK, BLOCK), (REGION + 100, 3 * BLOCK), (3 * REGION, REGION)]
    found = [(offset, noise(offset, length)) for offset, length in wanted if offset + length <= size - 1]
    return [*found, (size - 1, b"\xff")]


def content_of(size: int, pieces: Iterable[tuple[int, bytes]]) -> bytearray:
    content = bytearray(size)
    for offset, data in pieces:
        content[offset : offset + len(data)] = data
    return content


async def read(volume: Volume, offset: int = 0, length: int | None = None) -> bytes:
    # Whatever is not filled would show.
    buffer = bytearray(b"\xaa" * (volume.size - offset if length is None else length))
    await volume.read_into(offset, memoryview(buffer))
    return bytes(buffer)


def regions_touched(extents: Iterable[tuple[int, int]], region_size: int) -> set[int]:
    return {
        number
        for offset, length in extents
        if length
        for number in range(offset // region_size, (offset + length - 1) // region_size + 1)
    }


async def check_allocation(
    kind: Kind, volume: Volume, must: Iterable[tuple[int, int]], may: Iterable[tuple[int, int]], region_size: int
) -> None:
    """Nothing that holds data (`must`) is missing, and an exact map has nothing that never did (`may`)."""
    found = await volume.allocation(region_size)
    provenance = kind.knows(region_size)
    assert found.provenance is provenance
    assert (found.geometry.size, found.geometry.region_size) == (volume.size, region_size)
    regions = set(found.regions)
    assert regions_touched(must, region_size) <= regions
    if provenance is Provenance.EXACT:
        assert regions <= regions_touched(may, region_size)
    elif provenance is Provenance.ABSENT:
        assert regions == set(range(found.geometry.count))


def digest_of(data: bytes, size: int) -> bytes:
    """A digest as docs/protocol.md defines it."""
    pieces = [data[start : start + 65536] for start in range(0, len(data), 65536)]
    if len(pieces) > 1:
        data = b"".join(blake3(piece, key=KEY).digest(16) for piece in pieces)
    return blake3(data, key=KEY).digest(size)


def edges(size: int) -> list[tuple[int, int]]:
    """(offset, length) of ranges that begin or end at, before and after what matters: ends, blocks, regions."""
    marks = {0, 1, 511, 512, 513, BLOCK - 1, BLOCK, BLOCK + 1, REGION - 1, REGION, REGION + 1, 3 * REGION + 7}
    points = sorted({mark for mark in marks if mark < size} | {size - mark for mark in marks if mark <= size})
    return [(start, end - start) for start in points for end in points if start < end]


# --- looking ----------------------------------------------------------------------------------------------------------


@all_kinds
@pytest.mark.parametrize("asked", SIZES)
async def test_what_is_made_is_what_is_read(site: Site, kind: Kind, asked: int) -> None:
    size = kind.size(asked)
    pieces = pieces_for(size)
    content = content_of(size, pieces)
    with made(site, kind, size, pieces) as device:
        async with opened(device.readable) as volume:
            assert (volume.size, await volume.current_size()) == (size, size)
            assert volume.block_size == BLOCK
            assert size % volume.sector_size == 0 and kind.granularity % volume.sector_size == 0
            assert volume.preferred_size >= volume.sector_size
            assert volume.uri and volume.zeroing
            assert await volume.writers() == []
            assert await read(volume) == content
            for offset, length in edges(size)[:: 1 + size // REGION]:
                assert await read(volume, offset, length) == content[offset : offset + length]
            extents = [(offset, len(data)) for offset, data in pieces]
            for region_size in (REGION, 1 << 20, 1 << 24):
                await check_allocation(kind, volume, extents, extents, region_size)


@all_kinds
async def test_a_volume_without_data(site: Site, kind: Kind) -> None:
    with made(site, kind, kind.size(SIZE)) as device:
        async with opened(device.readable) as volume:
            await check_allocation(kind, volume, [], [], REGION)
            assert not any(await read(volume))


@all_kinds
async def test_a_volume_full_of_data(site: Site, kind: Kind) -> None:
    size = kind.size(SIZE)
    whole = [(0, noise("full", size))]
    with made(site, kind, size, whole) as device:
        async with opened(device.readable) as volume:
            await check_allocation(kind, volume, [(0, size)], [(0, size)], REGION)
            assert await read(volume) == whole[0][1]


@all_kinds
async def test_reading_data_leaves_holes_alone_and_misses_nothing(site: Site, kind: Kind) -> None:
    size = kind.size(SIZE)
    pieces = pieces_for(size)
    content = content_of(size, pieces)
    with made(site, kind, size, pieces) as device:
        async with opened(device.readable) as volume:
            for offset, length in [(0, size), (BLOCK, REGION), (REGION, BLOCK), (3 * REGION, size - 3 * REGION)]:
                buffer = bytearray(b"\xaa" * length)
                found = await volume.read_data_into(offset, memoryview(buffer))
                position = 0
                for start, count in found:
                    assert position <= start and count > 0
                    assert start % BLOCK == 0 and ((start + count) % BLOCK == 0 or start + count == length)
                    assert not any(content[offset + position : offset + start])
                    assert buffer[position:start] == b"\xaa" * (start - position)
                    assert buffer[start : start + count] == content[offset + start : offset + start + count]
                    position = start + count
                assert not any(content[offset + position : offset + length])
                assert buffer[position:] == b"\xaa" * (length - position)


@all_kinds
async def test_digests_are_those_of_the_content(site: Site, kind: Kind) -> None:
    size = kind.size(SIZE)
    content = content_of(size, pieces_for(size))
    with made(site, kind, size, pieces_for(size)) as device:
        async with opened(device.readable) as volume:
            for piece_size, region_size in [(1 << 20, 1 << 20), (REGION, 1 << 20), (BLOCK, 1 << 20)]:
                count = -(-size // piece_size)
                length = digest_size(piece_size, region_size)
                runs = [(0, 1)] if count < 4 else [(0, 2), (3, count - 3)]
                expected = b"".join(
                    digest_of(bytes(content[number * piece_size :][:piece_size]), length)
                    for first, many in runs
                    for number in range(first, first + many)
                )
                assert await volume.digests(piece_size, runs, KEY, region_size) == expected


@all_kinds
async def test_a_volume_for_reading_refuses_to_be_written(site: Site, kind: Kind) -> None:
    size = kind.size(SIZE)
    content = content_of(size, pieces_for(size))
    with made(site, kind, size, pieces_for(size)) as device:
        async with opened(device.readable) as volume:
            attempts: list[Callable[[], object]] = [
                lambda: volume.write([(0, b"x")]),
                lambda: volume.unmap([(0, BLOCK)]),
                lambda: volume.deallocate([(0, BLOCK)]),
            ]
            for attempt in attempts:
                with pytest.raises(BlockferryError) as caught:
                    await attempt()  # type: ignore[misc]
                assert caught.value.code is Code.READ_ONLY
            assert await read(volume) == content


@all_kinds
async def test_closing_twice_is_closing_once(site: Site, kind: Kind) -> None:
    with made(site, kind, kind.size(SIZE)) as device:
        for opener in filter(None, (device.readable, device.writable)):
            volume = await opener()
            await volume.close()
            await volume.close()


@all_kinds
async def test_what_is_no_longer_there_is_an_error_that_says_where(site: Site, kind: Kind) -> None:
    size = kind.size(8 * REGION)
    whole = [(0, noise("full", size))]
    with made(site, kind, size, whole) as device:
        if device.shorten is None:
            assert kind in [KINDS[name] for name in FIXED]
            return
        async with opened(device.readable) as volume:
            device.shorten(4 * REGION)
            buffer = memoryview(bytearray(size))
            for method in (volume.read_into, volume.read_data_into):
                with pytest.raises(BlockferryError) as caught:
                    await method(2 * REGION, buffer[: size - 2 * REGION])
                error = caught.value
                assert error.code in (Code.SOURCE_CHANGED, Code.IO_ERROR)
                assert error.volume == volume.uri
                assert error.offset is not None and error.length is not None
                assert 2 * REGION <= error.offset <= 4 * REGION and error.offset + error.length == size
            assert await read(volume, 0, 2 * REGION) == whole[0][1][: 2 * REGION]


# --- changing ---------------------------------------------------------------------------------------------------------


@written_kinds
@pytest.mark.parametrize("asked", SIZES)
async def test_what_is_written_anywhere_stays(site: Site, kind: Kind, asked: int) -> None:
    size = kind.size(asked)
    content = bytearray(size)
    with made(site, kind, size) as device:
        async with opened(device.writable) as volume:
            for number, (offset, length) in enumerate(edges(size)[:: 1 + size // REGION]):
                data = bytes([1 + number % 255]) * length
                await volume.write([(offset, data)])
                content[offset : offset + length] = data
                assert await read(volume, offset, length) == data
            assert await read(volume) == content
            await check_allocation(kind, volume, [(0, size)], [(0, size)], REGION)
            await volume.flush()
        async with opened(device.readable) as volume:
            assert await read(volume) == content
            await check_allocation(kind, volume, [(0, size)], [(0, size)], REGION)


@written_kinds
async def test_zeros_that_are_written_are_data_until_they_are_unmapped(site: Site, kind: Kind) -> None:
    with made(site, kind, kind.size(SIZE)) as device:
        async with opened(device.writable) as volume:
            zeros = [(REGION, BLOCK)]
            await volume.write([(REGION, bytes(BLOCK))])
            held = [] if kind.looks_for_zeros else zeros
            await check_allocation(kind, volume, held, held, REGION)
            assert await volume.unmap(zeros) == (0 if kind.looks_for_zeros else BLOCK)
            await check_allocation(kind, volume, [], [], REGION)


@written_kinds
@pytest.mark.parametrize("asked", SIZES)
async def test_what_is_unmapped_reads_as_zeros_and_nothing_else_does(site: Site, kind: Kind, asked: int) -> None:
    size = kind.size(asked)
    whole = noise("whole", size)
    with made(site, kind, size, [(0, whole)]) as device:
        async with opened(device.writable) as volume:
            for offset, length in edges(size)[:: 1 + size // BLOCK]:
                content = bytearray(whole)
                content[offset : offset + length] = bytes(length)
                assert await volume.unmap([(offset, length)]) <= length
                assert await read(volume) == content
                await volume.write([(offset, whole[offset : offset + length])])
            # The tail alone, then everything.
            tail = size // BLOCK * BLOCK if size % BLOCK else size - min(size, BLOCK)
            assert await volume.unmap([(tail, size - tail)]) == size - tail
            assert await read(volume) == whole[:tail] + bytes(size - tail)
            stays = kind.stays(size)
            before = min(-(-tail // kind.page_size) * kind.page_size, size)
            assert await volume.unmap([(0, size)]) == (before + stays if kind.deallocates else size)
            await check_allocation(kind, volume, [], [(size - stays, stays)], REGION)
            assert await volume.unmap([(0, size)]) == (stays if kind.deallocates else size)
            await volume.flush()
        async with opened(device.readable) as volume:
            assert await read(volume) == bytes(size)
            await check_allocation(kind, volume, [], [(size - stays, stays)], REGION)


@written_kinds
async def test_deallocating_zeroes_or_leaves_alone_and_says_which(site: Site, kind: Kind) -> None:
    size = kind.size(SIZE)
    whole = noise("whole", size)
    extents = [(0, BLOCK), (REGION, REGION), (3 * REGION, size - 3 * REGION)]
    total = sum(length for _, length in extents)
    with made(site, kind, size, [(0, whole)]) as device:
        async with opened(device.writable) as volume:
            freed, left = await volume.deallocate(extents)
            content = bytearray(whole)
            for offset, length in extents:
                if (offset, length) not in left:
                    content[offset : offset + length] = bytes(length)
            assert (freed, list(left)) == ((total, []) if kind.vouches else (0, extents))
            assert await read(volume) == content
            kept = [(0, size)] if left else [(BLOCK, REGION - BLOCK), (2 * REGION, REGION)]
            stays = kind.stays(size)
            await check_allocation(kind, volume, kept, [*kept, (size - stays, stays)], REGION)


@written_kinds
async def test_many_operations_at_once(site: Site, kind: Kind) -> None:
    count = 64
    size = kind.size(2 * count * BLOCK + 512)
    before = noise("before", size)
    content = bytearray(before)
    with made(site, kind, size, [(0, before)]) as device:
        async with opened(device.writable) as volume:

            async def work(number: int) -> None:
                # Neighbours never share a block; each range is written, read, unmapped and read again.
                offset, data = 2 * number * BLOCK, bytes([number + 1]) * BLOCK
                await volume.write([(offset, data)])
                assert await read(volume, offset, BLOCK) == data
                if number % 2:
                    assert await volume.unmap([(offset, BLOCK)]) == BLOCK
                    assert await read(volume, offset, BLOCK) == bytes(BLOCK)
                assert await read(volume, offset + BLOCK, BLOCK) == before[offset + BLOCK : offset + 2 * BLOCK]
                await volume.flush()

            await asyncio.gather(*map(work, range(count)))
            for number in range(count):
                offset = 2 * number * BLOCK
                content[offset : offset + BLOCK] = bytes(BLOCK) if number % 2 else bytes([number + 1]) * BLOCK
            assert await read(volume) == content
        async with opened(device.readable) as volume:
            assert await read(volume) == content


# --- any history ------------------------------------------------------------------------------------------------------

ranges = st.tuples(st.integers(0, SIZE - 1), st.one_of(st.integers(1, 600), st.integers(1, 2 * REGION)), st.booleans())
histories = st.lists(st.tuples(st.sampled_from(["write", "unmap", "deallocate", "flush"]), ranges), max_size=8)


class Model:
    """What a volume must hold, and which blocks its map must and may have."""

    def __init__(self, kind: Kind, size: int) -> None:
        self.content = bytearray(size)
        self._stays = kind.stays(size)
        self.touched: set[int] = {size // BLOCK} if self._stays else set()
        """Blocks that may hold data: written, or zeroed in part, and not unmapped as a whole since."""

    def write(self, offset: int, data: bytes) -> None:
        self.content[offset : offset + len(data)] = data
        self.touched.update(range(offset // BLOCK, -(-(offset + len(data)) // BLOCK)))

    def unmap(self, offset: int, length: int) -> None:
        end = offset + length
        self.write(offset, bytes(length))
        last = -(-end // BLOCK) if end == len(self.content) and not self._stays else end // BLOCK
        self.touched.difference_update(range(-(-offset // BLOCK), last))

    def must(self) -> list[tuple[int, int]]:
        starts = range(0, len(self.content), BLOCK)
        return [(start, BLOCK) for start in starts if any(self.content[start : start + BLOCK])]

    def may(self) -> list[tuple[int, int]]:
        return [(block * BLOCK, BLOCK) for block in self.touched]


@written_kinds
def test_any_history_reads_and_maps_as_a_model_does(site: Site, kind: Kind) -> None:
    size = kind.size(SIZE)
    with made(site, kind, size) as device, asyncio.Runner() as runner:

        @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
        @given(histories)
        def living(history: list[tuple[str, tuple[int, int, bool]]]) -> None:
            runner.run(live(kind, device, size, history))

        living()


async def live(kind: Kind, device: Made, size: int, history: list[tuple[str, tuple[int, int, bool]]]) -> None:
    """One history, which begins with nothing: what the last one left is unmapped."""
    model = Model(kind, size)
    async with opened(device.writable) as volume:
        await volume.unmap([(0, size)])
        for number, (step, (offset, length, aligned)) in enumerate(history):
            if aligned:
                offset, length = offset // BLOCK * BLOCK, -(-length // BLOCK) * BLOCK
            length = min(length, size - offset)
            if step == "write":
                written = bytes([number + 1]) * length
                await volume.write([(offset, written)])
                model.write(offset, written)
            elif step == "unmap":
                assert await volume.unmap([(offset, length)]) <= length
                model.unmap(offset, length)
            elif step == "deallocate":
                _, left = await volume.deallocate([(offset, length)])
                if not left:
                    model.unmap(offset, length)
                assert list(left) in ([], [(offset, length)])
            else:
                await volume.flush()
            assert await read(volume, offset, length) == model.content[offset : offset + length]
        assert await read(volume) == model.content
        await check_allocation(kind, volume, model.must(), model.may(), REGION)
    async with opened(device.readable) as volume:
        assert await read(volume) == model.content
        await check_allocation(kind, volume, model.must(), model.may(), REGION)


@read_kinds
def test_any_range_is_what_was_made(site: Site, kind: Kind) -> None:
    """The model of what is never written."""
    content = content_of(SIZE, pieces_for(SIZE))

    async def open_it(opener: Opener) -> Volume:
        return await opener()

    with made(site, kind, SIZE, pieces_for(SIZE)) as device, asyncio.Runner() as runner:
        volume = runner.run(open_it(device.readable))

        @settings(max_examples=50, deadline=None)
        @given(ranges)
        def reading(where: tuple[int, int, bool]) -> None:
            offset, length = where[0], min(where[1], SIZE - where[0])
            assert runner.run(read(volume, offset, length)) == content[offset : offset + length]

        try:
            reading()
        finally:
            runner.run(volume.close())
