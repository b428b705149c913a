"""What every object store does: run on directories, on an imitation of S3 and on a real one."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable

import pytest
from blockferry.common.archive.store import Exists, Missing, ObjectStore
from blockferry.common.errors import BlockferryError, Code

Check = Callable[[ObjectStore], Awaitable[None]]
CHECKS: list[Check] = []


def check(function: Check) -> Check:
    """Part of the contract."""
    CHECKS.append(function)
    return function


@check
async def new_objects_are_made_once(store: ObjectStore) -> None:
    await store.put_new("a/one", [b"first ", b"", bytearray(b"and "), memoryview(b"last")])
    assert await store.get("a/one") == b"first and last"
    for parts in ([b"other"], [b"first and last"]):
        with pytest.raises(Exists) as told:
            await store.put_new("a/one", parts)
        assert told.value.code is Code.EXISTS and "a/one" in told.value.line()
    assert await store.get("a/one") == b"first and last"


@check
async def of_many_writers_one_wins(store: ObjectStore) -> None:
    contents = [secrets.token_bytes(1000 + number) for number in range(8)]
    found = await asyncio.gather(*(store.put_new("log/1", [one]) for one in contents), return_exceptions=True)
    winners = [content for content, one in zip(contents, found, strict=True) if one is None]
    assert len(winners) == 1 and all(one is None or isinstance(one, Exists) for one in found), found
    assert await store.get("log/1") == winners[0]


@check
async def objects_are_replaced(store: ObjectStore) -> None:
    await store.put("pins/1", b"a longer first one")
    await store.put("pins/1", b"second")
    assert await store.get("pins/1") == b"second"


@check
async def empty_objects_are_objects(store: ObjectStore) -> None:
    await store.put_new("empty", [])
    assert await store.get("empty") == b""
    with pytest.raises(Exists):
        await store.put_new("empty", [b"x"])


@check
async def ranges_are_exact(store: ObjectStore) -> None:
    content = secrets.token_bytes(300_000)
    await store.put_new("data/chunk", [content])
    for offset, length in ((0, 1), (0, 300_000), (299_999, 1), (123_456, 65_536)):
        assert await store.get_range("data/chunk", offset, length) == content[offset : offset + length]
    with pytest.raises(BlockferryError) as told:
        await store.get_range("data/chunk", 299_990, 20)
    assert told.value.code is Code.DATA_MISMATCH and "data/chunk" in told.value.line()


@check
async def what_is_not_there_is_missing(store: ObjectStore) -> None:
    await store.put_new("a/b", [b"x"])
    for key in ("nothing", "a", "a/c", "a/b/c"):
        with pytest.raises(Missing) as told:
            await store.get(key)
        assert told.value.code is Code.NOT_FOUND and key in told.value.line() and store.uri in told.value.line()
        with pytest.raises(Missing):
            await store.get_range(key, 0, 1)


@check
async def keys_are_listed_in_order(store: ObjectStore) -> None:
    keys = ["a", "b/1", "b/2/x", "b/3", "b-c/1", "c"]
    for key in reversed(keys):
        await store.put_new(key, [key.encode()])
    assert list(await store.list("")) == sorted(keys)
    assert list(await store.list("b/")) == ["b/1", "b/2/x", "b/3"]
    assert list(await store.list("b/", after="b/1")) == ["b/2/x", "b/3"]
    assert list(await store.list("d/")) == []
    assert [(one.key, one.size) async for one in store.entries("b-c/")] == [("b-c/1", 5)]
    assert [one.modified.utcoffset() is not None async for one in store.entries("c/")] == []
    assert all([one.modified.utcoffset() is not None async for one in store.entries("")])


@check
async def deleting_is_idempotent(store: ObjectStore) -> None:
    await store.put_new("a/x", [b"x"])
    await store.put_new("a/y", [b"y"])
    await store.delete("a/x")
    await store.delete("a/x")
    await store.delete("never/was")
    assert list(await store.list("")) == ["a/y"]
    await store.put_new("a/x", [b"again"])
    assert await store.get("a/x") == b"again"


@check
async def keys_lead_nowhere_else(store: ObjectStore) -> None:
    for key in ("", "/a", "a//b", "../a", "a/../b", "a/.", ".incoming/a", "a b", "a/", "ü", "a\0b", "a" * 256):
        for request in (store.get(key), store.put(key, b"x"), store.put_new(key, [b"x"]), store.delete(key)):
            with pytest.raises(BlockferryError) as told:
                await request
            assert told.value.code is Code.INVALID_ARGUMENT, key
    for prefix in ("a", "../", "/", "a//"):
        with pytest.raises(BlockferryError) as told:
            await store.list(prefix)
        assert told.value.code is Code.INVALID_ARGUMENT, prefix
    assert list(await store.list("")) == []
