"""The server's side of the handshake, option by option."""

from __future__ import annotations

import pytest
from blockferry.common.nbd import handshake
from blockferry.common.nbd.handshake import BlockSizes, ExportInfo, OptionHeader, OptionReplyHeader
from blockferry.common.nbd.offer import Negotiation, Offer, Step
from blockferry.common.nbd.protocol import Info, Option, OptionReply, ProtocolError, TransmissionFlag, decode_text
from hypothesis import given
from hypothesis import strategies as st

FLAGS = TransmissionFlag.HAS_FLAGS | TransmissionFlag.SEND_FLUSH
SIZES = BlockSizes(1, 4096, 32 << 20)
DISK = Offer("disk", 1 << 30, FLAGS, SIZES, "a disk", ("base:allocation", "blockferry:hydrated"))
OTHER = Offer("other", 512, FLAGS | TransmissionFlag.READ_ONLY, SIZES)
EXPORTS = {"disk": DISK, "other": OTHER}


def negotiation(*, tls: bool = False, full: str = "", flags: int = 3) -> Negotiation:
    found = Negotiation(EXPORTS, tls=tls, full=lambda: full)
    found.client_flags(handshake.encode_client_flags(flags))
    return found


def replies(found: list[bytes]) -> list[tuple[int, bytes]]:
    """(reply, payload) of what is answered."""
    data, parts = b"".join(found), []
    while data:
        header = OptionReplyHeader.decode(data[: handshake.OPTION_REPLY_HEADER_SIZE])
        data = data[handshake.OPTION_REPLY_HEADER_SIZE :]
        parts.append((header.reply, data[: header.length]))
        data = data[header.length :]
    return parts


def say(one: Negotiation, option: int, payload: bytes = b"") -> list[tuple[int, bytes]]:
    """Say an option after which another one is expected."""
    found, step = one.option(OptionHeader(option, len(payload)), payload)
    assert step is Step.OPTION
    return replies(found)


def refused(found: list[tuple[int, bytes]], reply: OptionReply) -> str:
    """The text of the one reply, which is this error."""
    ((kind, text),) = found
    assert kind == reply
    return decode_text(text)


def chosen(one: Negotiation) -> Offer | None:
    """The export, if there is one by now."""
    return one.chosen


def agreed(one: Negotiation) -> tuple[str, ...]:
    """The contexts, as they are by now."""
    return one.contexts


def test_the_greeting() -> None:
    assert handshake.decode_greeting(Negotiation.greeting()) == 3


def test_exports_are_listed() -> None:
    listed = say(negotiation(), Option.LIST)
    assert [kind for kind, _ in listed] == [OptionReply.SERVER, OptionReply.SERVER, OptionReply.ACK]
    names = [handshake.ListedExport.decode(data) for _, data in listed[:-1]]
    assert [(one.name, one.details) for one in names] == [("disk", "a disk"), ("other", "")]


@pytest.mark.parametrize("name", ["disk", ""])
def test_go(name: str) -> None:
    one = negotiation()
    request = handshake.GoRequest(name, (Info.NAME, Info.DESCRIPTION, 77)).encode()
    assert say(one, Option.INFO, request)[-1] == (OptionReply.ACK, b"")
    assert chosen(one) is None
    found, step = one.option(OptionHeader(Option.GO, len(request)), request)
    assert step is Step.TRANSMISSION and chosen(one) is DISK
    *infos, last = replies(found)
    assert last == (OptionReply.ACK, b"")
    assert [handshake.decode_info(data) for _, data in infos] == [
        ExportInfo(1 << 30, FLAGS), SIZES, handshake.NameInfo("disk"), handshake.DescriptionInfo("a disk"),
    ]  # fmt: skip


def test_one_chunk_can_be_asked_for_where_there_are_chunks() -> None:
    one = negotiation()
    say(one, Option.STRUCTURED_REPLY)
    infos = say(one, Option.INFO, handshake.GoRequest("other").encode())
    assert handshake.decode_info(infos[0][1]) == ExportInfo(512, OTHER.flags | TransmissionFlag.SEND_DF)


def test_export_name() -> None:
    for flags, zeroes in ((3, 0), (1, 124), (2, 0), (0, 124)):
        one = negotiation(flags=flags)
        found, step = one.option(OptionHeader(Option.EXPORT_NAME, 5), b"other")
        assert step is Step.TRANSMISSION and one.chosen is OTHER
        assert b"".join(found) == ExportInfo(512, OTHER.flags).encode() + bytes(zeroes)


def test_what_is_not_there() -> None:
    one = negotiation()
    assert refused(say(one, Option.GO, handshake.GoRequest("nothing").encode()), OptionReply.ERR_UNKNOWN)
    assert refused(say(one, 99), OptionReply.ERR_UNSUP)
    assert refused(say(one, Option.STARTTLS), OptionReply.ERR_UNSUP)
    with pytest.raises(ProtocolError, match="no export"):
        one.option(OptionHeader(Option.EXPORT_NAME, 7), b"nothing")
    with pytest.raises(ProtocolError, match="unknown client flags"):
        Negotiation(EXPORTS, tls=False).client_flags(handshake.encode_client_flags(4))
    with pytest.raises(ProtocolError, match="does not know the fixed"):
        negotiation(flags=0).option(OptionHeader(Option.LIST, 0), b"")


def test_the_end() -> None:
    found, step = negotiation().option(OptionHeader(Option.ABORT, 0), b"")
    assert step is Step.END and replies(found) == [(OptionReply.ACK, b"")]


def test_a_full_server() -> None:
    one = negotiation(full="too many")
    assert say(one, Option.INFO, handshake.GoRequest("disk").encode())[-1][0] == OptionReply.ACK
    assert refused(say(one, Option.GO, handshake.GoRequest("disk").encode()), OptionReply.ERR_POLICY) == "too many"
    with pytest.raises(ProtocolError, match="too many"):
        one.option(OptionHeader(Option.EXPORT_NAME, 4), b"disk")


def test_nothing_is_told_without_tls() -> None:
    one = negotiation(tls=True)
    for option in (Option.LIST, Option.INFO, Option.GO, Option.STRUCTURED_REPLY, Option.SET_META_CONTEXT, 99):
        assert refused(say(one, option, b"x"), OptionReply.ERR_TLS_REQD)
    with pytest.raises(ProtocolError, match="without TLS"):
        one.option(OptionHeader(Option.EXPORT_NAME, 4), b"disk")
    assert refused(say(one, Option.STARTTLS, b"x"), OptionReply.ERR_INVALID)
    found, step = one.option(OptionHeader(Option.STARTTLS, 0), b"")
    assert step is Step.TLS and replies(found) == [(OptionReply.ACK, b"")]
    one.encrypted()
    assert refused(say(one, Option.STARTTLS), OptionReply.ERR_INVALID)
    assert len(say(one, Option.LIST)) == 3


def contexts(one: Negotiation, option: Option, *queries: str, export: str = "disk") -> list[handshake.MetaContext]:
    found = say(one, option, handshake.MetaContextRequest(export, queries).encode())
    assert found[-1] == (OptionReply.ACK, b"")
    return [handshake.MetaContext.decode(data) for _, data in found[:-1]]


def test_metadata_contexts_are_listed() -> None:
    one = negotiation()
    names = ["base:allocation", "blockferry:hydrated"]
    assert [found.name for found in contexts(one, Option.LIST_META_CONTEXT)] == names
    assert [found.name for found in contexts(one, Option.LIST_META_CONTEXT, "base:")] == names[:1]
    assert [found.name for found in contexts(one, Option.LIST_META_CONTEXT, "blockferry:hydrated", "x:y")] == names[1:]
    assert [found.name for found in contexts(one, Option.LIST_META_CONTEXT, export="other")] == names[:1]


def test_metadata_contexts_belong_to_an_export() -> None:
    one = negotiation()
    query = handshake.MetaContextRequest("disk", ("base:allocation",)).encode()
    assert "structured" in refused(say(one, Option.SET_META_CONTEXT, query), OptionReply.ERR_INVALID)
    say(one, Option.STRUCTURED_REPLY)
    found = contexts(one, Option.SET_META_CONTEXT, "blockferry:hydrated", "base:", "base:allocation", "base:allocation")
    assert [(each.number, each.name) for each in found] == [(1, "base:allocation"), (2, "blockferry:hydrated")]
    request = handshake.GoRequest("other").encode()
    one.option(OptionHeader(Option.GO, len(request)), request)
    assert agreed(one) == (), "these were another export's"
    request = handshake.GoRequest("disk").encode()
    one.option(OptionHeader(Option.GO, len(request)), request)
    assert agreed(one) == ("base:allocation", "blockferry:hydrated")
    assert contexts(one, Option.SET_META_CONTEXT, "nobody:knows") == []
    assert agreed(one) == ()


@given(st.integers(0, 12), st.binary(max_size=60), st.booleans())
def test_whatever_comes_is_answered_or_breaks_the_protocol(option: int, payload: bytes, tls: bool) -> None:
    one = negotiation(tls=tls)
    try:
        found, step = one.option(OptionHeader(option, len(payload)), payload)
    except ProtocolError:
        return
    if step is not Step.TRANSMISSION or option == Option.GO:
        assert replies(found)
    assert (one.chosen is not None) == (step is Step.TRANSMISSION)
