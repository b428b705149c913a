"""Stores that break, and one that counts: wrappers around a real one."""

from __future__ import annotations

import asyncio
import collections
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from blockferry.common.archive.store import (
    Entry,
    ObjectStore,
    Transient,
    check_key,
    check_prefix,
    exists,
    missing,
    too_short,
)
from blockferry.common.digests import Data
from blockferry.common.errors import BlockferryError, Code


def unanswered(store: ObjectStore, key: str) -> Transient:
    """No answer came."""
    return Transient(Code.UNAVAILABLE, f"{store.uri}: {key}", cause="injected: no answer in time", next="none")


def busy(store: ObjectStore, key: str) -> Transient:
    """503."""
    return Transient(Code.UNAVAILABLE, f"{store.uri}: {key}", cause="injected: it answers 503 SlowDown", next="none")


def full(store: ObjectStore, key: str) -> BlockferryError:
    """The store is full."""
    return BlockferryError(Code.OUT_OF_SPACE, f"{store.uri}: {key}", cause="injected: it is full", next="none")


class WrappedStore(ObjectStore):
    """Passes everything on."""

    def __init__(self, store: ObjectStore) -> None:
        self.store = store
        self.uri = store.uri
        self.conditional = store.conditional

    async def put_new(self, key: str, parts: Sequence[Data]) -> None:
        await self.store.put_new(key, parts)

    async def put(self, key: str, data: Data) -> None:
        await self.store.put(key, data)

    async def get(self, key: str) -> bytes:
        return await self.store.get(key)

    async def get_range(self, key: str, offset: int, length: int) -> bytes:
        return await self.store.get_range(key, offset, length)

    async def entries(self, prefix: str, *, after: str = "") -> AsyncIterator[Entry]:
        async for entry in self.store.entries(prefix, after=after):
            yield entry

    async def delete(self, key: str) -> None:
        await self.store.delete(key)

    async def close(self) -> None:
        await self.store.close()


class CountingStore(WrappedStore):
    """Remembers every request that reaches it: (operation, key), and the bytes moved."""

    def __init__(self, store: ObjectStore) -> None:
        super().__init__(store)
        self.requests: list[tuple[str, str]] = []
        self.ranges: list[tuple[str, int, int]] = []
        self.bytes_put = 0
        self.bytes_got = 0

    def count(self, operation: str, part: str = "") -> int:
        """Requests of one kind whose key contains `part`."""
        return sum(1 for name, key in self.requests if name == operation and part in key)

    @property
    def counts(self) -> dict[str, int]:
        """Requests by kind."""
        return dict(collections.Counter(name for name, _ in self.requests))

    async def put_new(self, key: str, parts: Sequence[Data]) -> None:
        self.requests.append(("put_new", key))
        await super().put_new(key, parts)
        self.bytes_put += sum(len(part) for part in parts)

    async def put(self, key: str, data: Data) -> None:
        self.requests.append(("put", key))
        await super().put(key, data)
        self.bytes_put += len(data)

    async def get(self, key: str) -> bytes:
        self.requests.append(("get", key))
        found = await super().get(key)
        self.bytes_got += len(found)
        return found

    async def get_range(self, key: str, offset: int, length: int) -> bytes:
        self.requests.append(("get_range", key))
        self.ranges.append((key, offset, length))
        found = await super().get_range(key, offset, length)
        self.bytes_got += len(found)
        return found

    async def entries(self, prefix: str, *, after: str = "") -> AsyncIterator[Entry]:
        self.requests.append(("list", prefix))
        async for entry in super().entries(prefix, after=after):
            yield entry

    async def delete(self, key: str) -> None:
        self.requests.append(("delete", key))
        await super().delete(key)


Failure = Callable[[ObjectStore, str], BlockferryError]


@dataclass
class Rule:
    """What happens to requests of some kinds for keys with some part in them, after some that went well and only so
    often."""

    operations: frozenset[str]
    part: str = ""
    after: int = 0
    times: int = 1 << 30
    delay: float = 0.0
    before: Failure | None = None
    """Fails without anything having been done."""
    afterwards: Failure | None = None
    """Fails although it was done: the answer was lost."""
    lose: bool = False
    """Answers that it was done, and did nothing."""
    corrupt: Callable[[bytes], bytes] | None = None
    """Changes what is read, or what is written."""
    stale: bool = False
    """Reads what was there when the rule was made: an object that is newer is missing, and unlisted."""
    until: asyncio.Event | None = None
    """Waits for it first."""
    seen: int = 0
    known: set[str] = field(default_factory=set)

    def applies(self, operation: str, key: str) -> bool:
        """Whether it is this one's turn; counts it."""
        if operation not in self.operations or self.part not in key:
            return False
        self.seen += 1
        return self.after < self.seen <= self.after + self.times


READS = frozenset({"get", "get_range", "list"})
WRITES = frozenset({"put_new", "put", "delete"})
ALL = READS | WRITES


class FaultyStore(WrappedStore):
    """Does what its rules say; the first that applies decides."""

    def __init__(self, store: ObjectStore) -> None:
        super().__init__(store)
        self.rules: list[Rule] = []

    def rule(self, *operations: str, **how: object) -> Rule:
        """Add a rule; without operations for all of them."""
        made = Rule(frozenset(operations) or ALL, **how)  # type: ignore[arg-type]
        self.rules.append(made)
        return made

    async def freeze(self) -> Rule:
        """From now on reads are stale."""
        made = self.rule(*READS, stale=True)
        made.known = set(await self.store.list(""))
        return made

    async def _meet(self, operation: str, key: str) -> Rule | None:
        # All of them count, also those whose turn it is not.
        applying = [rule for rule in self.rules if rule.applies(operation, key)]
        if not applying:
            return None
        rule = applying[0]
        if rule.until is not None:
            await rule.until.wait()
        if rule.delay:
            await asyncio.sleep(rule.delay)
        if rule.before is not None:
            raise rule.before(self, key)
        return rule

    def _after(self, rule: Rule | None, key: str) -> None:
        if rule is not None and rule.afterwards is not None:
            raise rule.afterwards(self, key)

    async def put_new(self, key: str, parts: Sequence[Data]) -> None:
        rule = await self._meet("put_new", key)
        if rule is not None and rule.corrupt is not None:
            parts = [rule.corrupt(b"".join(parts))]
        if rule is None or not rule.lose:
            await super().put_new(key, parts)
        self._after(rule, key)

    async def put(self, key: str, data: Data) -> None:
        rule = await self._meet("put", key)
        if rule is not None and rule.corrupt is not None:
            data = rule.corrupt(bytes(data))
        if rule is None or not rule.lose:
            await super().put(key, data)
        self._after(rule, key)

    async def get(self, key: str) -> bytes:
        rule = await self._meet("get", key)
        self._stale(rule, key)
        found = await super().get(key)
        self._after(rule, key)
        return rule.corrupt(found) if rule is not None and rule.corrupt is not None else found

    async def get_range(self, key: str, offset: int, length: int) -> bytes:
        rule = await self._meet("get_range", key)
        self._stale(rule, key)
        found = await super().get_range(key, offset, length)
        self._after(rule, key)
        return rule.corrupt(found) if rule is not None and rule.corrupt is not None else found

    def _stale(self, rule: Rule | None, key: str) -> None:
        if rule is not None and rule.stale and key not in rule.known:
            raise missing(self.uri, key)

    async def entries(self, prefix: str, *, after: str = "") -> AsyncIterator[Entry]:
        rule = await self._meet("list", prefix)
        async for entry in super().entries(prefix, after=after):
            if rule is not None and rule.stale and entry.key not in rule.known:
                continue
            yield entry
        self._after(rule, prefix)

    async def delete(self, key: str) -> None:
        rule = await self._meet("delete", key)
        if rule is None or not rule.lose:
            await super().delete(key)
        self._after(rule, key)


def flip(at: int) -> Callable[[bytes], bytes]:
    """One bit of one byte, counted from the end if negative."""

    def flipped(data: bytes) -> bytes:
        found = bytearray(data)
        found[at] ^= 1
        return bytes(found)

    return flipped


class MemoryStore(ObjectStore):
    """Objects in memory, for tests of what is above a store."""

    def __init__(self, uri: str = "file:///memory") -> None:
        self.uri = uri
        self.objects: dict[str, bytes] = {}

    async def put_new(self, key: str, parts: Sequence[Data]) -> None:
        if check_key(key) in self.objects:
            raise exists(self.uri, key)
        self.objects[key] = b"".join(parts)

    async def put(self, key: str, data: Data) -> None:
        self.objects[check_key(key)] = bytes(data)

    async def get(self, key: str) -> bytes:
        if check_key(key) not in self.objects:
            raise missing(self.uri, key)
        return self.objects[key]

    async def get_range(self, key: str, offset: int, length: int) -> bytes:
        found = (await self.get(key))[offset : offset + length]
        if len(found) != length:
            raise too_short(self.uri, key, offset, length, len(found))
        return found

    async def entries(self, prefix: str, *, after: str = "") -> AsyncIterator[Entry]:
        check_prefix(prefix)
        for key in sorted(self.objects):
            if key.startswith(prefix) and key > after:
                yield Entry(key, len(self.objects[key]), datetime.fromtimestamp(0, UTC))

    async def delete(self, key: str) -> None:
        self.objects.pop(check_key(key), None)
