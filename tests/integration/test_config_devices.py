"""Every key of a device's section does something: a server with it is looked at from outside, and one without it."""

from __future__ import annotations

import contextlib
import itertools
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
from blockferry.common.config import ServerConfig
from blockferry.common.strict import leaves
from blockferry.v1 import replicas_pb2 as replicas
from blockferry.v1 import replication_pb2 as pb

from tests.configured import Configured, Settings
from tests.filesystems import Unavailable
from tests.images import MIB, build, noise
from tests.integration.test_config_keys import call, channels, open_session
from tests.processes import loop_device
from tests.support import Server, run_cli

SIZE = 4 * MIB
RULES = ("last", "hourly", "daily", "weekly", "monthly", "yearly")
_numbers = itertools.count(1)


@pytest.fixture
def device(tmp_path: Path) -> Iterator[str]:
    with (tmp_path / "disk").open("wb") as file:
        file.truncate(SIZE)
    try:
        with loop_device(tmp_path / "disk") as device:
            yield device
    except Unavailable as error:
        pytest.skip(str(error))


@contextlib.contextmanager
def configured(tmp_path: Path, device: str, settings: Settings) -> Iterator[Server]:
    """A server with a pool and the device `db`, whose journal is in `journal`."""
    pool = tmp_path / f"pool-{next(_numbers)}"
    base = {"device.db.path": f'"{device}"', "device.db.journal": f'"{tmp_path}/journal"'}
    for directory in (pool, tmp_path / "journal"):
        directory.mkdir(exist_ok=True)
    server = Configured(pool, {**base, **settings}).start()
    try:
        yield server
    finally:
        server.stop()


def update(server: Server, source: Path) -> object:
    """What becomes of an update of 2 MiB."""
    server.sync(build(source, SIZE, [(0, noise(1, 2 * MIB))]), "db")
    build(source, SIZE, [(0, noise(2, 2 * MIB))])
    done = run_cli("sync", source, server.url("db"), "--json", "--quiet")
    return done.report["error"]["code"] if done.status else done.report["outcome"]


def kept_by(server: Server, rule: str) -> bool:
    """Whether a rule keeps a point of which its source says nothing."""
    with channels(server) as (channel,):
        session = open_session(channel, "db").session
        commit = pb.CommitSessionsRequest()
        commit.commits.add(session=session, volume="db", commit_id=secrets.token_bytes(16), keep=pb.Retention())
        call(channel, "Replication/CommitSessions", commit, pb.CommitSessionsResponse)
        request = replicas.ListRecoveryPointsRequest(volume="db")
        found = call(channel, "Replicas/ListRecoveryPoints", request, replicas.ListRecoveryPointsResponse)
        return rule in found.points[0].kept_by


def test_the_device_and_the_journal_are_those_of_the_file(tmp_path: Path, device: str) -> None:
    source = build(tmp_path / "source", SIZE, [(0, noise(1, SIZE))])
    with configured(tmp_path, device, {}) as server:
        server.sync(source, "db")
        assert Path(device).read_bytes() == source.read_bytes()
        assert server.show("db")["path"] == device
        assert (tmp_path / "journal/db/commits.log").exists()
        assert not list(server.pool.glob("db"))


@pytest.mark.parametrize(
    ("limit", "outcome"), [({}, "committed"), ({"device.db.journal_limit": '"1M"'}, "out-of-space")]
)
def test_the_limit_is_that_of_a_session(tmp_path: Path, device: str, limit: Settings, outcome: str) -> None:
    with configured(tmp_path, device, limit) as server:
        assert update(server, tmp_path / "source") == outcome


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_keeps_points(tmp_path: Path, device: str, rule: str) -> None:
    other = "daily" if rule == "last" else "last"
    assert _kept(tmp_path, device, f"device.db.keep_at_least.{rule}", rule)
    assert not _kept(tmp_path, device, f"device.db.keep_at_least.{other}", rule)


def _kept(tmp_path: Path, device: str, key: str, rule: str) -> bool:
    with configured(tmp_path, device, {key: "1"}) as server:
        try:
            return kept_by(server, rule)
        finally:
            assert run_cli("replica", "delete", server.url("db"), "--yes").status == 0


def test_every_key_of_a_device_is_looked_at() -> None:
    keys = {"path", "journal", "journal_limit", *(f"keep_at_least.{rule}" for rule in RULES)}
    assert {path for path in leaves(ServerConfig) if "device." in path} == {f"device.NAME.{key}" for key in keys}
