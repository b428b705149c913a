"""NBD URIs (pure): `nbd://HOST[:PORT]/EXPORT`, `nbd+unix:///EXPORT?socket=PATH`, and `nbds://`, `nbds+unix://` for TLS.

Source: doc/uri.md of NetworkBlockDevice/nbd. Of its parameters `socket` and `tls-hostname` are known here, and libnbd's
`tls-certificates` (a directory with `ca-cert.pem`, and `client-cert.pem` and `client-key.pem` where the server asks for
them). All others are refused: one that is not understood might be the one that makes a connection safe.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import quote, unquote, urlsplit

from blockferry.common.address import is_loopback
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.nbd.protocol import MAX_STRING

DEFAULT_PORT = 10809
"""Assigned by IANA."""

_SCHEMES = ("nbd", "nbd+unix", "nbds", "nbds+unix")
_TLS_PARAMETERS = ("tls-hostname", "tls-certificates")


def is_nbd_uri(uri: str) -> bool:
    """Whether `uri` names an NBD export."""
    return uri.split(":", 1)[0] in _SCHEMES


@dataclass(frozen=True)
class NbdUri:
    """Where a server is, and which of its exports is meant (empty: its default)."""

    uri: str
    export: str
    socket: str
    """Path of a UNIX socket, or empty."""
    host: str
    port: int
    tls: bool
    """TLS or nothing: there is no falling back."""
    tls_hostname: str
    """The name the server's certificate must have."""
    tls_certificates: str
    """A directory, or empty for the system's authorities."""

    @property
    def local(self) -> bool:
        """Reachable from this machine only: plaintext is allowed."""
        return bool(self.socket) or is_loopback(self.host)

    @classmethod
    def parse(cls, uri: str) -> NbdUri:
        """Raise INVALID_ARGUMENT for anything that is not an NBD URI."""
        if any(character < " " or character == "\x7f" for character in uri):
            # urlsplit would drop some of them silently, and another export would be meant.
            raise _bad(uri, "it has a control character")
        try:
            parts = urlsplit(uri)
            port = parts.port
            export = unquote(parts.path[1:], errors="strict")
            parameters = _parameters(uri, parts.query)
        except ValueError as error:
            raise _bad(uri, str(error)) from error
        if parts.scheme not in _SCHEMES:
            raise _bad(uri, f"{parts.scheme or 'no'} scheme")
        if parts.fragment or parts.username is not None:
            raise _bad(uri, "user names and fragments have no meaning here")
        if "\0" in export or len(export.encode()) > MAX_STRING:
            raise _bad(uri, f"an export's name has at most {MAX_STRING} bytes, and no NUL")
        tls, unix = parts.scheme.startswith("nbds"), parts.scheme.endswith("+unix")
        socket = parameters.pop("socket", "")
        if unix != bool(socket) or "\0" in socket[1:]:
            raise _bad(uri, "it names no socket" if unix else "only nbd+unix:// and nbds+unix:// have a socket")
        if unix and parts.netloc:
            raise _bad(uri, "a socket has no host")
        if not unix and not parts.hostname:
            raise _bad(uri, "it names no host")
        if parameters and not tls:
            raise _bad(uri, f"{next(iter(parameters))} has no meaning without TLS")
        host = parts.hostname or ""
        return cls(
            uri,
            export,
            socket,
            host,
            DEFAULT_PORT if port is None else port,
            tls,
            parameters.get("tls-hostname", host or "localhost"),
            parameters.get("tls-certificates", ""),
        )


@dataclass(frozen=True)
class NbdListen:
    """Where a server listens: `unix:PATH`, or `HOST:PORT` with port 0 for any."""

    socket: str
    """Path of a UNIX socket, or empty."""
    host: str
    port: int

    @property
    def local(self) -> bool:
        """Reachable from this machine only: plaintext is allowed."""
        return bool(self.socket) or is_loopback(self.host)

    @classmethod
    def parse(cls, text: str) -> NbdListen:
        """Raise INVALID_ARGUMENT for anything else."""
        kind, _, path = text.partition(":")
        if kind == "unix" and path and "\0" not in path:
            return cls(path, "", 0)
        host, colon, port = text.rpartition(":")
        number = int(port) if port.isascii() and port.isdigit() and len(port) <= 5 else -1
        bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
        if kind == "unix" or not colon or not bare or not 0 <= number < 1 << 16 or (":" in bare and bare == host):
            raise BlockferryError(
                Code.INVALID_ARGUMENT,
                f"{text!r} is no place to listen",
                cause="it is neither unix:PATH nor HOST:PORT",
                next="write unix:/run/disk.sock or 127.0.0.1:10809",
            )
        return cls("", bare, number)

    def uri(self, export: str, *, tls: bool) -> str:
        """What clients of an export write."""
        scheme = "nbds" if tls else "nbd"
        if self.socket:
            return f"{scheme}+unix:///{quote(export, safe='')}?socket={quote(self.socket)}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{scheme}://{host}:{self.port}/{quote(export, safe='')}"


def _parameters(uri: str, query: str) -> dict[str, str]:
    """Percent-decoded; a plus is a plus (parse_qs would make a space of it, as forms do)."""
    found: dict[str, str] = {}
    for part in filter(None, query.split("&")):
        name, _, value = part.partition("=")
        name = unquote(name, errors="strict")
        if name not in ("socket", *_TLS_PARAMETERS):
            raise _bad(uri, f"the parameter {name!r} is not known; socket, tls-hostname and tls-certificates are")
        if name in found:
            raise _bad(uri, f"{name} is given twice")
        found[name] = unquote(value, errors="strict")
    return found


def _bad(uri: str, cause: str) -> BlockferryError:
    return BlockferryError(
        Code.INVALID_ARGUMENT,
        f"{uri!r} is not a usable NBD URI",
        cause=cause,
        next="write nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH; nbds for TLS",
    )
