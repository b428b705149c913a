"""What thin_dump says of one device becomes its extents; whatever is broken or unknown is refused, never guessed."""

from __future__ import annotations

import itertools

import pytest
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.thin import ThinTable, parse_dump, parse_table
from hypothesis import given, settings
from hypothesis import strategies as st

KIB64 = 65536


def dump(*devices: str, block: int = 128, before: str = "") -> bytes:
    body = "".join(devices)
    return (
        f'<superblock uuid="" time="1" transaction="2" flags="0" version="2" data_block_size="{block}" '
        f'nr_data_blocks="0">{before}{body}</superblock>\n'
    ).encode()


def device(number: int, mapped: int, body: str) -> str:
    return (
        f'<device dev_id="{number}" mapped_blocks="{mapped}" transaction="0" creation_time="0" snap_time="1">'
        f"{body}</device>"
    )


def single(origin: int, data: int = 0) -> str:
    return f'<single_mapping origin_block="{origin}" data_block="{data}" time="0"/>'


def many(origin: int, length: int, data: int = 0) -> str:
    return f'<range_mapping origin_begin="{origin}" data_begin="{data}" length="{length}" time="0"/>'


def test_the_mappings_of_one_device_are_its_extents() -> None:
    text = dump(
        device(1, 3, many(0, 3)),
        device(2, 8, single(1, 99) + many(2, 4, 7) + many(10, 3, 500)),
        device(3, 0, ""),
        block=256,
    )
    assert parse_dump([text], 1) == [(0, 3 * 2 * KIB64)]
    assert parse_dump([text], 2) == [(2 * KIB64, 5 * 2 * KIB64), (20 * KIB64, 3 * 2 * KIB64)]
    assert parse_dump([text], 3) == []


def test_shared_mappings_count_for_each_device_that_refers_to_them() -> None:
    shared = f'<def name="a">{many(5, 2)}</def><def name="b"></def>'
    text = dump(
        device(1, 4, single(0) + '<ref name="a"/><ref name="b"/>' + single(9)),
        device(2, 2, '<ref name="a"/>'),
        before=shared,
    )
    assert parse_dump([text], 1) == [(0, KIB64), (5 * KIB64, 2 * KIB64), (9 * KIB64, KIB64)]
    assert parse_dump([text], 2) == [(5 * KIB64, 2 * KIB64)]


def test_shared_mappings_are_not_changed_by_those_who_refer_to_them() -> None:
    text = dump(
        device(1, 3, '<ref name="a"/>' + single(2)), device(2, 2, '<ref name="a"/>'),
        before=f'<def name="a">{many(0, 2)}</def>',
    )  # fmt: skip
    assert parse_dump([text], 1) == [(0, 3 * KIB64)]
    assert parse_dump([text], 2) == [(0, 2 * KIB64)]


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 7), st.booleans()), max_size=30),
    st.sampled_from([128, 256, 1024, 2097152]),
    st.integers(1, 200),
    st.integers(0, 2**24 - 1),
)
def test_any_mapping_in_any_pieces(mappings: list[tuple[int, int, bool]], block: int, step: int, number: int) -> None:
    """Gaps and lengths in blocks; each mapping as a range or block by block; the text arrives in parts."""
    position, body, held = 0, "", set[int]()
    for gap, length, as_range in mappings:
        position += gap
        blocks = range(position, position + length)
        body += many(position, length) if as_range else "".join(map(single, blocks))
        held.update(blocks)
        position += length
    text = dump(device(2**24, 1, single(7)), device(number, len(held), body), block=block)
    found = parse_dump((text[start : start + step] for start in range(0, len(text), step)), number)
    size = block * 512
    assert [one for offset, length in found for one in range(offset // size, (offset + length) // size)] == sorted(held)
    # Neighbours are merged: as few extents as there are.
    assert all(sum(one) < other[0] for one, other in itertools.pairwise(found))


@settings(max_examples=50)
@given(st.integers(0, 1000))
def test_a_dump_that_is_cut_off_is_refused(cut: int) -> None:
    text = dump(device(1, 3, many(0, 3)), device(2, 1, single(5))).rstrip()
    with pytest.raises(BlockferryError) as caught:
        parse_dump([text[: min(cut, len(text) - 1)]], 1)
    assert caught.value.code is Code.INVALID_ARGUMENT


GOOD = device(1, 1, single(0))


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (b"", "no element"),
        (b"not XML", "syntax error"),
        (b"<pool/>", "<pool>"),
        (dump(GOOD, block=100), "100"),
        (dump(GOOD, block=64), "64"),
        (dump(GOOD, block=2097152 + 128), "not possible"),
        (dump(GOOD, GOOD), "twice"),
        (dump(device(1, 2, single(0))), "2 blocks"),
        (dump(device(1, 2, single(3) * 2)), "block 3 twice"),
        (dump(device(1, 4, many(0, 3) + single(1))), "block 1 twice"),
        (dump(device(1, 1, "<hole_mapping/>")), "<hole_mapping>"),
        (dump(device(1, 1, '<single_mapping data_block="1"/>')), "origin_block"),
        (dump(device(1, 1, '<single_mapping origin_block="-1"/>')), "origin_block"),
        (dump(device(1, 1, '<range_mapping origin_begin="0" length="x"/>')), "length"),
        (dump(device(1, 1, '<ref name="a"/>')), "'a'"),
        (dump(GOOD, "<snapshot/>"), "<snapshot>"),
        (dump(device(1, 1, single(0).replace("/>", f">{single(1)}</single_mapping>"))), "<single_mapping> in"),
        (b'<!DOCTYPE a [<!ENTITY b "c">]>' + dump(GOOD), "entities"),
        (dump(GOOD) + dump(GOOD), "junk"),
    ],
)
def test_what_is_broken_or_unknown_is_refused(text: bytes, cause: str) -> None:
    with pytest.raises(BlockferryError) as caught:
        parse_dump([text], 1)
    assert caught.value.code is Code.INVALID_ARGUMENT
    assert cause in caught.value.cause


def test_a_device_that_is_not_there_is_not_empty() -> None:
    with pytest.raises(BlockferryError) as caught:
        parse_dump([dump(GOOD)], 2)
    assert caught.value.code is Code.NOT_FOUND


@pytest.mark.parametrize("line", ["0 2097152 thin 254:2 7\n", "vg-lv: 0 2097152 thin 254:2 7"])
def test_the_table_names_the_device(line: str) -> None:
    assert parse_table(line) == ThinTable(2**30, 7)


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("0 2097152 thin 254:2 7 254:9", Code.UNSUPPORTED),
        ("", Code.INVALID_ARGUMENT),
        ("0 2097152 linear 254:2 7", Code.INVALID_ARGUMENT),
        ("0 2097152 thin-pool 254:0 254:1 128 0 0", Code.INVALID_ARGUMENT),
        ("8 2097152 thin 254:2 7", Code.INVALID_ARGUMENT),
        ("0 2097152 thin 254:2 seven", Code.INVALID_ARGUMENT),
        ("0 8 thin 254:2 7\n8 8 thin 254:2 8", Code.INVALID_ARGUMENT),
    ],
)
def test_another_table_is_refused_and_so_is_an_external_origin(line: str, code: Code) -> None:
    with pytest.raises(BlockferryError) as caught:
        parse_table(line)
    assert caught.value.code is code
