"""Sizes and durations as people write and read them (pure). Sizes are binary: K, M, G and T are 2^10 to 2^40 bytes."""

from __future__ import annotations

from typing import cast

from blockferry.common.errors import BlockferryError, Code

_SIZES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_DURATIONS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_MOST_DIGITS = 15

MINUTES_OF_A_DAY = 24 * 60


def parse_size(text: str) -> int:
    """Bytes of `64K`, `1M`, `100`. Raises USAGE."""
    number, unit = text[:-1], text[-1:].upper()
    if unit not in _SIZES:
        number, unit = text, ""
    if not _is_number(number):
        raise BlockferryError(Code.USAGE, f"{text!r} is not a size", next="write a number with K, M, G or T")
    return int(number) * _SIZES[unit]


def parse_duration(text: str) -> int:
    """Seconds of `7d`, `12h`, `30m`, `10s`, and of `0`. Raises USAGE."""
    if text == "0":
        return 0
    number, unit = text[:-1], text[-1:]
    if unit not in _DURATIONS or not _is_number(number):
        raise BlockferryError(
            Code.USAGE, f"{text!r} is not a duration", next="write a number with s, m, h or d, such as 7d, or 0"
        )
    return int(number) * _DURATIONS[unit]


def parse_seconds(text: str) -> float:
    """Seconds of `60s`, `1m` and, unlike `parse_duration`, of `0.5s`. Raises USAGE."""
    number, unit = text[:-1], text[-1:]
    whole, point, part = number.partition(".")
    if unit not in _DURATIONS or not _is_number(whole) or (point and not _is_number(part)):
        raise BlockferryError(
            Code.USAGE, f"{text!r} is not a duration", next="write a number with s, m, h or d, such as 60s or 0.5s"
        )
    return float(number) * _DURATIONS[unit]


def parse_window(text: str) -> tuple[int, int]:
    """Minutes of the day from and to which `HH:MM-HH:MM` lasts, the second excluded. `22:00-06:00` goes on after
    midnight; `00:00-24:00` is always. Raises USAGE."""
    begin, dash, end = text.partition("-")
    found = _minutes(begin), _minutes(end)
    if not dash or None in found or found[0] == found[1] or found[0] == MINUTES_OF_A_DAY:
        raise BlockferryError(
            Code.USAGE, f"{text!r} is not a window of the day", next="write HH:MM-HH:MM, such as 22:00-06:00"
        )
    return cast(tuple[int, int], found)


def _minutes(text: str) -> int | None:
    """Of the day, up to 24:00."""
    hours, colon, minutes = text.partition(":")
    if not (colon and len(hours) == len(minutes) == 2 and _is_number(hours) and _is_number(minutes)):
        return None
    found = int(hours) * 60 + int(minutes)
    return found if int(minutes) < 60 and found <= MINUTES_OF_A_DAY else None


def parse_share(text: str) -> float:
    """A share of the data: `5%`, `0.5%`. Raises USAGE."""
    number = text.removesuffix("%")
    try:
        share = float(number) / 100
    except ValueError:
        share = -1.0
    if not text.endswith("%") or not 0 < share <= 1:
        raise BlockferryError(Code.USAGE, f"{text!r} is no share", next="write one from 0.01% to 100%, such as 5%")
    return share


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS


def human_bytes(count: float) -> str:
    """Bytes with a binary unit: `1.5 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        text = f"{count:.0f}" if unit == "B" else f"{count:.1f}"
        # As it is shown: 1023.99 KiB are 1.0 MiB, not 1024.0 KiB.
        if float(text) < 1024:
            return f"{text} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
