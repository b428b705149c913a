"""blockferry-rehydrate: one disk, usable at once, while it is filled from a backup."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import structlog
import uvloop
from blockferry.common import linux, rehydration, telemetry
from blockferry.common.address import is_volume_name
from blockferry.common.arguments import argument
from blockferry.common.errors import BlockferryError
from blockferry.common.nbd.export import Export
from blockferry.common.nbd.server import NbdServer
from blockferry.common.nbd.uri import NbdListen
from blockferry.common.settings import TLS_ENVIRONMENT
from blockferry.common.tls import complete
from blockferry.common.units import parse_seconds, parse_size
from blockferry.server import handshakes
from blockferry.server.rehydrate import service
from blockferry.server.rehydrate.hydration import Hydration, Options

log = structlog.get_logger("blockferry.rehydrate")

PROGRESS_SECONDS = 10.0
"""Between two lines of progress."""

SHUTDOWN_SECONDS = 2.0
"""Calls in progress on the socket may finish within this time."""


class Voice:
    """What the process says: `listening on …` and the end of the rehydration on stdout, progress on stderr; with `json`
    an object per line on stdout and nothing else there."""

    def __init__(self, *, json: bool, quiet: bool) -> None:
        self._json = json
        self._quiet = quiet

    def say(self, event: str, text: str, **fields: object) -> None:
        """Something that happens once."""
        # A guest's disk does not end because nobody listens any more.
        with contextlib.suppress(OSError):
            print(json.dumps({"event": event, **fields}) if self._json else text, flush=True)

    def progress(self, hydration: Hydration, address: str) -> None:
        """How far it is."""
        if not self._quiet:
            status = hydration.status(address)
            if self._json:
                self.say("progress", "", **rehydration.report(status))
            else:
                with contextlib.suppress(OSError):
                    print(rehydration.line(status), file=sys.stderr, flush=True)


async def serve(options: Options, where: NbdListen, export_name: str, voice: Voice) -> None:
    """Run until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    hydration = await Hydration.open(options)
    try:
        server = NbdServer([Export(export_name, hydration.volume, read_only=False)])
        try:
            address = (await server.listen(where, insecure=options.insecure)).uri(export_name, tls=False)
            control = await service.serve(hydration, address, options.state)
            try:
                voice.say("listening", f"listening on {address}", address=address)
                await _fill(hydration, address, voice, stop)
            finally:
                await control.stop(SHUTDOWN_SECONDS)
        finally:
            await server.close()
    finally:
        await hydration.close()


async def _fill(hydration: Hydration, address: str, voice: Voice, stop: asyncio.Event) -> None:
    """Until everything is hydrated, and on until somebody says stop."""
    filling = asyncio.create_task(hydration.run(), name="rehydration")
    stopping = asyncio.create_task(stop.wait(), name="stop")
    try:
        while not (filling.done() or stopping.done()):
            await asyncio.wait([filling, stopping], timeout=PROGRESS_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if not (filling.done() or stopping.done()):
                voice.progress(hydration, address)
        if filling.done():
            # What is wrong here is a bug: systemd starts it again, and the map says where it was.
            filling.result()
            voice.say(
                "hydrated",
                "everything is hydrated: the sources are not needed any more",
                **rehydration.report(hydration.status(address)),
            )
            await stopping
    finally:
        for task in (filling, stopping):
            task.cancel()
        await asyncio.gather(filling, stopping, return_exceptions=True)


# --- the command line -------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The command line of blockferry-rehydrate."""
    found = argparse.ArgumentParser(
        prog="blockferry-rehydrate",
        description="Serve a disk that works at once, while it is filled from a backup.",
        epilog="One process serves one disk. Run it again with the same words to go on where it was.",
    )
    found.add_argument(
        "sources", nargs="+", metavar="SOURCE",
        help="a committed generation (grpc://HOST:PORT/VOLUME[@NUMBER]) or an archived snapshot; several must be the "
        "same one, and stand in for each other",
    )  # fmt: skip
    found.add_argument(
        "primary", metavar="PRIMARY",
        help="raw image, made here; or an empty block device or NBD export. What --state knows is resumed",
    )  # fmt: skip
    found.add_argument(
        "--nbd", required=True, type=argument(NbdListen.parse), metavar="unix:PATH|HOST:PORT",
        help="where the disk is served, by NBD (port 0: any free one)",
    )  # fmt: skip
    found.add_argument(
        "--state", required=True, type=Path, metavar="DIR", help="where its map is kept; made if need be"
    )
    found.add_argument(
        "--export", default="", type=_export, metavar="NAME", help="the export's name (default: the empty one)"
    )
    found.add_argument(
        "--bwlimit", type=argument(parse_size), default=0, metavar="RATE",
        help="bytes per second of what is fetched behind the guest, such as 100M (default: any number)",
    )  # fmt: skip
    found.add_argument(
        "--source-timeout", type=argument(_timeout), default=20.0, metavar="DURATION",
        help="how long a request waits for sources that are away before it fails (default 20s; guests wait for 30s)",
    )  # fmt: skip
    found.add_argument(
        "--overwrite", action="store_true", help="begin anew on a primary that is not empty; what it holds is lost"
    )
    found.add_argument("--json", action="store_true", help="say everything as JSON, an object per line on stdout")
    found.add_argument("--quiet", action="store_true", help="no progress")
    for name, what in (("cert", "our certificate"), ("key", "its private key"), ("ca", "authorities of the server")):
        found.add_argument(
            f"--tls-{name}", type=Path, metavar="FILE",
            help=f"{what}, PEM, for sources with grpcs:// (default ${TLS_ENVIRONMENT}{name.upper()})",
        )  # fmt: skip
    found.add_argument(
        "--insecure", action="store_true", help="allow plaintext to and from machines other than this one"
    )
    return found


def _export(text: str) -> str:
    if text and not is_volume_name(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a name")
    return text


def _timeout(text: str) -> float:
    seconds = parse_seconds(text)
    if not 0.1 <= seconds <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is out of range; write 0.1s to 1d")
    return seconds


def options_of(arguments: argparse.Namespace) -> Options:
    """What the command line says."""
    files = [
        getattr(arguments, f"tls_{name}")
        or (Path(found) if (found := os.environ.get(TLS_ENVIRONMENT + name.upper())) else None)
        for name in ("cert", "key", "ca")
    ]
    return Options(
        sources=arguments.sources,
        primary=arguments.primary,
        state=arguments.state,
        bandwidth=arguments.bwlimit,
        source_timeout=arguments.source_timeout,
        overwrite=arguments.overwrite,
        insecure=arguments.insecure,
        tls=complete(*files) if any(one.startswith("grpcs:") for one in arguments.sources) else None,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script."""
    linux.occupy_standard_descriptors()
    arguments = parser().parse_args(argv)
    handshakes.watch()
    telemetry.configure_logging()
    linux.keep_freed_memory()
    try:
        options = options_of(arguments)
        uvloop.run(serve(options, arguments.nbd, arguments.export, Voice(json=arguments.json, quiet=arguments.quiet)))
    except BlockferryError as error:
        if arguments.json:
            with contextlib.suppress(OSError):
                print(json.dumps({"error": error.fields()}), flush=True)
        for line in error.lines():
            print(f"blockferry-rehydrate: {line}", file=sys.stderr)
        return 1
    return 0
