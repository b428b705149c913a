"""One client that takes all it can get is cut off and named in the log, while another one works as ever."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from tests.configured import Configured, Settings
from tests.images import MIB, build, noise
from tests.reflected import Reflected, open_session
from tests.support import Server, ok, refused, refused_json, run_cli, until

SECONDS = 60


@contextlib.contextmanager
def serving(directory: Path, settings: Settings) -> Iterator[tuple[Server, str]]:
    """A server on TCP and on a UNIX socket, so that there are two clients on one machine; and the socket's address."""
    (directory / "pool").mkdir()
    local = f"grpc+unix://{directory}/server.sock"
    server = Configured(directory / "pool", {"listen": f'["grpc://127.0.0.1:0", "{local}"]', **settings}).start()
    try:
        yield server, local
    finally:
        server.stop()


def warnings(server: Server, what: str) -> list[dict[str, Any]]:
    """Lines of the log about clients that were refused or slowed down."""
    lines = [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]
    return [line for line in lines if line["event"] == f"client {what}"]


class Flood:
    """Streams without end, and calls that ask again as soon as they are answered, over several connections."""

    def __init__(self, target: str, connections: int, threads: int) -> None:
        options = [("grpc.use_local_subchannel_pool", 1)]
        self._channels = [grpc.insecure_channel(target, options) for _ in range(connections)]
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(threads)]
        self.answers: list[str] = []

    def __enter__(self) -> Flood:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for channel in self._channels:
            channel.close()
        for thread in self._threads:
            thread.join(SECONDS)

    def _run(self, number: int) -> None:
        watch = self._channels[number % len(self._channels)].unary_stream(
            "/grpc.health.v1.Health/Watch",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        while not self._over.is_set():
            try:
                for _ in watch(health_pb2.HealthCheckRequest(), timeout=SECONDS):
                    self.answers.append("OK")
            except grpc.RpcError as error:
                self.answers.append(error.code().name)
            except ValueError:
                # The channel is closed: it is over.
                return


def test_a_flood_is_refused_and_named_and_others_go_on(tmp_path: Path) -> None:
    settings = {"limits.per_client.calls": "8", "limits.per_client.connections": "3", "limits.calls": "40"}
    source = build(tmp_path / "source", 16 * MIB, [(0, noise(1, 8 * MIB))])
    with serving(tmp_path, settings) as (server, local), Flood(server.address.removeprefix("grpc://"), 4, 40) as flood:
        until(lambda: flood.answers.count("RESOURCE_EXHAUSTED") >= 32, "the flood is refused")
        report = ok("sync", source, f"{local}?volume=vm")
        assert report["outcome"] == "committed"
        assert Path(ok("replica", "show", f"{local}?volume=vm")["path"]).read_bytes() == source.read_bytes()
        until(lambda: flood.answers.count("RESOURCE_EXHAUSTED") >= 64, "the flood goes on")
        assert flood.answers.count("OK") <= 8
        # Somebody else behind the same address shares its fate, and is told why.
        line = refused(
            run_cli("replica", "list", server.address), "127.0.0.1 has", "limits.per_client.", "run it again"
        )
        assert "the server takes no" in line
        found = warnings(server, "refused")
        assert found and {line["client"] for line in found} == {"127.0.0.1"}
        assert all("limits.per_client." in line["cause"] for line in found)
        # One line, and another one with a count every ten seconds at most.
        assert len(found) < 8


def test_a_client_that_asks_too_often_waits_and_others_do_not(tmp_path: Path) -> None:
    source = build(tmp_path / "source", 4 * MIB, [(0, noise(1, MIB))])
    with serving(tmp_path, {"limits.per_client.calls_per_second": "15"}) as (server, local):
        client = Reflected(server.address.removeprefix("grpc://"))
        for _ in range(30):
            client.call("blockferry.v1.Replicas/ListReplicas", {})
        assert ok("sync", source, f"{local}?volume=vm")["outcome"] == "committed"
        client.close()
        (line,) = warnings(server, "slowed down")
        assert (line["client"], line["times"], line["level"]) == ("127.0.0.1", 1, "warning")


def test_a_sync_without_a_session_says_why(tmp_path: Path) -> None:
    source = build(tmp_path / "source", MIB, [(0, noise(1, 4096))])
    with serving(tmp_path, {"limits.per_client.sessions": "1"}) as (server, local):
        client = Reflected(server.address.removeprefix("grpc://"))
        held = open_session(client, server, "first")
        error = refused_json(
            run_cli("sync", source, server.url("second"), "--json", "--quiet"),
            "limited",
            "127.0.0.1 has that many open",
            "limits.per_client.sessions is 1",
        )
        assert error["volume"] == "second"
        assert not (server.pool / "second").exists(), "nothing was made for a session that was refused"
        assert ok("sync", source, f"{local}?volume=second")["outcome"] == "committed"
        held.replication("AbortSession", {"session": held.session})
        assert server.sync(source, "first")["outcome"] == "committed"
        client.close()


@pytest.mark.parametrize("limit", ["5M", "17M"])
def test_a_message_that_is_too_large_says_why(tmp_path: Path, limit: str) -> None:
    source = build(tmp_path / "source", 8 * MIB, [(0, noise(1, 8 * MIB))])
    with serving(tmp_path, {"limits.message_size": f'"{limit}"'}) as (server, _):
        if limit == "17M":
            assert server.sync(source, "vm", "--region-size", "8M")["outcome"] == "committed"
            return
        done = run_cli("sync", source, server.url("vm"), "--region-size", "8M", "--json", "--quiet")
        refused_json(done, "limited", "larger than max", "limits.message_size")
