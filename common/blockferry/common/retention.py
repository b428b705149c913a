"""Which recovery points are kept (pure).

A rule such as `daily = 7` keeps the newest point of each of the last seven days that have one, in UTC. Order is by
number, never by clock: a clock that jumps may put points into odd days, but can never make an older point the newest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Annotated

import msgspec
from blockferry.common.errors import BlockferryError, Code

Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 32) - 1)]
"""As many as fit the wire."""


class Retention(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How many points each rule keeps; 0 switches a rule off."""

    last: Count = 0
    hourly: Count = 0
    daily: Count = 0
    weekly: Count = 0
    monthly: Count = 0
    yearly: Count = 0


DEFAULT = Retention(last=3)
"""What a replica keeps until somebody says otherwise, and the server's default floor: an operator who notices a mistake
after the next sync, or the one after, can still go back."""

_BUCKETS: dict[str, Callable[[datetime], object]] = {
    "hourly": lambda at: (at.date(), at.hour),
    "daily": lambda at: at.date(),
    "weekly": lambda at: at.isocalendar()[:2],
    "monthly": lambda at: (at.year, at.month),
    "yearly": lambda at: at.year,
}


def parse(text: str) -> Retention:
    """Read `last=12,hourly=24,daily=7`; raise INVALID_ARGUMENT."""
    counts: dict[str, int] = {}
    for part in text.split(","):
        name, equals, number = part.strip().partition("=")
        if name not in Retention.__struct_fields__ or not equals or not (number.isascii() and number.isdigit()):
            raise BlockferryError(
                Code.INVALID_ARGUMENT,
                f"{part.strip()!r} is not a retention rule",
                cause=f"rules are {', '.join(Retention.__struct_fields__)}, each with a number",
                next="write them like last=12,hourly=24,daily=7",
            )
        if name in counts or len(number) > 6:
            raise BlockferryError(
                Code.INVALID_ARGUMENT,
                f"{part.strip()!r} is not a retention rule",
                cause="it is given twice" if name in counts else "the number is too large",
                next="write each rule once",
            )
        counts[name] = int(number)
    return Retention(**counts)


def reasons_to_keep(
    points: Iterable[tuple[int, int]], rules: Iterable[Retention], in_use: Iterable[int] = ()
) -> Mapping[int, list[str]]:
    """For each (number, microseconds since 1970) why it is kept; a point without a reason may go.

    The newest point and those `in_use` are always kept. With several sets of rules a point is kept if any keeps it.
    """
    newest_first = sorted(points, reverse=True)
    kept: dict[int, list[str]] = {number: [] for number, _ in newest_first}
    if newest_first:
        kept[newest_first[0][0]].append("newest")
    for number in in_use:
        if number in kept:
            kept[number].append("in use")
    for retention in rules:
        for number, _ in newest_first[: retention.last]:
            _note(kept[number], "last")
        for name, bucket_of in _BUCKETS.items():
            left = getattr(retention, name)
            previous: object = None
            for number, at_us in newest_first:
                bucket = bucket_of(datetime.fromtimestamp(at_us / 1e6, UTC))
                if left == 0:
                    break
                if bucket != previous:
                    _note(kept[number], name)
                    previous = bucket
                    left -= 1
    return kept


def _note(reasons: list[str], reason: str) -> None:
    if reason not in reasons:
        reasons.append(reason)
