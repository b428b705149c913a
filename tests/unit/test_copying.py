"""Copies between volumes and deltas: each does what the sets say, in batches of any size, and may be done again after
any part of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from blockferry.common.digests import Data
from blockferry.common.volumes import ImageVolume
from blockferry.server import copying
from blockferry.server.delta import Delta, below, index_of
from blockferry.server.gate import Gate
from blockferry.server.overlay import OverlayVolume
from hypothesis import given
from hypothesis import strategies as st
from pyroaring import BitMap64

from tests.unit.layers import B, Image, Layer, blocks_in, cut, images, layers, quick_directory, shortened, sizes
from tests.unit.memory_volume import MemoryVolume
from tests.unit.stores import content_of


@contextlib.contextmanager
def batches(blocks: int, extents: int) -> Iterator[None]:
    """Copying in batches of so many blocks and extents."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copying, "BATCH_SIZE", blocks * B)
        patch.setattr(copying, "BATCH_EXTENTS", extents)
        yield


BATCHES = st.tuples(st.integers(1, 4), st.integers(1, 3))


class Crash(Exception):
    """Somebody stops in the middle."""


# --- capture ----------------------------------------------------------------------------------------------------


@given(images(), st.data(), BATCHES)
async def test_before_images_are_what_was_there(image: Image, data: st.DataObject, limits: tuple[int, int]) -> None:
    wanted = data.draw(blocks_in(image.size))
    with quick_directory() as directory, batches(*limits):
        volume = await image.make(directory / "image.raw")
        undo = Delta.create(directory / "1.undo", image.size)
        await copying.capture(volume, BitMap64(sorted(wanted)), undo)
        # Zeros are noted, never copied.
        assert (set(undo.data), set(undo.zero)) == (wanted & image.held, wanted - image.held)
        undo.flush()
        undo.save(undo.data, undo.zero)
        undo.close()
        # Whatever happens to those blocks afterwards, the delta leads back.
        await volume.write([(block * B, b"n" * shortened(block, image.size)) for block in sorted(wanted)])
        undo = Delta.open(undo.path)
        assert await content_of(over(volume, image.size, undo)) == image.content()
        undo.close()
        await volume.close()


def over(base: ImageVolume, size: int, *deltas: Delta) -> OverlayVolume:
    return OverlayVolume("over", size, base, lambda: deltas, Gate())


async def test_capturing_nothing_reads_nothing(tmp_path: Path) -> None:
    undo = Delta.create(tmp_path / "1.undo", 10 * B)
    volume = MemoryVolume(bytes(10 * B))
    await copying.capture(volume, BitMap64(), undo)
    assert (set(undo.data), set(undo.zero), volume.operations) == (set(), set(), [])
    undo.close()


# --- apply ------------------------------------------------------------------------------------------------------


class Stopping(MemoryVolume):
    """Stops at its `left`-th change."""

    left = 10**9

    async def write(self, extents: Sequence[tuple[int, Data]]) -> None:
        for one in extents:
            self._count()
            await super().write([one])

    async def unmap(self, extents: Sequence[tuple[int, int]]) -> int:
        held = 0
        for one in extents:
            self._count()
            held += await super().unmap([one])
        return held

    def _count(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise Crash


@given(images(), st.data(), BATCHES, st.sampled_from(["punch-hole", "write"]))
async def test_applying_can_be_done_again_after_any_part_of_it(
    image: Image, data: st.DataObject, limits: tuple[int, int], zeroing: str
) -> None:
    layer = data.draw(layers(1, image.size))
    with quick_directory() as directory, batches(*limits):
        redo = layer.make(directory / "1.redo")
        volume = Stopping(image.content(), zeroing=zeroing)
        for stop in data.draw(st.lists(st.integers(0, 8), max_size=3)):
            volume.left = stop
            with contextlib.suppress(Crash):
                await copying.apply(redo, volume)
        volume.left = 10**9
        for _ in range(2):
            await copying.apply(redo, volume)
            assert bytes(volume.data) == layer.over(image.content())
        # Only what the redo says is touched.
        touched = {
            block for offset, length in volume.of("write") for block in range(offset // B, -(-(offset + length) // B))
        }
        assert touched <= layer.data | layer.zero
        redo.close()


@given(images(), st.data())
async def test_applying_to_an_image_with_holes(image: Image, data: st.DataObject) -> None:
    layer = data.draw(layers(1, image.size))
    with quick_directory() as directory:
        redo = layer.make(directory / "1.redo")
        volume = await image.make(directory / "image.raw")
        await copying.apply(redo, volume)
        assert await content_of(volume) == layer.over(image.content())
        held = (image.held - layer.zero) | layer.data
        assert sum(length for _, length in await volume.data_extents(0, image.size)) == sum(
            shortened(block, image.size) for block in held
        )
        redo.close()
        await volume.close()


# --- merge ------------------------------------------------------------------------------------------------------


@st.composite
def chains(draw: st.DrawFn) -> tuple[Image, Layer, Layer]:
    """An image, and the deltas that lead back one generation and one more; generations only grow."""
    size = draw(sizes)
    newer = draw(st.sampled_from([size, size + 1, size + B, size + 2 * B + 5]))
    newest = draw(st.sampled_from([newer, newer + 3 * B + 1]))
    return draw(images(newest)), draw(layers(1, size)), draw(layers(2, newer))


@given(chains(), BATCHES, st.sampled_from(["", "drop-undo-merged", "drop-merge-recorded"]))
async def test_a_merged_delta_leads_where_both_did(
    chain: tuple[Image, Layer, Layer], limits: tuple[int, int], crash: str
) -> None:
    image, old, new = chain
    expected = old.over(cut(new.over(cut(image.content(), new.size)), old.size))
    with quick_directory() as directory, batches(*limits), pytest.MonkeyPatch.context() as patch:
        base = await image.make(directory / "image.raw")
        older, undo = old.make(directory / "1.undo"), new.make(directory / "2.undo")
        before = undo.path.read_bytes(), index_of(undo.path).read_bytes()
        assert await content_of(over(base, old.size, older, undo)) == expected

        def crash_point(name: str) -> None:
            if name == crash:
                raise Crash

        patch.setattr(copying, "crash_point", crash_point)
        with contextlib.suppress(Crash):
            await copying.merge(undo, older)
            assert not crash
        # Whoever reads through both goes on meanwhile, and after a restart in the middle.
        assert await content_of(over(base, old.size, older, undo)) == expected
        for delta in (older, undo):
            delta.close()
        older, undo = Delta.open(older.path), Delta.open(undo.path)
        assert await content_of(over(base, old.size, older, undo)) == expected
        crash = ""
        await copying.merge(undo, older)
        assert await content_of(over(base, old.size, older)) == expected
        older.close()
        older = Delta.open(older.path)
        assert await content_of(over(base, old.size, older)) == expected
        # What the older one knows itself is not replaced, and nothing is known twice.
        known = old.data | old.zero
        fits = set(below(BitMap64(sorted(new.data | new.zero)), old.size))
        assert set(older.data | older.zero) == known | fits
        assert not older.data & older.zero
        assert older.size == old.size
        assert (undo.path.read_bytes(), index_of(undo.path).read_bytes()) == before
        for delta in (older, undo):
            delta.close()
        await base.close()


# --- copy -------------------------------------------------------------------------------------------------------


@given(images(), st.data(), BATCHES)
async def test_a_copy_holds_the_same_and_no_zeros(image: Image, data: st.DataObject, limits: tuple[int, int]) -> None:
    layer = data.draw(layers(1, image.size))
    told: list[tuple[int, int]] = []
    with quick_directory() as directory, batches(*limits):
        base, delta = await image.make(directory / "image.raw"), layer.make(directory / "1.undo")
        # Zeros that are written out and not known to be any.
        zeros = data.draw(blocks_in(image.size))
        await base.write([(block * B, bytes(shortened(block, image.size))) for block in sorted(zeros)])
        expected = layer.over(await content_of(base))
        source, target = over(base, image.size, delta), await ImageVolume.create(directory / "copy", image.size)
        await copying.copy(source, target, lambda done, total: told.append((done, total)))
        assert await content_of(target) == expected
        held = (image.held - zeros - layer.zero) | layer.data
        sizes_held = sum(shortened(block, image.size) for block in held)
        assert sum(length for _, length in await target.data_extents(0, image.size)) == sizes_held
        total = sum(length for _, length in await source.data_extents(0, image.size))
        assert {one for _, one in told} <= {total}
        assert [done for done, _ in told] == sorted({done for done, _ in told})
        assert not told or told[-1] == (total, total)
        delta.close()
        await base.close()
        await target.close()


# --- bring ------------------------------------------------------------------------------------------------------


@given(images(), images(), st.data(), BATCHES)
async def test_bringing_a_volume_to_what_another_holds(
    ours: Image, theirs: Image, data: st.DataObject, limits: tuple[int, int]
) -> None:
    theirs.size = min(theirs.size, ours.size)
    theirs.held = {block for block in theirs.held if block * B < theirs.size}
    changed = data.draw(blocks_in(theirs.size))
    with quick_directory() as directory, batches(*limits):
        made = await theirs.make(directory / "theirs")
        # Some blocks differ only in one byte, at the end.
        await made.write([(block * B + shortened(block, theirs.size) - 1, b"\x01") for block in sorted(changed)])
        held = await content_of(made)
        target = MemoryVolume(ours.content())
        await copying.bring(made, target)
        assert bytes(target.data) == held + bytes(ours.size - theirs.size)
        # Equal blocks are left alone, zeros are never written (invariants 2 and 6).
        for offset, length in target.of("write"):
            for start in range(offset, offset + length, B):
                block = slice(start, min(start + B, offset + length))
                assert held[block] != ours.content()[block] and any(held[block])
        for offset, length in target.of("unmap"):
            if offset + length <= theirs.size:
                for start in range(offset, offset + length, B):
                    assert any(ours.content()[start : min(start + B, offset + length)])
        await made.close()
