"""An imitation of S3 that answers what a test tells it to: for what a real one does only on bad days.

It knows objects, ranges, If-None-Match and listings (Amazon S3 API Reference), and checks no signatures.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape


@dataclass(frozen=True)
class Answer:
    """One answer: a status, a body, and how many bytes of that body are really sent before the connection is cut."""

    status: int
    body: bytes = b""
    cut_after: int | None = None
    headers: tuple[tuple[str, str], ...] = ()


def error(status: int, code: str) -> Answer:
    """An error as S3 tells it."""
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected</Message></Error>"
    return Answer(status, body.encode())


HANG = Answer(0)
"""Never answer."""
CUT = Answer(-1)
"""Close the connection instead."""


@dataclass
class S3:
    """The state, and what was asked: (method, key, header names in lower case with their values)."""

    bucket: str
    objects: dict[str, bytes] = field(default_factory=dict)
    asked: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    script: Callable[[str, str], Answer | None] = lambda method, key: None
    """What to answer instead, before anything is done."""
    lost: Callable[[str, str], bool] = lambda method, key: False
    """Whether the connection is cut after it was done."""
    port: int = 0
    page: int = 1000
    """Keys of one answer."""
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def endpoint(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def environment(self) -> dict[str, str]:
        """What says all of it to an S3 client."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "imitated",
            "AWS_SECRET_ACCESS_KEY": "imitated-secret",
            "AWS_REGION": "us-east-1",
        }

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        if (task := asyncio.current_task()) is not None:
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)
        try:
            await self._serve(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            method, target, _ = line.decode().split(" ", 2)
            headers = {}
            while (line := await reader.readline()).strip():
                name, _, value = line.decode().partition(":")
                headers[name.strip().lower()] = value.strip()
            body = await reader.readexactly(int(headers.get("content-length", "0")))
            if not await self._answer(writer, method, target, headers, body):
                return

    async def _answer(
        self, writer: asyncio.StreamWriter, method: str, target: str, headers: dict[str, str], body: bytes
    ) -> bool:
        parts = urlsplit(target)
        bucket, _, key = unquote(parts.path).lstrip("/").partition("/")
        self.asked.append((method, key, headers))
        found = self.script(method, key)
        if found is None:
            if bucket != self.bucket:
                found = error(404, "NoSuchBucket")
            else:
                found = self._do(method, key, parse_qs(parts.query), headers, body)
                if self.lost(method, key):
                    return False
        if found is HANG:
            await asyncio.sleep(3600)
        if found is CUT:
            return False
        length = len(found.body)
        lines = [f"HTTP/1.1 {found.status} Told", f"Content-Length: {length}", 'ETag: "imitated"']
        lines += [
            "Last-Modified: Wed, 01 Jan 2025 00:00:00 GMT",
            *(f"{name}: {value}" for name, value in found.headers),
        ]
        writer.write("\r\n".join([*lines, "", ""]).encode())
        if method != "HEAD":
            writer.write(found.body[: found.cut_after])
        await writer.drain()
        return found.cut_after is None

    def _do(self, method: str, key: str, query: dict[str, list[str]], headers: dict[str, str], body: bytes) -> Answer:
        if method == "GET" and "list-type" in query:
            return self._list(query)
        if method == "PUT":
            if headers.get("if-none-match") == "*" and key in self.objects:
                return error(412, "PreconditionFailed")
            self.objects[key] = body
            return Answer(200)
        if method == "POST":
            # DeleteObjects, which is how obstore deletes.
            gone = [part.split(b"</Key>", 1)[0].decode() for part in body.split(b"<Key>")[1:]]
            for one in gone:
                self.objects.pop(one, None)
            told = "".join(f"<Deleted><Key>{escape(one)}</Key></Deleted>" for one in gone)
            return Answer(200, f"<?xml version='1.0'?><DeleteResult>{told}</DeleteResult>".encode())
        if method == "DELETE":
            self.objects.pop(key, None)
            return Answer(204)
        if key not in self.objects:
            return error(404, "NoSuchKey")
        found = self.objects[key]
        if "range" not in headers:
            return Answer(200, found)
        first, _, last = headers["range"].removeprefix("bytes=").partition("-")
        start, stop = int(first), min(int(last) + 1 if last else len(found), len(found))
        if start >= len(found):
            return error(416, "InvalidRange")
        return Answer(206, found[start:stop], headers=(("Content-Range", f"bytes {start}-{stop - 1}/{len(found)}"),))

    def _list(self, query: dict[str, list[str]]) -> Answer:
        prefix, after = query.get("prefix", [""])[0], query.get("start-after", [""])[0]
        most, token = self.page, query.get("continuation-token", [""])[0]
        keys = [key for key in sorted(self.objects) if key.startswith(prefix) and key > max(after, token)]
        told = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{len(self.objects[key])}</Size><ETag>imitated</ETag>"
            "<LastModified>2025-01-01T00:00:00.000Z</LastModified></Contents>"
            for key in keys[:most]
        )
        more = f"<NextContinuationToken>{escape(keys[most - 1])}</NextContinuationToken>" if len(keys) > most else ""
        head = f"<KeyCount>{len(keys[:most])}</KeyCount><IsTruncated>{str(bool(more)).lower()}</IsTruncated>"
        return Answer(200, f"<?xml version='1.0'?><ListBucketResult>{head}{told}{more}</ListBucketResult>".encode())


@contextlib.asynccontextmanager
async def imitated(bucket: str = "bucket") -> AsyncIterator[S3]:
    """One that listens on loopback."""
    state = S3(bucket)
    server = await asyncio.start_server(state.connected, "127.0.0.1", 0)
    state.port = server.sockets[0].getsockname()[1]
    try:
        yield state
    finally:
        server.close()
        for task in state.tasks:
            task.cancel()
        await asyncio.gather(*state.tasks, return_exceptions=True)
        # Sockets are closed by the loop.
        await asyncio.sleep(0)
