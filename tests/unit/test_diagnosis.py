"""Looking for the cause of a failed connection leaves nothing behind, whatever the peer does."""

from __future__ import annotations

import gc
import select
import socket
import struct
from typing import Any

import pytest
from blockferry.common.address import Address
from blockferry.common.diagnosis import why_unreachable


def test_a_peer_that_resets_the_connection_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    connect = socket.create_connection
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def connected_and_reset(*arguments: Any) -> socket.socket:
            ours = connect(*arguments)
            theirs, _ = listener.accept()
            # No wait at the end: the connection is reset.
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            theirs.close()
            assert select.select([ours], [], [], 10)[0]
            return ours

        monkeypatch.setattr(socket, "create_connection", connected_and_reset)
        assert why_unreachable(Address.parse(f"grpc://127.0.0.1:{listener.getsockname()[1]}/v"), None) is None
    # A socket that was left open would warn now, and warnings are errors.
    gc.collect()
