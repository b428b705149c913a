"""Two hosts with a network between them: namespaces of their own, joined by a cable. Replication over TLS from end to
end, and what anybody on the cable sees of it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest

from tests.certificates import Issued, Issuer
from tests.images import MIB, noise
from tests.support import Finished, Server, command, refused, until

MARK = b"what nobody on the way may read!"

LISTEN = """
import socket, sys
tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.ntohs(3))
tap.bind((sys.argv[1], 0))
with open(sys.argv[2], "wb", buffering=0) as out:
    out.write(b"listening")
    while True:
        out.write(tap.recv(1 << 16))
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@dataclass
class Host:
    """A namespace with one address."""

    name: str
    address: str
    directory: Path

    def words(self, words: list[str]) -> list[str]:
        """What runs a command there."""
        return ["ip", "netns", "exec", self.name, *words]

    def run(self, *args: object) -> Finished:
        """Run `blockferry` there."""
        done = subprocess.run(self.words(command(*args)), capture_output=True, text=True, timeout=120, check=False)
        return Finished(done.returncode, done.stdout, done.stderr)

    def ok(self, *args: object) -> dict[str, object]:
        """As `run`, and it must succeed; its report."""
        done = self.run(*args, "--json", "--quiet")
        assert done.status == 0, done.stderr
        found: dict[str, object] = json.loads(done.stdout)
        return found


class HostServer(Server):
    """A server on a host."""

    def __init__(self, host: Host, *flags: str, scheme: str = "grpcs") -> None:
        self._host = host
        pool = host.directory / f"pool-{scheme}"
        pool.mkdir()
        super().__init__(pool, listen=f"{scheme}://{host.address}:0", flags=flags)

    @property
    def words(self) -> list[str]:
        return self._host.words(super().words)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    """Two of them, joined by a cable."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and ip")
    number = os.getpid()
    made = []
    with contextlib.ExitStack() as stack:
        for which, address in (("a", "10.213.77.1"), ("b", "10.213.77.2")):
            name = f"blockferry-{number}-{which}"
            ip("netns", "add", name)
            stack.callback(ip, "netns", "delete", name)
            directory = tmp_path / which
            directory.mkdir()
            made.append(Host(name, address, directory))
        one, other = made
        ip("link", "add", "cable", "netns", one.name, "type", "veth", "peer", "name", "cable", "netns", other.name)
        for host in made:
            ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", "cable")
            ip("-n", host.name, "link", "set", "cable", "up")
            ip("-n", host.name, "link", "set", "lo", "up")
        yield one, other


@contextlib.contextmanager
def tapped(host: Host, out: Path) -> Iterator[None]:
    """Everything on the cable goes to a file."""
    with subprocess.Popen(host.words([sys.executable, "-c", LISTEN, "cable", str(out)])) as process:
        try:
            until(lambda: out.exists() and out.read_bytes()[:9] == b"listening", "somebody listens")
            yield
        finally:
            process.terminate()


def image(path: Path, *, changed: bool = False) -> Path:
    """4 MiB: marks, noise, a hole, noise."""
    with path.open("wb") as file:
        file.write(MARK * (MIB // len(MARK)))
        file.write(noise("changed" if changed else "first", MIB))
        file.truncate(3 * MIB)
        file.seek(3 * MIB)
        file.write(noise("end", MIB))
    return path


def tls(shown: Issued, ca: Issuer) -> tuple[str, ...]:
    return shown.flags(ca.ca)


def test_two_sites_replicate_over_tls(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    home, away = hosts
    ca = Issuer(tmp_path)
    agent = ca.issue("agent", "agent.home")
    server = HostServer(away, *tls(ca.issue("away", away.address), ca), "--tls-crl", str(ca.crl)).start()
    back = HostServer(home, *tls(ca.issue("home", home.address), ca)).start()
    try:
        assert server.address.startswith(f"grpcs://{away.address}:")
        source, state = image(tmp_path / "source.raw"), ("--state-dir", tmp_path / "state")
        with tapped(home, tmp_path / "tap"):
            first = home.ok("sync", source, server.url("vm"), *state, *tls(agent, ca))
            assert (first["outcome"], first["generation"]) == ("committed", 1)
        passed = (tmp_path / "tap").read_bytes()
        assert len(passed) > MIB, "nothing was listened to"
        assert MARK not in passed and b"blockferry.v1" not in passed

        image(source, changed=True)
        second = home.ok("sync", source, server.url("vm"), *state, *tls(agent, ca))
        moved = second["bytes"]
        assert isinstance(moved, dict) and moved["data_sent"] == MIB
        assert home.ok("verify", source, server.url("vm"), *tls(agent, ca))["outcome"] == "equal"
        # And home again, from there.
        returned = away.ok("sync", server.url("vm"), back.url("vm"), *state, *tls(agent, ca))
        assert returned["outcome"] == "committed"
        assert home.ok("verify", source, back.url("vm"), *tls(agent, ca))["outcome"] == "equal"

        ca.revoke([agent])
        until(lambda: "reloaded" in server.log.read_text(), "the list is read")
        refused(home.run("sync", source, server.url("vm"), *state, *tls(agent, ca), "--quiet"), "it was revoked")
        expired = ca.issue("expired", "agent.home", start=timedelta(days=-2), end=timedelta(days=-1))
        refused(home.run("replica", "list", server.address, *tls(expired, ca)), "it expired on")
        other = Issuer(tmp_path, "other").issue("foreign", "agent.home")
        refused(home.run("replica", "list", server.address, *tls(other, ca)), "does not accept")
    finally:
        assert server.stop() == 0
        assert back.stop() == 0


def test_plaintext_between_hosts_takes_two_who_want_it(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    """And then everybody on the cable reads along, which shows that the test above would notice."""
    home, away = hosts
    words = [*away.words([str(Path(sys.executable).parent / "blockferry-server")]), "--pool", str(tmp_path)]
    done = subprocess.run([*words, "--listen", f"grpc://{away.address}:0"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "without TLS" in done.stderr
    server = HostServer(away, "--insecure", scheme="grpc").start()
    try:
        source = image(tmp_path / "source.raw")
        refused(home.run("sync", source, server.url("vm"), "--quiet"), "without TLS", "--insecure")
        with tapped(home, tmp_path / "tap"):
            home.ok("sync", source, server.url("vm"), "--state-dir", tmp_path / "state", "--insecure")
        assert MARK in (tmp_path / "tap").read_bytes()
    finally:
        assert server.stop() == 0
