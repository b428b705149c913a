"""Devices and exports that a server is told to replicate to (pure).

Each is named by the administrator and never by a client. What belongs to the replica besides the device itself, such as
its log and its journal, lies in `DIR/NAME`, where `journal=DIR` may be the same for several devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from blockferry.common.address import check_volume_name
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.nbd.uri import NbdUri, is_nbd_uri
from blockferry.common.retention import Retention
from blockferry.common.units import parse_size

_USAGE = "write NAME=/dev/…,journal=DIR or NAME=nbd://…,journal=DIR, and perhaps ,limit=SIZE"


@dataclass(frozen=True)
class DeviceSpec:
    """A replica on a device or an export: its `name`, the device's path or the export's URI, the directory that holds
    its journal among others, and the bytes of changes that one session may make (0: what holds for all)."""

    name: str
    uri: str
    journal: Path
    journal_limit: int = 0
    floor: Retention | None = None
    """Recovery points kept whatever a source asks for; None: as in the pool that its journal lies in."""
    insecure: bool = False
    """Plaintext to an export on another machine is allowed."""

    @property
    def is_export(self) -> bool:
        """Whether it is an NBD export."""
        return is_nbd_uri(self.uri)


def parse_device(text: str) -> DeviceSpec:
    """`NAME=URI,journal=DIR[,limit=SIZE]`. Raises INVALID_ARGUMENT."""
    name, _, rest = text.partition("=")
    uri, found, options = rest.rpartition(",journal=")
    journal, limited, limit = options.rpartition(",limit=")
    journal = journal if limited else options
    if not found or not journal:
        raise BlockferryError(
            Code.INVALID_ARGUMENT,
            f"{text!r} is no device with a journal",
            cause="it has no ,journal=DIR",
            next=_USAGE,
        )
    size = parse_size(limit) if limited else 0
    return DeviceSpec(check_volume_name(name), check_device_uri(uri), Path(journal).absolute(), size)


def check_device_uri(uri: str) -> str:
    """Return what names a device or an export, or raise INVALID_ARGUMENT."""
    if is_nbd_uri(uri):
        NbdUri.parse(uri)
    elif not uri.startswith("/") or "\0" in uri:
        raise BlockferryError(
            Code.INVALID_ARGUMENT,
            f"{uri!r} names no device",
            cause="it is neither the path of a device nor the URI of an NBD export",
            next=_USAGE,
        )
    return uri


def check_distinct_devices(specs: Sequence[DeviceSpec]) -> None:
    """Raise INVALID_ARGUMENT unless all names and all devices differ, as far as their names tell: what is one device
    under two names is claimed by the first that opens it."""
    for index, later in enumerate(specs):
        for earlier in specs[:index]:
            if earlier.name == later.name or earlier.uri == later.uri:
                same = f"are both called {later.name}" if earlier.name == later.name else f"are both {later.uri}"
                raise BlockferryError(
                    Code.INVALID_ARGUMENT,
                    f"cannot use {earlier.name}={earlier.uri} and {later.name}={later.uri}",
                    cause=f"they {same}",
                    next="give each device one name, and each name one device",
                )
