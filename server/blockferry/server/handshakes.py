"""Handshakes that failed, in the server's log: gRPC tells nobody but its own log on descriptor 2.

The descriptor is replaced by a pipe; what gRPC says of handshakes becomes events with a cause in words, everything else
passes through as it is.
"""

from __future__ import annotations

import faulthandler
import os
import re
import sys
import threading
import time

import structlog

log = structlog.get_logger("blockferry.tls")

_LINE = re.compile(rb"Handshake failed with error (?:\w+: )?(.*)")
_NOISE = re.compile(
    rb"I\d{4} \d\d:\d\d:|W\d{4} .* log\.cc:\d+\] Log level INFO is not suitable|E\d{4} .* add_port\.cc:\d+\] "
)
"""The last is said by an error of ours."""
_CAUSES = {
    b"PEER_DID_NOT_RETURN_A_CERTIFICATE": "the client shows no certificate",
    b"certificate has expired": "the client's certificate has expired",
    b"certificate is not yet valid": "the client's certificate is not valid yet; check the clocks of both machines",
    b"unable to get local issuer certificate": "no authority of ours has issued the client's certificate",
    b"self-signed certificate": "no authority of ours has issued the client's certificate",
    b"WRONG_VERSION_NUMBER": "the client speaks plaintext, or no TLS at all",
    b"HTTP_REQUEST": "the client speaks plaintext, or no TLS at all",
    b"UNSUPPORTED_PROTOCOL": "the client knows nothing newer than TLS 1.1",
    b"CERTIFICATE_UNKNOWN": "the client does not trust our certificate",
    b"UNKNOWN_CA": "the client does not trust our certificate",
    b"BAD_CERTIFICATE": "the client does not trust our certificate",
    b"BAD_PACKET_LENGTH": "the client broke the handshake off; it may not trust our certificate",
}

QUIET_SECONDS = 10.0
"""Between two lines of the same cause: whoever can reach the port could fill the disk."""


def cause_of(line: bytes) -> str | None:
    """What a line of gRPC's log says of a handshake, in words; None where it is about something else (pure)."""
    found = _LINE.search(line)
    if found is None:
        return None
    for words, cause in _CAUSES.items():
        if words in found[1]:
            return cause
    return found[1].decode(errors="replace").strip()


class Teller:
    """Logs causes, each once in a while, with how often it was since."""

    def __init__(self) -> None:
        self._told: dict[str, float] = {}
        self._since: dict[str, int] = {}

    def tell(self, cause: str, now: float) -> None:
        """`now` in monotonic seconds."""
        self._since[cause] = self._since.get(cause, 0) + 1
        if now - self._told.get(cause, -QUIET_SECONDS) >= QUIET_SECONDS:
            self._told[cause] = now
            log.warning("TLS handshake failed", cause=cause, times=self._since.pop(cause))


def watch() -> None:
    """Begin, for the rest of the process: before logging is set up on sys.stderr."""
    real = os.dup(2)
    reading, writing = os.pipe()
    os.dup2(writing, 2)
    os.close(writing)
    # Ours go where they went. A crash must not wait for a thread.
    sys.stderr.flush()
    sys.stderr = os.fdopen(real, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
    faulthandler.enable(sys.stderr)
    threading.Thread(target=_pump, args=(reading, real), name="handshakes", daemon=True).start()


def _pump(reading: int, real: int) -> None:
    teller = Teller()
    with open(reading, "rb", buffering=0) as pipe:
        rest = b""
        while part := pipe.read(65536):
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                cause = cause_of(line)
                if cause is not None:
                    teller.tell(cause, time.monotonic())
                elif not _NOISE.match(line):
                    os.write(real, line + b"\n")
            if len(rest) > 65536:
                os.write(real, rest)
                rest = b""
