"""Digests of a generation: a cache is a plain dictionary, and a damaged or foreign file is no cache at all."""

from __future__ import annotations

from pathlib import Path

import pytest
from blockferry.server import cache
from blockferry.server.cache import DigestCache, Stamp
from hypothesis import given
from hypothesis import strategies as st

COMMIT = bytes(range(16))
REGION = 1048576

# Around the edges of pages, and far apart.
regions = st.one_of(st.integers(0, 5), st.integers(1020, 1030), st.integers(0, 2**32 - 1))
digests = st.binary(min_size=16, max_size=16)
contents = st.dictionaries(regions, digests, max_size=20)


def filled(content: dict[int, bytes]) -> DigestCache:
    found = DigestCache()
    for region, value in content.items():
        found.put(region, value)
    return found


@given(st.lists(st.tuples(st.sampled_from(["put", "forget"]), regions, digests, st.integers(1, 2000)), max_size=30))
def test_a_cache_remembers_and_forgets_as_a_dictionary_does(history: list[tuple[str, int, bytes, int]]) -> None:
    found, model = DigestCache(), dict[int, bytes]()
    for action, region, value, count in history:
        if action == "put":
            found.put(region, value)
            model[region] = value
        else:
            found.forget(region, count)
            model = {number: one for number, one in model.items() if not region <= number < region + count}
    assert dict(found.items()) == model
    assert [number for number, _ in found.items()] == sorted(model)
    assert all(found.get(region) == model.get(region) for _, region, _, _ in history)


@given(contents, regions, digests)
def test_a_copy_is_independent(content: dict[int, bytes], region: int, value: bytes) -> None:
    original = filled(content)
    copy = original.copy()
    copy.put(region, value)
    for number in content:
        copy.forget(number)
    assert dict(original.items()) == content
    original.put(region, bytes(16))
    assert copy.get(region) == (None if region in content else value)


@given(contents)
def test_a_cache_survives_its_file(content: dict[int, bytes]) -> None:
    found = cache.decode(cache.encode(filled(content), COMMIT, REGION), COMMIT, REGION)
    assert found is not None
    assert dict(found.items()) == content


@given(contents, st.data())
def test_a_file_changed_or_cut_anywhere_is_no_cache(content: dict[int, bytes], data: st.DataObject) -> None:
    file = bytearray(cache.encode(filled(content), COMMIT, REGION))
    position = data.draw(st.integers(0, len(file) - 1))
    if data.draw(st.booleans()):
        del file[position:]
    else:
        file[position] ^= data.draw(st.integers(1, 255))
    assert cache.decode(bytes(file), COMMIT, REGION) is None


@given(st.binary(max_size=100))
def test_garbage_is_no_cache(garbage: bytes) -> None:
    assert cache.decode(garbage, COMMIT, REGION) is None


@pytest.mark.parametrize(("commit_id", "region_size"), [(bytes(16), REGION), (COMMIT, 65536)])
def test_a_file_of_another_generation_or_region_size_is_no_cache(commit_id: bytes, region_size: int) -> None:
    assert cache.decode(cache.encode(filled({1: bytes(16)}), COMMIT, REGION), commit_id, region_size) is None


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "x.digests"
    assert cache.load(path, COMMIT, REGION) is None
    cache.save(path, filled({1: b"1" * 16, 5000: b"2" * 16}), COMMIT, REGION)
    found = cache.load(path, COMMIT, REGION)
    assert found is not None and dict(found.items()) == {1: b"1" * 16, 5000: b"2" * 16}
    assert [one.name for one in tmp_path.iterdir()] == ["x.digests"]


def test_memory_follows_what_is_known() -> None:
    # One digest per page in 1000 pages of a volume of 4 PiB, not one page per possible region.
    found = filled({number * 2**22: bytes(16) for number in range(1000)})
    assert len(found._pages) == 1000
    assert len(cache.encode(found, COMMIT, REGION)) < 1000 * 32 + 200


def test_a_stamp_tells_a_touched_file_from_an_untouched_one(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"x")
    before = Stamp.of(path)
    assert Stamp.of(path) == before
    path.chmod(0o600)
    path.chmod(0o644)
    assert (Stamp.of(path).inode, Stamp.of(path).size) == (before.inode, before.size)
    path.write_bytes(b"xy")
    assert Stamp.of(path) != before


FROZEN = bytes.fromhex(
    """
    4246444947455354630000007b22666f726d6174223a322c22636f6d6d69745f6964223a2230303031303230333034303530
    36303730383039306130623063306430653066222c22726567696f6e5f73697a65223a313034383537362c226b6e6f776e5f
    6c656e677468223a33307d3a300000020000000000010001000000180000001c000000000001007011616161616161616161
    6161616161616100000000000000000000000000000000000102030405060708090a0b0c0d0e0fe779315aff8867522f43c8
    8892f2e3623a7324affa27052abe90aaeb32f481ce
    """
)


def test_the_bytes_of_a_digest_file_never_change() -> None:
    """docs/formats.md. A change here is a new format, which older servers must be told from this one."""
    content = filled({0: b"a" * 16, 1: bytes(16), 70000: bytes(range(16))})
    assert cache.encode(content, COMMIT, REGION) == FROZEN


def test_the_frozen_bytes_are_read_back() -> None:
    found = cache.decode(FROZEN, COMMIT, REGION)
    assert found is not None
    assert dict(found.items()) == {0: b"a" * 16, 1: bytes(16), 70000: bytes(range(16))}
