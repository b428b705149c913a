"""The command that serves a recovery point over NBD: `replica export`."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import structlog
from blockferry.client.cli.main import Command
from blockferry.client.cli.render import Console
from blockferry.client.report import SCHEMA
from blockferry.common.address import Address
from blockferry.common.errors import BlockferryError
from blockferry.common.nbd.export import Export
from blockferry.common.nbd.server import NbdServer
from blockferry.common.nbd.uri import NbdListen
from blockferry.common.telemetry import configure_logging
from blockferry.common.tls import server_context
from blockferry.common.units import human_bytes
from blockferry.common.volumes import ReplicaVolume, Volume
from blockferry.common.volumes.scratch import ScratchVolume

PATIENCE_SECONDS = 20.0
"""For which a read waits for a server that is away: one that is restarted is back by then, and the NBD client of Linux
gives up after 30."""

log = structlog.get_logger("blockferry.export")


async def _export(arguments: argparse.Namespace, console: Console) -> int:
    where = NbdListen.parse(arguments.nbd)
    configure_logging(logging.WARNING if console.quiet else logging.INFO)
    address = Address.parse(arguments.address).require_volume()
    point = await ReplicaVolume.open(arguments.address, insecure=arguments.insecure, tls=arguments.tls)
    point.patience = PATIENCE_SECONDS
    volume: Volume = point
    keeping: asyncio.Task[None] | None = None
    try:
        if arguments.throw_away_writes:
            directory = arguments.scratch_dir or Path(tempfile.gettempdir())
            volume = await ScratchVolume.open(point, directory, arguments.scratch_limit)
        keeping = await _kept(point)
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        export = Export(
            address.volume,
            volume,
            read_only=not arguments.throw_away_writes,
            description=f"generation {point.generation} of {address.volume}",
        )
        context = server_context(arguments.tls) if arguments.nbd_tls else None
        server = NbdServer([export], tls=None if context is None else lambda: context)
        try:
            found = await server.listen(where, insecure=arguments.insecure)
            _say(console, address, point, found.uri(address.volume, tls=arguments.nbd_tls), arguments)
            stopped = asyncio.create_task(stop.wait(), name="stop")
            await asyncio.wait([keeping, stopped], return_when=asyncio.FIRST_COMPLETED)
            stopped.cancel()
        finally:
            await server.close()
        if keeping.done():
            # It was dropped, or is another one now: nothing that is read from here on would be right.
            await keeping
        log.info("export ended", volume=address.volume, generation=point.generation)
        return 0
    finally:
        if keeping is not None:
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)
        await volume.close()


async def _kept(point: ReplicaVolume) -> asyncio.Task[None]:
    """A task that keeps the generation from being dropped, and does so already. Raises what it fails with."""
    kept = asyncio.Event()
    task = asyncio.create_task(point.keep(_teller(point, kept)), name="keeper")
    first = asyncio.create_task(kept.wait(), name="first")
    try:
        await asyncio.wait([task, first], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            await task
    except BaseException:
        task.cancel()
        raise
    finally:
        first.cancel()
    return task


def _teller(point: ReplicaVolume, kept: asyncio.Event) -> Callable[[BlockferryError | None], None]:
    """What is logged about the server of a generation: when it is there, and when it is away."""
    away = False

    def told(error: BlockferryError | None) -> None:
        nonlocal away
        kept.set()
        if error is not None and not away:
            log.warning("the server is away", volume=point.uri, cause=error.line(), next="reads wait for it a while")
        elif error is None and away:
            log.info("the server is back", volume=point.uri)
        away = error is not None

    return told


def _say(console: Console, address: Address, point: ReplicaVolume, uri: str, arguments: argparse.Namespace) -> None:
    """Where it is served, once it is."""
    thrown_away = arguments.throw_away_writes
    report = {
        "schema": SCHEMA,
        "volume": address.volume,
        "generation": point.generation,
        "commit_id": point.commit_id.hex(),
        "size": point.size,
        "listening": uri,
        "writes": "thrown away" if thrown_away else "refused",
        "scratch_limit": arguments.scratch_limit if thrown_away else None,
    }
    fate = f"writes are thrown away, {human_bytes(arguments.scratch_limit)} at most" if thrown_away else "read-only"
    log.info(
        "export begins", **{name: report[name] for name in ("volume", "generation", "commit_id", "size", "writes")}
    )
    console.result(
        report,
        [
            f"listening on {uri}",
            f"  generation {point.generation} of {address.volume}, {human_bytes(point.size)}; {fate}",
        ],
    )


COMMANDS: dict[str, Command] = {"replica_export": _export}
