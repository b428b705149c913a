"""What a sync did or would do, as data: progress while it runs, and the report of schema 1."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from blockferry.client.forecast import Forecast
from blockferry.client.plan import Plan
from blockferry.common.rpc import Connection
from blockferry.v1 import replication_pb2 as pb

SCHEMA = 1


@dataclass
class Phase:
    """One phase of long work. Counters only rise; whoever shows them looks whenever it likes."""

    name: str
    total: int = 0
    done: int = 0
    over: bool = False
    note: Callable[[], str] = str
    """What people should know about it now; empty for nothing."""


@dataclass
class Progress:
    """The phase at work now, and all before it."""

    phases: list[Phase] = field(default_factory=list)

    def start(self, name: str, total: int = 0) -> Phase:
        """Begin the next phase; the one before counts as complete."""
        self.finish()
        self.phases.append(Phase(name, total))
        return self.phases[-1]

    def finish(self) -> None:
        """The phase at work is complete."""
        if self.phases:
            self.phases[-1].done = self.phases[-1].total
            self.phases[-1].over = True


@dataclass
class Tally:
    """Counts of one run. Bytes; `data_sent` is payload, `unmapped` bytes newly zeroed."""

    zero: int = 0
    equal: int = 0
    changed: int = 0
    source_read: int = 0
    destination_read: int = 0
    destination_written: int = 0
    data_sent: int = 0
    unmapped: int = 0


class Stopwatch:
    """Seconds per phase, by name."""

    def __init__(self) -> None:
        self._began = self._last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """Give the time since the last lap to `name`."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now

    def report(self, *names: str) -> dict[str, float]:
        """The `seconds` object of reports."""
        total = time.perf_counter() - self._began
        return {"total": round(total, 3), **{name: round(self.seconds.get(name, 0.0), 3) for name in names}}


def plan_report(source: str, destination: str, plan: Plan, forecast: Forecast | None) -> dict[str, object]:
    """The report of `plan`. `data_sent_min` and `data_sent_max` bound the payload: between nothing and every allocated
    byte of the source. `forecast` is null where the server does not say what room it has."""
    return {
        "schema": SCHEMA,
        "source": source,
        "destination": destination,
        "outcome": "planned",
        "volume_size": plan.geometry.size,
        "region_size": plan.geometry.region_size,
        "source_map": plan.source_map.value,
        "destination_map": plan.destination_map.value,
        "regions": plan.counts(),
        "bytes": {
            "source_read": plan.bytes_to_read,
            "destination_read": plan.geometry.bytes_in(plan.compare),
            "unmapped_max": plan.geometry.bytes_in(plan.unmap),
            "data_sent_min": 0,
            "data_sent_max": plan.bytes_to_read,
        },
        "forecast": forecast.fields() if forecast is not None else None,
    }


def sync_report(
    source: str,
    destination: str,
    plan: Plan,
    tally: Tally,
    watch: Stopwatch,
    committed: pb.Committed,
    connection: Connection,
    warning: str,
    full_compare: str,
) -> dict[str, object]:
    """The report of `sync`; `warning` is null unless there is something people should know although all went well.
    `full_compare` says why all regions were looked at; null where `tracked` says how many were."""
    return {
        "schema": SCHEMA,
        "source": source,
        "destination": destination,
        "outcome": "committed",
        "generation": committed.generation,
        "commit_id": committed.commit_id.hex(),
        "volume_size": plan.geometry.size,
        "region_size": plan.geometry.region_size,
        "source_map": plan.source_map.value,
        "destination_map": plan.destination_map.value,
        "regions": plan.counts(),
        "results": {"zero": tally.zero, "equal": tally.equal, "changed": tally.changed},
        "bytes": {
            "source_read": tally.source_read,
            "destination_read": tally.destination_read,
            "destination_written": tally.destination_written,
            "data_sent": tally.data_sent,
            "wire_sent": connection.sent,
            "wire_received": connection.received,
            "unmapped": tally.unmapped,
        },
        "seconds": watch.report("map", "transfer", "commit"),
        "tracked": None
        if plan.tracked is None
        else {"regions": len(plan.tracked), "bytes_avoided": plan.bytes_avoided},
        "full_compare": full_compare or None,
        "warning": warning or None,
    }
