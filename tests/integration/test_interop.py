"""What others make is what arrives: every image format that is claimed, by `qemu-img compare` of the source with the
replica's image; images that a running daemon offers; holes that promise nothing; and large maps."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.nbd.protocol import Command
from blockferry.common.regions import Provenance
from blockferry.common.volumes import NbdVolume

from tests.images import BLOCK, KIB, MIB, build, noise
from tests.library import differences, replica_image, synced
from tests.nbd import nbdkit, qemu_img, qemu_io, qemu_nbd, storage_daemon
from tests.support import Report, Server, ok

SIZE = 16 * MIB


@dataclass(frozen=True)
class Format:
    """An image format of QEMU's and how an image of it is made."""

    driver: str
    options: tuple[str, ...] = ()
    """Of qemu-img convert."""
    secret: bool = False
    """It is encrypted."""

    def words(self, path: Path) -> list[str]:
        """How qemu-img and qemu-nbd are told to open it."""
        if not self.secret:
            return [f"driver={self.driver},file.filename={path}"]
        return [f"driver={self.driver},encrypt.key-secret=key,file.filename={path}"]

    @property
    def key(self) -> list[str]:
        return ["--object", "secret,id=key,data=correct horse"] if self.secret else []


FORMATS = {
    "raw": Format("raw"),
    "qcow2": Format("qcow2"),
    "qcow2, compressed": Format("qcow2", ("-c",)),
    "qcow2, zstd": Format("qcow2", ("-c", "-o", "compression_type=zstd")),
    "qcow2, extended clusters": Format("qcow2", ("-o", "extended_l2=on,cluster_size=128k")),
    "qcow2, luks": Format(
        "qcow2", ("-o", "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10"), secret=True
    ),
    "vmdk": Format("vmdk"),
    "vmdk, streamOptimized": Format("vmdk", ("-o", "subformat=streamOptimized")),
    "vhdx": Format("vhdx"),
    "vdi": Format("vdi"),
}

PIECES = [
    (0, noise("first", 4 * KIB)),
    (3 * MIB, noise("whole", 2 * MIB)),
    (7 * MIB + 12345, noise("odd", 54321)),
    (SIZE - BLOCK, noise("last", BLOCK)),
]
CHANGED = (4 * MIB + BLOCK, noise("changed", BLOCK))


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
async def test_an_image_of_every_format_becomes_a_replica(
    server: Server, volume: str, tmp_path: Path, format: Format
) -> None:
    raw = build(tmp_path / "raw", SIZE, PIECES)
    first, second = tmp_path / "first", tmp_path / "second"

    def convert(target: Path) -> None:
        words = ("convert", *format.key, "-f", "raw", "-O", format.driver, *format.options, raw, target)
        for attempt in range(5):
            try:
                qemu_img(*words)
            except AssertionError as error:
                # To choose a number of iterations LUKS takes the time of some, which a busy machine may foil.
                if "accurate CPU usage" not in str(error) or attempt == 4:
                    raise
            else:
                return

    def compare(image: Path) -> None:
        words = ["--image-opts", *format.words(image), f"driver=raw,file.filename={replica_image(server, volume)}"]
        assert "identical" in qemu_img("compare", *format.key, *words)

    @contextlib.asynccontextmanager
    async def exported(image: Path) -> AsyncIterator[NbdVolume]:
        with qemu_nbd(tmp_path, "--read-only", *format.key, "--image-opts", *format.words(image)) as served:
            source = await NbdVolume.open(served.uri)
            try:
                yield source
            finally:
                await source.close()

    convert(first)
    async with exported(first) as source:
        report = await synced(source, server, volume, tmp_path / "state")
        assert (report["source_map"], report["volume_size"]) == ("exact", SIZE)
        # Blocks with data, whatever the clusters that hold them are filled up with.
        assert report["bytes"]["data_sent"] == BLOCK + 2 * MIB + 14 * BLOCK + BLOCK
        again = await synced(source, server, volume, tmp_path / "state")
        assert again["results"]["changed"] == again["bytes"]["data_sent"] == 0
        assert await differences(source, server, volume) == []
    compare(first)
    build(raw, SIZE, [*PIECES, CHANGED])
    convert(second)
    async with exported(second) as source:
        assert (await synced(source, server, volume, tmp_path / "state"))["bytes"]["data_sent"] == BLOCK
    compare(second)


# --- a daemon at work -------------------------------------------------------------------------------------------------


def test_an_image_that_a_storage_daemon_offers(server: Server, volume: str, tmp_path: Path) -> None:
    base, disk = tmp_path / "base.qcow2", tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", base, SIZE)
    qemu_io(base, "write -P 0x11 0 2M", "write -P 0x22 8M 64k")
    qemu_img("snapshot", "-c", "before", base)
    qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", disk)
    qemu_io(disk, "write -P 0x33 1M 64k", "write -z 8M 64k", "write -P 0x44 15M 1M")
    with storage_daemon(tmp_path, disk) as served:
        shown = ok("volume", "show", served.uri)
        assert (shown["size"], shown["map"], shown["zeroing"]) == (SIZE, "exact", "read-only")
        report = ok("sync", served.uri, server.url(volume))
        # Data of both images; what the upper one has zeroed is zero.
        assert report["regions"] == {"skip": 13, "unmap": 0, "send": 3, "compare": 0}
        assert report["bytes"]["data_sent"] == report["bytes"]["source_read"] == 3 * MIB
        assert ok("verify", served.uri, server.url(volume))["outcome"] == "equal"
    assert "identical" in qemu_img("compare", "-f", "raw", "-F", "qcow2", server.image(volume), disk)


async def test_writing_through_a_storage_daemon(tmp_path: Path) -> None:
    disk = tmp_path / "disk.qcow2"
    old, new = b"\x11" * MIB, [(MIB, noise("new", MIB)), (8 * MIB + BLOCK, noise("block", BLOCK))]
    qemu_img("create", "-q", "-f", "qcow2", disk, SIZE)
    qemu_io(disk, "write -P 0x11 0 4M")
    with storage_daemon(tmp_path, disk, writable=True) as served:
        volume = await NbdVolume.open(served.uri, writable=True)
        try:
            await volume.write(new)
            assert await volume.unmap([(2 * MIB, MIB)]) == MIB
            await volume.flush()
            found = await volume.allocation(MIB)
            assert (found.provenance, list(found.regions)) == (Provenance.EXACT, [0, 1, 3, 8])
        finally:
            await volume.close()
    expected = build(tmp_path / "expected", SIZE, [(0, old), (3 * MIB, old), *new])
    assert "identical" in qemu_img("compare", "-f", "raw", "-F", "qcow2", expected, disk)
    assert "No errors" in qemu_img("check", disk)


async def test_an_image_that_was_resized(server: Server, volume: str, tmp_path: Path) -> None:
    disk = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", disk, SIZE)
    qemu_io(disk, "write -P 0x11 15M 1M")

    async def sync_it(*, grow: bool = False) -> Report:
        with qemu_nbd(tmp_path, "--read-only", "-f", "qcow2", disk) as served:
            source = await NbdVolume.open(served.uri)
            try:
                return await synced(source, server, volume, tmp_path / "state", grow=grow)
            finally:
                await source.close()

    await sync_it()
    larger = SIZE + 2 * MIB + 512
    qemu_img("resize", "-q", disk, larger)
    qemu_io(disk, f"write -P 0x22 {larger - 1024} 1024")
    with pytest.raises(BlockferryError) as caught:
        await sync_it()
    assert (caught.value.code, caught.value.expected, caught.value.found) == (
        Code.SIZE_MISMATCH,
        str(SIZE),
        str(larger),
    )
    assert "--grow" in caught.value.next
    report = await sync_it(grow=True)
    assert report["regions"] == {"skip": 16, "unmap": 0, "send": 2, "compare": 1}
    # The two blocks at the end, of which the last one is short.
    assert report["bytes"]["data_sent"] == BLOCK + 512
    assert "identical" in qemu_img("compare", "-f", "raw", "-F", "qcow2", replica_image(server, volume), disk)


# --- holes that prove nothing -----------------------------------------------------------------------------------------


def test_a_hole_that_is_not_said_to_be_zero_is_read(server: Server, volume: str, tmp_path: Path) -> None:
    """What a thin device may answer: deallocated, and whatever was there before is read."""
    plugin = [
        "eval",
        "get_size=echo 4194304",
        "pread=head -c $3 /dev/zero | tr '\\0' x",
        "can_extents=exit 0",
        "extents=echo 0 2M hole; echo 2M 1M hole,zero; echo 3M 1M zero",
    ]
    with nbdkit(tmp_path, *plugin) as served:
        report = ok("sync", served.uri, server.url(volume))
        assert report["regions"] == {"skip": 2, "unmap": 0, "send": 2, "compare": 0}
        assert report["results"] == {"zero": 0, "equal": 0, "changed": 2}
        assert ok("verify", served.uri, server.url(volume))["outcome"] == "equal"
    assert server.image(volume).read_bytes() == b"x" * 2 * MIB + bytes(2 * MIB)


# --- large maps -------------------------------------------------------------------------------------------------------

MOST_SECONDS = 1.0
"""For the map of an empty 1 TiB qcow2: what docs/volumes.md promises, some twenty times what it takes."""


async def test_the_map_of_an_empty_tebibyte(tmp_path: Path) -> None:
    """A request per 4 GiB, which is as much as one can ask about."""
    path = tmp_path / "large.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "1T")
    with qemu_nbd(tmp_path, "--read-only", "-f", "qcow2", path) as served:
        volume = await NbdVolume.open(served.uri)
        try:
            started = time.monotonic()
            found = await volume.allocation(MIB)
            seconds = time.monotonic() - started
            assert (found.provenance, list(found.regions)) == (Provenance.EXACT, [])
            assert volume._client.sent == {Command.BLOCK_STATUS: 257}
        finally:
            await volume.close()
    assert seconds < MOST_SECONDS
