"""Reports are schema 1 to the letter, their sums hold, and progress only moves forward."""

from __future__ import annotations

from typing import cast

import pytest
from blockferry.client.forecast import Forecast
from blockferry.client.plan import decide
from blockferry.client.report import Progress, Stopwatch, Tally, plan_report, sync_report
from blockferry.common.regions import AllocationMap, Geometry, Provenance
from blockferry.common.rpc import Connection
from blockferry.v1 import replication_pb2 as pb
from pyroaring import BitMap

REGION = 65536
GEOMETRY = Geometry(9 * REGION + 100, REGION)
PLAN = decide(
    AllocationMap(GEOMETRY, BitMap([0, 1, 2, 9]), Provenance.EXACT),
    AllocationMap(GEOMETRY, BitMap([2, 3, 9]), Provenance.CONSERVATIVE),
)


class Counted:
    """What a report wants of a connection."""

    sent = 111
    received = 222


def test_the_report_of_a_plan() -> None:
    forecast = Forecast(pool="main", free=10, reserve=3, needed_max=7, held=2, quota=8)
    assert plan_report("a.img", "grpc://h:1/v", PLAN, forecast) == {
        "schema": 1,
        "source": "a.img",
        "destination": "grpc://h:1/v",
        "outcome": "planned",
        "volume_size": 9 * REGION + 100,
        "region_size": REGION,
        "source_map": "exact",
        "destination_map": "conservative",
        "regions": {"skip": 5, "unmap": 1, "send": 2, "compare": 2},
        "bytes": {
            "source_read": 3 * REGION + 100,
            "destination_read": REGION + 100,
            "unmapped_max": REGION,
            "data_sent_min": 0,
            "data_sent_max": 3 * REGION + 100,
        },
        "forecast": {
            "pool": "main", "free": 10, "reserve": 3, "quota": 8, "held": 2, "needed_max": 7, "fits": False
        },
    }  # fmt: skip
    assert plan_report("a.img", "grpc://h:1/v", PLAN, None)["forecast"] is None


def test_the_report_of_a_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [10.0]
    monkeypatch.setattr("blockferry.client.report.time.perf_counter", lambda: now[0])
    watch = Stopwatch()
    for name, seconds in (("map", 0.5), ("transfer", 2.0), ("commit", 0.25), ("transfer", 1.0)):
        now[0] += seconds
        watch.lap(name)
    tally = Tally(
        zero=1, equal=1, changed=2, source_read=3, destination_read=4, destination_written=5, data_sent=6, unmapped=7
    )
    committed = pb.Committed(volume="v", generation=3, commit_id=bytes(range(16)))
    report = sync_report(
        "a.img",
        "grpc://h:1/v",
        PLAN,
        tally,
        watch,
        committed,
        cast(Connection, Counted()),
        "look out",
        "nothing is tracked",
    )
    assert report == {
        "schema": 1,
        "source": "a.img",
        "destination": "grpc://h:1/v",
        "outcome": "committed",
        "generation": 3,
        "commit_id": "000102030405060708090a0b0c0d0e0f",
        "volume_size": 9 * REGION + 100,
        "region_size": REGION,
        "source_map": "exact",
        "destination_map": "conservative",
        "regions": {"skip": 5, "unmap": 1, "send": 2, "compare": 2},
        "results": {"zero": 1, "equal": 1, "changed": 2},
        "bytes": {
            "source_read": 3,
            "destination_read": 4,
            "destination_written": 5,
            "data_sent": 6,
            "wire_sent": 111,
            "wire_received": 222,
            "unmapped": 7,
        },
        "seconds": {"total": 3.75, "map": 0.5, "transfer": 3.0, "commit": 0.25},
        "tracked": None,
        "full_compare": "nothing is tracked",
        "warning": "look out",
    }


def test_a_phase_that_never_ran_took_no_time() -> None:
    assert Stopwatch().report("map")["map"] == 0.0


def test_starting_a_phase_completes_the_one_before() -> None:
    progress = Progress()
    progress.finish()
    assert progress.phases == []
    first = progress.start("transfer", 100)
    first.done = 40
    second = progress.start("commit")
    assert (first.done, first.over) == (100, True)
    assert (second.name, second.done, second.total, second.over) == ("commit", 0, 0, False)
    progress.finish()
    assert [(phase.name, phase.over) for phase in progress.phases] == [("transfer", True), ("commit", True)]
