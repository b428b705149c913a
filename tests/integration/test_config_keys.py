"""Every key of a server's configuration does something: with it a server that is looked at from outside is another one
than without it. A key that is missing from the table below fails the test."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import secrets
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc
import pytest
from blockferry.common.agent_config import AgentConfig
from blockferry.common.config import ServerConfig
from blockferry.common.strict import leaves
from blockferry.v1 import replicas_pb2 as replicas
from blockferry.v1 import replication_pb2 as pb
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2

from tests.configured import Configured, Settings, document
from tests.images import MIB, build, noise
from tests.pages import free_port, scraped
from tests.reflected import Refusal, _refusal
from tests.support import PROGRAMS, Server, ok, own_directory, run_cli, until
from tests.tables import ROOT

M = TypeVar("M", bound=Message)

SECONDS = 30
_numbers = itertools.count(1)


# --- what is looked at ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def channels(server: Server, count: int = 1) -> Iterator[list[grpc.Channel]]:
    """So many connections."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    made = [grpc.insecure_channel(server.address.removeprefix("grpc://"), options) for _ in range(count)]
    try:
        yield made
    finally:
        for channel in made:
            channel.close()


def call(channel: grpc.Channel, method: str, request: Message, response: type[M]) -> M:
    """One call of ours."""
    multi: Any = channel.unary_unary(
        f"/blockferry.v1.{method}",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=response.FromString,
    )
    found: M = multi(request, timeout=SECONDS)
    return found


def open_session(channel: grpc.Channel, volume: str) -> pb.OpenSessionResponse:
    request = pb.OpenSessionRequest(protocol_version=1, volume=volume, size=MIB)
    return call(channel, "Replication/OpenSession", request, pb.OpenSessionResponse)


def committed(channel: grpc.Channel) -> str:
    """The name of a replica that only the server's floor keeps points of."""
    name = f"committed-{next(_numbers)}"
    request = pb.CommitSessionsRequest()
    session = open_session(channel, name).session
    request.commits.add(session=session, volume=name, commit_id=secrets.token_bytes(16), keep=pb.Retention())
    call(channel, "Replication/CommitSessions", request, pb.CommitSessionsResponse)
    return name


def opened(field: str) -> Callable[[Server], object]:
    """A field of the answer to OpenSession."""

    def look(server: Server) -> object:
        with channels(server) as (channel,):
            return getattr(open_session(channel, f"opened-{next(_numbers)}"), field)

    return look


def sessions(server: Server) -> object:
    """How many sessions a client may have, up to 3."""
    with channels(server) as (channel,):
        for count in range(3):
            try:
                open_session(channel, f"session-{next(_numbers)}")
            except grpc.RpcError as error:
                return limited(error, count)
    return 3


def limited(error: grpc.RpcError, count: int) -> int:
    found: Refusal = _refusal(error)
    assert (found.status, found.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "LIMITED")
    assert "127.0.0.1 has" in found.message or "all clients together have" in found.message
    return count


def watching(server: Server, connections: int, calls: int) -> int:
    """How many calls may be in progress at once, of `calls` on each of so many connections."""
    begun: list[Any] = []
    with channels(server, connections) as made:
        try:
            for channel in made:
                watch = channel.unary_stream(
                    "/grpc.health.v1.Health/Watch",
                    request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
                    response_deserializer=health_pb2.HealthCheckResponse.FromString,
                )
                for _ in range(calls):
                    begun.append(watch(health_pb2.HealthCheckRequest(), timeout=SECONDS))
                    next(begun[-1])
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                # A connection that was not accepted.
                return len(begun) - 1
            return limited(error, len(begun) - 1)
        finally:
            for call in begun:
                call.cancel()
    return len(begun)


def calls(server: Server) -> object:
    return watching(server, 1, 4)


def connections(server: Server) -> object:
    return watching(server, 4, 1)


def slowed(server: Server) -> object:
    """Whether a client is slowed down that makes a few calls, and named."""
    with channels(server) as (channel,):
        check: Any = channel.unary_unary("/grpc.health.v1.Health/Check", response_deserializer=None)
        for _ in range(4):
            check(b"", timeout=SECONDS)
    lines = [json.loads(line) for line in server.log.read_text().splitlines() if "slowed down" in line]
    assert all(line["client"] == "127.0.0.1" and line["level"] == "warning" for line in lines)
    return bool(lines)


def takes_messages(server: Server) -> object:
    """Whether a message of 6 MiB is too large."""
    with channels(server) as (channel,):
        check: Any = channel.unary_unary("/grpc.health.v1.Health/Check", response_deserializer=None)
        try:
            # A field that nobody knows.
            check(b"\x7a" + b"\x80\x80\x80\x03" + bytes(6 * MIB), timeout=SECONDS)
        except grpc.RpcError as error:
            return error.code().name
    return "OK"


def pool(field: str) -> Callable[[Server], object]:
    """What the server says of its pool."""

    def look(server: Server) -> object:
        with channels(server) as (channel,):
            found = call(channel, "Replicas/ListPools", replicas.ListPoolsRequest(), replicas.ListPoolsResponse)
            return getattr(found.pools[0], field)

    return look


def reserved(server: Server) -> object:
    """The reserve, which is by default a share of the file system."""
    found, total = pool("reserve")(server), pool("total")(server)
    assert isinstance(total, int)
    return "a share" if found == total // 20 else found


def kept_by(rule: str) -> Callable[[Server], object]:
    """Whether a rule keeps the newest point."""

    def look(server: Server) -> object:
        with channels(server) as (channel,):
            request = replicas.ListRecoveryPointsRequest(volume=committed(channel))
            found = call(channel, "Replicas/ListRecoveryPoints", request, replicas.ListRecoveryPointsResponse)
            return rule in found.points[0].kept_by

    return look


def scrubbed(server: Server) -> object:
    """Whether a replica is scrubbed though nobody asks for it."""
    with channels(server) as (channel,):
        request = replicas.GetReplicaRequest(volume=committed(channel))

        def found() -> bool:
            shown = call(channel, "Replicas/GetReplica", request, replicas.GetReplicaResponse)
            return shown.replica.HasField("scrub")

        if isinstance(server, Configured) and "scrub_every" in server.file.read_text():
            until(found, "it is scrubbed")
        return found()


def long_journal(server: Server) -> object:
    """What becomes of an update of 2 MiB."""
    name = f"updated-{next(_numbers)}"
    source = server.pool.with_name(f"{name}.raw")
    server.sync(build(source, 4 * MIB, [(0, noise(1, 2 * MIB))]), name)
    build(source, 4 * MIB, [(0, noise(2, 2 * MIB))])
    done = run_cli("sync", source, server.url(name), "--json", "--quiet")
    return done.report["error"]["code"] if done.status else done.report["outcome"]


# --- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Key:
    """A value of a key, what is looked at, and what that is with it and without it."""

    value: str
    look: Callable[[Server], object]
    expected: object
    otherwise: object
    also: Settings | None = None
    """Other keys that hold in both cases."""


PAGE_PORT = free_port()


def has_page(_: Server) -> object:
    """Whether there is a status page, and whose it is."""
    try:
        return any(name.startswith("blockferry_pool_") for name in scraped(f"http://127.0.0.1:{PAGE_PORT}/metrics"))
    except OSError:
        return False


KEYS: dict[str, Key] = {
    "status_page": Key(f'"127.0.0.1:{PAGE_PORT}"', has_page, True, False),
    "scrub_every": Key('"1s"', scrubbed, True, False),
    "pool.NAME.reserve": Key('"5M"', reserved, 5 * MIB, "a share"),
    "pool.NAME.quota": Key('"7M"', pool("quota"), 7 * MIB, 0),
    "pool.NAME.journal_limit": Key('"1M"', long_journal, "out-of-space", "committed"),
    "pool.NAME.keep_at_least.last": Key("1", kept_by("last"), True, False, {"pool.main.keep_at_least.daily": "1"}),
    **{
        f"pool.NAME.keep_at_least.{rule}": Key("1", kept_by(rule), True, False)
        for rule in ("hourly", "daily", "weekly", "monthly", "yearly")
    },
    "limits.lease": Key('"7.5s"', opened("lease_ms"), 7500, 60_000),
    "limits.message_size": Key('"5M"', takes_messages, "RESOURCE_EXHAUSTED", "OK"),
    "limits.sessions": Key("2", sessions, 2, 3),
    "limits.calls": Key("2", calls, 2, 4),
    "limits.connections": Key("2", connections, 2, 4),
    "limits.calls_per_second": Key("2", slowed, True, False),
    "limits.bytes_in_flight": Key('"2M"', opened("bytes_in_flight"), 2 * MIB, 64 * MIB),
    "limits.per_client.sessions": Key("2", sessions, 2, 3),
    "limits.per_client.calls": Key("2", calls, 2, 4),
    "limits.per_client.connections": Key("2", connections, 2, 4),
    "limits.per_client.calls_per_second": Key("2", slowed, True, False),
    "limits.per_client.bytes_in_flight": Key('"3M"', opened("bytes_in_flight"), 3 * MIB, 64 * MIB),
}

ELSEWHERE = {"listen", "insecure", "pool.NAME.path"} | {
    path for path in leaves(ServerConfig) if path.startswith(("tls.", "grant[].", "device."))
}
"""Keys with tests of their own: they decide whether there is a server to look at, where (below), for whom
(test_access.py), or are those of devices (test_config_devices.py)."""


def test_every_key_is_in_the_table() -> None:
    assert sorted(KEYS.keys() | ELSEWHERE) == sorted(leaves(ServerConfig))


@pytest.fixture(scope="module")
def root(ext4_pool_root: Path) -> Path:
    """Where pools are that keep journals."""
    return own_directory(ext4_pool_root, "configured")


@contextlib.contextmanager
def configured(root: Path, settings: Settings) -> Iterator[Server]:
    directory = root / f"pool-{next(_numbers)}"
    directory.mkdir()
    server = Configured(directory, settings).start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def plain(root: Path) -> Iterator[Server]:
    """A server with the defaults."""
    with configured(root, {}) as server:
        yield server


@pytest.mark.parametrize("path", KEYS)
def test_a_key_makes_a_difference(path: str, root: Path, plain: Server) -> None:
    key = KEYS[path]
    with contextlib.ExitStack() as stack:
        without = stack.enter_context(configured(root, key.also)) if key.also else plain
        assert key.look(without) == key.otherwise != key.expected
        changed = stack.enter_context(configured(root, {**(key.also or {}), path.replace("NAME", "main"): key.value}))
        assert key.look(changed) == key.expected


def start(settings: Settings, file: Path) -> subprocess.Popen[str]:
    file.write_text(document(settings))
    words = [str(PROGRAMS / "blockferry-server"), "--config", str(file)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_addresses_and_directories_are_those_of_the_file(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    sockets = [f"grpc+unix://{tmp_path}/{name}.sock" for name in ("one", "two")]
    settings = {
        "listen": json.dumps(sockets),
        "pool.b.path": f'"{tmp_path}/second"',
        "pool.a.path": f'"{tmp_path}/first"',
    }
    with start(settings, tmp_path / "server.toml") as process:
        assert process.stdout is not None
        try:
            assert [process.stdout.readline() for _ in sockets] == [f"listening on {one}\n" for one in sockets]
            for address in sockets:
                pools = ok("pool", "list", address)["pools"]
                assert [(pool["name"], pool["path"]) for pool in pools] == [
                    ("b", f"{tmp_path}/second"), ("a", f"{tmp_path}/first"),
                ], "in the order of the file: new replicas go to the first"  # fmt: skip
        finally:
            process.terminate()


@pytest.mark.parametrize("insecure", ["true", "false"])
def test_plaintext_for_other_machines_is_insecure(tmp_path: Path, insecure: str) -> None:
    settings = {"listen": '["grpc://0.0.0.0:0"]', "insecure": insecure, "pool.main.path": f'"{tmp_path}"'}
    with start(settings, tmp_path / "server.toml") as process:
        assert process.stdout is not None and process.stderr is not None
        if insecure == "true":
            assert process.stdout.readline().startswith("listening on grpc://0.0.0.0:")
            process.terminate()
        else:
            assert process.stdout.readline() == ""
            (line,) = process.stderr.read().splitlines()
            assert "listen[0]: without TLS anybody on the way could" in line
    assert process.returncode == (0 if insecure == "true" else 1)


# --- the agent --------------------------------------------------------------------------------------------------------

_AGENT = "integration/test_agent.py"
_CYCLE = "integration/test_cycle.py"
_HOOKS = "integration/test_snapshot_hooks.py"
_SCHEDULE = "unit/test_schedule.py"
_TLS = f"{_AGENT} test_over_tls_grants_decide"

AGENT_KEYS: dict[str, str] = {
    "state_dir": f"{_AGENT} test_two_agents_on_one_state_directory",
    "listen": _TLS,
    "status_page": f"{_AGENT} test_only_what_changed_is_looked_at_and_counted",
    "insecure": "unit/test_agent_config.py test_what_is_right",
    **dict.fromkeys(("tls.cert", "tls.key", "tls.ca", "tls.crl"), _TLS),
    **dict.fromkeys(("grant[].san", "grant[].role", "grant[].volumes"), _TLS),
    "limits.transfers": f"{_SCHEDULE} test_no_more_than_the_transfers_and_the_most_urgent_first",
    "limits.bytes_in_flight": "unit/test_agent.py test_no_more_memory_than_there_may_be",
    "limits.bandwidth": f"{_CYCLE} test_bandwidth_is_shared_and_can_be_changed_while_it_runs",
    "policy.NAME.source": f"{_AGENT} test_policies_are_kept_within_their_rpo_whatever_becomes_of_others",
    "policy.NAME.destination": f"{_AGENT} test_policies_are_kept_within_their_rpo_whatever_becomes_of_others",
    "policy.NAME.rpo": f"{_SCHEDULE} test_from_start_to_start",
    "policy.NAME.snapshot": f"{_HOOKS} test_hooks_run_in_order_and_the_snapshot_is_removed",
    "policy.NAME.tracking": f"{_HOOKS} test_snapshots_of_hooks_are_tracked_where_they_are_clones",
    "policy.NAME.bandwidth": f"{_AGENT} test_sighup_while_something_is_on_its_way",
    "policy.NAME.window": f"{_SCHEDULE} test_who_is_outside_of_a_window_waits_for_it",
    "policy.NAME.priority": f"{_SCHEDULE} test_no_more_than_the_transfers_and_the_most_urgent_first",
    "policy.NAME.group": f"{_CYCLE} test_a_group_is_committed_together",
    **{
        f"policy.NAME.keep.{rule}": f"{_AGENT} test_retention_and_regions_are_those_of_the_policy"
        for rule in ("last", "hourly", "daily", "weekly", "monthly", "yearly")
    },
    "policy.NAME.region_size": f"{_AGENT} test_retention_and_regions_are_those_of_the_policy",
    "policy.NAME.snapshot_dir": f"{_AGENT} test_retention_and_regions_are_those_of_the_policy",
    "policy.NAME.snapshot_floor": f"{_HOOKS} test_below_the_floor_no_snapshot_is_taken",
    "policy.NAME.clone_limit": f"{_CYCLE} test_a_clone_that_takes_too_long_is_given_up",
    "policy.NAME.stall_timeout": f"{_CYCLE} test_what_makes_no_progress_is_ended",
    "policy.NAME.hook_timeout": f"{_HOOKS} test_a_hook_that_hangs_is_killed_with_all_that_it_started",
    **{
        f"policy.NAME.hooks.{hook}": f"{_HOOKS} test_hooks_run_in_order_and_the_snapshot_is_removed"
        for hook in ("freeze", "snapshot", "thaw", "remove")
    },
    "policy.NAME.hooks.failure": f"{_AGENT} test_policies_are_kept_within_their_rpo_whatever_becomes_of_others",
}
"""Keys of an agent, each with the test that shows what difference it makes: what they do takes a replication to see."""


def test_every_key_of_an_agent_has_its_test() -> None:
    assert sorted(AGENT_KEYS) == sorted(leaves(AgentConfig))
    for path, place in AGENT_KEYS.items():
        file, name = place.split()
        assert re.search(rf"^(async )?def {name}\(", (ROOT / "tests" / file).read_text(), re.MULTILINE), (path, place)
