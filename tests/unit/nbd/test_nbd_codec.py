"""Messages of NBD: what is written is read, the bytes are those of the protocol's document, and whatever bytes arrive
there is no exception but ProtocolError."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest
from blockferry.common.nbd import handshake, protocol, transmission
from blockferry.common.nbd.protocol import ProtocolError
from hypothesis import example, given, settings
from hypothesis import strategies as st

U16 = st.integers(0, (1 << 16) - 1)
U32 = st.integers(0, (1 << 32) - 1)
U64 = st.integers(0, (1 << 64) - 1)
TEXT = st.text(max_size=300).map(lambda text: text.replace("\0", ""))
OPTION_LENGTH = st.integers(0, protocol.MAX_OPTION_PAYLOAD)
SIZE = st.integers(0, (1 << 63) - 1)
FLAGS = U16.map(lambda flags: protocol.TransmissionFlag(flags | 1))


@given(U16)
def test_greeting(flags: int) -> None:
    assert handshake.decode_greeting(handshake.encode_greeting(flags)) == flags


@given(st.integers(0, 3))
def test_client_flags(flags: int) -> None:
    assert handshake.decode_client_flags(handshake.encode_client_flags(flags)) == flags


@given(U32, st.binary(max_size=100))
def test_options(option: int, payload: bytes) -> None:
    data = handshake.encode_option(option, payload)
    header = handshake.OptionHeader.decode(data[: handshake.OPTION_HEADER_SIZE])
    assert header == handshake.OptionHeader(option, len(payload))
    assert data[handshake.OPTION_HEADER_SIZE :] == payload


@given(U32, U32, st.binary(max_size=100))
def test_option_replies(option: int, reply: int, payload: bytes) -> None:
    data = handshake.encode_option_reply(option, reply, payload)
    header = handshake.OptionReplyHeader.decode(data[: handshake.OPTION_REPLY_HEADER_SIZE])
    assert header == handshake.OptionReplyHeader(option, reply, len(payload))
    assert header.is_error == (reply >= 1 << 31)
    assert data[handshake.OPTION_REPLY_HEADER_SIZE :] == payload


@given(st.builds(handshake.GoRequest, TEXT, st.lists(U16, max_size=8).map(tuple)))
def test_go(message: handshake.GoRequest) -> None:
    assert handshake.GoRequest.decode(message.encode()) == message


@given(st.builds(handshake.MetaContextRequest, TEXT, st.lists(TEXT, max_size=8).map(tuple)))
def test_meta_context_requests(message: handshake.MetaContextRequest) -> None:
    assert handshake.MetaContextRequest.decode(message.encode()) == message


@given(st.builds(handshake.MetaContext, U32, TEXT))
def test_meta_contexts(message: handshake.MetaContext) -> None:
    assert handshake.MetaContext.decode(message.encode()) == message


@given(st.builds(handshake.ListedExport, TEXT, TEXT))
def test_listed_exports(message: handshake.ListedExport) -> None:
    assert handshake.ListedExport.decode(message.encode()) == message


@given(
    st.one_of(
        st.builds(handshake.ExportInfo, SIZE, FLAGS),
        st.builds(handshake.NameInfo, TEXT),
        st.builds(handshake.DescriptionInfo, TEXT),
        st.builds(
            handshake.BlockSizes,
            st.integers(0, 16).map(lambda power: 1 << power),
            U32,
            st.integers(1 << 16, (1 << 32) - 1),
        ),
        st.builds(handshake.OtherInfo, st.integers(4, (1 << 16) - 1)),
    )
)
def test_infos(info: handshake.AnyInfo) -> None:
    assert handshake.decode_info(handshake.encode_info(info)) == info


@given(st.builds(handshake.ExportInfo, SIZE, FLAGS))
def test_the_reply_to_export_name(info: handshake.ExportInfo) -> None:
    assert handshake.ExportInfo.decode(info.encode()) == info


@given(st.builds(transmission.Request, st.sampled_from(protocol.Command), U64, U64, st.integers(0, 1 << 25), U16))
def test_requests(request: transmission.Request) -> None:
    assert transmission.Request.decode(request.encode()) == request


@given(st.builds(transmission.SimpleReply, U64, U32))
def test_simple_replies(reply: transmission.SimpleReply) -> None:
    data = reply.encode()
    assert transmission.reply_header_size(data[:4]) == len(data)
    assert transmission.decode_reply_header(data) == reply


@st.composite
def chunks(draw: st.DrawFn) -> transmission.Chunk:
    kind = draw(st.sampled_from(protocol.ChunkKind))
    least, most = transmission._LENGTHS[kind]
    length = draw(st.integers(least, most))
    if kind is protocol.ChunkKind.BLOCK_STATUS:
        length -= (length - 4) % 8
    return transmission.Chunk(draw(U64), kind, length, kind is protocol.ChunkKind.NONE or draw(st.booleans()))


@given(chunks())
def test_chunks(chunk: transmission.Chunk) -> None:
    data = chunk.encode()
    assert transmission.reply_header_size(data[:4]) == len(data)
    assert transmission.decode_reply_header(data) == chunk


@given(U64, st.integers(1, (1 << 32) - 1))
def test_offsets_and_holes(offset: int, length: int) -> None:
    assert transmission.decode_offset(transmission.encode_offset(offset)) == offset
    assert transmission.decode_hole(transmission.encode_hole(offset, length)) == (offset, length)


@given(
    st.builds(
        transmission.BlockStatus,
        U32,
        st.lists(st.tuples(st.integers(1, (1 << 32) - 1), U32), min_size=1, max_size=50).map(tuple),
    )
)
def test_block_status(status: transmission.BlockStatus) -> None:
    assert transmission.BlockStatus.decode(status.encode()) == status


@given(st.builds(transmission.ErrorChunk, st.integers(1, (1 << 32) - 1), TEXT, st.none() | U64))
def test_error_chunks(error: transmission.ErrorChunk) -> None:
    kind = protocol.ChunkKind.ERROR if error.offset is None else protocol.ChunkKind.ERROR_OFFSET
    assert transmission.ErrorChunk.decode(kind, error.encode()) == error


@given(st.binary(min_size=8, max_size=30), U64)
def test_a_reply_of_several_chunks(data: bytes, cookie: int) -> None:
    found = transmission.encode_chunks(cookie, [(protocol.ChunkKind.OFFSET_DATA, data), (protocol.ChunkKind.NONE, b"")])
    assert found == (
        struct.pack(">IHHQI", 0x668E33EF, 0, 1, cookie, len(data)) + data
        + struct.pack(">IHHQI", 0x668E33EF, 1, 0, cookie, 0)
    )  # fmt: skip


def test_bytes_of_the_document() -> None:
    """Written out by hand, where the codec's own mistakes would show."""
    assert handshake.encode_greeting(3) == b"NBDMAGICIHAVEOPT\x00\x03"
    assert handshake.encode_client_flags(3) == b"\0\0\0\x03"
    assert handshake.encode_option(protocol.Option.GO, handshake.GoRequest("ab", (3,)).encode()) == (
        b"IHAVEOPT\0\0\0\x07\0\0\0\x0a\0\0\0\x02ab\0\x01\0\x03"
    )
    assert handshake.encode_option(
        protocol.Option.SET_META_CONTEXT, handshake.MetaContextRequest("x", ("base:",)).encode()
    ) == (b"IHAVEOPT\0\0\0\x0a\0\0\0\x12\0\0\0\x01x\0\0\0\x01\0\0\0\x05base:")
    assert handshake.encode_option_reply(7, protocol.OptionReply.ERR_UNKNOWN, b"no") == (
        b"\x00\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x07\x80\0\0\x06\0\0\0\x02no"
    )
    assert (
        handshake.encode_info(handshake.ExportInfo(4096, protocol.TransmissionFlag(1)))
        == b"\0\0\0\0\0\0\0\0\x10\0\0\x01"
    )
    assert handshake.encode_info(handshake.BlockSizes(1, 4096, 1 << 25)) == b"\0\x03\0\0\0\x01\0\0\x10\0\x02\0\0\0"
    assert transmission.Request(
        protocol.Command.WRITE_ZEROES, 0x0102, 4096, 512, protocol.CommandFlag.FAST_ZERO
    ).encode() == (b"\x25\x60\x95\x13\0\x10\0\x06\0\0\0\0\0\0\x01\x02\0\0\0\0\0\0\x10\0\0\0\x02\0")
    assert transmission.SimpleReply(5, protocol.Errno.EIO).encode() == b"\x67\x44\x66\x98\0\0\0\x05\0\0\0\0\0\0\0\x05"
    assert transmission.Chunk(5, protocol.ChunkKind.ERROR, 6).encode() == (
        b"\x66\x8e\x33\xef\0\x01\x80\x01\0\0\0\0\0\0\0\x05\0\0\0\x06"
    )
    assert transmission.BlockStatus(1, ((4096, 2),)).encode() == b"\0\0\0\x01\0\0\x10\0\0\0\0\x02"
    assert transmission.ErrorChunk(5, "no", 512).encode() == b"\0\0\0\x05\0\x02no\0\0\0\0\0\0\x02\0"


DECODERS: list[Callable[[bytes], object]] = [
    handshake.decode_greeting,
    handshake.decode_client_flags,
    handshake.OptionHeader.decode,
    handshake.OptionReplyHeader.decode,
    handshake.GoRequest.decode,
    handshake.ExportInfo.decode,
    handshake.decode_info,
    handshake.ListedExport.decode,
    handshake.MetaContextRequest.decode,
    handshake.MetaContext.decode,
    transmission.Request.decode,
    transmission.reply_header_size,
    transmission.decode_reply_header,
    transmission.decode_offset,
    transmission.decode_hole,
    transmission.BlockStatus.decode,
    lambda data: transmission.ErrorChunk.decode(protocol.ChunkKind.ERROR, data),
    lambda data: transmission.ErrorChunk.decode(protocol.ChunkKind.ERROR_OFFSET, data),
    lambda data: transmission.ErrorChunk.decode(0x80FF, data),
    protocol.decode_text,
]

VALID = [
    handshake.encode_greeting(3),
    handshake.encode_client_flags(1),
    handshake.encode_option(7)[: handshake.OPTION_HEADER_SIZE],
    handshake.encode_option_reply(7, 3),
    handshake.GoRequest("name", (0, 3)).encode(),
    handshake.encode_info(handshake.ExportInfo(1 << 40, protocol.TransmissionFlag(0x1ED))),
    handshake.encode_info(handshake.BlockSizes(512, 4096, 1 << 25)),
    handshake.MetaContextRequest("name", ("base:allocation", "qemu:")).encode(),
    transmission.Request(protocol.Command.READ, 1, 2, 3).encode(),
    transmission.SimpleReply(1, 5).encode(),
    transmission.Chunk(1, protocol.ChunkKind.BLOCK_STATUS, 12).encode(),
    transmission.BlockStatus(1, ((4096, 3), (512, 0))).encode(),
    transmission.ErrorChunk(5, "message", 77).encode(),
]


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A valid message with some bytes changed, cut or added."""
    data = bytearray(draw(st.sampled_from(VALID)))
    for _ in range(draw(st.integers(0, 3))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data + draw(st.binary(max_size=9)))


@settings(max_examples=400)
@given(data=st.binary(max_size=80) | damaged())
@example(data=b"\0\0\0\0\xff\xff\xff\xff")  # as many queries as there can be, in no bytes
@example(data=b"\xff" * 28)
def test_hostile_bytes(data: bytes) -> None:
    refused = 0
    for decode in DECODERS:
        try:
            decode(data)
        except ProtocolError:
            refused += 1
    # No message is all of them.
    assert refused > 0


OUT_OF_BOUNDS: dict[str, Callable[[], object]] = {
    "an option": lambda: handshake.OptionHeader.decode(
        struct.pack(">8sII", b"IHAVEOPT", 7, protocol.MAX_OPTION_PAYLOAD + 1)
    ),
    "an option reply": lambda: handshake.OptionReplyHeader.decode(
        struct.pack(">QIII", 0x3E889045565A9, 7, 3, protocol.MAX_OPTION_PAYLOAD + 1)
    ),
    "a write": lambda: transmission.Request.decode(
        struct.pack(">IHHQQI", 0x25609513, 0, 1, 1, 0, protocol.MAX_PAYLOAD + 1)
    ),
    "data": lambda: transmission.decode_reply_header(transmission.Chunk(1, 1, 8 + protocol.MAX_PAYLOAD + 1).encode()),
    "no data": lambda: transmission.decode_reply_header(transmission.Chunk(1, 1, 8).encode()),
    "a hole": lambda: transmission.decode_reply_header(transmission.Chunk(1, 2, 13).encode()),
    "extents": lambda: transmission.decode_reply_header(
        transmission.Chunk(1, 5, 4 + 8 * protocol.MAX_EXTENTS + 8).encode()
    ),
    "half an extent": lambda: transmission.decode_reply_header(transmission.Chunk(1, 5, 16).encode()),
    "an error": lambda: transmission.decode_reply_header(transmission.Chunk(1, 0x8001, 6 + 4097).encode()),
    "an unknown error": lambda: transmission.decode_reply_header(transmission.Chunk(1, 0x80FF, 1 << 20).encode()),
    "an unknown kind": lambda: transmission.decode_reply_header(transmission.Chunk(1, 77, 12).encode()),
    "an empty chunk": lambda: transmission.decode_reply_header(transmission.Chunk(1, 0, 0, done=False).encode()),
    "a text": lambda: protocol.decode_text(b"x" * 4097),
    "an error's text": lambda: transmission.ErrorChunk.decode(0x8001, b"\0\0\0\x05\0\x09short"),
    "an error that is none": lambda: transmission.ErrorChunk.decode(0x8001, bytes(6)),
    "an extent of nothing": lambda: transmission.BlockStatus.decode(bytes(12)),
    "a hole of nothing": lambda: transmission.decode_hole(bytes(12)),
    "no UTF-8": lambda: protocol.decode_text(b"\xff"),
    "a NUL": lambda: protocol.decode_text(b"a\0b"),
    "an export beyond all bounds": lambda: handshake.ExportInfo.decode(b"\xff" * 10),
    "an export without flags": lambda: handshake.ExportInfo.decode(bytes(10)),
    "a block of three bytes": lambda: handshake.decode_info(
        handshake.encode_info(handshake.BlockSizes(3, 4096, 1 << 25))
    ),
    "a block of a megabyte": lambda: handshake.decode_info(
        handshake.encode_info(handshake.BlockSizes(1 << 20, 1 << 20, 1 << 25))
    ),
    "less than a block at most": lambda: handshake.decode_info(
        handshake.encode_info(handshake.BlockSizes(512, 512, 511))
    ),
    "another greeting": lambda: handshake.decode_greeting(b"SSH-2.0-OpenSSH_9."),
    "the oldstyle": lambda: handshake.decode_greeting(b"NBDMAGIC\0\0\x42\x02\x81\x86\x12\x53\0\0"),
    "flags of the future": lambda: handshake.decode_client_flags(b"\0\0\0\x04"),
    "too long a name to send": lambda: protocol.encode_text("é" * 2049),
    "a NUL to send": lambda: protocol.encode_text("\0"),
}


@pytest.mark.parametrize("name", OUT_OF_BOUNDS)
def test_out_of_bounds(name: str) -> None:
    with pytest.raises(ProtocolError):
        OUT_OF_BOUNDS[name]()


def test_errors_for_people() -> None:
    assert protocol.error_text(28) == "ENOSPC (no space left on device)"
    assert protocol.error_text(4711) == "error 4711"
    assert protocol.printable("disk \x1b[31mred\n") == "disk ?[31mred?"
