"""What people read: numbers with the right unit, aligned tables, and stdout for results only."""

from __future__ import annotations

import asyncio
import json
import re

import pytest
from blockferry.client.cli import render
from blockferry.client.cli.render import Console, human_seconds, table
from blockferry.client.report import Phase, Progress
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.units import human_bytes
from hypothesis import example, given
from hypothesis import strategies as st


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (2**20 - 1, "1.0 MiB"),
        (2**20, "1.0 MiB"),
        (1023 * 2**20, "1023.0 MiB"),
        (2**30 - 1, "1.0 GiB"),
        (2**40 - 1, "1.0 TiB"),
        (2**40, "1.0 TiB"),
        (5 * 2**50, "5120.0 TiB"),
        (1023.7, "1.0 KiB"),
        (0.4, "0 B"),
    ],
)
def test_bytes_for_people(count: float, text: str) -> None:
    assert human_bytes(count) == text


UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


@given(st.one_of(st.integers(0, 2**50), st.floats(0, 2**50)))
@example(1024 * 1024 - 1)
@example(1023.5)
@example(1023.96 * 1024)
def test_bytes_for_people_are_right_to_the_digits_shown(count: float) -> None:
    number, unit = human_bytes(count).split()
    assert abs(float(number) * UNITS[unit] - count) <= UNITS[unit] * (0.5 if unit == "B" else 0.0501)
    assert float(number) < 1024 or unit == "TiB"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"),
        (0.4, "0:00"),
        (0.5, "0:01"),
        (42, "0:42"),
        (59.4, "0:59"),
        (59.5, "1:00"),
        (61, "1:01"),
        (3599.6, "1:00:00"),
        (3600, "1:00:00"),
        (11107, "3:05:07"),
        (100 * 3600, "100:00:00"),
    ],
)
def test_seconds_for_people(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text


@given(st.integers(0, 10**7))
def test_seconds_for_people_add_up(seconds: int) -> None:
    parts = [int(part) for part in human_seconds(seconds).split(":")]
    assert sum(part * 60**power for power, part in enumerate(reversed(parts))) == seconds
    assert all(part < 60 for part in parts[1:])


def test_columns_are_aligned() -> None:
    assert table([("A", "LONG"), ("wide", "x"), ("", "y")]) == ["A     LONG", "wide  x", "      y"]
    assert table([("ONLY",)]) == ["ONLY"]


# --- where words go ---------------------------------------------------------------------------------------------

REPORT = {"schema": 1, "value": "x"}
ERROR = BlockferryError(Code.IN_USE, "db is in use", cause="somebody writes", next="stop it", volume="db")


@pytest.mark.parametrize(
    ("as_json", "quiet", "expected"),
    [
        (False, False, "one\ntwo\n"),
        (False, True, ""),
        (True, False, json.dumps(REPORT) + "\n"),
        (True, True, json.dumps(REPORT) + "\n"),
    ],
)
def test_results(capsys: pytest.CaptureFixture[str], as_json: bool, quiet: bool, expected: str) -> None:
    Console(json=as_json, quiet=quiet).result(REPORT, ["one", "two"])
    assert capsys.readouterr() == (expected, "")


@pytest.mark.parametrize("quiet", [False, True])
@pytest.mark.parametrize("as_json", [False, True])
def test_errors_are_one_line_on_stderr_and_an_object_with_json(
    capsys: pytest.CaptureFixture[str], as_json: bool, quiet: bool
) -> None:
    Console(json=as_json, quiet=quiet).error(ERROR)
    out, err = capsys.readouterr()
    assert err == "blockferry: db is in use: somebody writes; stop it\n"
    assert (json.loads(out) if as_json else out) == ({"error": ERROR.fields()} if as_json else "")


@pytest.mark.parametrize("as_json", [False, True])
async def test_quiet_shows_no_progress(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    monkeypatch.setattr(render, "REFRESH_SECONDS", 0.0)
    progress = Progress()
    async with Console(json=as_json, quiet=True).showing(progress):
        progress.start("transfer", 100)
        for _ in range(10):
            await asyncio.sleep(0)
    assert capsys.readouterr() == ("", "")


async def test_without_a_terminal_phases_are_named_and_progress_has_rate_and_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(render, "REFRESH_SECONDS", 0.0)
    progress = Progress()
    seen = ""

    async def until(pattern: str) -> None:
        nonlocal seen
        async with asyncio.timeout(10):
            while not re.search(pattern, seen):
                await asyncio.sleep(0.001)
                out, err = capsys.readouterr()
                assert out == ""
                seen += err

    async with Console(json=False, quiet=False).showing(progress):
        progress.start("map")
        await until(r"^map \.\.\.\n")
        phase = progress.start("transfer", 2**30)
        await until(r"\ntransfer \.\.\.\n")
        assert "transfer:" not in seen
        phase.done = 2**29
        monkeypatch.setattr(render, "PLAIN_SECONDS", 0.0)
        await until(r"\ntransfer: 512\.0 MiB of 1\.0 GiB, [0-9.]+ .iB/s, time left 0:0\d\n")


def test_a_line_of_progress() -> None:
    phase = Phase("transfer", total=100 * 2**20, done=25 * 2**20)
    assert render._line(phase, 5) == "transfer: 25.0 MiB of 100.0 MiB, 5.0 MiB/s, time left 0:15"
    assert render._line(Phase("transfer", total=100), 5) == "transfer: 0 B of 100 B, 0 B/s, time left unknown"
    phase.note = lambda: "the destination is slow"
    assert render._line(phase, 5).endswith("time left 0:15, the destination is slow")
