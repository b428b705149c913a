"""How far a rehydration is: as data, as messages and as a line (pure)."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from dataclasses import dataclass

from blockferry.common.units import human_bytes
from blockferry.v1 import rehydration_pb2 as pb

SOCKET = "rehydration.sock"
"""In --state: where a rehydration can be asked."""

RATE_SECONDS = 10.0
"""Over which the rate is taken."""


@dataclass(frozen=True)
class Counts:
    """Bytes of a volume; `data` and `data_left`: of what may hold data at the source, 0 while that is not known."""

    size: int
    hydrated: int
    data: int
    data_left: int

    @property
    def percent(self) -> float:
        """0 to 100."""
        if self.hydrated >= self.size:
            return 100.0
        share = 1 - self.data_left / self.data if self.data else self.hydrated / self.size
        # Holes may be left when all data is there.
        return min(100.0 * share, 99.9)


class Rate:
    """Bytes per second of what is left, over the last seconds."""

    def __init__(self) -> None:
        self._seen: collections.deque[tuple[float, int]] = collections.deque()

    def take(self, now: float, left: int) -> None:
        """So many bytes are left at this time, in seconds."""
        if self._seen and left > self._seen[-1][1]:
            # It was not known before.
            self._seen.clear()
        self._seen.append((now, left))
        while len(self._seen) > 2 and self._seen[1][0] <= now - RATE_SECONDS:
            self._seen.popleft()

    @property
    def per_second(self) -> float:
        """0 while nothing is known."""
        if len(self._seen) < 2:
            return 0.0
        (began, before), (now, left) = self._seen[0], self._seen[-1]
        return (before - left) / (now - began) if now > began else 0.0

    def seconds_left(self) -> float:
        """-1: unknown."""
        if not self._seen:
            return -1.0
        left = self._seen[-1][1]
        if left == 0:
            return 0.0
        return left / self.per_second if self.per_second > 0 else -1.0


def latency(seconds: Sequence[float], demands: int) -> pb.DemandLatency:
    """Of the last demands."""
    found = sorted(seconds)
    if not found:
        return pb.DemandLatency(demands=demands)
    return pb.DemandLatency(
        demands=demands,
        median_ms=1000 * found[len(found) // 2],
        p99_ms=1000 * found[min(len(found) * 99 // 100, len(found) - 1)],
        most_ms=1000 * found[-1],
    )


def line(status: pb.RehydrationStatus) -> str:
    """For people, in one line."""
    if status.state == pb.REHYDRATION_STATE_COMPLETE:
        return f"everything is hydrated, {human_bytes(status.fetched)} fetched"
    left = status.data_left if status.data else status.size - status.hydrated
    text = f"{status.percent:.1f} % hydrated, {human_bytes(left)} left, {human_bytes(max(status.rate, 0))}/s"
    if status.seconds_left >= 0:
        minutes, seconds = divmod(int(status.seconds_left + 0.5), 60)
        text += f", time left {minutes}:{seconds:02}"
    if status.demand.demands:
        text += f", on demand {status.demand.median_ms:.1f} ms"
    return text + (f"; {status.problem}" if status.problem else "")


def report(status: pb.RehydrationStatus) -> dict[str, object]:
    """For programs."""
    return {
        "primary": status.primary,
        "address": status.address,
        "snapshot_id": status.snapshot_id,
        "state": pb.RehydrationState.Name(status.state).removeprefix("REHYDRATION_STATE_").lower().replace("_", "-"),
        "problem": status.problem or None,
        "size": status.size,
        "hydrated": status.hydrated,
        "data": status.data,
        "data_left": status.data_left,
        "fetched": status.fetched,
        "percent": round(status.percent, 1),
        "rate": round(status.rate),
        "seconds_left": round(status.seconds_left, 1) if status.seconds_left >= 0 else None,
        "demand": {
            "demands": status.demand.demands,
            "median_ms": round(status.demand.median_ms, 3),
            "p99_ms": round(status.demand.p99_ms, 3),
            "most_ms": round(status.demand.most_ms, 3),
        },
        "sources": [
            {
                "uri": one.uri,
                "connected": one.connected,
                "problem": one.problem or None,
                "bytes_fetched": one.bytes_fetched,
            }
            for one in status.sources
        ],
    }
