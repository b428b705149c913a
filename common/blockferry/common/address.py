"""Addresses of servers and replicas (pure).

`grpc://HOST:PORT[/VOLUME[@NUMBER]]`, `grpcs://` for mutual TLS, and `grpc+unix:///SOCKET[?volume=VOLUME[@NUMBER]]`. A
volume's name is `[A-Za-z0-9][A-Za-z0-9._-]{0,127}`: nothing a client sends ever becomes a path.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import parse_qs, unquote, urlsplit

from blockferry.common.errors import BlockferryError, Code

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", re.ASCII)
_SCHEMES = ("grpc", "grpcs", "grpc+unix")


def is_volume_name(name: str) -> bool:
    """Whether a replica, or a pool, can have this name."""
    return _NAME.fullmatch(name) is not None


def check_volume_name(name: str) -> str:
    """Return `name`, or raise INVALID_ARGUMENT."""
    if not is_volume_name(name):
        shown = name if len(name) <= 64 else f"{name[:61]}..."
        raise BlockferryError(
            Code.INVALID_ARGUMENT,
            f"{shown!r} is not a volume name",
            cause="a name has 1 to 128 letters, digits, dots, dashes or underscores and starts with a letter or digit",
            next="choose another name",
        )
    return name


def is_address(uri: str) -> bool:
    """Whether `uri` names a server or a replica rather than a local volume."""
    return uri.split(":", 1)[0] in _SCHEMES


@dataclass(frozen=True)
class Address:
    """Where a server is, and which of its volumes and generations is meant (`volume` empty: none; `number` 0: the
    newest)."""

    target: str
    """What gRPC dials or binds: `HOST:PORT` or `unix:/SOCKET`."""
    volume: str
    number: int
    loopback: bool
    """Reachable from this machine only: plaintext is allowed."""
    uri: str
    tls: bool = False

    @property
    def host(self) -> str:
        """What the server's certificate must name; empty for a socket."""
        return "" if self.target.startswith("unix:") else self.target.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """0 for a socket."""
        return 0 if self.target.startswith("unix:") else int(self.target.rpartition(":")[2])

    @classmethod
    def parse(cls, uri: str) -> Address:
        """Raise INVALID_ARGUMENT for anything that is not an address."""
        if any(character < " " or character == "\x7f" for character in uri):
            # urlsplit would drop some of them silently, and another volume would be meant.
            raise _bad(uri, "it has a control character")
        try:
            parts = urlsplit(uri)
            port = parts.port
        except ValueError as error:
            raise _bad(uri, str(error)) from error
        if parts.scheme not in _SCHEMES:
            raise _bad(uri, f"{parts.scheme or 'no'} scheme")
        if parts.fragment or parts.username is not None:
            raise _bad(uri, "it has a part that addresses do not have")
        if parts.scheme == "grpc+unix":
            query = parse_qs(parts.query, keep_blank_values=True)
            if parts.netloc or len(parts.path) < 2 or "\0" in unquote(parts.path):
                raise _bad(uri, "it names no socket")
            if set(query) - {"volume"} or len(query.get("volume", [""])) > 1:
                raise _bad(uri, "only volume= may follow the socket")
            volume, number = _volume_and_number(query.get("volume", [""])[0], uri)
            return cls(f"unix:{unquote(parts.path)}", volume, number, True, uri)
        if not parts.hostname or port is None:
            raise _bad(uri, "host and port are needed")
        if parts.query:
            raise _bad(uri, "it has a part that addresses do not have")
        volume, number = _volume_and_number(unquote(parts.path[1:]), uri)
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        return cls(f"{host}:{port}", volume, number, is_loopback(parts.hostname), uri, parts.scheme == "grpcs")

    def require_volume(self) -> Address:
        """Return self, or raise INVALID_ARGUMENT where no volume is named."""
        if not self.volume:
            raise _bad(self.uri, "it names no volume")
        return self


def _volume_and_number(text: str, uri: str) -> tuple[str, int]:
    if not text:
        return "", 0
    name, at, digits = text.partition("@")
    if at and not (digits.isascii() and digits.isdigit() and int(digits[:19]) > 0 and len(digits) < 19):
        raise _bad(uri, "after @ comes the number of a generation, 1 or more")
    return check_volume_name(name), int(digits) if at else 0


def is_loopback(host: str) -> bool:
    """Whether only this machine can be meant."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _bad(uri: str, cause: str) -> BlockferryError:
    return BlockferryError(
        Code.INVALID_ARGUMENT,
        f"{uri!r} is not a usable address",
        cause=cause,
        next="write grpc://HOST:PORT/VOLUME, grpcs:// for TLS, or grpc+unix:///SOCKET?volume=VOLUME",
    )
