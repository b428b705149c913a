"""Power failures: whatever part of what was not flushed is lost, every promise is kept, and every flush is needed.

A source and a destination live a life in this process: an interrupted first sync, a resume, updates on clones or
through a journal, retention, restarts, a discarded session. The recorder notes what they do to files. For moments of
that life the model builds what a power failure may leave, and on each state the replica is opened and held to what was
promised before that moment; then it is synced again. Then every flush is left out in turn, and some state must break a
promise. Lives in which a process dies right before a flush and another takes over are gone through in the same way.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import itertools
import os
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import blockferry.client
import blockferry.common
import blockferry.server
import pytest
from blockferry.common import disk
from blockferry.common.errors import BlockferryError
from blockferry.common.volumes import ImageVolume
from blockferry.server.store import Store

from tests.fault.device_lives import DeviceLife
from tests.fault.handover_lives import AdoptionLife, DeletionLife, HandoverLife
from tests.fault.lives import REGION, SNAPSHOTS, Life, LogLife, NewFileLife, Recorded, RefusedLogLife, World
from tests.fault.powerloss import (
    Call,
    FileSystem,
    FlushFile,
    FlushNames,
    Mark,
    Operation,
    State,
    on_a_state,
)
from tests.fault.rehydration_lives import RehydrationLife

SEED = 20240229
RANDOM_DEATHS = 15
AFTER_DEATH = 40
"""Operations gone through after a death: up to a few promises of the next process."""

SAMPLES = 6
"""Random mixtures of what was lost, at each moment."""


@dataclass
class Verdict:
    """What going through a log came to."""

    states: int = 0
    broken: list[str] = field(default_factory=list)


async def go_through(
    life: Recorded,
    scratch: Path,
    *,
    without: Callable[[FlushFile | FlushNames], bool] = lambda flush: False,
    start: int = 0,
    stop: int = 1 << 30,
    samples: int = SAMPLES,
    first_only: bool = False,
) -> Verdict:
    """Check what a power failure may leave at every moment from `start` to `stop`, as if the flushes `without` says
    had never been made. `first_only`: stop at the first broken promise."""
    verdict = Verdict()
    rng = random.Random(SEED)
    system, promises = FileSystem(), life.promises()
    seen: set[object] = set()
    for moment, operation in enumerate(life.log):
        if moment >= stop:
            break
        if isinstance(operation, Mark):
            promises.take(operation.what)
            seen.clear()
        flush = isinstance(operation, FlushFile | FlushNames)
        system.take(operation, flushed=not (flush and without(operation)))  # type: ignore[arg-type]
        if moment < start:
            continue
        for state in system.states(rng, samples, seen):
            verdict.states += 1
            problem = await _problem(state, scratch, life, promises)
            if problem:
                verdict.broken.append(f"after operation {moment} ({str(operation)[:80]}): {problem}")
                if first_only:
                    return verdict
    return verdict


async def _problem(state: State, scratch: Path, life: Recorded, promises: Any) -> str:
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        root = Path(name)
        try:
            with on_a_state(state.materialise(root)):
                await life.check(root, promises)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return ""


# --- lives ------------------------------------------------------------------------------------------------------------


def _never(operation: Operation) -> bool:
    return False


def _lived(scratch: Path, *, clones: bool, doomed: Callable[[Operation], bool] = _never) -> Life:
    with tempfile.TemporaryDirectory(dir=scratch) as root:
        life = Life(Path(root), clones=clones, doomed=doomed)
        asyncio.run(life.live())
    return life


def _flushes(life: Recorded) -> dict[Call, list[int]]:
    """The moments of a life at which each flush was made."""
    found: dict[Call, list[int]] = {}
    for moment, operation in enumerate(life.log):
        if isinstance(operation, FlushFile | FlushNames):
            found.setdefault(operation.call, []).append(moment)
    return found


def _before(call: Call, occurrence: int) -> Callable[[Operation], bool]:
    """Whether an operation is this flush, for the numbered time."""
    left = occurrence + 1

    def doomed(operation: Operation) -> bool:
        nonlocal left
        left -= isinstance(operation, FlushFile | FlushNames) and operation.call == call
        return left == 0

    return doomed


def _at(number: int) -> Callable[[Operation], bool]:
    """Whether an operation is the one with this number."""
    numbers = itertools.count()
    return lambda operation: next(numbers) == number


@pytest.fixture(scope="module")
def lives(scratch: Path) -> dict[bool, Life]:
    """A life without a death on clones (True) and with a journal (False)."""
    return {clones: _lived(scratch, clones=clones) for clones in (True, False)}


@pytest.fixture(scope="module")
def handed_over(scratch: Path) -> list[Recorded]:
    """Lives in which replicas are promoted, demoted, adopted and deleted, of both kinds."""
    found: list[Recorded] = []
    for kind in (HandoverLife, AdoptionLife, DeletionLife):
        for clones in (True, False):
            with tempfile.TemporaryDirectory(dir=scratch) as root:
                life = kind(Path(root), clones=clones)
                asyncio.run(life.live())
            found.append(life)
    with tempfile.TemporaryDirectory(dir=scratch) as root:
        device = DeviceLife(Path(root))
        asyncio.run(device.live())
    return [*found, device]


def _rehydrated(scratch: Path, doomed: Callable[[Operation], bool] = _never) -> RehydrationLife:
    with tempfile.TemporaryDirectory(dir=scratch) as root:
        life = RehydrationLife(Path(root), doomed=doomed)
        asyncio.run(life.live())
    return life


@pytest.fixture(scope="module")
def rehydrated(scratch: Path) -> list[RehydrationLife]:
    """A disk that is rehydrated; and the same where a process dies right before the first commit of its map is
    flushed, or before the name of the map is."""
    whole = _rehydrated(scratch)
    purposes = ("durable.py:append < map.py", "durable.py:rename_durably < durable.py:write_atomic < durable.py:create")
    calls = [next(call for call in _flushes(whole) if call.purpose.startswith(purpose)) for purpose in purposes]
    return [whole, *(_rehydrated(scratch, _before(call, 0)) for call in calls)]


both = pytest.mark.parametrize("clones", [True, False], ids=["clones", "journal"])


# --- the tests --------------------------------------------------------------------------------------------------------


@both
def test_every_promise_survives_a_power_failure(scratch: Path, lives: dict[bool, Life], clones: bool) -> None:
    life = lives[clones]
    verdict = asyncio.run(go_through(life, scratch))
    print(f"{verdict.states} states after {len(life.log)} operations, seed {SEED}")
    assert verdict.broken == []
    assert verdict.states > len(life.log)


def test_every_promise_of_a_handover_survives_a_power_failure(scratch: Path, handed_over: list[Recorded]) -> None:
    for life in handed_over:
        verdict = asyncio.run(go_through(life, scratch))
        assert verdict.broken == []
        assert verdict.states > len(life.log) // 2


def test_every_promise_of_a_rehydration_survives_a_power_failure(
    scratch: Path, rehydrated: list[RehydrationLife]
) -> None:
    for life in rehydrated:
        verdict = asyncio.run(go_through(life, scratch, samples=2))
        assert verdict.broken == []
        assert verdict.states > len(life.log)


def test_promises_of_a_rehydration_that_goes_on(scratch: Path, rehydrated: list[RehydrationLife]) -> None:
    """A process dies right before each flush, or anywhere; the next one finds what was written, but not flushed."""
    rng = random.Random(SEED)
    whole = rehydrated[0]
    changes = sum(not isinstance(operation, Mark) for operation in whole.log)
    deaths = [_before(call, 0) for call in _flushes(whole) if call.site]
    deaths += [_at(rng.randrange(changes)) for _ in range(5)]
    for doomed in deaths:
        life = _rehydrated(scratch, doomed)
        assert life.died_at is not None
        verdict = asyncio.run(go_through(life, scratch, start=life.died_at, stop=life.died_at + 15, samples=1))
        assert verdict.broken == []


@both
def test_promises_of_those_who_take_over_from_the_dead(scratch: Path, lives: dict[bool, Life], clones: bool) -> None:
    """A process dies right before a flush, or anywhere; the next one finds what was written, but not flushed. What it
    then promises must survive too."""
    rng = random.Random(SEED)
    flushes = _flushes(lives[clones])
    deaths = [
        (moments[occurrence], _before(call, occurrence))
        for call, moments in flushes.items()
        for occurrence in sorted({0, len(moments) - 1})
    ]
    changes = sum(not isinstance(operation, Mark) for operation in lives[clones].log)
    deaths += [(0, _at(rng.randrange(changes))) for _ in range(RANDOM_DEATHS)]
    states = 0
    for _, doomed in deaths:
        life = _lived(scratch, clones=clones, doomed=doomed)
        assert life.died_at is not None
        verdict = asyncio.run(go_through(life, scratch, start=life.died_at, stop=life.died_at + AFTER_DEATH, samples=1))
        states += verdict.states
        assert verdict.broken == []
    assert states > len(deaths) * AFTER_DEATH // 2
    print(f"{states} states after {len(deaths)} deaths, seed {SEED}")


def _sites() -> list[str]:
    """FILE:LINE of every flush in the source, outside disk.py. Nobody flushes past that module."""
    found = []
    for package in (blockferry.common, blockferry.client, blockferry.server):
        for path in Path(str(package.__file__)).parent.rglob("*.py"):
            if path.name == "disk.py":
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                if not isinstance(node, ast.Attribute):
                    continue
                # What else is called so is no call of the kernel's.
                whole = node.attr == "sync" and isinstance(node.value, ast.Name) and node.value.id in ("os", "disk")
                if whole or node.attr in ("fsync", "fdatasync", "fsync_directory"):
                    assert isinstance(node.value, ast.Name) and node.value.id == "disk", f"{path.name}:{node.lineno}"
                    found.append(f"{path.name}:{node.lineno}")
    return sorted(found)


def _site_of_the_map() -> str:
    """The flush before an allocation map is read: it serves the map and promises nothing."""
    lines, first = inspect.getsourcelines(ImageVolume._allocation)
    return f"image.py:{first + next(at for at, line in enumerate(lines) if 'disk.fsync' in line)}"


_MAPS = ("blockdev.py", "device.py", "loop.py")
"""Modules of block devices: what they flush serves the map or the writer of a device, of which there is none here."""

_ARCHIVES = ("directory.py", "staging.py")
"""Modules of archives: see test_archive_power_loss.py."""

_LEARNED_AGAIN = "a confirmation that is lost is learned again from the replica"

_UNDO = (
    "durable.py:rename_durably < durable.py:write_atomic < delta.py:save < journal.py:_capture < journal.py:seal "
    "< store.py:seal"
)

_MADE = " < ".join(["durable.py:make_directories"] * 3)

_WORK = "durable.py:rename_durably < durable.py:write_atomic < delta.py:save < overlay.py:flush"

COVERED = {
    f"{_WORK} < replica.py:_flush": "the note of progress is renamed next, in the same directory",
    f"{_WORK} < commits.py:_seal_one": "the redo is renamed next, in the same directory",
    f"{_WORK} < handover.py:_demote": "the redo is renamed next, in the same directory",
    f"{_UNDO} < commits.py:_seal_one": "the redo is renamed next, in the same directory",
    f"{_UNDO} < store.py:commit < handover.py:_demote": "the redo is renamed next, in the same directory",
    "durable.py:rename_durably < durable.py:write_atomic < commits.py:_write < commits.py:confirm": _LEARNED_AGAIN,
    "durable.py:rename_durably < durable.py:write_atomic < commits.py:_write < commits.py:confirm "
    "< commits.py:reconcile": _LEARNED_AGAIN,
    "descriptor.py:flush < external.py:flush < replica.py:_flush": "what is noted of it no later process believes",
    "durable.py:rename_durably < durable.py:write_atomic < external.py:_bind < external.py:begin < journal.py:begin "
    "< store.py:begin_work < replica.py:_begin < replica.py:_open_session": "the first commit flushes the directory",
    "durable.py:__init__ < store.py:create": "the identity is written next into the same directory",
    f"{_MADE} < hydration.py:_keep_clone < hydration.py:snapshot": "--state was made durable when it was opened",
    "durable.py:remove_durably < store.py:begin_work < handover.py:_demote": "work is new there: its name is durable "
    "only after the removal is",
}
"""Flushes that another one stands in for here, each by its purpose; their sites are needed elsewhere."""


@pytest.fixture(scope="module")
def proofs(
    scratch: Path, lives: dict[bool, Life], handed_over: list[Recorded], rehydrated: list[RehydrationLife]
) -> list[Recorded]:
    """Lives that show between them what each flush is for."""
    commits = [call for call in _flushes(lives[True]) if "commit" in call.purpose and "append" in call.purpose]
    taken_over = [_lived(scratch, clones=True, doomed=_before(call, 0)) for call in commits]
    logs: list[LogLife | NewFileLife] = [LogLife(), RefusedLogLife(), NewFileLife()]
    for log in logs:
        with tempfile.TemporaryDirectory(dir=scratch) as root:
            log.live(Path(root))
    return [lives[True], lives[False], *taken_over, *logs, *handed_over, *rehydrated]


@pytest.mark.parametrize(
    "site", sorted(one for one in set(_sites()) - {_site_of_the_map()} if not one.startswith(_MAPS + _ARCHIVES))
)
def test_every_flush_is_needed(scratch: Path, proofs: list[Recorded], site: str) -> None:
    calls = {call for life in proofs for call in _flushes(life) if call.site == site}
    assert calls, "no life gets here"
    needed = {call for call in calls if call.purpose not in COVERED}
    assert needed, "another flush always stands in for it"
    for call in sorted(needed, key=lambda one: one.purpose):
        assert any(_broken_without(call, life, scratch) for life in proofs), f"nothing needs {call}"


def _broken_without(call: Call, life: Recorded, scratch: Path) -> bool:
    moments = _flushes(life).get(call)
    if moments is None:
        return False
    verdict = asyncio.run(
        go_through(life, scratch, without=lambda flush: flush.call == call, start=moments[0], first_only=True)
    )
    if verdict.broken:
        print(f"{call}: {verdict.broken[0]}")
    return bool(verdict.broken)


def test_covered_flushes_exist(proofs: list[Recorded]) -> None:
    assert set(COVERED) <= {call.purpose for life in proofs for call in _flushes(life)}


def test_a_map_is_read_after_a_flush(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Delayed allocation: without the flush, data that was just written may be reported as a hole."""
    path = scratch / "map.img"
    path.write_bytes(SNAPSHOTS["c"])
    steps: list[str] = []
    real_fsync, real_lseek = disk.fsync, os.lseek

    def fsync(fd: int) -> None:
        steps.append("fsync")
        real_fsync(fd)

    def lseek(fd: int, position: int, how: int) -> int:
        steps.append("lseek")
        return real_lseek(fd, position, how)

    async def read() -> None:
        volume = await ImageVolume.open(path)
        monkeypatch.setattr(disk, "fsync", fsync)
        monkeypatch.setattr(os, "lseek", lseek)
        found = await volume.allocation(REGION)
        assert set(found.regions) >= {0, 1, 3, 4}
        await volume.close()

    asyncio.run(read())
    assert steps[:2] == ["fsync", "lseek"]
    assert steps.count("fsync") == 1


def test_a_lost_log_is_not_taken_for_an_empty_one(scratch: Path) -> None:
    """A new log would forget every generation, and recovery would take their images for unfinished work."""

    async def committed() -> Path:
        world = World(scratch, clones=False)
        point = await world.sync("a")
        assert point is not None
        image = world.replica.path
        assert image is not None
        await world.stop()
        return image

    image = asyncio.run(committed())
    (image.parent / "commits.log").unlink()
    with pytest.raises(BlockferryError, match=r"commits\.log is damaged: it is missing"):
        Store(image.parent, clones=False)
    assert image.read_bytes() == SNAPSHOTS["a"]
