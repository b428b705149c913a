"""What people see while a sync runs: a live display with rate and time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.images import MIB, build, noise
from tests.support import Server, run_cli
from tests.terminal import on_terminal

BAR = re.compile(
    r"transfer .*? (?P<done>\d+\.\d)/(?P<total>\d+\.\d) MiB +(?P<rate>\d+\.\d) (?P<unit>[kMG]?i?B)/s"
    r" +time left +(?P<left>\d+:\d\d:\d\d)"
)
LINE = re.compile(r"transfer: (\d+\.\d) MiB of (\d+\.\d) MiB, (\d+\.\d) (MiB|KiB)/s, time left (\d+:\d\d)")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """12 MiB of data."""
    return build(tmp_path / "source.img", 12 * MIB, [(0, noise("progress", 12 * MIB))])


def run_on_terminal(*args: object) -> tuple[int, str]:
    """Run `blockferry` with its stderr on a pseudo-terminal; its status and everything it drew."""
    with on_terminal(*args) as terminal:
        return terminal.finish()


def test_a_terminal_shows_bytes_rate_and_time_left(server: Server, volume: str, source: Path) -> None:
    status, drawn = run_on_terminal("sync", source, server.url(volume), "--bwlimit", "4M")
    assert status == 0
    frames = [found.groupdict() for found in BAR.finditer(drawn)]
    under_way = [frame for frame in frames if 0 < float(frame["done"]) < 12]
    assert under_way, drawn[-2000:]
    assert {frame["total"] for frame in frames} == {"12.0"}
    done = [float(frame["done"]) for frame in frames]
    assert done == sorted(done)
    assert any(float(frame["rate"]) > 0 and frame["left"] != "0:00:00" for frame in under_way), under_way
    for phase in ("map", "transfer", "commit"):
        assert phase in drawn
    assert "12.0/12.0 MiB" in drawn


def test_quiet_draws_nothing_on_a_terminal(server: Server, volume: str, source: Path) -> None:
    assert run_on_terminal("sync", source, server.url(volume), "--bwlimit", "16M", "--quiet") == (0, "")


def test_without_a_terminal_there_are_plain_lines(server: Server, volume: str, source: Path) -> None:
    # One line with rate and time left every ten seconds: this takes twelve.
    done = run_cli("sync", source, server.url(volume), "--bwlimit", "1M", "--json")
    assert done.status == 0
    assert "\x1b" not in done.stderr
    assert "\r" not in done.stderr
    lines = done.stderr.splitlines()
    assert "transfer ..." in lines
    (found,) = [found for line in lines if (found := LINE.fullmatch(line))]
    assert 0 < float(found[1]) < 12
    assert found[2] == "12.0"
    assert float(found[3]) > 0
    assert done.report["bytes"]["data_sent"] == 12 * MIB
