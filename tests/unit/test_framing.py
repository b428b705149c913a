"""Messages built and taken apart in place are the very messages the generated classes build and parse."""

from __future__ import annotations

import pytest
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.framing import (
    Incoming,
    Outgoing,
    decode_request,
    encode_request,
    encode_unmap,
    encode_write,
)
from blockferry.v1 import replication_pb2 as pb
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

numbers = st.one_of(st.just(0), st.integers(0, 2**64 - 1))
small = st.integers(0, 2**32 - 1)
extents = st.lists(st.builds(pb.Extent, offset=small, length=small), max_size=3)
refs = st.builds(pb.SessionRef, session_id=st.text(max_size=5), epoch=numbers)

# Sizes at which the length of a length changes.
payloads = st.one_of(st.binary(max_size=300), st.sampled_from([127, 128, 16383, 16384]).map(bytes))

writes = st.builds(
    pb.WriteRegionRequest,
    session=st.none() | refs, offset=numbers, length=numbers, writes=extents, zeros=extents,
    data=payloads, digest=st.binary(max_size=16), uncompared=st.booleans(),
)  # fmt: skip
unmaps = st.builds(pb.UnmapRegionRequest, session=st.none() | refs, offset=numbers, length=numbers)
written, unmapped = st.builds(pb.Change, write=writes), st.builds(pb.Change, unmap=unmaps)
changes = st.one_of(written, unmapped, st.just(pb.Change()))
heads = st.builds(pb.ApplyChangesRequest, sequence=numbers, session=st.none() | refs, flush=st.booleans())


def encoded(change: pb.Change, cut: int = 1) -> Outgoing:
    """As the sender builds it: a write's data in pieces of `cut` bytes."""
    if change.HasField("unmap"):
        return encode_unmap(change.unmap)
    request = pb.WriteRegionRequest()
    request.CopyFrom(change.write)
    data = memoryview(request.data)
    request.ClearField("data")
    return encode_write(request, [data[start : start + cut] for start in range(0, len(data), cut)])


def check_same(found: Incoming, change: pb.Change) -> None:
    """What was taken apart is what the generated class says."""
    match change.WhichOneof("change"):
        case "write":
            assert isinstance(found.request, pb.WriteRegionRequest)
            assert found.request.data == b""
            whole = pb.WriteRegionRequest()
            whole.CopyFrom(found.request)
            whole.data = bytes(found.data)
            assert whole == change.write
        case "unmap":
            assert (found.request, bytes(found.data)) == (change.unmap, b"")
        case _:
            assert (found.request, bytes(found.data)) == (None, b"")


@given(
    heads, st.lists(changes.filter(lambda one: one.WhichOneof("change") is not None), max_size=4), st.integers(1, 99)
)
def test_what_is_built_in_place_is_what_the_generated_classes_parse(
    head: pb.ApplyChangesRequest, sent: list[pb.Change], cut: int
) -> None:
    outgoing = [encoded(change, cut) for change in sent]
    message = encode_request(head, outgoing)
    expected = pb.ApplyChangesRequest()
    expected.CopyFrom(head)
    expected.changes.extend(sent)
    assert pb.ApplyChangesRequest.FromString(message) == expected
    assert sum(change.size for change in outgoing) == len(message) - head.ByteSize()
    assert [change.payload for change in outgoing] == [len(change.write.data) for change in sent]


@given(heads, st.lists(changes, max_size=4))
def test_what_any_client_sends_is_taken_apart_alike(head: pb.ApplyChangesRequest, sent: list[pb.Change]) -> None:
    message = pb.ApplyChangesRequest()
    message.CopyFrom(head)
    message.changes.extend(sent)
    found, arrived = decode_request(message.SerializeToString())
    assert found == head
    assert len(arrived) == len(sent)
    for one, change in zip(arrived, sent, strict=True):
        check_same(one, change)


def test_data_is_a_view_of_the_message_and_not_a_copy() -> None:
    message = encode_request(pb.ApplyChangesRequest(), [encode_write(pb.WriteRegionRequest(), [b"x" * 1000])])
    _, (found,) = decode_request(message)
    assert found.data.obj is message


def test_unknown_fields_are_passed_over() -> None:
    # Field 1000 with each wire type a newer client could use: varint, 64 bits, length, 32 bits.
    extra = b"\xc0\x3e\x05" + b"\xc1\x3e12345678" + b"\xc2\x3e\x02ab" + b"\xc5\x3e1234"
    write = pb.WriteRegionRequest(offset=1, data=b"abc").SerializeToString() + extra
    change = b"\x0a" + bytes([len(write)]) + write + extra
    head = pb.ApplyChangesRequest(sequence=7).SerializeToString()
    whole = pb.ApplyChangesRequest.FromString(head + b"\x1a" + bytes([len(change)]) + change)
    assert whole.changes[0].write.offset == 1
    found, (one,) = decode_request(head + extra + b"\x1a" + bytes([len(change)]) + change + extra)
    assert (found.sequence, bytes(one.data)) == (7, b"abc")
    assert isinstance(one.request, pb.WriteRegionRequest) and one.request.offset == 1


def lengthened(number: int, content: bytes) -> bytes:
    """One field with a length, as it is on the wire; for content of less than 128 bytes."""
    assert len(content) < 128
    return bytes([number << 3 | 2, len(content)]) + content


WRITTEN = lengthened(1, pb.WriteRegionRequest(offset=1, data=b"abc").SerializeToString())
UNMAPPED = lengthened(2, pb.UnmapRegionRequest(offset=5, length=6).SerializeToString())
MARKED = lengthened(1, pb.WriteRegionRequest(uncompared=True).SerializeToString())
EMPTY_UNMAP = lengthened(2, b"")


@pytest.mark.parametrize(
    "members",
    [
        pytest.param([WRITTEN, MARKED], id="two writes"),
        pytest.param([MARKED, WRITTEN], id="two writes, the other way round"),
        pytest.param([WRITTEN, WRITTEN], id="the same write twice"),
        pytest.param([UNMAPPED, UNMAPPED], id="two unmaps"),
        pytest.param([EMPTY_UNMAP, EMPTY_UNMAP], id="two empty unmaps"),
        pytest.param([WRITTEN, UNMAPPED], id="a write and an unmap"),
        pytest.param([UNMAPPED, WRITTEN], id="an unmap and a write"),
        pytest.param([EMPTY_UNMAP, WRITTEN, MARKED], id="three"),
    ],
)
def test_a_change_of_more_than_one_write_or_unmap_is_refused(members: list[bytes]) -> None:
    """Protobuf merges them; one stands for itself."""
    for one in members:
        _, (found,) = decode_request(lengthened(3, one))
        assert found.request is not None
    message = lengthened(3, b"".join(members))
    assert len(pb.ApplyChangesRequest.FromString(message).changes) == 1
    with pytest.raises(BlockferryError) as caught:
        decode_request(message)
    assert caught.value.code is Code.PROTOCOL
    assert "more than one write or unmap" in caught.value.cause
    # Each in a change of its own they are as many changes.
    assert len(decode_request(b"".join(lengthened(3, one) for one in members))[1]) == len(members)


def accepted(message: bytes) -> bool:
    try:
        pb.ApplyChangesRequest.FromString(message)
    except DecodeError:
        return False
    return True


@given(heads, st.lists(changes, min_size=1, max_size=2), st.data())
def test_a_damaged_message_is_a_protocol_error_or_a_message(
    head: pb.ApplyChangesRequest, sent: list[pb.Change], data: st.DataObject
) -> None:
    message = bytearray(encode_request(head, [encoded(change, 50) for change in sent]))
    position = data.draw(st.integers(0, len(message) - 1))
    if data.draw(st.booleans()):
        del message[position:]
    else:
        message[position] ^= data.draw(st.integers(1, 255))
    try:
        decode_request(bytes(message))
    except BlockferryError as error:
        code: Code | None = error.code
    else:
        code = None
    # Whatever the generated classes refuse is refused here, too.
    assert code in ({None, Code.PROTOCOL} if accepted(bytes(message)) else {Code.PROTOCOL})


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(b"\x1a\x05\x0a", id="shorter than it says"),
        pytest.param(b"\x1a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", id="length 2**64-1"),
        pytest.param(b"\x1a" + b"\xff" * 11, id="endless number"),
        pytest.param(b"\x80", id="cut inside a tag"),
        pytest.param(b"\x02\x00", id="field 0"),
        pytest.param(b"\x0b", id="wire type 3"),
        pytest.param(b"\x0e", id="wire type 6"),
        pytest.param(b"\x1a\x04\x0a\x02\x32\x09", id="data longer than its change"),
        pytest.param(b"\x12\x03\x0a\x01\xff", id="session id that is no text"),
    ],
)
def test_what_is_no_message_is_refused(message: bytes) -> None:
    with pytest.raises(BlockferryError) as caught:
        decode_request(message)
    assert caught.value.code is Code.PROTOCOL
