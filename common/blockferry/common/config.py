"""The configuration files: what a server's may say (an agent's: agent_config.py), and how a file is read.

A file is TOML and read strictly (strict.py): whatever is unknown, missing or out of range is an error, and all errors
are said at once. Everything here is pure but `load`. docs/configuration.md describes every key for people.
"""

from __future__ import annotations

import posixpath
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
from blockferry.common.agent_config import AgentConfig, check_agent
from blockferry.common.errors import BlockferryError, Code, from_os_error
from blockferry.common.nbd.uri import NbdUri, is_nbd_uri
from blockferry.common.retention import DEFAULT, Retention
from blockferry.common.settings import (
    MIB,
    AbsolutePath,
    Count,
    Duration,
    Grant,
    HostAndPort,
    InFlight,
    Lease,
    Listen,
    MessageSize,
    Name,
    Size,
    Sound,
    Tls,
    absolute,
    check_serving,
)
from blockferry.common.strict import Problem, Reads, join, read

DEFAULT_LISTEN = "grpc://127.0.0.1:9870"
LARGEST_FILE = 1024 * 1024
"""Bytes of a configuration file: thousands of sections. Whoever names a device by mistake is told so."""

_NEWLINE = b"\n"
_MOST_SHOWN = 100
"""Lines about one file: nobody reads more."""


# --- server.toml --------------------------------------------------------------------------------------------------


def _device(text: str) -> str:
    return NbdUri.parse(text).uri if is_nbd_uri(text) else str(absolute(text))


class PoolConfig(msgspec.Struct, frozen=True):
    """A directory of replicas. Sizes in bytes."""

    path: AbsolutePath
    reserve: Size | None = None
    """None: what fits the file system."""
    quota: Size = 0
    """0: any amount, here and below."""
    journal_limit: Size = 0
    keep_at_least: Retention = DEFAULT


class DeviceConfig(msgspec.Struct, frozen=True):
    """A block device or an NBD export that is a replica. Sizes in bytes."""

    path: Annotated[str, Reads(_device, "the path of a device, or an nbd:// address")]
    journal: AbsolutePath
    """A directory on another disk."""
    journal_limit: Size = 0
    keep_at_least: Retention = DEFAULT


class ClientLimits(msgspec.Struct, frozen=True):
    """What one client may take of a server."""

    sessions: Count = 32
    calls: Count = 256
    """In progress at once."""
    connections: Count = 64
    calls_per_second: Count = 2000
    bytes_in_flight: InFlight = 64 * MIB


class LimitsConfig(msgspec.Struct, frozen=True):
    """What a server lets all its clients together take, and each of them."""

    lease: Lease = 60.0
    """Seconds a silent source keeps a replica to itself: longer than any pause of a source that is alive, shorter than
    anybody likes to wait for a dead one."""
    message_size: MessageSize = 17 * MIB
    """A region of the largest size, 16 MiB, and what is said with it. With less than 5 MiB no sync would work: sources
    gather 4 MiB."""
    sessions: Count = 64
    calls: Count = 1024
    connections: Count = 256
    calls_per_second: Count = 4000
    bytes_in_flight: InFlight = 256 * MIB
    per_client: ClientLimits = ClientLimits()


class ServerConfig(msgspec.Struct, frozen=True):
    """`server.toml`."""

    listen: tuple[Listen, ...] = (DEFAULT_LISTEN,)
    insecure: bool = False
    status_page: HostAndPort | None = None
    """None: no metrics over HTTP."""
    scrub_every: Duration = 0
    """Seconds; 0: never."""
    tls: Tls | None = None
    pool: dict[Name, PoolConfig] = {}
    """In the order of the file: new replicas go to the first."""
    device: dict[Name, DeviceConfig] = {}
    limits: LimitsConfig = LimitsConfig()
    grant: tuple[Grant, ...] = ()


def _check_server(config: ServerConfig, sound: Sound) -> Iterator[Problem]:
    """What is wrong between keys."""
    yield from check_serving(config, sound)
    yield from _check_overlap(config.pool)
    yield from _check_devices(config.device)


def _check_overlap(pools: dict[str, PoolConfig]) -> Iterator[Problem]:
    """As far as paths tell: a server looks at the directories themselves."""
    seen: list[tuple[str, str]] = []
    for name, pool in pools.items():
        path, below = posixpath.normpath(pool.path), join(join("pool", name), "path")
        for other, known in seen:
            if path == known:
                yield Problem(below, f"is the directory of pool {other} too", "give each pool a directory of its own")
            elif f"{path}/".startswith(f"{known}/") or f"{known}/".startswith(f"{path}/"):
                yield Problem(below, f"{path} and {known} are inside each other", "use directories beside each other")
        seen.append((name, path))


def _check_devices(devices: dict[str, DeviceConfig]) -> Iterator[Problem]:
    """As far as names tell: what is one device under two names is claimed by the first that opens it."""
    seen: dict[str, str] = {}
    for name, device in devices.items():
        other = seen.setdefault(device.path, name)
        if other != name:
            yield Problem(
                join(join("device", name), "path"), f"is the device of {other} too", "give each device one name"
            )


# --- files --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A kind of configuration file: its schema, and what must hold between its keys."""

    schema: type[msgspec.Struct]
    check: Callable[[Any, Sound], Iterator[Problem]]


KINDS = {"server": Kind(ServerConfig, _check_server), "agent": Kind(AgentConfig, check_agent)}
"""By the name of the program that reads them."""


class ConfigError(BlockferryError):
    """A configuration file, and everything that is wrong with it."""

    def __init__(self, file: str, problems: Sequence[Problem]) -> None:
        self.file = file
        self.problems = list(problems)
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        super().__init__(
            Code.INVALID_ARGUMENT,
            f"{file} is not a valid configuration",
            cause=f"{self.problems[0].line()}{more}",
            next="blockferry config check shows all that is wrong",
        )

    def lines(self) -> list[str]:
        """A line for each problem."""
        shown = [f"{self.file}: {problem.line()}" for problem in self.problems[:_MOST_SHOWN]]
        left = len(self.problems) - len(shown)
        return [*shown, f"{self.file}: and {left} more"] if left else shown

    def fields(self) -> dict[str, Any]:
        """As of any error, and all `problems`."""
        return {**super().fields(), "problems": [asdict(problem) for problem in self.problems]}


def kind_of(document: Mapping[str, object]) -> str:
    """Which kind of file it is: the one that knows most of its keys; of those that tie, the first."""
    return max(KINDS, key=lambda name: len(document.keys() & set(KINDS[name].schema.__struct_fields__)))


def parse(data: bytes, file: str) -> dict[str, object]:
    """The TOML document in `data`. Raises ConfigError, with line and column where it is none."""
    if len(data) > LARGEST_FILE:
        raise ConfigError(file, [Problem("", f"it is larger than {LARGEST_FILE} bytes", "name a configuration file")])
    try:
        return tomllib.loads(data.decode())
    except UnicodeDecodeError as error:
        line, column = data.count(_NEWLINE, 0, error.start) + 1, error.start - data.rfind(_NEWLINE, 0, error.start)
        cause = f"this is not UTF-8 (at line {line}, column {column})"
    except tomllib.TOMLDecodeError as error:
        end = f"at line {data.count(_NEWLINE) + 1}, column {len(data.rpartition(_NEWLINE)[2].decode()) + 1}, its end"
        cause = f"this is not TOML: {error}".replace("at end of document", end)
    except RecursionError:
        cause = "it is nested too deeply"
    except ValueError:
        # Decimal numbers of thousands of digits, which Python refuses to read.
        cause = "it has a number with far too many digits"
    # Without its origin: a traceback of that shows the document.
    raise ConfigError(file, [Problem("", cause, "correct it there")]) from None


def validate(kind: str, document: Mapping[str, object], file: str) -> msgspec.Struct:
    """The configuration a document means. Raises ConfigError with all that is wrong."""
    config, problems = read(KINDS[kind].schema, document)
    wrong = [problem.path for problem in problems]

    def sound(section: str) -> bool:
        return not any(path == section or path.startswith((f"{section}.", f"{section}[")) for path in wrong)

    problems += KINDS[kind].check(config, sound)
    if problems:
        raise ConfigError(file, problems)
    return config


def load_document(path: Path) -> dict[str, object]:
    """The TOML document in a file. Raises ConfigError, and NOT_FOUND or UNREADABLE."""
    try:
        with path.open("rb") as opened:
            data = opened.read(LARGEST_FILE + 1)
    except OSError as error:
        raise from_os_error(error, f"cannot read {path}") from error
    return parse(data, str(path))


def load_server(path: Path, *, insecure: bool = False) -> ServerConfig:
    """A server's file; `insecure` as if it said so. Raises as `load_document` and `validate`."""
    document = load_document(path)
    found = validate("server", {**document, "insecure": True} if insecure else document, str(path))
    assert isinstance(found, ServerConfig)
    return found


def load_agent(path: Path) -> AgentConfig:
    """An agent's file. Raises as `load_document` and `validate`."""
    found = validate("agent", load_document(path), str(path))
    assert isinstance(found, AgentConfig)
    return found
