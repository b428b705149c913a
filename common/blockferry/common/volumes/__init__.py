"""Volumes: one interface over images, block devices, NBD exports, replicas and archived snapshots."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from urllib.parse import unquote, urlsplit

from blockferry.common.address import is_address
from blockferry.common.archive.store import Access, is_store_uri
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.nbd.uri import is_nbd_uri
from blockferry.common.settings import Tls
from blockferry.common.volumes.device import DeviceVolume
from blockferry.common.volumes.image import ImageVolume
from blockferry.common.volumes.nbd import NbdVolume
from blockferry.common.volumes.replica import ReplicaVolume
from blockferry.common.volumes.volume import Volume, in_thread, parts_of

__all__ = [
    "DeviceVolume",
    "ImageVolume",
    "NbdVolume",
    "ReplicaVolume",
    "Volume",
    "in_thread",
    "open_volume",
    "parts_of",
]


async def open_volume(
    uri: str, *, insecure: bool = False, tls: Tls | None = None, access: Access | None = None
) -> Volume:
    """Open what `uri` names for reading: an image or block device (a path, `file:///PATH`), an NBD export's URI, a
    replica's address, or an archived snapshot (`STORE#NAME[@NUMBER]`). `tls` is for addresses and URIs that ask for
    TLS; what an NBD URI says itself goes before it. `access` is for archives."""
    if is_address(uri):
        return await ReplicaVolume.open(uri, insecure=insecure, tls=tls)
    if is_nbd_uri(uri):
        return await NbdVolume.open(uri, insecure=insecure, files=tls)
    if is_store_uri(uri) and ("#" in uri or not uri.startswith("file:")):
        # It brings cryptography and zstandard along.
        from blockferry.common.archive.reader import SnapshotVolume

        return await SnapshotVolume.open(uri, access)
    if uri.startswith("file://"):
        parts = urlsplit(uri)
        if parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
            raise BlockferryError(
                Code.INVALID_ARGUMENT, f"{uri!r} is not a usable file URI", next="write file:///PATH, or just the path"
            )
        return await _open_path(Path(unquote(parts.path)))
    if not uri or "\0" in uri:
        raise BlockferryError(
            Code.INVALID_ARGUMENT,
            "a volume needs a name",
            next="name a raw image, a block device, an NBD export, a replica or an archived snapshot",
        )
    return await _open_path(Path(uri))


async def _open_path(path: Path) -> Volume:
    return await (DeviceVolume.open(path) if await in_thread(_is_device, path) else ImageVolume.open(path))


def _is_device(path: Path) -> bool:
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except (OSError, ValueError):
        # Opening it says what is wrong.
        return False
