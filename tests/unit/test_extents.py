"""What shared extents prove, against files made of blocks whose content is known."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from blockferry.common.extents import (
    DELALLOC,
    ENCODED,
    ENCRYPTED,
    INLINE,
    NOT_ALIGNED,
    SHARED,
    TAIL,
    UNKNOWN,
    UNWRITTEN,
    Extent,
    changed_regions,
    coarsened,
    unchanged,
)
from blockferry.common.regions import BLOCK_SIZE, Geometry
from hypothesis import given
from hypothesis import strategies as st
from pyroaring import BitMap

REGION = 64 * 1024
PER_REGION = REGION // BLOCK_SIZE
BLOCKS = 4 * PER_REGION + 3
GEOMETRY = Geometry(BLOCKS * BLOCK_SIZE - 100, REGION)

BAD = (UNKNOWN, DELALLOC, ENCODED, ENCRYPTED, NOT_ALIGNED, INLINE, TAIL)
HARMLESS = (0, 0x0001, 0x1000)
"""LAST, MERGED."""


@dataclass
class Block:
    """Where one block of a file is, and what reading it gives."""

    place: int
    unwritten: bool = False
    bad: int = 0


@dataclass
class Disk:
    """A file system of two files, the second one cloned from the first."""

    rng: random.Random
    content: dict[int, int] = field(default_factory=dict)
    """By place; a place may be used again by something else once nobody has it."""
    base: dict[int, Block] = field(default_factory=dict)
    new: dict[int, Block] = field(default_factory=dict)

    def fresh(self, content: int) -> int:
        used = {block.place for file in (self.base, self.new) for block in file.values()}
        place = self.rng.randrange(3 * BLOCKS)
        while place in used:
            place = (place + 1) % (3 * BLOCKS)
        self.content[place] = content
        return place

    def read(self, file: dict[int, Block], number: int) -> int:
        block = file.get(number)
        return 0 if block is None or block.unwritten else self.content[block.place]

    def extents(self, file: dict[int, Block]) -> list[Extent]:
        """As FIEMAP tells it: runs of blocks that lie one after the other."""
        other = self.new if file is self.base else self.base
        places = {block.place for block in other.values()}
        found: list[list[int]] = []
        for number in sorted(file):
            block = file[number]
            flags = block.bad | (UNWRITTEN if block.unwritten else 0) | (SHARED if block.place in places else 0)
            flags |= self.rng.choice(HARMLESS)
            here = [number * BLOCK_SIZE, block.place * BLOCK_SIZE, BLOCK_SIZE, flags]
            last = found[-1] if found else None
            if last and (last[0] + last[2], last[1] + last[2], last[3]) == (here[0], here[1], here[3]):
                last[2] += BLOCK_SIZE
            else:
                found.append(here)
        return [(one[0], one[1], one[2], one[3]) for one in found]


def made(rng: random.Random) -> Disk:
    """A file with holes, and its clone."""
    disk = Disk(rng)
    position = 0
    while position < BLOCKS:
        length = rng.randrange(1, 12)
        kind = rng.choice(("data", "data", "hole", "unwritten"))
        for number in range(position, min(position + length, BLOCKS)):
            if kind != "hole":
                disk.base[number] = Block(disk.fresh(rng.randrange(1, 4)), unwritten=kind == "unwritten")
        position += length
    disk.new = {number: Block(block.place, block.unwritten) for number, block in disk.base.items()}
    return disk


def live(disk: Disk, steps: int) -> None:
    """What happens to the source between two snapshots, and to all files below them."""
    rng = disk.rng
    for _ in range(steps):
        number = rng.randrange(BLOCKS)
        block = disk.new.get(number)
        match rng.choice(("write", "write", "punch", "reserve", "fill", "encode")):
            case "write":
                disk.new[number] = Block(disk.fresh(rng.randrange(1, 4)))
            case "punch":
                disk.new.pop(number, None)
            case "reserve":
                disk.new[number] = Block(disk.fresh(0), unwritten=True)
            case "fill" if block is not None and block.unwritten:
                # A file system that writes into what it had set aside, though it is shared: the mapping tells.
                block.unwritten = False
            case "encode" if block is not None:
                block.bad = rng.choice(BAD)
            case _:
                pass


def move(disk: Disk, file: dict[int, Block], share: float) -> None:
    """Balance, or defragmentation: the same content at other places, and the old ones free for others."""
    for block in file.values():
        if disk.rng.random() < share:
            block.place = disk.fresh(disk.content[block.place])


@given(st.randoms(use_true_random=False), st.integers(0, 30), st.sampled_from((0.0, 0.2, 1.0)))
def test_what_is_proven_unchanged_is_and_the_rest_is_not_left_out(rng: random.Random, steps: int, moved: float) -> None:
    disk = made(rng)
    live(disk, steps)
    base = disk.extents(disk.base)
    before = {number: Block(block.place) for number, block in disk.base.items()}
    content = {number: disk.read(disk.base, number) for number in range(BLOCKS)}
    # The base moves after it was looked at, and somebody else may get its places.
    move(disk, disk.base, moved)
    live(disk, steps // 3)
    new = disk.extents(disk.new)
    again = disk.extents(disk.base)
    changed = changed_regions(base, new, again, GEOMETRY, 0, GEOMETRY.size)
    equal = [disk.read(disk.new, number) == content[number] for number in range(BLOCKS)]
    for number in range(BLOCKS):
        assert equal[number] or number // PER_REGION in changed, f"block {number} has changed"
    # And what is left where it was, in both, is not taken for changed.
    proven = [
        (number not in disk.new and number not in disk.base)
        or (
            number in disk.new
            and number in disk.base
            and disk.new[number].place == disk.base[number].place == before[number].place
            and disk.new[number].unwritten == disk.base[number].unwritten
            and not disk.new[number].bad
        )
        for number in range(BLOCKS)
    ]
    assert changed == BitMap({number // PER_REGION for number in range(BLOCKS) if not proven[number]})


@given(st.randoms(use_true_random=False))
def test_a_clone_that_nobody_touched_is_unchanged(rng: random.Random) -> None:
    disk = made(rng)
    extents = disk.extents(disk.base)
    assert list(unchanged(extents, disk.extents(disk.new), extents, 0, GEOMETRY.size)) == [(0, GEOMETRY.size)]
    assert changed_regions(extents, disk.extents(disk.new), extents, GEOMETRY, 0, GEOMETRY.size) == BitMap()


ONE: Extent = (0, 1 << 20, REGION, SHARED)


def proven(lists: list[list[Extent]]) -> list[tuple[int, int]]:
    """What one region's three lists prove."""
    base, new, again = lists
    return list(unchanged(base, new, again, 0, REGION))


@pytest.mark.parametrize("flag", BAD)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_an_extent_with_this_flag_proves_nothing(flag: int, which: int) -> None:
    lists: list[list[Extent]] = [[ONE], [ONE], [ONE]]
    assert proven(lists) == [(0, REGION)]
    lists[which] = [(*ONE[:3], SHARED | flag)]
    assert proven(lists) == []


@pytest.mark.parametrize(
    "other",
    [
        [],
        [(0, 1 << 21, REGION, SHARED)],
        [(4096, 1 << 20, REGION, SHARED)],
        [(0, 1 << 20, REGION, 0)],
        [(0, 1 << 20, REGION, SHARED | UNWRITTEN)],
        # Out of order: nothing is believed from there on.
        [(4096, (1 << 20) + 4096, 4096, SHARED), ONE],
    ],
    ids=["hole", "elsewhere", "later", "not-shared", "unwritten", "disordered"],
)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_differs_in_one_of_the_three_is_not_proven(other: list[Extent], which: int) -> None:
    lists: list[list[Extent]] = [[ONE], [ONE], [ONE]]
    lists[which] = other
    assert proven(lists) == ([(4096, 4096)] if len(other) == 2 else [])
    base, new, again = lists
    assert changed_regions(base, new, again, Geometry(REGION, REGION), 0, REGION) == BitMap([0])


def test_extents_that_reach_out_of_the_window_are_cut() -> None:
    wide: Extent = (0, 1 << 30, 10 * REGION, SHARED)
    cut: list[Extent] = [(2 * REGION, (1 << 30) + 2 * REGION, REGION, SHARED)]
    assert list(unchanged([wide], cut, [wide], 2 * REGION, 3 * REGION)) == [(2 * REGION, REGION)]
    shifted: list[Extent] = [(2 * REGION, 1 << 30, REGION, SHARED)]
    assert list(unchanged([wide], shifted, [wide], 2 * REGION, 3 * REGION)) == []


@given(st.sets(st.integers(0, 255)), st.sampled_from((1, 2, 16, 256)))
def test_coarser_regions_hold_all_finer_ones(regions: set[int], ratio: int) -> None:
    fine = Geometry(256 * REGION - 5, REGION)
    assert coarsened(BitMap(regions), fine, ratio * REGION) == BitMap({region // ratio for region in regions})
