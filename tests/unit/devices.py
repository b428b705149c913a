"""A device that is only a file, so that journals in front of it can be tested without any: it has a size of its own,
holds something before anybody writes to it, and can be another one or gone."""

from __future__ import annotations

from pathlib import Path

from blockferry.common.volumes import ImageVolume, Volume
from blockferry.server.devices import DeviceSpec
from blockferry.server.external import ExternalBase
from blockferry.server.store import Store

from tests.unit.layers import B
from tests.unit.stores import REGION

GARBAGE = b"somebody else's bytes, which are never zeros. "
CAPACITY = 50 * B
"""Bytes of a device: more than any generation of journals.py has."""


class FileBase(ExternalBase):
    """The file `spec.uri`; what tells it from others is its inode."""

    opened_times = 0

    @property
    def path(self) -> Path:
        return Path(self.spec.uri)

    async def _open(self) -> Volume:
        self.opened_times += 1
        return await ImageVolume.open(self.path, writable=True)

    async def _is_lost(self, volume: Volume) -> bool:
        return not self.path.exists() or self.path.stat().st_size != volume.size

    def _identity(self, volume: Volume) -> str:
        return f"inode:{self.path.stat().st_ino}"

    def _let_go(self, volume: Volume) -> None:
        assert isinstance(volume, ImageVolume)
        volume.let_go()

    def forget_pages(self) -> None:
        return


def garbage(size: int) -> bytes:
    return (GARBAGE * (size // len(GARBAGE) + 1))[:size]


def make_device(path: Path, size: int = CAPACITY) -> Path:
    path.write_bytes(garbage(size))
    return path


def base_of(device: Path, directory: Path) -> FileBase:
    """The base of the replica in `directory`."""
    return FileBase(DeviceSpec(directory.name, str(device), directory.parent), directory)


def on_device(device: Path, directory: Path) -> Store:
    """The replica in `directory`, made if need be."""
    base = base_of(device, directory)
    if directory.exists():
        return Store(directory, clones=False, base=base)
    return Store.create(directory, REGION, clones=False, base=base)


def external(store: Store) -> FileBase:
    base = getattr(store.content, "base", None)
    assert isinstance(base, FileBase)
    return base
