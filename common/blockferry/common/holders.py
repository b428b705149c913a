"""Who uses a block device: mounts, swap, devices made of it, loop devices, processes.

Sources: proc_pid_mountinfo(5), proc(5) "/proc/swaps", Documentation/ABI/testing/sysfs-block (holders), btrfs sysfs.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from blockferry.common import linux
from blockferry.common.blockdev import Node

UNSEEN = "somebody who cannot be seen from here"


@dataclass(frozen=True)
class Holder:
    """Somebody who uses a device."""

    text: str
    """For people: `mounted on /srv`, `sda1 is part of md0`, `qemu-system-x86 (4711)`."""
    writes: bool
    """It may write."""


@dataclass(frozen=True)
class Mount:
    """A line of /proc/PID/mountinfo."""

    device: str
    """`8:1`; of file systems on several devices a number that belongs to none."""
    source: str
    point: str
    read_only: bool
    """The file system itself is; a mount may be read-only above one that is not."""


def _plain(text: str) -> str:
    r"""Undo the kernel's `\040` for a space."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)


def parse_mountinfo(text: str) -> list[Mount]:
    """The mounts of /proc/PID/mountinfo; lines that are none are left out."""
    found = []
    for line in text.splitlines():
        before, separator, after = line.partition(" - ")
        fields, filesystem = before.split(" "), after.split(" ")
        if separator and len(fields) >= 6 and len(filesystem) >= 3:
            options = filesystem[2].split(",")
            found.append(Mount(fields[2], _plain(filesystem[1]), _plain(fields[4]), "ro" in options))
    return found


def parse_swaps(text: str) -> list[str]:
    """The devices and files of /proc/swaps."""
    return [_plain(line.split()[0]) for line in text.splitlines()[1:] if line.strip()]


def _number_of(path: str | Path) -> int:
    """The device number of a block device's node; 0 for anything else."""
    with contextlib.suppress(OSError, ValueError):
        info = os.stat(path)
        if stat.S_ISBLK(info.st_mode):
            return info.st_rdev
    return 0


def _namespaces() -> Iterator[tuple[str, str]]:
    """(who sees it, text of mountinfo) of each mount namespace that can be looked at; the first is our own."""
    seen = set()
    processes = [number for number in os.listdir("/proc") if number.isdigit()]
    for number in ("self", *processes):
        with contextlib.suppress(OSError):
            namespace = os.readlink(f"/proc/{number}/ns/mnt")
            if namespace not in seen:
                text = Path(f"/proc/{number}/mountinfo").read_text(errors="surrogateescape")
                seen.add(namespace)
                yield ("" if number == "self" else f" as process {number} sees it"), text


def _mounts(nodes: Iterable[Node]) -> Iterator[Holder]:
    numbers = {node.number for node in nodes}
    labels = {node.label for node in nodes}
    found = set()
    for whose, text in _namespaces():
        for mount in parse_mountinfo(text):
            # The source tells for file systems on several devices, whose number is none of theirs.
            by_source = mount.source.startswith("/dev/") and _number_of(mount.source) in numbers
            if (mount.device in labels or by_source) and mount not in found:
                found.add(mount)
                how = " read-only" if mount.read_only else ""
                yield Holder(f"mounted{how} on {mount.point}{whose}", not mount.read_only)


def _kernel(nodes: Iterable[Node]) -> Iterator[Holder]:
    """Devices made of these: device-mapper, RAID, bcache; file systems on several devices; swap."""
    for node in nodes:
        for entry in sorted((node.directory / "holders").glob("*")):
            title = ""
            with contextlib.suppress(OSError):
                title = f" ({(entry / 'dm/name').read_text().strip()})"
            yield Holder(f"{node.name} is part of {entry.name}{title}", True)
        for entry in sorted((node.sys / "fs/btrfs").glob(f"*/devices/{node.name}")):
            yield Holder(f"{node.name} is part of the mounted Btrfs {entry.parent.parent.name}", True)


def _swaps(nodes: Iterable[Node]) -> Iterator[Holder]:
    numbers = {node.number for node in nodes}
    with contextlib.suppress(OSError):
        for name in parse_swaps(Path("/proc/swaps").read_text(errors="surrogateescape")):
            if _number_of(name) in numbers:
                yield Holder(f"swap on {name}", True)


def _loops(nodes: Iterable[Node]) -> Iterator[Holder]:
    """Loop devices over these devices."""
    for node in nodes:
        for entry in sorted((node.sys / "block").glob("loop*/loop/backing_file")):
            with contextlib.suppress(OSError):
                if _number_of(entry.read_text().rstrip("\n")) == node.number:
                    read_only = (entry.parent.parent / "ro").read_text().strip() == "1"
                    yield Holder(f"/dev/{entry.parent.parent.name} (loop device)", not read_only)


def _processes(nodes: Iterable[Node]) -> Iterator[Holder]:
    """Other processes that have one of these open for writing, whatever its node is called."""
    numbers = {node.number for node in nodes}
    found = set()
    for link in linux.open_descriptors():
        with contextlib.suppress(OSError, IndexError, ValueError):
            info = link.stat()
            if stat.S_ISBLK(info.st_mode) and info.st_rdev in numbers:
                process = link.parent.parent
                if linux.is_writing(link):
                    found.add(f"{(process / 'comm').read_text().strip()} ({process.name})")
    for text in sorted(found):
        yield Holder(text, True)


def _backing(node: Node, backing: Path) -> Iterator[Holder]:
    """Who else writes to the file behind a loop device."""
    with contextlib.suppress(OSError):
        ours = node.directory.parent.name if node.read("partition") else node.name
        for device in linux.loop_devices_over(backing):
            if device != f"/dev/{ours}":
                yield Holder(f"{device} (loop device over the same file)", True)
        for process in linux.writers_of(backing):
            yield Holder(f"{process} writes to {backing}", True)


def holders_of(node: Node, backing: Path | None = None) -> list[Holder]:
    """Everybody else who uses a device, its partitions or its disk, as far as this user may look; `backing` is the file
    behind a loop device. What the kernel itself exports (iSCSI and NVMe targets, ZFS) is not in any list: opening with
    O_EXCL tells that there is somebody."""
    nodes = node.related()
    found = [*_mounts(nodes), *_kernel(nodes), *_swaps(nodes), *_loops(nodes), *_processes(nodes)]
    if backing is not None:
        found += _backing(node, backing)
    return found


def is_claimed(node_path: Path) -> bool:
    """Whether somebody has claimed the device for himself (open(2), O_EXCL: a mounted file system, swap, a device made
    of it). For an instant the claim is ours: whoever mounts it just then is refused."""
    try:
        fd = os.open(node_path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)
    except OSError as error:
        return error.errno == errno.EBUSY
    os.close(fd)
    return False
