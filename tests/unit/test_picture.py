"""The picture of a map: every share has the shade of what it holds, and nothing is invisible."""

from __future__ import annotations

import pytest
from blockferry.client.cli.picture import BLOCKS, PLAIN, ROWS, WIDTH, picture, shades_for
from blockferry.common.regions import AllocationMap, Geometry, Provenance
from hypothesis import given
from hypothesis import strategies as st

REGION = 65536


def of(count: int, runs: list[tuple[int, int]]) -> AllocationMap:
    return AllocationMap.from_runs(Geometry(count * REGION, REGION), runs, Provenance.EXACT)


@pytest.mark.parametrize(
    ("count", "runs", "expected"),
    [
        (1, [], [" "]),
        (1, [(0, 1)], ["█"]),
        (8, [(0, 2), (5, 1)], ["██   █  "]),
        (64, [(63, 1)], [" " * 63 + "█"]),
        # 65 to 127 regions still make one row: a share is a region or two.
        (65, [(0, 1)], ["█" + " " * 63]),
        (65, [(64, 1)], [" " * 63 + "▒"]),
        (128, [(0, 64)], ["█" * 64, " " * 64]),
        (256, [(0, 1), (64, 1), (255, 1)], ["█" + " " * 63, "█" + " " * 63, " " * 64, " " * 63 + "█"]),
        # Shares of six regions with 0 to 6 of them allocated.
        (
            6 * 256,
            [(6, 1), (12, 2), (18, 3), (24, 4), (30, 5), (36, 6)],
            [" ░▒▒▓▓█" + " " * 57, " " * 64, " " * 64, " " * 64],
        ),
        (2**24, [(2**23, 1)], [" " * 64, " " * 64, "░" + " " * 63, " " * 64]),
        (2**24, [(0, 2**23), (2**23 + 1, 2**23 - 1)], ["█" * 64, "█" * 64, "▓" + "█" * 63, "█" * 64]),
    ],
)
def test_the_picture_is_exactly_this(count: int, runs: list[tuple[int, int]], expected: list[str]) -> None:
    assert picture(of(count, runs)) == expected


def test_width_rows_and_shades_can_be_chosen() -> None:
    found = of(40, [(0, 10), (15, 1), (31, 9)])
    assert picture(found, PLAIN, width=4, rows=2) == ["## .", "  *#"]
    assert picture(found, PLAIN, width=10, rows=1) == ["##:.   .##"]


@given(st.integers(1, 3000), st.data())
def test_nothing_allocated_is_invisible_and_nothing_partial_looks_full(count: int, data: st.DataObject) -> None:
    members = data.draw(st.sets(st.integers(0, count - 1), max_size=20))
    rows = picture(of(count, [(one, 1) for one in sorted(members)]))
    assert 1 <= len(rows) <= ROWS
    assert {len(row) for row in rows} == {min(count, WIDTH)}
    cells = "".join(rows)
    for number, shade in enumerate(cells):
        share = range(number * count // len(cells), (number + 1) * count // len(cells))
        held = len(members.intersection(share))
        assert (shade == " ") == (held == 0)
        assert (shade == "█") == (held == len(share))


@pytest.mark.parametrize(
    ("encoding", "shades"),
    [("utf-8", BLOCKS), ("cp437", BLOCKS), ("ascii", PLAIN), ("latin-1", PLAIN), (None, PLAIN), ("no-such", PLAIN)],
)
def test_terminals_without_blocks_get_plain_characters(encoding: str | None, shades: str) -> None:
    assert shades_for(encoding) == shades
