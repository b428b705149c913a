"""When which policy is replicated (pure).

Policies of a group form one unit, a policy without a group is one by itself. A unit is due a little before its RPO has
passed since the start of its last replication, so that waiting for a turn costs no RPO. Of the units that are due the
most urgent begin, as many as there may be transfers. One whose last run failed waits for its back-off, and all such
together take at most half of the transfers: whoever cannot reach a destination is in nobody else's way.

Times are seconds of a clock that never goes back. The wall clock counts for windows only, as minutes of the day.
Everything costs the logarithm of the number of policies, except `update`.
"""

from __future__ import annotations

import enum
import heapq
import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from blockferry.common.units import MINUTES_OF_A_DAY

LEAD_SHARE = 0.1
LEAD_SECONDS = 30.0
"""A unit is due by this share of its RPO, but not more than this many seconds, before the RPO has passed."""

BACKOFF_FIRST = 2.0
BACKOFF_LEAST = 10.0
BACKOFF_MOST = 300.0
"""Seconds: the back-off after a first failure, doubled after each more, up to the RPO, which counts as not less and not
more than these bounds. Half of it is left to chance, so that what failed together does not come back together."""

_ALWAYS = (0, MINUTES_OF_A_DAY)

Window = tuple[int, int]
"""Minutes of the day, as `units.parse_window` returns them."""


def is_open(window: Window, minute: int) -> bool:
    """Whether a minute of the day is in a window."""
    begin, end = window
    return begin <= minute < end if begin < end else minute >= begin or minute < end


class State(enum.Enum):
    """What a policy does. The value is for people."""

    WAITING = "waiting"
    """Not due."""
    QUEUED = "queued"
    """Due, and others are first."""
    RUNNING = "running"
    BACKING_OFF = "backing off"
    OUTSIDE_WINDOW = "outside its window"
    PAUSED = "paused"


@dataclass(frozen=True, slots=True)
class Terms:
    """What the schedule must know of a policy. `identity` says which pair of volumes it is about: with another one
    nothing is replicated yet."""

    identity: str
    rpo: float
    """Seconds, more than 0."""
    priority: int = 0
    window: Window = _ALWAYS
    group: str | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """A unit that has been begun. Give it back with `finished`."""

    members: tuple[str, ...]
    begun: float
    identities: tuple[str, ...]
    retry: bool


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a policy stands. Seconds."""

    state: State
    lag: float
    """Since the start of the newest replication that was committed; without any, since the policy is known."""
    missed: bool
    """Nothing was begun within the RPO, or what was begun takes longer than that."""
    due_in: float
    """Until it is due or its back-off is over; 0 if it is."""
    failures: int
    """One after the other, up to now."""


@dataclass(slots=True)
class _Entry:
    """What is remembered of a policy."""

    terms: Terms
    since: float
    committed: float | None = None
    begun: float | None = None
    running: float | None = None
    failures: int = 0
    not_before: float = 0.0
    paused: bool = False
    wanted: bool = False


@dataclass(slots=True, eq=False)
class _Unit:
    """Policies that begin together."""

    members: tuple[str, ...]
    entries: tuple[_Entry, ...]
    priority: int
    every: float
    """Seconds from a start to when it is due again."""
    windows: tuple[Window, ...]
    """Those that are not always open."""
    identities: tuple[str, ...]
    stamp: int = 0
    """Changes whenever what is in a heap no longer holds."""

    def due_at(self) -> float:
        """When it may begin, all but windows and transfers considered: when the first of its members is due, and no
        back-off lasts."""
        due, patience = math.inf, 0.0
        for entry in self.entries:
            due = min(due, entry.since if entry.begun is None else entry.begun + self.every)
            if entry.failures:
                patience = max(patience, entry.not_before)
        return patience or due


_Item = tuple[float, float, float, int, int, _Unit]


class Schedule:
    """Every method takes `now`; it counts as not earlier than any before."""

    def __init__(self, transfers: int, seed: int = 0) -> None:
        self._transfers = transfers
        self._random = random.Random(seed)
        self._entries: dict[str, _Entry] = {}
        self._unit_of: dict[str, _Unit] = {}
        self._timers: list[tuple[float, int, int, _Unit]] = []
        self._ready: list[_Item] = []
        self._retries: list[_Item] = []
        self._shut: list[tuple[int, _Unit]] = []
        self._minute = -1
        self._now = 0.0
        self._running: dict[int, Run] = {}
        self._retrying = 0
        self._ties = itertools.count()

    # --- what is to be done -----------------------------------------------------------------------------------------

    def update(self, policies: Mapping[str, Terms], now: float, transfers: int | None = None) -> None:
        """Take up other policies. What runs goes on, and counts for its policy if that is still the same."""
        now = self._at(now)
        self._transfers = transfers or self._transfers
        before, self._entries = self._entries, {}
        for name, terms in policies.items():
            entry = before.get(name)
            if entry is None or entry.terms.identity != terms.identity:
                paused = entry is not None and entry.paused
                entry = _Entry(terms, now, running=entry.running if entry else None, paused=paused)
            entry.terms = terms
            self._entries[name] = entry
        for run in self._running.values():
            for name in run.members:
                if name in self._entries:
                    self._entries[name].running = run.begun
        self._timers, self._ready, self._retries, self._shut, self._unit_of = [], [], [], [], {}
        for members in _units(policies):
            unit = self._unit(members)
            self._unit_of.update(dict.fromkeys(members, unit))
            self._arrange(unit)

    def restore(self, policy: str, committed: float | None, *, paused: bool = False) -> None:
        """What is known from before: the start of the newest replication that was committed."""
        entry = self._entries[policy]
        entry.committed = entry.begun = committed
        entry.since = entry.since if committed is None else min(entry.since, committed)
        entry.paused = paused
        self._arrange(self._unit_of[policy])

    def pause(self, policy: str) -> None:
        """Begin nothing more of it and its group; what runs goes on."""
        self._entries[policy].paused = True
        self._arrange(self._unit_of[policy])

    def resume(self, policy: str) -> None:
        """Go on, at once if it is due; failures are forgotten."""
        self._entries[policy].paused = False
        unit = self._unit_of[policy]
        for entry in unit.entries:
            entry.failures = 0
        self._arrange(unit)

    def request(self, policy: str) -> tuple[str, ...]:
        """Begin it, and its group, as soon as there is a transfer to be had, first of all and whatever the window; once
        more if it runs already. Returns who is paused and so keeps it from beginning: then nothing is asked for."""
        unit = self._unit_of[policy]
        paused = tuple(name for name in unit.members if self._entries[name].paused)
        if not paused:
            for entry in unit.entries:
                entry.wanted = True
            self._arrange(unit)
        return paused

    # --- what happens -----------------------------------------------------------------------------------------------

    def start(self, now: float, minute: int) -> list[Run]:
        """Who begins now, at this minute of the day. Each must be given back with `finished`."""
        now = self._at(now)
        if minute != self._minute:
            self._minute = minute
            shut, self._shut = self._shut, []
            for stamp, unit in shut:
                if stamp == unit.stamp:
                    self._queue(unit)
        timers = self._timers
        while timers and timers[0][0] <= now:
            _, _, stamp, unit = heapq.heappop(timers)
            if stamp == unit.stamp:
                self._queue(unit)
        runs = []
        while len(self._running) < self._transfers and (urgent := self._next()) is not None:
            runs.append(self._begin(urgent, now))
        return runs

    def finished(self, run: Run, now: float, *, committed: bool) -> None:
        """A run is over."""
        now = self._at(now)
        del self._running[id(run)]
        self._retrying -= run.retry
        units: dict[int, _Unit] = {}
        for name, identity in zip(run.members, run.identities, strict=True):
            entry = self._entries.get(name)
            if entry is None:
                continue
            entry.running = None
            unit = self._unit_of[name]
            units[id(unit)] = unit
            if entry.terms.identity != identity:
                continue
            if entry.begun is None:
                # It was gone for a while, and has come back.
                entry.begun = run.begun
            if committed:
                entry.committed = run.begun
                entry.failures = 0
            else:
                entry.failures += 1
        for unit in units.values():
            if not committed:
                self._back_off(unit, now)
            self._arrange(unit)

    def wake(self) -> float | None:
        """When something is due next, as far as that does not depend on runs that end or on the wall clock. None:
        nothing is."""
        return self._timers[0][0] if self._timers else None

    # --- what can be seen -------------------------------------------------------------------------------------------

    def standing(self, policy: str, now: float, minute: int) -> Standing:
        """Where a policy stands."""
        now = self._at(now)
        entry, unit = self._entries[policy], self._unit_of[policy]
        base = entry.since if entry.committed is None else entry.committed
        rpo = entry.terms.rpo
        late = now - base > rpo
        if entry.running is not None:
            # Begun in time, and not longer at work than until the next start; what runs may have begun before there was
            # anything to be late with.
            begun = max(entry.running, base)
            late = begun - base > rpo or now - begun > rpo
        due = unit.due_at()
        state = self._state(entry, unit, now, minute, due)
        return Standing(state, now - base, late, max(0.0, due - now), entry.failures)

    def _state(self, entry: _Entry, unit: _Unit, now: float, minute: int, due: float) -> State:
        if entry.running is not None:
            return State.RUNNING
        if any(one.paused for one in unit.entries):
            return State.PAUSED
        if any(one.wanted for one in unit.entries):
            return State.QUEUED
        if due > now:
            return State.BACKING_OFF if entry.failures else State.WAITING
        return State.QUEUED if all(is_open(window, minute) for window in unit.windows) else State.OUTSIDE_WINDOW

    @property
    def running(self) -> Sequence[Run]:
        """What has begun and not ended."""
        return list(self._running.values())

    # --- within -----------------------------------------------------------------------------------------------------

    def _at(self, now: float) -> float:
        self._now = max(self._now, now)
        return self._now

    def _unit(self, members: tuple[str, ...]) -> _Unit:
        entries = tuple(self._entries[name] for name in members)
        terms = [entry.terms for entry in entries]
        rpo = min(one.rpo for one in terms)
        return _Unit(
            members,
            entries,
            max(one.priority for one in terms),
            rpo - min(rpo * LEAD_SHARE, LEAD_SECONDS),
            tuple(one.window for one in terms if one.window != _ALWAYS),
            tuple(one.identity for one in terms),
        )

    def _arrange(self, unit: _Unit) -> None:
        """Put a unit where it belongs now; wherever it was, it is there no longer."""
        unit.stamp += 1
        wanted = False
        for entry in unit.entries:
            if entry.paused or entry.running is not None:
                return
            wanted = wanted or entry.wanted
        if wanted:
            self._queue(unit)
        else:
            heapq.heappush(self._timers, (unit.due_at(), next(self._ties), unit.stamp, unit))

    def _queue(self, unit: _Unit) -> None:
        """Line up a unit that is due."""
        wanted = failed = False
        for entry in unit.entries:
            wanted = wanted or entry.wanted
            failed = failed or entry.failures > 0
        item = (0.0 if wanted else 1.0, -unit.priority, unit.due_at(), next(self._ties), unit.stamp, unit)
        heapq.heappush(self._retries if failed else self._ready, item)

    def _next(self) -> _Unit | None:
        """The most urgent unit that may begin."""
        while True:
            heaps = [self._ready] if self._retrying >= max(1, self._transfers // 2) else [self._ready, self._retries]
            heaps = [heap for heap in heaps if heap]
            if not heaps:
                return None
            wanted, _, _, _, stamp, unit = heapq.heappop(min(heaps))
            if stamp != unit.stamp:
                continue
            if wanted and not all(is_open(window, self._minute) for window in unit.windows):
                self._shut.append((stamp, unit))
                continue
            return unit

    def _begin(self, unit: _Unit, now: float) -> Run:
        unit.stamp += 1
        retry = False
        for entry in unit.entries:
            retry = retry or entry.failures > 0
            entry.begun = entry.running = now
            entry.wanted = False
        run = Run(unit.members, now, unit.identities, retry)
        self._running[id(run)] = run
        self._retrying += retry
        return run

    def _back_off(self, unit: _Unit, now: float) -> None:
        """All members wait together, for the one that has failed most often."""
        failures = max(entry.failures for entry in unit.entries)
        if not failures:
            return
        rpo = min(entry.terms.rpo for entry in unit.entries)
        most = min(max(rpo, BACKOFF_LEAST), BACKOFF_MOST)
        # The exponent is bounded, or an outage of days would end in an OverflowError.
        pause = min(BACKOFF_FIRST * 2 ** min(failures - 1, 16), most)
        until = now + pause * self._random.uniform(0.5, 1.0)
        for entry in unit.entries:
            entry.not_before = until


def _units(policies: Mapping[str, Terms]) -> list[tuple[str, ...]]:
    """Groups, and policies without one, in the order of the file."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, terms in policies.items():
        key = ("policy", name) if terms.group is None else ("group", terms.group)
        found.setdefault(key, []).append(name)
    return [tuple(members) for members in found.values()]
