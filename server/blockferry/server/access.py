"""Who a client is."""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote

import grpc.aio


def identity_of(context: grpc.aio.ServicerContext[Any, Any]) -> str:
    """Whom a call comes from: the host for TCP, `local` for UNIX sockets."""
    peer = unquote(context.peer())
    kind, _, address = peer.partition(":")
    return address.rpartition(":")[0].strip("[]") if kind in ("ipv4", "ipv6") else "local"
