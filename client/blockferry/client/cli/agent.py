"""The commands of agents: agent status, sync, pause, resume, plan and watch; status."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime

from blockferry.client.cli.main import Command
from blockferry.client.cli.render import Console, human_seconds, table
from blockferry.client.report import SCHEMA
from blockferry.common.address import Address
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.rpc import Connection
from blockferry.common.units import human_bytes
from blockferry.v1 import agent_pb2 as pb


@contextlib.asynccontextmanager
async def _agent(arguments: argparse.Namespace) -> AsyncIterator[Connection]:
    """A connection to the agent; where there is none, what to do about it."""
    connection = Connection(Address.parse(arguments.agent), insecure=arguments.insecure, tls=arguments.tls)
    try:
        yield connection
    except BlockferryError as error:
        # What the agent itself cannot reach it says in its own words.
        if error.code is Code.UNAVAILABLE and arguments.agent in error.what:
            error.next = "check that blockferry-agent runs there, or name its address with --agent"
            error.cause = error.cause.replace("server", "agent")
        raise
    finally:
        await connection.close()


# --- what is known of policies ------------------------------------------------------------------------------------


def _state(policy: pb.Policy) -> str:
    return pb.PolicyState.Name(policy.state).removeprefix("POLICY_STATE_").lower().replace("_", "-")


def _time(microseconds: int) -> str:
    """ISO 8601 in UTC."""
    return datetime.fromtimestamp(microseconds / 1e6, UTC).isoformat(timespec="seconds")


def fields(policy: pb.Policy) -> dict[str, object]:
    """A policy for `--json`. Seconds and bytes; `progress`, `last_committed` and `last_error` are null where there is
    none."""
    last, progress = policy.last_committed, policy.progress
    return {
        "policy": policy.name,
        "source": policy.source,
        "destination": policy.destination,
        "group": policy.group or None,
        "snapshot": policy.snapshot,
        "tracking": policy.tracking,
        "state": _state(policy),
        "rpo": policy.rpo_ms / 1000,
        "lag": policy.lag_ms / 1000,
        "rpo_missed": policy.rpo_missed,
        "due_in": policy.due_in_ms / 1000,
        "failures": policy.failures,
        "runs_begun": policy.runs_begun,
        "runs_ended": policy.runs_ended,
        "progress": {
            "began_at": _time(progress.began_at_us),
            "phase": progress.phase,
            "bytes_done": progress.bytes_done,
            "bytes_total": progress.bytes_total,
            "bytes_per_second": progress.bytes_per_second,
            "seconds_left": progress.left_ms / 1000 if progress.HasField("left_ms") else None,
            "note": progress.note or None,
        }
        if policy.HasField("progress")
        else None,
        "last_committed": {
            "began_at": _time(last.began_at_us),
            "seconds": last.took_ms / 1000,
            "generation": last.generation,
            "commit_id": last.commit_id.hex(),
            "volume_size": last.volume_size,
            "data_sent": last.data_sent,
            "wire_sent": last.wire_sent,
            "source_read": last.source_read,
            "unmapped": last.unmapped,
            "changed_per_second": last.changed_per_second,
            "full_compare": last.full_compare or None,
        }
        if policy.HasField("last_committed")
        else None,
        "last_error": _error_fields(policy.last_error) if policy.HasField("last_error") else None,
    }


def _error_fields(error: pb.PolicyError) -> dict[str, object]:
    return {
        "at": _time(error.at_us),
        "code": error.code,
        "message": error.message,
        "volume": error.volume or None,
        "offset": error.offset if error.HasField("offset") else None,
        "length": error.length if error.HasField("length") else None,
        "cause": error.cause or None,
        "next": error.next or None,
    }


def _doing(policy: pb.Policy) -> str:
    """What it is at, or when it begins next."""
    progress = policy.progress
    if not policy.HasField("progress"):
        return f"due in {human_seconds(policy.due_in_ms / 1000)}" if policy.due_in_ms else ""
    words = progress.phase
    if progress.bytes_total:
        words += f" {human_bytes(progress.bytes_done)} of {human_bytes(progress.bytes_total)}"
        words += f", {human_bytes(progress.bytes_per_second)}/s"
        if progress.HasField("left_ms"):
            words += f", {human_seconds(progress.left_ms / 1000)} left"
    return words + (f", {progress.note}" if progress.note else "")


def _lag(policy: pb.Policy) -> str:
    words = f"{human_seconds(policy.lag_ms / 1000)} of {human_seconds(policy.rpo_ms / 1000)}"
    return f"{words} MISSED" if policy.rpo_missed else words


def overview(policies: Iterable[pb.Policy]) -> list[str]:
    """A line for each policy, then what is wrong with some."""
    rows = [("POLICY", "STATE", "LAG OF RPO", "GENERATION", "CHANGES", "")]
    notes = []
    for policy in policies:
        last = policy.last_committed
        changes = f"{human_bytes(last.changed_per_second)}/s" if last.changed_per_second else "-"
        generation = str(last.generation or "-")
        rows.append((policy.name, _state(policy), _lag(policy), generation, changes, _doing(policy)))
        if policy.HasField("last_error"):
            times = f"{policy.failures} times" if policy.failures > 1 else "once"
            notes.append(f"{policy.name}: failed {times}: {policy.last_error.line}")
        if last.full_compare:
            notes.append(f"{policy.name}: everything was compared: {last.full_compare}")
    return [*table(rows), *notes] if len(rows) > 1 else ["the agent has no policies"]


def _details(policy: pb.Policy) -> list[str]:
    lines = [
        f"{policy.name}: {_state(policy)}",
        f"  source       {policy.source}",
        f"  destination  {policy.destination}" + (f", in group {policy.group}" if policy.group else ""),
        f"  lag          {_lag(policy)}",
        f"  snapshots    by {policy.snapshot}, changes by {policy.tracking}",
        f"  now          {_doing(policy) or 'nothing'}",
    ]
    if policy.HasField("last_committed"):
        last = policy.last_committed
        lines += [
            f"  generation   {last.generation}, begun {_time(last.began_at_us)}, "
            f"took {human_seconds(last.took_ms / 1000)}",
            f"  sent         {human_bytes(last.data_sent)} of {human_bytes(last.volume_size)}; "
            f"changes {human_bytes(last.changed_per_second)}/s",
            f"  compared     {f'everything: {last.full_compare}' if last.full_compare else 'what had changed'}",
        ]
    if policy.HasField("last_error"):
        lines.append(f"  FAILED       {policy.failures} in a row, {_time(policy.last_error.at_us)}")
        lines.append(f"               {policy.last_error.line}")
    return lines


# --- the commands -------------------------------------------------------------------------------------------------


async def _policies(arguments: argparse.Namespace) -> list[pb.Policy]:
    async with _agent(arguments) as connection:
        if arguments.policy:
            request = pb.GetPolicyRequest(policy=arguments.policy)
            return [(await connection.call("Agent/GetPolicy", request, pb.GetPolicyResponse)).policy]
        response = await connection.call("Agent/ListPolicies", pb.ListPoliciesRequest(), pb.ListPoliciesResponse)
        return list(response.policies)


async def _status(arguments: argparse.Namespace, console: Console) -> int:
    if getattr(arguments, "watch", False):
        return await _watch(arguments, console)
    found = await _policies(arguments)
    report = {"schema": SCHEMA, "policies": [fields(policy) for policy in found]}
    console.result(report, _details(found[0]) if arguments.policy else overview(found))
    return 0


async def _watch(arguments: argparse.Namespace, console: Console) -> int:
    """Show policies whenever they change, until interrupted; with `--json` an object for each change."""
    shown: dict[str, tuple[pb.Policy, float]] = {}
    async with _agent(arguments) as connection:
        request = pb.WatchPoliciesRequest(policy=arguments.policy or "")
        with _screen(console) as show:
            ticking = asyncio.create_task(_tick(shown, show), name="clock") if _live(console) else None
            try:
                async for message in connection.stream("Agent/WatchPolicies", request, pb.WatchPoliciesResponse):
                    if message.complete:
                        shown.clear()
                    shown.update({policy.name: (policy, time.monotonic()) for policy in message.policies})
                    if console.json:
                        changed = [fields(policy) for policy in message.policies]
                        console.result({"schema": SCHEMA, "policies": changed, "complete": message.complete}, [])
                    else:
                        show(overview(aged(*one) for one in shown.values()))
            finally:
                if ticking is not None:
                    ticking.cancel()
    return 0


async def _tick(shown: Mapping[str, tuple[pb.Policy, float]], show: Callable[[list[str]], None]) -> None:
    """Time passes although nothing changes."""
    while True:
        await asyncio.sleep(1.0)
        show(overview(aged(*one) for one in shown.values()))


def aged(policy: pb.Policy, since: float) -> pb.Policy:
    """What was told at `since`, on the monotonic clock, as it is now."""
    passed = round((time.monotonic() - since) * 1000)
    now = pb.Policy()
    now.CopyFrom(policy)
    now.lag_ms += passed
    now.due_in_ms = max(0, now.due_in_ms - passed)
    return now


def _live(console: Console) -> bool:
    """Whether what is shown takes the place of what was."""
    return not console.json and sys.stdout.isatty()


@contextlib.contextmanager
def _screen(console: Console) -> Iterator[Callable[[list[str]], None]]:
    """Where lines take the place of those before; without a terminal they follow them."""
    if not _live(console):
        yield lambda lines: console.result({}, lines)
        return
    from rich.live import Live
    from rich.text import Text

    with Live(auto_refresh=False) as live:
        yield lambda lines: live.update(Text("\n".join(lines)), refresh=True)


async def _sync(arguments: argparse.Namespace, console: Console) -> int:
    async with _agent(arguments) as connection:
        request = pb.SyncPolicyRequest(policy=arguments.policy)
        response = await connection.call("Agent/SyncPolicy", request, pb.SyncPolicyResponse)
        policy = response.policy
        if arguments.wait:
            policy = await _until_ended(connection, arguments.policy, response.runs_before)
    if arguments.wait and policy.HasField("last_error"):
        raise _failure(policy)
    report = {"schema": SCHEMA, "policies": [fields(policy)]}
    asked = f"{policy.name} is replicated as soon as there is a transfer to be had"
    console.result(report, _details(policy) if arguments.wait else [asked])
    return 0


async def _until_ended(connection: Connection, name: str, before: int) -> pb.Policy:
    request = pb.WatchPoliciesRequest(policy=name)
    messages = connection.stream("Agent/WatchPolicies", request, pb.WatchPoliciesResponse)
    async with contextlib.aclosing(messages):
        async for message in messages:
            for policy in message.policies:
                if policy.runs_ended > before:
                    return policy
            if message.complete and not message.policies:
                break
    raise BlockferryError(
        Code.NOT_FOUND,
        f"there is no policy {name} any more",
        cause="the agent's configuration has changed meanwhile",
        next="look at it with blockferry agent status",
    )


def _failure(policy: pb.Policy) -> BlockferryError:
    """The error of its last run, as if it had happened here."""
    error = policy.last_error
    return BlockferryError(
        Code(error.code) if error.code in set(Code) else Code.INTERNAL,
        error.message,
        cause=error.cause,
        next=error.next,
        volume=error.volume or None,
        offset=error.offset if error.HasField("offset") else None,
        length=error.length if error.HasField("length") else None,
    )


async def _pause(arguments: argparse.Namespace, console: Console) -> int:
    async with _agent(arguments) as connection:
        request = pb.PausePolicyRequest(policy=arguments.policy)
        policy = (await connection.call("Agent/PausePolicy", request, pb.PausePolicyResponse)).policy
    still = "; what runs goes on to its end" if policy.state == pb.POLICY_STATE_RUNNING else ""
    console.result({"schema": SCHEMA, "policies": [fields(policy)]}, [f"{policy.name} is paused{still}"])
    return 0


async def _resume(arguments: argparse.Namespace, console: Console) -> int:
    async with _agent(arguments) as connection:
        request = pb.ResumePolicyRequest(policy=arguments.policy)
        policy = (await connection.call("Agent/ResumePolicy", request, pb.ResumePolicyResponse)).policy
    console.result({"schema": SCHEMA, "policies": [fields(policy)]}, [f"{policy.name} goes on"])
    return 0


async def _plan(arguments: argparse.Namespace, console: Console) -> int:
    async with _agent(arguments) as connection:
        request = pb.PlanPolicyRequest(policy=arguments.policy)
        found = await connection.call("Agent/PlanPolicy", request, pb.PlanPolicyResponse)
    regions = {name: getattr(found, name) for name in ("skip", "unmap", "send", "compare")}
    report = {
        "schema": SCHEMA,
        "policy": arguments.policy,
        "outcome": "planned",
        "volume_size": found.volume_size,
        "region_size": found.region_size,
        "source_map": found.source_map,
        "destination_map": found.destination_map,
        "regions": regions,
        "bytes": {
            "source_read": found.source_read,
            "destination_read": found.destination_read,
            "unmapped_max": found.unmapped_max,
            "data_sent_min": 0,
            "data_sent_max": found.data_sent_max,
        },
    }
    lines = [
        f"{arguments.policy}: without tracking, a replication now would",
        *(f"  {name:<8}{count:>10} regions of {human_bytes(found.region_size)}" for name, count in regions.items()),
        f"  and send between nothing and {human_bytes(found.data_sent_max)}",
    ]
    console.result(report, lines)
    return 0


COMMANDS: dict[str, Command] = {
    "status": _status,
    "agent_status": _status,
    "agent_watch": _watch,
    "agent_sync": _sync,
    "agent_pause": _pause,
    "agent_resume": _resume,
    "agent_plan": _plan,
}
