"""What an agent's configuration file may say (pure): its keys, their defaults and ranges, and what must hold between
them. docs/configuration.md describes every key for people."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

import msgspec
from blockferry.common.address import Address, is_address
from blockferry.common.nbd.uri import NbdUri, is_nbd_uri
from blockferry.common.regions import check_region_size
from blockferry.common.retention import Retention
from blockferry.common.settings import (
    DURATION,
    MIB,
    SIZE,
    AbsolutePath,
    Grant,
    HostAndPort,
    InFlight,
    Listen,
    Name,
    Size,
    Sound,
    Tls,
    absolute,
    bad,
    between,
    check_serving,
)
from blockferry.common.strict import Problem, Reads, join
from blockferry.common.units import parse_duration, parse_seconds, parse_size, parse_window

DEFAULT_SOCKET = "grpc+unix:///run/blockferry/agent.sock"
"""Where an agent listens, and where commands look for it."""

DAY = 86400


# --- kinds of values ----------------------------------------------------------------------------------------------


def _source(text: str) -> str:
    if is_address(text):
        return Address.parse(text).require_volume().uri
    if is_nbd_uri(text):
        return NbdUri.parse(text).uri
    if text.startswith("file://"):
        parts = urlsplit(text)
        if parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
            raise bad(f"{text!r} is not a usable file URI", "write file:///PATH, or just the path")
        return text
    return str(absolute(text))


def _destination(text: str) -> str:
    address = Address.parse(text).require_volume()
    if address.number:
        raise bad(f"{text!r} is a committed generation, which never changes", "leave out the @number")
    return text


def _tracking(text: str) -> str:
    if text == "dirty-bitmap":
        raise bad(
            "dirty bitmaps of QEMU are not supported yet",
            'write "reflink" for images on XFS or Btrfs, else "digests", which reads and compares everything',
        )
    if text not in ("reflink", "digests"):
        raise bad(f"{text!r} is not a way to track changes", 'write "reflink" or "digests"')
    return text


def _window(text: str) -> str:
    parse_window(text)
    return text


def _word(text: str) -> str:
    if "\0" in text:
        raise bad("no program takes a NUL in an argument", "leave it out")
    return text


def _region_size(text: str) -> int:
    return check_region_size(parse_size(text))


Source = Annotated[str, Reads(_source, "an absolute path, or the URI of an export or a replica")]
Destination = Annotated[str, Reads(_destination, 'an address such as "grpcs://dr1:9870/db"')]
Rpo = Annotated[int, Reads(between(parse_duration, 1, 30 * DAY, "1s to 30d"), DURATION, numbers=True)]
TimeLimit = Annotated[float, Reads(between(parse_seconds, 0.1, DAY, "0.1s to 24h"), 'a duration such as "60s"')]
Words = tuple[Annotated[str, Reads(_word, "text")], ...]
"""A program and its arguments: no shell reads it."""


# --- agent.toml ---------------------------------------------------------------------------------------------------


class AgentLimits(msgspec.Struct, frozen=True):
    """What all policies together may take of this host."""

    transfers: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 4
    """Policies, or groups, that are replicated at once."""
    bytes_in_flight: InFlight = 64 * MIB
    """Memory for data that is read and not yet acknowledged."""
    bandwidth: Size = 0
    """Bytes per second; 0: no limit, here and below."""


class Hooks(msgspec.Struct, frozen=True):
    """Programs that are run at certain moments, each with its arguments; empty for none."""

    freeze: Words = ()
    snapshot: Words = ()
    thaw: Words = ()
    remove: Words = ()
    failure: Words = ()


SNAPSHOT_HOOKS = ("freeze", "snapshot", "thaw", "remove")


class Policy(msgspec.Struct, frozen=True):
    """One volume and its replica. Sizes in bytes, durations in seconds."""

    source: Source
    destination: Destination
    rpo: Rpo
    """From start to start."""
    snapshot: Literal["reflink", "command", "none"] = "reflink"
    tracking: Annotated[str, Reads(_tracking, '"reflink" or "digests"')] | None = None
    """None: as `tracks` says."""
    bandwidth: Size = 0
    window: Annotated[str, Reads(_window, 'a window such as "22:00-06:00"')] = "00:00-24:00"
    """In the local time of this host; see `units.parse_window`."""
    priority: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 0
    """Larger ones begin first."""
    group: Name | None = None
    keep: Retention | None = None
    """None: whatever the replica keeps."""
    region_size: Annotated[int, Reads(_region_size, SIZE, numbers=True)] = 0
    """0: the replica's own."""
    snapshot_dir: AbsolutePath | None = None
    """None: beside the source."""
    snapshot_floor: Size = 1 << 30
    """Invariant 9: with fewer bytes free on the source's file system its snapshots are dropped."""
    clone_limit: TimeLimit = 5.0
    stall_timeout: TimeLimit = 300.0
    hook_timeout: TimeLimit = 60.0
    hooks: Hooks = Hooks()

    @property
    def tracks(self) -> str:
        """How changes are found: `reflink` or `digests`."""
        return self.tracking or ("reflink" if self.snapshot == "reflink" else "digests")

    @property
    def address(self) -> Address:
        """Of the replica."""
        return Address.parse(self.destination)


class AgentConfig(msgspec.Struct, frozen=True):
    """`agent.toml`."""

    state_dir: AbsolutePath = Path("/var/lib/blockferry/agent")
    listen: tuple[Listen, ...] = (DEFAULT_SOCKET,)
    status_page: HostAndPort | None = None
    """None: no metrics over HTTP."""
    insecure: bool = False
    tls: Tls | None = None
    limits: AgentLimits = AgentLimits()
    policy: dict[Name, Policy] = {}
    grant: tuple[Grant, ...] = ()


# --- between keys -------------------------------------------------------------------------------------------------


def check_agent(config: AgentConfig, sound: Sound) -> Iterator[Problem]:
    """What is wrong between keys."""
    yield from check_serving(config, sound)
    policies = {name: policy for name, policy in config.policy.items() if sound(join("policy", name))}
    for name, policy in policies.items():
        path = join("policy", name)
        yield from _check_destination(config, policy, path, sound)
        yield from _check_snapshot(policy, path)
    yield from _check_distinct(policies)
    yield from _check_groups(policies)


def _check_destination(config: AgentConfig, policy: Policy, path: str, sound: Sound) -> Iterator[Problem]:
    address = policy.address
    if address.tls and config.tls is None and sound("tls"):
        yield Problem(join(path, "destination"), "TLS needs a certificate", "add a section [tls] with cert, key and ca")
    if not address.tls and not address.loopback and not config.insecure and sound("insecure"):
        yield Problem(
            join(path, "destination"),
            "without TLS anybody on the way could read and change whole disks",
            "use grpcs://, a loopback address, or insecure = true here and at the server if the network itself is "
            "trusted",
        )


def _check_snapshot(policy: Policy, path: str) -> Iterator[Problem]:
    hooks = join(path, "hooks")
    if policy.snapshot == "command":
        if not policy.hooks.snapshot:
            yield Problem(join(hooks, "snapshot"), "is missing", 'snapshot = "command" needs a command that takes one')
        if policy.hooks.freeze and not policy.hooks.thaw:
            yield Problem(join(hooks, "thaw"), "is missing", "whatever is frozen must be thawed")
    else:
        for name in SNAPSHOT_HOOKS:
            if getattr(policy.hooks, name):
                yield Problem(join(hooks, name), 'is for snapshot = "command" only', "remove it, or change snapshot")
    if policy.snapshot == "reflink" and not policy.source.startswith(("/", "file://")):
        yield Problem(
            join(path, "snapshot"), "only files can be cloned", 'write "command", or "none" for a source at rest'
        )
    if policy.snapshot == "none" and policy.tracks == "reflink":
        yield Problem(join(path, "tracking"), "without snapshots nothing tells what changed", 'write "digests"')


def _check_distinct(policies: dict[str, Policy]) -> Iterator[Problem]:
    """As far as addresses tell: servers let one session at a time write in any case."""
    seen: dict[tuple[str, str], str] = {}
    for name, policy in policies.items():
        other = seen.setdefault((policy.address.target, policy.address.volume), name)
        if other != name:
            yield Problem(
                join(join("policy", name), "destination"),
                f"is the destination of {other} too",
                "give each policy a replica of its own",
            )


def _check_groups(policies: dict[str, Policy]) -> Iterator[Problem]:
    """Members begin together and are committed in one call."""
    first: dict[str, str] = {}
    for name, policy in policies.items():
        if policy.group is None:
            continue
        other = first.setdefault(policy.group, name)
        leader, path = policies[other], join("policy", name)
        if policy.address.target != leader.address.target or policy.address.tls != leader.address.tls:
            yield Problem(
                join(path, "destination"),
                f"is at another server than that of {other}, which is in group {policy.group} too",
                "a group is committed by one server",
            )
        if policy.snapshot != leader.snapshot:
            yield Problem(
                join(path, "snapshot"),
                f"is another method than that of {other}, which is in group {policy.group} too",
                "the snapshots of a group are taken together",
            )
