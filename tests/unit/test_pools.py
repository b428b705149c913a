"""Several pools: what may be one server's pools, and a name that lives in exactly one of them."""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.retention import Retention
from blockferry.server.pools import Pools, PoolSpec, check_distinct, parse_pool

FLOOR = Retention(last=1)


@pytest.mark.parametrize(
    ("text", "name", "path"),
    [
        ("/srv/a", "main", "/srv/a"),
        ("fast=/srv/a", "fast", "/srv/a"),
        ("fast=/srv/a=b", "fast", "/srv/a=b"),
        ("/srv/a=b", "main", "/srv/a=b"),
        ("a.b-c_1=/x", "a.b-c_1", "/x"),
    ],
)
def test_names_and_directories(text: str, name: str, path: str) -> None:
    assert parse_pool(text) == PoolSpec(name, Path(path))


def test_a_relative_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_pool("./a=b") == PoolSpec("main", tmp_path / "a=b")
    assert parse_pool("a") == PoolSpec("main", tmp_path / "a")


@pytest.mark.parametrize("text", ["", "fast=", "=/srv/a", "-x=/srv/a", ".x=/srv/a", "a b=/srv/a"])
def test_what_names_no_pool(text: str) -> None:
    with pytest.raises(BlockferryError) as caught:
        parse_pool(text)
    assert caught.value.code is Code.INVALID_ARGUMENT and caught.value.next


@pytest.fixture
def directories(tmp_path: Path) -> Path:
    """`a`, `b`, `a/in`, and `link` to `a`."""
    for name in ("a", "b", "a/in"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("a")
    return tmp_path


@pytest.mark.parametrize(
    ("one", "other", "cause"),
    [
        ("x=a", "x=b", "both are called x"),
        ("x=a", "y=a", "they are the same directory"),
        ("x=a", "y=b/../a", "they are the same directory"),
        ("x=link", "y=a", "they are the same directory"),
        ("x=a", "y=a/in", "is inside"),
        ("x=a/in", "y=a", "is inside"),
        ("x=link", "y=a/in", "is inside"),
        ("x=a", "y=link/in", "is inside"),
        ("x=missing", "y=missing", "they are the same directory"),
        ("x=missing", "y=missing/in", "is inside"),
    ],
)
def test_pools_that_are_not_two(directories: Path, one: str, other: str, cause: str) -> None:
    specs = [PoolSpec(text.split("=")[0], directories / text.split("=")[1]) for text in (one, other)]
    with pytest.raises(BlockferryError, match=cause) as caught:
        check_distinct(specs)
    assert caught.value.code is Code.INVALID_ARGUMENT and caught.value.next
    assert all(str(spec.path) in caught.value.what for spec in specs)


def test_pools_side_by_side(directories: Path) -> None:
    (directories / "ab").mkdir()
    check_distinct([PoolSpec(name, directories / name) for name in ("a", "b", "ab")])


# --- open -------------------------------------------------------------------------------------------------------------


def _specs(directory: Path) -> list[PoolSpec]:
    return [PoolSpec(name, directory / name, FLOOR) for name in ("a", "b")]


@pytest_asyncio.fixture
async def pools(directories: Path) -> AsyncIterator[Pools]:
    """Two empty pools, `a` and `b`."""
    (directories / "a/in").rmdir()
    opened = await Pools.open(_specs(directories), 60.0)
    yield opened
    await opened.close()


async def test_a_new_replica_goes_to_the_first_pool_or_where_it_is_told(pools: Pools) -> None:
    first, second = await pools.get_or_create("x", 0), await pools.get_or_create("w", 0, "b")
    assert (first.pool, second.pool) == ("a", "b")
    assert [one.name for one in pools.list()] == ["w", "x"]
    assert [pools.get(name) for name in ("x", "w")] == [first, second]
    assert [pools.home(one).name for one in (first, second)] == ["a", "b"]
    assert await pools.get_or_create("w", 0) is second
    assert await pools.get_or_create("w", 0, "b") is second
    with pytest.raises(BlockferryError, match=r"w is not in pool a: it exists in pool b; .* --pool b") as caught:
        await pools.get_or_create("w", 0, "a")
    assert caught.value.code is Code.INVALID_ARGUMENT
    with pytest.raises(BlockferryError, match="there is no pool c: this server has a, b") as caught:
        await pools.get_or_create("v", 0, "c")
    assert caught.value.code is Code.NOT_FOUND
    with pytest.raises(BlockferryError, match="there is no replica v") as caught:
        pools.get("v")
    assert caught.value.code is Code.NOT_FOUND
    assert not (next(iter(pools)).path / "v").exists()


async def test_two_clients_that_make_one_name_in_two_pools(pools: Pools) -> None:
    found = await asyncio.gather(
        pools.get_or_create("v", 0, "b"), pools.get_or_create("v", 0, "a"), return_exceptions=True
    )
    assert [one.pool for one in pools.list()] == ["b"]
    assert isinstance(found[1], BlockferryError) and found[1].code is Code.INVALID_ARGUMENT
    assert [(pool.path / "v").exists() for pool in pools] == [False, True]


async def test_a_session_is_found_in_any_pool(pools: Pools) -> None:
    from blockferry.v1 import replication_pb2 as pb

    for name, pool in (("x", "a"), ("y", "b")):
        replica = await pools.get_or_create(name, 0, pool)
        session = await replica.open_session(pb.OpenSessionRequest(volume=name, size=4096))
        assert pools.find_session(session.session_id) is replica
    assert pools.find_session("0" * 32) is None


async def test_a_name_in_two_pools_is_refused_and_nothing_stays_locked(directories: Path) -> None:
    (directories / "a/in").rmdir()
    for name in ("a", "b"):
        opened = await Pools.open([PoolSpec(name, directories / name, FLOOR)], 60.0)
        await opened.get_or_create("v", 0)
        await opened.close()
    with pytest.raises(BlockferryError, match="two pools hold a replica called v") as caught:
        await Pools.open(_specs(directories), 60.0)
    assert caught.value.code is Code.IN_USE and caught.value.next
    assert all(str(directories / name / "v") in caught.value.cause for name in ("a", "b"))
    for name in ("a", "b"):
        fd = os.open(directories / name / ".blockferry-lock", os.O_RDWR)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(fd)


async def test_a_replica_that_was_left_out_keeps_its_name(directories: Path) -> None:
    (directories / "a/in").rmdir()
    (directories / "b/v").mkdir()
    (directories / "b/v/replica.json").write_bytes(b"rubbish")
    opened = await Pools.open(_specs(directories), 60.0)
    with pytest.raises(BlockferryError, match="v cannot be used"):
        await opened.get_or_create("v", 0)
    assert not (directories / "a/v").exists()
    await opened.close()


async def test_what_cannot_be_a_replica_may_lie_in_both(directories: Path) -> None:
    (directories / "a/in").rmdir()
    for name in ("a", "b"):
        (directories / name / "lost+found").mkdir()
        (directories / name / ".trash").mkdir()
    opened = await Pools.open(_specs(directories), 60.0)
    assert opened.list() == []
    await opened.close()
