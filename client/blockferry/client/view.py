"""What an agent says of its policies, as messages."""

from __future__ import annotations

from blockferry.client.agent import Agent, Watched
from blockferry.client.memory import Failure, Outcome
from blockferry.client.schedule import State
from blockferry.v1 import agent_pb2 as pb

_STATES = {
    State.WAITING: pb.POLICY_STATE_WAITING,
    State.QUEUED: pb.POLICY_STATE_QUEUED,
    State.RUNNING: pb.POLICY_STATE_RUNNING,
    State.BACKING_OFF: pb.POLICY_STATE_BACKING_OFF,
    State.OUTSIDE_WINDOW: pb.POLICY_STATE_OUTSIDE_WINDOW,
    State.PAUSED: pb.POLICY_STATE_PAUSED,
}


def policy_message(agent: Agent, one: Watched) -> pb.Policy:
    """All about one policy, now."""
    standing = agent.standing(one.name)
    message = pb.Policy(
        name=one.name,
        source=_utf8(one.policy.source),
        destination=one.policy.destination,
        group=one.policy.group or "",
        rpo_ms=one.policy.rpo * 1000,
        state=_STATES[standing.state],
        lag_ms=round(standing.lag * 1000),
        rpo_missed=standing.missed,
        due_in_ms=round(standing.due_in * 1000),
        failures=standing.failures,
        runs_begun=one.runs_begun,
        runs_ended=one.runs_ended,
        snapshot=one.policy.snapshot,
        tracking=one.policy.tracks,
    )
    if one.memory.failure is not None:
        message.last_error.CopyFrom(_error(one.memory.failure))
    if one.memory.last is not None:
        message.last_committed.CopyFrom(_committed(one.memory.last))
    if standing.state is State.RUNNING and one.progress is not None:
        message.progress.CopyFrom(_progress(agent, one))
    return message


def _error(failure: Failure) -> pb.PolicyError:
    return pb.PolicyError(
        code=failure.code,
        message=failure.message,
        cause=failure.cause,
        next=failure.next,
        volume=failure.volume,
        offset=failure.offset,
        length=failure.length,
        line=failure.line,
        at_us=_us(failure.wall),
    )


def _committed(last: Outcome) -> pb.CommittedRun:
    return pb.CommittedRun(
        began_at_us=_us(last.wall),
        took_ms=round(last.seconds * 1000),
        generation=last.generation,
        commit_id=bytes.fromhex(last.commit_id),
        volume_size=last.volume_size,
        data_sent=last.data_sent,
        wire_sent=last.wire_sent,
        source_read=last.source_read,
        unmapped=last.unmapped,
        changed_per_second=round(last.data_sent / last.interval) if last.interval else 0,
        full_compare=_utf8(last.full),
    )


def _progress(agent: Agent, one: Watched) -> pb.RunProgress:
    phase, rate, left = one.pace(agent.clock.now())
    message = pb.RunProgress(began_at_us=_us(one.began_wall), bytes_per_second=round(rate))
    if phase is not None:
        message.phase = phase.name
        message.bytes_done, message.bytes_total = phase.done, phase.total
        message.note = _utf8(phase.note())
    if left is not None:
        message.left_ms = round(left * 1000)
    return message


def _us(seconds: float) -> int:
    return round(seconds * 1e6)


def _utf8(text: str) -> str:
    """Paths may hold bytes that are no UTF-8; protobuf strings may not."""
    return text.encode("utf-8", "backslashreplace").decode()
