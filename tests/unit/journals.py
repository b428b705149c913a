"""Replicas with a journal to test on, and the ways to work on them and to look at what they hold."""

from __future__ import annotations

from pathlib import Path

import pytest
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.volumes import Volume
from blockferry.server.cache import DigestCache
from blockferry.server.generations import Point
from blockferry.server.journal import JournalContent
from blockferry.server.store import Store

from tests.unit.layers import B
from tests.unit.stores import IDS, read, working

SIZE = 40 * B + 77


def journal_of(store: Store) -> JournalContent:
    assert isinstance(store.content, JournalContent)
    return store.content


def marked(number: int, size: int) -> list[tuple[int, bytes]]:
    """What generation `number` writes: blocks of its own, one that every generation writes, one that the one before
    wrote, and the end."""
    every = [0, 2 * number, 2 * number + 1, 2 * number - 2]
    return [(block * B, bytes([number]) * B) for block in dict.fromkeys(every)] + [(size - 7, bytes([number]) * 7)]


def zeroed(number: int) -> list[tuple[int, int]]:
    return [((25 + number) * B, 2 * B), (B // 2, 10)]


def grow(number: int) -> int:
    """The size of generation `number`."""
    return SIZE + (number // 3) * (B + 9)


def expected(numbers: int) -> bytes:
    """What generation `numbers` holds."""
    found = bytearray()
    for number in range(1, numbers + 1):
        size = grow(number)
        found += bytes(size - len(found))
        if number == 1:
            found[:] = bytes(range(1, 256)) * (size // 255) + bytes(range(size % 255))
        for offset, data in marked(number, size):
            found[offset : offset + len(data)] = data
        for offset, length in zeroed(number):
            found[offset : offset + length] = bytes(length)
    return bytes(found)


async def change(work: Volume, number: int) -> None:
    """Make the work of generation `number`."""
    size = grow(number)
    if number == 1:
        await work.write([(0, bytes(range(1, 256)) * (size // 255) + bytes(range(size % 255)))])
    await work.write(marked(number, size))
    await work.unmap(zeroed(number))
    await work.flush()


async def record(store: Store, number: int) -> Point:
    """Commit generation `number`, and nothing more."""
    async with working(store, grow(number)) as work:
        await change(work, number)
        return await store.commit(work, IDS[number], grow(number), DigestCache())


async def commit(store: Store, number: int) -> Point:
    point = await record(store, number)
    await store.complete()
    return point


async def check(store: Store, *broken: int) -> None:
    """Every generation reads as it was committed; `broken` ones are refused, and say so everywhere."""
    for point in store.generations.points:
        if point.number not in broken:
            assert store.content.problem(point) == ""
            assert await read(store, point) == expected(point.number), point.number
            continue
        assert store.content.problem(point) != ""
        with pytest.raises(BlockferryError) as caught:
            await store.content.open_point(point)
        assert caught.value.code is Code.CORRUPT_STATE


def path_of(store: Store, number: int, suffix: str) -> Path:
    return store.directory / (IDS[number].hex() + suffix)


async def drop(store: Store, number: int) -> None:
    point = store.generations.point(number)
    assert point is not None
    await store.drop(point)
