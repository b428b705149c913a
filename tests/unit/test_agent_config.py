"""The configuration of an agent: what its keys mean, what must hold between them, that nothing breaks it."""

from __future__ import annotations

import contextlib
import tomllib
from pathlib import Path
from typing import Any

import pytest
from blockferry.common.agent_config import AgentConfig, AgentLimits, Hooks, Policy
from blockferry.common.config import ConfigError, kind_of, load_agent, parse, validate
from blockferry.common.retention import Retention
from blockferry.common.settings import Grant, Tls
from blockferry.common.strict import leaves, read
from blockferry.common.units import parse_window
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tables import ROOT

EXAMPLE = ROOT / "deploy/agent.toml"

MEANT = AgentConfig(
    status_page="127.0.0.1:9871",
    tls=Tls(
        cert=Path("/etc/blockferry/agent.crt"),
        key=Path("/etc/blockferry/agent.key"),
        ca=Path("/etc/blockferry/ca.crt"),
        crl=Path("/etc/blockferry/ca.crl"),
    ),
    policy={
        "db": Policy(
            source="/srv/vm/db.raw",
            destination="grpcs://dr1:9870/db",
            rpo=300,
            tracking="reflink",
            bandwidth=100 << 20,
            priority=10,
            group="erp",
            keep=Retention(last=12, hourly=24, daily=7),
            region_size=1 << 20,
            snapshot_dir=Path("/srv/vm/.blockferry"),
            hooks=Hooks(failure=("/usr/local/bin/blockferry-failed",)),
        ),
        "mail": Policy(
            source="/dev/vg/mail",
            destination="grpcs://dr1:9870/mail",
            rpo=3600,
            snapshot="command",
            tracking="digests",
            hooks=Hooks(
                freeze=("/usr/local/bin/freeze", "mail"),
                snapshot=("/usr/local/bin/snapshot", "mail"),
                thaw=("/usr/local/bin/thaw", "mail"),
                remove=("/usr/local/bin/remove", "mail"),
            ),
        ),
    },
    grant=(Grant("ops.example", "operator"),),
)

P = "[policy.p]\nsource = '/s'\ndestination = 'grpc://127.0.0.1:1/p'\nrpo = '1m'\n"
Q = P.replace("policy.p", "policy.q").replace("/p'", "/q'")
TLS = "[tls]\ncert = '/c'\nkey = '/k'\nca = '/a'\n"


def lines(text: str) -> list[str]:
    """All that is wrong with an agent's file."""
    try:
        validate("agent", parse(text.encode(), "f"), "f")
    except ConfigError as error:
        return [problem.line() for problem in error.problems]
    return []


def test_the_example_is_a_right_file() -> None:
    assert load_agent(EXAMPLE) == MEANT
    assert MEANT.limits == AgentLimits(), "the defaults, as it says"


def test_an_empty_file_is_all_defaults() -> None:
    assert validate("agent", {}, "f") == AgentConfig()
    assert AgentConfig().listen == ("grpc+unix:///run/blockferry/agent.sock",)


def test_the_kind_of_a_file_is_told_by_its_keys() -> None:
    assert kind_of(tomllib.loads(EXAMPLE.read_text())) == "agent"
    assert kind_of({"policy": {}}) == "agent"


@pytest.mark.parametrize(
    ("snapshot", "tracking", "tracks"),
    [("reflink", None, "reflink"), ("reflink", "digests", "digests"), ("command", None, "digests"),
     ("command", "reflink", "reflink"), ("none", None, "digests")],
)  # fmt: skip
def test_how_changes_are_found(snapshot: Any, tracking: str | None, tracks: str) -> None:
    assert Policy("/s", "grpc://127.0.0.1:1/p", 60, snapshot, tracking).tracks == tracks


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("polcy = 1", "polcy: is not a known key; did you mean policy?"),
        (f"{P}rp = 1", "policy.p.rp: is not a known key; did you mean policy.p.rpo?"),
        ("[policy.p]\nsource = '/s'\nrpo = '1m'", "policy.p.destination: is missing"),
        ("[policy.'../x']\nsource = '/s'\ndestination = 'grpc://127.0.0.1:1/p'\nrpo = '1m'",
         "policy.\"../x\": '../x' is not a volume name"),
        (P.replace("'/s'", "'s'"), "policy.p.source: 's' is not an absolute path; write it from / on"),
        (P.replace("'/s'", "'nbd:///x'"), "policy.p.source: "),
        (P.replace("'/s'", "'file://host/x'"), "policy.p.source: 'file://host/x' is not a usable file URI"),
        (P.replace("1/p", "1"), "policy.p.destination: "),
        (P.replace("1/p", "1/p@3"), "policy.p.destination: 'grpc://127.0.0.1:1/p@3' is a committed generation"),
        (P.replace("'1m'", "'0s'"), "policy.p.rpo: '0s' is out of range; write 1s to 30d"),
        (f"{P}snapshot = 'lvm'", 'policy.p.snapshot: must be "reflink" or "command" or "none", not "lvm"'),
        (f"{P}tracking = 'dirty-bitmap'", "policy.p.tracking: dirty bitmaps of QEMU are not supported yet; write"),
        (f"{P}tracking = 'x'", "policy.p.tracking: 'x' is not a way to track changes; write"),
        (f"{P}window = '9-17'", "policy.p.window: '9-17' is not a window of the day; write HH:MM-HH:MM"),
        (f"{P}priority = -1", "policy.p.priority: must be a whole number from 0 to 1000, not -1"),
        (f"{P}region_size = '3M'", "policy.p.region_size: "),
        (f"{P}clone_limit = '0.05s'", "policy.p.clone_limit: '0.05s' is out of range; write 0.1s to 24h"),
        (f"{P}hooks.failure = 'x'", "policy.p.hooks.failure: must be an array, not text"),
        (f'{P}hooks.failure = ["a\\u0000b"]', "policy.p.hooks.failure[0]: no program takes a NUL in an argument"),
        (f"{P}[limits]\ntransfers = 0", "limits.transfers: must be a whole number from 1 to 1000, not 0"),
        ("status_page = 'localhost'", "status_page: 'localhost' is not HOST:PORT"),
        ("status_page = '0.0.0.0:1'", "status_page: it has no TLS, and other machines could read"),
        ("listen = ['grpc://0.0.0.0:1']", "listen[0]: without TLS anybody on the way could"),
        ("listen = []", "listen: a server that listens nowhere serves nobody"),
        ("[[grant]]\nsan = 'x'\nrole = 'viewer'", "grant: without TLS nobody can be told apart"),
        (P.replace("grpc:", "grpcs:"), "policy.p.destination: TLS needs a certificate; add a section [tls]"),
        (P.replace("127.0.0.1", "dr1"), "policy.p.destination: without TLS anybody on the way could"),
        (f"{P}hooks.freeze = ['x']", 'policy.p.hooks.freeze: is for snapshot = "command" only'),
        (f"{P}snapshot = 'command'", 'policy.p.hooks.snapshot: is missing; snapshot = "command" needs'),
        (f"{P}snapshot = 'command'\nhooks.snapshot = ['x']\nhooks.freeze = ['x']",
         "policy.p.hooks.thaw: is missing; whatever is frozen must be thawed"),
        (P.replace("'/s'", "'nbd://h/x'"), "policy.p.snapshot: only files can be cloned"),
        (f"{P}snapshot = 'none'\ntracking = 'reflink'", "policy.p.tracking: without snapshots nothing tells"),
        (P + Q.replace("/q'", "/p'"), "policy.q.destination: is the destination of p too; give each policy"),
        (f"{P}group = 'g'\n{Q.replace(':1/', ':2/')}group = 'g'", "policy.q.destination: is at another server than"),
        (f"{P}group = 'g'\n{Q}group = 'g'\nsnapshot = 'none'", "policy.q.snapshot: is another method than that of p"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_path(text: str, line: str) -> None:
    (found,) = lines(text)
    assert found.startswith(line)


@pytest.mark.parametrize(
    "text",
    [
        P + Q,
        f"{P}group = 'g'\n{Q}group = 'g'",
        f"{P}group = 'g'\n{Q.replace(':1/', ':2/')}group = 'h'",
        f"{P.replace('grpc:', 'grpcs:')}{TLS}",
        f"insecure = true\nstatus_page = '0.0.0.0:1'\n{P.replace('127.0.0.1', 'dr1')}",
        f"{P}snapshot = 'command'\nhooks.snapshot = ['x']\nhooks.freeze = ['x']\nhooks.thaw = ['y']",
        f"{P.replace(chr(39) + '/s' + chr(39), chr(39) + 'nbd://h/x' + chr(39))}snapshot = 'none'",
        f"{P}hooks.failure = ['x', '']",
        "status_page = '[::1]:0'",
    ],
    ids=range(9),
)
def test_what_is_right(text: str) -> None:
    assert lines(text) == []


def test_everything_wrong_is_said_at_once_and_each_mistake_once() -> None:
    # Of a policy that has a mistake inside nothing is said that may follow from it.
    wrong = "snapshot = 'x'\nhooks.snapshot = ['x']\nwindow = ''\n"
    text = f"polcy = 1\n{P}{wrong}{Q}snapshot = 'none'\ntracking = 'reflink'"
    assert [line.split(":")[0] for line in lines(text)] == [
        "polcy",
        "policy.p.snapshot",
        "policy.p.window",
        "policy.q.tracking",
    ]


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("00:00-24:00", (0, 1440)), ("22:00-06:00", (1320, 360)), ("09:30-09:31", (570, 571)), ("23:59-00:00", (1439, 0))],
)
def test_windows(text: str, minutes: tuple[int, int]) -> None:
    assert parse_window(text) == minutes


WRONG_WINDOWS = ["", "-", "24:00-06:00", "06:00-06:00", "00:00-24:01", "00:60-01:00", "0:00-1:00", "00:00 - 01:00"]


@pytest.mark.parametrize("text", WRONG_WINDOWS)
def test_what_is_no_window(text: str) -> None:
    assert lines(f"{P}window = '{text}'")[0].startswith(f"policy.p.window: {text!r} is not a window of the day")


_values: st.SearchStrategy[Any] = st.recursive(
    st.booleans() | st.integers() | st.text(max_size=6) | st.sampled_from(["1G", "60s", "/p", "reflink", "command"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["p", "q", *Policy.__struct_fields__, *Hooks.__struct_fields__]), inner)
    ),
    max_leaves=10,
)


def loads_or_refuses(document: dict[str, Any]) -> None:
    """Nothing but a configuration or the loader's own error comes out."""
    with contextlib.suppress(ConfigError):
        assert isinstance(validate("agent", document, "f"), AgentConfig)


@settings(max_examples=30)
@given(st.dictionaries(st.sampled_from(AgentConfig.__struct_fields__), _values, max_size=4))
def test_no_document_breaks_the_loader(found: dict[str, Any]) -> None:
    loads_or_refuses(found)


SOUND = {"source": "/s", "destination": "grpc://127.0.0.1:1/p", "rpo": "1m"}


@settings(max_examples=40)
@given(st.dictionaries(st.sampled_from(Policy.__struct_fields__), _values, max_size=6))
def test_no_policy_breaks_the_loader(found: dict[str, Any]) -> None:
    loads_or_refuses({"policy": {"p": {**SOUND, **found}, "q": {**found, **SOUND}}})


def test_the_example_has_every_key() -> None:
    present = set(_paths(tomllib.loads(EXAMPLE.read_text())))
    rules = {f"policy.NAME.keep.{rule}" for rule in ("weekly", "monthly", "yearly")}
    assert present == set(leaves(AgentConfig)) - rules


def _paths(found: dict[str, Any], prefix: str = "") -> list[str]:
    paths: list[str] = []
    for name, one in found.items():
        if isinstance(one, list) and isinstance(one[0], dict):
            paths += _paths(one[0], f"{prefix}{name}[].")
        elif isinstance(one, dict):
            paths += _paths(one, f"{prefix}{'NAME' if prefix == 'policy.' else name}.")
        else:
            paths.append(f"{prefix}{name}")
    return paths


def test_reading_is_strict_everywhere() -> None:
    problems = read(AgentConfig, {"policy": {"p": {**SOUND, "hooks": {"x": 1}, "keep": {"y": 1}}}})[1]
    assert [problem.path for problem in problems] == ["policy.p.keep.y", "policy.p.hooks.x"]
