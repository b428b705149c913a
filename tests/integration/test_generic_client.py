"""Any gRPC client can drive a replica: a whole sync by hand, with nothing but what server reflection tells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from tests.images import BLOCK, KIB, MIB, noise
from tests.reflected import PACKAGE, SIZE, Driven, Reflected, open_session
from tests.support import Server


def test_everything_is_described_and_healthy(generic: Reflected) -> None:
    assert generic.services == [
        f"{PACKAGE}.Replicas", f"{PACKAGE}.Replication", "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    ]  # fmt: skip
    assert generic.methods(f"{PACKAGE}.Replication") == [
        "OpenSession", "GetAllocationMap", "GetRegionDigests", "WriteRegion", "UnmapRegion", "ApplyChanges",
        "CommitSessions", "AbortSession",
    ]  # fmt: skip
    for service in ("", f"{PACKAGE}.Replication", f"{PACKAGE}.Replicas"):
        (answer,) = generic.call("grpc.health.v1.Health/Check", {"service": service})
        assert answer.status == 1  # SERVING


def region_digest(data: bytes, key: bytes) -> bytes:
    """The digest of a region or a smaller piece, as docs/protocol.md defines it."""
    pieces = [data[at : at + 65536] for at in range(0, len(data), 65536)]
    if len(pieces) == 1:
        return blake3(data, key=key).digest(16)
    return blake3(b"".join(blake3(piece, key=key).digest(16) for piece in pieces), key=key).digest(16)


def test_a_whole_sync_by_unary_calls(driven: Driven) -> None:
    opened = driven.opened
    assert (opened.protocol_version, opened.size, opened.region_size, opened.generation) == (1, SIZE, MIB, 0)
    assert (len(opened.replica_uuid), len(opened.digest_key), opened.commit_id) == (16, 32, b"")
    header, runs = driven.map({"session": driven.session})
    assert (header.size, header.region_size, header.provenance, runs) == (SIZE, MIB, 1, [])

    first, tail = noise("first", 3 * BLOCK), noise("tail", 100)
    assert driven.write(0, first, at=BLOCK).bytes_written == len(first)
    assert driven.write(MIB, noise("goes", MIB)).bytes_written == MIB
    assert driven.write(2 * MIB, tail, length=100).bytes_written == 100
    _, runs = driven.map({"session": driven.session})
    assert runs == [(0, 3)]
    (answer,) = driven.replication("UnmapRegion", {"session": driven.session, "offset": MIB, "length": MIB})
    assert answer.result.bytes_unmapped == MIB
    _, runs = driven.map({"session": driven.session})
    assert runs == [(0, 1), (2, 1)]

    content = bytes(BLOCK) + first + bytes(2 * MIB - 4 * BLOCK) + tail
    pieces = [{"first": 0, "count": 3}]
    asked = {"session": driven.session, "piece_size": MIB, "pieces": pieces}
    answers = driven.replication("GetRegionDigests", asked)
    regions = [content[at : at + MIB] for at in range(0, SIZE, MIB)]
    wanted = b"".join(region_digest(region, opened.digest_key) for region in regions)
    assert b"".join(answer.digests for answer in answers) == wanted
    # What the regions hold that were written follows from the messages, and the unmapped one is a hole.
    assert sum(answer.bytes_read for answer in answers) == 0
    answers = driven.replication("GetRegionDigests", {**asked, "bypass_cache": True})
    assert b"".join(answer.digests for answer in answers) == wanted
    # Of the disk: what it does not hold is not read.
    assert sum(answer.bytes_read for answer in answers) == 3 * BLOCK + 100

    committed = driven.commit()
    assert (committed.volume, committed.generation) == (driven.volume, 1)
    assert driven.read() == content
    assert driven.read(BLOCK - 1, 2) == content[BLOCK - 1 : BLOCK + 1]
    (shown,) = driven.replicas("GetReplica", volume=driven.volume)
    assert (shown.replica.generation, shown.replica.size, shown.replica.state) == (1, SIZE, 3)
    assert Path(shown.replica.path).read_bytes() == content
    (points,) = driven.replicas("ListRecoveryPoints", volume=driven.volume)
    assert [(point.number, point.commit_id) for point in points.points] == [(1, committed.commit_id)]


@pytest.mark.parametrize("piece_size", [4 * KIB, 64 * KIB])
def test_digests_of_small_pieces(driven: Driven, piece_size: int) -> None:
    data = noise("pieces", MIB)
    driven.write(0, data)
    pieces = [{"first": 1, "count": 2}, {"first": 7, "count": 1}]
    asked = {"session": driven.session, "piece_size": piece_size, "pieces": pieces}
    answers = driven.replication("GetRegionDigests", asked)
    wanted = [
        blake3(data[at * piece_size : (at + 1) * piece_size], key=driven.opened.digest_key).digest(8)
        for at in (1, 2, 7)
    ]
    assert b"".join(answer.digests for answer in answers) == b"".join(wanted)


OTHER_KEY = bytes(range(32))


@pytest.mark.parametrize("piece_size", [4 * KIB, 64 * KIB, MIB])
@pytest.mark.parametrize("key", ["own", "other"])
def test_digests_of_a_session_under_a_key_of_the_clients(driven: Driven, piece_size: int, key: str) -> None:
    """Known digests answer for the replica's own key alone, and those of another key are never remembered."""
    data = noise("keyed", MIB)
    driven.write(0, data)
    size, count = (16 if piece_size == MIB else 8), MIB // piece_size
    asked = {"session": driven.session, "piece_size": piece_size, "pieces": [{"first": 0, "count": count}]}
    own = driven.opened.digest_key
    for used, given in ((own if key == "own" else OTHER_KEY,) * 2, (own, b"")):
        answers = driven.replication("GetRegionDigests", {**asked, "key": given})
        wanted = [region_digest(data[at : at + piece_size], used)[:size] for at in range(0, MIB, piece_size)]
        assert b"".join(answer.digests for answer in answers) == b"".join(wanted)
        known = piece_size == MIB and used == own
        assert sum(answer.bytes_read for answer in answers) == (0 if known else MIB)


def test_the_same_changes_have_the_same_effect_unary_and_in_bulk(
    generic: Reflected, server: Server, volume: str
) -> None:
    changes: list[dict[str, dict[str, Any]]] = [
        # The third one leaves its first block alone: it is there already, and the sender says it has not compared.
        {"write": {"offset": 0, "length": MIB, "writes": [{"offset": 0, "length": MIB}], "data": noise(1, MIB)}},
        {
            "write": {
                "offset": 0, "length": MIB,
                "writes": [{"offset": BLOCK, "length": BLOCK}, {"offset": 9 * BLOCK, "length": 10}],
                "zeros": [{"offset": 3 * BLOCK, "length": 2 * BLOCK}], "data": noise(2, BLOCK + 10),
            }
        },
        {"write": {"offset": 0, "length": MIB, "writes": [{"offset": 0, "length": 2 * BLOCK}],
                   "data": noise(1, MIB)[:BLOCK] + noise(3, BLOCK), "uncompared": True}},
        {"write": {"offset": MIB, "length": MIB, "writes": [{"offset": 0, "length": MIB}], "data": noise(4, MIB)}},
        {"write": {"offset": MIB, "length": MIB, "digest": b"not the digest!!"}},
        {"unmap": {"offset": MIB, "length": MIB + 100}},
    ]  # fmt: skip
    unary = open_session(generic, server, f"{volume}-unary")
    bulk = open_session(generic, server, f"{volume}-bulk")

    results = []
    for change in changes:
        ((kind, fields),) = change.items()
        method = "WriteRegion" if kind == "write" else "UnmapRegion"
        (answer,) = unary.replication(method, {"session": unary.session, **fields})
        results.append(answer.result)
    messages: list[dict[str, Any]] = [
        {"sequence": number, "changes": [change]} for number, change in enumerate(changes, 1)
    ]
    messages[0]["session"] = bulk.session
    messages[-1]["flush"] = True
    answers = bulk.replication("ApplyChanges", *messages)

    # Acknowledgements are cumulative: several messages may share one.
    received = [answer.received for answer in answers]
    assert received == sorted(received)
    assert {(answer.received, answer.durable) for answer in answers if answer.durable} == {(len(changes), len(changes))}
    for name in ("bytes_written", "bytes_unmapped", "bytes_read"):
        assert sum(getattr(answer.totals, name) for answer in answers) == sum(getattr(one, name) for one in results)
    assert [result.bytes_written for result in results] == [MIB, BLOCK + 10, BLOCK, MIB, 0, 0]
    assert [result.bytes_unmapped for result in results] == [0, 2 * BLOCK, 0, 0, 0, MIB]
    assert [result.mismatch for result in results] == [False, False, False, False, True, False]
    assert [offset for answer in answers for offset in answer.mismatched_offsets] == [MIB]
    unary.commit()
    bulk.commit()
    assert unary.read() == bulk.read()
    one, other = (server.snapshot(driven.volume) for driven in (unary, bulk))
    assert one == other
