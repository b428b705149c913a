"""The commands of configuration files: config check."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import msgspec
from blockferry.client.cli.main import Command
from blockferry.client.cli.render import Console, table
from blockferry.client.report import SCHEMA
from blockferry.common.agent_config import AgentConfig, AgentLimits, Policy
from blockferry.common.config import (
    ClientLimits,
    LimitsConfig,
    PoolConfig,
    ServerConfig,
    kind_of,
    load_document,
    validate,
)
from blockferry.common.units import human_bytes
from blockferry.common.volumes import in_thread


def _server(config: ServerConfig) -> list[str]:
    """What a server's file means."""
    scrubbed = f"every {_duration(config.scrub_every)}" if config.scrub_every else "never"
    rows = [("listens on", address) for address in config.listen]
    rows += [("pool " + name, _pool(pool)) for name, pool in config.pool.items()] or [("pools", "none: give --pool")]
    rows += [
        ("scrubs", scrubbed),
        ("lease", _duration(config.limits.lease)),
        ("messages", f"up to {human_bytes(config.limits.message_size)}"),
        ("limits", _bounds(config.limits)),
        ("each client", _bounds(config.limits.per_client)),
    ]
    return [f"  {line}" for line in table(rows)]


def _pool(pool: PoolConfig) -> str:
    reserve = "the default reserve" if pool.reserve is None else f"{human_bytes(pool.reserve)} reserved"
    quota = f"a quota of {human_bytes(pool.quota)}" if pool.quota else "no quota"
    journal = f", journals up to {human_bytes(pool.journal_limit)}" if pool.journal_limit else ""
    rules = ",".join(f"{rule}={count}" for rule, count in msgspec.structs.asdict(pool.keep_at_least).items() if count)
    return f"{pool.path}: {reserve}, {quota}{journal}, keeps at least {rules or 'the newest point'}"


def _bounds(bounds: LimitsConfig | ClientLimits) -> str:
    return (
        f"{bounds.sessions} sessions, {bounds.calls} calls on {bounds.connections} connections, "
        f"{bounds.calls_per_second} calls per second, {human_bytes(bounds.bytes_in_flight)} in flight"
    )


def _duration(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length and seconds % length == 0:
            return f"{seconds / length:.0f}{unit}"
    return f"{seconds:g}s"


def _agent(config: AgentConfig) -> list[str]:
    """What an agent's file means."""
    rows = [("listens on", address) for address in config.listen]
    rows += [("policy " + name, _policy(one)) for name, one in config.policy.items()] or [("policies", "none")]
    rows += [
        ("metrics", f"http://{config.status_page}/metrics" if config.status_page else "not served"),
        ("limits", _shares(config.limits)),
        ("state", str(config.state_dir)),
    ]
    return [f"  {line}" for line in table(rows)]


def _policy(policy: Policy) -> str:
    words = f"{policy.source} -> {policy.destination} every {_duration(policy.rpo)}"
    words += f", snapshots by {policy.snapshot}" if policy.snapshot != "none" else ", without snapshots"
    words += f", changes by {policy.tracks}"
    return words + (f", in group {policy.group}" if policy.group else "")


def _shares(limits: AgentLimits) -> str:
    rate = f"{human_bytes(limits.bandwidth)}/s" if limits.bandwidth else "any bandwidth"
    return f"{limits.transfers} transfers at once, {human_bytes(limits.bytes_in_flight)} in flight, {rate}"


SUMMARIES: dict[str, Callable[[Any], list[str]]] = {"server": _server, "agent": _agent}
"""By the kind of file."""


async def _config_check(arguments: argparse.Namespace, console: Console) -> int:
    document = await in_thread(load_document, arguments.file)
    kind = kind_of(document)
    config = validate(kind, document, str(arguments.file))
    report = {
        "schema": SCHEMA,
        "file": str(arguments.file),
        "kind": kind,
        "configuration": msgspec.to_builtins(config, enc_hook=str),
    }
    console.result(
        report, [f"{arguments.file} is a valid configuration of blockferry-{kind}", *SUMMARIES[kind](config)]
    )
    return 0


COMMANDS: dict[str, Command] = {"config_check": _config_check}
