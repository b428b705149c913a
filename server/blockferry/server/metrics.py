"""What a server tells Prometheus: how its calls end, and what has become of each replica.

docs/metrics.md lists every metric. Counters of replicas begin at zero with the process, as Prometheus expects.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from blockferry.common.metrics import metrics_page, new_registry
from blockferry.common.rpc import Outcome
from blockferry.common.volumes import in_thread
from blockferry.server.pools import Pools
from blockferry.server.replica import Replica
from blockferry.server.room import Measured
from blockferry.server.scrub import ScrubRecord, last_scrub
from blockferry.server.session import State
from prometheus_client import Counter, Summary
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

MEASURE_SECONDS = 2.0
"""For asking the disks. What a disk that hangs would say is left out, and all else is told."""


@dataclass(frozen=True)
class _Shown:
    """A metric with a value for each replica; nothing where that is None."""

    name: str
    help: str
    value: Callable[[Replica], float | None]
    counts: bool = False


_REPLICA = "blockferry_replica_"

_SHOWN = (
    _Shown("generation", "Number of the newest committed generation.", lambda one: _newest(one, "number")),
    _Shown(
        "committed_timestamp_seconds",
        "When the newest generation was committed.",
        lambda one: (at := _newest(one, "committed_at_us")) and at / 1e6,
    ),
    _Shown("size_bytes", "Size of the newest generation.", lambda one: _newest(one, "size")),
    _Shown("points", "Recovery points.", lambda one: len(one.store.generations.points)),
    _Shown("sessions", "Sessions that were opened.", lambda one: one.tally.sessions, True),
    _Shown("commits", "Generations that sessions committed.", lambda one: one.tally.commits, True),
    _Shown("commit_seconds", "Time those took.", lambda one: one.tally.commit_seconds, True),
    _Shown("written_bytes", "Bytes that changes have written.", lambda one: one.tally.written, True),
    _Shown("unmapped_bytes", "Bytes of data that changes have unmapped.", lambda one: one.tally.unmapped, True),
    _Shown("digest_read_bytes", "Bytes read for digests.", lambda one: one.tally.read_for_digests, True),
    _Shown("change_read_bytes", "Bytes read to apply and check changes.", lambda one: one.tally.read_for_changes, True),
    _Shown(
        "digest_avoided_bytes",
        "Bytes that were not read because their digests were known.",
        lambda one: one.tally.digests_known,
        True,
    ),
)


def _newest(replica: Replica, field: str) -> float | None:
    newest = replica.store.generations.newest
    return None if newest is None else getattr(newest, field)


class Metrics:
    """The metrics of one process."""

    def __init__(self, pools: Pools) -> None:
        self._pools = pools
        self._room: dict[str, Measured] = {}
        self._scrubs: dict[str, ScrubRecord] = {}
        self._registry = new_registry()
        self.page = metrics_page(self._registry, self._look)
        self._calls = Counter(
            "blockferry_server_calls", "Calls that are over, by how they ended.", ["method", "code"],
            registry=self._registry,
        )  # fmt: skip
        self._seconds = Summary(
            "blockferry_server_call_seconds", "What they took.", ["method"], registry=self._registry
        )
        self._registry.register(_Replicas(self))

    @contextlib.contextmanager
    def call(self, method: str) -> Iterator[Outcome]:
        """Wraps every call (`rpc.Watch`)."""
        outcome, began = Outcome(), time.monotonic()
        try:
            yield outcome
        finally:
            self._calls.labels(method, outcome.code).inc()
            self._seconds.labels(method).observe(time.monotonic() - began)

    async def _look(self) -> None:
        """At the disks."""
        self._room, self._scrubs = {}, {}
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(MEASURE_SECONDS):
                for pool in self._pools:
                    with contextlib.suppress(OSError):
                        self._room[pool.name] = await pool.room.measure()
                for replica in self._pools.list():
                    scrub = await in_thread(last_scrub, replica.store)
                    if scrub is not None:
                        self._scrubs[replica.name] = scrub

    def families(self) -> Iterator[Metric]:
        """Of pools and replicas."""
        replicas = self._pools.list()
        for shown in _SHOWN:
            kind = CounterMetricFamily if shown.counts else GaugeMetricFamily
            family = kind(_REPLICA + shown.name, shown.help, labels=["pool", "volume"])
            for replica in replicas:
                value = shown.value(replica)
                if value is not None:
                    family.add_metric([replica.pool, replica.name], value)
            yield family
        yield self._states(replicas)
        yield self._scrubbed(replicas)
        yield from self._pools_families()

    def _states(self, replicas: list[Replica]) -> Metric:
        family = GaugeMetricFamily(_REPLICA + "state", "1 for the state it is in.", labels=["pool", "volume", "state"])
        for replica in replicas:
            for state in State:
                family.add_metric([replica.pool, replica.name, state.value], replica.state is state)
        return family

    def _scrubbed(self, replicas: list[Replica]) -> Metric:
        family = GaugeMetricFamily(
            _REPLICA + "scrub_timestamp_seconds",
            "When a newest generation was last re-read.",
            labels=["pool", "volume"],
        )
        for replica in replicas:
            if (scrub := self._scrubs.get(replica.name)) is not None:
                family.add_metric([replica.pool, replica.name], scrub.at_us / 1e6)
        return family

    def _pools_families(self) -> Iterator[Metric]:
        for field, text in (
            ("free", "Bytes that are free in its file system."),
            ("reserve", "Bytes that sessions leave free there."),
            ("total", "Size of its file system."),
        ):
            family = GaugeMetricFamily(f"blockferry_pool_{field}_bytes", text, labels=["pool"])
            for name, room in self._room.items():
                family.add_metric([name], getattr(room, field))
            yield family


class _Replicas(Collector):
    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        return self._metrics.families()
