"""Archives and power failures: an object that has its key is whole, and whoever was told so may rely on it; what an
archiver has noted before an upload is there. And each flush that this takes is needed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from blockferry.client.staging import Staging
from blockferry.common.archive.directory import DirectoryStore
from blockferry.common.durable import make_directories, write_unsynced
from blockferry.common.errors import BlockferryError, Code

from tests.fault.powerloss import FlushNames, Killed, Mark, Operation, Recorder
from tests.fault.test_power_loss import _ARCHIVES, _flushes, _sites, go_through
from tests.images import noise

OBJECTS = {key: noise(key, 9000) for key in ("a/data/1", "a/data/2", "a/data/3")}


def _later(root: Path) -> None:
    """Others go on writing elsewhere, for as many moments at which the power may fail."""
    for moment in range(10):
        write_unsynced(root / "later", bytes([moment]))


# --- a store in a directory -------------------------------------------------------------------------------------------


@dataclass
class Told:
    """Objects that are there, by key, and those that are not."""

    there: dict[str, bytes] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)

    def take(self, what: tuple[str, bytes | str | None]) -> None:
        """One of them was stored, is about to be deleted, or was deleted (None)."""
        key, content = what
        self.there.pop(key, None)
        if isinstance(content, bytes):
            self.there[key] = content
        elif content is None:
            self.gone.add(key)


def _second_flush_of_names_after(key: str) -> Callable[[Operation], bool]:
    """Whether an operation makes the name of an object durable, once its key was given."""
    given = False

    def doomed(operation: Operation) -> bool:
        nonlocal given
        given = given or getattr(operation, "name", "") == key
        return given and isinstance(operation, FlushNames)

    return doomed


class StoreLife:
    """Objects stored, found and deleted; the writer of one dies before its name is durable."""

    def __init__(self) -> None:
        self.log: list[Operation] = []

    def live(self, root: Path) -> None:
        """Two processes, one after the other."""
        recorder = Recorder(root, _second_flush_of_names_after("3"))

        async def first(store: DirectoryStore) -> None:
            for key in ("a/data/1", "a/data/2"):
                await store.put_new(key, [OBJECTS[key][:5000], OBJECTS[key][5000:]])
                recorder.mark((key, OBJECTS[key]))
            with contextlib.suppress(Killed):
                await store.put_new("a/data/3", [OBJECTS["a/data/3"]])

        async def second(store: DirectoryStore) -> None:
            with pytest.raises(BlockferryError) as caught:
                await store.put_new("a/data/3", [OBJECTS["a/data/3"]])
            assert caught.value.code is Code.EXISTS
            recorder.mark(("a/data/3", OBJECTS["a/data/3"]))
            _later(root)
            recorder.mark(("a/data/2", ""))
            await store.delete("a/data/2")
            recorder.mark(("a/data/2", None))
            _later(root)

        with recorder.recording():
            make_directories(root / "store")
            store = DirectoryStore(root / "store")
            asyncio.run(first(store))
            assert recorder.dead
            recorder.revive()
            asyncio.run(second(DirectoryStore(root / "store")))
        self.log = recorder.log

    def promises(self) -> Told:
        return Told()

    async def check(self, root: Path, promises: Told) -> None:
        if not (root / "store").is_dir():
            assert not promises.there
            return
        store = await DirectoryStore.open(root / "store")
        found = {entry.key: await store.get(entry.key) async for entry in store.entries("")}
        for key, content in found.items():
            assert content == OBJECTS[key], f"{key} is not whole"
        assert {key: found.get(key) for key in promises.there} == promises.there
        assert not promises.gone & found.keys()


# --- what an archiver notes -------------------------------------------------------------------------------------------

TRAILERS = {number: noise(f"trailer {number}", 3000) for number in range(3)}


@dataclass
class Noted:
    """Chunks that were noted; the attempt was dropped."""

    chunks: set[int] = field(default_factory=set)
    dropped: bool = False

    def take(self, what: int | str) -> None:
        """One more; or none any more."""
        if isinstance(what, int):
            self.chunks.add(what)
        else:
            self.chunks, self.dropped = set(), what == "dropped"


class StagingLife:
    """Chunks that are noted before their upload, and an attempt that is dropped."""

    def __init__(self) -> None:
        self.log: list[Operation] = []

    def live(self, root: Path) -> None:
        """One archiver."""
        recorder = Recorder(root)
        with recorder.recording():
            staging = Staging.open(root / "staging")
            staging.begin(os.urandom(16), 0, "now")
            staging.begin_run("")
            for number, trailer in TRAILERS.items():
                staging.note_data(number, 100, b"t" * 24, 0, trailer, number, number)
                recorder.mark(number)
            _later(root)
            recorder.mark("dropping")
            staging.drop()
            recorder.mark("dropped")
            _later(root)
            staging.close()
        self.log = recorder.log

    def promises(self) -> Noted:
        return Noted()

    async def check(self, root: Path, promises: Noted) -> None:
        staging = Staging.open(root / "staging")
        try:
            if promises.dropped:
                assert not staging.state.attempt
            for number in promises.chunks:
                assert staging.read_trailer(staging.state.data[number]) == TRAILERS[number]
        finally:
            staging.close()


# --- the proof --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lives(scratch: Path) -> list[StoreLife | StagingLife]:
    found: list[StoreLife | StagingLife] = [StoreLife(), StagingLife()]
    for life in found:
        with tempfile.TemporaryDirectory(dir=scratch) as root:
            life.live(Path(root))
    return found


def test_what_was_promised_is_there(scratch: Path, lives: list[StoreLife | StagingLife]) -> None:
    for life in lives:
        verdict = asyncio.run(go_through(life, scratch))
        assert verdict.broken == []
        assert verdict.states > sum(not isinstance(one, Mark) for one in life.log) // 2


@pytest.mark.parametrize("site", sorted(one for one in set(_sites()) if one.startswith(_ARCHIVES)))
def test_every_flush_of_archives_is_needed(scratch: Path, lives: list[StoreLife | StagingLife], site: str) -> None:
    assert any(call.site == site for life in lives for call in _flushes(life)), "no life gets here"
    broken = [
        verdict.broken[0]
        for life in lives
        if (
            verdict := asyncio.run(
                go_through(life, scratch, without=lambda flush: flush.call.site == site, first_only=True)
            )
        ).broken
    ]
    assert broken, f"nothing needs {site}"
