"""A disk that fails while a replica is handed over, and clients that go away meanwhile, in one process.

Every call of disk.py that promoting, demoting, adopting and deleting make is made to fail once, one after the other, in
pools of both kinds: whatever fails, the committed generations stay byte-identical, what was promoted or adopted is
whole, the state is what the disk says, nothing is left over, and the command can be given again.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from blockferry.common.errors import BlockferryError, Code
from blockferry.server.replica import Replica
from blockferry.server.session import State
from blockferry.v1 import replicas_pb2 as replicas
from blockferry.v1 import replication_pb2 as pb

from tests.fault.faults import Injected
from tests.fault.local import NO_CONTEXT, Local, stalled
from tests.fault.raw import REGION
from tests.images import BLOCK, Hole, change, noise

KINDS = {"clones": "xfs_pool_root", "journal": "ext4_pool_root"}
CALLS = ("create", "append", "pwrite", "truncate", "fsync", "fsync_directory", "rename", "unlink")
SIZE = 4 * REGION + 2 * BLOCK
NAME = "v"
SEED = "old.raw"


def content(number: int) -> bytes:
    """What a generation holds."""
    return (
        noise("base", REGION) + noise(f"generation {number}", REGION) + bytes(REGION) + noise("end", SIZE - 3 * REGION)
    )


async def commit(local: Local, number: int) -> None:
    session = (await local.open(NAME, SIZE)).session
    image = content(number)
    for offset in range(0, SIZE, REGION):
        await local.write(session, offset, image[offset : offset + REGION])
    await local.commit(NAME, session, number.to_bytes(16, "big"), pb.Retention(last=9))


async def promote(local: Local, number: int = 0) -> replicas.Promotion:
    request = replicas.PromoteReplicaRequest(point=pb.PointRef(volume=NAME, number=number), confirm=NAME)
    answers = [one async for one in local.replicas.PromoteReplica(request, NO_CONTEXT)]
    return answers[-1].promotion


async def demote(local: Local, *, keep_changes: bool) -> replicas.DemoteReplicaResponse:
    request = replicas.DemoteReplicaRequest(volume=NAME, keep_changes=keep_changes, confirm=NAME)
    return await local.replicas.DemoteReplica(request, NO_CONTEXT)


async def delete(local: Local) -> None:
    await local.replicas.DeleteReplica(replicas.DeleteReplicaRequest(volume=NAME, confirm=NAME), NO_CONTEXT)


async def adopt(local: Local) -> None:
    request = replicas.AdoptReplicaRequest(volume=NAME, seed=SEED, region_size=REGION)
    await local.replicas.AdoptReplica(request, NO_CONTEXT)


async def held(local: Local) -> dict[int, bytes]:
    """What every recovery point holds, by number."""
    return {
        point.number: await local.read(NAME, point.number, 0, point.size)
        for point in await local.points(NAME)
        if not point.problem
    }


def worked_on() -> bytes:
    """The older point after it was promoted and used."""
    image = bytearray(content(1))
    image[:BLOCK] = noise("worked on", BLOCK)
    image[3 * REGION : 3 * REGION + BLOCK] = bytes(BLOCK)
    return bytes(image)


@pytest.fixture(params=KINDS)
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Where pools are, of each kind."""
    found: Path = request.getfixturevalue(KINDS[request.param])
    return found / f"faults-{tmp_path.name}"


@pytest.fixture
async def local(root: Path) -> AsyncIterator[Local]:
    """A pool with two generations."""
    local = await Local.start(root)
    (root / ".seeds").mkdir()
    for number in (1, 2):
        await commit(local, number)
    await local.replica(NAME).complete()
    yield local
    await local.stop()


def still_open(directory: Path) -> list[str]:
    """What this process has open in a directory."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/self/fd/{number}"))
    return sorted(path for path in found if Path(path.removesuffix(" (deleted)")).is_relative_to(directory))


async def outcome(call: Awaitable[object]) -> Code | None:
    """The code of a refusal."""
    try:
        await call
    except BlockferryError as error:
        return error.code
    return None


def left_over(directory: Path) -> list[str]:
    """Files that only something under way may have."""
    return sorted(path.name for path in directory.iterdir() if path.suffix == ".tmp" or path.name.startswith("work"))


# --- every call once ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operation:
    """Something that may fail. `states`: what the replica may be after a failure, and what it holds then; None for a
    replica that is gone. `repeats`: the code with which it is refused where it happened after all."""

    run: Callable[[Local], Awaitable[object]]
    states: dict[State | None, dict[int, bytes]]
    repeats: Code | None


BOTH = {1: content(1), 2: content(2)}
OPERATIONS = {
    "promote": Operation(lambda local: promote(local, 1), {State.CONSISTENT: BOTH, State.PROMOTED: BOTH}, None),
    "demote": Operation(
        lambda local: demote(local, keep_changes=True),
        {State.PROMOTED: BOTH, State.CONSISTENT: {**BOTH, 3: worked_on()}},
        Code.WRONG_STATE,
    ),
    "delete": Operation(delete, {State.CONSISTENT: BOTH, None: {}}, Code.NOT_FOUND),
    "adopt": Operation(adopt, {None: {}, State.EMPTY: {}, State.SYNCING: {}}, Code.NOT_FOUND),
}


@pytest.fixture
async def prepared(local: Local, root: Path, tmp_path: Path) -> dict[str, Path]:
    """Pools in which each operation may begin, to be copied."""
    found = {"promote": tmp_path / "committed", "demote": tmp_path / "promoted", "adopt": tmp_path / "empty"}
    found["delete"] = found["promote"]
    shutil.copytree(root, found["promote"])
    path = Path((await promote(local, 1)).path)
    change(path, [(0, noise("worked on", BLOCK)), (3 * REGION, Hole(BLOCK))])
    assert await asyncio.to_thread(path.read_bytes) == worked_on()
    shutil.copytree(root, found["demote"])
    (found["adopt"] / ".seeds").mkdir(parents=True)
    (found["adopt"] / ".seeds" / SEED).write_bytes(content(2))
    return found


async def fails_once(pool: Path, operation: Operation, name: str, when: int, number: int) -> bool:
    """Let one call fail in an operation; whether there was such a call. What must hold afterwards does."""
    what = f"{name} #{when} fails"
    local = await Local.start(pool)
    error: BlockferryError | OSError | None = None
    with pytest.MonkeyPatch.context() as patch:
        fault = Injected(patch, name, number, when=when)
        try:
            await operation.run(local)
        except (BlockferryError, OSError) as raised:
            error = raised
    for again in (False, True):
        if again:
            # What the disk says, to a server that knows nothing.
            await local.stop()
            local = await Local.start(pool)
        known = local.pool.list()
        state = known[0].state if known else None
        if fault.failed and error is not None:
            assert operation.states[state] == (await held(local) if known else {}), what
            if state in (State.CONSISTENT, State.PROMOTED):
                assert left_over(pool / NAME) == [], what
                assert (pool / NAME / "promoted.img").exists() == (state is State.PROMOTED), what
            seed = pool / ".seeds" / SEED
            adopted = [path for one in ("work.img", "image.raw") if (path := pool / NAME / one).exists()]
            if operation.run is adopt:
                assert [path.read_bytes() for path in (seed, *adopted) if path.exists()] == [content(2)], what
    if error is not None:
        assert await outcome(operation.run(local)) in (None, operation.repeats), what
        again_state = local.pool.list()[0].state if local.pool.list() else None
        assert again_state is list(operation.states)[-1], what
        assert operation.states[again_state] == (await held(local) if local.pool.list() else {}), what
    await local.stop()
    assert still_open(pool) == [], what
    return bool(fault.failed)


@pytest.mark.parametrize("what", OPERATIONS)
async def test_every_call_fails_once(prepared: dict[str, Path], root: Path, what: str) -> None:
    hits: dict[str, int] = {}
    for name in CALLS:
        for when in range(1, 100):
            pool = root.with_name(f"{root.name}-{name}-{when}")
            shutil.copytree(prepared[what], pool)
            try:
                number = errno.ENOSPC if when % 2 and name in ("create", "append", "pwrite") else errno.EIO
                if not await fails_once(pool, OPERATIONS[what], name, when, number):
                    break
            finally:
                shutil.rmtree(pool)
            hits[name] = hits.get(name, 0) + 1
    assert {"fsync_directory", "rename"} <= set(hits)
    print(f"{what}: {hits}")


# --- found by looking closely ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_changes", [True, False])
async def test_a_journal_that_is_not_applied_yet_is_applied_first(
    local: Local, monkeypatch: pytest.MonkeyPatch, keep_changes: bool
) -> None:
    """What a commit has put off is not there for whoever reads the image alone."""
    monkeypatch.setattr(Replica, "complete_soon", lambda _: None)
    await commit(local, 3)
    path = Path((await promote(local)).path)
    assert await asyncio.to_thread(path.read_bytes) == content(3)
    change(path, [(0, noise("worked on", BLOCK))])
    changed = await asyncio.to_thread(path.read_bytes)
    await demote(local, keep_changes=keep_changes)
    expected = {**BOTH, 3: content(3), 4: changed if keep_changes else content(3)}
    assert await held(local) == expected
    await local.replica(NAME).complete()
    assert await held(local) == expected


async def test_another_point_is_another_promotion(local: Local) -> None:
    """Whoever asks for the newest must not be given an older one."""
    await promote(local, 1)
    with pytest.raises(BlockferryError) as caught:
        await promote(local)
    assert caught.value.code is Code.WRONG_STATE
    await demote(local, keep_changes=False)
    assert (await promote(local)).generation == 3
    assert (await promote(local, 3)).generation == 3


async def test_nothing_is_handed_out_before_it_is_there(local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    with stalled(monkeypatch, "fsync", once=True) as stall:
        promoting = asyncio.ensure_future(promote(local))
        await stall.wait()
        shown = await local.show(NAME)
        assert shown.state == replicas.REPLICA_STATE_PROMOTED and not shown.HasField("promotion")
        for other in (promote(local), demote(local, keep_changes=True)):
            with pytest.raises(BlockferryError, match="its promotion has not finished"):
                await other
    assert (await promoting).generation == 2


@pytest.mark.parametrize(
    ("call", "name", "after"),
    [
        (lambda local: promote(local), "fsync", State.PROMOTED),
        (lambda local: demote(local, keep_changes=True), "fsync", State.CONSISTENT),
        (delete, "rename", None),
    ],
    ids=["promote", "demote", "delete"],
)
async def test_what_has_begun_is_finished_without_its_client(
    local: Local, monkeypatch: pytest.MonkeyPatch, call: Callable[[Local], Any], name: str, after: State | None
) -> None:
    if after is State.CONSISTENT:
        await promote(local)
    with stalled(monkeypatch, name, once=True) as stall:
        calling = asyncio.ensure_future(call(local))
        await stall.wait()
        replica = local.replica(NAME)
        calling.cancel()
        await asyncio.gather(calling, return_exceptions=True)
    await asyncio.wait_for(asyncio.gather(*replica._unfinished), 30)
    known = local.pool.list()
    assert (known[0].state if known else None) is after
    if after is State.PROMOTED:
        assert (await promote(local)).generation == 2
    if after is None:
        with pytest.raises(BlockferryError, match="no replica"):
            await delete(local)


async def test_what_waits_for_a_deletion_is_told(local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    replica = local.replica(NAME)
    with stalled(monkeypatch, "rename", once=True) as stall:
        deleting = asyncio.ensure_future(delete(local))
        await stall.wait()
        late = [asyncio.ensure_future(one(local)) for one in (promote, delete)]
        looking = asyncio.ensure_future(local.replicas.ListReplicas(replicas.ListReplicasRequest(), NO_CONTEXT))
        await looking
    await deleting
    for one in late:
        with pytest.raises(BlockferryError, match="deleted a moment ago"):
            await one
    assert local.pool.list() == []
    # Whoever had it in hand may still look at it.
    assert replica.store.total_bytes_held() == 0


async def test_a_seed_on_another_file_system_is_refused_before_anything_is_written(
    local: Local, root: Path, tmp_path: Path
) -> None:
    """It cannot be moved, and a record of it would stand in the way of another size."""
    (tmp_path / SEED).write_bytes(content(2))
    (root / ".seeds").rmdir()
    (root / ".seeds").symlink_to(tmp_path)
    await delete(local)
    with pytest.raises(BlockferryError, match="another file system") as caught:
        await adopt(local)
    assert caught.value.code is Code.UNSUPPORTED and local.pool.list() == []
    assert await asyncio.to_thread((tmp_path / SEED).read_bytes) == content(2)
