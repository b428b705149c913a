"""Retention keeps what a plain reading of its rules keeps, always the newest, and never trusts a clock for order."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.retention import DEFAULT, Retention, parse, reasons_to_keep
from blockferry.common.wire import retention_from_wire, retention_to_wire
from hypothesis import given
from hypothesis import strategies as st

NAMES = ("last", "hourly", "daily", "weekly", "monthly", "yearly")
NOW = datetime(2024, 3, 1, 12, 0, tzinfo=UTC)

rules = st.builds(Retention, **{name: st.integers(0, 4) for name in NAMES})


def microseconds(at: datetime) -> int:
    return int(at.timestamp() * 1_000_000)


BUCKET = {
    "hourly": "%Y-%m-%d %H",
    "daily": "%Y-%m-%d",
    "weekly": "%G-%V",
    "monthly": "%Y-%m",
    "yearly": "%Y",
}


@given(st.lists(st.integers(0, 800 * 24), max_size=40, unique=True), rules)
def test_each_rule_keeps_the_newest_of_its_last_buckets(hours_ago: list[int], retention: Retention) -> None:
    ages = sorted(hours_ago, reverse=True)
    points = [(number, NOW - timedelta(hours=age)) for number, age in enumerate(ages, 1)]
    expected: dict[int, set[str]] = {number: set() for number, _ in points}
    if points:
        expected[points[-1][0]].add("newest")
    for number, _ in points[len(points) - min(retention.last, len(points)) :]:
        expected[number].add("last")
    for name, form in BUCKET.items():
        newest_of = {at.strftime(form): number for number, at in points}
        chosen = sorted(newest_of.values(), reverse=True)[: getattr(retention, name)]
        for number in chosen:
            expected[number].add(name)
    found = reasons_to_keep([(number, microseconds(at)) for number, at in points], [retention])
    assert {number: set(reasons) for number, reasons in found.items()} == expected
    assert all(len(reasons) == len(set(reasons)) for reasons in found.values())


@given(st.lists(st.integers(0, 10**16), min_size=1, max_size=10), rules, rules)
def test_whatever_the_clock_did_the_newest_number_is_kept_and_rules_only_add(
    times: list[int], first: Retention, second: Retention
) -> None:
    points = list(enumerate(times, 1))
    one, two = reasons_to_keep(points, [first]), reasons_to_keep(points, [second])
    both = reasons_to_keep(reversed(points), [first, second])
    assert "newest" in both[len(points)]
    assert {number: set(reasons) for number, reasons in both.items()} == {
        number: {*one[number], *two[number]} for number, _ in points
    }


def test_points_in_use_are_kept() -> None:
    found = reasons_to_keep([(1, 0), (2, 0), (3, 0)], [Retention()], in_use=[1, 9])
    assert found == {3: ["newest"], 2: [], 1: ["in use"]}


def test_nothing_is_nothing() -> None:
    assert reasons_to_keep([], [DEFAULT], in_use=[1]) == {}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("last=12,hourly=24,daily=7", Retention(last=12, hourly=24, daily=7)),
        (" yearly=1 , monthly=2,weekly=3 ", Retention(yearly=1, monthly=2, weekly=3)),
        ("last=0", Retention()),
        ("daily=999999", Retention(daily=999999)),
    ],
)
def test_rules_are_read(text: str, expected: Retention) -> None:
    assert parse(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", ",", "last", "last=", "=3", "last=-1", "last=x", "last=1,last=2", "Last=1", "last=\u0663", "last=1000000"],
)
def test_what_is_no_rule_is_refused(text: str) -> None:
    with pytest.raises(BlockferryError) as caught:
        parse(text)
    assert caught.value.code is Code.INVALID_ARGUMENT


@given(rules)
def test_rules_survive_the_wire_and_the_command_line(retention: Retention) -> None:
    assert retention_from_wire(retention_to_wire(retention)) == retention
    assert parse(",".join(f"{name}={getattr(retention, name)}" for name in NAMES)) == retention
