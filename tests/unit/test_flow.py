"""Budgets are never exceeded, waiters are served in order and none is forgotten, whoever is cancelled and when."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from blockferry.common.flow import AllOf, BufferPool, ByteBudget, RateLimiter, Share
from hypothesis import given
from hypothesis import strategies as st

LIMIT = 100


async def settle() -> None:
    """Let every task that can run do so."""
    for _ in range(5):
        await asyncio.sleep(0)


class Crowd:
    """Tasks that take from a budget and hold what they got until they are told to give it back."""

    def __init__(self, limit: int = LIMIT) -> None:
        self.budget = ByteBudget(limit)
        self.amounts: list[int] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.leave: list[asyncio.Event] = []
        self.granted: list[int] = []
        self.holding: set[int] = set()

    def want(self, amount: int) -> None:
        self.amounts.append(amount)
        self.leave.append(asyncio.Event())
        self.tasks.append(asyncio.create_task(self._take(len(self.tasks), amount)))

    async def _take(self, number: int, amount: int) -> None:
        await self.budget.acquire(amount)
        self.granted.append(number)
        self.holding.add(number)
        try:
            await self.leave[number].wait()
        finally:
            self.holding.discard(number)
            self.budget.release(amount)

    @property
    def waiting(self) -> list[int]:
        return [
            number
            for number, task in enumerate(self.tasks)
            if not task.done() and number not in self.holding and number not in self.granted
        ]

    def check(self) -> None:
        held = sum(self.amounts[number] for number in self.holding)
        assert self.budget.used == held <= self.budget.most
        assert held <= self.budget.limit or len(self.holding) == 1
        # In order: nobody has overtaken a waiter; and the first waiter waits only because it does not fit.
        assert self.granted == sorted(self.granted)
        if self.waiting:
            first = self.waiting[0]
            assert all(number < first for number in self.granted)
            assert held and held + self.amounts[first] > self.budget.limit

    async def disperse(self) -> None:
        for event in self.leave:
            event.set()
        await asyncio.gather(*self.tasks, return_exceptions=True)


actions = st.one_of(
    st.tuples(st.just("want"), st.integers(1, 130)),
    st.tuples(st.just("leave"), st.integers(0, 30)),
    st.tuples(st.just("cancel"), st.integers(0, 30)),
    st.tuples(st.just("settle"), st.just(0)),
)


@given(st.lists(actions, max_size=30))
async def test_no_history_of_waits_leaves_and_cancellations_breaks_the_budget(history: list[tuple[str, int]]) -> None:
    crowd = Crowd()
    for action, value in history:
        if action == "want":
            # Whoever was granted notes it before the newcomer can.
            await settle()
            crowd.want(value)
            await settle()
        elif action == "settle":
            await settle()
            crowd.check()
        elif crowd.tasks:
            value %= len(crowd.tasks)
            # Without settling in between, a grant and a cancellation of the same task can meet.
            if action == "leave":
                crowd.leave[value].set()
            else:
                crowd.tasks[value].cancel()
    await settle()
    crowd.check()
    await crowd.disperse()
    assert crowd.budget.used == 0
    async with asyncio.timeout(5):
        await crowd.budget.acquire(LIMIT)


async def test_an_oversized_request_is_granted_alone() -> None:
    crowd = Crowd()
    for amount in (10, 500, 10):
        crowd.want(amount)
    await settle()
    assert crowd.granted == [0]
    crowd.leave[0].set()
    await settle()
    assert crowd.granted == [0, 1] and crowd.budget.used == 500
    crowd.leave[1].set()
    await settle()
    assert crowd.granted == [0, 1, 2]
    assert crowd.budget.most == 500
    await crowd.disperse()


async def test_a_small_request_does_not_overtake_a_large_one() -> None:
    crowd = Crowd()
    for amount in (50, 80, 10):
        crowd.want(amount)
    await settle()
    assert crowd.granted == [0] and crowd.waiting == [1, 2]
    await crowd.disperse()
    assert crowd.granted == [0, 1, 2]


async def test_cancelling_a_waiter_lets_those_behind_it_go_at_once() -> None:
    crowd = Crowd()
    for amount in (50, 80, 30):
        crowd.want(amount)
    await settle()
    crowd.tasks[1].cancel()
    await settle()
    assert crowd.granted == [0, 2] and crowd.budget.used == 80
    await crowd.disperse()


async def test_cancelling_a_waiter_just_granted_gives_its_bytes_back() -> None:
    crowd = Crowd()
    for amount in (100, 100, 100):
        crowd.want(amount)
    await settle()
    # Granted by this release, and cancelled before its task has run.
    crowd.leave[0].set()
    await asyncio.sleep(0)
    assert crowd.granted == [0] and crowd.budget.used == 100
    crowd.tasks[1].cancel()
    await settle()
    assert crowd.granted == [0, 2] and crowd.budget.used == 100
    await crowd.disperse()
    assert crowd.budget.used == 0


# --- buffers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "limit", "most"), [(4096, 3 * 4096, 3), (4096, 4 * 4096 - 1, 3), (4096, 1, 1)])
async def test_no_more_buffers_than_the_limit_allows_and_always_one(size: int, limit: int, most: int) -> None:
    pool = BufferPool(size, limit)
    held = [await pool.acquire() for _ in range(most)]
    assert len({id(buffer) for buffer in held}) == most
    assert all(len(buffer) == size for buffer in held)
    waiting = asyncio.create_task(pool.acquire())
    await settle()
    assert not waiting.done()
    pool.release(held[0])
    assert await waiting is held[0]


async def test_buffers_are_reused_instead_of_made_anew() -> None:
    pool = BufferPool(4096, 10 * 4096)
    seen = set()
    kept = []
    for _ in range(20):
        buffer = await pool.acquire()
        kept.append(buffer)
        seen.add(id(buffer))
        pool.release(buffer)
    assert len(seen) == 1


async def test_a_cancelled_wait_for_a_buffer_loses_none() -> None:
    pool = BufferPool(4096, 4096)
    held = await pool.acquire()
    waiting = asyncio.create_task(pool.acquire())
    await settle()
    waiting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await waiting
    pool.release(held)
    async with asyncio.timeout(5):
        assert await pool.acquire() is held


# --- bandwidth --------------------------------------------------------------------------------------------------------


class Clock:
    """Time that passes only when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@given(
    st.integers(1, 10**9),
    st.lists(st.tuples(st.integers(1, 10**7), st.floats(0, 5)), min_size=1, max_size=20),
)
def test_the_rate_is_kept_over_every_stretch_of_time(rate: int, sends: list[tuple[int, float]]) -> None:
    clock = Clock()
    limiter = RateLimiter(rate, clock)
    moments: list[tuple[float, int]] = []
    for amount, pause in sends:
        clock.now += pause
        clock.now += limiter.delay(amount)
        moments.append((clock.now, amount))
    # From any send to any later one, no more than the rate and one burst: bytes count when they may be sent.
    for start in range(len(moments)):
        total = 0
        for at, amount in moments[start + 1 :]:
            total += amount
            allowed = rate * (at - moments[start][0] + RateLimiter.BURST_SECONDS)
            assert total <= allowed * (1 + 1e-9) + rate * 1e-6


def test_an_idle_limiter_saves_up_one_burst_and_no_more() -> None:
    clock = Clock()
    limiter = RateLimiter(1000, clock)
    clock.now += 3600
    assert limiter.delay(200) == 0.0
    assert limiter.delay(100) == pytest.approx(0.1)


def test_a_busy_limiter_queues_senders_behind_each_other() -> None:
    limiter = RateLimiter(1000, Clock())
    assert [limiter.delay(500) for _ in range(3)] == pytest.approx([0.5, 1.0, 1.5])


@pytest.mark.parametrize("rate", [0, -1])
async def test_no_rate_is_no_limit(rate: int) -> None:
    limiter = RateLimiter(rate, Clock())
    assert limiter.delay(10**15) == 0.0
    await limiter.acquire(10**15)


def test_a_rate_can_be_changed_while_at_work() -> None:
    clock = Clock()
    limiter = RateLimiter(1000, clock)
    clock.now += limiter.delay(1000)
    limiter.rate = 10_000
    assert limiter.delay(1000) == pytest.approx(0.1)
    limiter.rate = 0
    assert limiter.delay(1000) == 0.0


async def test_acquire_sleeps_for_the_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr("blockferry.common.flow.asyncio.sleep", sleep)
    limiter = RateLimiter(1000, Clock())
    await limiter.acquire(250)
    assert slept == pytest.approx([0.25])


# --- shares -----------------------------------------------------------------------------------------------------------


async def test_a_share_waits_for_itself_and_for_the_whole() -> None:
    whole = ByteBudget(10)
    one, other = Share(whole, 6), Share(whole, 60)
    assert (one.limit, other.limit) == (6, 10)
    await one.acquire(6)
    mine, theirs = asyncio.create_task(one.acquire(1)), asyncio.create_task(other.acquire(5))
    await asyncio.sleep(0)
    assert not mine.done() and not theirs.done()
    one.release(6)
    await asyncio.gather(mine, theirs)
    assert (whole.used, one.used, other.used) == (6, 1, 5)


async def test_whoever_gives_up_waiting_gives_its_share_back() -> None:
    whole = ByteBudget(10)
    one, other = Share(whole, 8), Share(whole, 8)
    await other.acquire(8)
    for waiting in (
        asyncio.create_task(one.acquire(8)),
        asyncio.create_task(one.acquire(2)),
        asyncio.create_task(one.acquire(8)),
    ):
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
    assert one.used == 2 and whole.used == 10
    one.release(2)
    other.release(8)
    assert (whole.used, one.used, other.used) == (0, 0, 0)
    await one.acquire(8)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 12), st.booleans()), max_size=40))
async def test_no_order_of_events_breaks_shares(history: list[tuple[int, int, bool]]) -> None:
    whole = ByteBudget(20)
    shares = [Share(whole, limit) for limit in (8, 12, 20)]
    tasks: list[tuple[int, int, asyncio.Task[None]]] = []
    for number, amount, give_up in history:
        task = asyncio.create_task(shares[number].acquire(amount))
        await asyncio.sleep(0)
        if give_up and tasks:
            owner, held, oldest = tasks.pop(0)
            if oldest.done():
                shares[owner].release(held)
            else:
                oldest.cancel()
                await asyncio.gather(oldest, return_exceptions=True)
        tasks.append((number, amount, task))
        await asyncio.sleep(0)
        for index, share in enumerate(shares):
            granted = [one for owner, one, task in tasks if owner == index and task.done()]
            assert sum(granted) <= share.limit or len(granted) == 1
    while tasks:
        await asyncio.sleep(0)
        ready = [one for one in tasks if one[2].done()]
        assert ready, "somebody waits though nobody holds anything"
        for one in ready:
            shares[one[0]].release(one[1])
            tasks.remove(one)
        for _ in range(5):
            await asyncio.sleep(0)
    assert whole.used == 0 and all(share.used == 0 for share in shares)


def test_what_is_sent_counts_for_each_of_several_limits() -> None:
    own, shared = RateLimiter(1000, Clock()), RateLimiter(4000, Clock())
    both, other = AllOf([own, shared]), AllOf([shared])
    assert (both.rate, other.rate, AllOf([]).rate, AllOf([RateLimiter(0)]).rate) == (1000, 4000, 0, 0)
    shared.rate = 500
    assert both.rate == 500


async def test_whoever_has_several_limits_waits_for_the_slowest(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr("blockferry.common.flow.asyncio.sleep", sleep)
    clock = Clock()
    fast, slow = RateLimiter(10_000, clock), RateLimiter(1000, clock)
    await AllOf([fast, slow]).acquire(1200)
    await AllOf([fast]).acquire(1000)
    await AllOf([RateLimiter(0, clock)]).acquire(1 << 30)
    assert slept == pytest.approx([1.2, 0.22])
