"""The four cases: every region gets exactly one action, the one a table would give it."""

from __future__ import annotations

import pytest
from blockferry.client.plan import decide
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.regions import AllocationMap, Geometry, Provenance
from hypothesis import given
from hypothesis import strategies as st
from pyroaring import BitMap

REGION = 65536

ACTION = {(False, False): "skip", (False, True): "unmap", (True, False): "send", (True, True): "compare"}
"""(allocated at the source, allocated at the destination)"""

COUNT = 50
bits = st.sets(st.integers(0, COUNT - 1))
maps = st.one_of(bits, st.just(set[int]()), st.just(set(range(COUNT))))


def a_map(regions: set[int], provenance: Provenance, short: int = 0) -> AllocationMap:
    return AllocationMap(Geometry(COUNT * REGION - short, REGION), BitMap(regions), provenance)


@given(maps, maps, st.sampled_from(Provenance), st.sampled_from(Provenance), st.integers(0, REGION - 1))
def test_every_region_gets_the_one_action_of_the_table(
    source: set[int], destination: set[int], ours: Provenance, theirs: Provenance, short: int
) -> None:
    plan = decide(a_map(source, ours, short), a_map(destination, theirs, short))
    chosen: dict[str, set[int]] = {name: set() for name in ACTION.values()}
    for region in range(COUNT):
        chosen[ACTION[region in source, region in destination]].add(region)
    assert (set(plan.unmap), set(plan.send), set(plan.compare)) == (
        chosen["unmap"],
        chosen["send"],
        chosen["compare"],
    )
    assert plan.counts() == {name: len(regions) for name, regions in chosen.items()}
    assert sum(plan.counts().values()) == COUNT
    assert (plan.source_map, plan.destination_map) == (ours, theirs)
    last_is_read = COUNT - 1 in source
    assert plan.bytes_to_read == len(source) * REGION - (short if last_is_read else 0)


@given(maps)
def test_where_one_side_knows_nothing_the_other_still_skips_what_it_can_prove(known: set[int]) -> None:
    geometry = Geometry(COUNT * REGION, REGION)
    from_source = decide(a_map(known, Provenance.EXACT), AllocationMap.full(geometry))
    assert from_source.counts() == {"skip": 0, "unmap": COUNT - len(known), "send": 0, "compare": len(known)}
    from_destination = decide(AllocationMap.full(geometry), a_map(known, Provenance.EXACT))
    assert from_destination.counts() == {"skip": 0, "unmap": 0, "send": COUNT - len(known), "compare": len(known)}
    neither = decide(AllocationMap.full(geometry), AllocationMap.full(geometry))
    assert neither.counts() == {"skip": 0, "unmap": 0, "send": 0, "compare": COUNT}
    assert neither.source_map is neither.destination_map is Provenance.ABSENT


@given(maps, maps, bits, st.integers(0, REGION - 1))
def test_a_tracked_set_narrows_what_is_looked_at_and_not_what_is_done(
    source: set[int], destination: set[int], tracked: set[int], short: int
) -> None:
    ours, theirs = a_map(source, Provenance.EXACT, short), a_map(destination, Provenance.EXACT, short)
    whole, narrowed = decide(ours, theirs), decide(ours, theirs, BitMap(tracked))
    for name in ("unmap", "send", "compare"):
        assert getattr(narrowed, name) == getattr(whole, name) & BitMap(tracked)
    assert sum(narrowed.counts().values()) == COUNT
    assert narrowed.bytes_avoided == whole.bytes_to_read - narrowed.bytes_to_read
    assert (whole.tracked, whole.bytes_avoided) == (None, 0)


def test_deciding_changes_neither_map() -> None:
    source, destination = a_map({1, 2}, Provenance.EXACT), a_map({2, 3}, Provenance.EXACT)
    decide(source, destination)
    assert (set(source.regions), set(destination.regions)) == ({1, 2}, {2, 3})


@pytest.mark.parametrize("other", [Geometry(REGION, REGION), Geometry(COUNT * REGION, 2 * REGION)])
def test_maps_of_different_volumes_are_refused(other: Geometry) -> None:
    with pytest.raises(BlockferryError) as caught:
        decide(a_map({1}, Provenance.EXACT), AllocationMap.full(other))
    assert caught.value.code is Code.SIZE_MISMATCH
