"""What gRPC's own log says of handshakes, in our words, and not more often than anybody reads."""

from __future__ import annotations

import pytest
from blockferry.server import handshakes
from blockferry.server.handshakes import QUIET_SECONDS, Teller, cause_of

PREFIX = b"I1126 01:24:07.380245    8900 ssl_transport_security.cc:2563] Handshake failed with error SSL_ERROR_SSL: "


@pytest.mark.parametrize(
    ("said", "cause"),
    [
        (b"error:1000007d:SSL routines:OPENSSL_internal:CERTIFICATE_VERIFY_FAILED: certificate has expired", "expired"),
        (b"error:100000c0:SSL routines:OPENSSL_internal:PEER_DID_NOT_RETURN_A_CERTIFICATE: Invalid", "no certificate"),
        (b"error:100000f7:SSL routines:OPENSSL_internal:WRONG_VERSION_NUMBER: Invalid", "plaintext"),
        (b"error:100000f0:SSL routines:OPENSSL_internal:UNSUPPORTED_PROTOCOL: Invalid", "newer than TLS 1.1"),
        (b"error:12345678:something new", "error:12345678:something new"),
        (b"\xff\xfe", "\ufffd\ufffd"),
    ],
)  # fmt: skip
def test_causes(said: bytes, cause: str) -> None:
    assert cause in (cause_of(PREFIX + said) or "")


@pytest.mark.parametrize("line", [b"", b"Segmentation fault", b"E0000 chttp2_transport.cc:1] ping timeout"])
def test_everything_else_is_left_alone(line: bytes) -> None:
    assert cause_of(line) is None


def test_the_same_cause_is_not_told_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, int]] = []

    class Log:
        def warning(self, event: str, *, cause: str, times: int) -> None:
            told.append((cause, times))

    monkeypatch.setattr(handshakes, "log", Log())
    teller = Teller()
    for second in range(int(QUIET_SECONDS) + 1):
        teller.tell("one", 100.0 + second)
    teller.tell("two", 100.0)
    assert told == [("one", 1), ("one", int(QUIET_SECONDS)), ("two", 1)]
