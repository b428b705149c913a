"""A volume under deltas is a volume like any other: whatever is written, zeroed, read, flushed and grown, in whatever
order and wherever it begins and ends, it holds what a plain array of bytes would."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from blockferry.common import disk
from blockferry.common.digests import is_zero
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.regions import AllocationMap, Geometry, Provenance
from blockferry.common.volumes import ImageVolume
from blockferry.server.delta import Delta
from blockferry.server.gate import Gate
from blockferry.server.overlay import OverlayVolume
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.layers import MOST, B, Image, Layer, cut, images, layers, quick_directory, shortened, sizes, stamped
from tests.unit.memory_volume import MemoryVolume
from tests.unit.stores import content_of

REGION = 65536


@dataclass
class Stack:
    """An image under deltas, newest first, as a volume of `size` bytes."""

    size: int
    image: Image
    below: list[Layer]

    def content(self) -> bytes:
        """What it holds."""
        found = cut(self.image.content(), self.size)
        for layer in reversed(self.below):
            found = layer.over(found)
        return found


@st.composite
def stacks(draw: st.DrawFn) -> Stack:
    """An image and up to three deltas of volumes that have at least this size: generations only grow."""
    size = draw(sizes)
    below = []
    least = size
    for tag in range(draw(st.integers(0, 3))):
        least = draw(st.sampled_from([least, least + 1, least + B, least + 2 * B + 5]))
        below.append(draw(layers(tag, least)))
    return Stack(size, draw(images()), below)


class Rig:
    """A stack on a disk, with a top that can be written."""

    def __init__(self, directory: Path, stack: Stack, base: ImageVolume) -> None:
        self.directory = directory
        self.base = base
        self.below = [layer.make(directory / f"{layer.tag}.undo") for layer in stack.below]
        self.top = Delta.create(directory / "work.redo", stack.size)
        self.gate = Gate()
        self.volume = self.over(stack.size)

    def over(self, size: int) -> OverlayVolume:
        return OverlayVolume("work", size, self.base, lambda: [self.top, *self.below], self.gate, top=self.top)

    async def reopen(self, size: int) -> None:
        """Whoever worked here dies after a flush, and another one goes on with a volume of `size` bytes."""
        await self.volume.flush()
        self.top.close()
        self.top = Delta.open(self.top.path)
        self.top.resize(size)
        self.volume = self.over(size)

    def files(self) -> dict[str, bytes]:
        """What must never change."""
        found = self.directory.iterdir()
        return {path.name: path.read_bytes() for path in found if not path.name.startswith("work.")}

    async def close(self) -> None:
        for delta in (self.top, *self.below):
            delta.close()
        await self.base.close()


@contextlib.asynccontextmanager
async def rigged(stack: Stack) -> AsyncIterator[Rig]:
    """A stack on a disk."""
    with quick_directory() as directory:
        rig = Rig(directory, stack, await stack.image.make(directory / "image.raw"))
        try:
            yield rig
        finally:
            await rig.close()


async def read(volume: OverlayVolume, offset: int, length: int) -> bytes:
    # What was in the buffer must not show through.
    found = bytearray(b"\xee" * length)
    await volume.read_into(offset, memoryview(found))
    return bytes(found)


async def check(volume: OverlayVolume, model: bytes, offset: int, length: int) -> None:
    """What is read, what counts as data and what is mapped, against plain bytes."""
    assert await read(volume, offset, length) == model[offset : offset + length]
    found = await volume.data_extents(offset, length)
    rest = bytearray(model[offset : offset + length])
    end = offset
    for start, size in found:
        assert end <= start and size > 0 and start + size <= offset + length, found
        rest[start - offset : start - offset + size] = bytes(size)
        end = start + size
    assert is_zero(memoryview(rest)), "there is data where nothing was said to be"
    geometry = Geometry(len(model), REGION)
    mapped = await volume.allocation(REGION)
    assert (mapped.geometry, mapped.provenance) == (geometry, Provenance.EXACT)
    data = {region for region in range(geometry.count) if any(model[region * REGION : (region + 1) * REGION])}
    assert data <= set(mapped.regions) <= set(range(geometry.count))


@given(stacks(), st.data())
async def test_reading_through_deltas(stack: Stack, data: st.DataObject) -> None:
    async with rigged(stack) as rig:
        volume = OverlayVolume("@1", stack.size, rig.base, lambda: rig.below, rig.gate)
        model = stack.content()
        await check(volume, model, 0, stack.size)
        offset = data.draw(st.integers(0, stack.size - 1))
        await check(volume, model, offset, data.draw(st.integers(1, stack.size - offset)))
        # Nothing is called data that is a hole in every layer, or zero in the newest that knows.
        held = set(stack.image.held)
        for layer in reversed(stack.below):
            held = (held - layer.zero) | layer.data
        expected = sum(shortened(block, stack.size) for block in held)
        assert sum(size for _, size in await volume.data_extents(0, stack.size)) == expected


ACTIONS = st.tuples(
    st.sampled_from(["write", "write", "unmap", "read", "reopen", "grow"]),
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.booleans()), min_size=1, max_size=3),
)


def range_of(size: int, start: float, length: float, aligned: bool) -> tuple[int, int]:
    """(offset, length) in a volume; aligned ones are made of whole blocks, or end where the volume does."""
    offset = min(int(start * size), size - 1)
    end = min(offset + 1 + int(length * (size - offset)), size)
    if aligned:
        offset = offset // B * B
        end = min(-(-end // B) * B, size)
    return offset, end - offset


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(stacks(), st.lists(ACTIONS, max_size=8))
async def test_whatever_happens_to_it_it_holds_what_plain_bytes_would(
    stack: Stack, history: list[tuple[str, list[tuple[float, float, bool]]]]
) -> None:
    # No work is smaller than the image below it: replicas never shrink.
    stack = Stack(stack.size, Image(stack.size, {one for one in stack.image.held if one * B < stack.size}), stack.below)
    async with rigged(stack) as rig:
        before = rig.files()
        model = bytearray(stack.content())
        for number, (action, wanted) in enumerate(history):
            size = len(model)
            found = [range_of(size, *one) for one in wanted]
            match action:
                case "write":
                    extents = [
                        (offset, bytes([(number * 16 + index) % 255 + 1]) * length)
                        for index, (offset, length) in enumerate(found)
                    ]
                    await rig.volume.write(extents)
                    for offset, content in extents:
                        model[offset : offset + len(content)] = content
                case "unmap":
                    for offset, length in found:
                        held = sum(one for _, one in await rig.volume.data_extents(offset, length))
                        assert await rig.volume.unmap([(offset, length)]) == held
                        model[offset : offset + length] = bytes(length)
                case "read":
                    await check(rig.volume, bytes(model), *found[0])
                case "reopen":
                    await rig.reopen(size)
                case "grow" if not stack.below:
                    # Only a session's work grows, and there is nothing between it and the image.
                    size += found[0][1]
                    await rig.reopen(size)
                    model += bytes(size - len(model))
            assert not rig.top.data & rig.top.zero
            await check(rig.volume, bytes(model), 0, len(model))
        await rig.reopen(len(model))
        await check(rig.volume, bytes(model), 0, len(model))
        assert rig.files() == before


@given(stacks(), st.data())
async def test_what_a_session_writes_is_seen_by_nobody_below(stack: Stack, data: st.DataObject) -> None:
    async with rigged(stack) as rig:
        other = OverlayVolume("@1", stack.size, rig.base, lambda: rig.below, rig.gate)
        offset, length = range_of(stack.size, *data.draw(st.tuples(st.floats(0, 1), st.floats(0, 1), st.booleans())))
        await rig.volume.write([(offset, b"w" * length)])
        await rig.volume.unmap([(0, stack.size)])
        await check(other, stack.content(), 0, stack.size)
        await check(rig.volume, bytes(stack.size), 0, stack.size)
        assert not rig.top.data


# --- one by one -------------------------------------------------------------------------------------------------

FULL = Image(MOST * B, set(range(MOST)))
SPARSE = Image(MOST * B, {0, 5})


async def test_zeroing_what_is_zero_below_notes_nothing() -> None:
    async with rigged(Stack(20 * B, SPARSE, [])) as rig:
        assert await rig.volume.unmap([(0, 20 * B)]) == 2 * B
        assert (set(rig.top.data), set(rig.top.zero)) == (set(), {0, 5})
        assert await rig.volume.unmap([(0, 20 * B)]) == 0
        assert set(rig.top.zero) == {0, 5}


async def test_zeroing_gives_the_space_back() -> None:
    async with rigged(Stack(MOST * B, SPARSE, [])) as rig:
        await rig.volume.write([(0, b"x" * MOST * B)])
        assert rig.top.path.stat().st_blocks * 512 == MOST * B
        assert await rig.volume.unmap([(2 * B, 7 * B)]) == 7 * B
        assert rig.top.path.stat().st_blocks * 512 == (MOST - 7) * B
        assert rig.top.bytes_held == (MOST - 7) * B
        assert set(rig.top.zero) == {5}


async def test_zeroing_part_of_a_block_that_holds_nothing_takes_no_space() -> None:
    async with rigged(Stack(MOST * B, SPARSE, [])) as rig:
        assert await rig.volume.unmap([(B + 1, B), (3 * B + 7, 20)]) == 0
        assert not rig.top.data and not rig.top.zero
        # In a block that holds something the rest of it stays.
        assert await rig.volume.unmap([(10, 20)]) == 20
        assert set(rig.top.data) == {0}
        assert await read(rig.volume, 0, B) == stamped(100, 0)[:10] + bytes(20) + stamped(100, 0)[30:]


async def test_the_last_block_is_as_short_as_the_volume() -> None:
    size = 3 * B + 100
    async with rigged(Stack(size, Image(size, {3}), [])) as rig:
        await rig.volume.write([(3 * B, b"t" * 100)])
        assert rig.top.path.stat().st_size == size
        assert await read(rig.volume, 3 * B, 100) == b"t" * 100
        assert await rig.volume.unmap([(3 * B, 100)]) == 100
        assert (set(rig.top.data), set(rig.top.zero)) == (set(), {3})


async def test_an_image_of_another_size() -> None:
    # Larger: an older generation is read. Smaller: what the volume has grown by is zero.
    async with rigged(Stack(3 * B + 7, FULL, [])) as rig:
        assert await content_of(rig.volume) == FULL.content()[: 3 * B + 7]
        assert await rig.volume.data_extents(0, 3 * B + 7) == [(0, 3 * B + 7)]
    async with rigged(Stack(MOST * B + 10 * REGION, FULL, [])) as rig:
        assert await read(rig.volume, MOST * B - 5, 10) == FULL.content()[-5:] + bytes(5)
        assert await rig.volume.data_extents(MOST * B - 5, 10) == [(MOST * B - 5, 5)]
        assert await rig.volume.data_extents(MOST * B + 1, 10) == []
        mapped = await rig.volume.allocation(REGION)
        assert (set(mapped.regions), mapped.geometry.count) == ({0}, 11)


class Unknowing(MemoryVolume):
    """A volume that cannot tell where its data is."""

    async def allocation(self, region_size: int) -> AllocationMap:
        return AllocationMap.full(Geometry(self.size, region_size))


@pytest.mark.parametrize(
    ("base", "provenance"), [(MemoryVolume, Provenance.EXACT), (Unknowing, Provenance.ABSENT)], ids=["exact", "absent"]
)
async def test_a_map_knows_what_the_image_knows(
    tmp_path: Path, base: type[MemoryVolume], provenance: Provenance
) -> None:
    top = Delta.create(tmp_path / "work.redo", 4 * REGION)
    below = base(bytes(2 * REGION) + b"x" * REGION + bytes(REGION))
    volume = OverlayVolume("work", 4 * REGION, below, lambda: [top], Gate(), top=top)
    everything = [0, 1, 2, 3]
    assert (await volume.allocation(REGION)).provenance is provenance
    assert list((await volume.allocation(REGION)).regions) == ([2] if base is MemoryVolume else everything)
    await volume.unmap([(0, REGION)])
    mapped = await volume.allocation(REGION)
    # Zeros that this session has made are known, whatever the image knows.
    known = Provenance.EXACT if provenance is Provenance.EXACT else Provenance.CONSERVATIVE
    assert (list(mapped.regions), mapped.provenance) == ([1, 2, 3], known)
    top.close()


async def test_a_full_journal_refuses_the_change_and_nothing_else() -> None:
    async with rigged(Stack(MOST * B, FULL, [])) as rig:
        volume = OverlayVolume("work", MOST * B, rig.base, lambda: [rig.top], rig.gate, top=rig.top, limit=4 * B)
        await volume.write([(0, b"a" * 2 * B), (5 * B + 3, b"b")])
        model = bytearray(FULL.content())
        model[: 2 * B], model[5 * B + 3] = b"a" * 2 * B, ord("b")
        for extents in ([(8 * B, b"c" * 2 * B)], [(8 * B, b"c" * B), (10 * B, b"d" * B)], [(8 * B + 5, b"c" * B)]):
            with pytest.raises(BlockferryError) as caught:
                await volume.write(extents)
            assert (caught.value.code, caught.value.volume) == (Code.OUT_OF_SPACE, "work")
            assert "limit of 16384" in caught.value.cause and "untouched" in caught.value.next
            assert await content_of(volume) == bytes(model)
            assert set(rig.top.data) == {0, 1, 5}
        await volume.write([(8 * B, b"c" * B)])
        with pytest.raises(BlockferryError):
            await volume.write([(9 * B, b"d")])
        # Zeroing needs no room and makes some.
        await volume.unmap([(0, 2 * B)])
        await volume.write([(9 * B, b"d" * 2 * B)])
        model[: 2 * B], model[8 * B : 11 * B] = bytes(2 * B), b"c" * B + b"d" * 2 * B
        assert await content_of(volume) == model
        await volume.flush()
        assert await rig.base.data_extents(0, MOST * B) == [(0, MOST * B)]


async def test_a_committed_generation_cannot_be_written() -> None:
    async with rigged(Stack(MOST * B, FULL, [])) as rig:
        volume = OverlayVolume("@1", MOST * B, rig.base, list, rig.gate)
        for change in (volume.write([(0, b"x")]), volume.unmap([(0, B)]), volume.flush()):
            with pytest.raises(BlockferryError, match="committed generation") as caught:
                await change
            assert caught.value.code is Code.READ_ONLY
        assert await content_of(volume) == FULL.content()


async def test_a_write_that_failed_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    async with rigged(Stack(MOST * B, FULL, [])) as rig:

        def fail(fd: int, data: bytes, offset: int) -> int:
            raise OSError(28, "injected")

        monkeypatch.setattr(disk, "pwrite", fail)
        with pytest.raises(BlockferryError) as caught:
            await rig.volume.write([(B, b"x" * 2 * B)])
        assert (caught.value.code, caught.value.offset, caught.value.length) == (Code.OUT_OF_SPACE, B, 2 * B)
        assert not rig.top.data
        assert await content_of(rig.volume) == FULL.content()


@pytest.mark.parametrize("step", ["fsync", "rename"])
async def test_a_flush_that_failed_is_told(monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    async with rigged(Stack(MOST * B, FULL, [])) as rig:

        def fail(*arguments: object) -> None:
            raise OSError(5, "injected")

        monkeypatch.setattr(disk, step, fail)
        with pytest.raises(BlockferryError, match="cannot flush") as caught:
            await rig.volume.flush()
        assert (caught.value.code, caught.value.volume) == (Code.IO_ERROR, "work")


async def test_the_index_is_written_after_the_data_it_vouches_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async with rigged(Stack(MOST * B, FULL, [])) as rig:
        await rig.volume.write([(B, b"x" * B)])
        steps: list[str] = []
        monkeypatch.setattr(rig.top, "flush", lambda: steps.append("flush"))
        monkeypatch.setattr(rig.top, "save", lambda data, zero: steps.append(f"save {list(data)} {list(zero)}"))
        await rig.volume.unmap([(0, B)])
        await rig.volume.flush()
        assert steps == ["flush", "save [1] [0]"]


async def test_layers_change_while_nobody_reads() -> None:
    old, new = Layer(0, MOST * B, {1}, {2}), Layer(1, MOST * B, {2}, {1})
    async with rigged(Stack(MOST * B, SPARSE, [old, new])) as rig:
        shown = [rig.below[0]]
        volume = OverlayVolume("@1", MOST * B, rig.base, lambda: shown, rig.gate)
        assert await content_of(volume) == old.over(SPARSE.content())
        async with rig.gate.closed():
            reading = asyncio.create_task(content_of(volume))
            mapping = asyncio.create_task(volume.data_extents(0, MOST * B))
            for _ in range(8):
                await asyncio.sleep(0)
            assert not reading.done() and not mapping.done()
            shown[:] = [rig.below[1]]
        assert await reading == new.over(SPARSE.content())
        assert await mapping == [(0, B), (2 * B, B), (5 * B, B)]
