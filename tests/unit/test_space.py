"""Room is never overdrawn, whoever writes, lands and looks in whatever order, and none of it is held back for good."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from blockferry.server.space import LOOK_BYTES, Allowance, Limits, reserve_of, union_length
from hypothesis import given
from hypothesis import strategies as st

GIB = 1 << 30


@pytest.mark.parametrize(
    ("limit", "total", "reserve"),
    [
        (None, 100 * GIB, GIB),
        (None, 20 * GIB, GIB),
        (None, 10 * GIB, GIB // 2),
        (None, 0, 0),
        (0, 100 * GIB, 0),
        (7, 100 * GIB, 7),
        (200 * GIB, 100 * GIB, 200 * GIB),
    ],
)
def test_what_is_reserved(limit: int | None, total: int, reserve: int) -> None:
    assert reserve_of(Limits(reserve=limit), total) == reserve


@dataclass
class Writer:
    """Something under way; `landed` of its bytes can be seen on the disk."""

    amount: int
    landed: int = 0


AMOUNTS = st.integers(0, LOOK_BYTES + 5)
STEPS = st.one_of(
    st.tuples(st.just("take"), AMOUNTS),
    st.tuples(st.sampled_from(["land", "finish"]), st.integers(0, 7)),
    st.tuples(st.just("look"), st.integers(0, 3)),
)


@given(st.integers(0, 3 * LOOK_BYTES), st.lists(STEPS, max_size=60), AMOUNTS)
def test_room_is_never_overdrawn(room: int, steps: list[tuple[str, int]], wanted: int) -> None:
    allowance = Allowance()
    writers: list[Writer] = []
    finished = 0

    def finish(index: int) -> None:
        nonlocal finished
        writer = writers.pop(index % len(writers))
        finished += writer.amount
        allowance.done(writer.amount)

    for kind, number in steps:
        if kind == "take" and allowance.take(number):
            writers.append(Writer(number))
        elif kind == "land" and writers:
            writers[number % len(writers)].landed = writers[number % len(writers)].amount
        elif kind == "finish" and writers:
            finish(number)
        elif kind == "look":
            under_way = allowance.pause()
            assert not allowance.take(1), "nothing begins while somebody looks"
            measured = room - finished - sum(writer.landed for writer in writers)
            # Some end after the disk was asked and before the answer is heard.
            for _ in range(min(number, len(writers))):
                finish(0)
            allowance.looked(measured, under_way, wanted)
        assert finished + sum(writer.amount for writer in writers) <= room
        assert allowance.under_way == sum(writer.amount for writer in writers)
    while writers:
        finish(0)
    allowance.looked(room - finished, allowance.pause(), wanted)
    assert allowance.take(wanted) is (wanted <= room - finished)


@given(st.integers(0, 10 * LOOK_BYTES))
def test_one_looks_again_after_so_many_bytes(room: int) -> None:
    allowance = Allowance()
    allowance.looked(room, allowance.pause(), 1)
    assert allowance.left == min(room, LOOK_BYTES)


def test_somebody_who_waits_for_more_gets_it_at_once() -> None:
    allowance = Allowance()
    allowance.looked(3 * LOOK_BYTES, allowance.pause(), 2 * LOOK_BYTES)
    assert allowance.take(2 * LOOK_BYTES)


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 12)), max_size=12))
def test_what_is_shared_counts_once(ranges: list[tuple[int, int]]) -> None:
    covered = {byte for start, length in ranges for byte in range(start, start + length)}
    assert union_length(ranges) == len(covered)
