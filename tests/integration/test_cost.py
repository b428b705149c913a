"""Cost follows what is allocated, never the nominal size: a 16 TiB volume with a few regions of data costs a few
regions of reading, bytes on the wire and memory. And zeros are found by comparing memory, not element by element."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from blockferry.common import digests

from bench.peers import Server, blockferry, serving
from bench.sparse import BLOCK, MIB, REGION, TIB, place_for_huge_files, same_bytes, scattered_regions, write_image

SIZE = 16 * TIB
REGIONS = SIZE // REGION
FULL, ZERO = 12, 4
"""Regions with data, and regions in which zeros were written out."""

PER_REGION = 64 * 1024
DATA = FULL * PER_REGION
MOST_RESIDENT = 300 * MIB


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory that takes files of 16 TiB."""
    with tempfile.TemporaryDirectory(prefix="blockferry-test-", dir=place_for_huge_files()) as name:
        yield Path(name)


@pytest.fixture
def server(directory: Path) -> Iterator[Server]:
    with serving(directory / "pool") as running:
        yield running
        assert running.peak_bytes() < MOST_RESIDENT


def make_source(path: Path) -> list[int]:
    """16 TiB with FULL regions of data and then ZERO regions of written zeros; returns all their numbers."""
    regions = scattered_regions(SIZE, FULL + ZERO)
    write_image(path, SIZE, regions[:FULL], PER_REGION)
    with path.open("r+b") as file:
        for region in regions[FULL:]:
            os.pwrite(file.fileno(), bytes(BLOCK), region * REGION)
    return regions


def test_a_huge_sparse_volume_costs_what_it_holds(directory: Path, server: Server) -> None:
    source, target, state = directory / "source.raw", f"{server.address}/huge", directory / "state"
    regions = make_source(source)

    def sync() -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
        done = blockferry("sync", source, target, state=state)
        assert done.peak_bytes < MOST_RESIDENT
        assert done.report["source_map"] == done.report["destination_map"] == "exact"
        assert done.report["volume_size"] == SIZE
        return done.report["regions"], done.report["results"], done.report["bytes"]

    planned = blockferry("plan", source, target, state=state)
    assert planned.report["regions"] == {"skip": REGIONS - 16, "unmap": 0, "send": 16, "compare": 0}
    assert planned.peak_bytes < MOST_RESIDENT

    counts, results, moved = sync()
    assert counts == {"skip": REGIONS - 16, "unmap": 0, "send": 16, "compare": 0}
    assert results == {"zero": ZERO, "equal": 0, "changed": FULL}
    assert moved["data_sent"] == moved["destination_written"] == DATA
    assert (moved["source_read"], moved["destination_read"], moved["unmapped"]) == (DATA + ZERO * BLOCK, 0, 0)
    # Beside the data: about 40 bytes for each region and 200 for the session and its commit.
    assert DATA < moved["wire_sent"] < DATA + FULL * 64 + 512
    assert moved["wire_received"] < FULL * 32 + 512

    # Nothing changed: only the regions that both sites hold are read, and only digests travel.
    counts, results, moved = sync()
    assert counts == {"skip": REGIONS - 16, "unmap": 0, "send": ZERO, "compare": FULL}
    assert results == {"zero": ZERO, "equal": FULL, "changed": 0}
    assert (moved["data_sent"], moved["destination_written"], moved["unmapped"]) == (0, 0, 0)
    # Holes inside the regions are not read; what the server committed it knows.
    assert (moved["source_read"], moved["destination_read"]) == (DATA + ZERO * BLOCK, 0)
    assert moved["wire_sent"] < FULL * 128 + 512
    assert moved["wire_received"] < FULL * 64 + 512

    # All but one region go away in the source: what is unmapped is what the replica held, and no data travels.
    write_image(source, SIZE, regions[:1], PER_REGION)
    counts, results, moved = sync()
    assert counts == {"skip": REGIONS - FULL, "unmap": FULL - 1, "send": 0, "compare": 1}
    assert results == {"zero": 0, "equal": 1, "changed": 0}
    assert (moved["data_sent"], moved["destination_written"]) == (0, 0)
    assert moved["unmapped"] == (FULL - 1) * PER_REGION
    assert moved["wire_sent"] < (FULL - 1) * 64 + 640

    verified = blockferry("verify", source, target, state=state)
    assert verified.report["bytes"] == {"compared": REGION, "proven_zero": SIZE - REGION, "different": 0}
    assert verified.peak_bytes < MOST_RESIDENT
    replica = blockferry("replica", "show", target, state=state).report
    assert same_bytes(source, Path(replica["path"]))


class Compared(bytes):
    """Zeros that count how often they are asked; a plain comparison with a memoryview would never ask them."""

    asked = 0

    def startswith(self, *arguments: Any) -> bool:
        type(self).asked += 1
        return super().startswith(*arguments)


@pytest.mark.parametrize(
    ("search", "asked"),
    [(digests.is_zero, 1), (lambda data: list(digests.nonzero_extents(data)) == [], MIB // BLOCK)],
)
def test_zeros_are_found_by_comparing_memory(
    monkeypatch: pytest.MonkeyPatch, search: Callable[[memoryview], bool], asked: int
) -> None:
    Compared.asked = 0
    monkeypatch.setattr(digests, "_ZEROS", Compared(MIB))
    assert search(memoryview(bytes(MIB)))
    assert Compared.asked == asked


def test_messages_are_built_in_memory_that_is_there_already(tmp_path: Path) -> None:
    """Four times the data must not make the kernel provide four times the pages: buffers are used again."""
    faults = []
    with serving(tmp_path / "pool") as server:
        for count in (64, 256):
            image = tmp_path / f"{count}.raw"
            write_image(image, 1024 * MIB, scattered_regions(1024 * MIB, count), REGION)
            done = blockferry("sync", image, f"{server.address}/v{count}", state=tmp_path / "state")
            assert done.report["bytes"]["data_sent"] == count * REGION
            faults.append(done.page_faults)
    # Fresh pages for each buffer and message would be at least one fault for each of these pages.
    assert faults[1] - faults[0] < (256 - 64) * REGION // 4096 // 4, faults
