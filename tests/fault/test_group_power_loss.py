"""A commit of several replicas and power failures: whatever of it has reached the disk, all of them have the new
generation or none, also for a server that knows only some of the pools. And each of its flushes is needed."""

from __future__ import annotations

import asyncio
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from blockferry.common import disk
from blockferry.common.durable import write_unsynced
from blockferry.server import groups
from blockferry.server.generations import Generations
from blockferry.server.store import LOG, Store

from tests.fault.powerloss import FlushFile, FlushNames, Operation, Recorder
from tests.fault.test_power_loss import go_through

HOMES = {"a": "one", "b": "one", "c": "two"}
POOLS = {"1": "one", "2": "two"}
REGION = 64 * 1024


@dataclass
class Promised:
    """How far it has come: the replicas are there, it is committed."""

    ready: bool = False
    committed: bool = False

    def take(self, what: str) -> None:
        """The next mark."""
        setattr(self, what, True)


class GroupLife:
    """Three replicas in two pools, and one commit of them all."""

    def __init__(self) -> None:
        self.log: list[Operation] = []

    def live(self, root: Path) -> None:
        """From their creation to the end of the commit."""
        recorder = Recorder(root)
        with recorder.recording():
            for pool in POOLS.values():
                disk.make_directory(root / pool)
            disk.fsync_directory(root)
            members = [self._member(root, name) for name in HOMES]
            recorder.mark("ready")
            record = groups.record(members, {number: root / pool for number, pool in POOLS.items()})
            recorder.mark("committed")
            for member in members:
                log = Generations(root / HOMES[member.volume] / member.volume / LOG)
                log.commit(member.point, demotes=False)
                log.close()
            record.forget()
            for moment in range(10):
                write_unsynced(root / "later", bytes([moment]))
        self.log = recorder.log

    def _member(self, root: Path, name: str) -> groups.Member:
        directory = root / HOMES[name] / name
        store = Store.create(directory, REGION, clones=True)
        try:
            store.generations.commit(store.generations.next(bytes([1]) * 16, REGION), demotes=False)
            point = store.generations.next(bytes([2]) * 16, REGION)
            pool = next(number for number, place in POOLS.items() if place == HOMES[name])
            commit_id = point.commit_id.hex()
            return groups.Member(
                pool, name, store.identity.uuid, point.number, commit_id, point.size, point.committed_at_us
            )
        finally:
            store.abandon()

    def promises(self) -> Promised:
        return Promised()

    async def check(self, root: Path, promises: Promised) -> None:
        if not promises.ready:
            return
        doubts = groups.settle([("2", root / "two")])[root / "two"]
        if promises.committed:
            assert "c" in doubts or _newest(root, "c") == 2, "one pool alone is taken for all there is to know"
        groups.settle([(number, root / pool) for number, pool in POOLS.items()])
        found = {_newest(root, name) for name in HOMES}
        assert found in ({1}, {2}), f"some have it and others not: {found}"
        assert not promises.committed or found == {2}, "a commit is forgotten"
        assert [path for pool in POOLS.values() for path in (root / pool).glob(groups.PREFIX + "*")] == []


def _newest(root: Path, name: str) -> int:
    log = Generations(root / HOMES[name] / name / LOG)
    try:
        return log.last_number
    finally:
        log.close()


@pytest.fixture(scope="module")
def life(scratch: Path) -> GroupLife:
    found = GroupLife()
    with tempfile.TemporaryDirectory(dir=scratch) as root:
        found.live(Path(root))
    return found


def test_all_or_none_whatever_power_leaves(life: GroupLife, scratch: Path) -> None:
    verdict = asyncio.run(go_through(life, scratch))
    assert verdict.broken == []
    assert verdict.states > 100
    print(f"{verdict.states} states")


def test_every_flush_of_the_record_is_needed(life: GroupLife, scratch: Path) -> None:
    flushes = [
        moment
        for moment, one in enumerate(life.log)
        if isinstance(one, FlushFile | FlushNames) and "groups.py:record" in one.call.purpose
    ]
    # The file and its name, in the other pool and at home.
    assert len(flushes) == 4
    for moment in flushes:
        gone = life.log[moment]
        verdict = asyncio.run(
            go_through(life, scratch, without=lambda one, gone=gone: one is gone, start=moment, first_only=True)  # type: ignore[misc]
        )
        assert verdict.broken, f"nothing needs {gone}"
