"""The command line of blockferry-server, and the file it may name: one configuration comes out of both.

What is said on the command line counts more than what the file says: `--listen` takes the place of the file's list,
`--pool` adds a pool (or gives one of the file another directory), `--device` does the same for devices,
and what is a key of pools or devices counts for all of them.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import msgspec
from blockferry.common import retention
from blockferry.common.arguments import argument
from blockferry.common.config import DEFAULT_LISTEN, DeviceConfig, PoolConfig, ServerConfig, load_server
from blockferry.common.errors import BlockferryError
from blockferry.common.tls import complete
from blockferry.common.units import parse_duration, parse_seconds, parse_size
from blockferry.server.devices import check_distinct_devices, parse_device
from blockferry.server.pools import check_distinct, parse_pool

T = TypeVar("T", bound=msgspec.Struct)


def configuration(argv: Sequence[str]) -> ServerConfig:
    """What the server is to do. Raises what `load_server` and `check_distinct` raise; a usage error ends the process,
    as argparse does it."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    check_distinct(arguments.pool)
    check_distinct_devices(arguments.device)
    config = ServerConfig()
    if arguments.config:
        config = load_server(arguments.config, insecure=arguments.insecure)
    config = _overridden(config, arguments)
    if not config.pool and not config.device:
        parser.error(
            "nothing to serve: give --pool [NAME=]DIR or --device, or --config FILE with a section [pool.NAME] or "
            "[device.NAME]"
        )
    return config


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="blockferry-server",
        description="Keep replicas of block volumes and serve them over gRPC.",
        epilog="What is said here counts more than what the file says.",
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="read this file first; it can say all that can be said here, for each pool on its own, and limits",
    )
    parser.add_argument(
        "--pool",
        action="append",
        type=argument(parse_pool),
        default=[],
        metavar="[NAME=]DIR",
        help="existing directory for replicas, called main unless named; repeatable: new replicas go to the first",
    )
    parser.add_argument(
        "--device",
        action="append",
        type=argument(parse_device),
        default=[],
        metavar="NAME=URI,journal=DIR[,limit=SIZE]",
        help="replicate NAME to a block device (/dev/...) or an NBD export (nbd://..., nbd+unix://...), with its "
        "journal in an existing directory, which devices may share; repeatable",
    )
    parser.add_argument(
        "--listen",
        action="append",
        metavar="ADDRESS",
        help="grpcs://HOST:PORT or grpc://HOST:PORT (port 0: any free one), or grpc+unix:///SOCKET; repeatable "
        f"(default {DEFAULT_LISTEN})",
    )
    parser.add_argument(
        "--keep-at-least",
        type=argument(retention.parse),
        metavar="RULES",
        help="recovery points that no source can give up, such as last=3,daily=7 (default last=3)",
    )
    parser.add_argument(
        "--lease",
        type=_lease,
        metavar="SECONDS",
        help="how long a silent source keeps a replica to itself, 0.1 to 86400 (default 60)",
    )
    parser.add_argument(
        "--reserve",
        type=argument(parse_size),
        metavar="SIZE",
        help="bytes that sessions leave free in each pool's file system (default 1G, or 5 %% of a small one; 0: none)",
    )
    parser.add_argument(
        "--quota",
        type=argument(parse_size),
        metavar="SIZE",
        help="bytes that each replica may hold, recovery points included (default 0: any number)",
    )
    parser.add_argument(
        "--journal-limit",
        type=argument(parse_size),
        metavar="SIZE",
        help="bytes of changes of one session, in pools that cannot clone files (default 0: any number)",
    )
    parser.add_argument(
        "--scrub-every",
        type=argument(parse_duration),
        metavar="DURATION",
        help="re-read the newest generation of each replica this often, such as 7d or 12h (default 0: never)",
    )
    for name, what in (
        ("cert", "certificate of this server, PEM, with intermediate ones behind it"),
        ("key", "its private key"),
        ("ca", "the authorities that have issued what clients show"),
        ("crl", "their revocation lists"),
    ):
        parser.add_argument(
            f"--tls-{name}", type=Path, metavar="FILE", help=f"{what}; for grpcs://, and read again when it changes"
        )
    parser.add_argument("--insecure", action="store_true", help="allow plaintext on addresses other machines can reach")
    return parser


def _lease(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
        with contextlib.suppress(BlockferryError):
            seconds = parse_seconds(text)
    # Written so that nan is refused too.
    if not 0.1 <= seconds <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a lease; write seconds from 0.1 to 86400")
    return seconds


def _overridden(config: ServerConfig, arguments: argparse.Namespace) -> ServerConfig:
    """The file's configuration with what the command line says in its place."""
    pools = dict(config.pool)
    for named in arguments.pool:
        known = pools.get(named.name)
        pools[named.name] = _replaced(known, path=named.path) if known else PoolConfig(named.path)
    of_devices = {name: getattr(arguments, name) for name in ("keep_at_least", "journal_limit")}
    devices = {name: _replaced(device, **of_devices) for name, device in config.device.items()}
    for one in arguments.device:
        told = DeviceConfig(one.uri, one.journal, one.journal_limit or arguments.journal_limit or 0)
        devices[one.name] = _replaced(told, keep_at_least=arguments.keep_at_least)
    of_pools = {name: getattr(arguments, name) for name in ("keep_at_least", "reserve", "quota", "journal_limit")}
    return _replaced(
        config,
        listen=tuple(arguments.listen) if arguments.listen else None,
        insecure=arguments.insecure or None,
        scrub_every=arguments.scrub_every,
        tls=complete(arguments.tls_cert, arguments.tls_key, arguments.tls_ca, arguments.tls_crl),
        pool={name: _replaced(pool, **of_pools) for name, pool in pools.items()},
        device=devices,
        limits=_replaced(config.limits, lease=arguments.lease),
    )


def _replaced(struct: T, **said: object) -> T:
    """`struct` with what was said; None was not."""
    return msgspec.structs.replace(struct, **{name: value for name, value in said.items() if value is not None})
