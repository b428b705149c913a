"""Numbers for Prometheus, and the page they are on: a small answerer of GET over plain HTTP.

prometheus-client's own server answers from a thread of its own, and would look at our state while the event loop
changes it. This one answers from the event loop: what is collected at one moment fits together.
"""

from __future__ import annotations

import asyncio
import contextlib
import http
from collections.abc import Awaitable, Callable, Mapping

from blockferry.common.errors import BlockferryError, Code
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest

HEAD_BYTES = 8192
"""Of a request; nobody who asks for a page needs more."""

REQUEST_SECONDS = 5.0
"""From the connection to the end of the answer."""

MOST_CONNECTIONS = 16
"""At once: a scraper has one. More are closed unread."""

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""Prometheus's text format (https://prometheus.io/docs/instrumenting/exposition_formats)."""

Page = Callable[[], Awaitable[tuple[str, bytes]]]
"""Makes a page when it is asked for: its content type and its bytes."""


def new_registry() -> CollectorRegistry:
    """The metrics of one process: its own only, so that two in one process never mix. It begins with what the kernel
    says of the process: CPU seconds, memory, open files."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    return registry


def metrics_page(registry: CollectorRegistry, look: Callable[[], Awaitable[None]] | None = None) -> Page:
    """`/metrics`: all of a registry, after a `look` at what must be asked for."""

    async def page() -> tuple[str, bytes]:
        if look is not None:
            await look()
        return CONTENT_TYPE, generate_latest(registry)

    return page


class Pages:
    """Answers GET and HEAD for a few paths. One request to a connection; everything else is refused."""

    def __init__(self, pages: Mapping[str, Page]) -> None:
        self._pages = pages
        self._server: asyncio.Server | None = None
        self._answering: set[asyncio.Task[None]] = set()

    async def open(self, where: str) -> str:
        """Listen on `HOST:PORT` (port 0: any free one); where that is, as a URL. Raises IN_USE."""
        host, _, port = where.rpartition(":")
        try:
            self._server = await asyncio.start_server(self._connected, host.strip("[]"), int(port), limit=HEAD_BYTES)
        except OSError as error:
            raise BlockferryError(
                Code.IN_USE,
                f"cannot serve a status page on {where}",
                cause=(error.strerror or str(error)).lower(),
                next="choose another port, or stop whatever uses it",
            ) from error
        bound = self._server.sockets[0].getsockname()[1]
        return f"http://{host}:{bound}"

    async def close(self) -> None:
        """Stop listening, and cut off whoever is being answered."""
        if self._server is not None:
            self._server.close()
        for task in self._answering:
            task.cancel()
        await asyncio.gather(*self._answering, return_exceptions=True)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._answering) >= MOST_CONNECTIONS:
            writer.close()
            return
        task = asyncio.create_task(self._answer(reader, writer), name="page")
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Whoever goes away in between needs no answer.
        with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
            try:
                async with asyncio.timeout(REQUEST_SECONDS):
                    writer.write(await self._response(await _head(reader)))
                    await writer.drain()
            finally:
                writer.close()
                await writer.wait_closed()

    async def _response(self, head: bytes) -> bytes:
        words = head.split(b"\r\n", 1)[0].split(b" ")
        if len(words) != 3 or not words[2].startswith(b"HTTP/1."):
            return _message(http.HTTPStatus.BAD_REQUEST)
        if words[0] not in (b"GET", b"HEAD"):
            return _message(http.HTTPStatus.METHOD_NOT_ALLOWED, headers="Allow: GET, HEAD\r\n")
        page = self._pages.get(words[1].partition(b"?")[0].decode("latin-1"))
        if page is None:
            return _message(http.HTTPStatus.NOT_FOUND)
        kind, body = await page()
        return _message(http.HTTPStatus.OK, kind, body, bodiless=words[0] == b"HEAD")


async def _head(reader: asyncio.StreamReader) -> bytes:
    """All lines up to the empty one; empty where they are too long, which is no request either."""
    try:
        return await reader.readuntil(b"\r\n\r\n")
    except asyncio.LimitOverrunError:
        return b""


def _message(
    status: http.HTTPStatus,
    kind: str = "text/plain; charset=utf-8",
    body: bytes | None = None,
    *,
    headers: str = "",
    bodiless: bool = False,
) -> bytes:
    """A response of HTTP/1.1 (RFC 9112) that ends the connection."""
    body = f"{status.phrase}\n".encode() if body is None else body
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n{headers}"
        "Cache-Control: no-store\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + (b"" if bodiless else body)
