"""What was acknowledged survives; what was torn is cut off; what is damaged is refused; nothing lies between."""

from __future__ import annotations

import os
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from blockferry.common.durable import Log, remove_durably, rename_durably, write_atomic
from blockferry.common.errors import BlockferryError, Code
from hypothesis import given
from hypothesis import strategies as st

Record = dict[str, object]

values = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text(max_size=10)
records = st.dictionaries(st.text(max_size=6), values, max_size=4)


def written(path: Path, content: list[Record]) -> list[int]:
    """Write a log and return its length in bytes after each record, beginning with the empty one."""
    log = Log(path)
    ends = [0]
    for record in content:
        log.append(record)
        ends.append(path.stat().st_size)
    log.close()
    return ends


def reopened(path: Path) -> list[Record]:
    log = Log(path)
    log.close()
    return log.records


@given(st.lists(records, max_size=5), st.lists(records, max_size=3))
def test_records_survive_reopening_and_more_can_be_added(first: list[Record], second: list[Record]) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "log"
        written(path, first)
        log = Log(path)
        assert log.records == first
        for record in second:
            log.append(record)
        assert log.records == first + second
        log.close()
        assert reopened(path) == first + second


@given(st.lists(records, max_size=4), st.data())
def test_a_log_cut_off_anywhere_holds_the_records_that_are_whole(content: list[Record], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "log"
        ends = written(path, content)
        cut = data.draw(st.integers(0, ends[-1]))
        os.truncate(path, cut)
        whole = sum(end <= cut for end in ends[1:])
        assert reopened(path) == content[:whole]
        # The torn rest is gone for good: what is appended now follows the last whole record.
        log = Log(path)
        log.append({"after": "crash"})
        log.close()
        assert reopened(path) == [*content[:whole], {"after": "crash"}]


@given(st.lists(records, min_size=1, max_size=4), st.data())
def test_one_changed_byte_is_never_believed(content: list[Record], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "log"
        ends = written(path, content)
        position = data.draw(st.integers(0, ends[-1] - 1))
        changed = bytearray(path.read_bytes())
        changed[position] ^= data.draw(st.integers(1, 255))
        path.write_bytes(changed)
        if position < ends[-2]:
            with pytest.raises(BlockferryError) as caught:
                Log(path)
            assert caught.value.code is Code.CORRUPT_STATE
            assert path.read_bytes() == changed
        elif b"\n" in changed[ends[-2] : -1]:
            # The last record fell into two lines, and the first of them is not the last line.
            with pytest.raises(BlockferryError) as caught:
                Log(path)
            assert caught.value.code is Code.CORRUPT_STATE
        else:
            assert reopened(path) == content[:-1]


NUMBERS = (144, 154, 184)
"""Records in the log of the next test: their checksums begin with a zero and hold an `a`."""


@pytest.mark.parametrize("number", range(len(NUMBERS)))
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda line: line[:-1] + b" ", id="newline lost"),
        pytest.param(lambda line: bytes(len(line)), id="zeros"),
        pytest.param(lambda line: bytes(len(line) - 1) + b"\n", id="zeros and a newline"),
        pytest.param(lambda line: line.replace(b"a", b"A", 1), id="checksum in capitals"),
        pytest.param(lambda line: b"+" + line[1:], id="sign before the checksum"),
        pytest.param(lambda line: line.replace(b"number", b"NUMBER"), id="other field"),
        pytest.param(lambda line: b"00000000 \n", id="empty body"),
    ],
)
def test_damage_in_the_middle_is_refused_and_at_the_end_cut_off(
    tmp_path: Path, number: int, damage: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / "log"
    content: list[Record] = [{"number": value} for value in NUMBERS]
    written(path, content)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[number] = damage(lines[number])
    path.write_bytes(b"".join(lines))
    if number < len(NUMBERS) - 1:
        with pytest.raises(BlockferryError) as caught:
            Log(path)
        assert caught.value.code is Code.CORRUPT_STATE
        assert "backup" in caught.value.next
    else:
        assert reopened(path) == content[:-1]


def test_a_line_that_is_no_object_is_no_record(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"%08x [1]\n" % zlib.crc32(b"[1]"))
    assert reopened(path) == []


def test_a_failed_append_is_not_among_the_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = Log(tmp_path / "log")
    log.append({"number": 1})

    def fail(fd: int) -> None:
        raise OSError(5, "injected")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="injected"):
        log.append({"number": 2})
    monkeypatch.undo()
    assert log.records == [{"number": 1}]
    log.close()


@pytest.mark.parametrize(
    "step",
    ["write", "fsync", "replace"],
)
@pytest.mark.parametrize("old", [None, b"old"])
def test_an_interrupted_atomic_write_leaves_the_old_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, old: bytes | None
) -> None:
    path = tmp_path / "state.json"
    if old is not None:
        write_atomic(path, old)

    def fail(*arguments: object) -> int:
        raise OSError(28, "injected")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="injected"):
        write_atomic(path, b"new, and longer")
    monkeypatch.undo()
    assert (path.read_bytes() if path.exists() else None) == old
    write_atomic(path, b"next")
    assert path.read_bytes() == b"next"
    assert os.listdir(tmp_path) == ["state.json"]


def test_an_atomic_write_is_synced_before_its_name_and_the_name_before_it_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(fd: int) -> None:
        steps.append("fsync " + os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))
        real_fsync(fd)

    def replace(source: Path, target: Path) -> None:
        steps.append(f"replace {target.name}")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    write_atomic(tmp_path / "state", b"x")
    assert steps == ["fsync state.tmp", "replace state", f"fsync {tmp_path.name}"]


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real_write(fd, data[:3]))
    write_atomic(tmp_path / "state", b"0123456789")
    assert (tmp_path / "state").read_bytes() == b"0123456789"


def test_state_files_are_for_their_owner_only(tmp_path: Path) -> None:
    write_atomic(tmp_path / "state", b"x")
    Log(tmp_path / "log").close()
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


def test_renaming_and_removing(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    rename_durably(tmp_path / "a", tmp_path / "b")
    assert os.listdir(tmp_path) == ["b"]
    remove_durably(tmp_path / "b")
    remove_durably(tmp_path / "b")
    assert os.listdir(tmp_path) == []
