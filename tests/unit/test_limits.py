"""The accounts of clients: what is refused, what waits, and what others are left, in every order of events."""

from __future__ import annotations

import contextlib

import pytest
from blockferry.common.config import ClientLimits, LimitsConfig
from blockferry.common.errors import BlockferryError, Code
from blockferry.server.limits import FORGET_ABOVE, Bucket, Limits
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

CONFIG = LimitsConfig(
    calls=5, connections=4, sessions=3, calls_per_second=20, bytes_in_flight=100,
    per_client=ClientLimits(calls=3, connections=2, sessions=2, calls_per_second=10, bytes_in_flight=60),
)  # fmt: skip


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def limits() -> Limits:
    return Limits(CONFIG, Clock())


def calls(limits: Limits, stack: contextlib.ExitStack, *made: tuple[str, str]) -> None:
    for client, connection in made:
        stack.enter_context(limits.call(client, connection))


def refuses(limits: Limits, client: str, connection: str) -> str:
    with pytest.raises(BlockferryError) as caught, limits.call(client, connection):
        pass
    assert caught.value.code is Code.LIMITED and caught.value.next
    return caught.value.cause


# --- calls ------------------------------------------------------------------------------------------------------------


def test_a_client_has_no_more_calls_than_it_may(limits: Limits) -> None:
    with contextlib.ExitStack() as stack:
        calls(limits, stack, *[("a", "1")] * 3)
        assert refuses(limits, "a", "1") == "a has that many in progress; limits.per_client.calls is 3"
        calls(limits, stack, *[("b", "2")] * 2)
        assert refuses(limits, "b", "2") == "all clients together have that many in progress; limits.calls is 5"
    calls(limits, contextlib.ExitStack(), *[("b", "2")] * 3)


def test_a_client_has_calls_on_no_more_connections_than_it_may(limits: Limits) -> None:
    with contextlib.ExitStack() as stack:
        calls(limits, stack, ("a", "1"), ("a", "2"))
        assert refuses(limits, "a", "3") == "a has calls on that many; limits.per_client.connections is 2"
        calls(limits, stack, ("a", "2"), ("b", "3"), ("b", "4"))
        assert refuses(limits, "c", "5") == "all clients together have that many in progress; limits.calls is 5"
    with contextlib.ExitStack() as stack:
        calls(limits, stack, ("a", "1"), ("a", "2"), ("b", "3"), ("b", "4"))
        assert refuses(limits, "c", "5") == "all clients together have calls on that many; limits.connections is 4"
        calls(limits, stack, ("b", "4"))


def test_what_a_refused_call_took_is_given_back(limits: Limits) -> None:
    with contextlib.ExitStack() as stack:
        calls(limits, stack, *[("a", "1")] * 3, ("b", "2"), ("b", "2"))
        for _ in range(10):
            refuses(limits, "b", "2")
    with contextlib.ExitStack() as stack:
        calls(limits, stack, *[("b", "2")] * 3)


class Calls(RuleBasedStateMachine):
    """Calls begin and end in any order: none is refused that fits, and none is let in that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.limits = Limits(CONFIG, Clock())
        self.open: list[tuple[str, str, contextlib.ExitStack]] = []

    def _fits(self, client: str, connection: str) -> bool:
        own = [one for one in self.open if one[0] == client]
        for taken, bounds in ((own, CONFIG.per_client), (self.open, CONFIG)):
            connections = {one[1] for one in taken}
            if len(taken) >= bounds.calls or len(connections | {connection}) > bounds.connections:
                return False
        return True

    @rule(client=st.sampled_from("abc"), number=st.integers(1, 3))
    def begin(self, client: str, number: int) -> None:
        connection = f"{client}{number}"
        stack = contextlib.ExitStack()
        if self._fits(client, connection):
            stack.enter_context(self.limits.call(client, connection))
            self.open.append((client, connection, stack))
        else:
            with pytest.raises(BlockferryError):
                stack.enter_context(self.limits.call(client, connection))

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))[2].close()

    @invariant()
    def accounts_are_what_is_open(self) -> None:
        for client in "abc":
            assert self.limits.usage(client).calls == sum(one[0] == client for one in self.open)


TestCalls = Calls.TestCase


def test_clients_that_do_nothing_are_forgotten() -> None:
    clock = Clock()
    limits = Limits(CONFIG, clock)
    with limits.call("busy", "1") as (bucket, _):
        bucket.take()
        for number in range(3 * FORGET_ABOVE):
            with limits.call(f"client-{number}", "x"):
                clock.now += 1
        assert len(limits._clients) <= FORGET_ABOVE
        assert limits.usage("busy").calls == 1


# --- rates ------------------------------------------------------------------------------------------------------------


def test_a_second_s_worth_of_calls_begins_at_once_and_the_rest_in_turn() -> None:
    clock = Clock()
    bucket = Bucket(4, clock)
    full = [bucket.full]
    assert [bucket.take() for _ in range(6)] == [0.0, 0.0, 0.0, 0.0, 0.25, 0.5]
    full.append(bucket.full)
    clock.now += 0.5
    assert bucket.take() == 0.25
    clock.now += 100
    full.append(bucket.full)
    assert full == [True, False, True]
    assert [bucket.take() for _ in range(5)] == [0.0, 0.0, 0.0, 0.0, 0.25]


@given(st.integers(1, 1000), st.lists(st.floats(0, 3), min_size=1, max_size=60))
def test_never_more_calls_than_the_rate_and_a_second_s_burst(rate: int, pauses: list[float]) -> None:
    clock = Clock()
    bucket = Bucket(rate, clock)
    begun: list[float] = []
    for pause in pauses:
        clock.now += pause
        begun.append(clock.now + bucket.take())
    for first in range(len(begun)):
        for last in range(first, len(begun)):
            assert last - first + 1 <= rate * (begun[last] - begun[first] + 1) + 1e-6


def test_a_client_that_waits_for_its_own_rate_takes_nothing_from_all() -> None:
    limits = Limits(CONFIG, Clock())
    with contextlib.ExitStack() as stack:
        busy, everybody = stack.enter_context(limits.call("a", "1"))
        for _ in range(1000):
            busy.take()
        own, same = stack.enter_context(limits.call("b", "2"))
        assert same is everybody
        assert (own.take(), everybody.take()) == (0.0, 0.0)


# --- sessions ---------------------------------------------------------------------------------------------------------


def opens(limits: Limits, held: dict[str, str], client: str, volume: str) -> None:
    with limits.opening(client, volume, held) as opened:
        opened(f"session-of-{volume}")
    held[volume] = f"session-of-{volume}"


def test_a_client_has_no_more_sessions_than_it_may(limits: Limits) -> None:
    held: dict[str, str] = {}
    opens(limits, held, "a", "v1")
    opens(limits, held, "a", "v2")
    with pytest.raises(BlockferryError, match=r"a has that many open; limits\.per_client\.sessions is 2") as caught:
        opens(limits, held, "a", "v3")
    assert (caught.value.code, caught.value.volume) == (Code.LIMITED, "v3")
    opens(limits, held, "b", "v3")
    with pytest.raises(BlockferryError, match=r"all clients together have that many open; limits\.sessions is 3"):
        opens(limits, held, "b", "v4")
    # One that ended, or whose lease ran out, makes room; so does taking over one's own.
    opens(limits, held, "a", "v2")
    del held["v1"]
    opens(limits, held, "a", "v4")


def test_sessions_that_are_being_opened_count(limits: Limits) -> None:
    with contextlib.ExitStack() as stack:
        for client, volume in (("a", "v1"), ("a", "v2")):
            stack.enter_context(limits.opening(client, volume, {}))
        with pytest.raises(BlockferryError, match=r"limits\.per_client\.sessions"):
            stack.enter_context(limits.opening("a", "v3", {}))
        with limits.opening("a", "v2", {}):
            pass
        stack.enter_context(limits.opening("b", "v3", {}))
        with pytest.raises(BlockferryError, match="all clients together"):
            stack.enter_context(limits.opening("b", "v4", {}))
    for name in ("v1", "v2"):
        with contextlib.suppress(OSError), limits.opening("a", name, {}):
            raise OSError
    assert not limits._opening


# --- bytes ------------------------------------------------------------------------------------------------------------


async def test_a_client_takes_no_more_bytes_than_its_share(limits: Limits) -> None:
    import asyncio

    one, other = limits.bytes_in_flight("a"), limits.bytes_in_flight("b")
    assert limits.bytes_in_flight("a") is one
    assert (one.limit, other.limit) == (60, 60)
    await one.acquire(60)
    waiting = asyncio.create_task(one.acquire(10))
    await asyncio.sleep(0)
    assert not waiting.done()
    # A client that has all it may leaves the rest to others, though it waits for more.
    await asyncio.wait_for(other.acquire(40), 10)
    one.release(60)
    await asyncio.wait_for(waiting, 10)
    one.release(10)
    other.release(40)
    assert (limits.budget.used, one.used, other.used) == (0, 0, 0)
