"""Servers that die while they replicate to a device, promote it or take it back; a device that fails in between; and
power failures. On real loop devices where nothing else is said.

After each death what tests/fault/test_crash_points.py and test_handover_crashes.py ask for must hold, read from the
device itself. All passes of all names: BLOCKFERRY_CRASH_PASSES=40.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import blockferry.server
import pytest
from blockferry.client.sync import SyncOptions
from blockferry.common.errors import BlockferryError
from blockferry.common.retention import Retention
from blockferry.server.external import BINDING_NAME
from blockferry.server.identity import PoolIdentity
from blockferry.v1 import replicas_pb2 as replicas
from blockferry.v1 import replication_pb2 as pb

from tests.fault import test_crash_points
from tests.fault.contents import contents_in
from tests.fault.device_lives import DeviceLife
from tests.fault.raw import Raw, Refused, received
from tests.fault.stage import KEEP, KILLED, SMALL, STATE_FILES, DoomedServer, Stage
from tests.fault.test_power_loss import go_through
from tests.filesystems import Unavailable
from tests.images import BLOCK, build, noise
from tests.nbd import nbdkit
from tests.processes import loop_device
from tests.support import ok

CAPACITY = SMALL + 16 * BLOCK
"""Bytes of a device."""
BEFORE = noise("before", CAPACITY)

PASSES = int(os.environ.get("BLOCKFERRY_CRASH_PASSES", "1"))

_numbers = itertools.count(1)


class DeviceStage(Stage):
    """One replica on a device of its own, or an export of the file `device`, with its server."""

    def __init__(self, journal: Path, uri: str, scratch: Path, device: Path) -> None:
        name = f"device-{next(_numbers)}"
        words = ["--device", f"{name}={uri},journal={journal}"]
        super().__init__(DoomedServer(journal, "", words), scratch, clones=False)
        self.volume = name
        self.uri = uri
        self.device = device
        self.keep = KEEP

    @property
    def options(self) -> SyncOptions:
        """As many points are kept as the test wants."""
        return dataclasses.replace(super().options, keep=Retention(last=self.keep))

    async def _verify_contents(self, points: dict[int, replicas.RecoveryPoint]) -> None:
        if points:
            found = await contents_in(self.directory, self.source.parent, self.device)
            assert found == {number: self.contents[number] for number in sorted(points)}
            assert points[max(points)].path == self.uri
        held = await asyncio.to_thread(self.device.read_bytes)
        assert held[SMALL:] == BEFORE[SMALL:], "what lies behind the replica was written to"
        if points:
            assert held[:SMALL] == self.contents[max(points)]

    def _verify_files(self, points: dict[int, replicas.RecoveryPoint], *, work: bool) -> None:
        if not self.directory.exists():
            assert not points
            return
        files = {path.name for path in self.directory.iterdir()}
        commit_ids = [points[number].commit_id.hex() for number in sorted(points)]
        undo = {f"{one}.undo{suffix}" for one in commit_ids[:-1] for suffix in ("", ".index")}
        allowed = STATE_FILES | {BINDING_NAME} | undo | {f"{one}.digests" for one in commit_ids}
        allowed |= {"work.redo", "work.redo.index"} if work else set()
        assert files <= allowed, f"nobody needs {sorted(files - allowed)}"
        assert undo <= files


@pytest.fixture
def stage(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[DeviceStage]:
    """A replica on a device that is full of something, or on an export; its server is not started."""
    journal, backing = tmp_path / "journal", tmp_path / "backing"
    journal.mkdir()
    PoolIdentity(journal).settle({})
    build(backing, CAPACITY, [(0, BEFORE)])
    with ExitStack() as stack:
        try:
            if getattr(request, "param", "device") == "export":
                served = stack.enter_context(nbdkit(tmp_path, "file", backing))
                made = DeviceStage(journal, served.uri, tmp_path, backing)
            else:
                device = stack.enter_context(loop_device(backing, "--sector-size", "4096"))
                made = DeviceStage(journal, device, tmp_path, Path(device))
        except Unavailable as error:
            pytest.skip(str(error))
        yield made
        made.server.kill()


# --- syncs ------------------------------------------------------------------------------------------------------------

SAMPLE = [
    "apply-written", "atomic-before-rename", "checkpoint-flushed", "commit-undo-captured", "commit-redo-renamed",
    "commit-recorded", "complete-begun", "complete-written", "complete-applied", "complete-flushed",
    "drop-recorded", "discard-removed",
]  # fmt: skip
"""Of the names that are gone through in pools: those around what is written to a device."""
EVERY = sorted((test_crash_points.SERVER | test_crash_points.BOTH) - test_crash_points.CLONES_ONLY
               - test_crash_points.STARTING - test_crash_points.HANDING_OVER - test_crash_points.MERGING)  # fmt: skip


EXPORT_SAMPLE = ["apply-written", "complete-written", "complete-flushed"]


@pytest.mark.parametrize(
    ("stage", "name"),
    [("device", name) for name in (EVERY if PASSES > 1 else SAMPLE)]
    + [("export", name) for name in (EVERY if PASSES > 1 else EXPORT_SAMPLE)],
    indirect=["stage"],
)
async def test_the_server_dies(stage: DeviceStage, name: str) -> None:
    assert name in EVERY
    hits = 0
    for number in range(1, PASSES + 1):
        stage.server.doom = f"{name}:{number}"
        stage.server.start()
        death = await test_crash_points._life(stage)
        if death is None:
            break
        assert death.status == KILLED
        hits += 1
        await stage.verify()
        await stage.verify_next()
        stage.server.stop()
    assert hits, f"{name} is never passed"


async def test_the_device_is_gone_while_the_journal_waits(stage: DeviceStage, tmp_path: Path) -> None:
    """A server dies with a redo that is not applied, and the next one does not find the device."""
    stage.server.start()
    stage.change_source()
    await stage.sync()
    stage.server.stop()
    stage.server.doom = "complete-written:1"
    stage.server.start()
    death = asyncio.create_task(stage.server.death())
    stage.change_source()
    # It may be answered first.
    with contextlib.suppress(BlockferryError):
        await stage.sync()
    assert await asyncio.wait_for(death, 30) == KILLED
    stage.server.doom = ""
    link = tmp_path / "link"
    stage.server._flags = [flag.replace(str(stage.device), str(link)) for flag in stage.server._flags]
    stage.server.start()
    shown = ok("replica", "show", stage.server.url(stage.volume))
    assert shown["generation"] == 2 and str(link) in shown["notice"] and shown["path"] is None
    link.symlink_to(stage.device)
    stage.contents[2] = stage.attempted
    stage.change_source()
    await stage.sync()
    await stage.points()
    found = await contents_in(stage.directory, tmp_path, stage.device)
    assert found == {number: stage.contents[number] for number in (2, 3)}


# --- handing over -----------------------------------------------------------------------------------------------------

_HANDING_OVER = sorted(name for name in test_crash_points._named(blockferry.server) if name.startswith("device-"))


_SAMPLE = [*_HANDING_OVER, "complete-written", "drop-recorded", "log-before-fsync:2", "demote-recorded"]
_MORE = ["complete-begun", "complete-flushed", "log-before-fsync:1", "log-before-fsync:3", "log-before-fsync:4"]


@pytest.mark.parametrize("name", _SAMPLE + (_MORE if PASSES > 1 else []))
async def test_the_server_dies_while_it_hands_over(stage: DeviceStage, name: str) -> None:
    """Promoted to the oldest of three points, changed, and taken back."""
    stage.keep = 9
    stage.server.start()
    for _ in range(3):
        stage.change_source()
        await stage.sync()
    await stage.points()
    stage.server.stop()
    stage.server.doom = name
    stage.server.start()
    deaths = 0
    while not await asyncio.to_thread(_promoted, stage):
        deaths += await _another_server(stage)
        numbers = sorted(await stage.points())
        assert numbers in ([1, 2, 3], [1, 3], [1])
        with Raw(stage.server.address) as raw:
            state = raw.state(stage.volume)
        if state == "CONSISTENT":
            found = await contents_in(stage.directory, stage.source.parent, stage.device)
            assert found == {number: stage.contents[number] for number in numbers}
    assert held_by(stage.device) == stage.contents[1] + BEFORE[SMALL:]
    used = write_as_a_guest(stage.device)
    while not await asyncio.to_thread(_demoted, stage):
        deaths += await _another_server(stage)
        assert held_by(stage.device) == used
    assert deaths == 1, f"{name} is never passed"
    assert held_by(stage.device) == used
    stage.contents = {4: used[:SMALL]}
    stage.change_source()
    await stage.sync()
    assert sorted(await stage.points()) == [4, 5]
    found = await contents_in(stage.directory, stage.source.parent, stage.device)
    assert found == stage.contents


async def _another_server(stage: DeviceStage) -> int:
    assert await asyncio.wait_for(stage.server.death(), 30) == KILLED
    stage.server.doom = ""
    await asyncio.to_thread(stage.server.start)
    return 1


def _promoted(stage: DeviceStage) -> bool:
    """Promote the oldest point, or have the server die."""
    request = replicas.PromoteReplicaRequest(point=pb.PointRef(volume=stage.volume, number=1), confirm=stage.volume)
    with Raw(stage.server.address) as raw, contextlib.suppress(Refused):
        answers = received(raw.stream("Replicas/PromoteReplica", request, replicas.PromoteReplicaResponse))
        assert (answers[-1].promotion.generation, answers[-1].promotion.path) == (1, stage.uri)
        return True
    return False


def _demoted(stage: DeviceStage) -> bool:
    """Take it back with what was written to it, or have the server die."""
    request = replicas.DemoteReplicaRequest(volume=stage.volume, keep_changes=True, confirm=stage.volume)
    with Raw(stage.server.address) as raw:
        try:
            answer = raw.call("Replicas/DemoteReplica", request, replicas.DemoteReplicaResponse)
        except Refused as refusal:
            # Its answer was lost with the server before.
            return refusal.reason == "WRONG_STATE" and raw.state(stage.volume) == "CONSISTENT"
    assert answer.generation == 4
    return True


def held_by(device: Path) -> bytes:
    return device.read_bytes()


def write_as_a_guest(device: Path) -> bytes:
    """Write to a device that was handed out; what it holds then."""
    fd = os.open(device, os.O_RDWR)
    os.pwrite(fd, noise("a guest", BLOCK), BLOCK)
    os.fsync(fd)
    os.close(fd)
    return held_by(device)


# --- power failures ---------------------------------------------------------------------------------------------------


def test_every_promise_survives_a_power_failure(tmp_path: Path) -> None:
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as name:
        root, scratch = Path(name) / "life", Path(name) / "scratch"
        root.mkdir()
        scratch.mkdir()
        life = DeviceLife(root)
        asyncio.run(life.live())
        verdict = asyncio.run(go_through(life, scratch, samples=2 if PASSES > 1 else 0))
    print(f"{verdict.states} states after {len(life.log)} operations")
    assert verdict.broken == []
    assert verdict.states > len(life.log)
