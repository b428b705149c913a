"""What people see of policies."""

from __future__ import annotations

import time

from blockferry.client.cli.agent import aged, fields, overview
from blockferry.v1 import agent_pb2 as pb

RUNNING = pb.Policy(
    name="db",
    state=pb.POLICY_STATE_RUNNING,
    rpo_ms=300_000,
    lag_ms=301_000,
    rpo_missed=True,
    failures=2,
    progress=pb.RunProgress(
        phase="transfer", bytes_done=1 << 20, bytes_total=4 << 20, bytes_per_second=1 << 19, left_ms=6000,
        note="waiting for the destination for 5 s",
    ),
    last_committed=pb.CommittedRun(generation=7, changed_per_second=2048, full_compare="the base is gone"),
    last_error=pb.PolicyError(
        code="unavailable", message="cannot reach dr1", next="wait", line="cannot reach dr1; wait"
    ),
)  # fmt: skip
WAITING = pb.Policy(name="mail", state=pb.POLICY_STATE_OUTSIDE_WINDOW, rpo_ms=60_000, lag_ms=5000, due_in_ms=49_000)


def test_an_overview() -> None:
    assert overview([RUNNING, WAITING]) == [
        "POLICY  STATE           LAG OF RPO           GENERATION  CHANGES",
        "db      running         5:01 of 5:00 MISSED  7           2.0 KiB/s  transfer 1.0 MiB of 4.0 MiB, 512.0 KiB/s, "
        "0:06 left, waiting for the destination for 5 s",
        "mail    outside-window  0:05 of 1:00         -           -          due in 0:49",
        "db: failed 2 times: cannot reach dr1; wait",
        "db: everything was compared: the base is gone",
    ]
    assert overview([]) == ["the agent has no policies"]


def test_for_programs() -> None:
    found = fields(RUNNING)
    assert (found["state"], found["rpo"], found["lag"], found["rpo_missed"]) == ("running", 300.0, 301.0, True)
    assert found["last_error"] == {
        "at": "1970-01-01T00:00:00+00:00", "code": "unavailable", "message": "cannot reach dr1", "volume": None,
        "offset": None, "length": None, "cause": None, "next": "wait",
    }  # fmt: skip
    found = fields(WAITING)
    assert found["progress"] is found["last_committed"] is found["last_error"] is None
    assert (found["due_in"], found["group"]) == (49.0, None)


def test_time_passes() -> None:
    later = aged(WAITING, time.monotonic() - 10.0)
    assert 15_000 <= later.lag_ms < 16_000
    assert 38_000 < later.due_in_ms <= 39_000
    assert aged(WAITING, time.monotonic() - 100.0).due_in_ms == 0
    assert WAITING.lag_ms == 5000
