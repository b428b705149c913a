"""`blockferry`: arguments, exit statuses, and errors in one line.

Exit status: 0 done; 1 failed; 2 usage; 3 the two sides differ; 130 or 143 interrupted and cleanly aborted.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NoReturn

import uvloop
from blockferry.client.cli.render import Console
from blockferry.common import linux, retention
from blockferry.common.address import check_volume_name
from blockferry.common.agent_config import DEFAULT_SOCKET
from blockferry.common.archive.format import is_compression
from blockferry.common.archive.store import Access
from blockferry.common.arguments import argument
from blockferry.common.errors import BlockferryError, Code, from_os_error
from blockferry.common.regions import BLOCK_SIZE, check_region_size
from blockferry.common.settings import TLS_ENVIRONMENT as ENVIRONMENT
from blockferry.common.settings import Tls
from blockferry.common.units import parse_share, parse_size

Command = Callable[[argparse.Namespace, Console], Awaitable[int]]


def _parse_region_size(text: str) -> int:
    return check_region_size(parse_size(text))


def _parse_rate(text: str) -> int:
    rate = parse_size(text)
    if rate < 1:
        raise BlockferryError(Code.USAGE, "a bandwidth limit is at least 1 byte per second")
    return rate


DEFAULT_SCRATCH = 10 * 1024**3
"""Bytes of writes that are thrown away in the end: a system that boots and is looked at writes a part of that."""


def _parse_scratch(text: str) -> int:
    limit = parse_size(text)
    if limit < BLOCK_SIZE:
        raise BlockferryError(Code.USAGE, f"writes need room for at least {BLOCK_SIZE} bytes")
    return limit


def _parse_compression(text: str) -> str:
    if not is_compression(text):
        raise BlockferryError(Code.USAGE, f"{text!r} is no compression", next="write none, or zstd:1 to zstd:19")
    return text


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, like every other error, and as JSON where that was asked for."""

    def error(self, message: str) -> NoReturn:
        console = Console(json="--json" in sys.argv[1:], quiet=False)
        cause, _, next_step = message.partition("; ")
        console.error(
            BlockferryError(
                Code.USAGE,
                "usage error",
                cause=cause,
                next=f"{next_step}; see {self.prog} --help" if next_step else f"see {self.prog} --help",
            )
        )
        raise SystemExit(2)

    def print_help(self, file: object = None) -> None:
        """On stdout like every result, and with the same answer if stdout does not take it."""
        Console(json=False, quiet=False).result({}, [self.format_help().rstrip("\n")])


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    common = _Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object on stdout and nothing else there")
    common.add_argument("--quiet", action="store_true", help="no progress and no summary")
    common.add_argument(
        "--insecure", action="store_true", help="allow plaintext to servers that are not on this machine"
    )
    for name, what in (("cert", "our certificate"), ("key", "its private key"), ("ca", "authorities of the server")):
        common.add_argument(
            f"--tls-{name}", type=Path, metavar="FILE",
            help=f"{what}, PEM, for grpcs:// and nbds:// (default ${ENVIRONMENT}{name.upper()})",
        )  # fmt: skip

    archives = _Parser(add_help=False)
    archives.add_argument(
        "--store-option", action="append", default=[], metavar="KEY=VALUE",
        help="of an object store: endpoint, region and others; may be repeated",
    )  # fmt: skip
    secret = archives.add_mutually_exclusive_group()
    for name, what in (("key", "the key"), ("passphrase", "the passphrase")):
        secret.add_argument(f"--{name}-file", type=Path, metavar="FILE", help=f"{what} of an encrypted archive")

    parser = _Parser(prog="blockferry", description="Keep block volumes alive at a second site.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(
        group: argparse._SubParsersAction[_Parser], name: str, help: str, *more: _Parser
    ) -> argparse.ArgumentParser:
        return group.add_parser(name, parents=[common, *more], help=help, description=help[0].upper() + help[1:] + ".")

    planned = add(commands, "plan", "show what a sync would read, send and unmap, without doing it", archives)
    synced = add(commands, "sync", "make a replica equal to a source and commit that as its next generation", archives)
    for one in (planned, synced):
        one.add_argument(
            "source", metavar="SOURCE",
            help="raw image, block device, NBD export (nbd://HOST[:PORT]/EXPORT, nbd+unix:///EXPORT?socket=PATH; nbds "
            "for TLS), grpc://HOST:PORT/VOLUME[@NUMBER], or an archived snapshot, STORE#NAME[@NUMBER]",
        )  # fmt: skip
        one.add_argument("destination", metavar="DEST", help="grpc://HOST:PORT/VOLUME")
        one.add_argument(
            "--region-size", type=argument(_parse_region_size), default=0, metavar="SIZE",
            help="for a replica that does not exist yet: 64K to 16M, a power of two (default 1M)",
        )  # fmt: skip
        one.add_argument("--grow", action="store_true", help="enlarge the replica if the source is larger")
        one.add_argument(
            "--pool", type=argument(check_volume_name), metavar="NAME",
            help="for a replica that does not exist yet: the pool to make it in (default: the server's first)",
        )  # fmt: skip
    synced.add_argument(
        "--bwlimit", type=argument(_parse_rate), default=0, metavar="RATE", help="bytes per second, such as 100M"
    )
    synced.add_argument(
        "--keep", type=argument(retention.parse), metavar="RULES",
        help="recovery points to keep from now on, such as last=12,hourly=24,daily=7",
    )  # fmt: skip
    synced.add_argument("--live", action="store_true", help="accept a source that is mounted or open for writing")
    synced.add_argument(
        "--state-dir", type=Path, metavar="DIR",
        help="where commit ids are kept (default $XDG_STATE_HOME/blockferry, else ~/.local/state/blockferry)",
    )  # fmt: skip

    verified = add(commands, "verify", "compare any two volumes or replicas; exit status 3 if they differ", archives)
    verified.add_argument("a", metavar="A")
    verified.add_argument("b", metavar="B")

    volume = commands.add_parser("volume", help="look at volumes").add_subparsers(
        dest="subcommand", required=True, metavar="COMMAND"
    )
    shown = add(volume, "show", "show what is known of a volume: size, allocation and how that is known", archives)
    shown.add_argument("uri", metavar="URI")

    replica = commands.add_parser("replica", help="look at replicas, hand them over, delete them").add_subparsers(
        dest="subcommand", required=True, metavar="COMMAND"
    )
    add(replica, "list", "list the replicas of a server").add_argument("address", metavar="ADDRESS")
    add(replica, "show", "show one replica").add_argument("address", metavar="ADDRESS/VOLUME")
    add(replica, "points", "list the recovery points of a replica").add_argument("address", metavar="ADDRESS/VOLUME")
    checked = add(replica, "verify", "re-read a generation and report rot by range; exit status 3 if there is any")
    checked.add_argument("address", metavar="ADDRESS/VOLUME[@NUMBER]")

    promoted = add(replica, "promote", "hand out a recovery point as a file to boot or mount; syncs are refused then")
    promoted.add_argument("address", metavar="ADDRESS/VOLUME[@NUMBER]")
    demoted = add(replica, "demote", "take a promoted replica back, with or without what was written to it")
    demoted.add_argument("address", metavar="ADDRESS/VOLUME")
    fate = demoted.add_mutually_exclusive_group(required=True)
    fate.add_argument("--keep-changes", action="store_true", help="make what was promoted the newest generation")
    fate.add_argument("--discard", action="store_true", help="drop what was written since the promotion")
    deleted = add(replica, "delete", "delete a replica and all its recovery points")
    deleted.add_argument("address", metavar="ADDRESS/VOLUME")
    adopted = add(replica, "adopt", "make an image in the pool's .seeds directory the start of a first sync")
    adopted.add_argument("address", metavar="ADDRESS/VOLUME")
    adopted.add_argument("--seed", required=True, metavar="NAME", help="name of the file in .seeds, without a path")
    adopted.add_argument(
        "--region-size", type=_parse_region_size, default=0, metavar="SIZE",
        help="64K to 16M, a power of two (default 1M)",
    )  # fmt: skip
    exported = add(replica, "export", "serve a recovery point over NBD until stopped; it is kept as long")
    exported.add_argument("address", metavar="ADDRESS/VOLUME[@NUMBER]")
    exported.add_argument("--nbd", required=True, metavar="WHERE", help="where to listen: unix:PATH or HOST:PORT")
    exported.add_argument(
        "--nbd-tls", action="store_true", help="demand TLS of NBD clients, with the certificate of --tls-cert"
    )
    exported.add_argument(
        "--throw-away-writes", action="store_true", help="take writes, into a file that is gone at the end"
    )
    exported.add_argument(
        "--scratch-limit", type=argument(_parse_scratch), default=DEFAULT_SCRATCH, metavar="SIZE",
        help="bytes of writes that are taken (default 10G)",
    )  # fmt: skip
    exported.add_argument(
        "--scratch-dir", type=Path, metavar="DIR", help="where that file is (default $TMPDIR, else /tmp)"
    )
    for one in (promoted, demoted, deleted):
        one.add_argument("--yes", action="store_true", help="do not ask for the name of the replica")
    pool = commands.add_parser("pool", help="look at pools").add_subparsers(
        dest="subcommand", required=True, metavar="COMMAND"
    )
    add(pool, "list", "list the pools of a server and the room they have").add_argument("address", metavar="ADDRESS")

    _add_agent(commands, add)

    rehydration = commands.add_parser("rehydration", help="look at a disk that is being rehydrated").add_subparsers(
        dest="subcommand", required=True, metavar="COMMAND"
    )
    add(rehydration, "show", "show how far it is, how long requests wait, and what it waits for")
    add(rehydration, "watch", "show progress until everything is hydrated")
    copied = add(rehydration, "snapshot", "copy the primary and its map as they are at one moment, without stopping it")
    copied.add_argument("--name", required=True, type=argument(check_volume_name), help="what it is to be called")
    for one in rehydration.choices.values():
        one.add_argument(
            "address", metavar="ADDRESS", help="its --state directory, or grpc+unix:///DIR/rehydration.sock"
        )

    config = commands.add_parser("config", help="look at configuration files").add_subparsers(
        dest="subcommand", required=True, metavar="COMMAND"
    )
    checked = add(config, "check", "say all that is wrong with a configuration file, or what it means")
    checked.add_argument("file", type=Path, metavar="FILE")
    _add_archive(commands, lambda group, name, text: add(group, name, text, archives))
    _add_pki(commands, add)
    return parser


def _add_agent(
    commands: argparse._SubParsersAction[_Parser],
    add: Callable[[argparse._SubParsersAction[_Parser], str, str], argparse.ArgumentParser],
) -> None:
    agent = commands.add_parser("agent", help="look at an agent's policies, and direct them").add_subparsers(
        dest="subcommand", required=True, metavar="COMMAND"
    )
    status = add(commands, "status", "show what the policies of an agent are at")
    status.add_argument("--watch", action="store_true", help="go on showing it")
    shown = add(agent, "status", "show what policies are at, how far they lag behind, and why")
    watched = add(agent, "watch", "show policies whenever they change; with --json an object for each change")
    synced = add(agent, "sync", "replicate a policy now, and its group")
    paused = add(agent, "pause", "begin nothing more of a policy and its group")
    resumed = add(agent, "resume", "go on with a paused policy, and end its back-off")
    planned = add(agent, "plan", "show what a replication would read, send and unmap now, without doing it")
    synced.add_argument("--wait", action="store_true", help="until it is over; exit status 1 if it fails")
    for one in (status, shown, watched):
        one.add_argument("policy", nargs="?", default="", metavar="POLICY", help="only this one")
    for one in (synced, paused, resumed, planned):
        one.add_argument("policy", metavar="POLICY")
    for one in (status, shown, watched, synced, paused, resumed, planned):
        one.add_argument(
            "--agent", default=DEFAULT_SOCKET, metavar="ADDRESS",
            help=f"grpc+unix:///SOCKET or grpcs://HOST:PORT (default {DEFAULT_SOCKET})",
        )  # fmt: skip


Adder = Callable[["argparse._SubParsersAction[_Parser]", str, str], argparse.ArgumentParser]


def _add_archive(commands: argparse._SubParsersAction[_Parser], add: Adder) -> None:
    archive = commands.add_parser("archive", help="snapshots in object storage").add_subparsers(
        dest="subcommand", required=True, metavar="COMMAND"
    )
    store = "s3://BUCKET/PREFIX, gs://…, az://… or file:///DIRECTORY"
    created = add(archive, "create", "archive a volume as the next snapshot; only what changed is uploaded")
    created.add_argument(
        "source", metavar="SOURCE", help="raw image, block device, NBD export, or a replica's generation"
    )
    created.add_argument("store", metavar="STORE", help=store)
    created.add_argument(
        "--volume", required=True, type=argument(check_volume_name), metavar="NAME", help="its name in the archive"
    )
    created.add_argument("--plan", action="store_true", help="say what it would cost, and do nothing")
    created.add_argument(
        "--compression", type=argument(_parse_compression), metavar="zstd:N|none",
        help="of new blocks, N from 1 to 19 (default: what the archive was created with; zstd:3 for a new one)",
    )  # fmt: skip
    created.add_argument("--live", action="store_true", help="accept a source that is mounted or open for writing")
    created.add_argument(
        "--state-dir", type=Path, metavar="DIR",
        help="where metadata is staged (default $XDG_STATE_HOME/blockferry, else ~/.local/state/blockferry)",
    )  # fmt: skip
    add(archive, "list", "list the volumes of an archive and their snapshots").add_argument(
        "store", metavar="STORE", help=store
    )
    shown = add(archive, "show", "show one snapshot: when, of what, how large")
    restored = add(archive, "restore", "restore a snapshot, whole, to an image, a block device or an NBD export")
    for one in (shown, restored):
        one.add_argument("snapshot", metavar="STORE#NAME[@NUMBER]", help="the newest one without a number")
    restored.add_argument("target", metavar="TARGET", help="an image, a block device or an NBD export")
    restored.add_argument("--overwrite", action="store_true", help="replace what the target holds")
    restored.add_argument("--yes", action="store_true", help="with --overwrite: do not ask for the name of the target")
    restored.add_argument(
        "--allow-damaged", action="store_true", help="put zeros where the archive is damaged, list it, and exit with 3"
    )
    restored.add_argument(
        "--state-dir", type=Path, metavar="DIR",
        help="where restores that are under way are noted (default $XDG_STATE_HOME/blockferry, else "
        "~/.local/state/blockferry)",
    )  # fmt: skip
    verified = add(
        archive, "verify", "check an archive, one of its volumes or a snapshot; exit status 3 if it is damaged"
    )
    verified.add_argument("archive", metavar="STORE[#NAME[@NUMBER]]")
    how = verified.add_mutually_exclusive_group()
    how.add_argument("--metadata", action="store_true", help="read no data: only whether all of it is there")
    how.add_argument(
        "--sample", type=argument(parse_share), default=1.0, metavar="SHARE", help="read a share of it, such as 5%%"
    )


def _add_pki(
    commands: argparse._SubParsersAction[_Parser],
    add: Adder,
) -> None:
    pki = commands.add_parser("pki", help="certificates of a small authority of one's own").add_subparsers(
        dest="subcommand", required=True, metavar="COMMAND"
    )
    made = add(pki, "init", "make an authority in a directory")
    issued = add(pki, "issue", "make a key, and a certificate with these names")
    renewed = add(pki, "renew", "replace a certificate by one for the same names and key that is valid for longer")
    revoked = add(pki, "revoke", "put a certificate on the list of those that are refused")
    for one in (made, issued, renewed, revoked):
        one.add_argument("directory", metavar="DIR", type=Path, help="the directory of the authority")
    for one in (renewed, revoked):
        one.add_argument("certificate", metavar="FILE", type=Path)
    made.add_argument("--name", default="blockferry authority", help="for people (default: blockferry authority)")
    made.add_argument("--days", type=int, default=3650, metavar="N", help="validity in days (default 3650)")
    issued.add_argument(
        "names", nargs="+", metavar="NAME", help="host name, address, or dns:NAME, ip:ADDRESS, uri:URI; servers need "
        "the names they are dialled by, clients the name that grants have",
    )  # fmt: skip
    issued.add_argument(
        "--out", type=Path, metavar="PREFIX", help="write PREFIX.crt and PREFIX.key (default: DIR and the first name)"
    )
    for one in (issued, renewed):
        one.add_argument("--days", type=int, default=365, metavar="N", help="validity in days (default 365)")
    shown = add(pki, "show", "show names, validity and fingerprints of certificates")
    shown.add_argument("certificates", nargs="+", metavar="FILE", type=Path)


def _tls(arguments: argparse.Namespace, console: Console) -> Tls | None:
    """The files of TLS, where the command talks to anybody with TLS; what needs attention is said beforehand."""
    given = [
        getattr(arguments, f"tls_{name}")
        or (Path(found) if (found := os.environ.get(ENVIRONMENT + name.upper())) else None)
        for name in ("cert", "key", "ca")
    ]
    serving = getattr(arguments, "nbd_tls", False)
    dialled = [value for value in vars(arguments).values() if isinstance(value, str)]
    if not serving and not (any(given) and any(value.startswith(("grpcs:", "nbds")) for value in dialled)):
        return None
    from datetime import UTC, datetime

    from blockferry.common.tls import Material, complete

    files = complete(*given)
    if files is None and serving:
        raise BlockferryError(
            Code.USAGE,
            "there is no certificate for --nbd-tls",
            cause="a server that demands TLS has to show one",
            next="name it with --tls-cert, --tls-key and --tls-ca",
        )
    if files is not None:
        for line in Material.load(files).warnings(datetime.now(UTC)):
            console.warning(line)
    return files


def _access(arguments: argparse.Namespace) -> Access:
    """How archives are reached and opened. Raises USAGE."""
    options: dict[str, str] = {}
    for text in getattr(arguments, "store_option", []):
        name, mark, value = text.partition("=")
        if not mark or not name:
            # Not repeated: it may be a secret that was meant for another flag.
            raise BlockferryError(Code.USAGE, "a --store-option is no KEY=VALUE", next="write it like region=eu-west-1")
        options[name] = value
    return Access(
        options, getattr(arguments, "key_file", None), getattr(arguments, "passphrase_file", None), arguments.insecure
    )


def _find(arguments: argparse.Namespace) -> Command:
    name = "_".join(filter(None, (arguments.command, getattr(arguments, "subcommand", None))))
    if arguments.command == "pki":
        from blockferry.client.cli import pki

        return pki.COMMANDS[name]
    if arguments.command in ("agent", "status"):
        from blockferry.client.cli import agent

        return agent.COMMANDS[name]
    if name == "replica_export":
        from blockferry.client.cli import export

        return export.COMMANDS[name]
    if arguments.command == "archive":
        if arguments.subcommand == "create":
            from blockferry.client.cli import archive

            return archive.COMMANDS[name]
        from blockferry.client.cli import archive_read

        return archive_read.COMMANDS[name]
    from blockferry.client.cli import config, handover, pools, rehydration, replicate

    return {
        **replicate.COMMANDS,
        **handover.COMMANDS,
        **pools.COMMANDS,
        **config.COMMANDS,
        **rehydration.COMMANDS,
    }[name]


async def _run(command: Command, arguments: argparse.Namespace, console: Console) -> int:
    """Run a command; a signal cancels it, so that whatever it holds is given back."""
    task = asyncio.ensure_future(command(arguments, console))
    received: list[int] = []

    def interrupt(number: int) -> None:
        received.append(number)
        task.cancel()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupt, number)
    try:
        return await task
    except asyncio.CancelledError:
        if not received:
            raise
        name = signal.Signals(received[0]).name
        console.error(
            BlockferryError(
                Code.INTERNAL, f"interrupted by {name}", cause="nothing was committed", next="run it again to continue"
            )
        )
        return 128 + received[0]
    except OSError as error:
        raise from_os_error(error, f"{arguments.command} failed") from error


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console script."""
    linux.occupy_standard_descriptors()
    console = Console(json=False, quiet=False)
    try:
        arguments = build_parser().parse_args(argv)
    except BlockferryError as error:
        console.error(error)
        return 2 if error.code is Code.USAGE else 1
    console = Console(json=arguments.json, quiet=arguments.quiet)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Paths may hold bytes that are no UTF-8; they leave as they came.
        sys.stdout.reconfigure(errors="surrogateescape")
    linux.keep_freed_memory()
    # gRPC would print what fails in a handshake, in its own words, beside the one line that says it in ours.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        arguments.tls = _tls(arguments, console)
        arguments.access = _access(arguments)
        return uvloop.run(_run(_find(arguments), arguments, console))
    except BlockferryError as error:
        console.error(error)
        return 2 if error.code is Code.USAGE else 1
