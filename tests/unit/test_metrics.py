"""The page of metrics: what it says, and what it refuses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from blockferry.common import metrics
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.metrics import Pages, metrics_page, new_registry
from prometheus_client import Counter


@pytest.fixture
async def port() -> AsyncIterator[int]:
    """Of pages with one page of metrics."""
    registry = new_registry()
    Counter("ferries", "Ferries that have left.", registry=registry).inc(3)
    pages = Pages({"/metrics": metrics_page(registry)})
    url = await pages.open("127.0.0.1:0")
    yield int(url.rpartition(":")[2])
    await pages.close()


async def said(port: int, request: bytes) -> tuple[str, dict[str, str], bytes]:
    """The first line, the headers and the body of the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    answer = await reader.read()
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    return first, dict(line.split(": ", 1) for line in lines), body


async def test_the_page(port: int) -> None:
    first, headers, body = await said(port, b"GET /metrics?x=y HTTP/1.1\r\nHost: x\r\n\r\n")
    assert first == "HTTP/1.1 200 OK"
    assert headers["Content-Type"] == metrics.CONTENT_TYPE
    assert headers["Content-Length"] == str(len(body))
    lines = body.decode().splitlines()
    assert "ferries_total 3.0" in lines
    assert any(line.startswith("process_resident_memory_bytes ") for line in lines)
    first, headers, body = await said(port, b"HEAD /metrics HTTP/1.0\r\n\r\n")
    assert (first, body) == ("HTTP/1.1 200 OK", b"")
    assert int(headers["Content-Length"]) > 0


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "404 Not Found"),
        (b"POST /metrics HTTP/1.1\r\n\r\n", "405 Method Not Allowed"),
        (b"GET /metrics\r\n\r\n", "400 Bad Request"),
        (b"\x16\x03\x01\x00\r\n\r\n", "400 Bad Request"),
        (b"GET /" + b"x" * 2 * metrics.HEAD_BYTES, "400 Bad Request"),
    ],
    ids=range(5),
)
async def test_what_is_refused(port: int, request_: bytes, status: str) -> None:
    first, _, _ = await said(port, request_)
    assert first == f"HTTP/1.1 {status}"


async def test_who_says_nothing_is_in_nobodys_way(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "REQUEST_SECONDS", 0.2)
    silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(metrics.MOST_CONNECTIONS)]
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    assert await reader.read() == b"", "one too many"
    writer.close()
    for reader, writer in silent:
        assert await reader.read() == b"", "given up"
        writer.close()
    first, _, _ = await said(port, b"GET /metrics HTTP/1.1\r\n\r\n")
    assert first == "HTTP/1.1 200 OK"


async def test_an_address_that_is_taken(port: int) -> None:
    with pytest.raises(BlockferryError) as caught:
        await Pages({}).open(f"127.0.0.1:{port}")
    assert caught.value.code is Code.IN_USE
