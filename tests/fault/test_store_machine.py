"""Sessions, recovery points and retention against a model that keeps the bytes of every generation.

A hypothesis state machine drives the services over real files, with clones and without: sessions that are opened, taken
over, aborted, committed and forgotten; servers that stop and that die; readers that pin points. After every step the
states follow the table of session.py, every kept point is byte-identical to what was committed, the newest generation
is there, numbers and epochs have only risen, and no digest that the server believes contradicts the disk.
"""

from __future__ import annotations

import asyncio
import itertools
import shutil
from collections.abc import Coroutine
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, TypeVar

import pytest
from blockferry.common.digests import digest
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.retention import Retention
from blockferry.common.volumes import Volume
from blockferry.server import points as points_module
from blockferry.server import pool as pool_module
from blockferry.server import replica as replica_module
from blockferry.server.devices import DeviceSpec
from blockferry.server.replica import Replica
from blockferry.server.session import TRANSITIONS, Event, State
from blockferry.v1 import replication_pb2 as pb
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from tests.fault.contents import content_of, files_of, read_all
from tests.fault.local import Clock, Local
from tests.fault.raw import REGION, write_request
from tests.images import BLOCK, noise
from tests.unit.devices import FileBase, garbage, make_device

T = TypeVar("T")

REGIONS = 5
SIZE = REGIONS * REGION - 12 * BLOCK - 1000
"""The last region is short, and so is its last block."""

GROWN = SIZE + 2 * REGION
CAPACITY = GROWN + 3 * BLOCK
"""Bytes of a device."""
LEASE = 60.0
FLOOR = 1
"""Points the server keeps whatever a source asks for."""

NAME = "v"

_numbers = itertools.count(1)

regions = st.integers(0, REGIONS - 1)
seeds = st.integers(1, 9)


class Model(RuleBasedStateMachine):
    """What should be, beside what is."""

    root: Path
    clones: bool
    on_device: bool

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.patch = pytest.MonkeyPatch()
        self.clock = Clock()
        for module in (replica_module, points_module):
            self.patch.setattr(module, "time", self.clock)
        self.patch.setattr(pool_module, "external_base", FileBase)
        self.directory = self.root / f"machine-{next(_numbers)}"
        self.device = self.directory.with_suffix(".device")
        if self.on_device:
            make_device(self.device, CAPACITY)
        self.local = self._run(self._start())

        self.state = State.EMPTY
        self.size = SIZE
        self.epoch = 0
        self.seen = 0.0
        self.session: pb.SessionRef | None = None
        self.zombies: list[pb.SessionRef] = []
        self.work: bytearray | None = None
        self.unsure = False
        """A server has died over a journal: of the work only what was durable is certain."""
        self.generations: dict[int, bytes] = {}
        self.ids: dict[int, bytes] = {}
        self.kept: list[int] = []
        self.keep = 3
        self.last_number = 0
        self.snapshot = ""
        self.settled: set[int] = set()
        self.durable: tuple[str, int, set[int]] | None = None
        self.readers: list[tuple[int, AbstractAsyncContextManager[Volume], Volume]] = []
        self.pins: dict[int, float] = {}

    def _start(self) -> Coroutine[Any, Any, Local]:
        devices = [DeviceSpec(NAME, str(self.device), self.directory)] if self.on_device else []
        return Local.start(
            self.directory, lease=LEASE, floor=Retention(last=FLOOR), clones=self.clones, devices=devices
        )

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    def _refused(self, code: Code, work: Coroutine[Any, Any, object]) -> None:
        with pytest.raises(BlockferryError) as caught:
            self._run(work)
        assert caught.value.code is code

    @property
    def replica(self) -> Replica:
        return self.local.replica(NAME)

    def _move(self, event: Event) -> None:
        self.state = TRANSITIONS[self.state, event]

    # --- opening --------------------------------------------------------------------------------------------------

    @rule(
        grow=st.booleans(),
        snapshot=st.sampled_from(["", "one", "one", "two"]),
        expire=st.booleans(),
    )
    def open(self, grow: bool, snapshot: str, expire: bool) -> None:
        size = GROWN if grow else SIZE
        if expire:
            self.clock.now += LEASE
        opening = self.local.open(NAME, size, grow=grow, snapshot_id=snapshot, client="model")
        if self.session is not None and self.clock.now < self.seen + LEASE:
            self._refused(Code.IN_USE, opening)
            return
        if self.generations and size < len(self.generations[self.last_number]):
            self._refused(Code.SIZE_MISMATCH, opening)
            return
        opened = self._run(opening)
        if self.session is not None:
            self.zombies.append(self.session)
        self._move(Event.OPEN)
        assert opened.session.epoch == self.epoch + 1
        assert (opened.size, opened.region_size) == (size, REGION)
        assert opened.generation == (self.kept[-1] if self.kept else 0)
        resumed = (
            self.work is not None
            and snapshot != ""
            and self.durable is not None
            and self.durable[:2] == (snapshot, size)
        )
        self.settled = set(self.durable[2]) if resumed and self.durable is not None else set()
        durable = {one for run in opened.durable_regions for one in range(run.first, run.first + run.count)}
        assert durable == self.settled
        if not resumed:
            self.durable = None
        if self.unsure:
            self.work = self._certain_work(opened.session)
        elif self.on_device and not self.generations:
            # Whatever is there, from whomever.
            self.work = bytearray(self.device.read_bytes())
        elif self.work is None:
            self.work = bytearray(self.generations[self.kept[-1]] if self.kept else b"")
        elif not self.generations and len(self.work) > size:
            # A first sync of something smaller than the one before starts over.
            self.work = bytearray()
        # What an earlier session had grown it by is cut off again.
        del self.work[size:]
        self.work.extend(bytes(size - len(self.work)))
        self.seen = self.clock.now
        self.session, self.epoch, self.size, self.snapshot = opened.session, opened.session.epoch, size, snapshot

    def _certain_work(self, ref: pb.SessionRef) -> bytearray:
        """The work as it is, once all that must be in it is."""
        assert self.work is not None
        session = self.replica.session
        assert session is not None and session.session_id == ref.session_id
        found = self._run(read_all(session.volume))
        for region in self.settled:
            here = slice(region * REGION, (region + 1) * REGION)
            assert found[here] == self.work[here], f"region {region} was durable"
        self.unsure = False
        return bytearray(found)

    @precondition(lambda self: self.session is None)
    @rule(region=regions, seed=seeds, keep=st.sampled_from([None, 0, 1, 3]))
    def sync(self, region: int, seed: int, keep: int | None) -> None:
        """A short whole one, so that points pile up."""
        size = max(SIZE, len(self.generations[self.last_number])) if self.generations else SIZE
        self.open(grow=size == GROWN, snapshot="", expire=False)
        if self.session is not None:
            self.write_whole(region, seed)
            self.commit(keep)

    @precondition(lambda self: self.session is None)
    @rule(region=regions, seed=seeds, other=regions)
    def interrupted(self, region: int, seed: int, other: int) -> None:
        """A session of an immutable snapshot that made something durable, and took some of it back."""
        self.open(grow=self.size == GROWN, snapshot="one", expire=False)
        if self.session is not None:
            self.write_whole(region, seed)
            self.write_whole(other, seed)
            self.flush()
            self.write_part(other, seed, 0, 1, 0, 0, False, "wrong")
            self.flush()
            self.abort(discard=False)

    # --- changing -------------------------------------------------------------------------------------------------

    @property
    def used(self) -> pb.SessionRef:
        """The session, about to be used: that renews its lease."""
        assert self.session is not None
        self.seen = self.clock.now
        return self.session

    def _extent(self, region: int) -> tuple[int, int]:
        assert self.work is not None
        return region * REGION, min(REGION, len(self.work) - region * REGION)

    @precondition(lambda self: self.session is not None)
    @rule(region=regions, seed=seeds)
    def write_whole(self, region: int, seed: int) -> None:
        assert self.work is not None
        offset, length = self._extent(region)
        data = noise(seed, length)
        assert not self._run(self.local.write(self.used, offset, data)).mismatch
        self.work[offset : offset + length] = data
        self._settle(region)

    @precondition(lambda self: self.session is not None)
    @rule(
        region=regions,
        seed=seeds,
        first=st.integers(0, 3),
        blocks=st.integers(1, 3),
        gap=st.integers(0, 2),
        zeros=st.integers(0, 3),
        uncompared=st.booleans(),
        check=st.sampled_from(["none", "right", "wrong"]),
    )
    def write_part(
        self, region: int, seed: int, first: int, blocks: int, gap: int, zeros: int, uncompared: bool, check: str
    ) -> None:
        assert self.work is not None
        offset, length = self._extent(region)
        data = noise(seed, min(blocks * BLOCK, length - first * BLOCK))
        start = first * BLOCK
        cleared = start + len(data) + gap * BLOCK
        # Extents end with the region or with a block.
        cut = min(zeros * BLOCK, length - cleared)
        expected = bytearray(self.work[offset : offset + length])
        expected[start : start + len(data)] = data
        request = pb.WriteRegionRequest(
            session=self.used, offset=offset, length=length, data=data, uncompared=uncompared
        )
        request.writes.add(offset=start, length=len(data))
        if cut > 0:
            request.zeros.add(offset=cleared, length=cut)
            expected[cleared : cleared + cut] = bytes(cut)
        if check != "none":
            right = digest(bytes(expected), self.replica.store.identity.key)
            request.digest = right if check == "right" else bytes(16)
        result = self._run(self.local.change(request))
        assert result.mismatch == (check == "wrong")
        self.work[offset : offset + length] = expected
        if check == "wrong":
            self.settled.discard(region)
        else:
            self._settle(region)

    @precondition(lambda self: self.session is not None)
    @rule(first=regions, count=st.integers(1, 3))
    def unmap(self, first: int, count: int) -> None:
        assert self.work is not None
        offset = first * REGION
        length = min(count * REGION, len(self.work) - offset)
        self._run(self.local.unmap(self.used, offset, length))
        self.work[offset : offset + length] = bytes(length)
        for region in range(first, first + -(-length // REGION)):
            self._settle(region)

    def _settle(self, region: int) -> None:
        if self.snapshot:
            self.settled.add(region)

    @precondition(lambda self: self.session is not None)
    @rule()
    def flush(self) -> None:
        self._run(self.local.flush(self.used))
        if self.snapshot:
            self.durable = (self.snapshot, self.size, set(self.settled))

    @precondition(lambda self: self.session is not None)
    @rule(region=regions)
    def write_nonsense(self, region: int) -> None:
        request = write_request(region * REGION, noise(1, REGION - 1), self.used)
        self._refused(Code.INVALID_ARGUMENT, self.local.change(request))

    # --- asking ---------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.session is not None)
    @rule()
    def ask_digests(self) -> None:
        assert self.work is not None
        count = -(-len(self.work) // REGION)
        found, _ = self._run(self.local.digests(self.used, [(0, count)]))
        assert found == b"".join(self._digests(self.work))

    @precondition(lambda self: self.session is not None)
    @rule()
    def ask_map(self) -> None:
        assert self.work is not None
        allocated = self._run(self.local.map(self.used))
        zero = {region for region, data in enumerate(self._pieces(self.work)) if not any(data)}
        assert allocated >= set(range(-(-len(self.work) // REGION))) - zero

    @staticmethod
    def _pieces(content: bytes | bytearray) -> list[bytes]:
        return [bytes(content[start : start + REGION]) for start in range(0, len(content), REGION)]

    def _digests(self, content: bytes | bytearray) -> list[bytes]:
        return [digest(piece, self.replica.store.identity.key) for piece in self._pieces(content)]

    # --- ending ---------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.session is not None)
    @rule(keep=st.sampled_from([None, 0, 1, 3]))
    def commit(self, keep: int | None) -> None:
        assert self.work is not None
        commit_id = (1000 + len(self.generations)).to_bytes(16, "big")
        rules = None if keep is None else pb.Retention(last=keep)
        done = self._run(self.local.commit(NAME, self.used, commit_id, rules))
        assert (done.generation, done.commit_id) == (self.last_number + 1, commit_id)
        self.last_number += 1
        self._move(Event.COMMIT)
        self.generations[self.last_number] = bytes(self.work)
        self.ids[self.last_number] = commit_id
        self.kept.append(self.last_number)
        self._end_session()
        self.work, self.durable, self.unsure = None, None, False
        self.keep = self.keep if keep is None else keep
        in_use = {number for number, until in self.pins.items() if until > self.clock.now}
        in_use |= {number for number, _, _ in self.readers}
        newest = self.kept[-max(self.keep, FLOOR) :]
        self.kept = [number for number in self.kept if number in newest or number in in_use]

    @precondition(lambda self: self.session is not None)
    @rule(keep=st.sampled_from([None, 1, 3]))
    def die_after_a_commit(self, keep: int | None) -> None:
        """Before anything that the commit has put off is done."""
        while self.readers:
            self._let_go(0)
        self.replica.complete_soon = lambda: None  # type: ignore[method-assign]
        self.commit(keep)
        self.restart(clean=False)

    @precondition(lambda self: self.ids)
    @rule(data=st.data())
    def commit_again(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.ids)))
        done = self._run(self.local.commit(NAME, self.session or pb.SessionRef(), self.ids[number]))
        assert (done.generation, done.commit_id) == (number, self.ids[number])

    @precondition(lambda self: self.session is not None)
    @rule(discard=st.booleans())
    def abort(self, discard: bool) -> None:
        assert self.session is not None
        self._run(self.local.abort(self.session, discard=discard))
        self._move(Event.CLOSE)
        self._end_session()
        if discard:
            self.work, self.durable, self.unsure = None, None, False

    def _end_session(self) -> None:
        assert self.session is not None
        self.zombies.append(self.session)
        self.session = None

    @precondition(lambda self: self.zombies)
    @rule(data=st.data())
    def zombie(self, data: st.DataObject) -> None:
        ref = data.draw(st.sampled_from(self.zombies))
        self._refused(Code.STALE_EPOCH, self.local.write(ref, 0, noise("zombie", REGION)))
        self._refused(Code.STALE_EPOCH, self.local.unmap(ref, 0, REGION))
        self._refused(Code.STALE_EPOCH, self.local.commit(NAME, ref, bytes(16)))
        self._run(self.local.abort(ref, discard=True))

    # --- servers --------------------------------------------------------------------------------------------------

    @rule(clean=st.booleans())
    def restart(self, clean: bool) -> None:
        while self.readers:
            self._let_go(0)
        if self.state is not State.EMPTY:
            self._run(self.local.stop() if clean else self.local.die())
            if self.session is not None:
                self._end_session()
                self._move(Event.CLOSE)
            self.pins = {}
            if self.on_device:
                # Others may have written to it.
                self.durable = None
            self.unsure = self.unsure or (not self.clones and bool(self.kept) and self.work is not None)
            self.local = self._run(self._start())

    @rule(seconds=st.sampled_from([1.0, 30.0, 61.0]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    # --- readers --------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.kept and len(self.readers) < 3)
    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(self.kept))
        reading = self.replica.points.reading(number)
        self.readers.append((number, reading, self._run(reading.__aenter__())))

    @precondition(lambda self: self.readers)
    @rule(data=st.data())
    def stop_reading(self, data: st.DataObject) -> None:
        self._let_go(data.draw(st.integers(0, len(self.readers) - 1)))

    def _let_go(self, index: int) -> None:
        number, reading, volume = self.readers.pop(index)
        content = bytearray(volume.size)
        self._run(volume.read_into(0, memoryview(content)))
        assert content == self.generations[number]
        self._run(reading.__aexit__(None, None, None))
        self.pins[number] = self.clock.now + LEASE

    # --- what always holds ----------------------------------------------------------------------------------------

    @invariant()
    def is_as_modelled(self) -> None:
        if self.state is State.EMPTY:
            assert not self.local.pool.list()
            return
        replica, store = self.replica, self.replica.store
        assert replica.state is self.state
        assert (replica.session is not None) == (self.session is not None)
        assert store.session.epoch == self.epoch
        assert [point.number for point in store.generations.points] == self.kept
        assert bool(self.kept) == bool(self.generations)
        assert not self.kept or self.kept[-1] == self.last_number
        # With a journal twice: read through the redo, which may not be applied yet, and once it is.
        self._check_points()
        self._run(replica.complete())
        self._check_points()
        if self.kept:
            newest = self.generations[self.kept[-1]]
            assert replica.path is not None
            found = replica.path.read_bytes()
            if self.on_device:
                assert found[GROWN:] == garbage(CAPACITY)[GROWN:]
                found = found[: len(newest)]
            assert found == newest
        if replica.session is not None and self.work is not None:
            assert self._run(read_all(replica.session.volume)) == self.work
            expected = self._digests(self.work)
            for region, value in replica.session.digests.items():
                assert value == expected[region], f"work image, region {region}"
        needed, allowed = files_of(store, work=self.work is not None)
        names = {path.name for path in store.directory.iterdir()}
        if self.work is not None and not self.kept and not self.clones and not self.on_device:
            needed, allowed = needed | {"image.raw"}, allowed | {"image.raw"}
        assert needed <= names <= allowed | {"clean.json"}
        if self.clones:
            assert ("work.img" in names) == (self.work is not None)

    def _check_points(self) -> None:
        store = self.replica.store
        for point in store.generations.points:
            content = self.generations[point.number]
            assert self._run(content_of(store, point)) == content
            expected = self._digests(content)
            for found in (store.recorded_digests(point), store.trusted_digests(point)):
                for region, value in found.items() if found is not None else ():
                    assert value == expected[region], f"generation {point.number}, region {region}"

    def teardown(self) -> None:
        for _, reading, _ in self.readers:
            self._run(reading.__aexit__(None, None, None))
        self._run(self.local.stop())
        self.runner.close()
        self.patch.undo()
        shutil.rmtree(self.directory)
        self.device.unlink(missing_ok=True)


@pytest.mark.parametrize("kind", ["clones", "journal", "device"])
def test_sessions_points_and_retention(kind: str, pool_root: Path, xfs_mount: Path | str) -> None:
    if kind == "clones" and isinstance(xfs_mount, str):
        pytest.skip(f"no file system with reflinks: {xfs_mount}")
    attributes = {"root": pool_root, "clones": kind == "clones", "on_device": kind == "device"}
    machine = type("Machine", (Model,), attributes)
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=15 if kind == "device" else 100,
            stateful_step_count=50,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
