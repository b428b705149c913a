"""Every kind of bad request, unary and in bulk, from a client that knows only what server reflection tells: the right
status and google.rpc details, and nothing changed."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from tests.images import BLOCK, KIB, MIB, Snapshot, noise
from tests.reflected import PACKAGE, SIZE, Driven, Reflected, open_session
from tests.support import Server

TOP = (1 << 64) - 1
"""The largest unsigned number on the wire."""

INVALID = (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT")


def write_fields(**changed: Any) -> dict[str, Any]:
    """A good WriteRegion of one block, with fields replaced."""
    fields = {"offset": 0, "length": MIB, "writes": [{"offset": 0, "length": BLOCK}], "data": bytes(BLOCK)}
    return {**fields, **changed}


BAD_WRITES: dict[str, dict[str, Any]] = {
    "offset past the end": write_fields(offset=3 * MIB),
    "offset far past the end": write_fields(offset=1 << 63),
    "offset inside a region": write_fields(offset=BLOCK),
    "length 0": write_fields(length=0),
    "length 2^63": write_fields(length=1 << 63),
    "length of two regions": write_fields(length=2 * MIB),
    "length of a whole region at a short tail": write_fields(offset=2 * MIB),
    "too little data": write_fields(data=bytes(BLOCK - 1)),
    "too much data": write_fields(data=bytes(BLOCK + 1)),
    "no data": write_fields(data=b""),
    "data without extents": write_fields(writes=[]),
    "extent past the region": write_fields(writes=[{"offset": MIB - 1, "length": BLOCK}]),
    "extent of 4 GiB": write_fields(writes=[{"offset": 1, "length": (1 << 32) - 1}]),
    "empty extent": write_fields(writes=[{"offset": 0, "length": 0}], data=b""),
    "extents out of order": write_fields(
        writes=[{"offset": BLOCK, "length": BLOCK}, {"offset": 0, "length": BLOCK}], data=bytes(2 * BLOCK)
    ),
    "extents that overlap": write_fields(
        writes=[{"offset": 0, "length": BLOCK}, {"offset": 1, "length": BLOCK}], data=bytes(2 * BLOCK)
    ),
    "zeros past the region": write_fields(zeros=[{"offset": MIB, "length": 1}]),
    "empty zeros": write_fields(zeros=[{"offset": BLOCK, "length": 0}]),
    "zeros over data": write_fields(zeros=[{"offset": BLOCK - 1, "length": 1}]),
    "a short digest": write_fields(digest=b"short"),
}
BAD_UNMAPS: dict[str, dict[str, Any]] = {
    "offset past the end": {"offset": 3 * MIB, "length": MIB},
    "offset inside a region": {"offset": BLOCK, "length": MIB},
    "length 0": {"offset": 0, "length": 0},
    "length 2^63": {"offset": 0, "length": 1 << 63},
    "a sum past 2^64": {"offset": MIB, "length": TOP},
    "part of a region": {"offset": 0, "length": BLOCK},
    "past the end": {"offset": 2 * MIB, "length": MIB},
}
BAD_CHANGES = [("write", name) for name in BAD_WRITES] + [("unmap", name) for name in BAD_UNMAPS]


@pytest.mark.parametrize("bulk", [False, True], ids=["unary", "bulk"])
@pytest.mark.parametrize(("kind", "name"), BAD_CHANGES)
def test_a_bad_change_is_refused_whole(driven: Driven, kind: str, name: str, bulk: bool) -> None:
    driven.write(0, noise("kept", MIB))
    fields = (BAD_WRITES if kind == "write" else BAD_UNMAPS)[name]
    if bulk:
        request = {"sequence": 1, "session": driven.session, "changes": [{kind: fields}]}
        refusal = driven.client.refusal(f"{PACKAGE}.Replication/ApplyChanges", request)
    else:
        method = "WriteRegion" if kind == "write" else "UnmapRegion"
        refusal = driven.client.refusal(f"{PACKAGE}.Replication/{method}", {"session": driven.session, **fields})
    assert (refusal.status, refusal.reason) == INVALID
    assert refusal.domain == "blockferry"
    assert refusal.fields["volume"] == driven.volume
    assert refusal.fields["offset"] == str(fields["offset"])
    assert refusal.fields["length"] == str(fields["length"])
    assert refusal.fields["cause"] in refusal.message
    assert refusal.fields["next"] == "nothing was changed; correct the request"
    driven.commit()
    assert driven.read() == noise("kept", MIB) + bytes(SIZE - MIB)


@pytest.mark.parametrize("number", [0, 2, 3, TOP])
def test_sequence_numbers_out_of_order(driven: Driven, number: int) -> None:
    """A message in the wrong place is not applied; whether it is the first one or a later one."""
    good = {"sequence": 1, "session": driven.session, "changes": [{"write": write_fields(data=noise("one", BLOCK))}]}
    bad = {"changes": [{"write": write_fields(data=noise("two", BLOCK))}], "session": driven.session}
    path = f"{PACKAGE}.Replication/ApplyChanges"
    first = driven.client.refusal(path, {**bad, "sequence": number})
    later = driven.client.refusal(path, good, {**bad, "sequence": number if number != 2 else 1})
    for refusal, due in ((first, 1), (later, 2)):
        assert (refusal.status, refusal.reason) == INVALID
        assert "out of order" in refusal.message
        assert f"{due} was due" in refusal.fields["cause"]
    driven.commit()
    assert driven.read(0, 2 * BLOCK) == noise("one", BLOCK) + bytes(BLOCK)


def test_a_change_without_content(driven: Driven) -> None:
    request: dict[str, Any] = {"sequence": 1, "session": driven.session, "changes": [{}]}
    refusal = driven.client.refusal(f"{PACKAGE}.Replication/ApplyChanges", request)
    assert (refusal.status, refusal.reason) == INVALID


@pytest.mark.parametrize("session", ["unknown", "stale epoch", "epoch to come", "none"])
@pytest.mark.parametrize("method", ["WriteRegion", "UnmapRegion", "ApplyChanges", "CommitSessions", "GetAllocationMap"])
def test_a_session_that_is_not_the_open_one(driven: Driven, method: str, session: str) -> None:
    driven.write(0, noise("kept", BLOCK))
    other: dict[str, dict[str, Any]] = {
        "unknown": {"session_id": "0" * 32, "epoch": 1},
        "stale epoch": {**driven.session, "epoch": driven.session["epoch"] - 1},
        "epoch to come": {**driven.session, "epoch": driven.session["epoch"] + 1},
        "none": {},
    }
    ref = other[session]
    commit = {"session": ref, "volume": driven.volume, "commit_id": bytes(16)}
    requests: dict[str, dict[str, Any]] = {
        "WriteRegion": {"session": ref, **write_fields(data=noise("lost", BLOCK))},
        "UnmapRegion": {"session": ref, "offset": 0, "length": MIB},
        "ApplyChanges": {"sequence": 1, "session": ref, "changes": [{"unmap": {"offset": 0, "length": MIB}}]},
        "CommitSessions": {"commits": [commit]},
        "GetAllocationMap": {"session": ref},
    }
    refusal = driven.client.refusal(f"{PACKAGE}.Replication/{method}", requests[method])
    assert (refusal.status, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "STALE_EPOCH")
    assert refusal.fields["next"] == "run the sync again; it continues with what is already there"
    assert driven.commit().generation == 1
    assert driven.read(0, BLOCK) == noise("kept", BLOCK)


@pytest.mark.usefixtures("xfs_pool_root")  # elsewhere an update gives up the committed generation
def test_a_session_is_over_after_its_commit_or_abort(generic: Reflected, server: Server, volume: str) -> None:
    committed = open_session(generic, server, volume)
    committed.write(0, noise("kept", BLOCK))
    committed.commit()
    aborted = open_session(generic, server, volume)
    assert aborted.session["epoch"] > committed.session["epoch"]
    aborted.write(0, noise("dropped", BLOCK))
    aborted.replication("AbortSession", {"session": aborted.session, "discard": True})
    for driven in (committed, aborted):
        request = {"session": driven.session, **write_fields()}
        refusal = generic.refusal(f"{PACKAGE}.Replication/WriteRegion", request)
        assert (refusal.status, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "STALE_EPOCH")
    # Ending it again is no error.
    aborted.replication("AbortSession", {"session": aborted.session})
    assert committed.read(0, BLOCK) == noise("kept", BLOCK)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", ".a", "a b", "a\0", "x" * 300, "\u00f6"])
@pytest.mark.parametrize("path", ["Replication/OpenSession", "Replicas/GetReplica", "Replicas/ListRecoveryPoints"])
def test_a_bad_volume_name(generic: Reflected, server: Server, path: str, name: str) -> None:
    before = sorted(entry.name for entry in server.pool.iterdir())
    fields = {"protocol_version": 1, "size": SIZE} if path.endswith("OpenSession") else {}
    refusal = generic.refusal(f"{PACKAGE}.{path}", {"volume": name, **fields})
    assert (refusal.status, refusal.reason) == INVALID
    assert "is not a volume name" in refusal.message
    assert sorted(entry.name for entry in server.pool.iterdir()) == before


@pytest.mark.parametrize(
    "fields",
    [{"size": 0}, {"size": 1 << 63}, {"size": TOP}, {"protocol_version": 0}, {"region_size": 1},
     {"region_size": 3 * MIB}, {"region_size": 32 * MIB}, {"size": (1 << 48) + 1, "region_size": 64 * KIB}],
    ids=str,
)  # fmt: skip
def test_a_bad_session_request_makes_no_replica(
    generic: Reflected, server: Server, volume: str, fields: dict[str, Any]
) -> None:
    request = {"protocol_version": 1, "volume": volume, "size": SIZE, **fields}
    refusal = generic.refusal(f"{PACKAGE}.Replication/OpenSession", request)
    assert (refusal.status, refusal.reason) == INVALID
    assert refusal.fields["next"]
    assert not (server.pool / volume).exists()


@pytest.mark.parametrize("commit_id", [b"", b"short", bytes(17)])
def test_a_bad_commit_id(driven: Driven, commit_id: bytes) -> None:
    commit = {"session": driven.session, "volume": driven.volume, "commit_id": commit_id}
    refusal = driven.client.refusal(f"{PACKAGE}.Replication/CommitSessions", {"commits": [commit]})
    assert (refusal.status, refusal.reason) == INVALID
    assert driven.commit().generation == 1


@pytest.mark.parametrize(
    ("piece_size", "pieces"),
    [(MIB, [(0, 4)]), (MIB, [(3, 1)]), (MIB, [(0, 0)]), (MIB, [(TOP, 1)]), (MIB, [(1, TOP)]), (0, [(0, 1)]),
     (8192, [(0, 1)]), (2 * MIB, [(0, 1)])],
)  # fmt: skip
def test_bad_digest_requests(driven: Driven, piece_size: int, pieces: list[tuple[int, int]]) -> None:
    request = {
        "session": driven.session,
        "piece_size": piece_size,
        "pieces": [{"first": first, "count": count} for first, count in pieces],
    }
    refusal = driven.client.refusal(f"{PACKAGE}.Replication/GetRegionDigests", request)
    assert (refusal.status, refusal.reason) == INVALID


@pytest.mark.parametrize("size", [1, 16, 31, 33, 64])
@pytest.mark.parametrize("target", ["session", "point"])
def test_a_digest_key_of_another_size(driven: Driven, target: str, size: int) -> None:
    if target == "point":
        driven.commit()
    of = {"session": driven.session} if target == "session" else {"point": {"volume": driven.volume}}
    request = {**of, "piece_size": MIB, "pieces": [{"first": 0, "count": 1}], "key": bytes(size)}
    refusal = driven.client.refusal(f"{PACKAGE}.Replication/GetRegionDigests", request)
    assert (refusal.status, refusal.reason) == INVALID
    assert refusal.fields["cause"] == "a key has 32 bytes"


@pytest.mark.parametrize(("offset", "length"), [(0, 0), (0, 1 << 63), (SIZE, 1), (SIZE - 1, 2), (TOP, TOP), (1, TOP)])
def test_bad_reads(driven: Driven, offset: int, length: int) -> None:
    driven.commit()
    request = {"point": {"volume": driven.volume}, "ranges": [{"offset": offset, "length": length}]}
    refusal = driven.client.refusal(f"{PACKAGE}.Replicas/ReadRegions", request)
    assert (refusal.status, refusal.reason) == INVALID
    assert (refusal.fields["offset"], refusal.fields["length"]) == (str(offset), str(length))


def test_reading_what_is_not_there(driven: Driven, volume: str) -> None:
    ranges = [{"offset": 0, "length": 1}]
    for point in ({"volume": f"{volume}-missing"}, {"volume": driven.volume}, {"volume": driven.volume, "number": 7}):
        refusal = driven.client.refusal(f"{PACKAGE}.Replicas/ReadRegions", {"point": point, "ranges": ranges})
        assert (refusal.status, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "NOT_FOUND")
        assert refusal.fields["volume"] == point["volume"]


def test_snapshot_of_an_empty_replica_is_one_hole(driven: Driven) -> None:
    driven.commit()
    assert driven.server.snapshot(driven.volume) == Snapshot.empty(SIZE)
