"""What an agent counts, for Prometheus. docs/agent.md lists every metric."""

from __future__ import annotations

from collections.abc import Iterable

from blockferry.client.agent import Agent, Report, Watcher
from blockferry.client.schedule import State
from blockferry.common.errors import BlockferryError
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

SECONDS = (0.5, 1, 2, 5, 10, 30, 60, 300, 900, 3600, 4 * 3600, 24 * 3600)
"""Upper ends of the classes of durations."""


class Meters(Watcher):
    """Counts what becomes of runs. Everything is by policy."""

    def __init__(self, registry: CollectorRegistry) -> None:
        by = ["policy"]
        self._begun = Counter("blockferry_runs_begun", "Replications begun.", by, registry=registry)
        self._committed = Counter("blockferry_runs_committed", "Replications committed.", by, registry=registry)
        self._errors = Counter(
            "blockferry_errors", "Replications that failed, by the code of the error.", [*by, "code"], registry=registry
        )
        self._seconds = Histogram(
            "blockferry_run_seconds", "Durations of replications that were committed.", by, buckets=SECONDS,
            registry=registry,
        )  # fmt: skip
        self._phases = Counter(
            "blockferry_phase_seconds", "Seconds spent in each phase of them.", [*by, "phase"], registry=registry
        )
        self._regions = Counter(
            "blockferry_regions", "Regions, by what was decided about them.", [*by, "decision"], registry=registry
        )
        self._decided = Counter(
            "blockferry_decided_bytes", "Bytes of these regions; the last of a volume counts as a whole one.",
            [*by, "decision"], registry=registry,
        )  # fmt: skip
        self._bytes = Counter(
            "blockferry_bytes", "Bytes read, sent, written and unmapped, by what happened to them.", [*by, "what"],
            registry=registry,
        )  # fmt: skip
        self._avoided = Counter(
            "blockferry_avoided_bytes", "Bytes of volumes that did not have to be sent.", by, registry=registry
        )
        self._full = Counter(
            "blockferry_full_compares", "Replications for which it was not known what had changed.", by,
            registry=registry,
        )  # fmt: skip
        self._last_failed = Gauge(
            "blockferry_last_run_failed", "1 if the last replication failed, else 0.", by, registry=registry
        )

    def begun(self, name: str) -> None:
        self._begun.labels(name).inc()

    def committed(self, name: str, report: Report, seconds: float) -> None:
        self._committed.labels(name).inc()
        self._last_failed.labels(name).set(0)
        self._seconds.labels(name).observe(seconds)
        for phase, took in report.get("seconds", {}).items():
            if phase != "total":
                self._phases.labels(name, phase).inc(took)
        for decision, count in report.get("regions", {}).items():
            self._regions.labels(name, decision).inc(count)
            self._decided.labels(name, decision).inc(count * report.get("region_size", 0))
        for what, count in report.get("bytes", {}).items():
            self._bytes.labels(name, what).inc(count)
        sent = report.get("bytes", {}).get("data_sent", 0)
        self._avoided.labels(name).inc(max(0, report.get("volume_size", 0) - sent))
        # Made in any case, so that it can be seen to be 0.
        self._full.labels(name).inc(bool(report.get("full_compare")))

    def failed(self, name: str, error: BlockferryError, seconds: float) -> None:
        self._errors.labels(name, error.code.value).inc()
        self._last_failed.labels(name).set(1)


class Standings(Collector):
    """Where each policy stands, at the moment it is asked for."""

    def __init__(self, agent: Agent, registry: CollectorRegistry) -> None:
        self._agent = agent
        registry.register(self)

    def describe(self) -> Iterable[Metric]:
        """Nothing is collected to find out what there is."""
        return []

    def collect(self) -> Iterable[Metric]:
        def family(name: str, what: str, *labels: str) -> GaugeMetricFamily:
            return GaugeMetricFamily(f"blockferry_policy_{name}", what, labels=["policy", *labels])

        lag = family("lag_seconds", "Since the start of the newest replication that was committed.")
        rpo = family("rpo_seconds", "What is allowed from start to start.")
        missed = family("rpo_missed", "1 if the RPO is missed now, else 0.")
        failures = family("failures", "Replications that have failed since one was committed.")
        generation = family("generation", "Newest generation that was committed; 0 for none.")
        state = family("state", "1 for the state it is in, 0 for all others.", "state")
        for name, one in self._agent.policies.items():
            standing = self._agent.standing(name)
            lag.add_metric([name], standing.lag)
            rpo.add_metric([name], one.policy.rpo)
            missed.add_metric([name], standing.missed)
            failures.add_metric([name], standing.failures)
            generation.add_metric([name], one.memory.last.generation if one.memory.last else 0)
            for each in State:
                state.add_metric([name, each.value], standing.state is each)
        return [lag, rpo, missed, failures, generation, state]
