"""Every call passes here: it is counted for its client, waits its turn, or is refused (limits.py).

A client that is refused or has to wait is named in the log, once in a while and with a count: a log that grows with
every call of whoever floods the server would be another way to harm it.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import grpc.aio
import structlog
from blockferry.common import rpc
from blockferry.common.access import identity_of
from blockferry.common.errors import BlockferryError
from blockferry.server.limits import Limits

log = structlog.get_logger("blockferry.limits")

REFUSAL_SECONDS = 1.0
"""A refusal is told after this long, so that whoever asks again at once asks no more often than that on each of its
streams."""

LOG_SECONDS = 10.0
"""Between two lines about one client."""

MOST_NAMED = 1024
"""Clients whose last line is remembered."""

Context = grpc.aio.ServicerContext[Any, Any]


class Admission(grpc.aio.ServerInterceptor):
    """Applies the limits to every call of every service."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._said: dict[tuple[str, str], tuple[float, int]] = {}
        """When the last line about a client was written, and how often it could have been since."""

    async def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        """Called by gRPC for every call, before there is one."""
        handler = await continuation(details)
        return handler and _around(handler, lambda context: self._admitted(context, details.method))

    @contextlib.asynccontextmanager
    async def _admitted(self, context: Context, method: str) -> AsyncIterator[None]:
        client = identity_of(context)
        with contextlib.ExitStack() as stack:
            try:
                buckets = stack.enter_context(self._limits.call(client, context.peer()))
            except BlockferryError as error:
                self._say("refused", client, method, error.cause)
                await asyncio.sleep(REFUSAL_SECONDS)
                await rpc.abort(context, error)
            for bucket in buckets:
                if (seconds := bucket.take()) > 0:
                    self._say("slowed down", client, method, "it makes more calls per second than it may")
                    await asyncio.sleep(seconds)
            yield

    def _say(self, what: str, client: str, method: str, cause: str) -> None:
        now = time.monotonic()
        last, times = self._said.get((client, what), (-LOG_SECONDS, 0))
        if now - last < LOG_SECONDS:
            self._said[client, what] = last, times + 1
            return
        if len(self._said) >= MOST_NAMED:
            self._said.clear()
        self._said[client, what] = now, 0
        log.warning(f"client {what}", client=client, method=method, cause=cause, times=times + 1)


def _around(handler: Any, admitted: Callable[[Context], contextlib.AbstractAsyncContextManager[None]]) -> Any:
    """A handler that does what `handler` does once it is admitted."""
    kind = ("stream" if handler.request_streaming else "unary") + (
        "_stream" if handler.response_streaming else "_unary"
    )
    behaviour: Callable[..., Any] = getattr(handler, kind)

    async def generate(request: Any, context: Context) -> AsyncIterator[Any]:
        async with admitted(context), contextlib.aclosing(behaviour(request, context)) as responses:
            async for response in responses:
                yield response

    async def answer(request: Any, context: Context) -> Any:
        async with admitted(context):
            return await behaviour(request, context)

    make = getattr(grpc, f"{kind}_rpc_method_handler")
    return make(
        generate if inspect.isasyncgenfunction(behaviour) else answer,
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )
