"""What docs/states.md says of operations: which may run in which state of a replica and with what the others are
refused, and which may run together, wait or are refused on one replica.

Both tables are read from the document and tried cell by cell, with a disk that stands still at the right instant.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from blockferry.common.errors import BlockferryError
from blockferry.server.pool import SEEDS
from blockferry.server.session import State
from blockferry.v1 import replicas_pb2 as replicas
from blockferry.v1 import replication_pb2 as pb

from tests.fault.local import NO_CONTEXT, Local, stalled
from tests.fault.raw import REGION, change_message, wire_runs
from tests.images import noise
from tests.tables import code, document, first_word, table

TEXT = document("docs/states.md")
BY_STATE = table(TEXT, "## Operations by state")
TOGETHER = table(TEXT, "## Operations together")

SIZE = 8 * REGION
FIRST, SECOND = bytes([1]) * 16, bytes([2]) * 16
"""Commit ids."""

POINT = pb.PointRef(volume="v")
SEED = "old.raw"
DIGEST_KEY = bytes(32)

Call = Callable[[Local, pb.SessionRef], Awaitable[object]]


@pytest.fixture
async def local(xfs_pool_root: Path, tmp_path: Path) -> AsyncIterator[Local]:
    local = await Local.start(xfs_pool_root / tmp_path.name)
    seeds = local.pool.path / SEEDS
    await asyncio.to_thread(seeds.mkdir)
    await asyncio.to_thread((seeds / SEED).write_bytes, noise(4, SIZE))
    yield local
    await local.stop()


async def outcome(call: Awaitable[object]) -> str:
    """`yes`, or the code of a refusal."""
    try:
        await call
    except BlockferryError as error:
        return error.code.name
    return "yes"


async def drained(answers: AsyncIterator[Any]) -> list[Any]:
    return [one async for one in answers]


# --- every call --------------------------------------------------------------------------------------------------


async def apply_changes(local: Local, ref: pb.SessionRef) -> None:
    await local.apply([change_message(1, session=ref)])


def point_digests(local: Local, _: pb.SessionRef) -> Awaitable[object]:
    request = pb.GetRegionDigestsRequest(point=POINT, piece_size=REGION, pieces=wire_runs([(0, 1)]), key=DIGEST_KEY)
    return drained(local.replication.GetRegionDigests(request, NO_CONTEXT))


async def hold_point(local: Local, _: pb.SessionRef) -> None:
    request = replicas.HoldPointRequest(point=POINT)
    held: Any = local.replicas.HoldPoint(request, NO_CONTEXT)
    async with contextlib.aclosing(held):
        await anext(held)


def promote(local: Local, _: pb.SessionRef) -> Awaitable[object]:
    request = replicas.PromoteReplicaRequest(point=POINT, confirm="v")
    return drained(local.replicas.PromoteReplica(request, NO_CONTEXT))


CALLS: dict[tuple[str, str], Call] = {
    ("look", "GetReplica"): lambda local, _: local.show("v"),
    ("look", "ListReplicas"): lambda local, _: local.replicas.ListReplicas(replicas.ListReplicasRequest(), NO_CONTEXT),
    ("look", "ListPools"): lambda local, _: local.replicas.ListPools(replicas.ListPoolsRequest(), NO_CONTEXT),
    ("look", "ListRecoveryPoints"): lambda local, _: local.points("v"),
    ("plan", "GetAllocationMap"): lambda local, _: drained(
        local.replication.GetAllocationMap(pb.GetAllocationMapRequest(point=POINT), NO_CONTEXT)
    ),
    ("read a point", "ReadRegions"): lambda local, _: local.read("v", 0, 0, SIZE),
    ("read a point", "GetRegionDigests"): point_digests,
    ("read a point", "HoldPoint"): hold_point,
    ("read a point", "VerifyReplica"): lambda local, _: drained(
        local.replicas.VerifyReplica(replicas.VerifyReplicaRequest(point=POINT), NO_CONTEXT)
    ),
    ("sync", "OpenSession"): lambda local, _: local.open("v", SIZE),
    ("change", "WriteRegion"): lambda local, ref: local.write(ref, 0, noise(3, REGION)),
    ("change", "UnmapRegion"): lambda local, ref: local.unmap(ref, 0, REGION),
    ("change", "ApplyChanges"): apply_changes,
    ("compare", "GetAllocationMap"): lambda local, ref: local.map(ref),
    ("compare", "GetRegionDigests"): lambda local, ref: local.digests(ref, [(0, 8)]),
    ("commit", "CommitSessions"): lambda local, ref: local.commit("v", ref, SECOND),
    ("abort", "AbortSession"): lambda local, ref: local.abort(ref),
    ("promote", "PromoteReplica"): promote,
    ("demote", "DemoteReplica"): lambda local, _: local.replicas.DemoteReplica(
        replicas.DemoteReplicaRequest(volume="v", keep_changes=True, confirm="v"), NO_CONTEXT
    ),
    ("delete", "DeleteReplica"): lambda local, _: local.replicas.DeleteReplica(
        replicas.DeleteReplicaRequest(volume="v", confirm="v"), NO_CONTEXT
    ),
    ("adopt", "AdoptReplica"): lambda local, _: local.replicas.AdoptReplica(
        replicas.AdoptReplicaRequest(volume="v", seed=SEED, region_size=REGION), NO_CONTEXT
    ),
}


# --- by state ----------------------------------------------------------------------------------------------------


async def lead_to(local: Local, column: str) -> pb.SessionRef:
    """Bring the replica into the state of a column; the open session, or one that has ended."""
    state = code(column)
    if state == "EMPTY":
        await local.pool.get_or_create("v", REGION)
        return pb.SessionRef(session_id="0" * 32, epoch=1)
    ref = (await local.open("v", SIZE)).session
    await local.write(ref, 0, noise(1, REGION))
    if state == "SYNCING":
        if not column.endswith("session"):
            await local.abort(ref)
        return ref
    await local.commit("v", ref, FIRST)
    if state == "UPDATING":
        ref = (await local.open("v", SIZE)).session
    if state == "PROMOTED":
        await promote(local, ref)
    return ref


def calls_of(row: str) -> list[str]:
    """The calls that a row of the table names."""
    return re.findall(r"\b[A-Z]\w+", row.split(":")[1])


CASES = [
    pytest.param(row, call, column, id=f"{call}-{column.replace('`', '')}")
    for row in BY_STATE.rows
    for call in calls_of(row)
    for column in BY_STATE.columns
]


def test_every_state_and_every_call_is_in_the_table() -> None:
    assert {code(column) for column in BY_STATE.columns} == {state.value for state in State}
    services = (pb.DESCRIPTOR.services_by_name["Replication"], replicas.DESCRIPTOR.services_by_name["Replicas"])
    known = {method.name for service in services for method in service.methods}
    assert {call for row in BY_STATE.rows for call in calls_of(row)} == known
    assert {(first_word(row), call) for row in BY_STATE.rows for call in calls_of(row)} == set(CALLS)


@pytest.mark.parametrize(("row", "call", "column"), CASES)
async def test_what_may_run_in_which_state(local: Local, row: str, call: str, column: str) -> None:
    ref = await lead_to(local, column)
    replica = local.replica("v")
    assert replica.state.value == code(column)
    cell = BY_STATE.cells[row, column].strip("`")
    points = replica.store.generations.points
    before = (replica.state, replica.session, replica.store.session, list(points))
    found = await outcome(CALLS[first_word(row), call](local, ref))
    assert found == cell
    if found != "yes":
        assert (replica.state, replica.session, replica.store.session, points) == before


@pytest.mark.parametrize("column", ["`CONSISTENT`", "`UPDATING`", "`PROMOTED`"])
async def test_a_commit_that_happened_is_answered_in_every_state(local: Local, column: str) -> None:
    await lead_to(local, column)
    before = local.replica("v").state
    again = await local.commit("v", pb.SessionRef(session_id="0" * 32, epoch=1), FIRST)
    assert (again.generation, again.commit_id) == (1, FIRST)
    assert local.replica("v").state is before


# --- together ----------------------------------------------------------------------------------------------------


async def resume(local: Local, ref: pb.SessionRef) -> None:
    await local.open("v", SIZE, resume_session_id=ref.session_id)


HELD: dict[str, tuple[str, Call]] = {
    "OpenSession": ("fsync", resume),
    "change": ("pwrite", CALLS["change", "WriteRegion"]),
    "compare": ("fsync", CALLS["compare", "GetAllocationMap"]),
    "flush": ("fsync", lambda local, ref: local.flush(ref)),
    "commit": ("fsync", CALLS["commit", "CommitSessions"]),
    "abort": ("unlink", lambda local, ref: local.abort(ref, discard=True)),
    "promote": ("fsync", promote),
}
"""The call of disk.py at which each operation stands still."""

ARRIVING: dict[str, Call] = {
    "OpenSession": CALLS["sync", "OpenSession"],
    "change": CALLS["change", "UnmapRegion"],
    "compare": CALLS["compare", "GetRegionDigests"],
    "flush": lambda local, ref: local.flush(ref),
    "commit": CALLS["commit", "CommitSessions"],
    "abort": CALLS["abort", "AbortSession"],
    "promote": promote,
    "demote": CALLS["demote", "DemoteReplica"],
    "delete": CALLS["delete", "DeleteReplica"],
    "adopt": CALLS["adopt", "AdoptReplica"],
    "read a point": CALLS["read a point", "ReadRegions"],
    "look": CALLS["look", "ListRecoveryPoints"],
}


async def reading(local: Local, begun: asyncio.Event, go: asyncio.Event) -> None:
    """A reader that stops in the middle."""
    request = replicas.ReadRegionsRequest(point=POINT)
    request.ranges.add(offset=0, length=SIZE)
    async for _ in local.replicas.ReadRegions(request, NO_CONTEXT):
        begun.set()
        await go.wait()


@contextlib.asynccontextmanager
async def under_way(
    local: Local, ref: pb.SessionRef, column: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[asyncio.Future[object]]:
    """The operation of a column, which has begun and does not end before this is left."""
    if column == "read a point":
        begun, go = asyncio.Event(), asyncio.Event()
        held: asyncio.Future[object] = asyncio.ensure_future(reading(local, begun, go))
        await begun.wait()
        try:
            yield held
        finally:
            go.set()
        return
    name, call = HELD[column]
    with stalled(monkeypatch, name, once=True) as stall:
        held = asyncio.ensure_future(call(local, ref))
        await stall.wait()
        yield held


async def give_everybody_a_chance(local: Local) -> None:
    """Whatever can go on does: several hops to the I/O threads and back."""
    for _ in range(10):
        await local.show("v")
        await asyncio.sleep(0)


def test_every_operation_is_in_the_table() -> None:
    assert TOGETHER.columns == [*HELD, "read a point"]
    assert TOGETHER.rows == list(ARRIVING)


@pytest.mark.parametrize("column", TOGETHER.columns)
@pytest.mark.parametrize("row", TOGETHER.rows)
async def test_what_may_run_together(local: Local, monkeypatch: pytest.MonkeyPatch, row: str, column: str) -> None:
    cell = TOGETHER.cells[row, column]
    ref = await lead_to(local, "`UPDATING`")
    async with under_way(local, ref, column, monkeypatch) as held, asyncio.timeout(60):
        arriving = asyncio.ensure_future(outcome(ARRIVING[row](local, ref)))
        if cell.startswith("together"):
            await asyncio.wait([arriving])
        elif cell.startswith("waits"):
            await give_everybody_a_chance(local)
            assert not arriving.done()
        else:
            assert re.fullmatch("refused: `[A-Z_]+`|no effect", cell), cell
        assert not held.done()
    await held
    found = await arriving
    assert found == (code(cell) if "refused" in cell else "yes")

    if row == "delete" and found == "yes":
        assert local.pool.list() == [] and not (local.pool.path / "v").exists()
        return
    replica = local.replica("v")
    generations = replica.store.generations
    if column == "commit" or (row == "commit" and found == "yes"):
        assert [point.commit_id for point in generations.points][-1] == SECOND
        assert generations.last_number == 2
    if column == "promote" or row == "promote":
        assert replica.session is None and replica.state is State.PROMOTED
        assert generations.promoted is not None and generations.promoted.number == generations.last_number
    elif column == "OpenSession":
        assert replica.session is not None and replica.session.epoch == ref.epoch + 1
    elif row == "abort" or (column == "abort" and row != "OpenSession"):
        assert replica.session is None and replica.state is State.CONSISTENT
