"""Durations; sizes are in test_cli_main.py and test_render.py."""

from __future__ import annotations

import pytest
from blockferry.common.errors import BlockferryError
from blockferry.common.units import parse_duration
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize(
    ("text", "seconds"), [("0", 0), ("0s", 0), ("10s", 10), ("30m", 1800), ("12h", 43200), ("7d", 604800)]
)
def test_durations(text: str, seconds: int) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "7", "d", "7D", "1.5h", "-1h", "7 d", "1w", "\u0661d", "1m30s", "9" * 16 + "s"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(BlockferryError, match="is not a duration; write a number with s, m, h or d"):
        parse_duration(text)


@given(st.text(max_size=6))
def test_no_text_breaks_the_parser_of_durations(text: str) -> None:
    try:
        found = parse_duration(text)
    except BlockferryError:
        return
    assert found >= 0 and text.isascii()
