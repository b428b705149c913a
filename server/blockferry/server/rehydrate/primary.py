"""The primary: a raw image that is made here, or a block device or NBD export that is named and empty.

A new image has its final name only once its map exists, bound to it:

    PRIMARY.new, durable ──▶ map in --state, bound to that very file ──▶ renamed to PRIMARY

A process that dies in between is followed by one that begins anew (no map), or that renames (the map's file is there
under its first name). Which file it is, its inode and its time of birth say: both stay whatever it is called, and
whatever number its device gets at the next boot; a copy has others.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from blockferry.common import disk, linux
from blockferry.common.errors import BlockferryError, Code, from_os_error
from blockferry.common.nbd.uri import is_nbd_uri
from blockferry.common.regions import DEFAULT_REGION_SIZE, Provenance
from blockferry.common.volumes import DeviceVolume, ImageVolume, NbdVolume, Volume, in_thread
from blockferry.server.external import Window
from blockferry.server.rehydrate.map import Binding

NEW = ".new"


@dataclass(frozen=True)
class Primary:
    """One that is open for writing. `fresh`: all of it reads as zeros, as far as it is not hydrated."""

    volume: Volume
    identity: str
    fresh: bool = False


def file_identity(fd: int) -> str:
    """What stays the same of a file."""
    return f"file:{os.fstat(fd).st_ino}:{linux.birth_ns(fd)}"


def is_external(uri: str) -> bool:
    """Whether it is somebody else's, which is neither made nor renamed here. What is not there (any more) is never made
    among the devices. Looks at the file system."""
    path = Path(uri)
    among_devices = uri.startswith("/dev/") and not uri.startswith("/dev/shm/")  # noqa: S108 it is asked about
    return is_nbd_uri(uri) or path.is_block_device() or (among_devices and not path.exists())


# --- images -----------------------------------------------------------------------------------------------------------


async def make_image(path: Path, size: int, *, overwrite: bool) -> str:
    """Make the file of a new image beside its final name; its identity. Raises WRONG_STATE where there is an image
    already."""
    return await in_thread(_make_image, path, size, overwrite)


def _make_image(path: Path, size: int, overwrite: bool) -> str:
    if path.exists() and not overwrite:
        raise BlockferryError(
            Code.WRONG_STATE,
            f"{path} exists already",
            cause="and --state has no map that says what of it is hydrated",
            next="name the --state that belongs to it, or another primary, or say --overwrite to lose what it holds",
            volume=str(path),
        )
    new = _new_name(path)
    try:
        disk.unlink(new)
        fd = disk.create(new)
        try:
            disk.truncate(fd, size)
            disk.fsync(fd)
            identity = file_identity(fd)
        finally:
            os.close(fd)
        disk.fsync_directory(new.parent)
    except OSError as error:
        raise from_os_error(error, f"cannot make {path}", volume=str(path)) from error
    disk.crash_point("rehydrate-image-made")
    return identity


async def open_image(path: Path, binding: Binding, *, fresh: bool = False) -> Primary:
    """The image a map is about, open and used by nobody else. Raises NOT_FOUND, WRONG_STATE (it is another file),
    SIZE_MISMATCH or IN_USE; nothing is changed then."""
    await in_thread(_give_its_name, path, binding)
    reader = await ImageVolume.open(path)
    try:
        identity = await in_thread(_identity_at, path)
        if identity != binding.primary:
            raise _another(str(path), binding, identity)
        _check_size(str(path), reader.size, binding.size, exactly=True)
        users = await reader.writers()
    finally:
        await reader.close()
    if users:
        raise BlockferryError(
            Code.IN_USE,
            f"{path} is in use",
            cause=", ".join(users),
            next="stop whatever uses it; while it is rehydrated it is used through its export only",
            volume=str(path),
        )
    return Primary(await ImageVolume.open(path, writable=True), identity, fresh)


def _give_its_name(path: Path, binding: Binding) -> None:
    new = _new_name(path)
    if new.exists() and _identity_at(new) == binding.primary:
        disk.crash_point("rehydrate-image-bound")
        disk.rename(new, path)
    # Also where another process has renamed it, and died before that was durable.
    disk.crash_point("rehydrate-image-named")
    disk.fsync_directory(path.parent)


def _new_name(path: Path) -> Path:
    return path.with_name(path.name + NEW)


def _identity_at(path: Path) -> str:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return file_identity(fd)
    finally:
        os.close(fd)


# --- devices and exports ----------------------------------------------------------------------------------------------


async def open_external(
    uri: str, size: int, *, binding: Binding | None, overwrite: bool = False, insecure: bool = False
) -> Primary:
    """A block device or an export, claimed. `binding`: of the map it must belong to; without one it must be empty, or
    `overwrite`. Raises what opening it does, SIZE_MISMATCH and WRONG_STATE; nothing is changed then."""
    if is_nbd_uri(uri):
        volume: Volume = await NbdVolume.open(uri, writable=True, insecure=insecure)
        identity = f"export:{uri}"
    else:
        volume = await DeviceVolume.open(Path(uri), writable=True)
        identity = volume.identity or f"path:{uri}"
    try:
        _check_size(uri, volume.size, size, exactly=False)
        empty = False
        if binding is not None:
            if binding.primary != identity:
                raise _another(uri, binding, identity)
        else:
            found = await volume.allocation(DEFAULT_REGION_SIZE)
            empty = found.provenance is Provenance.EXACT and not found.regions
            if not (empty or overwrite):
                known = "it holds data" if found.provenance is Provenance.EXACT else "nobody can say that it is empty"
                raise BlockferryError(
                    Code.WRONG_STATE,
                    f"{uri} would be overwritten",
                    cause=f"{known}, and --state has no map that says what of it is hydrated",
                    next="check that this is the right one and say --overwrite, or name the --state that belongs to it",
                    volume=uri,
                )
    except BaseException:
        await volume.close()
        raise
    return Primary(volume if volume.size == size else _Owned(volume, size), identity, empty)


class _Owned(Window):
    """The beginning of a volume, which is closed with it."""

    async def close(self) -> None:
        await self._volume.close()


def _check_size(uri: str, found: int, wanted: int, *, exactly: bool) -> None:
    if found < wanted or (exactly and found != wanted):
        raise BlockferryError(
            Code.SIZE_MISMATCH,
            f"{uri} has {found} bytes, and the source {wanted}",
            next="name the right one; nothing was changed",
            volume=uri,
            expected=str(wanted),
            found=str(found),
        )


def _another(uri: str, binding: Binding, identity: str) -> BlockferryError:
    return BlockferryError(
        Code.WRONG_STATE,
        f"{uri} is not what the map in --state is about",
        cause=f"the map is about {binding.primary}, called {binding.uri} then, and this is {identity}: a copy, or "
        "something else",
        next="name the primary and the --state that belong together; nothing was changed",
        volume=uri,
        expected=binding.primary,
        found=identity,
    )
