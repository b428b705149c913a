"""What clients may take of the server: counted for each of them, and for all together (pure).

    calls in progress, connections that carry them, sessions    more are refused with LIMITED
    calls per second                                            more wait for their turn
    bytes in flight                                             more wait (common/flow.py)

What waits is bounded by what is in progress. So nobody is refused for being fast, and one client that takes all it may
leaves to the others what all together may take above that.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from weakref import WeakValueDictionary

from blockferry.common.config import ClientLimits, LimitsConfig
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.flow import ByteBudget, Share

FORGET_ABOVE = 1024
"""Clients remembered though they do nothing: a few hundred KiB."""

BURST_SECONDS = 1.0
"""Of calls that were not made within this time as many may be made at once."""

Bounds = LimitsConfig | ClientLimits


class Bucket:
    """Lets `rate` calls a second begin on average, and at most a second's worth at once."""

    def __init__(self, rate: int, clock: Callable[[], float]) -> None:
        self._rate = rate
        self._clock = clock
        self._next = clock() - BURST_SECONDS
        """When the next call is due; further in the past for each that was not made."""

    def take(self) -> float:
        """Account for one call; the seconds until it may begin."""
        now = self._clock()
        due = max(self._next, now - BURST_SECONDS)
        self._next = due + 1 / self._rate
        return max(0.0, self._next - now)

    @property
    def full(self) -> bool:
        """Nothing was taken for so long that a new one is just like it."""
        return self._next <= self._clock() - BURST_SECONDS


class Usage:
    """What is taken, by one client or by all."""

    def __init__(self, bounds: Bounds, clock: Callable[[], float]) -> None:
        self.bounds = bounds
        self.bucket = Bucket(bounds.calls_per_second, clock)
        self.connections: Counter[str] = Counter()
        """Calls in progress by connection."""

    @property
    def calls(self) -> int:
        """Calls in progress."""
        return self.connections.total()

    @property
    def idle(self) -> bool:
        """There is nothing to remember."""
        return not self.connections and self.bucket.full


class Limits:
    """The accounts of all clients. `clock` gives monotonic seconds."""

    def __init__(self, config: LimitsConfig, clock: Callable[[], float]) -> None:
        self._config = config
        self._clock = clock
        self._all = Usage(config, clock)
        self._clients: dict[str, Usage] = {}
        self.budget = ByteBudget(config.bytes_in_flight)
        """Of the changes of all clients."""
        self._shares: WeakValueDictionary[str, Share] = WeakValueDictionary()
        self._opening: Counter[tuple[str, str]] = Counter()
        self._owners: dict[str, str] = {}

    def usage(self, client: str) -> Usage:
        """The account of a client."""
        found = self._clients.get(client)
        if found is None:
            if len(self._clients) >= FORGET_ABOVE:
                self._clients = {name: one for name, one in self._clients.items() if not one.idle}
            found = self._clients[client] = Usage(self._config.per_client, self._clock)
        return found

    @contextlib.contextmanager
    def call(self, client: str, connection: str) -> Iterator[tuple[Bucket, Bucket]]:
        """A call in progress, or LIMITED. What it gets are the buckets to take from, one after the other, before the
        call begins: what all may do is not taken from by a call that waits for what its client may."""
        own = self.usage(client)
        for usage, path, whose in (
            (own, "limits.per_client", f"{client} has"),
            (self._all, "limits", "all clients together have"),
        ):
            if usage.calls >= usage.bounds.calls:
                raise limited("more calls", f"{path}.calls", usage.bounds.calls, f"{whose} that many in progress")
            if connection not in usage.connections and len(usage.connections) >= usage.bounds.connections:
                most, cause = usage.bounds.connections, f"{whose} calls on that many"
                raise limited("calls on more connections", f"{path}.connections", most, cause)
        for usage in (own, self._all):
            usage.connections[connection] += 1
        try:
            yield own.bucket, self._all.bucket
        finally:
            for usage in (own, self._all):
                usage.connections[connection] -= 1
                usage.connections += Counter()

    def bytes_in_flight(self, client: str) -> Share:
        """What a client may have under way. All who ask for it while anybody has it get the same."""
        share = self._shares.get(client)
        if share is None:
            share = self._shares[client] = Share(self.budget, self._config.per_client.bytes_in_flight)
        return share

    @contextlib.contextmanager
    def opening(self, client: str, volume: str, held: Mapping[str, str]) -> Iterator[Callable[[str], None]]:
        """A session of `volume` that is being opened, or LIMITED; tell it the id of the session. `held`: the sessions
        whose lease runs, by volume. One of the same volume does not count: it is about to be replaced, or its owner
        keeps it."""
        self._owners = {session: owner for session, owner in self._owners.items() if session in held.values()}
        owners = [self._owners.get(session, "") for name, session in held.items() if name != volume]
        owners += [owner for (owner, name), count in self._opening.items() if name != volume for _ in range(count)]
        own, total = self._config.per_client.sessions, self._config.sessions
        if owners.count(client) >= own:
            raise limited("another session", "limits.per_client.sessions", own, f"{client} has that many open", volume)
        if len(owners) >= total:
            cause = "all clients together have that many open"
            raise limited("another session", "limits.sessions", total, cause, volume)
        self._opening[client, volume] += 1
        try:
            yield lambda session: self._owners.update({session: client})
        finally:
            self._opening[client, volume] -= 1
            self._opening += Counter()


def limited(what: str, key: str, most: int, cause: str, volume: str | None = None) -> BlockferryError:
    """What a client is told that has taken all it may."""
    return BlockferryError(
        Code.LIMITED,
        f"the server takes no {what} at the moment",
        cause=f"{cause}; {key} is {most}",
        next="run it again when less is under way, or raise the limit in the server's configuration",
        volume=volume,
        expected=f"at most {most}",
    )
