"""Regions and allocation maps agree with models too simple to be wrong, and refuse every map that is not one."""

from __future__ import annotations

import itertools

import pytest
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.regions import (
    MAX_REGION_SIZE,
    MAX_REGIONS,
    MIN_REGION_SIZE,
    AllocationMap,
    Geometry,
    Provenance,
    check_region_size,
    group_runs,
    runs_of,
    split_runs,
)
from hypothesis import given
from hypothesis import strategies as st
from pyroaring import BitMap

REGION_SIZES = [MIN_REGION_SIZE << shift for shift in range(9)]

geometries = st.builds(
    lambda region_size, regions, short: Geometry(max(region_size * regions - short % region_size, 1), region_size),
    st.sampled_from(REGION_SIZES),
    st.integers(1, 40),
    st.integers(0, MAX_REGION_SIZE),
)


@st.composite
def geometries_and_regions(draw: st.DrawFn) -> tuple[Geometry, BitMap]:
    geometry = draw(geometries)
    return geometry, BitMap(draw(st.sets(st.integers(0, geometry.count - 1))))


@st.composite
def geometries_and_extents(draw: st.DrawFn) -> tuple[Geometry, list[tuple[int, int]]]:
    geometry = draw(geometries)
    offsets = st.integers(0, geometry.size + geometry.region_size)
    lengths = st.one_of(st.integers(0, 3), st.integers(0, 3 * geometry.region_size))
    return geometry, draw(st.lists(st.tuples(offsets, lengths), max_size=8))


@pytest.mark.parametrize("size", REGION_SIZES)
def test_every_power_of_two_in_range_is_a_region_size(size: int) -> None:
    assert check_region_size(size) == size


@pytest.mark.parametrize("size", [-65536, 0, 1, 3, 4096, 32768, 65535, 65537, 98304, 1 << 25, (1 << 24) + 1])
def test_other_region_sizes_are_refused(size: int) -> None:
    with pytest.raises(BlockferryError) as caught:
        check_region_size(size)
    assert caught.value.code is Code.INVALID_ARGUMENT
    with pytest.raises(BlockferryError):
        Geometry(1 << 30, size)


@pytest.mark.parametrize(("size", "count"), [(1, 1), (65535, 1), (65536, 1), (65537, 2), (1 << 48, MAX_REGIONS)])
def test_number_of_regions(size: int, count: int) -> None:
    assert Geometry(size, 65536).count == count


@pytest.mark.parametrize("size", [0, -1, (1 << 48) + 1, 1 << 63])
def test_sizes_without_a_usable_number_of_regions_are_refused(size: int) -> None:
    with pytest.raises(BlockferryError) as caught:
        Geometry(size, 65536)
    assert caught.value.code is Code.INVALID_ARGUMENT


@given(geometries_and_regions())
def test_bytes_in_counts_a_short_last_region_with_its_own_length(drawn: tuple[Geometry, BitMap]) -> None:
    geometry, regions = drawn
    lengths = [min(geometry.region_size, geometry.size - index * geometry.region_size) for index in regions]
    assert geometry.bytes_in(regions) == sum(lengths)
    assert AllocationMap(geometry, regions, Provenance.EXACT).allocated_bytes == sum(lengths)
    assert [geometry.extent(index) for index in regions] == [
        (index * geometry.region_size, length) for index, length in zip(regions, lengths, strict=True)
    ]


@given(geometries)
def test_a_full_map_covers_the_volume_and_nothing_else(geometry: Geometry) -> None:
    full = AllocationMap.full(geometry)
    assert list(full.regions) == list(range(geometry.count))
    assert full.allocated_bytes == geometry.size
    assert full.provenance is Provenance.ABSENT
    assert list(full.runs()) == [(0, geometry.count)]
    assert geometry.extent(0, geometry.count) == (0, geometry.size)


@given(geometries_and_extents())
def test_a_region_is_allocated_exactly_if_an_extent_touches_it(drawn: tuple[Geometry, list[tuple[int, int]]]) -> None:
    geometry, extents = drawn
    touched = set()
    for index in range(geometry.count):
        start, length = geometry.extent(index)
        if any(max(start, offset) < min(start + length, offset + size) for offset, size in extents):
            touched.add(index)
    found = AllocationMap.from_extents(geometry, extents, Provenance.CONSERVATIVE)
    assert set(found.regions) == touched
    assert found.provenance is Provenance.CONSERVATIVE


@given(st.sets(st.integers(0, 80)), st.integers(0, 64))
def test_runs_are_maximal_and_lose_nothing_below_the_bound(members: set[int], count: int) -> None:
    runs = list(runs_of(BitMap(members), count))
    assert [index for first, length in runs for index in range(first, first + length)] == sorted(
        index for index in members if index < count
    )
    assert all(length >= 1 for _, length in runs)
    assert all(first + length < following for (first, length), (following, _) in itertools.pairwise(runs))


@given(geometries_and_regions(), st.sampled_from(Provenance))
def test_a_map_survives_its_run_lengths(drawn: tuple[Geometry, BitMap], provenance: Provenance) -> None:
    before = AllocationMap(*drawn, provenance)
    assert AllocationMap.from_runs(before.geometry, before.runs(), provenance) == before


@pytest.mark.parametrize(
    "runs",
    [
        [],
        [(0, MAX_REGIONS)],
        [(MAX_REGIONS - 1, 1)],
        [(0, 1), (MAX_REGIONS - 2, 2)],
        [(1, MAX_REGIONS - 2)],
    ],
)
def test_runs_at_the_largest_volume(runs: list[tuple[int, int]]) -> None:
    geometry = Geometry(MAX_REGIONS * 65536, 65536)
    found = AllocationMap.from_runs(geometry, runs, Provenance.EXACT)
    assert len(found.regions) == sum(count for _, count in runs)
    assert list(found.runs()) == runs


@given(
    st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 1000)), max_size=5),
    st.integers(1, 70),
)
def test_split_runs_keeps_every_number_in_order(runs: list[tuple[int, int]], most: int) -> None:
    parts = list(split_runs(runs, most))
    assert all(1 <= count <= most for _, count in parts)
    assert [index for first, count in parts for index in range(first, first + count)] == [
        index for first, count in runs for index in range(first, first + count)
    ]
    assert len(parts) == sum(-(-count // most) for _, count in runs)


@given(
    st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 1000)), max_size=5),
    st.integers(1, 70),
)
def test_group_runs_keeps_every_number_in_order(runs: list[tuple[int, int]], most: int) -> None:
    groups = [
        [index for first, count in group for index in range(first, first + count)] for group in group_runs(runs, most)
    ]
    assert list(itertools.chain(*groups)) == [index for first, count in runs for index in range(first, first + count)]
    assert [len(group) for group in groups[:-1]] == [most] * (len(groups) - 1)
    assert all(1 <= len(group) <= most for group in groups[-1:])


@given(st.sets(st.integers(0, 99)), st.integers(1, 200))
def test_a_map_is_cut_to_another_size(allocated: set[int], count: int) -> None:
    found = AllocationMap(Geometry(100 * 65536, 65536), BitMap(allocated), Provenance.CONSERVATIVE)
    other = Geometry(count * 65536, 65536)
    cut = found.cut_to(other)
    assert (cut.geometry, cut.provenance) == (other, Provenance.CONSERVATIVE)
    assert set(cut.regions) == {region for region in allocated if region < count}


def test_adjacent_runs_are_one_map() -> None:
    found = AllocationMap.from_runs(Geometry(10 * 65536, 65536), [(2, 3), (5, 2)], Provenance.EXACT)
    assert list(found.runs()) == [(2, 5)]


@pytest.mark.parametrize(
    "runs",
    [
        pytest.param([(0, 0)], id="empty"),
        pytest.param([(3, -1)], id="negative count"),
        pytest.param([(-1, 2)], id="negative start"),
        pytest.param([(5, 1), (2, 1)], id="out of order"),
        pytest.param([(2, 2), (3, 2)], id="overlapping"),
        pytest.param([(2, 2), (2, 2)], id="twice"),
        pytest.param([(10, 1)], id="past the end"),
        pytest.param([(9, 2)], id="across the end"),
        pytest.param([(0, 2**63)], id="huge count"),
        pytest.param([(2**64 - 1, 2**64 - 1)], id="huge start"),
    ],
)
def test_run_lengths_that_are_no_map_are_refused(runs: list[tuple[int, int]]) -> None:
    with pytest.raises(BlockferryError) as caught:
        AllocationMap.from_runs(Geometry(10 * 65536 - 5, 65536), runs, Provenance.EXACT)
    assert caught.value.code is Code.PROTOCOL
