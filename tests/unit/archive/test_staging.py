"""The staging directory: what it knows after an end of any kind, and what it keeps."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from blockferry.client import staging as module
from blockferry.client.staging import Noted, Staging, State
from blockferry.common.errors import BlockferryError, Code

from tests.unit.archive.examples import ATTEMPT, some


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "a" / "b"


def state(directory: Path) -> State:
    found = Staging.open(directory)
    try:
        return found.state
    finally:
        found.close()


def begun(directory: Path) -> Staging:
    staging = Staging.open(directory)
    staging.begin(ATTEMPT, 3, "now")
    assert [staging.begin_run(""), staging.begin_run("one")] == [0, 1]
    return staging


def test_a_new_directory_knows_nothing(directory: Path) -> None:
    assert state(directory) == State()
    assert directory.stat().st_mode & 0o777 == 0o700


def test_everything_that_was_noted_is_known_afterwards(directory: Path) -> None:
    staging = begun(directory)
    staging.note_data(0, 100, b"t" * 24, 0, b"trailer 0", 5, 9)
    staging.done("data", 0)
    staging.note_data(1, 200, b"u" * 24, 1, b"the next trailer", -1, -1)
    staging.note_meta(0, 300, b"v" * 24)
    staging.note_commit(4, b"frame")
    expected = staging.state
    staging.close()
    found = Staging.open(directory)
    assert found.state == expected
    assert (found.state.attempt, found.state.seen, found.state.runs) == (ATTEMPT, 3, ["", "one"])
    assert found.state.data == {
        0: Noted(0, 100, b"t" * 24, True, 0, 0, 9, 5, 9),
        1: Noted(1, 200, b"u" * 24, False, 1, 9, 16, -1, -1),
    }
    assert found.state.meta == {0: Noted(0, 300, b"v" * 24)}
    assert [found.read_trailer(one) for one in found.state.data.values()] == [b"trailer 0", b"the next trailer"]
    assert (found.state.commit, found.state.committed, found.superblock()) == (4, 0, b"frame")
    found.note_committed(4)
    found.close()
    assert state(directory).committed == 4


def test_what_is_done_is_noted_with_the_next_chunk(directory: Path) -> None:
    """No flush of its own: should the note never come, the store is asked."""
    staging = begun(directory)
    staging.note_data(0, 100, b"t" * 24, 0, b"x", 0, 0)
    staging.done("data", 0)
    staging.close()
    assert not state(directory).data[0].done


def test_a_note_that_was_torn_was_never_made(directory: Path) -> None:
    staging = begun(directory)
    staging.note_data(0, 100, b"t" * 24, 0, b"one", 0, 0)
    staging.note_data(1, 100, b"t" * 24, 0, b"two", 1, 1)
    staging.close()
    journal = directory / "journal"
    journal.write_bytes(journal.read_bytes()[:-5])
    found = Staging.open(directory)
    assert list(found.state.data) == [0]
    assert (directory / "trailers").stat().st_size == 3
    found.note_data(1, 100, b"t" * 24, 0, b"three", 1, 1)
    assert found.read_trailer(found.state.data[1]) == b"three"
    found.close()


@pytest.mark.parametrize("damage", [b"", b"junk\n", b'00000000 {"kind":"run"}\n'])
def test_what_is_damaged_is_dropped_and_the_cache_stays(directory: Path, damage: bytes) -> None:
    staging = begun(directory)
    staging.note_meta(0, 300, b"v" * 24)
    staging.meta_path(0).write_bytes(b"nodes")
    staging.cache_path(ATTEMPT, 7).write_bytes(b"of a snapshot")
    staging.close()
    journal = directory / "journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(lines[0] + damage + lines[-1] if damage else b"".join(lines[1:]))
    assert state(directory) == State()
    assert sorted(path.name for path in directory.iterdir()) == ["cache", "journal", "lock", "trailers"]
    assert (directory / "cache" / f"{ATTEMPT.hex()}-000007").read_bytes() == b"of a snapshot"


@pytest.mark.parametrize("change", [{"version": 2}, {"attempt": "zz"}, {"kind": "other"}])
def test_a_journal_of_another_version_is_dropped(
    directory: Path, change: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    staging = Staging.open(directory)
    whole = {"kind": "attempt", "version": 1, "attempt": ATTEMPT.hex(), "seen": 0, "started": ""}
    assert staging._journal is not None
    staging._journal.append({**whole, **change})
    staging.close()
    assert state(directory) == State()


def test_metadata_that_nobody_has_noted_goes_when_it_is_opened(directory: Path) -> None:
    staging = begun(directory)
    staging.note_meta(0, 5, b"v" * 24)
    for number in (0, 1):
        staging.meta_path(number).write_bytes(b"nodes")
    staging.close()
    state(directory)
    assert sorted(path.name for path in directory.glob("meta-*")) == ["meta-000000"]


def test_one_archiver_at_a_time(directory: Path) -> None:
    staging = Staging.open(directory)
    with pytest.raises(BlockferryError) as told:
        Staging.open(directory)
    assert told.value.code is Code.IN_USE
    staging.close()
    Staging.open(directory).close()


def test_what_was_committed_moves_into_the_cache_as_far_as_there_is_room(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CACHE_LIMIT", 25)
    staging = begun(directory)
    old, used = some("old", 16), some("used", 16)
    for number, (attempt, size) in enumerate(((old, 10), (used, 10))):
        path = staging.cache_path(attempt, 0)
        path.write_bytes(b"x" * size)
        os.utime(path, (number, number))
    for number in range(2):
        staging.note_meta(number, 5, b"v" * 24)
        staging.meta_path(number).write_bytes(b"nodes")
    staging.done("meta", 0)
    staging.finish([staging.cache_path(used, 0).name])
    left = {path.name: path.stat().st_size for path in (directory / "cache").iterdir()}
    assert left == {f"{ATTEMPT.hex()}-000000": 5, f"{used.hex()}-000000": 10, f"{old.hex()}-000000": 10}
    staging.begin(ATTEMPT, 0, "")
    staging.note_meta(0, 5, b"v" * 24)
    staging.meta_path(0).write_bytes(b"nodes more")
    staging.done("meta", 0)
    monkeypatch.setattr(module, "CACHE_LIMIT", 20)
    staging.finish([])
    assert f"{ATTEMPT.hex()}-000000" in {path.name for path in (directory / "cache").iterdir()}
    assert sum(path.stat().st_size for path in (directory / "cache").iterdir()) <= 20
    assert sorted(path.name for path in directory.iterdir()) == ["cache", "journal", "lock", "trailers"]
    staging.close()
    assert state(directory) == State()
