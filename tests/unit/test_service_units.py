"""The units for systemd start programs that exist, with files that are documented, and give them time to end."""

from __future__ import annotations

import tomllib
from configparser import RawConfigParser

import pytest
from blockferry.client import agent_main
from blockferry.client.cli.main import build_parser
from blockferry.server import main as server_main

from tests.tables import ROOT

PROGRAMS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


@pytest.mark.parametrize("name", ["agent", "server"])
def test_what_is_started(name: str) -> None:
    unit = RawConfigParser(strict=False, allow_no_value=True)
    unit.read_string((ROOT / f"deploy/blockferry-{name}.service").read_text())
    service = unit["Service"]
    program, *words = service["ExecStart"].split()
    assert program.rpartition("/")[2] == f"blockferry-{name}" in PROGRAMS
    assert words == ["--config", f"/etc/blockferry/{name}.toml"]
    check = service["ExecStartPre"].split()
    assert check[0].rpartition("/")[2] in PROGRAMS
    assert build_parser().parse_args(check[1:]).command == "config"
    assert service["NoNewPrivileges"] == "yes"
    # Only what is implemented: the server does not tell that it is ready.
    assert service["Type"] == {"agent": "notify", "server": "exec"}[name]
    needed = {
        "agent": agent_main.DRAIN_SECONDS + agent_main.CANCEL_SECONDS + agent_main.CLOSE_SECONDS,
        "server": server_main.SHUTDOWN_SECONDS,
    }[name]
    assert float(service["TimeoutStopSec"].removesuffix("s")) > needed
    assert unit["Install"]["WantedBy"] == "multi-user.target"
