"""docs/configuration.md, deploy/server.toml and deploy/agent.toml say of every key what the schemas say."""

from __future__ import annotations

import re
import tomllib
from typing import Any

import pytest
from blockferry.common.agent_config import AgentConfig, Policy
from blockferry.common.config import LimitsConfig, ServerConfig, load_server
from blockferry.common.strict import leaves, read
from blockferry.common.units import parse_duration, parse_seconds, parse_size

from tests.tables import ROOT, code, document, table

TEXT = document("docs/configuration.md")
TABLES = [
    table(TEXT, heading) for heading in ("## Server", "## TLS", "## Pools", "## Devices", "## Limits", "## Grants")
]
DEFAULTS = {code(row): one.cells[row, "default"] for one in TABLES for row in one.rows}
RANGES = {code(row): one.cells[row, "range"] for one in TABLES for row in one.rows}
EXAMPLE = ROOT / "deploy/server.toml"

KEYS = leaves(ServerConfig)


def test_every_key_is_described_and_no_other() -> None:
    assert list(DEFAULTS) == list(KEYS)


def value(path: str) -> object:
    """What a file without this key means by it."""
    found: Any = ServerConfig()
    for name in path.split("."):
        found = getattr(found, name)
    return list(found) if isinstance(found, tuple) else found


BELOW_NAMES = ("pool.", "device.", "tls.", "grant[].")


@pytest.mark.parametrize("path", [path for path in leaves(ServerConfig) if not path.startswith(BELOW_NAMES)])
def test_the_default_is_the_one_of_the_code(path: str) -> None:
    if DEFAULTS[path] == "none":
        assert value(path) is None
        return
    written = tomllib.loads(f"x = {code(DEFAULTS[path])}")["x"]
    if isinstance(written, str):
        written = parse_seconds(written) if path == "limits.lease" else parse_size(written)
    assert written == value(path)


@pytest.mark.parametrize("path", [path for path in KEYS if re.fullmatch(r"[\d.]+\w? to [\d.]+\w?", RANGES[path])])
def test_the_range_is_the_one_of_the_code(path: str) -> None:
    """The ends of the range are taken, and nothing beyond them."""
    least, most = RANGES[path].split(" to ")
    beyond = {"s": "0.09s", "h": "25h", "M": "1023K", "T": "1025G"}
    whole = most.isdigit()
    inside = [int(least), int(most)] if whole else [least, most]
    outside = (
        [int(least) - 1, int(most) + 1] if whole else [beyond[least[-1]], "65M" if most == "64M" else beyond[most[-1]]]
    )
    for values, right in ((inside, True), (outside, False)):
        for one in values:
            assert accepted(path, one) == right, one


def accepted(path: str, one: object) -> bool:
    settings: Any = one
    for name in reversed(path.replace("NAME", "main").split(".")):
        settings = {name: settings}
    for pool in settings.get("pool", {}).values():
        pool["path"] = "/srv"
    for device in settings.get("device", {}).values():
        device.update(path="/dev/sdb", journal="/srv")
    found = read(ServerConfig, settings)[1]
    assert [problem.path for problem in found] in ([], [path.replace("NAME", "main")])
    return not found


def test_the_example_is_a_right_file_with_every_key() -> None:
    config = load_server(EXAMPLE)
    present = {re.sub(r"^(pool|device)\.\w+", r"\1.NAME", path) for path in _paths(tomllib.loads(EXAMPLE.read_text()))}
    # Of the rules of retention an example has some.
    assert present == {path for path in KEYS if not re.search(r"(hourly|weekly|monthly|yearly)$", path)}
    assert config.limits == LimitsConfig(), "the defaults, as it says"


def _paths(found: dict[str, Any], prefix: str = "") -> list[str]:
    paths: list[str] = []
    for name, one in found.items():
        if isinstance(one, list) and isinstance(one[0], dict):
            paths += _paths(one[0], f"{prefix}{name}[].")
        else:
            paths += _paths(one, f"{prefix}{name}.") if isinstance(one, dict) else [f"{prefix}{name}"]
    return paths


# --- the agent --------------------------------------------------------------------------------------------------------

AGENT_TABLES = [table(TEXT, heading) for heading in ("## Agent", "## Agent limits", "## Policies")]
AGENT_DEFAULTS = {code(row): one.cells[row, "default"] for one in AGENT_TABLES for row in one.rows}
AGENT_RANGES = {code(row): one.cells[row, "range"] for one in AGENT_TABLES for row in one.rows}
AGENT_KEYS = leaves(AgentConfig)
SHARED = ("tls.", "grant[].")
"""Described once, for both kinds of file."""

POLICY = Policy("/s", "grpc://127.0.0.1:1/p", 60)


def test_every_key_of_an_agent_is_described_and_no_other() -> None:
    assert sorted(AGENT_DEFAULTS) == sorted(path for path in AGENT_KEYS if not path.startswith(SHARED))
    assert {path for path in AGENT_KEYS if path.startswith(SHARED)} == {
        path for path in KEYS if path.startswith(SHARED)
    }


def agent_value(path: str) -> object:
    """What a file without this key means by it."""
    found: Any = POLICY if path.startswith("policy.NAME.") else AgentConfig()
    for name in path.removeprefix("policy.NAME.").split("."):
        found = getattr(found, name)
    return list(found) if isinstance(found, tuple) else str(found) if path == "state_dir" else found


WRITTEN = [path for path, default in AGENT_DEFAULTS.items() if default.startswith("`") and default.endswith("`")]


@pytest.mark.parametrize("path", [path for path in WRITTEN if not path.startswith("policy.NAME.keep.")])
def test_the_default_of_an_agent_is_the_one_of_the_code(path: str) -> None:
    written = tomllib.loads(f"x = {code(AGENT_DEFAULTS[path])}")["x"]
    if isinstance(written, str) and re.fullmatch(r"\d+[KMGT]", written):
        written = parse_size(written)
    elif isinstance(written, str) and re.fullmatch(r"\d+[smhd]", written):
        written = parse_duration(written)
    assert written == agent_value(path)


@pytest.mark.parametrize("path", [path for path, said in AGENT_RANGES.items() if re.match(r"[\d.]+\w? to ", said)])
def test_the_range_of_an_agent_is_the_one_of_the_code(path: str) -> None:
    """The ends of the range are taken, and nothing beyond them."""
    least, most = AGENT_RANGES[path].split(" to ")
    whole = most.isdigit()
    beyond = {"0.1s": "0.09s", "1s": "0s", "24h": "25h", "30d": "31d", "1M": "1023K", "1T": "1025G"}
    inside = [int(least), int(most)] if whole else [least, most]
    outside = [int(least) - 1, int(most) + 1] if whole else [beyond[least], beyond[most]]
    for values, right in ((inside, True), (outside, False)):
        for one in values:
            settings: Any = one
            for name in reversed(path.replace("NAME", "p").split(".")):
                settings = {name: settings}
            for policy in settings.get("policy", {}).values():
                for key, needed in {"source": "/s", "destination": POLICY.destination, "rpo": "1m"}.items():
                    policy.setdefault(key, needed)
            found = [problem.path for problem in read(AgentConfig, settings)[1]]
            assert found == ([] if right else [path.replace("NAME", "p")]), one
