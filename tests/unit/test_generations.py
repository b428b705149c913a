"""The log of a replica: what each record means, alone and after others."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from blockferry.common import disk
from blockferry.common.durable import Log
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.retention import DEFAULT, Retention
from blockferry.server.generations import Generations, Point, Promotion
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.layers import quick_directory

IDS = [bytes([number]) * 16 for number in range(40)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """An empty log."""
    Log(tmp_path / "commits.log").close()
    return tmp_path / "commits.log"


@pytest.fixture
def log(path: Path) -> Iterator[Generations]:
    """What an empty log says."""
    opened = Generations(path)
    yield opened
    opened.close()


def told(log: Generations) -> tuple[object, ...]:
    """Everything that a log says."""
    return (
        log.points,
        log.newest,
        log.last_number,
        log.committed_size,
        log.adopted_size,
        log.promoted,
        log.keep,
        [log.committed(one) for one in IDS],
    )


def promoted(log: Generations) -> Promotion | None:
    return log.promoted


def reread(log: Generations) -> tuple[object, ...]:
    """Everything that a log says to a process that has just started."""
    other = Generations(log._log.path)
    try:
        return told(other)
    finally:
        other.close()


def commit(log: Generations, number: int, size: int = 10, *, demotes: bool = False) -> Point:
    point = log.next(IDS[number], size)
    log.commit(point, demotes=demotes)
    return point


def append(path: Path, *records: dict[str, object]) -> None:
    log = Log(path)
    for record in records:
        log.append(record)
    log.close()


def test_an_empty_log_says_nothing(log: Generations) -> None:
    assert told(log) == ([], None, 0, None, None, None, DEFAULT, [None] * len(IDS))


def test_a_log_that_is_missing_is_not_made_anew(tmp_path: Path) -> None:
    with pytest.raises(BlockferryError, match="it is missing") as caught:
        Generations(tmp_path / "commits.log")
    assert caught.value.code is Code.CORRUPT_STATE
    assert os.listdir(tmp_path) == []


def test_commits(log: Generations) -> None:
    assert log.next(IDS[7], 10).number == 1
    points = [commit(log, number, size) for number, size in ((1, 10), (2, 10), (3, 25))]
    assert [(point.number, point.commit_id, point.size) for point in points] == [
        (1, IDS[1], 10),
        (2, IDS[2], 10),
        (3, IDS[3], 25),
    ]
    assert points[0].committed_at_us > 1_700_000_000_000_000
    assert (log.points, log.newest, log.last_number, log.committed_size) == (points, points[2], 3, 25)
    assert [log.point(number) for number in range(5)] == [points[2], *points, None]
    assert log.was_committed(IDS[2].hex()) and not log.was_committed(IDS[4].hex())
    assert not log.was_committed("work") and not log.was_committed("")
    assert reread(log) == told(log)


def test_what_is_next_is_decided_by_commits_alone(log: Generations) -> None:
    first = log.next(IDS[1], 10)
    assert log.next(IDS[1], 10).number == first.number
    assert log.points == [] and log._log.records == []


def test_drops(log: Generations) -> None:
    points = [commit(log, number) for number in (1, 2, 3, 4)]
    log.drop(points[1])
    log.drop(points[0])
    assert log.points == points[2:]
    assert (log.point(1), log.point(2), log.newest, log.last_number) == (None, None, points[3], 4)
    assert [log.committed(IDS[number]) for number in (1, 2)] == points[:2]
    assert reread(log) == told(log)
    # Numbers are never given twice, even if everything is gone.
    log.drop(points[2])
    log.drop(points[3])
    assert (log.newest, log.next(IDS[5], 1).number, log.committed_size) == (None, 5, 10)
    assert reread(log) == told(log)


def test_rules_are_written_when_they_change(log: Generations) -> None:
    rules = [Retention(last=5), Retention(last=5), Retention(last=5, yearly=1), DEFAULT]
    for rule in rules:
        log.set_keep(rule)
        assert log.keep == rule
    assert [record["kind"] for record in log._log.records] == ["keep"] * 3
    assert reread(log) == told(log)


def test_an_adopted_image(log: Generations) -> None:
    log.adopt(12345)
    assert (log.adopted_size, log.committed_size, log.newest, log.last_number) == (12345, None, None, 0)
    assert reread(log) == told(log)
    commit(log, 1, 20000)
    assert (log.adopted_size, log.committed_size) == (12345, 20000)
    assert reread(log) == told(log)


def test_a_promotion_ends_with_the_commit_that_says_so(log: Generations) -> None:
    points = [commit(log, 1), commit(log, 2)]
    promotion = Promotion(1, IDS[9], 1_700_000_000_000_000)
    log.promote(promotion)
    assert (log.promoted, log.points) == (promotion, points)
    # What was handed out is no generation.
    assert log.committed(IDS[9]) is None
    assert reread(log) == told(log)
    log.drop(points[0])
    assert log.promoted == promotion
    commit(log, 3, demotes=False)
    assert log.promoted == promotion and reread(log) == told(log)
    commit(log, 4, demotes=True)
    assert promoted(log) is None and reread(log) == told(log)
    log.promote(promotion)
    assert promoted(log) == promotion and reread(log) == told(log)


def test_an_update_in_place_of_an_older_server_has_given_its_generation_up(path: Path) -> None:
    append(
        path,
        {"kind": "commit", "number": 1, "commit_id": IDS[1].hex(), "size": 10, "at_us": 5},
        {"kind": "overwrite", "number": 1},
    )
    log = Generations(path)
    assert (log.points, log.last_number, log.committed_size) == ([], 1, 10)
    assert log.committed(IDS[1]) == Point(1, IDS[1], 10, 5)
    second = commit(log, 2)
    assert (second.number, log.points) == (2, [second])
    log.close()


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"number": 1},
        {"kind": None},
        {"kind": "Commit", "number": 1, "commit_id": IDS[1].hex(), "size": 1, "at_us": 1},
        {"kind": "commit", "number": 1, "commit_id": IDS[1].hex(), "size": 1},
        {"kind": "commit", "number": 1.5, "commit_id": IDS[1].hex(), "size": 1, "at_us": 1},
        {"kind": "commit", "number": 1, "commit_id": IDS[1].hex()[:-1], "size": 1, "at_us": 1},
        {"kind": "drop", "number": "1"},
        {"kind": "keep"},
        {"kind": "keep", "rules": []},
        {"kind": "adopt", "size": None},
        {"kind": "promote", "number": 1, "commit_id": "", "at_us": "now"},
        {"kind": "demote"},
    ],
    ids=repr,
)
def test_a_record_that_means_nothing_is_damage_and_no_descriptor_is_left(path: Path, record: dict[str, object]) -> None:
    append(path, record)
    before = path.read_bytes(), set(os.listdir("/proc/self/fd"))
    with pytest.raises(BlockferryError, match="unknown record") as caught:
        Generations(path)
    assert caught.value.code is Code.CORRUPT_STATE
    assert (path.read_bytes(), set(os.listdir("/proc/self/fd"))) == before


def test_a_record_that_could_not_be_written_is_not_believed(log: Generations, monkeypatch: pytest.MonkeyPatch) -> None:
    point = commit(log, 1)
    before = told(log)

    def fail(fd: int, data: bytes) -> int:
        raise OSError(28, "injected")

    monkeypatch.setattr(disk, "append", fail)
    changes: list[Callable[[], None]] = [
        lambda: log.commit(log.next(IDS[2], 10), demotes=False),
        lambda: log.drop(point),
        lambda: log.set_keep(Retention(last=9)),
        lambda: log.adopt(1),
        lambda: log.promote(Promotion(1, IDS[3], 1)),
    ]
    for change in changes:
        with pytest.raises(OSError, match="injected"):
            change()
        assert told(log) == before
    monkeypatch.undo()
    assert reread(log) == before
    assert commit(log, 2).number == 2


actions = st.lists(
    st.tuples(st.sampled_from(["commit", "demote", "drop", "keep", "adopt", "promote"]), st.integers(0, 9))
)


@settings(max_examples=30)
@given(actions)
def test_whatever_happened_a_new_process_believes_the_same(history: list[tuple[str, int]]) -> None:
    with quick_directory() as directory:
        Log(directory / "commits.log").close()
        log = Generations(directory / "commits.log")
        for action, value in history[:30]:
            match action:
                case "commit" | "demote":
                    commit(log, log.last_number + 1, value + 1, demotes=action == "demote")
                case "drop" if log.points:
                    log.drop(log.points[value % len(log.points)])
                case "keep":
                    log.set_keep(Retention(last=value + 1))
                case "adopt":
                    log.adopt(value)
                case "promote" if log.points:
                    log.promote(Promotion(log.points[value % len(log.points)].number, IDS[value], value))
        assert reread(log) == told(log)
        assert [point.number for point in log.points] == sorted({point.number for point in log.points})
        log.close()
