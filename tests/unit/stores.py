"""Replicas to test on, in pools with and without clones, and the ways to fill, commit and reopen them."""

from __future__ import annotations

from pathlib import Path

import pytest
from blockferry.server.cache import DigestCache
from blockferry.server.store import Point, Store

REGION = 65536
SIZE = 3 * REGION + 5
IDS = [bytes([number]) * 16 for number in range(10)]

KINDS = [pytest.param("temporary", id="in place"), pytest.param("xfs", id="clones on xfs")]


def clones_on(kind: str) -> bool:
    return kind == "xfs"


def pattern(number: int, size: int) -> bytes:
    return bytes([number]) * size


def fill(store: Store, number: int, size: int = SIZE) -> None:
    """Write generation `number` into the work image."""
    with store.work.open("r+b") as file:
        file.write(pattern(number, size))


def commit(store: Store, number: int, size: int = SIZE, digests: DigestCache | None = None) -> Point:
    """A whole session that ends with generation `number`."""
    store.begin_work(size, "")
    fill(store, number, size)
    return store.commit(IDS[number], size, digests or DigestCache())


def reopened(store: Store) -> Store:
    """The same replica after its process died."""
    store.abandon()
    return Store(store.directory, clones=store.clones)


def snapshot(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}
