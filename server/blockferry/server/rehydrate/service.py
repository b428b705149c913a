"""The Rehydration service: looking at a disk, and snapshots of it. On a UNIX socket in --state, for who may go in."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import grpc.aio
from blockferry.common import rpc
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.rehydration import SOCKET
from blockferry.server.rehydrate.hydration import Hydration
from blockferry.v1 import rehydration_pb2 as pb

Context = grpc.aio.ServicerContext[Any, Any]

WATCH_SECONDS = 1.0

_LONGEST_SOCKET = 107
"""Bytes of the path of a UNIX socket (unix(7))."""


class RehydrationService:
    """Serves `blockferry.v1.Rehydration` for one disk."""

    def __init__(self, hydration: Hydration, address: str) -> None:
        self._hydration = hydration
        self._address = address

    async def ShowRehydration(self, _: pb.ShowRehydrationRequest, __: Context) -> pb.ShowRehydrationResponse:
        return pb.ShowRehydrationResponse(status=self._hydration.status(self._address))

    async def WatchRehydration(
        self, _: pb.WatchRehydrationRequest, __: Context
    ) -> AsyncIterator[pb.WatchRehydrationResponse]:
        completed = self._hydration.completed
        while not completed.is_set():
            yield pb.WatchRehydrationResponse(status=self._hydration.status(self._address))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(completed.wait(), WATCH_SECONDS)
        yield pb.WatchRehydrationResponse(status=self._hydration.status(self._address))

    async def SnapshotRehydration(
        self, request: pb.SnapshotRehydrationRequest, _: Context
    ) -> pb.SnapshotRehydrationResponse:
        path, state, hydrated = await self._hydration.snapshot(request.name)
        return pb.SnapshotRehydrationResponse(path=str(path), state=str(state), hydrated=hydrated)


class _Everybody:
    """Directory permissions say who gets as far as the socket."""

    def admit(self, method: str, request: Any, context: Context) -> Callable[[], None]:
        return lambda: None


async def serve(hydration: Hydration, address: str, state: Path) -> rpc.Server:
    """Start to serve; whoever asked for it stops the server."""
    path = f"{Path.cwd() / state / SOCKET}"
    if len(os.fsencode(path)) > _LONGEST_SOCKET:
        raise BlockferryError(
            Code.UNSUPPORTED,
            f"cannot listen on {path}",
            cause=f"the path of a socket has at most {_LONGEST_SOCKET} bytes",
            next="use a --state with a shorter path",
        )
    server = rpc.make_server()
    service = pb.DESCRIPTOR.services_by_name["Rehydration"]
    rpc.add_service(server, service, RehydrationService(hydration, address), _Everybody())
    rpc.bind(server, f"grpc+unix://{quote(path)}", insecure=False)
    await server.start()
    return server
