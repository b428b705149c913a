"""Several sessions committed by one call: all of them, or none, wherever the server dies, and whatever fails.

Real servers are killed at every crash point from the flush of the work to the answer, in pools that clone, in pools
that keep journals, and with members in two pools at once; and once more while they put that right.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import blockferry.server
import pytest
from blockferry.common import disk
from blockferry.common.errors import BlockferryError, Code
from blockferry.server import groups
from blockferry.server.identity import PoolIdentity
from blockferry.v1 import replication_pb2 as pb

from tests.fault.local import NO_CONTEXT, Local
from tests.fault.raw import REGION, Raw, Refused
from tests.fault.stage import KILLED, DoomedServer
from tests.images import noise
from tests.support import Server

ALL = "BLOCKFERRY_CRASH_PASSES" in os.environ
"""Whether the server dies at the first member, too, and not only at the last."""
SIZE = 3 * REGION
NAMES = ("a", "b", "c")
_numbers = itertools.count(1)

NOT_YET = {"commit-flushed": 2, "commit-digests-written": 3, "group-sealed": 1}
"""Where nothing is committed yet, and how often a commit of three passes it."""
DONE = {"group-recorded": 1, "commit-recorded": 3, "group-published": 2, "group-forgotten": 1, "commit-unanswered": 1}
"""Where everything is."""
SHOWN = {"group-recorded": 1, "commit-recorded": 3}
"""Of these, where the kind of content matters."""
SEALING = {
    # Three sessions are written down before the group is.
    True: {"commit-renamed": 3, "atomic-before-rename": 4},
    False: {"commit-undo-captured": 3, "commit-redo-renamed": 3, "commit-renamed": 3},
}
"""By whether the pool clones."""


def content(volume: str, generation: int) -> bytes:
    return noise(f"{volume} {generation}", SIZE)


class Group:
    """Replicas that have one generation each, and a server that may die."""

    def __init__(self, server: DoomedServer) -> None:
        self.server = server
        self.homes = dict.fromkeys(NAMES, server.pool)

    def begin(self, pools: dict[str, str] | None = None) -> None:
        """Give each replica its first generation, by a server that lives."""
        self.server.start()
        with Raw(self.server.address) as raw:
            for name in NAMES:
                opened = raw.open(name, SIZE, pool=(pools or {}).get(name, ""))
                self.write(raw, opened.session, name, 1)
                raw.commit(name, opened.session, os.urandom(16))
        assert self.server.stop() == 0

    def write(self, raw: Raw, session: pb.SessionRef, name: str, generation: int) -> None:
        data = content(name, generation)
        for offset in range(0, SIZE, REGION):
            raw.write(session, offset, data[offset : offset + REGION])

    def ask(self) -> pb.CommitSessionsRequest:
        """Open a session for each, write the second generation, and say what to commit."""
        request = pb.CommitSessionsRequest()
        with Raw(self.server.address) as raw:
            for name in NAMES:
                session = raw.open(name, SIZE).session
                self.write(raw, session, name, 2)
                request.commits.add(session=session, volume=name, commit_id=os.urandom(16), keep=pb.Retention(last=5))
        return request

    def commit(self, request: pb.CommitSessionsRequest) -> list[int]:
        """The generations; raises Refused."""
        with Raw(self.server.address) as raw:
            answer = raw.call("Replication/CommitSessions", request, pb.CommitSessionsResponse)
        return [one.generation for one in answer.commits]

    def generations(self) -> dict[str, int]:
        """The newest of each; its content is what belongs to it."""
        found = {}
        with Raw(self.server.address) as raw:
            for name in NAMES:
                found[name] = raw.show(name).generation
                assert raw.read(name, found[name], 0, SIZE) == content(name, found[name]), name
        return found

    def leftovers(self) -> list[str]:
        return [path.name for home in set(self.homes.values()) for path in home.glob(groups.PREFIX + "*")]

    def die(self, doom: str) -> pb.CommitSessionsRequest:
        """Commit with a server that dies meanwhile."""
        self.server.doom = doom
        self.server.start()
        request = self.ask()
        with pytest.raises(Refused):
            self.commit(request)
        assert asyncio.run(self.server.death()) == KILLED
        self.server.doom = ""
        return request

    def check(self, request: pb.CommitSessionsRequest, *, done: bool) -> None:
        """After another start: all or none, whoever asks, and the next commit works."""
        assert self.generations() == dict.fromkeys(NAMES, 2 if done else 1)
        assert self.leftovers() == []
        if done:
            assert self.commit(request) == [2, 2, 2]
        else:
            with pytest.raises(Refused, match="STALE_EPOCH"):
                self.commit(request)
            assert self.commit(self.ask()) == [2, 2, 2]
        assert self.generations() == dict.fromkeys(NAMES, 2)
        assert self.leftovers() == []


@pytest.fixture(params=[True, False], ids=["clones", "journal"])
def clones(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def group(clones: bool, xfs_pool_root: Path, ext4_pool_root: Path) -> Iterator[Group]:
    pool = (xfs_pool_root if clones else ext4_pool_root) / f"group-{next(_numbers)}"
    pool.mkdir()
    PoolIdentity(pool).settle({})
    server = DoomedServer(pool)
    try:
        yield Group(server)
    finally:
        server.kill()


def _dooms(clones: bool) -> list[tuple[str, bool]]:
    points = [(SEALING[clones], False), (DONE, True)] if clones or ALL else [(SEALING[clones], False), (SHOWN, True)]
    if clones or ALL:
        points.append((NOT_YET, False))
    return [
        (f"{name}:{number}", done)
        for names, done in points
        for name, most in names.items()
        for number in ({1, most} if ALL and most < 4 else {most})
    ]


@pytest.mark.parametrize("cloning", [True, False], ids=["clones", "journal"])
def test_a_server_dies_while_it_commits(cloning: bool, xfs_pool_root: Path, ext4_pool_root: Path) -> None:
    for doom, done in sorted(set(_dooms(cloning))):
        pool = (xfs_pool_root if cloning else ext4_pool_root) / f"group-{next(_numbers)}"
        pool.mkdir()
        PoolIdentity(pool).settle({})
        group = Group(DoomedServer(pool))
        try:
            group.begin()
            request = group.die(doom)
            group.server.start()
            try:
                group.check(request, done=done)
            except AssertionError as error:
                raise AssertionError(f"after {doom}") from error
        finally:
            group.server.kill()


@pytest.mark.parametrize("second", ["start-group-redone:1", "start-group-redone:3", "start-group-settled:1"])
def test_a_server_dies_while_it_finishes_a_commit(group: Group, second: str) -> None:
    group.begin()
    request = group.die("group-recorded")
    assert len(group.leftovers()) == 1
    group.server.doom = second
    assert group.server.status_of_start() == KILLED
    group.server.doom = ""
    group.server.start()
    group.check(request, done=True)


def test_every_crash_point_of_several_commits_is_gone_through() -> None:
    root = Path(str(blockferry.server.__file__)).parent
    named = {
        name
        for path in root.rglob("*.py")
        for name in re.findall(r'crash_point\("((?:start-)?group-[^"]+)"', path.read_text())
    }
    gone_through = {*NOT_YET, *DONE, "group-announced", "start-group-redone", "start-group-settled"}
    assert named == {name for name in gone_through if "group-" in name}


@pytest.mark.parametrize(
    ("doom", "done"), [("group-announced:1", False), ("group-recorded:1", True), ("group-published:1", True)]
)
def test_members_may_be_in_two_pools(xfs_pool_root: Path, ext4_pool_root: Path, doom: str, done: bool) -> None:
    number = next(_numbers)
    one, two = xfs_pool_root / f"one-{number}", ext4_pool_root / f"two-{number}"
    for pool in (one, two):
        pool.mkdir()
        PoolIdentity(pool).settle({})
    group = Group(DoomedServer(one, flags=["--pool", f"two={two}"]))
    group.homes["c"] = two
    alone = Server(two)
    try:
        group.begin({"c": "two"})
        request = group.die(doom)
        # A server that knows the second pool alone cannot know what became of it, and leaves it as it is.
        alone.start()
        with Raw(alone.address) as raw, pytest.raises(Refused, match=r"NOT_FOUND|WRONG_STATE"):
            raw.show("c")
        with Raw(alone.address) as raw, pytest.raises(Refused, match="WRONG_STATE"):
            raw.open("c", SIZE)
        assert alone.stop() == 0
        group.server.start()
        group.check(request, done=done)
    finally:
        alone.kill()
        group.server.kill()


def test_a_record_that_cannot_be_read_keeps_the_server_from_guessing(group: Group) -> None:
    group.begin()
    (group.server.pool / f"{groups.PREFIX}0").write_text("{")
    with pytest.raises(AssertionError, match=r"\.group-0 cannot be read"):
        group.server.start()
    (group.server.pool / f"{groups.PREFIX}0").unlink()
    group.server.start()
    assert group.generations() == dict.fromkeys(NAMES, 1)


# --- without a death --------------------------------------------------------------------------------------------------


@pytest.fixture
async def local(clones: bool, xfs_pool_root: Path, tmp_path: Path) -> AsyncIterator[Local]:
    found = await Local.start(xfs_pool_root / f"local-{next(_numbers)}", clones=clones)
    yield found
    await found.stop()


async def _ask(local: Local, generation: int = 1) -> pb.CommitSessionsRequest:
    request = pb.CommitSessionsRequest()
    for name in NAMES:
        session = (await local.open(name, SIZE)).session
        data = content(name, generation)
        for offset in range(0, SIZE, REGION):
            await local.write(session, offset, data[offset : offset + REGION])
        request.commits.add(session=session, volume=name, commit_id=os.urandom(16))
    return request


async def _commit(local: Local, request: pb.CommitSessionsRequest) -> list[int]:
    answer = await local.replication.CommitSessions(request, NO_CONTEXT)
    return [one.generation for one in answer.commits]


async def _generations(local: Local) -> list[int]:
    return [(await local.show(name)).generation for name in NAMES]


async def test_what_is_asked_for_twice_is_answered_twice(local: Local) -> None:
    request = await _ask(local)
    assert await _commit(local, request) == [1, 1, 1]
    assert await _commit(local, request) == [1, 1, 1]
    await local.die()


async def test_a_volume_is_named_once_and_an_old_commit_is_not_mixed_with_a_new_one(local: Local) -> None:
    request = await _ask(local)
    twice = pb.CommitSessionsRequest(commits=[request.commits[0], request.commits[0]])
    for wrong in (twice, pb.CommitSessionsRequest()):
        with pytest.raises(BlockferryError, match="cannot commit these sessions together"):
            await _commit(local, wrong)
    await _commit(local, request)
    mixed = await _ask(local, 2)
    mixed.commits[0].CopyFrom(request.commits[0])
    with pytest.raises(BlockferryError, match="that of b was not"):
        await _commit(local, mixed)
    assert await _generations(local) == [1, 1, 1]


async def test_one_stale_session_keeps_all_from_being_committed(local: Local) -> None:
    await _commit(local, await _ask(local))
    request = await _ask(local, 2)
    await local.abort(request.commits[2].session)
    with pytest.raises(BlockferryError) as refused:
        await _commit(local, request)
    assert refused.value.code is Code.STALE_EPOCH
    assert await _generations(local) == [1, 1, 1]
    # The others have not lost anything by it.
    rest = pb.CommitSessionsRequest(commits=request.commits[:2])
    assert await _commit(local, rest) == [2, 2]
    assert await local.read("a", 2, 0, SIZE) == content("a", 2)


async def test_one_full_disk_keeps_all_from_being_committed(local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    await _commit(local, await _ask(local))
    request = await _ask(local, 2)
    store = local.replica("b").store
    real = store.content.seal

    async def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(store.content, "seal", full)
    with pytest.raises(BlockferryError) as refused:
        await _commit(local, request)
    assert (refused.value.code, refused.value.volume) == (Code.OUT_OF_SPACE, "b")
    monkeypatch.setattr(store.content, "seal", real)
    assert await _generations(local) == [1, 1, 1]
    assert await _commit(local, await _ask(local, 2)) == [2, 2, 2]
    for name in NAMES:
        assert await local.read(name, 2, 0, SIZE) == content(name, 2)
        assert await local.read(name, 1, 0, SIZE) == content(name, 1)


async def test_where_the_record_cannot_be_written_nothing_is_committed(
    local: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    await _commit(local, await _ask(local))
    request = await _ask(local, 2)
    flush = disk.fsync_directory

    def fail(path: Path) -> None:
        if list(path.glob(groups.PREFIX + "*")):
            raise OSError(errno.EIO, "broken")
        flush(path)

    monkeypatch.setattr(disk, "fsync_directory", fail)
    with pytest.raises(BlockferryError):
        await _commit(local, request)
    monkeypatch.setattr(disk, "fsync_directory", flush)
    assert list(local.pool.path.glob(groups.PREFIX + "*")) == []
    assert await _generations(local) == [1, 1, 1]
    assert await _commit(local, await _ask(local, 2)) == [2, 2, 2]


async def test_a_log_that_does_not_take_its_record_at_once(local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commit stands by the record of the group. The one whose own log lags behind is of no use to anybody until
    its disk takes it, and nobody goes on from the generation before."""
    await _commit(local, await _ask(local))
    request = await _ask(local, 2)
    from blockferry.server.generations import Generations

    append = Generations._append

    def fail(self: Generations, record: dict[str, object]) -> None:
        if record["kind"] == "commit" and record["commit_id"] == request.commits[1].commit_id.hex():
            raise OSError(errno.EIO, "broken")
        append(self, record)

    monkeypatch.setattr(Generations, "_append", fail)
    with pytest.raises(BlockferryError) as stuck:
        await _commit(local, request)
    assert (stuck.value.code, stuck.value.volume) == (Code.UNAVAILABLE, "b")
    with pytest.raises(BlockferryError) as refused:
        await local.open("b", SIZE)
    assert refused.value.code is Code.UNAVAILABLE
    assert await _generations(local) == [2, 1, 2]
    monkeypatch.setattr(Generations, "_append", append)
    assert await _commit(local, request) == [2, 2, 2]
    for name in NAMES:
        assert await local.read(name, 2, 0, SIZE) == content(name, 2)
    assert await _commit(local, await _ask(local, 3)) == [3, 3, 3]


async def test_two_that_commit_the_same_volumes_in_another_order_do_not_wait_for_each_other(local: Local) -> None:
    request = await _ask(local)
    backwards = pb.CommitSessionsRequest(commits=reversed(request.commits))
    async with asyncio.timeout(30):
        one, other = await asyncio.gather(_commit(local, request), _commit(local, backwards))
    assert one == other == [1, 1, 1]
