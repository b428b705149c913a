"""Who may do what: every call has its right, every role its rights, and whoever is refused learns nothing else."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from blockferry.common import access
from blockferry.common.access import ANONYMOUS, LOCAL, ROLES, Identity, Right, allows, caller_of, identity_of
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.settings import Grant
from blockferry.server.access import NEEDS, Access
from blockferry.v1 import replicas_pb2, replication_pb2
from hypothesis import given
from hypothesis import strategies as st

from tests.certificates import Issuer
from tests.tables import code, document, table

GRANTS = (
    Grant(san="agent.site-a", role="agent", volumes=("db", "erp-*")),
    Grant(san="spiffe://Site/watch", role="viewer", volumes=("*",)),
    Grant(san="ops.example", role="operator", volumes=("db",)),
)


def calls() -> list[str]:
    """Every call of the contract."""
    services = (replication_pb2.DESCRIPTOR, replicas_pb2.DESCRIPTOR)
    found = [service for file in services for service in file.services_by_name.values()]
    return [f"{service.name}/{method.name}" for service in found for method in service.methods]


def test_every_call_has_its_right() -> None:
    """A new call that nobody has thought about is refused to everybody, and fails here."""
    assert list(NEEDS) == calls()


def test_the_document_has_the_same_roles() -> None:
    shown = table(document("docs/security.md"), "### Roles")
    assert [code(row) for row in shown.rows] == [right.name for right in Right]
    for row, right in zip(shown.rows, Right, strict=True):
        for role in ROLES:
            assert (shown.cells[row, f"`{role}`"] == "yes") == (right in ROLES[role]), (row, role)


@pytest.mark.parametrize(
    ("name", "volume", "expected"),
    [
        ("agent.site-a", "db", {Right.LOOK, Right.READ, Right.WRITE}),
        ("agent.site-a", "erp-1", {Right.LOOK, Right.READ, Right.WRITE}),
        ("agent.site-a", "erp", set()),
        ("agent.site-a", "DB", set()),
        ("agent.site-a", None, {Right.LOOK, Right.READ, Right.WRITE}),
        ("agent.site-b", "db", set()),
        ("agent.site-a.example", "db", set()),
        ("spiffe://Site/watch", "anything", {Right.LOOK}),
        ("spiffe://site/watch", "anything", set()),
        ("ops.example", "db", {Right.LOOK, Right.VERIFY, Right.MANAGE}),
        ("ops.example", "erp-1", set()),
    ],
)
def test_the_decision(name: str, volume: str | None, expected: set[Right]) -> None:
    assert {right for right in Right if allows(frozenset({name}), GRANTS, right, volume)} == expected


@given(st.text(max_size=20), st.sampled_from(Right), st.text(max_size=10))
def test_nobody_else_is_granted_anything(name: str, right: Right, volume: str) -> None:
    known = {grant.san for grant in GRANTS}
    assert allows(frozenset({name}), GRANTS, right, volume) <= (name in known)


def test_names_add_up() -> None:
    both = frozenset({"agent.site-a", "ops.example"})
    assert {right for right in Right if allows(both, GRANTS, right, "db")} == set(Right)


class Caller:
    """A gRPC context of somebody."""

    def __init__(self, pem: bytes = b"", peer: str = "ipv4:127.0.0.1:5") -> None:
        self._pem, self._peer = pem, peer

    def auth_context(self) -> dict[str, list[bytes]]:
        return {"x509_pem_cert": [self._pem], "x509_common_name": [b"agent.site-a"]} if self._pem else {}

    def peer(self) -> str:
        return self._peer


class Sessions:
    """One open session, and one that is over."""

    def owner_of(self, session_id: str) -> tuple[str, str | None] | None:
        return {"open": ("db", "dns:agent.site-a"), "over": ("db", None)}.get(session_id)


def admitted(caller: Any, method: str, request: Any, grants: tuple[Grant, ...] = GRANTS) -> Code | None:
    """How a call is answered before it is made; None: it is let in."""
    try:
        Access(Sessions(), grants).admit(method, request, caller)
    except BlockferryError as error:
        return error.code
    return None


@pytest.fixture
def ca(tmp_path: Path) -> Issuer:
    return Issuer(tmp_path)


def who(ca: Issuer, *names: str) -> Any:
    return Caller(ca.issue("one", *names).cert.read_bytes())


def test_a_common_name_is_no_identity(ca: Issuer) -> None:
    """Both of these carry another name as their subject's; only alternative names count."""
    request = replicas_pb2.GetReplicaRequest(volume="db")
    assert caller_of(who(ca, "agent.site-a")).names >= {"agent.site-a"}
    assert admitted(who(ca, "agent.site-a"), "Replicas/GetReplica", request) is None
    assert admitted(who(ca), "Replicas/GetReplica", request) is Code.PERMISSION
    assert admitted(who(ca, "administrator"), "Replicas/GetReplica", request) is Code.PERMISSION


def test_case_counts_where_it_should(ca: Issuer) -> None:
    request = replicas_pb2.GetReplicaRequest(volume="db")
    assert admitted(who(ca, "AGENT.Site-A"), "Replicas/GetReplica", request) is None
    grants = (Grant(san="Agent.SITE-a", role="agent"), Grant(san="dns:typed.example", role="agent"))
    assert admitted(who(ca, "agent.site-a"), "Replicas/GetReplica", request, grants) is None
    assert admitted(who(ca, "typed.example"), "Replicas/GetReplica", request, grants) is None
    assert admitted(who(ca, "*.example"), "Replicas/GetReplica", request, grants) is Code.PERMISSION


def test_sessions_belong_to_whoever_opened_them(ca: Issuer) -> None:
    ref = replication_pb2.SessionRef
    grants = (*GRANTS, Grant(san="second", role="agent"), Grant(san="third", role="agent", volumes=("other",)))
    for method, make in (
        ("Replication/WriteRegion", lambda one: replication_pb2.WriteRegionRequest(session=one)),
        ("Replication/UnmapRegion", lambda one: replication_pb2.UnmapRegionRequest(session=one)),
        ("Replication/AbortSession", lambda one: replication_pb2.AbortSessionRequest(session=one)),
        ("Replication/GetAllocationMap", lambda one: replication_pb2.GetAllocationMapRequest(session=one)),
        ("Replication/GetRegionDigests", lambda one: replication_pb2.GetRegionDigestsRequest(session=one)),
        ("Replication/ApplyChanges", lambda one: replication_pb2.ApplyChangesRequest(session=one).SerializeToString()),
        (
            "Replication/CommitSessions",
            lambda one: replication_pb2.CommitSessionsRequest(
                commits=[replication_pb2.SessionCommit(session=one, volume="db")]
            ),
        ),
    ):
        answers = [
            [admitted(who(ca, name), method, make(ref(session_id=one)), grants) for one in ("open", "over", "unknown")]
            for name in ("agent.site-a", "second", "third", "spiffe://Site/watch", "ops.example")
        ]
        no = Code.PERMISSION
        assert answers[0] == [None, None, None], method
        assert answers[1] == [no, None, None], method
        assert answers[2][:2] == [no, no], method
        assert answers[3] == answers[4] == [no, no, no], method
        assert admitted(Caller(peer="unix:"), method, make(ref(session_id="open")), grants) is no


def test_who_has_no_certificate() -> None:
    request = replicas_pb2.DeleteReplicaRequest(volume="db")
    assert caller_of(Caller(peer="unix:")) is LOCAL  # type: ignore[arg-type]
    assert caller_of(Caller(peer="unix-abstract:x")) is ANONYMOUS  # type: ignore[arg-type]
    assert caller_of(Caller()) is ANONYMOUS  # type: ignore[arg-type]
    assert admitted(Caller(peer="unix:"), "Replicas/DeleteReplica", request) is None
    assert admitted(Caller(), "Replicas/DeleteReplica", request) is Code.PERMISSION
    assert admitted(Caller(), "Replicas/DeleteReplica", request, ()) is None


def test_accounts_are_kept_by_identity(ca: Issuer) -> None:
    assert identity_of(who(ca, "agent.site-a")) == "dns:agent.site-a"
    peers = {"ipv4:192.0.2.7:4711": "192.0.2.7", "ipv6:%5B2001:db8::1%5D:4711": "2001:db8::1", "unix:": "local"}
    assert {peer: identity_of(Caller(peer=peer)) for peer in peers} == peers  # type: ignore[arg-type]


def test_a_call_that_is_not_in_the_table(ca: Issuer) -> None:
    for caller in (who(ca, "agent.site-a"), Caller(peer="unix:")):
        for grants in (GRANTS, ()):
            assert admitted(caller, "Replicas/FormatEverything", None, grants) is Code.PERMISSION


def test_what_the_log_says_and_the_caller_does_not_hear(ca: Issuer, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[dict[str, object]] = []

    class Log:
        def warning(self, event: str, **fields: object) -> None:
            said.append({"event": event, **fields})

    monkeypatch.setattr(access, "log", Log())
    with pytest.raises(BlockferryError) as caught:
        Access(Sessions(), GRANTS).admit(
            "Replicas/DeleteReplica", replicas_pb2.DeleteReplicaRequest(volume="erp-1"), who(ca, "agent.site-a")
        )
    assert said == [
        {
            "event": "denied",
            "identity": "agent.site-a",
            "method": "Replicas/DeleteReplica",
            "missing": "may not promote, demote, adopt or delete erp-1",
            "volume": "erp-1",
            "grant": '[[grant]] san = "agent.site-a", role = "operator", volumes = ["erp-1"]',
        }
    ]
    assert caught.value.code is Code.PERMISSION
    for word in ("grant", "operator", "agent", "erp"):
        assert word not in caught.value.line()


def test_expiry_is_looked_at_in_each_call(ca: Issuer, monkeypatch: pytest.MonkeyPatch) -> None:
    caller = who(ca, "agent.site-a")
    request = replicas_pb2.GetReplicaRequest(volume="db")
    still = Access(Sessions(), GRANTS).admit("Replicas/GetReplica", request, caller)
    still()

    class Later(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.now(UTC) + timedelta(days=91)

    monkeypatch.setattr(access, "datetime", Later)
    with pytest.raises(BlockferryError, match="it expired on") as caught:
        still()
    assert caught.value.code is Code.TLS
    assert admitted(caller, "Replicas/GetReplica", request) is Code.TLS


def test_an_identity_survives_a_renewal(ca: Issuer) -> None:
    one, other = who(ca, "b.example", "a.example"), who(ca, "a.example", "b.example")
    first, second = caller_of(one), caller_of(other)
    assert isinstance(first, Identity) and first.certificate != second.certificate
    assert first.key == second.key == "dns:a.example dns:b.example"
    nameless = {caller_of(who(ca)).key, caller_of(who(ca)).key}
    assert len(nameless) == 2 and "" not in nameless
