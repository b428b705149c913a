"""A commit id is durable before anybody hears of it, and a lost answer is understood later."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from blockferry.client.commits import CommitLedger, default_state_directory
from blockferry.common import disk
from blockferry.common.errors import BlockferryError, Code

UUID = bytes(range(16))
OTHER = bytes(16)


def test_an_id_is_random_and_remembered(tmp_path: Path) -> None:
    ledger = CommitLedger(tmp_path / "state")
    first = ledger.mint(UUID, "db", "/srv/db.img")
    assert CommitLedger(tmp_path / "state").last(UUID) == first
    assert (first.replica_uuid, first.volume, first.source) == (UUID.hex(), "db", "/srv/db.img")
    assert len(bytes.fromhex(first.commit_id)) == 16
    assert not first.confirmed
    second = ledger.mint(UUID, "db", "/srv/db.img")
    assert second.commit_id != first.commit_id
    assert ledger.last(UUID) == second


def test_replicas_do_not_share_records(tmp_path: Path) -> None:
    ledger = CommitLedger(tmp_path)
    first = ledger.mint(UUID, "db", "a")
    assert ledger.last(OTHER) is None
    ledger.mint(OTHER, "db", "a")
    assert ledger.last(UUID) == first


def test_confirming_is_remembered(tmp_path: Path) -> None:
    ledger = CommitLedger(tmp_path)
    record = ledger.mint(UUID, "db", "a")
    ledger.confirm(record, 1)
    last = ledger.last(UUID)
    assert last is not None and last.confirmed and last.commit_id == record.commit_id


@pytest.mark.parametrize(("happened", "confirmed"), [(True, True), (False, False)])
def test_a_lost_answer_is_learnt_from_the_replica(tmp_path: Path, happened: bool, confirmed: bool) -> None:
    ledger = CommitLedger(tmp_path)
    assert ledger.reconcile(UUID, b"", 0) == ""
    assert ledger.last(UUID) is None
    record = ledger.mint(UUID, "db", "a")
    assert ledger.reconcile(UUID, bytes.fromhex(record.commit_id) if happened else bytes(16), 1) == ""
    last = ledger.last(UUID)
    assert last is not None and last.confirmed is confirmed


@pytest.mark.parametrize(
    ("newest", "generation", "warned"),
    [
        ("ours", 5, False),
        ("older", 3, True),
        ("rewritten", 5, True),
        ("another source's", 6, False),
        ("overwritten in place", 0, False),
    ],
)
@pytest.mark.parametrize("asked_again", [False, True], ids=["", "one-more-asked"])
def test_a_replica_that_has_lost_a_confirmed_commit(
    tmp_path: Path, newest: str, generation: int, warned: bool, asked_again: bool
) -> None:
    ledger = CommitLedger(tmp_path)
    record = ledger.mint(UUID, "db", "a")
    ledger.confirm(record, 5)
    if asked_again:
        ledger.mint(UUID, "db", "a")
    commit_id = {"ours": bytes.fromhex(record.commit_id), "overwritten in place": b""}.get(newest, bytes(16))
    said = ledger.reconcile(UUID, commit_id, generation)
    assert bool(said) is warned
    if warned:
        assert f"was at generation {generation}, although generation 5 had been committed from here" in said
    last = ledger.last(UUID)
    assert last is not None and (last.newest_id, last.newest_generation) == (record.commit_id, 5)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"null", b"[]", b"{}", b'{"replica_uuid": 1}', b"\xff\xfe", b'{"replica_uuid":"\xff"}', bytes(100)],
)
def test_a_record_that_cannot_be_used_is_as_good_as_none(tmp_path: Path, content: bytes) -> None:
    ledger = CommitLedger(tmp_path)
    ledger.mint(UUID, "db", "a")
    (path,) = (tmp_path / "commits").iterdir()
    path.write_bytes(content)
    assert ledger.last(UUID) is None
    assert ledger.reconcile(UUID, bytes(16), 1) == ""
    assert ledger.last(UUID) is None
    assert ledger.mint(UUID, "db", "a") == ledger.last(UUID)


def test_every_new_directory_is_durable_before_the_id_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    real = disk.fsync_directory

    def fsync_directory(path: Path) -> None:
        synced.append(path)
        real(path)

    monkeypatch.setattr(disk, "fsync_directory", fsync_directory)
    CommitLedger(tmp_path / "a" / "b").mint(UUID, "db", "a")
    # The name `commits` is kept in b, b in a, a in the directory that was there.
    assert {tmp_path, tmp_path / "a", tmp_path / "a" / "b", tmp_path / "a" / "b" / "commits"} <= set(synced)
    synced.clear()
    CommitLedger(tmp_path / "a" / "b").mint(UUID, "db", "a")
    # The name `commits` again: who made it may have died before its flush.
    assert synced == [tmp_path / "a" / "b", tmp_path / "a" / "b" / "commits"]


def test_a_source_whose_name_is_not_utf8_can_be_committed(tmp_path: Path) -> None:
    ledger = CommitLedger(tmp_path)
    record = ledger.mint(UUID, "db", os.fsdecode(b"/srv/\xff.img"))
    assert ledger.last(UUID) == record


def test_where_nothing_can_be_kept_no_id_is_given(tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(b"a file")
    with pytest.raises(BlockferryError) as caught:
        CommitLedger(tmp_path / "state").mint(UUID, "db", "a")
    assert (caught.value.code, caught.value.volume) == (Code.NOT_FOUND, "db")


def test_a_full_disk_gives_no_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(fd: int) -> None:
        raise OSError(28, "injected")

    ledger = CommitLedger(tmp_path)
    first = ledger.mint(UUID, "db", "a")
    monkeypatch.setattr(disk, "fsync", fsync)
    with pytest.raises(BlockferryError) as caught:
        ledger.mint(UUID, "db", "a")
    assert caught.value.code is Code.OUT_OF_SPACE
    assert ledger.last(UUID) == first


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"XDG_STATE_HOME": "/x/state", "HOME": "/home/u"}, "/x/state/blockferry"),
        ({"XDG_STATE_HOME": "", "HOME": "/home/u"}, "/home/u/.local/state/blockferry"),
        ({"HOME": "/home/u"}, "/home/u/.local/state/blockferry"),
    ],
)
def test_where_state_is_kept(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: str) -> None:
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert default_state_directory() == Path(expected)
