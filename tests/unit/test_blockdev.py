"""What the kernel says about devices is understood: numbers, partitions, identities, loop devices, mounts, swap."""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path

import pytest
from blockferry.common import disk, linux
from blockferry.common.blockdev import (
    Limits,
    LoopStatus,
    Node,
    backing_file,
    identity,
    loop_status,
    parse_loop_status,
)
from blockferry.common.holders import Mount, parse_mountinfo, parse_swaps
from blockferry.common.linux import Zeroing
from blockferry.common.volumes.zeroing import DeviceZeroing
from hypothesis import given
from hypothesis import strategies as st


class Tree:
    """A sysfs and a /dev in a directory."""

    def __init__(self, root: Path) -> None:
        self.sys, self.dev = root / "sys", root / "dev"

    def add(self, name: str, number: str, **attributes: str) -> Node:
        """A device or, below one, a partition (`sda/sda1`); attribute names have `__` for a slash."""
        directory = self.sys / "devices" / name
        for key, text in {"dev": number, **attributes}.items():
            path = directory / key.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n")
        (self.sys / "dev/block").mkdir(parents=True, exist_ok=True)
        (self.sys / "dev/block" / number).symlink_to(directory)
        major, minor = map(int, number.split(":"))
        return Node(os.makedev(major, minor), self.sys, self.dev)

    def link(self, kind: str, link: str, name: str) -> None:
        """A link of udev."""
        directory = self.dev / "disk" / kind
        directory.mkdir(parents=True, exist_ok=True)
        (self.dev / name).touch()
        (directory / link).symlink_to(f"../../{name}")


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


# --- nodes ------------------------------------------------------------------------------------------------------------


def test_a_disk_and_its_partitions_are_related_and_siblings_are_not(tree: Tree) -> None:
    disk_node = tree.add("sda", "8:0")
    one = tree.add("sda/sda1", "8:1", partition="1", start="2048")
    two = tree.add("sda/sda2", "259:7", partition="2", start="4096")
    assert (disk_node.name, disk_node.label, disk_node.start) == ("sda", "8:0", 0)
    assert (one.name, one.start, two.label) == ("sda1", 2048 * 512, "259:7")
    assert disk_node.related() == [disk_node, one, two]
    assert one.related() == [one, disk_node]


def test_a_device_that_is_gone_has_nothing(tree: Tree) -> None:
    gone = Node(os.makedev(8, 3), tree.sys, tree.dev)
    assert (gone.read("size"), gone.start, gone.related(), identity(gone)) == ("", 0, [gone], "")


@pytest.mark.parametrize(
    ("attributes", "links", "expected"),
    [
        ({"wwid": "eui.0025"}, ["wwn-0x1"], "wwid:eui.0025"),
        ({"device__wwid": "naa.5000", "device__serial": "S"}, [], "wwid:naa.5000"),
        ({"dm__uuid": "LVM-abc", "dm__name": "vg-lv"}, [], "dm:LVM-abc"),
        ({"serial": "S1"}, ["scsi-1", "wwn-0x2", "ata-3", "zebra"], "id:wwn-0x2"),
        ({"serial": "S1"}, ["zebra", "ata-3", "virtio-4"], "id:virtio-4"),
        ({"serial": "S1"}, [], "serial:S1"),
        ({"device__serial": "S2"}, [], "serial:S2"),
        ({}, [], ""),
    ],
)
def test_the_identity_of_a_disk_is_what_changes_least(
    tree: Tree, attributes: dict[str, str], links: list[str], expected: str
) -> None:
    tree.link("by-id", "wwn-another", "sdb")
    for link in links:
        tree.link("by-id", link, "sda")
    assert identity(tree.add("sda", "8:0", **attributes)) == expected


def test_the_identity_of_a_partition_is_its_own(tree: Tree) -> None:
    tree.add("sda", "8:0", wwid="naa.1")
    one = tree.add("sda/sda1", "8:1", partition="1", uevent="MAJOR=8\nPARTUUID=4a-01\nPARTN=1")
    two = tree.add("sda/sda2", "8:2", partition="2")
    three = tree.add("sda/sda3", "8:3", partition="3")
    tree.link("by-partuuid", "4a-02", "sda2")
    assert [identity(node) for node in (one, two, three)] == ["partuuid:4a-01", "partuuid:4a-02", ""]


@pytest.mark.parametrize(
    ("limits", "preferred"),
    [((512, 4096, 4096, 0), 4096), ((512, 512, 65536, 262144), 262144), ((512, 512, 512, 0), 512)],
)
def test_the_preferred_size_is_the_largest_that_is_said(limits: tuple[int, int, int, int], preferred: int) -> None:
    assert Limits(*limits).preferred == preferred


# --- loop devices -----------------------------------------------------------------------------------------------------


@given(st.integers(0, 0xFFF), st.integers(0, 0xFFFFF), st.integers(0, 2**64 - 1), st.integers(0, 2**63))
def test_the_backing_file_is_named_as_stat_names_it(major: int, minor: int, inode: int, offset: int) -> None:
    encoded = (minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12)
    data = struct.pack("=QQQQQIIII64s64s32sQQ", encoded, inode, 0, offset, 4096, 3, 0, 0, 5, b"/x", b"", b"", 0, 0)
    assert parse_loop_status(data) == LoopStatus(os.makedev(major, minor), inode, offset, 4096, False)
    assert parse_loop_status(data[:44] + b"\x12" + data[45:]).transformed


def test_what_answers_for_a_loop_device_below_it_is_none_itself(
    tree: Tree, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Device-mapper passes the ioctl on: its answer has the offset of another device."""
    (tmp_path / "backing").touch()
    info = (tmp_path / "backing").stat()
    encoded = (os.minor(info.st_dev) & 0xFF) | (os.major(info.st_dev) << 8) | ((os.minor(info.st_dev) & ~0xFF) << 12)

    def ioctl(fd: int, request: int, buffer: bytearray) -> int:
        struct.pack_into("=QQ", buffer, 0, encoded, info.st_ino)
        return 0

    monkeypatch.setattr("fcntl.ioctl", ioctl)
    backing = str(tmp_path / "backing")
    loop = tree.add("loop3", "7:3", loop__backing_file=backing)
    part = tree.add("loop3/loop3p1", "259:1", partition="1", start="8")
    mapped = tree.add("dm-0", "254:0", dm__name="linear")
    assert loop_status(0, loop) == loop_status(0, part) == LoopStatus(info.st_dev, info.st_ino, 0, 0, False)
    assert backing_file(0, loop) == backing_file(0, part) == tmp_path / "backing"
    assert (loop_status(0, mapped), backing_file(0, mapped)) == (None, None)
    # Another file has the name now.
    (tmp_path / "backing").rename(tmp_path / "moved")
    assert backing_file(0, loop) is None
    (tmp_path / "backing").touch()
    assert backing_file(0, loop) is None


# --- zeroing ----------------------------------------------------------------------------------------------------------

Call = tuple[str, int, int]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """(name, offset, length) of everything that would change a device."""
    found: list[Call] = []

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        assert not any(data)
        found.append(("write", offset, len(data)))
        return len(data)

    def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
        assert mode == 0x03
        found.append(("punch", offset, length))

    monkeypatch.setattr(disk, "pwrite", pwrite)
    monkeypatch.setattr(disk, "zero_out", lambda fd, offset, length: found.append(("zero-out", offset, length)))
    monkeypatch.setattr(linux, "fallocate", fallocate)
    return found


def refuse(monkeypatch: pytest.MonkeyPatch, target: object, name: str, number: int, calls: list[Call]) -> None:
    def fail(*arguments: int) -> None:
        calls.append((f"{name} refused", arguments[-2], arguments[-1]))
        raise OSError(number, "injected")

    monkeypatch.setattr(target, name, fail)


@pytest.mark.parametrize(
    ("offset", "length", "expected"),
    [
        (0, 4096, [("punch", 0, 4096)]),
        (512, 512, [("punch", 512, 512)]),
        (100, 1000, [("write", 100, 412), ("punch", 512, 512), ("write", 1024, 76)]),
        (1, 511, [("write", 1, 511)]),
        (511, 2, [("write", 511, 2)]),
        (0, 513, [("punch", 0, 512), ("write", 512, 1)]),
    ],
)
def test_whole_sectors_are_punched_and_edges_written(
    calls: list[Call], offset: int, length: int, expected: list[Call]
) -> None:
    DeviceZeroing(512).zero(0, offset, length)
    assert calls == expected


@given(st.sampled_from([512, 4096]), st.integers(0, 3 * 2**20), st.integers(1, 3 * 2**20))
def test_any_range_is_zeroed_once(sector: int, offset: int, length: int) -> None:
    found: list[Call] = []

    def pwrite(fd: int, data: memoryview, at: int) -> int:
        found.append(("write", at, len(data)))
        return len(data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk, "pwrite", pwrite)
        patch.setattr(linux, "fallocate", lambda fd, mode, at, count: found.append(("punch", at, count)))
        DeviceZeroing(sector).zero(0, offset, length)
    position = offset
    for name, at, count in found:
        assert at == position and count > 0
        assert name == "write" or (at % sector == count % sector == 0)
        assert name == "punch" or count < sector or len(found) == 1
        position += count
    assert position == offset + length


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENODEV, errno.ENOTTY], ids=errno.errorcode.get)
def test_the_ladder_is_stepped_down_once_and_for_all(
    calls: list[Call], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    zeroing = DeviceZeroing(512)
    refuse(monkeypatch, linux, "fallocate", number, calls)
    zeroing.zero(0, 0, 1024)
    zeroing.zero(0, 2048, 512)
    assert calls == [("fallocate refused", 0, 1024), ("zero-out", 0, 1024), ("zero-out", 2048, 512)]
    assert zeroing.method.value == "zero-out"
    calls.clear()
    refuse(monkeypatch, disk, "zero_out", number, calls)
    zeroing.zero(0, 0, 3 * 2**20)
    zeroing.zero(0, 0, 512)
    pieces = [("write", start, 2**20) for start in range(0, 3 * 2**20, 2**20)]
    assert calls == [("zero_out refused", 0, 3 * 2**20), *pieces, ("write", 0, 512)]
    assert zeroing.method.value == "write"


def test_punching_alone_changes_nothing_where_it_is_refused(calls: list[Call], monkeypatch: pytest.MonkeyPatch) -> None:
    zeroing = DeviceZeroing(512)
    assert zeroing.punch(0, 0, 512)
    refuse(monkeypatch, linux, "fallocate", errno.EOPNOTSUPP, calls)
    assert not zeroing.punch(0, 0, 512)
    assert not zeroing.punch(0, 0, 512)
    assert calls == [("punch", 0, 512), ("fallocate refused", 0, 512)]


@pytest.mark.parametrize(("target", "name"), [(linux, "fallocate"), (disk, "zero_out")])
def test_a_failing_device_is_no_reason_to_step_down(
    calls: list[Call], monkeypatch: pytest.MonkeyPatch, target: object, name: str
) -> None:
    zeroing = DeviceZeroing(512)
    if name == "zero_out":
        zeroing.method = Zeroing.ZERO_OUT
    method = zeroing.method
    refuse(monkeypatch, target, name, errno.EIO, calls)
    with pytest.raises(OSError, match="injected"):
        zeroing.zero(0, 0, 512)
    assert (zeroing.method, [call for call in calls if call[0] == "write"]) == (method, [])


# --- mounts and swap --------------------------------------------------------------------------------------------------

MOUNTINFO = r"""22 1 254:1 / / rw,relatime shared:1 - ext4 /dev/root rw,discard
36 22 8:1 / /mnt/with\040space rw,noatime master:1 - ext4 /dev/sda1 ro,errors=continue
37 22 8:2 /sub /ro ro,relatime - xfs /dev/sda2 rw
38 22 0:45 / /btrfs rw - btrfs /dev/sdb rw,space_cache=v2
39 22 0:5 / /odd\134name rw shared:2 propagate_from:3 - tmpfs tmp\011fs rw
broken line
40 22 8:3 / /short rw - ext4
"""


def test_mounts_are_read_with_their_names_and_whether_the_file_system_may_write() -> None:
    assert parse_mountinfo(MOUNTINFO) == [
        Mount("254:1", "/dev/root", "/", False),
        Mount("8:1", "/dev/sda1", "/mnt/with space", True),
        Mount("8:2", "/dev/sda2", "/ro", False),
        Mount("0:45", "/dev/sdb", "/btrfs", False),
        Mount("0:5", "tmp\tfs", "/odd\\name", False),
    ]


def test_swaps_are_read_with_their_names() -> None:
    text = "Filename\t\t\tType\t\tSize\tUsed\tPriority\n/dev/sda2  partition\t1\t0\t-2\n/a\\040b  file 1 0 -3\n"
    assert parse_swaps(text) == ["/dev/sda2", "/a b"]
    assert parse_swaps("Filename Type\n") == parse_swaps("") == []
