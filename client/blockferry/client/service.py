"""The Agent service: watching and directing an agent; and what each of its calls needs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc.aio
from blockferry.client.agent import Agent, Watched
from blockferry.client.plan import Plan
from blockferry.client.view import policy_message
from blockferry.common.access import AccessControl, Need, Right
from blockferry.v1 import agent_pb2 as pb

Context = grpc.aio.ServicerContext[Any, Any]

WATCH_SECONDS = 1.0
"""Between two messages about a policy that runs."""

Planner = Callable[[Watched], Awaitable[Plan]]
"""What a sync of a policy would do now."""


def _policy(right: Right) -> Callable[[Any], Need]:
    return lambda request: (right, [request.policy])


NEEDS: dict[str, Callable[[Any], Need]] = {
    "Agent/ListPolicies": lambda _: (Right.LOOK, []),
    "Agent/GetPolicy": _policy(Right.LOOK),
    "Agent/SyncPolicy": _policy(Right.MANAGE),
    "Agent/PausePolicy": _policy(Right.MANAGE),
    "Agent/ResumePolicy": _policy(Right.MANAGE),
    # It reads the maps of both sites, which takes them some time.
    "Agent/PlanPolicy": _policy(Right.MANAGE),
    "Agent/WatchPolicies": lambda request: (Right.LOOK, [request.policy] if request.policy else []),
}
"""By `Service/Method`, on policies by their names."""


class AgentService:
    """Serves `blockferry.v1.Agent`."""

    def __init__(self, agent: Agent, access: AccessControl, plan: Planner) -> None:
        self._agent = agent
        self._access = access
        self._plan = plan
        self._planning = asyncio.Semaphore(1)

    async def ListPolicies(self, _: pb.ListPoliciesRequest, context: Context) -> pb.ListPoliciesResponse:
        return pb.ListPoliciesResponse(policies=self._listed(context))

    async def GetPolicy(self, request: pb.GetPolicyRequest, _: Context) -> pb.GetPolicyResponse:
        return pb.GetPolicyResponse(policy=self._described(request.policy))

    async def SyncPolicy(self, request: pb.SyncPolicyRequest, _: Context) -> pb.SyncPolicyResponse:
        before = self._agent.sync(request.policy)
        return pb.SyncPolicyResponse(policy=self._described(request.policy), runs_before=before)

    async def PausePolicy(self, request: pb.PausePolicyRequest, _: Context) -> pb.PausePolicyResponse:
        await self._agent.pause(request.policy)
        return pb.PausePolicyResponse(policy=self._described(request.policy))

    async def ResumePolicy(self, request: pb.ResumePolicyRequest, _: Context) -> pb.ResumePolicyResponse:
        await self._agent.resume(request.policy)
        return pb.ResumePolicyResponse(policy=self._described(request.policy))

    async def PlanPolicy(self, request: pb.PlanPolicyRequest, _: Context) -> pb.PlanPolicyResponse:
        one = self._agent.find(request.policy)
        # One after the other: the source host is production.
        async with self._planning:
            found = await self._plan(one)
        return pb.PlanPolicyResponse(
            volume_size=found.geometry.size,
            region_size=found.geometry.region_size,
            source_map=found.source_map.value,
            destination_map=found.destination_map.value,
            **found.counts(),
            source_read=found.bytes_to_read,
            destination_read=found.geometry.bytes_in(found.compare),
            unmapped_max=found.geometry.bytes_in(found.unmap),
            data_sent_max=found.bytes_to_read,
        )

    async def WatchPolicies(
        self, request: pb.WatchPoliciesRequest, context: Context
    ) -> AsyncIterator[pb.WatchPoliciesResponse]:
        if request.policy:
            self._agent.find(request.policy)
        sent: dict[str, bytes] | None = None
        with self._agent.watching() as changed:
            while True:
                changed.clear()
                shown = [one for one in self._listed(context) if request.policy in ("", one.name)]
                lasting = {one.name: _lasting(one) for one in shown}
                complete = sent is None or bool(sent.keys() - lasting.keys())
                known = {} if sent is None or complete else sent
                news = [
                    one
                    for one in shown
                    if one.state == pb.POLICY_STATE_RUNNING or known.get(one.name) != lasting[one.name]
                ]
                if news or complete:
                    yield pb.WatchPoliciesResponse(policies=news, complete=complete)
                sent = lasting
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(WATCH_SECONDS):
                        await changed.wait()

    def _listed(self, context: Context) -> list[pb.Policy]:
        agent = self._agent
        return [
            policy_message(agent, one) for one in agent.policies.values() if self._access.may_look(context, one.name)
        ]

    def _described(self, name: str) -> pb.Policy:
        return policy_message(self._agent, self._agent.find(name))


def _lasting(message: pb.Policy) -> bytes:
    """A policy without what changes all the time."""
    lasting = pb.Policy()
    lasting.CopyFrom(message)
    lasting.lag_ms = lasting.due_in_ms = 0
    lasting.ClearField("progress")
    return lasting.SerializeToString(deterministic=True)
