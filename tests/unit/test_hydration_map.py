"""The hydration map: sets, commits, what a crash leaves, and damage, which is never taken for 'not hydrated'."""

from __future__ import annotations

from pathlib import Path

import pytest
from blockferry.common import disk
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.regions import BLOCK_SIZE
from blockferry.server.rehydrate import map as module
from blockferry.server.rehydrate.map import MOST_BLOCKS, NAME, SEAL, Binding, HydrationMap
from hypothesis import given, settings
from hypothesis import strategies as st
from pyroaring import BitMap

from tests.unit.layers import quick_directory

SIZE = 1000 * BLOCK_SIZE - 5
BINDING = Binding("file:1:2", SIZE, "commit:aa", "disk.raw", 7)

edges = st.sampled_from([0, 1, 65535, 65536, 65537, 131071, 131072, MOST_BLOCKS - 65536, MOST_BLOCKS - 1])
numbers = st.one_of(edges, st.integers(0, 200_000))


@given(st.lists(st.tuples(numbers, st.integers(1, 140_000)), max_size=6), numbers, st.integers(1, 140_000))
@settings(max_examples=300, deadline=None)
def test_ranges_of_bitmaps_are_ranges(added: list[tuple[int, int]], first: int, count: int) -> None:
    """What the map relies on. With 64-bit numbers `contains_range` of pyroaring is wrong across containers."""
    found = BitMap()
    for start, length in added:
        found.add_range(start, min(start + length, MOST_BLOCKS))
    stop = min(first + count, MOST_BLOCKS)
    covered = sorted((start, min(start + length, MOST_BLOCKS)) for start, length in added)
    position = first
    for start, end in covered:
        if start <= position < end:
            position = end
    assert found.contains_range(first, stop) == (position >= stop)


@given(st.lists(st.tuples(st.integers(0, 999), st.integers(1, 90), st.booleans()), max_size=12))
@settings(max_examples=60, deadline=None)
def test_marks_commits_and_reopening(steps: list[tuple[int, int, bool]]) -> None:
    with quick_directory() as directory:
        hydration = HydrationMap.create(directory, BINDING)
        marked: set[int] = set()
        durable: set[int] = set()
        for first, count, commit in steps:
            stop = min(first + count, 1000)
            hydration.mark(first, stop)
            marked |= set(range(first, stop))
            if commit:
                captured = hydration.capture()
                hydration.mark(0, 1)
                marked.add(0)
                hydration.commit(captured)
                durable |= marked - ({0} if 0 not in captured and 0 not in durable else set())
            assert set(hydration.hydrated()) == marked
            gaps = sorted(set(range(1000)) - marked)
            assert [block for run, length in hydration.missing(0, 1000) for block in range(run, run + length)] == gaps
        hydration.close()
        again = HydrationMap.open(directory)
        assert set(again.hydrated()) == durable
        assert again.settled and again.binding == BINDING
        again.close()


def test_what_is_given_back_is_captured_again(tmp_path: Path) -> None:
    hydration = HydrationMap.create(tmp_path, BINDING)
    hydration.mark(3, 9)
    captured = hydration.capture()
    assert set(captured) == set(range(3, 9)) and hydration.settled
    hydration.give_back(captured)
    hydration.mark(3, 12)
    assert set(hydration.capture()) == set(range(3, 12))
    hydration.close()


def test_what_was_hydrated_before_is_not_recorded_again(tmp_path: Path) -> None:
    """A guest that overwrites a hydrated disk, flushing each time, writes nothing to the map."""
    hydration = HydrationMap.create(tmp_path, BINDING)
    hydration.mark(0, 100)
    hydration.commit(hydration.capture())
    size = (tmp_path / NAME).stat().st_size
    for block in range(100):
        hydration.mark(block, block + 1)
        hydration.commit(hydration.capture())
    assert (tmp_path / NAME).stat().st_size == size
    hydration.close()


def test_the_log_is_folded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second block alone, each flushed: the worst there is. The file stays within twice the bound."""
    monkeypatch.setattr(module, "FOLD_BYTES", 4096)
    monkeypatch.setattr(disk, "fsync", lambda fd: None)
    binding = Binding("file:1:2", 4000 * BLOCK_SIZE, "commit:aa", "disk.raw", 7)
    hydration = HydrationMap.create(tmp_path, binding)
    largest = 0
    for block in range(0, 4000, 2):
        hydration.mark(block, block + 1)
        hydration.commit(hydration.capture())
        largest = max(largest, (tmp_path / NAME).stat().st_size)
    assert 4096 < largest < 3 * 4096
    hydration.close()
    again = HydrationMap.open(tmp_path)
    assert set(again.hydrated()) == set(range(0, 4000, 2))
    again.close()


def test_a_commit_of_very_many_runs_is_a_new_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_RUNS", 10)
    hydration = HydrationMap.create(tmp_path, BINDING)
    for block in range(0, 1000, 2):
        hydration.mark(block, block + 1)
    hydration.commit(hydration.capture())
    assert (tmp_path / NAME).read_bytes().count(b"\n") == 2
    hydration.close()
    again = HydrationMap.open(tmp_path)
    assert set(again.hydrated()) == set(range(0, 1000, 2))
    again.close()


def test_a_map_has_a_largest_size(tmp_path: Path) -> None:
    with pytest.raises(BlockferryError, match="at most 17592186044416 bytes") as caught:
        HydrationMap.create(tmp_path, Binding("x", MOST_BLOCKS * BLOCK_SIZE + 1, "s", "u", 0))
    assert caught.value.code is Code.UNSUPPORTED
    assert not (tmp_path / NAME).exists()
    hydration = HydrationMap.create(tmp_path, Binding("x", MOST_BLOCKS * BLOCK_SIZE, "s", "u", 0))
    hydration.mark(MOST_BLOCKS - 1, MOST_BLOCKS)
    hydration.mark(0, MOST_BLOCKS - 1)
    assert hydration.complete and hydration.missing(0, MOST_BLOCKS) == []
    hydration.commit(hydration.capture())
    hydration.close()
    again = HydrationMap.open(tmp_path)
    assert again.complete
    again.close()


# --- damage -----------------------------------------------------------------------------------------------------------


def _lived(directory: Path) -> set[int]:
    """A map with a base and three commits, of a process that was killed."""
    hydration = HydrationMap.create(directory, BINDING)
    for first, stop in ((0, 10), (500, 600), (999, 1000)):
        hydration.mark(first, stop)
        hydration.commit(hydration.capture())
    hydration.close()
    return {*range(10), *range(500, 600), 999}


def _refused(directory: Path) -> None:
    before = (directory / NAME).read_bytes()
    with pytest.raises(BlockferryError) as caught:
        HydrationMap.open(directory)
    assert caught.value.code in (Code.CORRUPT_STATE, Code.UNSUPPORTED), caught.value.line()
    assert "hydration.map" in caught.value.line()
    # And again: refusing has not repaired it.
    with pytest.raises(BlockferryError):
        HydrationMap.open(directory)
    assert len((directory / NAME).read_bytes()) <= len(before)


def test_every_damaged_byte_is_noticed() -> None:
    """Of every part of the map, the last record included."""
    with quick_directory() as directory:
        blocks = _lived(directory)
        whole = (directory / NAME).read_bytes()
        for position in range(len(whole)):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << position % 8
            (directory / NAME).write_bytes(damaged)
            _refused(directory)
        (directory / NAME).write_bytes(whole)
        again = HydrationMap.open(directory)
        assert set(again.hydrated()) == blocks
        again.close()


def test_every_shorter_map_is_noticed() -> None:
    with quick_directory() as directory:
        _lived(directory)
        whole = (directory / NAME).read_bytes()
        for length in range(len(whole)):
            (directory / NAME).write_bytes(whole[:length])
            _refused(directory)


def test_a_map_that_is_gone_is_not_there(tmp_path: Path) -> None:
    assert not HydrationMap.exists(tmp_path)
    _lived(tmp_path)
    assert HydrationMap.exists(tmp_path)


@pytest.mark.parametrize("seal", [b"", b"nonsense", b"00000000 {}", None])
def test_a_torn_end_that_nobody_was_told_of_is_cut_off(tmp_path: Path, seal: bytes | None) -> None:
    """A power failure in the middle of an append; the seal, which is not flushed, may be anything older or torn."""
    blocks = _lived(tmp_path)
    with (tmp_path / NAME).open("ab") as file:
        file.write(b'12345678 {"hydrated":[7')
    if seal is None:
        (tmp_path / SEAL).unlink()
    else:
        (tmp_path / SEAL).write_bytes(seal)
    again = HydrationMap.open(tmp_path)
    assert set(again.hydrated()) == blocks
    again.close()


def test_the_seal_of_another_map_says_nothing(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    _lived(other)
    blocks = _lived(tmp_path)
    (tmp_path / SEAL).write_bytes((other / SEAL).read_bytes())
    again = HydrationMap.open(tmp_path)
    assert set(again.hydrated()) == blocks
    again.close()


def test_a_newer_map_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(module, "FORMAT", 2)
        _lived(tmp_path)
    before = (tmp_path / NAME).read_bytes()
    with pytest.raises(BlockferryError, match="its format is 2") as caught:
        HydrationMap.open(tmp_path)
    assert caught.value.code is Code.UNSUPPORTED
    assert (tmp_path / NAME).read_bytes() == before


@pytest.mark.parametrize(
    "record", [{"hydrated": [0]}, {"hydrated": [5, 0]}, {"hydrated": [9, 2, 1, 1]}, {"hydrated": [999, 2]}, {"x": 1}]
)
def test_records_that_make_no_sense_are_damage(tmp_path: Path, record: dict[str, object]) -> None:
    hydration = HydrationMap.create(tmp_path, BINDING)
    hydration._log.append(record)
    hydration.close()
    _refused(tmp_path)
