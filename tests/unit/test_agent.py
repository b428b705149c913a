"""The runtime of the agent: what begins, what is remembered, what fails alone, and how it ends."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest
from blockferry.client import agent as module
from blockferry.client.cycle import LEAST_IN_FLIGHT
from blockferry.client.memory import Memory, StateDirectory
from blockferry.client.schedule import State
from blockferry.client.view import policy_message
from blockferry.common.agent_config import AgentLimits, Hooks
from blockferry.common.errors import BlockferryError, Code
from blockferry.v1 import agent_pb2 as pb

from tests.unit.agents import FakeClock, broken, config, policy, settled, staged

HOOK = Hooks(failure=("tell",))
MIB = 1 << 20


def remembered(directory: Path, name: str) -> Memory:
    return msgspec.json.decode((directory / f"state/policies/{name}.json").read_bytes(), type=Memory)


async def test_policies_are_replicated_again_and_again(tmp_path: Path) -> None:
    async with staged(config(tmp_path, a=policy("a"), b=policy("b", rpo=1000))) as stage:
        for name in ("a", "b"):
            await stage.commit(name)
        assert remembered(tmp_path, "a").last is not None
        await stage.pass_time(89.0)
        assert stage.at_work() == []
        await stage.pass_time(1.0)
        assert stage.at_work() == [("a",)]
        await stage.commit("a", bytes={"data_sent": 9000})
        memory = remembered(tmp_path, "a")
        assert memory.last is not None and memory.committed is not None
        assert (memory.last.generation, memory.last.interval, memory.last.data_sent) == (3, 90.0, 9000)
        assert memory.committed.now == 1090.0
        shown = policy_message(stage.agent, stage.agent.policies["a"])
        assert (shown.last_committed.changed_per_second, shown.runs_begun, shown.runs_ended) == (100, 2, 2)
        assert (shown.state, shown.due_in_ms, shown.rpo_missed) == (pb.POLICY_STATE_WAITING, 90_000, False)


async def test_a_group_is_one_run(tmp_path: Path) -> None:
    limits = AgentLimits(transfers=1)
    async with staged(config(tmp_path, limits=limits, a=policy("a", group="g"), b=policy("b", group="g"))) as stage:
        assert stage.at_work() == [("a", "b")]
        (call,) = stage.calls
        assert call.terms.bytes_in_flight == 64 * MIB
        await stage.fail("a", "b", error=broken(Code.UNAVAILABLE))
        for name in ("a", "b"):
            assert stage.agent.standing(name).state is State.BACKING_OFF
            assert remembered(tmp_path, name).failure is not None
        await stage.pass_time(2.0)
        await stage.commit("a", "b")
        assert {remembered(tmp_path, name).failure for name in ("a", "b")} == {None}


async def test_who_fails_backs_off_and_the_others_do_not(tmp_path: Path) -> None:
    async with staged(config(tmp_path, dead=policy("dead", hooks=HOOK), a=policy("a", rpo=10))) as stage:
        for number in range(1, 9):
            await stage.fail("dead", error=broken(Code.UNAVAILABLE))
            await stage.commit("a")
            assert stage.agent.standing("dead").failures == number
            await stage.pass_time(9.0)
            if ("dead",) not in stage.at_work():
                await stage.pass_time(100.0)
        assert len([call for call in stage.calls if call.names == ("a",)]) >= 8
        failure = stage.agent.policies["dead"].memory.failure
        assert failure is not None
        assert failure.line == "it does not work: because; do something"
        shown = policy_message(stage.agent, stage.agent.policies["dead"]).last_error
        assert (shown.code, shown.cause, shown.next) == ("unavailable", "because", "do something")
        first = stage.alarms[0]
        assert first["BLOCKFERRY_EVENT"] == "run-failed"
        assert first["BLOCKFERRY_POLICY"] == "dead"
        assert first["BLOCKFERRY_SOURCE"] == "/srv/dead"
        assert first["BLOCKFERRY_DESTINATION"] == "grpc://127.0.0.1:1/dead"
        assert (first["BLOCKFERRY_CODE"], first["BLOCKFERRY_FAILURES"]) == ("unavailable", "1")
        assert first["BLOCKFERRY_ERROR"] == failure.line
        assert (first["BLOCKFERRY_RPO"], first["BLOCKFERRY_RPO_MISSED"]) == ("100", "0")
        told = [alarm for alarm in stage.alarms if alarm["BLOCKFERRY_EVENT"] == "run-failed"]
        assert [alarm["BLOCKFERRY_FAILURES"] for alarm in told] == [str(number) for number in range(1, 9)]
        assert not stage.incidents


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ValueError("a bug"), Code.INTERNAL, "ValueError('a bug')"),
        (OSError(5, "x"), Code.IO_ERROR, "a cannot be replicated: input/output error"),
        (ExceptionGroup("g", [broken(Code.TLS)]), Code.TLS, "it does not work"),
        (ExceptionGroup("g", [ValueError("bug")]), Code.INTERNAL, "bug"),
        (broken(Code.IN_USE, volume="a"), Code.IN_USE, "; do something; if that is another agent with this policy"),
        (broken(Code.STALE_EPOCH, volume="a"), Code.STALE_EPOCH, "if that is another agent"),
    ],
    ids=range(6),
)
async def test_whatever_a_run_raises_is_its_own(tmp_path: Path, error: Exception, code: Code, words: str) -> None:
    async with staged(config(tmp_path, a=policy("a"), b=policy("b"))) as stage:
        await stage.fail("a", error=error)
        failure = remembered(tmp_path, "a").failure
        assert failure is not None
        assert failure.code == code.value
        assert words in failure.line
        await stage.commit("b")
        await stage.pass_time(2.0)
        assert stage.at_work() == [("a",)]
        assert not stage.incidents and not stage.supervisor.failed.done()


async def test_a_missed_rpo_is_told_once(tmp_path: Path) -> None:
    async with staged(config(tmp_path, a=policy("a", hooks=HOOK))) as stage:
        await stage.commit("a")
        await stage.pass_time(95.0)
        call = await stage.begun("a")
        await stage.pass_time(99.0)
        assert stage.alarms == []
        for _ in range(3):
            await stage.pass_time(2.0)
        assert [alarm["BLOCKFERRY_EVENT"] for alarm in stage.alarms] == ["rpo-missed"]
        assert (stage.alarms[0]["BLOCKFERRY_LAG"], stage.alarms[0]["BLOCKFERRY_ERROR"]) == ("196", "")
        assert policy_message(stage.agent, stage.agent.policies["a"]).rpo_missed
        call.commit()
        await stage.ended(call)


async def test_a_failure_hook_that_hangs_gathers_no_others(tmp_path: Path) -> None:
    async with staged(config(tmp_path, a=policy("a", hooks=HOOK))) as stage:
        stage.alarm_lasts.clear()
        for _ in range(4):
            await stage.fail("a", error=broken(Code.IO_ERROR))
            await stage.pass_time(20.0)
        assert len(stage.alarms) == 1
        stage.alarm_lasts.set()
        await settled()
        await stage.fail("a", error=broken(Code.IO_ERROR))
        assert len(stage.alarms) == 2


# --- over restarts ----------------------------------------------------------------------------------------------------


async def test_what_was_replicated_is_not_replicated_again_after_a_restart(tmp_path: Path) -> None:
    clock = FakeClock()
    configured = config(tmp_path, a=policy("a"), b=policy("b"))
    async with staged(configured, clock) as stage:
        await stage.commit("a")
    clock.time += 50.0
    async with staged(configured, clock) as stage:
        assert stage.at_work() == [("b",)]
        shown = policy_message(stage.agent, stage.agent.policies["a"])
        assert (shown.lag_ms, shown.last_committed.generation) == (50_000, 2)
        await stage.pass_time(40.0)
        assert ("a",) in stage.at_work()
    # After a reboot the wall clock is all there is; this one shows that two days have passed.
    clock.time, clock.offset, clock.boot_id = 5.0, clock.offset + clock.time + 2 * 86400, "second"
    async with staged(configured, clock) as stage:
        assert sorted(stage.at_work()) == [("a",), ("b",)]
        assert stage.agent.standing("a").missed


async def test_a_pause_outlasts_a_restart(tmp_path: Path) -> None:
    clock = FakeClock()
    configured = config(tmp_path, a=policy("a", group="g"), b=policy("b", group="g"))
    async with staged(configured, clock) as stage:
        await stage.commit("a", "b")
        await stage.agent.pause("a")
        with pytest.raises(BlockferryError) as caught:
            stage.agent.sync("b")
        assert caught.value.code is Code.WRONG_STATE
        assert "a is paused" in caught.value.line()
        await stage.pass_time(1000.0)
        assert stage.at_work() == []
    async with staged(configured, clock) as stage:
        assert stage.agent.standing("b").state is State.PAUSED
        await stage.agent.resume("a")
        await stage.pass_time()
        assert stage.at_work() == [("a", "b")]


async def test_another_destination_has_nothing_yet(tmp_path: Path) -> None:
    async with staged(config(tmp_path, a=policy("a"))) as stage:
        await stage.commit("a")
    async with staged(config(tmp_path, a=policy("a", destination="grpc://127.0.0.1:1/other"))) as stage:
        assert stage.at_work() == [("a",)]
        assert not policy_message(stage.agent, stage.agent.policies["a"]).HasField("last_committed")


async def test_a_disk_that_is_full_costs_the_memory_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with staged(config(tmp_path, a=policy("a"))) as stage:

        def full(*_: object) -> None:
            raise BlockferryError(Code.OUT_OF_SPACE, "no room")

        monkeypatch.setattr(StateDirectory, "save", full)
        await stage.commit("a")
        assert policy_message(stage.agent, stage.agent.policies["a"]).last_committed.generation == 1
        with pytest.raises(BlockferryError, match="no room"):
            await stage.agent.pause("a")
        assert not stage.incidents


# --- other configurations ---------------------------------------------------------------------------------------------


async def test_a_reload_ends_no_run(tmp_path: Path) -> None:
    async with staged(config(tmp_path, a=policy("a", bandwidth=1000), b=policy("b"), c=policy("c"))) as stage:
        calls = {name: await stage.begun(name) for name in ("a", "b", "c")}
        assert calls["a"].members[0].limiter is not None and calls["a"].terms.bandwidth is not None
        limits = AgentLimits(transfers=5, bandwidth=7000)
        await stage.agent.reload(
            config(
                tmp_path,
                limits=limits,
                a=policy("a", bandwidth=500),
                c=policy("c", destination="grpc://127.0.0.1:1/other"),
                d=policy("d"),
            )
        )
        await settled()
        assert sorted(stage.at_work()) == [("a",), ("b",), ("c",), ("d",)]
        assert calls["a"].members[0].limiter.rate == 500, "at once"
        assert calls["a"].terms.bandwidth.rate == 7000
        for call in calls.values():
            call.commit()
            await stage.ended(call)
        assert stage.agent.policies["a"].memory.last is not None
        assert stage.agent.policies["c"].memory.last is None, "what was committed went elsewhere"
        await stage.pass_time()
        assert sorted(stage.at_work()) == [("c",), ("d",)]
        with pytest.raises(BlockferryError, match="there is no policy b"):
            stage.agent.find("b")


async def test_a_policy_that_comes_back_has_its_memory(tmp_path: Path) -> None:
    configured = config(tmp_path, a=policy("a"))
    async with staged(configured) as stage:
        await stage.commit("a")
        await stage.agent.reload(config(tmp_path))
        assert stage.agent.policies == {}
        await stage.agent.reload(configured)
        await stage.pass_time()
        assert stage.at_work() == []
        assert stage.agent.standing("a").lag == 0.0


async def test_no_more_memory_than_there_may_be(tmp_path: Path) -> None:
    policies = {f"p{number}": policy(f"p{number}") for number in range(8)}
    limits = AgentLimits(transfers=8, bytes_in_flight=3 * LEAST_IN_FLIGHT)
    async with staged(config(tmp_path, limits=limits, **policies)) as stage:
        assert len(stage.at_work()) == 3, "rather fewer than with too little each"
        assert {call.terms.bytes_in_flight for call in stage.calls} == {LEAST_IN_FLIGHT}
        more = AgentLimits(transfers=8, bytes_in_flight=16 * LEAST_IN_FLIGHT)
        await stage.agent.reload(config(tmp_path, limits=more, **policies))
        await settled()
        assert len(stage.at_work()) == 8


# --- what people ask for ----------------------------------------------------------------------------------------------


async def test_sync_now(tmp_path: Path) -> None:
    async with staged(config(tmp_path, a=policy("a", window="00:00-01:00"))) as stage:
        assert stage.agent.standing("a").state is State.OUTSIDE_WINDOW
        assert stage.agent.sync("a") == 0
        call = await stage.begun("a")
        assert stage.agent.sync("a") == 1, "what runs has its snapshot behind it"
        call.commit()
        await stage.ended(call)
        await stage.commit("a")
        await stage.pass_time()
        assert (stage.at_work(), stage.agent.policies["a"].runs_ended) == ([], 2)
        with pytest.raises(BlockferryError, match="there is no policy x: this agent has a; list them"):
            stage.agent.sync("x")


async def test_progress_is_seen(tmp_path: Path) -> None:
    async with staged(config(tmp_path, a=policy("a"))) as stage:
        call = await stage.begun("a")
        one = stage.agent.policies["a"]
        assert policy_message(stage.agent, one).progress.phase == ""
        phase = call.members[0].progress.start("transfer", 1000)
        phase.note = lambda: "waiting for the destination for 5 s"
        assert policy_message(stage.agent, one).progress.bytes_per_second == 0
        stage.clock.time += 10.0
        phase.done = 200
        shown = policy_message(stage.agent, one).progress
        assert (shown.phase, shown.bytes_done, shown.bytes_total) == ("transfer", 200, 1000)
        assert (shown.bytes_per_second, shown.left_ms) == (20, 40_000)
        assert shown.note == "waiting for the destination for 5 s"
        call.commit()
        await stage.ended(call)
        assert not policy_message(stage.agent, one).HasField("progress")


# --- the end ----------------------------------------------------------------------------------------------------------


async def test_the_end_begins_nothing_and_cancels_what_does_not_end(tmp_path: Path) -> None:
    async with staged(config(tmp_path, a=policy("a", hooks=HOOK), b=policy("b", rpo=10))) as stage:
        slow, quick = await stage.begun("a"), await stage.begun("b")
        stage.agent.end()
        quick.commit()
        await stage.pass_time(50.0)
        assert stage.at_work() == [("a",)]
        assert await stage.supervisor.drain(0.05) == ["run of a"]
        assert await stage.supervisor.cancel(10.0) == []
        assert slow.cancelled
        assert remembered(tmp_path, "b").last is not None
        assert not (tmp_path / "state/policies/a.json").exists(), "it has not failed"
        assert stage.alarms == [] and stage.incidents == []


async def test_the_loop_rests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with something that has been due for long and may not begin, and at the end."""
    monkeypatch.setattr(module, "TICK_SECONDS", 0.05)
    looks = 0

    class Counting(FakeClock):
        def minute(self) -> int:
            nonlocal looks
            looks += 1
            return super().minute()

    limits = AgentLimits(transfers=1)
    async with staged(config(tmp_path, limits=limits, a=policy("a"), b=policy("b")), Counting()) as stage:
        await stage.pass_time(1000.0)
        for _ in range(2):
            looks = 0
            await asyncio.sleep(0.5)
            assert 0 < looks <= 2 * 11 + 2
            stage.agent.end()


# --- metrics ----------------------------------------------------------------------------------------------------------


async def test_what_is_counted(tmp_path: Path) -> None:
    async with staged(config(tmp_path, a=policy("a"))) as stage:

        def value(name: str, **labels: str) -> float | None:
            return stage.registry.get_sample_value(f"blockferry_{name}", {"policy": "a", **labels})

        await stage.fail("a", error=broken(Code.UNAVAILABLE))
        assert value("errors_total", code="unavailable") == 1
        assert value("last_run_failed") == 1
        assert value("policy_failures") == 1
        await stage.pass_time(2.0)
        await stage.begun("a")
        stage.clock.time += 8.0
        await stage.commit("a")
        for decision, count in {"skip": 1, "unmap": 0, "send": 1, "compare": 1}.items():
            assert value("regions_total", decision=decision) == count
            assert value("decided_bytes_total", decision=decision) == count * MIB
        assert value("bytes_total", what="data_sent") == 4096
        assert value("bytes_total", what="wire_received") == 300
        assert value("avoided_bytes_total") == 3 * MIB - 4096
        assert value("phase_seconds_total", phase="transfer") == 1.0
        assert value("phase_seconds_total", phase="total") is None
        assert value("runs_begun_total") == 2
        assert value("runs_committed_total") == 1
        assert value("run_seconds_sum") == 8.0
        assert value("run_seconds_bucket", le="10.0") == 1
        assert value("run_seconds_bucket", le="5.0") == 0
        assert value("full_compares_total") == 0
        assert value("last_run_failed") == 0
        assert value("policy_lag_seconds") == 8.0
        assert value("policy_rpo_seconds") == 100.0
        assert value("policy_rpo_missed") == 0
        assert value("policy_generation") == 2
        assert value("policy_state", state="waiting") == 1
        assert value("policy_state", state="running") == 0
        await stage.pass_time(82.0)
        await stage.commit("a", full_compare="the base is gone")
        assert value("full_compares_total") == 1
        shown = policy_message(stage.agent, stage.agent.policies["a"])
        assert shown.last_committed.full_compare == "the base is gone"
