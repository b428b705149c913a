"""Mutual TLS: who comes in, what is said to whoever does not, and certificates that change while a server runs."""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509

from tests.certificates import Issued, Issuer
from tests.conftest import ServerFactory
from tests.images import MIB
from tests.reflected import PACKAGE, Reflected, open_session
from tests.support import Server, ok, own_directory, refused, refused_json, run_cli, until


@dataclass(frozen=True)
class Pki:
    """Certificates of all kinds."""

    ca: Issuer
    other: Issuer
    server: Issued
    agent: Issued
    revoked: Issued


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    directory = tmp_path_factory.mktemp("pki")
    ca, other = Issuer(directory), Issuer(directory, "other")
    found = Pki(
        ca, other, ca.issue("server", "localhost", "127.0.0.1"), ca.issue("agent", "agent.site-a"),
        ca.issue("revoked", "agent.site-a"),
    )  # fmt: skip
    ca.revoke([found.revoked])
    return found


def flags(pki: Pki, shown: Issued | None = None) -> tuple[str, ...]:
    """Of a server."""
    return (*(shown or pki.server).flags(pki.ca.ca), "--tls-crl", str(pki.ca.crl))


@pytest.fixture(scope="module")
def tls_server(pki: Pki, pool_root: Path) -> Iterator[Server]:
    """A server that speaks TLS only, for the tests of this module."""
    server = Server(own_directory(pool_root, "pool-tls"), flags=flags(pki), listen="grpcs://127.0.0.1:0").start()
    yield server
    server.stop()


def channel(server: Server, pki: Pki, shown: Issued) -> Reflected:
    """A generic client with a certificate."""
    credentials = grpc.ssl_channel_credentials(pki.ca.ca.read_bytes(), shown.key.read_bytes(), shown.cert.read_bytes())
    return Reflected(server.address.removeprefix("grpcs://"), credentials)


def port_of(server: Server) -> int:
    return int(server.address.rpartition(":")[2])


def shown_by(server: Server, pki: Pki) -> x509.Certificate:
    """The certificate that the server shows now."""
    context = ssl.create_default_context(cafile=pki.ca.ca)
    context.load_cert_chain(pki.agent.cert, pki.agent.key)
    with (
        socket.create_connection(("127.0.0.1", port_of(server)), 10) as raw,
        context.wrap_socket(raw, server_hostname="127.0.0.1") as connection,
    ):
        found = connection.getpeercert(binary_form=True)
    assert found is not None
    return x509.load_der_x509_certificate(found)


def test_everything_works_over_tls(tls_server: Server, pki: Pki, volume: str, tmp_path: Path) -> None:
    source = tmp_path / "source.raw"
    source.write_bytes(b"x" * MIB)
    os.truncate(source, 2 * MIB)
    tls = pki.agent.flags(pki.ca.ca)
    assert ok("plan", source, tls_server.url(volume), *tls)["regions"]["send"] == 1
    report = ok("sync", source, tls_server.url(volume), "--state-dir", tmp_path / "state", *tls)
    assert (report["outcome"], report["generation"]) == ("committed", 1)
    assert ok("verify", source, tls_server.url(volume), *tls)["outcome"] == "equal"
    again = ok("sync", f"{tls_server.url(volume)}@1", tls_server.url(f"{volume}-2"), *tls)
    assert again["outcome"] == "committed"
    assert ok("replica", "show", tls_server.url(volume), *tls)["generation"] == 1


def test_without_grants_the_log_says_who_may_do_everything(tls_server: Server) -> None:
    assert "whoever has a certificate may do everything" in tls_server.log.read_text()


def test_files_may_come_from_the_environment(tls_server: Server, pki: Pki, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, path in (("CERT", pki.agent.cert), ("KEY", pki.agent.key), ("CA", pki.ca.ca)):
        monkeypatch.setenv(f"BLOCKFERRY_TLS_{name}", str(path))
    assert "replicas" in ok("replica", "list", tls_server.address)
    monkeypatch.delenv("BLOCKFERRY_TLS_KEY")
    refused(run_cli("replica", "list", tls_server.address), "--tls-key is missing", status=2)


# --- bad certificates ---------------------------------------------------------------------------------------------


def log_says(server: Server, *words: str) -> None:
    """Wait for a line of the log with all these words."""
    until(
        lambda: any(all(word in line for word in words) for line in server.log.read_text().splitlines()),
        f"the log says {words}",
        timeout=20,
    )


BAD_CLIENTS: dict[str, tuple[Callable[[Pki], Issued], tuple[str, ...], tuple[str, ...]]] = {
    "expired": (
        lambda pki: pki.ca.issue("expired", "agent.site-a", start=timedelta(days=-9), end=timedelta(days=-1)),
        ("expired.crt is not valid", "it expired on", "renew it"),
        (),
    ),
    "not yet valid": (
        lambda pki: pki.ca.issue("future", "agent.site-a", start=timedelta(days=1)),
        ("future.crt is not valid", "it is not valid before", "clock"),
        (),
    ),
    "foreign": (
        lambda pki: pki.other.issue("foreign", "agent.site-a"),
        ("the server does not accept", "foreign.crt", "CN=other has issued", "server's ca file"),
        ("TLS handshake failed", "no authority of ours has issued the client's certificate"),
    ),
    "revoked": (
        lambda pki: pki.revoked,
        ("the server refuses this certificate", "it was revoked", "have a new one issued"),
        ("certificate refused", "agent.site-a", "it was revoked"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_CLIENTS)
def test_a_bad_certificate_of_the_client(tls_server: Server, pki: Pki, kind: str) -> None:
    make, said, logged = BAD_CLIENTS[kind]
    refused_json(run_cli("replica", "list", tls_server.address, *make(pki).flags(pki.ca.ca), "--json"), "tls", *said)
    if logged:
        log_says(tls_server, *logged)


@pytest.mark.parametrize("kind", ["expired", "not yet valid", "none"])
def test_a_client_that_checks_nothing_itself(tls_server: Server, pki: Pki, kind: str) -> None:
    """Our own client would not have tried: the server refuses all the same, and says why in its log."""
    authorities = pki.ca.ca.read_bytes()
    if kind == "none":
        credentials = grpc.ssl_channel_credentials(authorities)
        logged = "the client shows no certificate"
    else:
        shown = BAD_CLIENTS[kind][0](pki)
        credentials = grpc.ssl_channel_credentials(authorities, shown.key.read_bytes(), shown.cert.read_bytes())
        logged = "has expired" if kind == "expired" else "is not valid yet"
    with grpc.secure_channel(tls_server.address.removeprefix("grpcs://"), credentials) as unchecked:
        call: Any = unchecked.unary_unary(f"/{PACKAGE}.Replicas/ListReplicas")
        with pytest.raises(grpc.RpcError) as caught:
            call(b"", timeout=20)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    log_says(tls_server, "TLS handshake failed", logged)


BAD_SERVERS: dict[str, tuple[Callable[[Pki], Issued], tuple[str, ...]]] = {
    "of another authority": (
        lambda pki: pki.other.issue("imposter", "127.0.0.1"),
        ("no authority in --tls-ca has issued the server's certificate",),
    ),
    "with another name": (
        lambda pki: pki.ca.issue("misnamed", "other.example"),
        ("the server's certificate does not name 127.0.0.1",),
    ),
}


@pytest.mark.parametrize("kind", BAD_SERVERS)
def test_a_bad_certificate_of_the_server(start_server: ServerFactory, pki: Pki, kind: str) -> None:
    make, said = BAD_SERVERS[kind]
    server = start_server(listen="grpcs://127.0.0.1:0", flags=flags(pki, make(pki)))
    refused_json(run_cli("replica", "list", server.address, *pki.agent.flags(pki.ca.ca), "--json"), "tls", *said)


@pytest.mark.parametrize(
    ("start", "end", "said"),
    [(-9, -1, "the server's certificate has expired"), (1, 9, "the server's certificate is not valid yet")],
    ids=["expired", "not yet valid"],
)
def test_a_server_whose_certificate_is_not_valid(pki: Pki, start: int, end: int, said: str) -> None:
    """Ours does not start with such a certificate, and a running one may get there."""
    shown = pki.ca.issue("untimely", "127.0.0.1", start=timedelta(days=start), end=timedelta(days=end))
    credentials = grpc.ssl_server_credentials(
        [(shown.key.read_bytes(), shown.cert.read_bytes())], pki.ca.ca.read_bytes(), require_client_auth=True
    )
    from concurrent.futures import ThreadPoolExecutor

    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        address = f"grpcs://127.0.0.1:{port}"
        refused_json(run_cli("replica", "list", address, *pki.agent.flags(pki.ca.ca), "--json"), "tls", said)
    finally:
        server.stop(0).wait()


def test_plaintext_and_tls_do_not_meet(tls_server: Server, server: Server, pki: Pki) -> None:
    tls = pki.agent.flags(pki.ca.ca)
    plain = tls_server.address.replace("grpcs:", "grpc:")
    refused_json(run_cli("replica", "list", plain, "--json"), "tls", "speaks TLS only", "write grpcs://")
    log_says(tls_server, "TLS handshake failed", "the client speaks plaintext")
    secure = server.address.replace("grpc:", "grpcs:")
    refused_json(run_cli("replica", "list", secure, *tls, "--json"), "tls", "speaks plaintext", "write grpc://")
    refused_json(run_cli("replica", "list", tls_server.address, "--json"), "tls", "no certificate of this side")


def test_a_server_that_is_not_there_is_still_just_that(pki: Pki) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"grpcs://127.0.0.1:{taken.getsockname()[1]}"
        done = run_cli("replica", "list", address, *pki.agent.flags(pki.ca.ca), "--json")
    refused_json(done, "unavailable", "no server answers there")


@pytest.mark.parametrize(
    ("version", "lets_in"), [("-tls1", False), ("-tls1_1", False), ("-tls1_2", True), ("-tls1_3", True)]
)
def test_nothing_older_than_tls_1_2(tls_server: Server, pki: Pki, version: str, lets_in: bool) -> None:
    done = subprocess.run(
        ["openssl", "s_client", "-connect", f"127.0.0.1:{port_of(tls_server)}", version, "-alpn", "h2",
         "-cipher", "ALL:@SECLEVEL=0", "-CAfile", pki.ca.ca, "-cert", pki.agent.cert, "-key", pki.agent.key],
        input="", capture_output=True, text=True, errors="replace", timeout=30, check=False,
    )  # fmt: skip
    # What openssl gets as far as a peer's certificate it has agreed a version for.
    assert ("Verify return code: 0 (ok)" in done.stdout and "BEGIN CERTIFICATE" in done.stdout) == lets_in, done.stdout


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda pki, tmp: ("--tls-key", str(pki.agent.key)), "does not belong to"),
        (lambda pki, tmp: ("--tls-ca", str(pki.server.key)), "no certificate in PEM form"),
        (lambda pki, tmp: ("--tls-cert", str(tmp / "nowhere")), "no such file"),
        (lambda pki, tmp: ("--tls-crl", str(pki.other.crl)), "no authority that is trusted here has signed the list"),
        (lambda pki, tmp: ("--tls-crl", str(pki.server.cert)), "no revocation list"),
    ],
)  # fmt: skip
def test_a_server_starts_with_good_files_or_not_at_all(
    pki: Pki, tmp_path: Path, spoil: Callable[[Pki, Path], tuple[str, str]], said: str
) -> None:
    server = Server(tmp_path, listen="grpcs://127.0.0.1:0", flags=(*flags(pki), *spoil(pki, tmp_path)))
    done = subprocess.run(server.words, capture_output=True, text=True, timeout=60, check=False)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and said in last and last.startswith("blockferry-server: "), done.stderr
    assert "Traceback" not in done.stderr
    for key in (pki.server.key, pki.agent.key):
        assert key.read_text().splitlines()[1] not in done.stdout + done.stderr


# --- while it runs --------------------------------------------------------------------------------------------------


def test_certificates_are_renewed_without_a_restart(start_server: ServerFactory, pki: Pki, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    first = Issued(mine / "s.crt", mine / "s.key", pki.server.certificate)
    first.cert.write_bytes(pki.server.cert.read_bytes())
    first.key.write_bytes(pki.server.key.read_bytes())
    first.key.chmod(0o600)
    server = start_server(listen="grpcs://127.0.0.1:0", flags=first.flags(pki.ca.ca))
    pid = server.pid
    client = channel(server, pki, pki.agent)
    assert shown_by(server, pki) == pki.server.certificate

    # One that cannot be used is not, and the log says so.
    first.cert.write_text("nothing like a certificate")
    log_says(server, "the new certificate files are not used", "s.crt", "the last good ones stay in use")
    assert shown_by(server, pki) == pki.server.certificate
    expired = pki.ca.issue("gone", "127.0.0.1", start=timedelta(days=-9), end=timedelta(days=-1))
    first.cert.write_bytes(expired.cert.read_bytes())
    first.key.write_bytes(expired.key.read_bytes())
    log_says(server, "the new certificate files are not used", "it expired on")
    assert shown_by(server, pki) == pki.server.certificate

    renewed = pki.ca.issue("renewed", "localhost", "127.0.0.1")
    first.key.write_bytes(renewed.key.read_bytes())
    first.cert.write_bytes(renewed.cert.read_bytes())
    log_says(server, "certificate files reloaded")
    assert shown_by(server, pki) == renewed.certificate
    # Whoever was connected stays so.
    client.call(f"{PACKAGE}.Replicas/ListReplicas", {})
    client.close()
    assert server.pid == pid


def test_a_certificate_that_is_revoked_during_a_connection(
    start_server: ServerFactory, pki: Pki, tmp_path: Path
) -> None:
    ca = Issuer(tmp_path)
    mine = Pki(ca, pki.other, ca.issue("server", "127.0.0.1"), ca.issue("agent", "agent"), ca.issue("second", "agent"))
    server = start_server(listen="grpcs://127.0.0.1:0", flags=flags(mine))
    client, other = channel(server, mine, mine.agent), channel(server, mine, mine.revoked)
    driven = open_session(client, server, "v")
    driven.write(0, b"x" * 4096)

    def unhurried() -> Iterator[dict[str, object]]:
        yield {"sequence": 1, "session": driven.session, "changes": []}
        ca.revoke([mine.agent])
        log_says(server, "certificate files reloaded")
        yield {"sequence": 2, "changes": [{"unmap": {"offset": 0, "length": MIB}}]}

    refusal = client.stream_refusal(f"{PACKAGE}.Replication/ApplyChanges", unhurried())
    assert (refusal.status, refusal.reason) == (grpc.StatusCode.UNAUTHENTICATED, "TLS")
    assert "it was revoked" in refusal.message
    for method, request in (
        ("WriteRegion", {"session": driven.session, "offset": 0, "length": MIB}),
        ("CommitSessions", {"commits": [{"session": driven.session, "volume": "v", "commit_id": bytes(16)}]}),
    ):
        refusal = client.refusal(f"{PACKAGE}.Replication/{method}", request)
        assert (refusal.status, refusal.reason) == (grpc.StatusCode.UNAUTHENTICATED, "TLS")
    # Another certificate with the same name is the same identity, and may go on.
    (answer,) = other.call(f"{PACKAGE}.Replication/WriteRegion", {
        "session": driven.session, "offset": 0, "length": MIB, "writes": [{"offset": 0, "length": 4096}],
        "data": b"y" * 4096,
    })  # fmt: skip
    assert answer.result.bytes_written == 4096
    client.close()
    other.close()


def test_a_certificate_that_expires_during_a_connection(tls_server: Server, pki: Pki) -> None:
    brief = pki.ca.issue("brief", "agent.site-a", end=timedelta(seconds=5))
    client = channel(tls_server, pki, brief)
    client.call(f"{PACKAGE}.Replicas/ListReplicas", {})
    until(lambda: datetime.now(UTC) > brief.certificate.not_valid_after_utc + timedelta(seconds=1), "it has expired")
    refusal = client.refusal(f"{PACKAGE}.Replicas/ListReplicas", {})
    assert (refusal.status, refusal.reason) == (grpc.StatusCode.UNAUTHENTICATED, "TLS")
    assert "it expired on" in refusal.message
    client.close()


def test_coming_expiry_is_announced(start_server: ServerFactory, pki: Pki, tmp_path: Path) -> None:
    soon = {"start": timedelta(days=-80), "end": timedelta(days=10, hours=1)}
    shown, mine = pki.ca.issue("soon-server", "127.0.0.1", **soon), pki.ca.issue("soon-agent", "agent", **soon)
    issuer = Issuer(tmp_path)
    issuer.revoke([], due=timedelta(days=-1))
    server = start_server(listen="grpcs://127.0.0.1:0", flags=shown.flags(pki.ca.ca))
    log_says(server, "certificate needs attention", "soon-server.crt", "in 10 days")
    done = run_cli("replica", "list", server.address, *mine.flags(pki.ca.ca))
    assert done.status == 0
    (line,) = done.stderr.splitlines()
    assert line.startswith("blockferry: warning: ") and "soon-agent.crt" in line and "in 10 days" in line
    assert not run_cli("replica", "list", server.address, *mine.flags(pki.ca.ca), "--quiet").stderr
    late = start_server(
        listen="grpcs://127.0.0.1:0",
        flags=(*issuer.issue("s", "127.0.0.1").flags(issuer.ca), "--tls-crl", str(issuer.crl)),
    )
    log_says(late, "certificate needs attention", "ca.crl is out of date")


def test_no_secret_shows(tls_server: Server, pki: Pki) -> None:
    """In the log, or where every user of the host can see it."""
    seen = tls_server.log.read_text()
    for name in ("cmdline", "comm", "environ"):
        seen += Path(f"/proc/{tls_server.pid}/{name}").read_bytes().decode(errors="replace")
    assert "listening" not in seen and "certificate" in seen
    for key in (pki.server.key, pki.agent.key):
        for line in key.read_text().splitlines()[1:-1]:
            assert line not in seen
    assert "PRIVATE" not in seen


def test_a_flood_of_bad_handshakes_does_not_fill_the_log(start_server: ServerFactory, pki: Pki) -> None:
    server = start_server(listen="grpcs://127.0.0.1:0", flags=flags(pki))
    for _ in range(200):
        with socket.create_connection(("127.0.0.1", port_of(server)), 10) as raw:
            raw.sendall(b"GET / HTTP/1.1\r\n\r\n")
            raw.recv(1)
    log_says(server, "TLS handshake failed", "plaintext")
    time.sleep(0.1)
    assert server.log.read_text().count("TLS handshake failed") <= 3
    channel(server, pki, pki.agent).close()
