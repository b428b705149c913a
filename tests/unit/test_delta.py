"""Deltas: sets of blocks that behave like sets, indexes that are whole or refused, and data in its place."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from blake3 import blake3
from blockferry.common import disk
from blockferry.common.blocks import blocks_of, runs
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.regions import BLOCK_SIZE
from blockferry.server import delta
from blockferry.server.delta import Delta, below, extents, index_of
from hypothesis import example, given
from hypothesis import strategies as st
from pyroaring import BitMap64

from tests.unit.conftest import Place
from tests.unit.layers import quick_directory

B = BLOCK_SIZE

# --- sets of blocks ---------------------------------------------------------------------------------------------

BASES = [0, 1, 2**16 - 3, 2**32 - 5, 2**32, 2**40 + 7, 2**51 - 40]
"""Around the edges of what a bitmap keeps together, up to the last block of the largest file."""

pieces = st.lists(st.tuples(st.sampled_from(BASES), st.integers(0, 30), st.integers(1, 12)), max_size=8)


def bits(members: set[int]) -> BitMap64:
    return BitMap64(sorted(members))


def members_of(found: list[tuple[int, int, int]]) -> set[int]:
    return {base + start + number for base, start, count in found for number in range(count)}


def naive_runs(members: set[int]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for number in sorted(members):
        if found and sum(found[-1]) == number:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((number, 1))
    return found


@given(pieces)
def test_runs_are_those_of_a_plain_set(found: list[tuple[int, int, int]]) -> None:
    members = members_of(found)
    assert list(runs(bits(members))) == naive_runs(members)


LONG = st.lists(st.tuples(st.integers(0, 2**36), st.integers(1, 2**22)), min_size=1, max_size=4)


@given(LONG)
def test_long_runs_cost_no_more_than_short_ones(found: list[tuple[int, int]]) -> None:
    # As many members as no list could hold: what is expected is put together from the ends.
    blocks = BitMap64()
    merged: list[tuple[int, int]] = []
    for first, count in sorted(found):
        blocks.add_range(first, first + count)
        if merged and sum(merged[-1]) >= first:
            merged[-1] = (merged[-1][0], max(sum(merged[-1]), first + count) - merged[-1][0])
        else:
            merged.append((first, count))
    assert list(runs(blocks)) == merged


def test_runs_across_the_edges_of_32_bits() -> None:
    for first, count in ((2**32 - 1, 1), (2**32 - 1, 2), (2**32, 1), (2**32 - 70000, 140000), (0, 2**28)):
        blocks = BitMap64()
        blocks.add_range(first, first + count)
        assert list(runs(blocks)) == [(first, count)]


@given(pieces, st.one_of(st.integers(0, 50 * B), st.integers(2**44 - 50 * B, 2**44 + 50 * B)))
def test_what_is_below_the_end_of_a_volume(found: list[tuple[int, int, int]], size: int) -> None:
    members = members_of(found)
    inside = {number for number in members if number * B < size}
    blocks = bits(members)
    assert set(below(blocks, size)) == inside
    # The set itself stays.
    assert set(blocks) == members
    expected = [(first * B, min((first + count) * B, size) - first * B) for first, count in naive_runs(inside)]
    assert extents(blocks, size) == expected
    assert all(length > 0 for _, length in expected)


@given(st.integers(0, 2**50), st.integers(1, 20 * B))
def test_the_blocks_of_a_range(offset: int, length: int) -> None:
    touched = blocks_of(offset, length)
    assert touched.start * B <= offset < (touched.start + 1) * B
    assert (touched.stop - 1) * B < offset + length <= touched.stop * B


# --- data -------------------------------------------------------------------------------------------------------

SIZE = 20 * B + 77


def make(directory: Path, size: int = SIZE) -> Delta:
    return Delta.create(directory / "work.redo", size)


def put(found: Delta, block: int, content: bytes) -> None:
    found.write([(block * B, content)])
    found.data.add(block)


def get(found: Delta, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    found.read_into(offset, memoryview(buffer))
    return bytes(buffer)


def saved(found: Delta) -> None:
    found.flush()
    found.save(found.data, found.zero)


def test_a_new_delta_is_empty_and_sparse_and_seen_by_nobody(tmp_path: Path) -> None:
    found = make(tmp_path, 2**40)
    assert (found.size, set(found.data), set(found.zero), found.bytes_held) == (2**40, set(), set(), 0)
    assert os.stat(found.path).st_blocks == 0
    assert not index_of(found.path).exists()
    with pytest.raises(BlockferryError, match="is missing") as caught:
        Delta.open(found.path)
    assert caught.value.code is Code.CORRUPT_STATE
    found.close()


def test_a_new_delta_has_nothing_of_one_that_was_there(tmp_path: Path) -> None:
    old = make(tmp_path)
    put(old, 1, b"o" * B)
    old.close()
    found = make(tmp_path)
    assert get(found, B, B) == bytes(B)
    found.close()


def test_blocks_lie_at_their_own_offsets(tmp_path: Path) -> None:
    found = make(tmp_path)
    found.write([(3 * B, b"c" * B), (20 * B, b"t" * 77), (B, memoryview(b"a" * 2 * B))])
    content = found.path.read_bytes()
    assert len(content) == SIZE
    assert content == bytes(B) + b"a" * 2 * B + b"c" * B + bytes(16 * B) + b"t" * 77
    assert get(found, 2 * B + 10, B) == b"a" * (B - 10) + b"c" * 10
    found.close()


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = make(tmp_path)
    real = disk.pwrite
    monkeypatch.setattr(disk, "pwrite", lambda fd, data, offset: real(fd, data[:1000], offset))
    found.write([(B, bytes(range(256)) * 32)])
    assert found.path.read_bytes()[B : 3 * B] == bytes(range(256)) * 32
    found.close()


def test_a_short_read_is_an_error(tmp_path: Path) -> None:
    found = make(tmp_path)
    put(found, 1, b"x" * B)
    os.truncate(found.path, B + 100)
    with pytest.raises(BlockferryError, match=f"its data ends at {B + 100}") as caught:
        get(found, B, B)
    assert caught.value.code is Code.CORRUPT_STATE
    found.close()


def test_space_is_given_back(place: Place) -> None:
    found = make(place("tmpfs"))
    for block in range(20):
        put(found, block, bytes([block + 1]) * B)
    found.flush()
    before = os.stat(found.path).st_blocks
    found.free([(2, 3), (19, 1)])
    assert before - os.stat(found.path).st_blocks == 4 * B // 512
    content = found.path.read_bytes()
    for block in range(20):
        gone = block in (2, 3, 4, 19)
        assert content[block * B : (block + 1) * B] == (bytes(B) if gone else bytes([block + 1]) * B)
    assert len(content) == SIZE
    found.close()
    # Where that is not possible nothing is lost.
    found.free([(0, 1)])


# --- the index --------------------------------------------------------------------------------------------------


@given(pieces, pieces)
def test_an_index_survives_reopening(data: list[tuple[int, int, int]], zero: list[tuple[int, int, int]]) -> None:
    written = members_of(data)
    zeroed = members_of(zero) - written
    with quick_directory() as directory:
        found = make(directory)
        found.save(bits(written), bits(zeroed))
        found.close()
        again = Delta.open(found.path)
        assert (set(again.data), set(again.zero), again.size) == (written, zeroed, SIZE)
        assert again.bytes_held == len(written) * B
        again.close()


def test_what_was_not_saved_is_not_there(tmp_path: Path) -> None:
    found = make(tmp_path)
    put(found, 1, b"a" * B)
    saved(found)
    put(found, 2, b"b" * B)
    found.zero.add(9)
    found.close()
    again = Delta.open(found.path)
    assert (set(again.data), set(again.zero)) == ({1}, set())
    assert get(again, B, B) == b"a" * B
    again.close()


def test_saving_replaces_the_index_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = make(tmp_path)
    put(found, 1, b"a" * B)
    saved(found)
    before = index_of(found.path).read_bytes()

    def fail(*arguments: object) -> None:
        raise OSError(5, "injected")

    put(found, 2, b"b" * B)
    for step in ("append", "fsync", "rename"):
        monkeypatch.setattr(disk, step, fail)
        with pytest.raises(OSError, match="injected"):
            found.save(found.data, found.zero)
        monkeypatch.undo()
        assert index_of(found.path).read_bytes() == before
    found.close()


def whole(directory: Path) -> Delta:
    """A closed delta with data, zeros and a short last block."""
    found = make(directory)
    put(found, 1, b"a" * B)
    put(found, 20, b"t" * 77)
    found.zero.add(5)
    saved(found)
    found.close()
    return found


def refused(path: Path) -> BlockferryError:
    """Why a delta cannot be opened; no descriptor is left behind and nothing changes."""
    before = {one.name: one.read_bytes() for one in path.parent.iterdir()}
    descriptors = set(os.listdir("/proc/self/fd"))
    with pytest.raises(BlockferryError) as caught:
        Delta.open(path)
    assert set(os.listdir("/proc/self/fd")) == descriptors
    assert {one.name: one.read_bytes() for one in path.parent.iterdir()} == before
    return caught.value


@pytest.mark.parametrize("missing", ["work.redo", "work.redo.index"])
def test_half_a_delta_is_refused(tmp_path: Path, missing: str) -> None:
    path = whole(tmp_path).path
    (tmp_path / missing).unlink()
    error = refused(path)
    assert (error.code, error.cause) == (Code.CORRUPT_STATE, f"{missing} is missing")


def test_an_index_that_is_torn_or_changed_anywhere_is_refused(place: Place) -> None:
    path = whole(place("tmpfs")).path
    good = index_of(path).read_bytes()
    damaged = [good[:length] for length in range(len(good))]
    damaged += [good[:at] + bytes([good[at] ^ 0x10]) + good[at + 1 :] for at in range(len(good))]
    for content in damaged:
        index_of(path).write_bytes(content)
        with pytest.raises(BlockferryError, match="its index fails its checksum") as caught:
            Delta.open(path)
        assert caught.value.code is Code.CORRUPT_STATE
    index_of(path).write_bytes(damaged[-1])
    assert refused(path).code is Code.CORRUPT_STATE


@pytest.mark.parametrize("size", [0, B, SIZE - 1])
def test_data_that_is_cut_off_is_refused(tmp_path: Path, size: int) -> None:
    path = whole(tmp_path).path
    os.truncate(path, size)
    error = refused(path)
    assert (error.code, error.cause) == (Code.CORRUPT_STATE, "its data is cut off")


def rewritten(path: Path, **changes: object) -> None:
    """Give an index another header, and the checksum that belongs to it."""
    content = index_of(path).read_bytes()[:-32]
    end = 12 + int.from_bytes(content[8:12], "little")
    head = msgspec.json.encode({**msgspec.json.decode(content[12:end]), **changes})
    content = content[:8] + len(head).to_bytes(4, "little") + head + content[end:]
    index_of(path).write_bytes(content + blake3(content).digest())


@pytest.mark.parametrize("changes", [{}, {"block_size": 512}, {"added": [1]}, {"data_length": 2**40}], ids=repr)
def test_a_newer_format_is_refused_by_name(tmp_path: Path, changes: dict[str, object]) -> None:
    path = whole(tmp_path).path
    rewritten(path, format=delta.FORMAT + 1, **changes)
    error = refused(path)
    assert error.code is Code.UNSUPPORTED
    assert "newer" in error.line() and "nothing was changed" in error.next


@pytest.mark.parametrize("changes", [{"block_size": 512}, {"data_length": 3}, {"zero_length": 0}], ids=repr)
def test_an_index_that_contradicts_itself_is_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    path = whole(tmp_path).path
    rewritten(path, **changes)
    error = refused(path)
    assert (error.code, error.cause) == (Code.CORRUPT_STATE, "its index contradicts itself")


def test_fields_that_were_added_to_this_format_are_passed_over(tmp_path: Path) -> None:
    path = whole(tmp_path).path
    rewritten(path, added="later")
    again = Delta.open(path)
    assert (set(again.data), set(again.zero)) == ({1, 20}, {5})
    again.close()


def test_the_index_of_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = whole(tmp_path).path
    content = b"BFDIGEST" + index_of(path).read_bytes()[8:-32]
    index_of(path).write_bytes(content + blake3(content).digest())
    assert refused(path).code is Code.CORRUPT_STATE


def _remove_data(path: Path) -> None:
    path.unlink()


def _remove_index(path: Path) -> None:
    index_of(path).unlink()


@pytest.mark.parametrize("before", [lambda path: None, _remove_data, _remove_index, Delta.remove])
def test_a_delta_is_removed_whatever_is_left_of_it(tmp_path: Path, before: Callable[[Path], None]) -> None:
    path = whole(tmp_path).path
    before(path)
    Delta.remove(path)
    assert os.listdir(tmp_path) == []


def test_the_index_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = whole(tmp_path).path
    gone: list[str] = []
    monkeypatch.setattr(disk, "unlink", lambda one: gone.append(one.name))
    Delta.remove(path)
    assert gone == ["work.redo.index", "work.redo"]


# --- other sizes ------------------------------------------------------------------------------------------------


@given(
    st.integers(1, 12 * B),
    st.lists(st.integers(1, 12 * B), min_size=1, max_size=4),
    st.sets(st.integers(0, 11)),
    st.sets(st.integers(0, 11)),
)
@example(5 * B + 1, [5 * B + 2, 5 * B + 1, 6 * B], {5}, set())
@example(5 * B + 9, [5 * B + 2, 8 * B], {4, 5}, {3})
def test_a_delta_follows_the_size_of_its_volume(size: int, sizes: list[int], data: set[int], zero: set[int]) -> None:
    with quick_directory() as directory:
        found = make(directory, size)
        model: dict[int, bytes] = {}
        for block in data:
            if block * B < size:
                length = min(B, size - block * B)
                put(found, block, b"d" * length)
                model[block] = b"d" * length + bytes(B - length)
        zeros = {block for block in zero - data if block * B < size}
        found.zero |= bits(zeros)
        for other in sizes:
            found.resize(other)
            inside = -(-other // B)
            model = {
                block: (content[: other - block * B] + bytes(B))[:B]
                for block, content in model.items()
                if block < inside
            }
            zeros = {block for block in zeros if block < inside}
            assert (found.size, os.stat(found.path).st_size) == (other, other)
            assert (set(found.data), set(found.zero)) == (set(model), zeros)
            for block, content in model.items():
                length = min(B, other - block * B)
                assert get(found, block * B, length) == content[:length]
        saved(found)
        found.close()
        again = Delta.open(found.path)
        assert (again.size, set(again.data), set(again.zero)) == (sizes[-1], set(model), zeros)
        again.close()


# --- the bytes --------------------------------------------------------------------------------------------------

FROZEN = bytes.fromhex(
    """
    424644454c544100560000007b22666f726d6174223a312c22626c6f636b5f73697a65223a343039362c2273697a65223a31
    373539323138363034343432312c22646174615f6c656e677468223a35362c227a65726f5f6c656e677468223a33377d0200
    000000000000000000003a300000010000000000020010000000010002000300010000003a30000001000000000000001000
    000000000100000000000000000000003b3001000300009bff0100d311010064009bff01000000d31192ffc180dcb8a08c13
    cd82a2ed219bbd41e3f11830bd3b95c5fe4136ce324f85
    """
)


def test_the_bytes_of_an_index_never_change(place: Place) -> None:
    """docs/formats.md. A change here is a new format, which older servers must be told from this one."""
    # ext4 has no files of this size.
    found = make(place("tmpfs"), 2**32 * B + 5)
    data, zero = BitMap64([1, 2, 3, 2**32]), BitMap64()
    zero.add_range(100, 70100)
    found.save(data, zero)
    found.close()
    assert index_of(found.path).read_bytes() == FROZEN


def test_the_frozen_bytes_are_read_back(place: Place) -> None:
    path = place("tmpfs") / "work.redo"
    path.touch()
    os.truncate(path, 2**32 * B + 5)
    index_of(path).write_bytes(FROZEN)
    found = Delta.open(path)
    assert (found.size, set(found.data)) == (2**32 * B + 5, {1, 2, 3, 2**32})
    assert list(runs(found.zero)) == [(100, 70000)]
    found.close()
