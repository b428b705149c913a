"""Why a server cannot be reached, found out afterwards: gRPC says "unavailable" to whatever goes wrong in a handshake.

One connection of Python's `ssl` shows what the two sides do not like about each other. It carries no data.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable
from typing import TypeVar

from blockferry.common.address import Address
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.tls import Material, client_context

PROBE_SECONDS = 3.0
"""For each step: connecting, the handshake, the server's first word."""

T = TypeVar("T")

# X509_V_ERR_* of OpenSSL.
_NOT_YET_VALID, _EXPIRED = 9, 10
_OTHER_NAME = (62, 64)


class _Connection:
    """TLS over a socket that stays the caller's: `SSLContext.wrap_socket` leaks one whose peer is already gone."""

    def __init__(self, context: ssl.SSLContext, raw: socket.socket, host: str) -> None:
        context.set_alpn_protocols(["h2"])
        self._raw = raw
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=host)

    def shake_hands(self) -> None:
        """Raises OSError, of which ssl.SSLError is one."""
        self._carry(self._tls.do_handshake)

    def hears(self) -> bool:
        """Whether the peer says anything before it closes. Raises OSError."""
        return self._carry(lambda: self._tls.read(1)) != b""

    def _carry(self, step: Callable[[], T]) -> T:
        while True:
            try:
                result = step()
                self._send()
                return result
            except ssl.SSLWantReadError:
                self._send()
                if data := self._raw.recv(65536):
                    self._incoming.write(data)
                else:
                    self._incoming.write_eof()

    def _send(self) -> None:
        if data := self._outgoing.read():
            self._raw.sendall(data)


def why_unreachable(address: Address, material: Material | None) -> BlockferryError | None:
    """What is wrong between us and the server at `address`; None where nothing is, or it is something else. Blocks."""
    if not address.port:
        return None
    try:
        with socket.create_connection((address.host, address.port), PROBE_SECONDS) as raw:
            raw.settimeout(PROBE_SECONDS)
            return _over_tls(address, material, raw) if material is not None else _in_the_clear(address, raw)
    except OSError:
        return None


def _over_tls(address: Address, material: Material, raw: socket.socket) -> BlockferryError | None:
    connection = _Connection(client_context(material.files), raw, address.host)
    try:
        connection.shake_hands()
    except ssl.SSLCertVerificationError as error:
        return _server_refused(address, error)
    except ssl.SSLError as error:
        if error.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST"):
            return _failed(
                address, "the server there speaks plaintext", "write grpc:// if that is meant, or give the server "
                "--tls-cert, --tls-key and --tls-ca",
            )  # fmt: skip
        return _we_were_refused(address, material, error.reason) if "ALERT" in (error.reason or "") else None
    # Since TLS 1.3 a server refuses after the handshake is over for its client. One that agrees speaks first.
    try:
        return None if connection.hears() else _we_were_refused(address, material, "")
    except TimeoutError:
        return None
    except OSError as error:
        return _we_were_refused(address, material, getattr(error, "reason", ""))


def _server_refused(address: Address, error: ssl.SSLCertVerificationError) -> BlockferryError:
    if error.verify_code == _EXPIRED:
        return _failed(address, "the server's certificate has expired", "have it renewed, and check the clock here")
    if error.verify_code == _NOT_YET_VALID:
        return _failed(address, "the server's certificate is not valid yet", "check the clocks of both machines")
    if error.verify_code in _OTHER_NAME:
        return _failed(
            address, f"the server's certificate does not name {address.host}", "dial it by a name that it has, or "
            "have it issued with this one",
        )  # fmt: skip
    return _failed(
        address, f"no authority in --tls-ca has issued the server's certificate ({error.verify_message})",
        "name the file of the authority that has, and beware: it may be another server",
    )  # fmt: skip


def _we_were_refused(address: Address, material: Material, reason: str | None) -> BlockferryError:
    own, reason = material.own, reason or ""
    if not material.issued_own():
        cause = f"the server does not accept {material.files.cert}, which {own.issuer} has issued and no authority in "
        cause += "--tls-ca"
    else:
        cause = f"the server does not accept {material.files.cert} ({own.label}, issued by {own.issuer})"
    said = f": {reason.lower().replace('_', ' ')}" if "ALERT" in reason else ""
    return _failed(
        address,
        f"{cause}{said}",
        "have one issued by an authority in the server's ca file; the server's log says what it dislikes",
    )


def _in_the_clear(address: Address, raw: socket.socket) -> BlockferryError | None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        _Connection(context, raw, address.host).shake_hands()
    except OSError:
        return None
    return _failed(
        address, "the server there speaks TLS only", "write grpcs://, with --tls-cert, --tls-key and --tls-ca"
    )


def _failed(address: Address, cause: str, next_step: str) -> BlockferryError:
    return BlockferryError(Code.TLS, f"cannot talk to {address.uri}", cause=cause, next=next_step)
