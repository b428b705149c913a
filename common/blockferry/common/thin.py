"""Which parts of an LVM thin volume hold data, by what thin_dump(8) says of its pool's metadata (pure).

Sources: thin_dump(8), thin-provisioning-tools doc/thinp-xml.txt, kernel Documentation/admin-guide/device-mapper/
thin-provisioning.rst. What a thin volume has never written, or has discarded as whole pool blocks, is not mapped and
reads as zeros, unless the volume has an external origin: then it reads as that.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from xml.parsers import expat

from blockferry.common.errors import BlockferryError, Code

SECTOR = 512
"""Bytes of device-mapper's sectors."""

_MIN_BLOCK, _MAX_BLOCK = 128, 2097152
"""Sectors of a pool's data block: 64 KiB to 1 GiB, a multiple of 64 KiB."""

Extent = tuple[int, int]
"""(offset, length) in bytes"""


@dataclass(frozen=True)
class ThinTable:
    """A thin volume as `dmsetup table` shows it."""

    size: int
    """Bytes."""
    device_id: int
    """Its number in the pool's metadata."""


def parse_table(line: str) -> ThinTable:
    """From `START SECTORS thin POOL DEVICE-ID [EXTERNAL-ORIGIN]`.

    Raises UNSUPPORTED for a volume with an external origin: what is not mapped reads as that and not as zeros. The
    metadata does not tell; only the table does. Raises INVALID_ARGUMENT for anything else.
    """
    words = line.split()
    if words and words[0].endswith(":"):
        # `dmsetup table` without a name puts the name first.
        words = words[1:]
    if len(words) not in (5, 6) or words[0] != "0" or words[2] != "thin" or not (words[1] + words[4]).isdecimal():
        raise BlockferryError(
            Code.INVALID_ARGUMENT,
            "the table is not that of a thin volume",
            cause=f"it says {line.strip()[:80]!r}",
            next="give the one line that dmsetup table prints for the volume",
        )
    if len(words) == 6:
        raise BlockferryError(
            Code.UNSUPPORTED,
            "nothing can be proven about a thin volume with an external origin",
            cause=f"what it has not written reads as {words[5]}",
            next="leave its map out: then everything counts as allocated",
        )
    return ThinTable(int(words[1]) * SECTOR, int(words[4]))


def _unusable(cause: str) -> BlockferryError:
    return BlockferryError(
        Code.INVALID_ARGUMENT,
        "the thin_dump is not usable",
        cause=cause,
        next="make it again with thin_dump from a metadata snapshot of the pool",
    )


@dataclass
class _Dump:
    """What has been read so far. Mappings are (first block, blocks) of the volume."""

    device_id: int
    block: int = 0
    names: dict[str, list[Extent]] = field(default_factory=dict)
    """Mappings that several devices share: `<def name=...>`, used by `<ref name=...>`."""
    found: list[Extent] | None = None
    promised: int = 0
    into: list[Extent] | None = None
    """Where mappings go now; None outside of devices and definitions, and in other devices."""
    depth: list[str] = field(default_factory=list)
    complete: bool = False

    def start(self, name: str, given: dict[str, str]) -> None:
        above = self.depth[-1] if self.depth else ""
        self.depth.append(name)
        match above, name:
            case "", "superblock":
                self.block = _attribute(given, "data_block_size")
                if not _MIN_BLOCK <= self.block <= _MAX_BLOCK or self.block % _MIN_BLOCK:
                    raise _unusable(f"data_block_size {self.block} is not possible")
            case "superblock", "def":
                self.into = self.names.setdefault(given.get("name", ""), [])
            case "superblock", "device":
                self._device(given)
            case "device" | "def", "single_mapping":
                self._map(_attribute(given, "origin_block"), 1)
            case "device" | "def", "range_mapping":
                self._map(_attribute(given, "origin_begin"), _attribute(given, "length"))
            case "device" | "def", "ref":
                shared = self.names.get(given.get("name", ""))
                if shared is None:
                    raise _unusable(f"it refers to {given.get('name')!r}, which it does not define")
                if self.into is not None:
                    self.into += shared
            case _:
                # Whatever this is may be data: nothing is guessed.
                raise _unusable(f"it has <{name}> in <{above}>, which is not known")

    def _device(self, given: dict[str, str]) -> None:
        self.into = None
        if _attribute(given, "dev_id") == self.device_id:
            if self.found is not None:
                raise _unusable(f"it has device {self.device_id} twice")
            self.found = self.into = []
            self.promised = _attribute(given, "mapped_blocks")

    def _map(self, first: int, count: int) -> None:
        if self.into is None:
            return
        if self.into and sum(self.into[-1]) == first:
            # Written in order, fragmented in the pool: one extent to us.
            first, count = self.into[-1][0], self.into.pop()[1] + count
        self.into.append((first, count))

    def end(self, name: str) -> None:
        self.depth.pop()
        if name in ("device", "def"):
            self.into = None
        self.complete = name == "superblock"


def _attribute(given: dict[str, str], name: str) -> int:
    text = given.get(name, "")
    if not (text.isascii() and text.isdigit()) or len(text) > 18:
        raise _unusable(f"{name} is {text[:40]!r} and not a number")
    return int(text)


def parse_dump(parts: Iterable[bytes], device_id: int) -> list[Extent]:
    """(offset, length) in bytes of everything that is mapped of one device, ascending, from the XML of thin_dump(8).

    Costs as many extents as the device has, whatever else is in the pool. Raises INVALID_ARGUMENT for a dump that is
    cut off, broken, or does not add up, and NOT_FOUND if it does not have the device.
    """
    dump = _Dump(device_id)
    parser = expat.ParserCreate()
    parser.StartElementHandler = dump.start
    parser.EndElementHandler = dump.end

    def declared(*_: object) -> None:
        raise _unusable("it declares entities")

    parser.EntityDeclHandler = declared
    try:
        for part in parts:
            parser.Parse(part, False)
        parser.Parse(b"", True)
    except expat.ExpatError as error:
        raise _unusable(str(error)) from error
    if not dump.complete:
        raise _unusable("it ends before its superblock does")
    if dump.found is None:
        raise BlockferryError(
            Code.NOT_FOUND,
            f"the thin_dump has no device {device_id}",
            next="dump the metadata of the volume's own pool, after the volume was made",
        )
    ordered = sorted(dump.found)
    blocks, end = 0, 0
    for first, count in ordered:
        if first < end:
            raise _unusable(f"device {device_id} has block {first} twice")
        blocks, end = blocks + count, first + count
    if blocks != dump.promised:
        raise _unusable(f"device {device_id} has {dump.promised} blocks, and mappings of {blocks}")
    size = dump.block * SECTOR
    return [(first * size, count * size) for first, count in ordered]
