"""Which ranges are read."""

from __future__ import annotations

from blockferry.common.archive.columns import NodeRef
from blockferry.common.archive.fetch import GAP, RANGE_ITEMS, RANGE_SIZE, ranges
from hypothesis import given
from hypothesis import strategies as st

A, B = bytes(16), bytes([1] * 16)
K = 1024


def shape(*places: tuple[bytes, int, int, int]) -> list[tuple[bytes, int, int, int, list[int]]]:
    items = [(number, NodeRef(*place)) for number, place in enumerate(places)]
    return [
        (one.attempt, one.chunk, one.offset, one.length, [number for number, _ in one.items]) for one in ranges(items)
    ]


def test_what_is_side_by_side_is_one_range() -> None:
    assert shape((A, 0, 200, 100), (A, 0, 0, 100), (A, 0, 100, 100)) == [(A, 0, 0, 300, [1, 2, 0])]


def test_small_gaps_are_read_and_large_ones_are_not() -> None:
    assert shape((A, 0, 0, K), (A, 0, K + GAP, K)) == [(A, 0, 0, 2 * K + GAP, [0, 1])]
    assert shape((A, 0, 0, K), (A, 0, K + GAP + 1, K)) == [(A, 0, 0, K, [0]), (A, 0, K + GAP + 1, K, [1])]


def test_chunks_and_attempts_are_apart() -> None:
    assert shape((A, 0, 0, K), (A, 1, K, K), (B, 0, K, K)) == [
        (A, 0, 0, K, [0]), (A, 1, K, K, [1]), (B, 0, K, K, [2]),
    ]  # fmt: skip


def test_no_range_is_longer_than_the_bound() -> None:
    half = RANGE_SIZE // 2
    assert [one[2:4] for one in shape((A, 0, 0, half), (A, 0, half, half), (A, 0, 2 * half, 1))] == [
        (0, RANGE_SIZE), (RANGE_SIZE, 1),
    ]  # fmt: skip


def test_no_range_has_more_blocks_than_the_bound() -> None:
    found = shape(*((A, 0, number * 10, 10) for number in range(2 * RANGE_ITEMS + 1)))
    assert [len(one[4]) for one in found] == [RANGE_ITEMS, RANGE_ITEMS, 1]


@given(
    st.lists(
        st.tuples(
            st.sampled_from([A, B]), st.integers(0, 2), st.integers(0, 16 * K * K - 300 * K), st.integers(1, 300 * K)
        ),
        max_size=60,
    )
)
def test_every_item_is_inside_of_exactly_one_range(places: list[tuple[bytes, int, int, int]]) -> None:
    items = [(number, NodeRef(*place)) for number, place in enumerate(places)]
    found = ranges(items)
    assert sorted(number for one in found for number, _ in one.items) == list(range(len(places)))
    for one in found:
        assert one.length <= RANGE_SIZE and 1 <= len(one.items) <= RANGE_ITEMS
        for _, item in one.items:
            assert (item.attempt, item.chunk) == (one.attempt, one.chunk)
            assert one.offset <= item.offset and item.offset + item.length <= one.end
        assert min(item.offset for _, item in one.items) == one.offset
        assert max(item.offset + item.length for _, item in one.items) == one.end
