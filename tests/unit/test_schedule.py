"""When which policy begins: single rules, everything at once against the rules, and hours of many policies."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import pytest
from blockferry.client.schedule import (
    BACKOFF_FIRST,
    BACKOFF_LEAST,
    BACKOFF_MOST,
    LEAD_SECONDS,
    LEAD_SHARE,
    Run,
    Schedule,
    State,
    Terms,
    is_open,
)
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from bench.schedule import simulate

NOON = 12 * 60
NIGHT = (22 * 60, 6 * 60)


def terms(**said: Any) -> Terms:
    return Terms(**{"identity": "a -> b", "rpo": 100.0, **said})


def schedule(transfers: int = 4, /, **policies: Terms) -> Schedule:
    made = Schedule(transfers)
    made.update(policies, 0.0)
    return made


def begun(one: Schedule, now: float, minute: int = NOON) -> list[tuple[str, ...]]:
    return [run.members for run in one.start(now, minute)]


def run_at(one: Schedule, now: float, *, committed: bool = True, seconds: float = 1.0) -> Run:
    (run,) = one.start(now, NOON)
    one.finished(run, now + seconds, committed=committed)
    return run


# --- single rules -----------------------------------------------------------------------------------------------------


def test_from_start_to_start() -> None:
    one = schedule(p=terms())
    run_at(one, 0.0, seconds=80.0)
    assert one.wake() == 90.0
    assert begun(one, 89.9) == []
    assert begun(one, 90.0) == [("p",)]
    assert one.wake() is None


def test_the_lead_is_bounded() -> None:
    one = schedule(p=terms(rpo=86400.0))
    run_at(one, 0.0)
    assert one.wake() == 86400.0 - LEAD_SECONDS


def test_what_takes_longer_than_its_rpo_begins_again_at_once() -> None:
    one = schedule(p=terms())
    run_at(one, 0.0, seconds=500.0)
    assert begun(one, 500.0) == [("p",)]


def test_no_more_than_the_transfers_and_the_most_urgent_first() -> None:
    one = schedule(2, low=terms(), high=terms(priority=5), middle=terms(priority=1))
    first = one.start(0.0, NOON)
    assert [run.members for run in first] == [("high",), ("middle",)]
    assert begun(one, 50.0) == []
    one.finished(first[0], 60.0, committed=True)
    assert begun(one, 60.0) == [("low",)]


def test_with_equal_priorities_who_was_due_first() -> None:
    one = schedule(1, a=terms(), b=terms(rpo=50.0))
    for name in ("a", "b"):
        assert run_at(one, 0.0).members == (name,)
    # b is due at 45, a at 90; nobody looked until both were.
    assert begun(one, 200.0) == [("b",)]


def test_members_of_a_group_begin_together() -> None:
    one = schedule(1, a=terms(group="g"), b=terms(), c=terms(group="g", rpo=40.0))
    (run,) = one.start(0.0, NOON)
    assert run.members == ("a", "c")
    one.finished(run, 1.0, committed=True)
    assert begun(one, 1.0) == [("b",)]
    assert one.wake() == pytest.approx(36.0), "the shortest RPO counts for all"


def test_who_is_outside_of_a_window_waits_for_it() -> None:
    one = schedule(night=terms(window=NIGHT), g1=terms(group="g", window=NIGHT), g2=terms(group="g"))
    assert begun(one, 0.0) == []
    assert one.standing("night", 0.0, NOON).state is State.OUTSIDE_WINDOW
    assert begun(one, 1.0, 22 * 60) == [("night",), ("g1", "g2")]


@pytest.mark.parametrize(
    ("window", "inside", "outside"),
    [((60, 120), [60, 119], [59, 120]), (NIGHT, [1320, 1439, 0, 359], [360, 1319]), ((0, 1440), [0, 1439], [])],
)
def test_windows(window: tuple[int, int], inside: list[int], outside: list[int]) -> None:
    assert all(is_open(window, minute) for minute in inside)
    assert not any(is_open(window, minute) for minute in outside)


def test_a_window_that_closes_while_it_waits_for_its_turn() -> None:
    one = schedule(1, first=terms(priority=1), night=terms(window=NIGHT))
    (run,) = one.start(0.0, 0)
    assert run.members == ("first",)
    one.finished(run, 10.0, committed=True)
    assert begun(one, 10.0, 360) == []
    assert begun(one, 11.0, 1320) == [("night",)]


def test_back_off_doubles_up_to_the_rpo_and_half_of_it_is_chance() -> None:
    one = schedule(p=terms(rpo=60.0))
    now, pauses = 0.0, []
    for _ in range(30):
        run_at(one, now, committed=False, seconds=1.0)
        wake = one.wake()
        assert wake is not None
        pauses.append(wake - now - 1.0)
        assert one.standing("p", now + 1.0, NOON).state is State.BACKING_OFF
        now = wake
    for count, pause in enumerate(pauses):
        most = min(BACKOFF_FIRST * 2**count, 60.0)
        assert most / 2 <= pause <= most
    assert len(set(pauses[6:])) > 20
    run_at(one, now)
    assert one.standing("p", now + 1.0, NOON).failures == 0
    assert one.wake() == pytest.approx(now + 54.0)


@pytest.mark.parametrize(("rpo", "most"), [(1.0, BACKOFF_LEAST), (86400.0, BACKOFF_MOST)])
def test_bounds_of_the_back_off(rpo: float, most: float) -> None:
    one = schedule(p=terms(rpo=rpo))
    now = 0.0
    for _ in range(40):
        run_at(one, now, committed=False, seconds=0.0)
        wake = one.wake()
        assert wake is not None and wake <= now + most
        before, now = now, wake
    assert now - before >= most / 2


def test_the_same_seed_gives_the_same_times() -> None:
    def wakes(seed: int) -> list[float | None]:
        one = Schedule(1, seed)
        one.update({"p": terms()}, 0.0)
        found = []
        now = 0.0
        for _ in range(5):
            run_at(one, now, committed=False)
            found.append(one.wake())
            now = found[-1] or 0.0
        return found

    assert wakes(1) == wakes(1) != wakes(2)


def test_who_fails_takes_at_most_half_of_the_transfers() -> None:
    names = [f"dead{number}" for number in range(6)]
    one = schedule(4, **dict.fromkeys(names, terms(priority=1000)), p=terms())
    now = 0.0
    while failing := [run for run in one.start(now, NOON) if run.members != ("p",)]:
        for run in failing:
            one.finished(run, now + 1.0, committed=False)
    retries = one.start(50.0, NOON)
    assert len(retries) == 2 and all(run.retry for run in retries)
    assert begun(one, 200.0) == [], "p runs, and failed ones have their half"
    (healthy,) = (run for run in one.running if not run.retry)
    one.finished(healthy, 201.0, committed=True)
    assert begun(one, 300.0) == [("p",)], "in spite of its priority"


def test_one_transfer_is_enough_for_all() -> None:
    one = schedule(1, dead=terms(), p=terms())
    run_at(one, 0.0, committed=False)
    assert run_at(one, 1.0).members == ("p",)
    assert begun(one, 10.0) == [("dead",)]


def test_pause_and_resume() -> None:
    one = schedule(p=terms(), a=terms(group="g"), b=terms(group="g"))
    one.pause("p")
    one.pause("a")
    assert begun(one, 0.0) == []
    assert {one.standing(name, 0.0, NOON).state for name in ("p", "a", "b")} == {State.PAUSED}
    assert one.request("b") == ("a",)
    assert begun(one, 0.0) == []
    one.resume("p")
    assert begun(one, 1.0) == [("p",)]
    one.resume("a")
    assert begun(one, 2.0) == [("a", "b")]


def test_what_runs_while_it_is_paused_goes_on() -> None:
    one = schedule(p=terms())
    (run,) = one.start(0.0, NOON)
    one.pause("p")
    assert one.standing("p", 1.0, NOON).state is State.RUNNING
    one.finished(run, 1.0, committed=True)
    assert begun(one, 1000.0) == []
    one.resume("p")
    assert begun(one, 1000.0) == [("p",)]


def test_resume_forgets_failures() -> None:
    one = schedule(p=terms())
    run_at(one, 0.0, committed=False)
    one.pause("p")
    one.resume("p")
    assert one.standing("p", 1.0, NOON).failures == 0
    assert begun(one, 89.0) == []
    assert begun(one, 90.0) == [("p",)]


def test_sync_now() -> None:
    one = schedule(1, p=terms(window=NIGHT), q=terms(priority=1000))
    run_at(one, 0.0)
    assert one.request("p") == ()
    assert one.standing("p", 1.0, NOON).state is State.QUEUED
    (run,) = one.start(1000.0, NOON)
    assert run.members == ("p",), "before q, and outside its window"
    # What has begun may not have in it what was written since.
    assert one.request("p") == ()
    one.finished(run, 1001.0, committed=False)
    assert begun(one, 1001.0) == [("p",)], "once more, and without a back-off"


def test_a_missed_rpo_is_seen_at_once() -> None:
    one = schedule(1, p=terms())
    run_at(one, 10.0)
    assert not one.standing("p", 110.0, NOON).missed
    standing = one.standing("p", 110.1, NOON)
    assert standing.missed and standing.lag == pytest.approx(100.1)
    (run,) = one.start(120.0, NOON)
    assert one.standing("p", 120.0, NOON).missed, "it began too late"
    one.finished(run, 121.0, committed=True)
    standing = one.standing("p", 121.0, NOON)
    assert (standing.missed, standing.lag) == (False, 1.0)
    (run,) = one.start(210.0, NOON)
    assert not one.standing("p", 310.0, NOON).missed, "it began in time"
    assert one.standing("p", 310.1, NOON).missed, "and takes too long"


def test_without_any_replication_the_time_since_it_is_known_counts() -> None:
    one = Schedule(1)
    one.update({"p": terms()}, 50.0)
    assert not one.standing("p", 150.0, NOON).missed
    assert one.standing("p", 150.1, NOON).missed


def test_what_is_known_from_before() -> None:
    one = Schedule(4)
    one.update({"p": terms(), "q": terms(), "r": terms()}, 1000.0)
    one.restore("p", 950.0)
    one.restore("q", None, paused=True)
    assert begun(one, 1000.0) == [("r",)]
    assert one.standing("p", 1000.0, NOON).lag == 50.0
    assert begun(one, 1040.0) == [("p",)]


def test_other_policies_while_some_run() -> None:
    one = schedule(2, p=terms(), q=terms(), r=terms(priority=-1))
    runs = {run.members[0]: run for run in one.start(0.0, NOON)}
    one.update({"q": terms(identity="a -> c"), "r": terms(group="g"), "q2": terms(group="g")}, 5.0)
    assert begun(one, 6.0) == [], "what ran goes on, and counts"
    one.finished(runs["p"], 10.0, committed=True)
    assert begun(one, 10.0) == [("r", "q2")]
    one.finished(runs["q"], 11.0, committed=True)
    assert one.standing("q", 11.0, NOON).lag == 6.0, "another replica: nothing is there yet"
    assert begun(one, 11.0) == [("q",)]


def test_who_comes_back_with_the_same_volumes_has_lost_nothing() -> None:
    one = schedule(p=terms())
    run_at(one, 0.0)
    one.update({"p": terms(rpo=1000.0)}, 5.0)
    assert one.standing("p", 10.0, NOON).lag == 10.0
    assert one.wake() == pytest.approx(1000.0 - LEAD_SECONDS)


def test_a_clock_that_goes_back_stands_still() -> None:
    one = schedule(p=terms())
    run_at(one, 100.0)
    assert begun(one, 0.0) == []
    assert one.standing("p", 0.0, NOON).lag == 1.0


# --- everything at once -----------------------------------------------------------------------------------------------

NAMES = ["a", "b", "c", "d", "e", "f"]

_terms = st.builds(
    Terms,
    identity=st.sampled_from(["one", "two"]),
    rpo=st.sampled_from([1.0, 10.0, 60.0, 3600.0]),
    priority=st.integers(0, 2),
    window=st.sampled_from([(0, 1440), NIGHT, (540, 1020)]),
    group=st.sampled_from([None, None, "g", "h"]),
)


class Machine(RuleBasedStateMachine):
    """Whatever happens, in any order, the rules hold; the clock on the wall jumps as it likes."""

    @initialize(transfers=st.integers(1, 4), policies=st.dictionaries(st.sampled_from(NAMES), _terms, min_size=1))
    def begin(self, transfers: int, policies: dict[str, Terms]) -> None:
        self.now = 100.0
        self.minute = 0
        self.transfers = self.most = transfers
        self.schedule = Schedule(transfers)
        self.policies: Mapping[str, Terms] = policies
        self.schedule.update(policies, self.now)
        self.paused: set[str] = set()
        self.wanted: set[str] = set()
        self.last: dict[str, tuple[float, bool]] = {}
        """Of a policy with the same volumes since: when its last run began or failed, and whether it was committed."""

    def group(self, name: str) -> set[str]:
        wanted = self.policies[name].group
        return {name} | {one for one, terms in self.policies.items() if wanted is not None and terms.group == wanted}

    @rule(seconds=st.sampled_from([0.0, 0.1, 1.0, 9.0, 54.0, 400.0, 86400.0]), minute=st.integers(0, 1439))
    def wait(self, seconds: float, minute: int) -> None:
        self.now += seconds
        self.minute = minute

    @rule(policies=st.dictionaries(st.sampled_from(NAMES), _terms), transfers=st.integers(1, 4))
    def reload(self, policies: dict[str, Terms], transfers: int) -> None:
        kept = {
            name
            for name in self.policies.keys() & policies.keys()
            if self.policies[name].identity == policies[name].identity
        }
        self.last = {name: seen for name, seen in self.last.items() if name in kept}
        self.wanted &= kept
        self.paused &= self.policies.keys() & policies.keys()
        self.policies, self.transfers = policies, transfers
        self.schedule.update(policies, self.now, transfers)

    @rule(name=st.sampled_from(NAMES))
    def pause(self, name: str) -> None:
        if name in self.policies:
            self.schedule.pause(name)
            self.paused.add(name)

    @rule(name=st.sampled_from(NAMES))
    def resume(self, name: str) -> None:
        if name in self.policies:
            self.schedule.resume(name)
            self.paused.discard(name)
            for one in self.group(name):
                # Failures are forgotten; whether it is due is seen by what it says itself.
                self.last.pop(one, None)

    @rule(name=st.sampled_from(NAMES))
    def request(self, name: str) -> None:
        if name in self.policies:
            blocked = self.schedule.request(name)
            assert set(blocked) == self.paused & self.group(name)
            if not blocked:
                self.wanted |= self.group(name)

    @precondition(lambda self: self.schedule.running)
    @rule(choice=st.integers(0, 100), committed=st.booleans())
    def finish(self, choice: int, committed: bool) -> None:
        runs = self.schedule.running
        run = runs[choice % len(runs)]
        self.schedule.finished(run, self.now, committed=committed)
        for name, identity in zip(run.members, run.identities, strict=True):
            if name in self.policies and self.policies[name].identity == identity:
                self.last[name] = (run.begun if committed else self.now), committed

    @rule()
    def start(self) -> None:
        before = {name: self.schedule.standing(name, self.now, self.minute) for name in self.policies}
        busy = {name for run in self.schedule.running for name in run.members}
        asked = set(self.wanted)
        begun = self.schedule.start(self.now, self.minute)
        for run in begun:
            assert set(run.members) == self.group(run.members[0])
            assert not busy & set(run.members)
            assert not self.paused & set(run.members)
            assert all(before[name].state is State.QUEUED for name in run.members)
            assert run.retry == any(before[name].failures for name in run.members)
            if not self.wanted & set(run.members):
                self.check_unasked(run)
            self.wanted -= set(run.members)
        running = self.schedule.running
        if begun:
            assert len(running) <= self.transfers
        if retried := [run for run in begun if run.retry]:
            assert sum(run.retry for run in running) <= max(1, self.transfers // 2), retried
        self.check_nobody_is_left_out(len(running))
        self.check_order([run for run in begun if not asked & set(run.members)], before)

    def check_unasked(self, run: Run) -> None:
        every = min(self.policies[name].rpo for name in run.members)
        every -= min(every * LEAD_SHARE, LEAD_SECONDS)
        assert all(is_open(self.policies[name].window, self.minute) for name in run.members)
        seen = [self.last[name] for name in run.members if name in self.last]
        failed = [at for at, committed in seen if not committed]
        if failed:
            assert self.now >= max(failed) + BACKOFF_FIRST / 2
        elif len(seen) == len(run.members):
            assert self.now >= min(at for at, _ in seen) + every

    def check_nobody_is_left_out(self, running: int) -> None:
        """Whoever is due and has no failures waits only where all transfers are taken."""
        if running < self.transfers:
            for name in self.policies:
                standing = self.schedule.standing(name, self.now, self.minute)
                failures = any(self.schedule.standing(one, self.now, self.minute).failures for one in self.group(name))
                assert standing.state is not State.QUEUED or failures or self.busy(name), name

    def busy(self, name: str) -> bool:
        """A member that has joined the group runs still, alone or in another."""
        busy = {one for run in self.schedule.running for one in run.members}
        return bool(busy & self.group(name))

    def check_order(self, begun: list[Run], before: Mapping[str, Any]) -> None:
        """Nobody asked for any of these: of those without failures none waits that is more urgent than one of them."""
        for run in begun:
            priority = max(self.policies[name].priority for name in run.members)
            for name in self.policies:
                members = self.group(name)
                if before[name].state is not State.QUEUED or members & self.wanted or self.busy(name):
                    continue
                if not any(before[one].failures for one in members):
                    assert max(self.policies[one].priority for one in members) <= priority

    @invariant()
    def nobody_runs_twice(self) -> None:
        names = list(itertools.chain.from_iterable(run.members for run in self.schedule.running))
        assert len(names) == len(set(names))

    @invariant()
    def what_is_seen_is_so(self) -> None:
        running = {name for run in self.schedule.running for name in run.members}
        for name in self.policies:
            standing = self.schedule.standing(name, self.now, self.minute)
            assert (standing.state is State.RUNNING) == (name in running)
            assert standing.lag >= 0 and standing.due_in >= 0
            if standing.missed:
                assert standing.lag > self.policies[name].rpo


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


# --- many policies ----------------------------------------------------------------------------------------------------


def test_two_hours_of_two_hundred_policies() -> None:
    """Each takes from 0.2 to 1.4 s, and one of twenty cannot reach its destination, which takes it 20 s each time."""
    found = simulate(policies=200, rpo=60.0, transfers=8, seconds=7200.0, unreachable=10)
    assert found.cycles > 190 * 7200 / 60
    assert found.worst_interval <= 60.0
    assert found.missed == 0
    assert found.failures > 10 * 60
