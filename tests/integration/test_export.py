"""`replica export`: a recovery point as a disk over NBD, while the replica goes on."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.certificates import Issuer
from tests.conftest import ServerFactory
from tests.images import KIB, MIB, build, change, noise
from tests.nbd import qemu_img
from tests.support import Finished, Server, ok, refused, run_cli, start_cli, until

SIZE = 6 * MIB + 512


@dataclass
class Exported:
    """An export at work."""

    process: subprocess.Popen[str]
    report: dict[str, Any]

    @property
    def uri(self) -> str:
        return str(self.report["listening"])

    def stop(self) -> Finished:
        """SIGTERM."""
        self.process.send_signal(signal.SIGTERM)
        stdout, stderr = self.process.communicate(timeout=30)
        return Finished(self.process.returncode, stdout, stderr)


def first_line(process: subprocess.Popen[str]) -> str:
    """What is said when it is ready; fails with what it said instead."""
    assert process.stdout is not None
    line, end = b"", time.monotonic() + 30
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([process.stdout], [], [], max(0.0, end - time.monotonic()))
        part = os.read(process.stdout.fileno(), 1) if ready else b""
        if not part:
            process.kill()
            raise AssertionError(process.communicate()[1])
        line += part
    return line.decode()


@contextlib.contextmanager
def exported(address: str, *flags: object) -> Iterator[Exported]:
    process = start_cli("replica", "export", address, "--json", *flags)
    try:
        yield Exported(process, json.loads(first_line(process)))
    finally:
        if process.poll() is None:
            process.terminate()
        if process.stdout is not None and not process.stdout.closed:
            process.communicate(timeout=30)


def run(*words: object) -> str:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def qemu_io(uri: str, *commands: str) -> str:
    words = [word for one in commands for word in ("-c", one)]
    return subprocess.run(
        ["qemu-io", "-f", "raw", *words, uri], capture_output=True, text=True, check=False, timeout=60
    ).stdout


def kept(server: Server, volume: str) -> dict[int, list[str]]:
    found = ok("replica", "points", server.url(volume))["points"]
    return {point["number"]: point["kept_by"] for point in found}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return build(tmp_path / "vm.raw", SIZE, [(0, noise("vm", MIB)), (3 * MIB + 64 * KIB, noise("more", 100 * KIB))])


def test_a_point_is_read_and_never_written(server: Server, volume: str, source: Path, tmp_path: Path) -> None:
    server.sync(source, volume)
    path = tmp_path / "vm.sock"
    with exported(server.url(volume), "--nbd", f"unix:{path}") as one:
        shown = ok("replica", "show", server.url(volume))
        assert one.report == {
            "schema": 1,
            "volume": volume,
            "generation": 1,
            "commit_id": shown["commit_id"],
            "size": SIZE,
            "listening": f"nbd+unix:///{volume}?socket={path}",
            "writes": "refused",
            "scratch_limit": None,
        }
        copy = tmp_path / "copy.raw"
        run("nbdcopy", one.uri, copy)
        assert copy.read_bytes() == source.read_bytes()
        (export,) = json.loads(run("nbdinfo", "--json", one.uri))["exports"]
        assert (export["is_read_only"], export["can_multi_conn"]) == (True, True)
        assert export["description"] == f"generation 1 of {volume}"
        assert "identical" in qemu_img("compare", "-f", "raw", "-F", "raw", one.uri, source)
        # What the replica knows to be zeros is never asked for: two of its seven regions hold data.
        found = json.loads(run("nbdinfo", "--map", "--json", one.uri))
        assert [(part["offset"], part["length"], part["type"]) for part in found] == [
            (0, MIB, 0), (MIB, 2 * MIB, 3), (3 * MIB, MIB, 0), (4 * MIB, SIZE - 4 * MIB, 3),
        ]  # fmt: skip
        done = one.stop()
        assert done.status == 0 and not path.exists()
        assert [json.loads(line)["event"] for line in done.stderr.splitlines()][-1] == "export ended"


def test_a_point_is_kept_as_long_as_it_is_exported(start_server: ServerFactory, source: Path, tmp_path: Path) -> None:
    server = start_server()
    server.sync(source, "vm", "--keep", "last=1")
    first = source.read_bytes()
    with exported(f"{server.url('vm')}@1", "--nbd", "127.0.0.1:0") as one:
        assert one.uri.startswith("nbd://127.0.0.1:")
        for number in (2, 3, 4, 5):
            change(source, [(number * MIB, noise(number, 4 * KIB))])
            server.sync(source, "vm")
        assert kept(server, "vm") == {5: ["newest", "last"], 4: ["last"], 3: ["last"], 1: ["in use"]}
        refused(run_cli("replica", "delete", server.url("vm"), "--yes"), "being read")
        copy = tmp_path / "copy.raw"
        run("nbdcopy", one.uri, copy)
        assert copy.read_bytes() == first
        assert one.stop().status == 0
    assert 1 in kept(server, "vm")


def test_a_server_that_is_restarted_is_waited_for(start_server: ServerFactory, source: Path, tmp_path: Path) -> None:
    server = start_server()
    server.sync(source, "vm", "--keep", "last=1")
    with exported(server.url("vm"), "--nbd", f"unix:{tmp_path}/vm.sock") as one:
        server.stop()
        reading = subprocess.Popen(["nbdcopy", one.uri, str(tmp_path / "copy.raw")], stderr=subprocess.PIPE)
        server.start()
        assert reading.wait(60) == 0
        assert reading.stderr is not None
        reading.stderr.close()
        assert (tmp_path / "copy.raw").read_bytes() == source.read_bytes()
        until(lambda: "in use" in kept(server, "vm")[1], "the point is held again")
        done = one.stop()
        events = [json.loads(line)["event"] for line in done.stderr.splitlines()]
        assert done.status == 0
        assert [event for event in events if event.startswith("the server")] == [
            "the server is away",
            "the server is back",
        ]


def test_a_point_that_is_gone_ends_the_export(start_server: ServerFactory, source: Path, tmp_path: Path) -> None:
    server = start_server()
    server.sync(source, "vm")
    with exported(server.url("vm"), "--nbd", f"unix:{tmp_path}/vm.sock") as one:
        server.stop()
        shutil.rmtree(server.pool / "vm")
        server.start()
        stdout, stderr = one.process.communicate(timeout=60)
        assert one.process.returncode == 1
        assert json.loads(stdout)["error"]["code"] == "not-found"
        assert "there is no replica vm" in stderr


def test_writes_are_thrown_away(server: Server, volume: str, source: Path, tmp_path: Path) -> None:
    server.sync(source, volume)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    path, content = tmp_path / "vm.sock", source.read_bytes()
    flags = ("--nbd", f"unix:{path}", "--throw-away-writes", "--scratch-dir", scratch, "--scratch-limit", "2M")
    with exported(server.url(volume), *flags) as one:
        assert (one.report["writes"], one.report["scratch_limit"]) == ("thrown away", 2 * MIB)
        said = qemu_io(
            one.uri, "write -P 0x11 100 10", "write -P 0x22 3M 64k", "write -z 512k 64k", "flush",
            "read -P 0x11 100 10", "discard 0 4k", "read -P 0 0 100", "read -P 0x22 3M 64k", "read -P 0 512k 64k",
        )  # fmt: skip
        assert "failed" not in said, said
        copy = tmp_path / "copy.raw"
        run("nbdcopy", one.uri, copy)
        expected = bytearray(content)
        expected[:4096] = bytes(4096)
        expected[3 * MIB : 3 * MIB + 64 * KIB] = b"\x22" * 64 * KIB
        expected[512 * KIB : 576 * KIB] = bytes(64 * KIB)
        assert copy.read_bytes() == expected
        assert "No space left on device" in qemu_io(one.uri, "write -P 0x33 0 4M")
        assert list(scratch.iterdir()) == []
        assert one.stop().status == 0
    assert ok("verify", source, server.url(volume))["outcome"] == "equal"
    with exported(server.url(volume), "--nbd", f"unix:{path}", "--throw-away-writes") as again:
        assert "identical" in qemu_img("compare", "-f", "raw", "-F", "raw", again.uri, source)


def test_what_cannot_be_served(server: Server, volume: str, source: Path, tmp_path: Path) -> None:
    server.sync(source, volume)
    export = ("replica", "export", server.url(volume), "--nbd")
    refused(run_cli(*export, "somewhere"), "neither unix:PATH nor HOST:PORT")
    refused(run_cli(*export, "0.0.0.0:0"), "without TLS")
    refused(run_cli(*export, "127.0.0.1:0", "--nbd-tls"), "no certificate", status=2)
    refused(run_cli(*export, f"unix:{tmp_path}/nowhere/x.sock"), "cannot listen")
    refused(run_cli("replica", "export", f"{server.url(volume)}@9", "--nbd", "127.0.0.1:0"), "generation 9")
    with exported(server.url(volume), "--nbd", f"unix:{tmp_path}/vm.sock"):
        refused(run_cli(*export, f"unix:{tmp_path}/vm.sock"), "somebody listens there already")


def test_tls(server: Server, volume: str, source: Path, tmp_path: Path) -> None:
    server.sync(source, volume)
    ca = Issuer(tmp_path)
    flags = ca.issue("both", "127.0.0.1").flags(ca.ca)
    with exported(server.url(volume), "--nbd", "127.0.0.1:0", "--nbd-tls", *flags) as one:
        assert one.uri.startswith("nbds://127.0.0.1:")
        assert ok("verify", one.uri, source, *flags)["outcome"] == "equal"
        plain = run_cli("verify", one.uri.replace("nbds:", "nbd:"), source)
        refused(plain, "ERR_TLS_REQD")
