"""The configuration files: every section and key, its default and its range, and how a file is read.

A file is TOML and read strictly (strict.py): whatever is unknown, missing or out of range is an error, and all errors
are said at once. Everything here is pure but `load`. docs/configuration.md describes every key for people.
"""

from __future__ import annotations

import posixpath
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from blockferry.common.address import Address, check_volume_name
from blockferry.common.errors import BlockferryError, Code, from_os_error
from blockferry.common.nbd.uri import NbdUri, is_nbd_uri
from blockferry.common.retention import DEFAULT, Retention
from blockferry.common.strict import Problem, Reads, join, read
from blockferry.common.units import parse_duration, parse_seconds, parse_size

DEFAULT_LISTEN = "grpc://127.0.0.1:9870"
LARGEST_FILE = 1024 * 1024
"""Bytes of a configuration file: thousands of sections. Whoever names a device by mistake is told so."""

_NEWLINE = b"\n"
_MOST_SHOWN = 100
"""Lines about one file: nobody reads more."""

MIB, TIB = 1 << 20, 1 << 40


# --- kinds of values ----------------------------------------------------------------------------------------------


def _absolute(text: str) -> Path:
    if not text.startswith("/") or "\0" in text:
        # A server is started from wherever its supervisor happens to be.
        raise _bad(f"{text!r} is not an absolute path", "write it from / on")
    return Path(text)


def _listen(text: str) -> str:
    if Address.parse(text).volume:
        raise _bad(
            f"{text!r} names a volume", "write grpc://HOST:PORT or grpc+unix:///SOCKET: a server serves them all"
        )
    return text


def _device(text: str) -> str:
    return NbdUri.parse(text).uri if is_nbd_uri(text) else str(_absolute(text))


def _pattern(text: str) -> str:
    if not text:
        raise _bad("an empty pattern matches no volume", 'write a name, or a pattern such as "erp-*" or "*"')
    return text


def _san(text: str) -> str:
    if not text or any(not character.isprintable() for character in text):
        raise _bad("this is no subject alternative name", 'write it as it is in the certificate: "agent.site-a"')
    return text


def _between(parse: Callable[[str], Any], least: float, most: float, words: str) -> Callable[[str], Any]:
    """`parse`, and a range; `words` is the range as people would write it."""

    def parsed(text: str) -> Any:
        value = parse(text)
        if not least <= value <= most:
            raise _bad(f"{text!r} is out of range", f"write {words}")
        return value

    return parsed


def _bad(what: str, next_step: str) -> BlockferryError:
    return BlockferryError(Code.INVALID_ARGUMENT, what, next=next_step)


_SIZE = 'a size such as "10G"'
_DURATION = 'a duration such as "7d"'

AbsolutePath = Annotated[Path, Reads(_absolute, "an absolute path")]
KeyPath = Annotated[Path, Reads(_absolute, "the absolute path of a file with a private key", secret=True)]
Name = Annotated[str, Reads(check_volume_name, "a name")]
Listen = Annotated[str, Reads(_listen, 'an address such as "grpc://127.0.0.1:9870"')]
Size = Annotated[int, Reads(parse_size, _SIZE, numbers=True)]
Duration = Annotated[int, Reads(parse_duration, _DURATION, numbers=True)]
Lease = Annotated[float, Reads(_between(parse_seconds, 0.1, 86400, "0.1s to 24h"), 'a duration such as "60s"')]
MessageSize = Annotated[int, Reads(_between(parse_size, 5 * MIB, 64 * MIB, "5M to 64M"), _SIZE, numbers=True)]
InFlight = Annotated[int, Reads(_between(parse_size, MIB, TIB, "1M to 1T"), _SIZE, numbers=True)]
Count = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]


# --- server.toml --------------------------------------------------------------------------------------------------

TLS_ENVIRONMENT = "BLOCKFERRY_TLS_"
"""Before CERT, KEY and CA: files for commands that are given none."""


class Tls(msgspec.Struct, frozen=True):
    """Mutual TLS: this side's certificate and key, the authority that must have signed the other side's, and what it
    has revoked. PEM files."""

    cert: AbsolutePath
    key: KeyPath
    ca: AbsolutePath
    crl: AbsolutePath | None = None


class Grant(msgspec.Struct, frozen=True):
    """What whoever has a certificate with this subject alternative name may do, and with which volumes."""

    san: Annotated[str, Reads(_san, "text")]
    role: Literal["agent", "operator", "viewer"]
    volumes: tuple[Annotated[str, Reads(_pattern, "a name or a pattern")], ...] = ("*",)
    """Shell-style patterns."""


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
    scrub_every: Duration = 0
    """Seconds; 0: never."""
    tls: Tls | None = None
    pool: dict[Name, PoolConfig] = {}
    """In the order of the file: new replicas go to the first."""
    device: dict[Name, DeviceConfig] = {}
    limits: LimitsConfig = LimitsConfig()
    grant: tuple[Grant, ...] = ()


def _check_server(config: ServerConfig, sound: Callable[[str], bool]) -> Iterator[Problem]:
    """What is wrong between keys. `sound`: nothing is wrong inside this section, so that one mistake is said once."""
    if config.grant and config.tls is None and sound("tls"):
        yield Problem("grant", "without TLS nobody can be told apart", "add a section [tls], or remove the grants")
    if not config.listen and sound("listen"):
        yield Problem("listen", "a server that listens nowhere serves nobody", "name an address, or leave it out")
    if sound("insecure") and not config.insecure:
        for index, uri in enumerate(config.listen):
            address = Address.parse(uri)
            if not address.tls and not address.loopback and sound("listen"):
                yield Problem(
                    f"listen[{index}]",
                    "without TLS anybody on the way could read and change whole disks",
                    "use grpcs://, a loopback address, or insecure = true here and --insecure at clients if the "
                    "network itself is trusted",
                )
    for index, uri in enumerate(config.listen if sound("listen") else ()):
        if Address.parse(uri).tls and config.tls is None and sound("tls"):
            yield Problem(f"listen[{index}]", "TLS needs a certificate", "add a section [tls] with cert, key and ca")
        if config.grant and sound("grant") and plaintext(uri):
            yield Problem(f"listen[{index}]", *USELESS)
    yield from _check_overlap(config.pool)
    yield from _check_devices(config.device)


USELESS = (
    "with grants nobody could use it: plaintext over TCP has no identity",
    "use grpcs://, or grpc+unix:// for whoever administers this host",
)


def plaintext(uri: str) -> bool:
    """Whether an address is plaintext over TCP."""
    address = Address.parse(uri)
    return not address.tls and bool(address.host)


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
    check: Callable[[Any, Callable[[str], bool]], Iterator[Problem]]


KINDS = {"server": Kind(ServerConfig, _check_server)}
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
    wrong = {problem.path.split(".")[0].split("[")[0] for problem in problems}
    problems += KINDS[kind].check(config, lambda section: section not in wrong)
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
