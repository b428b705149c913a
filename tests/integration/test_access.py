"""Every call by everybody, against a real server over TLS: who may is let in, and who may not learns nothing."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.certificates import Issued, Issuer
from tests.images import MIB
from tests.reflected import PACKAGE, Reflected, Refusal, open_session
from tests.support import PROGRAMS, Server, ok, refused, refused_json, run_cli

AGENT, OPERATOR, VIEWER = "agent", "operator", "viewer"
EVERYBODY = {AGENT, OPERATOR, VIEWER}

# Written down once more, so that a slip in the server's own table shows.
MAY: dict[str, set[str]] = {
    "Replication/OpenSession": {AGENT},
    "Replication/GetAllocationMap": EVERYBODY,
    "Replication/GetRegionDigests": {AGENT},
    "Replication/WriteRegion": {AGENT},
    "Replication/UnmapRegion": {AGENT},
    "Replication/ApplyChanges": {AGENT},
    "Replication/CommitSessions": {AGENT},
    "Replication/AbortSession": {AGENT},
    "Replicas/ListReplicas": EVERYBODY,
    "Replicas/GetReplica": EVERYBODY,
    "Replicas/ListPools": EVERYBODY,
    "Replicas/ReadRegions": {AGENT},
    "Replicas/HoldPoint": {AGENT},
    "Replicas/ListRecoveryPoints": EVERYBODY,
    "Replicas/VerifyReplica": {OPERATOR},
    "Replicas/PromoteReplica": {OPERATOR},
    "Replicas/DemoteReplica": {OPERATOR},
    "Replicas/DeleteReplica": {OPERATOR},
    "Replicas/AdoptReplica": {OPERATOR},
}

CERTIFICATES = {
    AGENT: ("agent.site-a",),
    OPERATOR: ("ops.example",),
    VIEWER: ("spiffe://site/watch",),
    "agent of another volume": ("agent.site-b",),
    "nobody": ("nobody.example",),
    "without a name": (),
}
GRANTS = """
[[grant]]
san = "agent.site-a"
role = "agent"
volumes = ["db", "db-*"]

[[grant]]
san = "ops.example"
role = "operator"
volumes = ["db", "db-*"]

[[grant]]
san = "spiffe://site/watch"
role = "viewer"
volumes = ["db"]

[[grant]]
san = "agent.site-b"
role = "agent"
volumes = ["other"]
"""


def request(method: str, volume: str, session: dict[str, Any]) -> dict[str, Any]:
    """A request that would change nothing that matters, even where it is let in."""
    point = {"volume": volume}
    key = bytes(32)
    requests: dict[str, dict[str, Any]] = {
        "OpenSession": {"protocol_version": 1, "volume": volume, "size": 5},
        "GetAllocationMap": {"point": point},
        "GetRegionDigests": {"point": point, "piece_size": MIB, "pieces": [{"first": 0, "count": 1}], "key": key},
        "WriteRegion": {"session": session},
        "UnmapRegion": {"session": session},
        "ApplyChanges": {"sequence": 1, "session": session},
        "CommitSessions": {"commits": [{"volume": volume, "session": session}]},
        "AbortSession": {"session": session},
        "ListReplicas": {},
        "GetReplica": {"volume": volume},
        "ListPools": {},
        "ReadRegions": {"point": point, "ranges": [{"offset": 0, "length": 1}]},
        "HoldPoint": {"point": point},
        "ListRecoveryPoints": {"volume": volume},
        "VerifyReplica": {"point": point},
        "PromoteReplica": {"point": point},
        "DemoteReplica": {"volume": volume},
        "DeleteReplica": {"volume": volume},
        "AdoptReplica": {"volume": volume, "seed": "nothing"},
    }
    return requests[method.partition("/")[2]]


class Configured(Server):
    """A server with a configuration file, and nothing else on its command line."""

    def __init__(self, directory: Path, text: str) -> None:
        pool = directory / "pool"
        pool.mkdir()
        self.file = directory / "server.toml"
        self.file.write_text(f'{text}\n[pool.main]\npath = "{pool}"\n')
        super().__init__(pool)

    @property
    def words(self) -> list[str]:
        return [str(PROGRAMS / "blockferry-server"), "--config", str(self.file)]


@dataclass
class Site:
    """A server with grants, and everybody who may call it."""

    server: Server
    ca: Issuer
    issued: dict[str, Issued]
    clients: dict[str, Reflected]
    socket: Path
    session: dict[str, Any]
    """Of the agent, on db."""

    def flags(self, who: str) -> tuple[str, ...]:
        return self.issued[who].flags(self.ca.ca)


def tls_section(shown: Issued, ca: Issuer) -> str:
    return f'[tls]\ncert = "{shown.cert}"\nkey = "{shown.key}"\nca = "{ca.ca}"\ncrl = "{ca.crl}"\n'


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    directory = tmp_path_factory.mktemp("site")
    ca = Issuer(directory)
    socket = directory / "admin.sock"
    issued = {who: ca.issue(who.replace(" ", "-"), *names) for who, names in CERTIFICATES.items()}
    server = Configured(
        directory,
        f'listen = ["grpcs://127.0.0.1:0", "grpc+unix://{socket}"]\n'
        + tls_section(ca.issue("server", "127.0.0.1"), ca) + GRANTS,
    ).start()  # fmt: skip
    clients: dict[str, Reflected] = {"local administrator": Reflected(f"unix:{socket}")}
    try:
        for who, one in issued.items():
            credentials = grpc.ssl_channel_credentials(ca.ca.read_bytes(), one.key.read_bytes(), one.cert.read_bytes())
            clients[who] = Reflected(server.address.removeprefix("grpcs://"), credentials)
        for volume in ("db", "other"):
            driven = open_session(clients["local administrator"], server, volume)
            driven.write(0, b"x" * 4096)
            driven.commit()
        session = open_session(clients[AGENT], server, "db").session
        yield Site(server, ca, issued, clients, socket, session)
    finally:
        for client in clients.values():
            client.close()
        server.stop()


def outcome(site: Site, who: str, method: str, volume: str) -> Refusal | None:
    """How a call is refused; None where it is answered."""
    client = site.clients[who]
    path = f"{PACKAGE}.{method}"
    try:
        client.call(path, request(method, volume, site.session))
    except grpc.RpcError:
        return client.refusal(path, request(method, volume, site.session))
    return None


def denied(found: Refusal | None) -> bool:
    return found is not None and (found.status, found.reason) == (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION")


def test_the_table_has_every_call(site: Site) -> None:
    client = site.clients[AGENT]
    services = [name for name in client.services if name.startswith(f"{PACKAGE}.")]
    assert sorted(MAY) == sorted(
        f"{service.rpartition('.')[2]}/{method}" for service in services for method in client.methods(service)
    )


@pytest.mark.parametrize("who", [*CERTIFICATES, "local administrator"])
def test_every_call_by_everybody(site: Site, who: str) -> None:
    """The agent's session comes last: aborting it ends it."""
    for method, roles in sorted(MAY.items(), key=lambda one: one[0] == "Replication/AbortSession"):
        if who == AGENT and method == "Replication/AbortSession":
            continue
        found = outcome(site, who, method, "db")
        expected = who in roles or who == "local administrator"
        listing = method in ("Replicas/ListReplicas", "Replicas/ListPools")
        if who == "agent of another volume" and listing:
            expected = True
        if who == "local administrator" and "session" in request(method, "db", site.session):
            expected = False  # It is the agent's.
        if who == "local administrator" and method == "Replication/CommitSessions":
            expected = False
        assert denied(found) != expected, (who, method, found)


@pytest.mark.parametrize("who", CERTIFICATES)
def test_what_one_may_not_see_is_like_what_is_not_there(site: Site, who: str) -> None:
    """`other` exists, `nowhere` does not; whoever may touch neither hears the same of both."""
    if who == "agent of another volume":
        return
    for method in MAY:
        if any(word in request(method, "?", {}) for word in ("volume", "point", "commits")):
            found = [outcome(site, who, method, volume) for volume in ("other", "nowhere", "../other", "")]
            assert all(denied(one) for one in found), (method, found)
            assert len({str(one) for one in found}) == 1, (method, found)


def test_lists_show_what_one_may_look_at(site: Site) -> None:
    def listed(who: str) -> tuple[list[str], int, int]:
        (answer,) = site.clients[who].call(f"{PACKAGE}.Replicas/ListReplicas", {})
        (pools,) = site.clients[who].call(f"{PACKAGE}.Replicas/ListPools", {})
        (pool,) = pools.pools
        return [one.volume for one in answer.replicas], pool.replicas, pool.bytes_held

    everything = listed("local administrator")
    assert everything[:2] == (["db", "other"], 2)
    for who, names in ((AGENT, ["db"]), (OPERATOR, ["db"]), (VIEWER, ["db"]), ("agent of another volume", ["other"])):
        found = listed(who)
        assert found[:2] == (names, 1), who
        assert found[2] < everything[2]


def test_a_session_is_its_owners(site: Site) -> None:
    """Two agents of one volume: what one has opened the other can neither use, resume nor end."""
    agent, local = site.clients[AGENT], site.clients["local administrator"]
    driven = open_session(agent, site.server, "db-1", snapshot_id="snapshot")
    for method in ("WriteRegion", "UnmapRegion", "AbortSession", "ApplyChanges"):
        refusal = local.refusal(
            f"{PACKAGE}.Replication/{method}", request(f"Replication/{method}", "db-1", driven.session)
        )
        assert denied(refusal), method
    resumed = {
        "protocol_version": 1,
        "volume": "db-1",
        "size": 2 * MIB + 100,
        "resume_session_id": driven.session["session_id"],
    }
    assert local.refusal(f"{PACKAGE}.Replication/OpenSession", resumed).reason == "IN_USE"
    commit = {"session": driven.session, "volume": "db-1", "commit_id": secrets.token_bytes(16)}
    assert denied(local.refusal(f"{PACKAGE}.Replication/CommitSessions", {"commits": [commit]}))
    # Nothing of this has hurt.
    driven.write(0, b"mine" * 1024)
    path = f"{PACKAGE}.Replication/ApplyChanges"
    settle = {
        "sequence": 1,
        "session": driven.session,
        "settled": [{"first": 0, "count": 3}],
        "flush": True,
        "last": True,
    }
    (answer,) = agent.call(path, settle)[-1:]
    assert answer.durable == 1
    driven.replication("AbortSession", {"session": driven.session})

    def durable(client: Reflected) -> int:
        opened = open_session(client, site.server, "db-1", snapshot_id="snapshot")
        opened.replication("AbortSession", {"session": opened.session})
        return sum(run.count for run in opened.opened.durable_regions)

    assert durable(agent) == 3
    assert durable(local) == 0


def test_what_people_are_told(site: Site, tmp_path: Path) -> None:
    address = site.server.address
    done = run_cli("replica", "delete", f"{address}/db", "--yes", *site.flags(VIEWER), "--json")
    refused_json(done, "permission", "DeleteReplica is denied", "its log says what is missing")
    refused(run_cli("replica", "list", address, *site.flags("nobody")), "ListReplicas is denied")
    source = tmp_path / "source.raw"
    source.write_bytes(bytes(MIB))
    refused(run_cli("sync", source, f"{address}/db-2", *site.flags(OPERATOR), "--quiet"), "OpenSession is denied")
    assert ok("plan", source, f"{address}/db-2", *site.flags(OPERATOR))["outcome"] == "planned"
    refused(run_cli("verify", source, f"{address}/db", *site.flags(VIEWER), "--quiet"))
    records = [json.loads(line) for line in site.server.log.read_text().splitlines()]
    denials = [one for one in records if one["event"] == "denied"]
    (deletion,) = [
        one
        for one in denials
        if (one["identity"], one["method"]) == ("spiffe://site/watch", "Replicas/DeleteReplica")
        and one.get("volume") == "db"
    ][-1:]
    assert deletion["grant"] == '[[grant]] san = "spiffe://site/watch", role = "operator", volumes = ["db"]'
    assert deletion["missing"] == "may not promote, demote, adopt or delete db"
    assert any(one["identity"] == "nobody.example" for one in denials)


def test_health_and_reflection_need_no_grant(site: Site) -> None:
    client = site.clients["nobody"]
    assert client.services == [
        f"{PACKAGE}.Replicas",
        f"{PACKAGE}.Replication",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    ]
    (answer,) = client.call("grpc.health.v1.Health/Check", {})
    assert answer.status == 1


def test_grants_and_plaintext_over_tcp_do_not_go_together(tmp_path: Path) -> None:
    import subprocess

    tls = '[tls]\ncert = "/nowhere"\nkey = "/nowhere"\nca = "/nowhere"\n'
    server = Configured(tmp_path, 'listen = ["grpc://127.0.0.1:0"]\n' + tls + GRANTS)
    done = subprocess.run(server.words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "listen[0]: with grants nobody could use it" in line and "grpcs://" in line
    words = [str(PROGRAMS / "blockferry-server"), "--config", str(server.file), "--listen", "grpc://127.0.0.1:0"]
    server.file.write_text(server.file.read_text().replace("grpc://127.0.0.1:0", f"grpc+unix://{tmp_path}/s"))
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "cannot listen on grpc://127.0.0.1:0: with grants nobody could use it" in line
