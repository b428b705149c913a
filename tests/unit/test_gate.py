"""The gate: whoever closes it is alone, and no cancellation anywhere leaves it stuck."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from blockferry.server.gate import Gate
from hypothesis import given
from hypothesis import strategies as st


async def settle() -> None:
    """Let every task that can run do so."""
    for _ in range(8):
        await asyncio.sleep(0)


class Visitors:
    """Tasks that pass or close a gate and stay until they are told to leave."""

    def __init__(self) -> None:
        self.gate = Gate()
        self.tasks: list[asyncio.Task[None]] = []
        self.leave: list[asyncio.Event] = []
        self.inside: set[int] = set()
        self.alone: set[int] = set()
        self.order: list[int] = []

    def come(self, *, closing: bool, fail: bool = False) -> int:
        number = len(self.tasks)
        self.leave.append(asyncio.Event())
        self.tasks.append(asyncio.create_task(self._visit(number, closing, fail)))
        return number

    async def _visit(self, number: int, closing: bool, fail: bool) -> None:
        group = self.alone if closing else self.inside
        async with self.gate.closed() if closing else self.gate.passing():
            group.add(number)
            self.order.append(number)
            self.check()
            try:
                await self.leave[number].wait()
                if fail:
                    raise RuntimeError("injected")
            finally:
                self.check()
                group.discard(number)

    def check(self) -> None:
        assert len(self.alone) <= 1
        assert not (self.alone and self.inside)

    async def end(self) -> list[BaseException | None]:
        for event in self.leave:
            event.set()
        async with asyncio.timeout(5):
            found = await asyncio.gather(*self.tasks, return_exceptions=True)
        return [one if isinstance(one, BaseException) else None for one in found]


async def usable(gate: Gate) -> bool:
    """Whether the gate can still be passed and closed."""
    async with asyncio.timeout(5):
        async with gate.passing():
            pass
        async with gate.closed():
            pass
        async with gate.passing():
            return True


async def test_many_pass_together() -> None:
    visitors = Visitors()
    for _ in range(5):
        visitors.come(closing=False)
    await settle()
    assert visitors.inside == {0, 1, 2, 3, 4}
    await visitors.end()


async def test_closing_waits_for_everybody_inside_and_keeps_newcomers_out() -> None:
    visitors = Visitors()
    visitors.come(closing=False)
    visitors.come(closing=False)
    await settle()
    closer = visitors.come(closing=True)
    await settle()
    newcomer = visitors.come(closing=False)
    await settle()
    assert (visitors.inside, visitors.alone) == ({0, 1}, set())
    visitors.leave[0].set()
    await settle()
    assert (visitors.inside, visitors.alone) == ({1}, set())
    visitors.leave[1].set()
    await settle()
    assert (visitors.inside, visitors.alone) == (set(), {closer})
    visitors.leave[closer].set()
    await settle()
    assert (visitors.inside, visitors.alone) == ({newcomer}, set())
    await visitors.end()
    assert visitors.order == [0, 1, closer, newcomer]


async def test_two_who_close_are_alone_one_after_the_other() -> None:
    visitors = Visitors()
    visitors.come(closing=True)
    visitors.come(closing=True)
    await settle()
    assert visitors.alone == {0}
    visitors.leave[0].set()
    await settle()
    assert visitors.alone == {1}
    await visitors.end()


@pytest.mark.parametrize("closing", [False, True])
async def test_a_failure_inside_leaves_the_gate_open(closing: bool) -> None:
    visitors = Visitors()
    visitors.come(closing=closing, fail=True)
    (failure,) = await visitors.end()
    assert isinstance(failure, RuntimeError)
    assert await usable(visitors.gate)


@pytest.mark.parametrize("victim", [0, 1, 2, 3])
async def test_a_cancelled_visitor_does_not_wedge_the_gate(victim: int) -> None:
    # 0 is inside, 1 waits for it to leave, 2 and 3 wait for 1.
    visitors = Visitors()
    for closing in (False, True, False, True):
        visitors.come(closing=closing)
        await settle()
    visitors.tasks[victim].cancel()
    await settle()
    visitors.leave[0].set()
    await settle()
    assert victim not in visitors.inside | visitors.alone
    ended = await visitors.end()
    assert [isinstance(one, asyncio.CancelledError) for one in ended] == [number == victim for number in range(4)]
    assert visitors.order == [number for number in range(4) if number != victim or number == 0]
    assert await usable(visitors.gate)


@given(st.lists(st.tuples(st.sampled_from(["pass", "close", "leave", "cancel"]), st.integers(0, 50)), max_size=25))
async def test_no_history_breaks_the_gate(history: list[tuple[str, int]]) -> None:
    visitors = Visitors()
    for action, value in history:
        if action in ("pass", "close"):
            visitors.come(closing=action == "close")
            if value % 2:
                await settle()
        elif visitors.tasks:
            chosen = value % len(visitors.tasks)
            if action == "leave":
                visitors.leave[chosen].set()
            else:
                visitors.tasks[chosen].cancel()
        visitors.check()
    await settle()
    visitors.check()
    for failure in await visitors.end():
        assert failure is None or isinstance(failure, asyncio.CancelledError), failure
    assert await usable(visitors.gate)


async def test_leaving_is_what_lets_a_closer_in_not_entering() -> None:
    gate = Gate()
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(gate.passing())
        for _ in range(3):
            async with gate.passing():
                pass
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01), gate.closed():
                pytest.fail("alone with somebody inside")
    assert await usable(gate)
