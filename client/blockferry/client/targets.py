"""Where a snapshot is restored to: an image, a block device or an NBD export that nobody else uses.

A new image has another name until it is complete, so that nobody boots half of one.
"""

from __future__ import annotations

import fcntl
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from blockferry.common import disk
from blockferry.common.address import is_address
from blockferry.common.archive.store import is_store_uri
from blockferry.common.durable import rename_durably
from blockferry.common.errors import BlockferryError, Code, from_os_error
from blockferry.common.nbd.uri import is_nbd_uri
from blockferry.common.settings import Tls
from blockferry.common.volumes import DeviceVolume, ImageVolume, NbdVolume, Volume, in_thread

PARTIAL = ".partial"
"""Ends the name of an image that is not complete."""


@dataclass
class Target:
    """A volume open for writing, and which device it is: the same string whenever the same one is opened again."""

    uri: str
    volume: Volume
    identity: str
    final: Path | None = None
    """The name that the image gets at last."""
    lock: int = -1

    async def finish(self) -> None:
        """Make what was written durable, and give an image its name."""
        await self.volume.flush()
        disk.crash_point("restore-flushed")
        if self.final is not None:
            try:
                await in_thread(rename_durably, self.final.with_name(self.final.name + PARTIAL), self.final)
            except OSError as error:
                raise from_os_error(error, f"cannot name {self.final}", volume=self.uri) from error

    async def close(self) -> None:
        """Let go of it."""
        await self.volume.close()
        lock, self.lock = self.lock, -1
        if lock >= 0:
            os.close(lock)


async def open_target(uri: str, size: int, *, insecure: bool = False, tls: Tls | None = None) -> Target:
    """Open what `uri` names for a restore of `size` bytes; an image that is not there is made.

    Raises INVALID_ARGUMENT (no target of this kind), IN_USE (mounted, open elsewhere, another restore), SIZE_MISMATCH
    (too small), and whatever opening it for writing raises. Nothing that was there before is changed.
    """
    if is_address(uri) or (is_store_uri(uri) and not uri.startswith("file:")) or "#" in uri.partition("://")[2]:
        raise BlockferryError(
            Code.INVALID_ARGUMENT,
            f"{uri} is no target of a restore",
            cause="that is an image, a block device or an NBD export",
            next="a replica is made from a snapshot by blockferry sync",
        )
    if is_nbd_uri(uri):
        volume: Volume = await NbdVolume.open(uri, writable=True, insecure=insecure, files=tls)
        target = Target(uri, volume, f"nbd:{uri}")
    else:
        target = await _open_path(
            uri, Path(unquote(urlsplit(uri).path)) if uri.startswith("file://") else Path(uri), size
        )
    if target.volume.size < size:
        await target.close()
        raise BlockferryError(
            Code.SIZE_MISMATCH,
            f"{uri} is too small",
            cause=f"it has {target.volume.size} bytes and the snapshot has {size}",
            next="name a larger one, or an image that does not exist yet",
            volume=uri,
            expected=str(size),
            found=str(target.volume.size),
        )
    return target


async def _open_path(uri: str, path: Path, size: int) -> Target:
    try:
        info = await in_thread(os.stat, path)
    except FileNotFoundError:
        info = None
    except (OSError, ValueError) as error:
        raise from_os_error(
            error if isinstance(error, OSError) else OSError(str(error)), f"cannot open {uri}"
        ) from error
    if info is not None and stat.S_ISBLK(info.st_mode):
        device = await DeviceVolume.open(path, writable=True)
        return Target(uri, device, f"device:{device.identity or await in_thread(os.path.realpath, path)}")
    if info is None or (stat.S_ISREG(info.st_mode) and info.st_size == 0):
        # One that is there and empty was made as a place for the image: it is replaced by the complete one.
        partial = path.with_name(path.name + PARTIAL)
        if await in_thread(partial.exists):
            await _refuse_in_use(partial)
        return await _image(uri, await ImageVolume.create(partial, size), path)
    await _refuse_in_use(path)
    return await _image(uri, await ImageVolume.open(path, writable=True), None)


async def _refuse_in_use(path: Path) -> None:
    """Invariant 4, one writer: whoever has the image open for writing comes first."""
    reader = await ImageVolume.open(path)
    try:
        found = await reader.holders()
    finally:
        await reader.close()
    if found:
        raise _in_use(path, ", ".join(found))


async def _image(uri: str, volume: ImageVolume, final: Path | None) -> Target:
    lock = -1
    try:
        lock = os.open(volume.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _in_use(volume.path, "another restore is writing it") from error
        info = os.fstat(lock)
        return Target(uri, volume, f"image:{info.st_dev}:{info.st_ino}", final, lock)
    except BaseException:
        await volume.close()
        if lock >= 0:
            os.close(lock)
        raise


def _in_use(path: Path, cause: str) -> BlockferryError:
    return BlockferryError(
        Code.IN_USE,
        f"{path} is in use",
        cause=cause,
        next="stop what uses it, and check that this is the right file",
        volume=str(path),
    )
