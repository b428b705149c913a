"""Records, names and frames; everything that was altered is refused."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator

import msgspec
import pytest
from blockferry.common.archive import format
from blockferry.common.archive.format import HEADER, Kind, LogName
from blockferry.common.archive.seal import Sealer
from blockferry.common.errors import BlockferryError, Code
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.archive import examples
from tests.unit.archive.examples import ATTEMPT, KEY, OTHER, VOLUME, some


@contextlib.contextmanager
def refused(code: Code = Code.CORRUPT_STATE) -> Iterator[None]:
    """The body must be refused with this code, and with the name of the object."""
    with pytest.raises(BlockferryError) as told:
        yield
    assert told.value.code is code and "object-1" in told.value.line(), told.value


# --- names ----------------------------------------------------------------------------------------------------------


def test_names_of_objects() -> None:
    volume, attempt = bytes(16), bytes([255] * 16)
    assert format.data_name(volume, attempt, 3) == "0" * 32 + "/data/" + "f" * 32 + "-000003"
    assert format.meta_name(volume, attempt, 1_000_000) == "0" * 32 + "/meta/" + "f" * 32 + "-1000000"
    assert format.log_name(volume, 12) == "0" * 32 + "/log/0000000012"
    assert format.log_name(volume, 12, attempt) == "0" * 32 + "/log/0000000012-" + "f" * 32
    assert format.attempt_name(volume, attempt) == "0" * 32 + "/attempts/" + "f" * 32
    assert format.pin_name(volume, attempt) == "0" * 32 + "/pins/" + "f" * 32
    assert format.volume_name("db") == "names/db" and format.key_name("ab") == "keys/ab"


def test_names_of_log_records_say_their_number() -> None:
    name = format.log_name(VOLUME, 12)
    assert format.parse_log_name(name) == LogName(12, None, False)
    name = format.log_name(VOLUME, 9_999_999_999, ATTEMPT)
    assert format.parse_log_name(name) == LogName(9_999_999_999, ATTEMPT, False)
    assert format.parse_log_name(name + format.DONE) == LogName(9_999_999_999, ATTEMPT, True)
    for other in (
        "",
        "1",
        "0000000000",
        "00000000012",
        "000000001a",
        "0000000001.done",
        "0000000001-ab",
        "0000000001-" + "a" * 32 + ".d",
    ):
        assert format.parse_log_name(f"{VOLUME.hex()}/log/{other}") is None, other


# --- records --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", examples.RECORDS)
def test_records_are_json_without_white_space_in_the_order_of_the_document(name: str) -> None:
    record = examples.RECORDS[name]
    data = format.encode(record)
    assert format.decode(data, type(record), "object-1") == record
    loaded = json.loads(data)
    assert list(loaded) == list(record.__struct_fields__)
    assert json.dumps(loaded, separators=(",", ":"), ensure_ascii=False).encode() == data


@pytest.mark.parametrize("name", examples.RECORDS)
def test_records_with_a_field_missing_or_unknown_or_of_another_type_are_refused(name: str) -> None:
    record = examples.RECORDS[name]
    whole = json.loads(format.encode(record))
    with refused():
        format.decode(json.dumps({**whole, "more": 1}).encode(), type(record), "object-1")
    for field, value in whole.items():
        # These two have the only value they may have for their default.
        fewer = {key: other for key, other in whole.items() if key != field}
        if field not in ("format", "version", "chunk_size", "block_size") or not isinstance(record, format.Archive):
            with refused():
                format.decode(json.dumps(fewer).encode(), type(record), "object-1")
        wrong = {**whole, field: ["x"] if not isinstance(value, list) else 5}
        with refused():
            format.decode(json.dumps(wrong).encode(), type(record), "object-1")


ALTERED = [
    (examples.ARCHIVE, "format", "tar"),
    (examples.ARCHIVE, "id", "AB" * 16),
    (examples.ARCHIVE, "chunk_size", 1 << 25),
    (examples.ARCHIVE, "block_size", 1 << 17),
    (examples.ARCHIVE, "compression", "zstd:20"),
    (examples.ARCHIVE, "compression", "zstd:0"),
    (examples.ARCHIVE, "compression", "lz4"),
    (examples.ARCHIVE, "encryption", "rot13"),
    (examples.NAME, "volume", "12"),
    (examples.SUPERBLOCK, "volume", VOLUME.hex() + "\n"),
    (examples.SUPERBLOCK, "size", 0),
    (examples.SUPERBLOCK, "size", -1),
    (examples.SUPERBLOCK, "size", 299 * format.ARCHIVE_BLOCK),
    (examples.SUPERBLOCK, "block_size", 4096),
    (examples.SUPERBLOCK, "base", 7),
    (examples.SUPERBLOCK, "seen", 7),
    (examples.SUPERBLOCK, "base_attempt", "x"),
    (examples.SUPERBLOCK, "stored", 1 << 63),
    (examples.DELETION, "grace", -1),
    (examples.RUNNING, "attempt", ""),
    (examples.READING, "renewals", -1),
]


@pytest.mark.parametrize(("record", "field", "value"), ALTERED, ids=lambda value: str(value)[:20])
def test_records_with_values_that_cannot_be_are_refused(record: format.Record, field: str, value: object) -> None:
    whole = {**json.loads(format.encode(record)), field: value}
    with refused():
        format.decode(json.dumps(whole).encode(), type(record), "object-1")


def test_what_is_inside_of_a_record_is_looked_at_too() -> None:
    whole = json.loads(format.encode(examples.SUPERBLOCK))
    for field, value in {"attempt": "zz", "chunk": -1, "length": 1 << 64}.items():
        with refused():
            altered = {**whole, "root": {**whole["root"], field: value}}
            format.decode(json.dumps(altered).encode(), format.Superblock, "object-1")
    whole = json.loads(format.encode(examples.DELETION))
    for field, value in {"attempt": "zz", "kind": "log", "count": -1}.items():
        with refused():
            altered = {**whole, "chunks": [{**whole["chunks"][0], field: value}]}
            format.decode(json.dumps(altered).encode(), format.Deletion, "object-1")


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"version":"1"}'])
def test_what_is_no_json_object_is_refused(data: bytes) -> None:
    with refused():
        format.decode(data, format.Archive, "object-1")


def test_a_later_version_is_unsupported_and_not_damaged_whatever_fields_it_has() -> None:
    whole = {**json.loads(format.encode(examples.ARCHIVE)), "version": 2}
    for later in (whole, {**whole, "more": True}, {"version": 3}):
        with refused(Code.UNSUPPORTED):
            format.decode(json.dumps(later).encode(), format.Archive, "object-1")


# --- frames ---------------------------------------------------------------------------------------------------------

BODY = b"some body, some body, some body, some body"
SEALERS = {"plain": Sealer(None, VOLUME), "encrypted": Sealer(KEY, VOLUME)}


@pytest.fixture(params=SEALERS)
def sealer(request: pytest.FixtureRequest) -> Sealer:
    return SEALERS[request.param]


@given(st.binary(max_size=2000), st.integers(0, (1 << 64) - 1), st.integers(0, 1 << 24), st.sampled_from(list(Kind)))
def test_frames_come_back(body: bytes, number: int, offset: int, kind: Kind) -> None:
    for sealer in SEALERS.values():
        frame = sealer.seal_frame(kind, ATTEMPT, body, number=number, offset=offset)
        assert sealer.open_frame(kind, frame, "object-1", number=number, offset=offset) == (ATTEMPT, body)


def test_what_packs_is_packed_and_what_does_not_is_not(sealer: Sealer) -> None:
    for body, flag in ((bytes(5000), 1), (some("x", 5000), 0)):
        frame = sealer.seal_frame(Kind.NODE, ATTEMPT, body)
        assert frame[6] & 1 == flag
        assert (len(frame) < 200) == bool(flag)


def test_every_bit_of_a_frame_counts(sealer: Sealer) -> None:
    frame = sealer.seal_frame(Kind.NODE, ATTEMPT, BODY, number=5, offset=77)
    for bit in range(len(frame) * 8):
        altered = bytearray(frame)
        altered[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BlockferryError) as told:
            sealer.open_frame(Kind.NODE, altered, "object-1", number=5, offset=77)
        expected = Code.UNSUPPORTED if bit // 8 == 4 else Code.CORRUPT_STATE
        assert told.value.code is expected and "object-1" in told.value.line(), bit


def test_frames_that_are_cut_or_longer_are_refused(sealer: Sealer) -> None:
    frame = sealer.seal_frame(Kind.NODE, ATTEMPT, BODY)
    for altered in (*(frame[:length] for length in range(len(frame))), frame + b"\0"):
        with refused():
            sealer.open_frame(Kind.NODE, altered, "object-1")


def test_frames_belong_where_they_are(sealer: Sealer) -> None:
    frame = sealer.seal_frame(Kind.NODE, ATTEMPT, BODY, number=5, offset=77)
    elsewhere = Sealer(KEY if sealer.encrypted else None, OTHER)
    for kind, opener, number, offset in (
        (Kind.TRAILER, sealer, 5, 77),
        (Kind.NODE, elsewhere, 5, 77),
        (Kind.NODE, sealer, 6, 77),
        (Kind.NODE, sealer, 5, 0),
    ):
        with refused():
            opener.open_frame(kind, frame, "object-1", number=number, offset=offset)
    assert sealer.open_frame(Kind.NODE, frame, "object-1", number=5, offset=77)[1] == BODY


def test_a_plain_frame_is_none_of_an_encrypted_archive_and_the_other_way_round() -> None:
    for one, other in (("plain", "encrypted"), ("encrypted", "plain")):
        frame = SEALERS[one].seal_frame(Kind.NODE, ATTEMPT, BODY)
        with refused():
            SEALERS[other].open_frame(Kind.NODE, frame, "object-1")


def test_another_key_opens_nothing() -> None:
    frame = SEALERS["encrypted"].seal_frame(Kind.NODE, ATTEMPT, BODY)
    assert BODY not in frame and some("x", 8) not in frame
    with refused():
        Sealer(some("another key", 32), VOLUME).open_frame(Kind.NODE, frame, "object-1")


def test_a_body_that_would_unpack_to_more_than_anybody_needs_is_refused_unread() -> None:
    frame = bytearray(SEALERS["plain"].seal_frame(Kind.NODE, ATTEMPT, bytes(5000)))
    fields = list(HEADER.unpack_from(frame))
    fields[5] = format.MAX_BODY + 1
    frame[: HEADER.size] = HEADER.pack(*fields)
    with refused():
        SEALERS["plain"].open_frame(Kind.NODE, frame, "object-1")


def test_records_are_structs_that_cannot_change() -> None:
    with pytest.raises(AttributeError):
        examples.ARCHIVE.version = 2  # type: ignore[misc]
    assert msgspec.structs.asdict(examples.ARCHIVE)["version"] == 1
