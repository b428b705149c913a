"""Clients that mean harm, or die: what they cost our NBD server, seen from outside."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from pathlib import Path

import pytest

from tests.images import KIB, MIB, build, noise
from tests.nbd_serving import BOUND, PEERS, opener, process, run, serving

SIZE = 8 * MIB + 512
PIECES = [(0, noise("peers", 64 * KIB)), (MIB, noise("more", MIB + 4096)), (SIZE - 512, noise("tail", 512))]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return build(tmp_path / "image.raw", SIZE, PIECES)


def test_hostile_clients_cost_nothing_but_their_connections(image: Path, tmp_path: Path) -> None:
    """In a process of its own, whose descriptors and memory are looked at."""
    path = tmp_path / "hostile.sock"
    with process(image, path, handshakes=16, connections=400, handshake=5.0) as server:
        uri = f"nbd+unix:///disk?socket={path}"
        expected = image.read_bytes()
        flags = b"\0\0\0\3"
        go = b"IHAVEOPT\0\0\0\7\0\0\0\x0a\0\0\0\4disk\0\0"
        read = bytes.fromhex("25609513 0000 0000 0000000000000001 0000000000000000 00800000")
        write = bytes.fromhex("25609513 0000 0001 0000000000000001 0000000000000000 02000000")
        flush = bytes.fromhex("25609513 0000 0003 0000000000000001 0000000000000000 00000000")
        openings = [
            b"",
            flags,
            b"\xff" * 64,
            flags + b"IHAVEOPT\0\0\0\7\xff\xff\xff\xff",
            flags + go[:20],
            flags + go + b"\0" * 28,
            flags + go + read * 100,
            flags + go + write + b"x" * 1000,
            flags + go + flush * 500,
        ]

        def flood(times: int) -> None:
            with contextlib.ExitStack() as bad:
                for number in range(times):
                    one = bad.enter_context(socket.socket(socket.AF_UNIX))
                    one.settimeout(BOUND)
                    one.connect(str(path))
                    with contextlib.suppress(OSError):
                        one.sendall(openings[number % len(openings)])
                    if number % 100 == 0:
                        assert run("nbdinfo", "--size", uri) == f"{SIZE}\n"

        def look() -> tuple[int, int]:
            status = Path(f"/proc/{server.pid}/status").read_text()
            return len(os.listdir(f"/proc/{server.pid}/fd")), int(status.split("VmRSS:")[1].split()[0])

        def settled(most: int) -> int:
            for _ in range(2000):
                if look()[0] <= most:
                    break
                subprocess.run(["sleep", "0.01"], check=True)
            return look()[0]

        before = look()[0]
        for _ in range(2):
            flood(200)
            assert settled(before) == before
        # What so many clients at once have taken is kept for the next ones, and is enough for them.
        memory = look()[1]
        for _ in range(3):
            flood(200)
            assert settled(before) == before
        assert look()[1] <= memory + 16 * 1024, "KiB"
        copy = tmp_path / "copy.raw"
        run("nbdcopy", uri, copy)
        # Their half writes of the same place have left whole pieces or nothing; that is what they may.
        assert copy.read_bytes()[MIB:] == expected[MIB:]
        assert server.poll() is None


def test_clients_that_are_killed(image: Path, tmp_path: Path) -> None:
    """With requests in flight, again and again; the server goes on, and keeps nothing of theirs."""
    script = """
import os, sys
h.set_strict_mode(0)
buffers = [nbd.Buffer.from_bytearray(bytearray(b"k" * 262144)) for _ in range(16)]
for number, buffer in enumerate(buffers):
    h.aio_pwrite(buffer, 2 * 1024 * 1024 + number * 262144)
    h.aio_pread(nbd.Buffer(262144), number * 262144)
    h.poll(0)
os.kill(os.getpid(), 9)
"""
    with serving(opener(image)) as served:
        for _ in range(5):
            done = subprocess.run(
                ["nbdsh", "--uri", served.uri, "-c", script], env=PEERS, capture_output=True, check=False, timeout=60
            )
            assert done.returncode == -9, done.stderr
        assert run("nbdinfo", "--size", served.uri) == f"{SIZE}\n"
        for _ in range(2000):
            if served.look(lambda: (served.server.clients, served.server.room.used)) == (0, 0):
                break
            subprocess.run(["sleep", "0.01"], check=True)
        assert served.look(lambda: (served.server.clients, served.server.room.used)) == (0, 0)
        assert served.look(lambda: served.export.ordering.running) == 0
    assert image.read_bytes()[:MIB] == b"".join(data for _, data in PIECES[:1]) + bytes(MIB - 64 * KIB)
    # Each of these requests has been done as a whole, or not at all.
    written = image.read_bytes()[2 * MIB : 6 * MIB]
    for start in range(0, 4 * MIB, 256 * KIB):
        assert written[start : start + 256 * KIB].count(b"k") in (0, 256 * KIB) or start == 0
