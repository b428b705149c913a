"""Exactly the differing blocks of a region are found, with at most two questions; asking stops where it is no use."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import pytest
from blockferry.client.compare import Refiner
from blockferry.common.digests import PIECE_DIGEST_SIZE, PIECE_SIZE, digests
from blockferry.common.regions import BLOCK_SIZE, Run
from hypothesis import given, settings
from hypothesis import strategies as st

KEY = bytes(range(32))
B = BLOCK_SIZE
REGION_SIZES = [65536, 131072, 1048576]

BASE = b"".join(hashlib.sha256(number.to_bytes(4)).digest() for number in range(3 * 1048576 // 32))


class Other:
    """The other side: answers questions about its data, and counts them."""

    def __init__(self, data: bytes) -> None:
        self.data = memoryview(data)
        self.questions: list[tuple[int, list[Run]]] = []

    async def ask(self, piece_size: int, runs: Sequence[Run]) -> bytes:
        self.questions.append((piece_size, list(runs)))
        found = []
        for first, count in runs:
            start, end = first * piece_size, min((first + count) * piece_size, len(self.data))
            assert count >= 1 and (first + count - 1) * piece_size < len(self.data)
            found.append(digests(self.data[start:end], piece_size, KEY, PIECE_DIGEST_SIZE))
        return b"".join(found)

    @property
    def pieces(self) -> list[tuple[int, int]]:
        """(piece size, pieces asked for) of every question."""
        return [(size, sum(count for _, count in runs)) for size, runs in self.questions]


def regions_of(data: bytearray, region_size: int) -> list[tuple[int, memoryview]]:
    view = memoryview(data)
    return [(start, view[start : start + region_size]) for start in range(0, len(data), region_size)]


def merged(blocks: set[int]) -> list[Run]:
    runs: list[Run] = []
    for block in sorted(blocks):
        if runs and sum(runs[-1]) == block:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((block, 1))
    return runs


@settings(max_examples=150)
@given(st.data(), st.sampled_from(REGION_SIZES))
async def test_exactly_the_differing_blocks_are_found_with_two_questions(data: st.DataObject, region_size: int) -> None:
    last = data.draw(st.one_of(st.integers(1, region_size), st.sampled_from([1, B, B + 1, PIECE_SIZE])))
    size = data.draw(st.integers(0, 2)) * region_size + last
    ours, theirs = bytearray(BASE[:size]), bytearray(BASE[:size])
    for first, count in data.draw(st.lists(st.tuples(st.integers(0, size - 1), st.integers(1, 20)), max_size=6)):
        for block in range(first // B, min(first // B + count, -(-size // B))):
            theirs[min(block * B + first % B, size - 1)] ^= 0xFF
    differing = {block for block in range(-(-size // B)) if ours[block * B :][:B] != theirs[block * B :][:B]}
    every = regions_of(ours, region_size)
    chosen = [every[index] for index in sorted(data.draw(st.sets(st.integers(0, len(every) - 1), min_size=1)))]

    other = Other(bytes(theirs))
    found = await Refiner(KEY, region_size).differing_blocks(chosen, other.ask)

    expected = []
    for offset, region in chosen:
        first = offset // B
        expected.append(merged({block - first for block in differing if 0 <= block - first < -(-len(region) // B)}))
    assert found == expected

    # Questions and their sizes: all pieces of 64 KiB first, then the blocks of those that differ and no others.
    blocks_of = {(offset, start): -(-min(PIECE_SIZE, len(region) - start) // B)
                 for offset, region in chosen for start in range(0, len(region), PIECE_SIZE)}  # fmt: skip
    suspect = {
        place: count
        for place, count in blocks_of.items()
        if any(sum(place) // B + step in differing for step in range(count))
    }
    questions = (
        [(PIECE_SIZE, len(blocks_of)), (B, sum(suspect.values()))] if suspect else [(PIECE_SIZE, len(blocks_of))]
    )
    if region_size == PIECE_SIZE:
        # Such a region is its own first level: it is known to differ.
        questions = [(B, sum(blocks_of.values()))]
    assert other.pieces == questions


@pytest.mark.parametrize("region_size", REGION_SIZES)
async def test_no_regions_no_questions(region_size: int) -> None:
    other = Other(b"")
    assert await Refiner(KEY, region_size).differing_blocks([], other.ask) == []
    assert other.questions == []


# --- when asking stops ------------------------------------------------------------------------------------------

REGION = 131072


async def refine(refiner: Refiner, *kinds: str) -> None:
    """Let the refiner look at regions of which all, most or one block differ."""
    ours = bytearray(BASE[: REGION * len(kinds)])
    theirs = bytearray(ours)
    for index, kind in enumerate(kinds):
        blocks = {"all": range(32), "most": range(31), "one": range(1)}[kind]
        for block in blocks:
            theirs[index * REGION + block * B] ^= 1
    found = await refiner.differing_blocks(regions_of(ours, REGION), Other(bytes(theirs)).ask)
    assert found == [[(0, {"all": 32, "most": 31, "one": 1}[kind])] for kind in kinds]


async def test_asking_stops_after_enough_entirely_different_regions_in_a_row() -> None:
    refiner = Refiner(KEY, REGION)
    for _ in range(Refiner.PATIENCE - 1):
        await refine(refiner, "all")
        assert refiner.asking
    await refine(refiner, "all")
    assert not refiner.asking


async def test_regions_of_one_batch_count_one_by_one() -> None:
    refiner = Refiner(KEY, REGION)
    await refine(refiner, *["all"] * Refiner.PATIENCE)
    assert not refiner.asking


@pytest.mark.parametrize("kind", ["one", "most"])
async def test_any_equal_block_starts_the_count_anew(kind: str) -> None:
    refiner = Refiner(KEY, REGION)
    await refine(refiner, *["all"] * (Refiner.PATIENCE - 1), kind, *["all"] * (Refiner.PATIENCE - 1))
    assert refiner.asking
    await refine(refiner, "all")
    assert not refiner.asking


@pytest.mark.parametrize("batches", [[1] * Refiner.HOLIDAY, [Refiner.HOLIDAY], [8] * (Refiner.HOLIDAY // 8), [60, 60]])
async def test_asking_resumes_after_the_holiday(batches: list[int]) -> None:
    refiner = Refiner(KEY, REGION)
    await refine(refiner, *["all"] * Refiner.PATIENCE)
    for count in batches:
        assert not refiner.asking
        refiner.sent_whole(count)
    assert refiner.asking
    # And with full patience again.
    await refine(refiner, *["all"] * (Refiner.PATIENCE - 1))
    assert refiner.asking
    await refine(refiner, "all")
    assert not refiner.asking


async def test_a_short_last_region_can_be_entirely_different() -> None:
    refiner = Refiner(KEY, REGION)
    for _ in range(Refiner.PATIENCE):
        region = memoryview(b"x" * 5001)
        assert await refiner.differing_blocks([(0, region)], Other(b"y" * 5001).ask) == [[(0, 2)]]
    assert not refiner.asking
