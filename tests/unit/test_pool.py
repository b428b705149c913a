"""Making replicas: whatever happens to the client or the disk meanwhile, the name can be used afterwards, and nothing
is left behind."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio
from blockferry.common import disk
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.retention import Retention
from blockferry.server.pool import Pool


@pytest_asyncio.fixture
async def pool(tmp_path: Path) -> AsyncIterator[Pool]:
    """An empty pool."""
    opened = await Pool.open("main", tmp_path, 60.0, Retention(last=1))
    yield opened
    await opened.close()


async def test_a_client_that_goes_away_while_its_replica_is_made(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    reached, go_on = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()
    real = disk.rename

    def rename(source: Path, target: Path) -> None:
        if target.name == "v":
            loop.call_soon_threadsafe(reached.set)
            assert go_on.wait(30)
        real(source, target)

    monkeypatch.setattr(disk, "rename", rename)
    making = asyncio.create_task(pool.get_or_create("v", 0))
    await reached.wait()
    making.cancel()
    await asyncio.gather(making, return_exceptions=True)
    assert making.cancelled()
    again = asyncio.create_task(pool.get_or_create("v", 0))
    await asyncio.sleep(0)
    go_on.set()
    replica = await again
    assert replica is pool.get("v")
    assert [one.name for one in pool.list()] == ["v"]
    assert sorted(os.listdir(pool.path / "v")) == ["commits.log", "replica.json"]


def _fails_once(function: Callable[..., None], at: str) -> Callable[..., None]:
    failed = False

    def wrapper(*arguments: Path) -> None:
        nonlocal failed
        if not failed and arguments[-1].name == at:
            failed = True
            raise OSError(errno.ENOSPC, "injected")
        function(*arguments)

    return wrapper


@pytest.mark.parametrize(
    ("function", "at"),
    [("rename", "replica.json"), ("rename", "v"), ("fsync_directory", "pool")],
    ids=["identity", "name", "name-flushed"],
)
async def test_a_disk_that_fails_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, at: str) -> None:
    root = tmp_path / "pool"
    root.mkdir()
    pool = await Pool.open("main", root, 60.0, Retention(last=1))
    monkeypatch.setattr(disk, function, _fails_once(getattr(disk, function), at))
    with pytest.raises(BlockferryError) as caught:
        await pool.get_or_create("v", 0)
    assert (caught.value.code, caught.value.volume) == (Code.OUT_OF_SPACE, "v")
    assert [name for name in os.listdir(root) if name.startswith(".new-")] == []
    replica = await pool.get_or_create("v", 0)
    assert replica.store.session.epoch == 0
    assert sorted(os.listdir(root / "v")) == ["commits.log", "replica.json"]
    await pool.close()


async def test_a_damaged_replica_is_not_made_anew(pool: Pool) -> None:
    directory = pool.path / "v"
    directory.mkdir()
    (directory / "replica.json").write_bytes(b"rubbish")
    with pytest.raises(BlockferryError, match="v cannot be used") as caught:
        await pool.get_or_create("v", 0)
    assert (caught.value.code, caught.value.volume) == (Code.CORRUPT_STATE, "v")
    assert str(pool.path) not in caught.value.line()
    assert os.listdir(directory) == ["replica.json"]
