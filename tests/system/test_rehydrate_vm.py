"""A Debian guest on a disk that is rehydrated: it boots seconds after the start, from an empty primary and a replica,
works while most of the disk is still elsewhere, and comes back from the primary alone."""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.images import MIB
from tests.rehydrators import Rehydrator
from tests.support import Server

DISK_SIZE = 2048 * MIB
BOOT_SECONDS = 300
SUITE = "bookworm"

GUEST = """#!/bin/sh
exec > /dev/ttyS0 2>&1
if [ ! -e /root/sums ]; then
    echo GUEST-IS-UP
    for number in $(seq 40); do
        dd if=/dev/urandom of=/root/file-$number bs=64k count=8 status=none
    done
    rm -f /root/file-7 && sync && fstrim / || true
    sha256sum /root/file-* > /root/sums.new && sync && mv /root/sums.new /root/sums && sync
    echo GUEST-HAS-WRITTEN
else
    sha256sum --quiet --check /root/sums && echo GUEST-FINDS-ALL
fi
poweroff
"""

UNIT = """[Unit]
After=multi-user.target
[Service]
Type=idle
ExecStart=/usr/local/bin/guest
[Install]
WantedBy=multi-user.target
"""


class Guest:
    """A virtual machine whose console is read."""

    def __init__(self, boot: Path, drive: str) -> None:
        self.said = b""
        self._process = subprocess.Popen(
            [
                "qemu-system-x86_64", "-accel", "tcg", "-m", "768", "-nographic", "-no-reboot", "-monitor", "none",
                "-kernel", str(boot / "vmlinuz"), "-initrd", str(boot / "initrd.img"),
                "-append", "root=/dev/vda rw console=ttyS0 quiet systemd.show_status=no",
                "-drive", f"file={drive},format=raw,if=virtio,discard=unmap,cache=none",
            ],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def says(self, words: bytes) -> None:
        """Wait until the console shows it."""
        assert self._process.stdout is not None
        end = time.monotonic() + BOOT_SECONDS
        while words not in self.said:
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, end - time.monotonic()))
            part = os.read(self._process.stdout.fileno(), 4096) if ready else b""
            assert part, f"the guest never said {words!r}:\n{self.said[-4000:].decode(errors='replace')}"
            self.said += part

    def is_off(self) -> None:
        """Wait until it has powered itself off."""
        assert self._process.stdout is not None
        self._process.stdout.read()
        assert self._process.wait(BOOT_SECONDS) == 0

    def close(self) -> None:
        """Pull the plug."""
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


@pytest.fixture(scope="module")
def debian(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a Debian disk, its kernel and its initial file system."""
    for tool in ("mmdebstrap", "qemu-system-x86_64", "mke2fs"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    base = tmp_path_factory.mktemp("debian")
    root = base / "root"
    done = subprocess.run(
        [
            "mmdebstrap", "--variant=minbase", "--mode=root", "--quiet",
            "--include=linux-image-cloud-amd64,udev,systemd-sysv,initramfs-tools,util-linux", SUITE, str(root),
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        pytest.skip(f"no Debian to be had: {done.stderr.strip().splitlines()[-1]}")
    (root / "usr/local/bin/guest").write_text(GUEST)
    (root / "usr/local/bin/guest").chmod(0o755)
    (root / "etc/systemd/system/guest.service").write_text(UNIT)
    subprocess.run(["systemctl", f"--root={root}", "enable", "guest.service"], check=True, capture_output=True)
    for name in ("vmlinuz", "initrd.img"):
        found = max((root / "boot").glob(f"{name}-*"))
        shutil.copy(found, base / name)
    disk = base / "disk.raw"
    with disk.open("wb") as file:
        file.truncate(DISK_SIZE)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", str(root), str(disk)], check=True)
    shutil.rmtree(root)
    return base


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    pool = tmp_path / "pool"
    pool.mkdir()
    found = Server(pool).start()
    yield found
    found.stop()


@pytest.mark.timeout(1800)
def test_a_guest_boots_from_what_is_not_there_yet(tmp_path: Path, debian: Path, server: Server) -> None:
    allocated = server.sync(debian / "disk.raw", "vm")["bytes"]["data_sent"]
    disk = Rehydrator(tmp_path / "disk", server.url("vm"), flags=["--bwlimit", "1M"]).start()
    guest = Guest(debian, disk.uri)
    try:
        guest.says(b"GUEST-IS-UP")
        fetched = disk.show()["fetched"]
        print(f"{fetched / MIB:.0f} of {allocated / MIB:.0f} MiB fetched when the guest was up")
        assert 0 < fetched < allocated / 2
        guest.says(b"GUEST-HAS-WRITTEN")
        guest.is_off()
        shown = disk.show()
        assert shown["state"] == "hydrating" and shown["data_left"] > 0
        print(f"median {shown['demand']['median_ms']} ms, 99 % within {shown['demand']['p99_ms']} ms on demand")
        assert disk.stop() == 0
    finally:
        guest.close()
        disk.kill()

    disk = Rehydrator(tmp_path / "disk", server.url("vm")).start().hydrated()
    assert disk.stop() == 0
    server.stop()
    done = subprocess.run(["e2fsck", "-f", "-n", disk.primary], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    guest = Guest(debian, disk.primary)
    try:
        guest.says(b"GUEST-FINDS-ALL")
        guest.is_off()
    finally:
        guest.close()
