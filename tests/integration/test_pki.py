"""The small authority: what it issues other tools accept, its keys are nobody else's, nothing is overwritten."""

from __future__ import annotations

import json
import re
import stat
import subprocess
from pathlib import Path

import pytest

from tests.support import command, finish, ok, refused, run_cli, start_cli


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    """A new authority."""
    ok("pki", "init", tmp_path / "pki")
    return tmp_path / "pki"


def openssl(*words: object) -> str:
    """What openssl says."""
    return subprocess.run(["openssl", *map(str, words)], capture_output=True, text=True, check=True).stdout


def test_what_is_issued_is_what_openssl_takes(authority: Path) -> None:
    issued = ok("pki", "issue", authority, "dr1.example", "10.0.0.5", "fd00::5", "uri:spiffe://site/dr1", "--out",
                authority / "server")  # fmt: skip
    expected = ["dns:dr1.example", "ip:10.0.0.5", "ip:fd00::5", "uri:spiffe://site/dr1"]
    assert issued["names"] == expected
    for purpose in ("sslserver", "sslclient"):
        openssl("verify", "-purpose", purpose, "-x509_strict", "-CAfile", authority / "ca.crt", "-crl_check",
                "-CRLfile", authority / "ca.crl", authority / "server.crt")  # fmt: skip
    text = openssl("x509", "-in", authority / "server.crt", "-noout", "-text")
    assert "DNS:dr1.example, IP Address:10.0.0.5, IP Address:FD00:0:0:0:0:0:0:5, URI:spiffe://site/dr1" in text
    assert "ASN1 OID: prime256v1" in text and "ecdsa-with-SHA256" in text
    fingerprint = openssl("x509", "-in", authority / "server.crt", "-noout", "-fingerprint", "-sha256")
    (shown,) = ok("pki", "show", authority / "server.crt")["certificates"]
    assert fingerprint.strip().partition("=")[2].replace(":", "").lower() == shown["fingerprint"]
    assert (shown["names"], shown["authority"], shown["problem"]) == (expected, False, None)


def test_what_show_tells_people(authority: Path) -> None:
    ok("pki", "issue", authority, "agent.site-a", "--days", "20")
    done = run_cli("pki", "show", authority / "ca.crt", authority / "agent.site-a.crt")
    assert done.status == 0, done.stderr
    assert "ca.crt: authority" in done.stdout and "agent.site-a.crt: certificate" in done.stdout
    assert "dns:agent.site-a" in done.stdout and "SHA-256 " in done.stdout
    assert "WARNING" not in done.stdout  # 20 of 20 days are left
    assert "PRIVATE" not in done.stdout


@pytest.mark.parametrize("what", ["init", "issue"])
def test_a_key_is_nobody_elses_at_any_instant(tmp_path: Path, what: str) -> None:
    """Whatever the umask, it is created 0600 under a name of its own, and the key is not there before its bytes are
    durable."""
    pki = tmp_path / "pki"
    if what == "issue":
        ok("pki", "init", pki)
    key = pki / ("ca.key" if what == "init" else "agent.key")
    words = command("pki", what, pki, *(["agent"] if what == "issue" else []))
    log = tmp_path / "trace"
    # umask is the shell's; strace shows modes as they were asked for.
    subprocess.run(
        ["strace", "-f", "-y", "-o", log, "-e", "trace=openat,fchmod,chmod,fchmodat,link,linkat,rename,renameat,fsync",
         "sh", "-c", 'umask 0; exec "$@"', "sh", *words],
        check=True, capture_output=True,
    )  # fmt: skip
    calls = [line for line in log.read_text().splitlines() if key.name in line]
    created = [line for line in calls if "O_CREAT" in line]
    assert len(created) == 1 and "O_EXCL" in created[0] and ", 0600)" in created[0], calls
    assert not [line for line in calls if "chmod" in line], calls
    # What comes after it was made is read again by its authority.
    kinds = [match[1] for line in calls if (match := re.search(r"\b(openat|fsync|link|linkat|rename)\(", line))]
    assert kinds[:3] == ["openat", "fsync", "link"], calls
    assert all("O_RDONLY" in line for line in calls if "openat" in line and line != created[0]), calls
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert stat.S_IMODE(pki.stat().st_mode) == 0o700
    assert not list(pki.glob("*.tmp"))


def test_nothing_is_overwritten(authority: Path, tmp_path: Path) -> None:
    ok("pki", "issue", authority, "agent")
    before = {path: path.read_bytes() for path in authority.iterdir()}
    refused(run_cli("pki", "init", authority), "ca.key exists")
    refused(run_cli("pki", "issue", authority, "agent"), "agent.crt exists")
    (tmp_path / "only.key").write_text("mine")
    refused(run_cli("pki", "issue", authority, "x", "--out", tmp_path / "only"), "only.key exists")
    (tmp_path / "link.key").symlink_to(tmp_path / "elsewhere")
    refused(run_cli("pki", "issue", authority, "x", "--out", tmp_path / "link"), "link.key exists")
    assert not (tmp_path / "elsewhere").exists() and not (tmp_path / "only.crt").exists()
    assert {path: path.read_bytes() for path in authority.iterdir()} == before


def test_renewing_keeps_names_and_key(authority: Path) -> None:
    ok("pki", "issue", authority, "agent", "uri:spiffe://site/agent", "--days", "10")
    key = (authority / "agent.key").read_bytes()
    (before,) = ok("pki", "show", authority / "agent.crt")["certificates"]
    renewed = ok("pki", "renew", authority, authority / "agent.crt", "--days", "100")
    assert renewed["names"] == before["names"] == ["dns:agent", "uri:spiffe://site/agent"]
    assert renewed["not_after"] > before["not_after"] and renewed["serial"] != before["serial"]
    assert (authority / "agent.key").read_bytes() == key
    openssl("verify", "-CAfile", authority / "ca.crt", authority / "agent.crt")
    public = openssl("pkey", "-in", authority / "agent.key", "-pubout")
    assert openssl("x509", "-in", authority / "agent.crt", "-noout", "-pubkey") == public


def test_what_is_revoked_stays_so(authority: Path) -> None:
    for name in ("one", "two", "three"):
        ok("pki", "issue", authority, name)
    # Side by side: none of them may forget the other.
    running = [start_cli("pki", "revoke", authority, authority / f"{name}.crt", "--json") for name in ("one", "two")]
    for process in running:
        done = finish(process)
        assert done.status == 0, done.stderr
    ok("pki", "revoke", authority, authority / "one.crt")
    text = openssl("crl", "-in", authority / "ca.crl", "-noout", "-text", "-CAfile", authority / "ca.crt")
    listed = re.findall(r"Serial Number: ([0-9A-F]+)", text)
    serials = {
        name: ok("pki", "show", authority / f"{name}.crt")["certificates"][0]["serial"] for name in ("one", "two")
    }
    assert sorted(int(serial, 16) for serial in listed) == sorted(int(serial, 16) for serial in serials.values())
    refused(run_cli("pki", "renew", authority, authority / "two.crt"), "was revoked", "issue a new one")


def test_what_makes_no_sense_is_refused(authority: Path, tmp_path: Path) -> None:
    ok("pki", "init", tmp_path / "other", "--name", "blockferry authority")
    ok("pki", "issue", tmp_path / "other", "agent")
    foreign = tmp_path / "other" / "agent.crt"
    refused(run_cli("pki", "renew", authority, foreign), "has not issued it")
    refused(run_cli("pki", "revoke", authority, foreign), "has not issued it")
    refused(run_cli("pki", "show", tmp_path), "is a directory")
    refused(run_cli("pki", "show", authority / "ca.key"), "no certificate")
    refused(run_cli("pki", "issue", tmp_path / "nowhere", "x"), "no such file")
    refused(run_cli("pki", "issue", authority, "a b"), "no dns name")
    refused(run_cli("pki", "issue", authority, "ip:300.0.0.1"), "no ip name")
    refused(run_cli("pki", "issue", authority, "uri:spiffe://a/b"), "--out", status=2)
    refused(run_cli("pki", "issue", authority, "x", "--days", "0"), "0 days", status=2)
    (authority / "ca.crl").write_bytes((tmp_path / "other" / "ca.crl").read_bytes())
    ok("pki", "issue", authority, "agent")
    refused(run_cli("pki", "revoke", authority, authority / "agent.crt"), "ca.crl", "signature")
    (authority / "ca.key").write_bytes((tmp_path / "other" / "ca.key").read_bytes())
    secret = (tmp_path / "other" / "ca.key").read_text().splitlines()[1]
    done = run_cli("pki", "issue", authority, "x", "--json")
    assert "does not belong" in json.loads(done.stdout)["error"]["message"]
    assert secret not in done.stdout + done.stderr
