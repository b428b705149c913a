"""The decision table, by exact counts: every case alone and all mixed, inside regions too, between two processes.

Each test says which regions fall into which case; bytes are held against an oracle that knows only the two images.
After every sync the destination is byte for byte the source.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.images import (
    BLOCK,
    KIB,
    MIB,
    Expected,
    Hole,
    Piece,
    Snapshot,
    Zeros,
    blocks_of,
    build,
    change,
    expect,
    extents,
    noise,
)  # fmt: skip
from tests.support import Report, Server


def counts(skip: int = 0, unmap: int = 0, send: int = 0, compare: int = 0) -> dict[str, int]:
    """The `regions` of a report."""
    return {"skip": skip, "unmap": unmap, "send": send, "compare": compare}


def results(zero: int = 0, equal: int = 0, changed: int = 0) -> dict[str, int]:
    """The `results` of a report."""
    return {"zero": zero, "equal": equal, "changed": changed}


def check(report: Report, expected: Expected, size: int, region_size: int) -> None:
    """The report says exactly what was expected, and its sums agree with each other."""
    assert report["schema"] == 1
    assert report["outcome"] == "committed"
    assert report["source_map"] == report["destination_map"] == "exact"
    assert (report["volume_size"], report["region_size"]) == (size, region_size)
    assert report["regions"] == expected.regions
    assert report["results"] == expected.results
    moved = dict(report["bytes"])
    assert moved.pop("wire_sent") >= moved["data_sent"]
    assert moved.pop("wire_received") > 0
    assert moved == expected.bytes()
    regions, found = report["regions"], report["results"]
    assert sum(regions.values()) == -(-size // region_size)
    assert sum(found.values()) == regions["send"] + regions["compare"]


@dataclass
class Pair:
    """A source and its replica; `image` is the newest committed one, as `replica show` says."""

    server: Server
    source: Path
    volume: str
    image: Path | None = None

    def sync(self, region_size: int = MIB) -> Report:
        """Sync, check the whole report against the oracle, and byte equality."""
        ours = Snapshot.of(self.source)
        theirs = Snapshot.of(self.image) if self.image else Snapshot.empty(len(ours.content))
        flags = () if self.image else ("--region-size", region_size)
        report = self.server.sync(self.source, self.volume, *flags)
        check(report, expect(ours, theirs, region_size), len(ours.content), region_size)
        self.image = self.server.image(self.volume)
        assert self.image.read_bytes() == ours.content
        return report

    def holds(self) -> list[tuple[int, int]]:
        """(offset, length) of what the committed image has allocated."""
        assert self.image is not None
        return extents(self.image)

    def moved(self, report: Report) -> tuple[int, int, int]:
        """Bytes sent, written and unmapped."""
        found = report["bytes"]
        return found["data_sent"], found["destination_written"], found["unmapped"]


MakePair = Callable[..., Pair]


@pytest.fixture
def pair(server: Server, volume: str, tmp_path: Path) -> MakePair:
    """Makes a source from a description, with a replica that does not exist yet."""

    def make(size: int, *pieces: Piece) -> Pair:
        return Pair(server, build(tmp_path / "source.img", size, pieces), volume)

    return make


# --- each case alone ------------------------------------------------------------------------------------------------


def test_skip_alone_reads_nothing_and_leaves_a_hole(pair: MakePair) -> None:
    both = pair(4 * MIB)
    report = both.sync()
    assert report["regions"] == counts(skip=4)
    assert both.moved(report) == (0, 0, 0)
    assert report["bytes"]["source_read"] == report["bytes"]["destination_read"] == 0
    assert both.holds() == []


def test_send_alone_sends_every_byte_of_a_full_image(pair: MakePair) -> None:
    both = pair(4 * MIB, (0, noise("full", 4 * MIB)))
    report = both.sync()
    assert report["regions"] == counts(send=4)
    assert report["results"] == results(changed=4)
    assert both.moved(report) == (4 * MIB, 4 * MIB, 0)
    assert report["bytes"]["source_read"] == 4 * MIB
    assert report["bytes"]["destination_read"] == 0


def test_send_alone_sends_only_blocks_that_are_not_zero(pair: MakePair) -> None:
    both = pair(2 * MIB, (0, Zeros(MIB)), (3 * BLOCK, b"x"), (10 * BLOCK - 1, b"yz"), (MIB, Zeros(BLOCK)))
    report = both.sync()
    assert report["regions"] == counts(send=2)
    assert report["results"] == results(zero=1, changed=1)
    assert both.moved(report) == (3 * BLOCK, 3 * BLOCK, 0)
    assert blocks_of(both.holds()) == {3, 9, 10}


def test_compare_alone_with_nothing_changed_writes_nothing(pair: MakePair) -> None:
    both = pair(4 * MIB, (0, noise("same", 4 * MIB)))
    both.sync()
    report = both.sync()
    assert report["generation"] == 2
    assert report["regions"] == counts(compare=4)
    assert report["results"] == results(equal=4)
    assert both.moved(report) == (0, 0, 0)
    # The server knows the digests of what it committed.
    assert (report["bytes"]["source_read"], report["bytes"]["destination_read"]) == (4 * MIB, 0)


def test_unmap_alone_sends_nothing_and_makes_holes(pair: MakePair) -> None:
    both = pair(4 * MIB, (0, noise("trimmed", 4 * MIB)))
    both.sync()
    change(both.source, [(0, Hole(4 * MIB))])
    report = both.sync()
    assert report["regions"] == counts(unmap=4)
    assert both.moved(report) == (0, 0, 4 * MIB)
    assert report["bytes"]["source_read"] == report["bytes"]["destination_read"] == 0
    assert both.holds() == []


def test_all_four_cases_mixed(pair: MakePair) -> None:
    both = pair(8 * MIB, (MIB, noise("goes", MIB)), (3 * MIB, noise("stays", 2 * MIB)), (6 * MIB, noise("both", MIB)))
    assert both.sync()["regions"] == counts(skip=4, send=4)
    change(
        both.source,
        [
            (MIB, Hole(MIB)),  # only at the destination: unmap
            (2 * MIB, noise("new", 5 * BLOCK)),  # only at the source: send
            (5 * MIB, Zeros(MIB)),  # only at the source, and zero: nothing to do
            (6 * MIB + 7 * BLOCK, noise("edit", 2 * BLOCK)),  # both: compare, two blocks
        ],
    )
    report = both.sync()
    assert report["regions"] == counts(skip=2, unmap=1, send=2, compare=3)
    assert report["results"] == results(zero=1, equal=2, changed=2)
    assert both.moved(report) == (7 * BLOCK, 7 * BLOCK, MIB)
    # Regions to compare whole; of regions to send only what is no hole.
    assert report["bytes"]["source_read"] == 3 * MIB + 5 * BLOCK + MIB


# --- trims ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("region_size", [64 * KIB, MIB])
def test_a_trim_sends_no_data_and_the_target_has_the_holes(pair: MakePair, region_size: int) -> None:
    both = pair(6 * MIB, (0, noise("disk", 6 * MIB)))
    both.sync(region_size)
    # Whole regions, and parts of regions on either side of them.
    change(both.source, [(MIB - 3 * BLOCK, Hole(2 * MIB + 5 * BLOCK)), (5 * MIB, Hole(MIB))])
    report = both.sync(region_size)
    assert report["bytes"]["data_sent"] == 0
    assert report["bytes"]["destination_written"] == 0
    assert report["bytes"]["unmapped"] == 3 * MIB + 5 * BLOCK
    assert both.holds() == [(0, MIB - 3 * BLOCK), (3 * MIB + 2 * BLOCK, 2 * MIB - 2 * BLOCK)]


def test_zeros_written_over_data_are_unmapped_not_sent(pair: MakePair) -> None:
    both = pair(3 * MIB, (0, noise("disk", 3 * MIB)))
    both.sync()
    change(both.source, [(0, Zeros(MIB)), (MIB + BLOCK, Zeros(9 * BLOCK))])
    report = both.sync()
    assert report["regions"] == counts(compare=3)
    assert report["results"] == results(equal=1, changed=2)
    assert both.moved(report) == (0, 0, MIB + 9 * BLOCK)
    assert both.holds() == [(MIB, BLOCK), (MIB + 10 * BLOCK, 2 * MIB - 10 * BLOCK)]


def test_zeros_written_as_data_over_a_hole_leave_the_hole(pair: MakePair) -> None:
    both = pair(4 * MIB, (0, noise("disk", MIB)))
    both.sync()
    change(both.source, [(MIB, Zeros(3 * MIB))])
    report = both.sync()
    assert report["regions"] == counts(send=3, compare=1)
    assert report["results"] == results(zero=3, equal=1)
    assert both.moved(report) == (0, 0, 0)
    assert both.holds() == [(0, MIB)]


# --- inside a region ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("region_size", [64 * KIB, MIB, 16 * MIB])
def test_only_differing_blocks_travel(pair: MakePair, region_size: int) -> None:
    size = 18 * MIB
    both = pair(size, (0, noise("disk", size)))
    both.sync(region_size)
    edits: list[Piece] = [
        (0, b"!"),  # the very first byte: one block
        (5 * BLOCK - 1, b"!!"),  # across a block border: two
        (64 * KIB - 1, b"!!"),  # across a piece border: two
        (MIB - 1, b"!!"),  # across a region border: two
        (16 * MIB + 9 * BLOCK, noise("edit", 3 * BLOCK)),  # three
        (17 * MIB, Hole(4 * BLOCK)),  # four that became zero
        (size - 1, b"!"),  # the very last byte: one
    ]
    change(both.source, edits)
    report = both.sync(region_size)
    assert report["regions"] == counts(compare=-(-size // region_size))
    assert both.moved(report) == (11 * BLOCK, 11 * BLOCK, 4 * BLOCK)


def test_a_block_changed_back_and_forth_is_sent_each_time(pair: MakePair) -> None:
    both = pair(MIB, (0, noise("disk", MIB)))
    both.sync()
    for generation, content in enumerate((b"A" * BLOCK, b"B" * BLOCK, b"A" * BLOCK), start=2):
        change(both.source, [(BLOCK, content)])
        report = both.sync()
        assert report["generation"] == generation
        assert both.moved(report) == (BLOCK, BLOCK, 0)


# --- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("region_size", [64 * KIB, MIB])
@pytest.mark.parametrize("size", [1, 4095, 4097, 65537, 2 * MIB + 5 * BLOCK + 123])
def test_sizes_that_are_no_multiple_of_anything(pair: MakePair, size: int, region_size: int) -> None:
    both = pair(size, (0, noise("odd", size)))
    report = both.sync(region_size)
    assert both.moved(report) == (size, size, 0)
    last_block = (size - 1) // BLOCK * BLOCK
    change(both.source, [(size - 1, b"!")])
    report = both.sync(region_size)
    assert both.moved(report) == (size - last_block, size - last_block, 0)
    change(both.source, [(0, Hole(size))])
    report = both.sync(region_size)
    assert both.moved(report) == (0, 0, size)
    assert both.holds() == []


def test_a_short_last_region_in_every_case(pair: MakePair) -> None:
    tail = 3 * BLOCK + 77
    size = 2 * MIB + tail
    both = pair(size)
    assert both.sync()["regions"] == counts(skip=3)
    change(both.source, [(2 * MIB, noise("tail", tail))])
    report = both.sync()
    assert report["regions"] == counts(skip=2, send=1)
    assert report["bytes"]["source_read"] == tail
    report = both.sync()
    assert report["regions"] == counts(skip=2, compare=1)
    assert (report["bytes"]["source_read"], report["bytes"]["destination_read"]) == (tail, 0)
    change(both.source, [(2 * MIB, Hole(tail))])
    report = both.sync()
    assert report["regions"] == counts(skip=2, unmap=1)
    assert both.moved(report) == (0, 0, tail)
