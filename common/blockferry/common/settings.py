"""What the configuration files of all programs share (pure): kinds of values, the sections [tls] and [[grant]], and
what must hold between addresses, certificates and grants."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import msgspec
from blockferry.common.address import Address, check_volume_name, is_loopback
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.strict import Problem, Reads
from blockferry.common.units import parse_duration, parse_seconds, parse_size

MIB, TIB = 1 << 20, 1 << 40

# --- kinds of values ----------------------------------------------------------------------------------------------


def absolute(text: str) -> Path:
    """A path from / on. Raises INVALID_ARGUMENT."""
    if not text.startswith("/") or "\0" in text:
        # A program is started from wherever its supervisor happens to be.
        raise bad(f"{text!r} is not an absolute path", "write it from / on")
    return Path(text)


def _listen(text: str) -> str:
    if Address.parse(text).volume:
        raise bad(f"{text!r} names a volume", "write grpc://HOST:PORT or grpc+unix:///SOCKET: a server serves them all")
    return text


def _pattern(text: str) -> str:
    if not text:
        raise bad("an empty pattern matches no volume", 'write a name, or a pattern such as "erp-*" or "*"')
    return text


def _san(text: str) -> str:
    if not text or any(not character.isprintable() for character in text):
        raise bad("this is no subject alternative name", 'write it as it is in the certificate: "agent.site-a"')
    return text


def _host_and_port(text: str) -> str:
    host, colon, port = text.rpartition(":")
    if not (host and colon and port.isascii() and port.isdigit() and int(port[:6]) < 65536):
        raise bad(f"{text!r} is not HOST:PORT", 'write it like "127.0.0.1:9871" (port 0: any free one)')
    return text


def between(parse: Callable[[str], Any], least: float, most: float, words: str) -> Callable[[str], Any]:
    """`parse`, and a range; `words` is the range as people would write it."""

    def parsed(text: str) -> Any:
        value = parse(text)
        if not least <= value <= most:
            raise bad(f"{text!r} is out of range", f"write {words}")
        return value

    return parsed


def bad(what: str, next_step: str) -> BlockferryError:
    """A value that is wrong."""
    return BlockferryError(Code.INVALID_ARGUMENT, what, next=next_step)


SIZE = 'a size such as "10G"'
DURATION = 'a duration such as "7d"'

AbsolutePath = Annotated[Path, Reads(absolute, "an absolute path")]
KeyPath = Annotated[Path, Reads(absolute, "the absolute path of a file with a private key", secret=True)]
Name = Annotated[str, Reads(check_volume_name, "a name")]
HostAndPort = Annotated[str, Reads(_host_and_port, "HOST:PORT")]
Listen = Annotated[str, Reads(_listen, 'an address such as "grpc://127.0.0.1:9870"')]
Size = Annotated[int, Reads(parse_size, SIZE, numbers=True)]
Duration = Annotated[int, Reads(parse_duration, DURATION, numbers=True)]
Lease = Annotated[float, Reads(between(parse_seconds, 0.1, 86400, "0.1s to 24h"), 'a duration such as "60s"')]
MessageSize = Annotated[int, Reads(between(parse_size, 5 * MIB, 64 * MIB, "5M to 64M"), SIZE, numbers=True)]
InFlight = Annotated[int, Reads(between(parse_size, MIB, TIB, "1M to 1T"), SIZE, numbers=True)]
Count = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]


# --- sections -----------------------------------------------------------------------------------------------------

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


# --- between keys -------------------------------------------------------------------------------------------------

Sound = Callable[[str], bool]
"""Whether nothing is wrong inside a section, so that one mistake is said once."""


class Listens(Protocol):
    """The keys of every program that serves."""

    @property
    def listen(self) -> tuple[str, ...]: ...
    @property
    def status_page(self) -> str | None: ...
    @property
    def insecure(self) -> bool: ...
    @property
    def tls(self) -> Tls | None: ...
    @property
    def grant(self) -> tuple[Grant, ...]: ...


def check_serving(config: Listens, sound: Sound) -> Iterator[Problem]:
    """What is wrong between addresses, certificate and grants."""
    if config.status_page and not config.insecure and sound("insecure") and sound("status_page"):
        host = config.status_page.rpartition(":")[0].strip("[]")
        if not is_loopback(host):
            yield Problem(
                "status_page",
                "it has no TLS, and other machines could read the names of volumes",
                "use a loopback address, or insecure = true if the network itself is trusted",
            )
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


USELESS = (
    "with grants nobody could use it: plaintext over TCP has no identity",
    "use grpcs://, or grpc+unix:// for whoever administers this host",
)


def plaintext(uri: str) -> bool:
    """Whether an address is plaintext over TCP."""
    address = Address.parse(uri)
    return not address.tls and bool(address.host)
