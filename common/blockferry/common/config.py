"""The configuration files: every section and key, with its default. A file is read strictly: see strict.py.

An absolute path, a size (`10G`), a duration (`60s`) and rules of retention (`{ last = 3 }`) are written as everywhere
else in blockferry. docs/configuration.md describes every key.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec
from blockferry.common.retention import DEFAULT, Retention

DEFAULT_LISTEN = "grpc://127.0.0.1:9870"
MIB = 1024 * 1024

TLS_ENVIRONMENT = "BLOCKFERRY_TLS_"
"""Before CERT, KEY and CA: files for commands that are given none."""


class Tls(msgspec.Struct, frozen=True):
    """Mutual TLS: this side's certificate and key, and the authority (and its revocations) the other side must have."""

    cert: Path
    key: Path
    ca: Path
    crl: Path | None = None


class Grant(msgspec.Struct, frozen=True):
    """What whoever has a certificate with this subject alternative name may do, with which volumes (shell-style
    patterns)."""

    san: str
    role: Literal["agent", "operator", "viewer"]
    volumes: tuple[str, ...] = ("*",)


class PoolConfig(msgspec.Struct, frozen=True):
    """A directory of replicas. Sizes in bytes; `reserve` None: what fits the file system; 0 elsewhere: any amount."""

    path: Path
    reserve: int | None = None
    quota: int = 0
    journal_limit: int = 0
    keep_at_least: Retention = DEFAULT


class DeviceConfig(msgspec.Struct, frozen=True):
    """A block device or NBD export that is a replica, named by its section. Sizes in bytes; 0: any amount."""

    path: str
    """`/dev/...`, or an `nbd://` or `nbd+unix://` URI."""
    journal: Path
    """A directory on another disk."""
    journal_limit: int = 0
    keep_at_least: Retention = DEFAULT


class ClientLimits(msgspec.Struct, frozen=True):
    """What one client may take of a server."""

    sessions: int = 16
    calls: int = 256
    """In progress at once."""
    connections: int = 64
    calls_per_second: int = 1000
    bytes_in_flight: int = 64 * MIB


class LimitsConfig(msgspec.Struct, frozen=True):
    """What a server lets all clients together take, and each of them."""

    lease: float = 60.0
    """Seconds a silent source keeps a replica to itself."""
    message_size: int = 17 * MIB
    sessions: int = 64
    calls: int = 1024
    connections: int = 256
    calls_per_second: int = 4000
    bytes_in_flight: int = 256 * MIB
    per_client: ClientLimits = ClientLimits()


class ServerConfig(msgspec.Struct, frozen=True):
    """`server.toml`."""

    listen: tuple[str, ...] = (DEFAULT_LISTEN,)
    insecure: bool = False
    scrub_every: int = 0
    """Seconds; 0: never."""
    tls: Tls | None = None
    pool: dict[str, PoolConfig] = {}
    """By name, in the order of the file: new replicas go to the first."""
    device: dict[str, DeviceConfig] = {}
    limits: LimitsConfig = LimitsConfig()
    grant: tuple[Grant, ...] = ()
