"""Replicas to test on, with both kinds of content, and the ways to fill, commit, read and reopen them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from blockferry.common.volumes import Volume
from blockferry.server.cache import DigestCache
from blockferry.server.clones import CloneContent
from blockferry.server.generations import Point
from blockferry.server.store import Store

REGION = 65536
SIZE = 3 * REGION + 5
IDS = [bytes([number]) * 16 for number in range(10)]

KINDS = [pytest.param("temporary", id="journal"), pytest.param("xfs", id="clones on xfs")]


def clones_on(kind: str) -> bool:
    return kind == "xfs"


def clones(store: Store) -> bool:
    return isinstance(store.content, CloneContent)


def opened(directory: Path, like: Store) -> Store:
    """The replica in a directory, in a pool of the same kind."""
    return Store(directory, clones=clones(like))


def reopened(store: Store) -> Store:
    """The same replica after its process died."""
    store.abandon()
    return opened(store.directory, store)


def lives(store: Store) -> Iterator[Store]:
    """The replica, and once that was looked at the same one after its process died."""
    yield store
    yield reopened(store)


def pattern(number: int, size: int) -> bytes:
    return bytes([number]) * size


async def fill(work: Volume, number: int) -> None:
    """Write generation `number` into the work."""
    await work.write([(0, pattern(number, work.size))])


@contextlib.asynccontextmanager
async def working(store: Store, size: int = SIZE, snapshot_id: str = "") -> AsyncIterator[Volume]:
    """A session's work, which stays as it is afterwards."""
    work, _, _ = await store.begin_work(size, snapshot_id)
    try:
        yield work
    finally:
        await store.content.end(work)


async def recorded(store: Store, number: int, size: int = SIZE, digests: DigestCache | None = None) -> Point:
    """A whole session that ends with generation `number`; nothing of what a commit puts off is done."""
    async with working(store, size) as work:
        await fill(work, number)
        await work.flush()
        return await store.commit(work, IDS[number], size, digests or DigestCache())


async def commit(store: Store, number: int, size: int = SIZE, digests: DigestCache | None = None) -> Point:
    """A whole session that ends with generation `number` as one complete image."""
    point = await recorded(store, number, size, digests)
    await store.complete()
    return point


async def content_of(volume: Volume) -> bytes:
    """Everything a volume holds."""
    found = bytearray(volume.size)
    await volume.read_into(0, memoryview(found))
    return bytes(found)


async def read(store: Store, point: Point) -> bytes:
    """Everything a committed generation holds."""
    volume = await store.content.open_point(point)
    try:
        return await content_of(volume)
    finally:
        await volume.close()


async def read_work(store: Store, size: int = SIZE) -> bytes:
    """What the next session of this size starts from."""
    async with working(store, size) as work:
        return await content_of(work)


def names(store: Store) -> list[str]:
    """The files of a replica."""
    return sorted(path.name for path in store.directory.iterdir())


def snapshot(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}
