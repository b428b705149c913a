"""The client's side of the handshake: from the greeting to an export that can be used.

TLS is had where it is wanted, or nothing is. For all else there is a way on where a server lacks it: structured replies
(else simple ones), `base:allocation` (else nothing is known), OPT_GO with block sizes (else OPT_EXPORT_NAME and the
protocol's defaults).
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

from blockferry.common.errors import BlockferryError, Code
from blockferry.common.nbd import handshake, protocol
from blockferry.common.nbd.connection import Connection
from blockferry.common.nbd.protocol import HandshakeFlag, Info, Option, OptionReply, ProtocolError, TransmissionFlag


@dataclass(frozen=True)
class Export:
    """What was agreed upon. Sizes in bytes."""

    name: str
    size: int
    flags: TransmissionFlag
    structured: bool = False
    context: int | None = None
    """The number of `base:allocation` in block status replies; None where the server lacks it."""
    minimum: int = 1
    """Offsets and lengths are multiples of it, a power of two up to 64 KiB."""
    maximum: int = protocol.MAX_PAYLOAD
    """Of one read or write."""
    preferred: int = 4096
    """What the server likes best, for people; nothing follows from it."""
    canonical_name: str = ""
    description: str = ""

    def can(self, flag: TransmissionFlag) -> bool:
        """Whether the server announces it."""
        return bool(self.flags & flag)


class _RefusedError(Exception):
    """An option was answered with an error."""

    def __init__(self, header: handshake.OptionReplyHeader, text: str) -> None:
        self.reply = header.reply
        try:
            name = OptionReply(header.reply).name
        except ValueError:
            name = f"error {header.reply:#x}"
        self.cause = f"the server answers {name}" + (f": {protocol.printable(text)}" if text else "")
        super().__init__(self.cause)


async def negotiate(
    connection: Connection, volume: str, name: str, tls: ssl.SSLContext | None, hostname: str
) -> Export:
    """Open the export `name`. Raises BlockferryError, ProtocolError, or OSError from TLS; sets no time limit."""
    flags = handshake.decode_greeting(await connection.read(handshake.GREETING_SIZE))
    known = flags & (HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES)
    connection.send(handshake.encode_client_flags(known))
    fixed = bool(flags & HandshakeFlag.FIXED_NEWSTYLE)
    try:
        if tls is not None:
            if not fixed:
                raise ProtocolError("its handshake knows no TLS")
            if not await _offered(connection, Option.STARTTLS):
                raise BlockferryError(
                    Code.UNSUPPORTED,
                    "cannot be opened",
                    cause="the server offers no TLS",
                    next="let it offer TLS, or write nbd:// or nbd+unix:// for a server on this machine",
                    volume=volume,
                )
            await connection.start_tls(tls, hostname)
        # In this order: the contexts need structured replies, and both must be agreed upon before the export is chosen.
        structured = fixed and await _offered(connection, Option.STRUCTURED_REPLY)
        context = await _allocation_context(connection, name) if structured else None
        export = await _go(connection, name) if fixed else None
        if export is None:
            export = await _export_name(connection, name, zeroes=not known & HandshakeFlag.NO_ZEROES)
    except _RefusedError as refused:
        raise _explained(volume, refused) from refused
    connection.start(structured=structured, context=context)
    return replace(export, structured=structured, context=context)


async def _go(connection: Connection, name: str) -> Export | None:
    """None where the server knows no OPT_GO."""
    request = handshake.GoRequest(name, (Info.BLOCK_SIZE, Info.NAME, Info.DESCRIPTION))
    found: Export | None = None
    others: dict[str, str | int] = {}
    try:
        async for header, payload in _replies(connection, Option.GO, request.encode()):
            if header.reply != OptionReply.INFO:
                raise ProtocolError(f"reply {header.reply} to OPT_GO")
            match handshake.decode_info(payload):
                case handshake.ExportInfo(size, flags):
                    found = Export(name, size, flags)
                case handshake.BlockSizes(minimum, preferred, maximum):
                    most = min(maximum, protocol.MAX_PAYLOAD)
                    others |= {"minimum": minimum, "preferred": preferred, "maximum": most - most % minimum}
                case handshake.NameInfo(canonical):
                    others["canonical_name"] = canonical
                case handshake.DescriptionInfo(description):
                    others["description"] = description
    except _RefusedError as refused:
        if refused.reply == OptionReply.ERR_UNSUP:
            return None
        raise
    if found is None:
        raise ProtocolError("OPT_GO was agreed to without saying how large the export is")
    return replace(found, **others)  # type: ignore[arg-type]


async def _export_name(connection: Connection, name: str, *, zeroes: bool) -> Export:
    """The option of old: a server that lacks the export can only hang up."""
    connection.send(handshake.encode_option(Option.EXPORT_NAME, protocol.encode_text(name)))
    try:
        info = handshake.ExportInfo.decode(await connection.read(handshake.EXPORT_NAME_REPLY_SIZE))
    except BlockferryError as error:
        error = BlockferryError(
            error.code, error.what, cause=f"{error.cause}, as it does where there is no such export",
            next="check the export's name and the server's log", volume=error.volume,
        )  # fmt: skip
        raise error from None
    if zeroes:
        await connection.read(handshake.EXPORT_NAME_ZEROES)
    return Export(name, info.size, info.flags)


async def _allocation_context(connection: Connection, name: str) -> int | None:
    request = handshake.MetaContextRequest(name, (protocol.BASE_ALLOCATION,))
    found: int | None = None
    try:
        async for header, payload in _replies(connection, Option.SET_META_CONTEXT, request.encode()):
            if header.reply != OptionReply.META_CONTEXT:
                raise ProtocolError(f"reply {header.reply} to OPT_SET_META_CONTEXT")
            context = handshake.MetaContext.decode(payload)
            if context.name != protocol.BASE_ALLOCATION or found is not None:
                raise ProtocolError(f"a metadata context that nobody asked for: {protocol.printable(context.name)}")
            found = context.number
    except _RefusedError as refused:
        _raise_for_tls(refused)
        return None
    return found


async def _offered(connection: Connection, option: Option) -> bool:
    try:
        await _expect_ack(connection, option)
    except _RefusedError as refused:
        _raise_for_tls(refused)
        return False
    return True


def _raise_for_tls(refused: _RefusedError) -> None:
    """Without TLS a server refuses everything else too: that is the error to show."""
    if refused.reply == OptionReply.ERR_TLS_REQD:
        raise refused


async def _expect_ack(connection: Connection, option: Option) -> None:
    async for header, _ in _replies(connection, option):
        raise ProtocolError(f"reply {header.reply} to option {option}")


async def _replies(
    connection: Connection, option: Option, payload: bytes = b""
) -> AsyncIterator[tuple[handshake.OptionReplyHeader, bytearray]]:
    """Send an option; its replies up to the acknowledgement. Raises `_RefusedError`."""
    connection.send(handshake.encode_option(option, payload))
    while True:
        header = handshake.OptionReplyHeader.decode(await connection.read(handshake.OPTION_REPLY_HEADER_SIZE))
        if header.option != option:
            raise ProtocolError(f"a reply to option {header.option} instead of {option}")
        data = await connection.read(header.length)
        if header.is_error:
            raise _RefusedError(header, protocol.decode_text(data))
        if header.reply == OptionReply.ACK:
            return
        yield header, data


def _explained(volume: str, refused: _RefusedError) -> BlockferryError:
    code, next_step = {
        int(OptionReply.ERR_UNSUP): (Code.UNSUPPORTED, "check what the server supports"),
        int(OptionReply.ERR_POLICY): (Code.UNREADABLE, "check who the server lets in"),
        int(OptionReply.ERR_TLS_REQD): (Code.UNREADABLE, "write nbds:// or nbds+unix:// to use TLS"),
        int(OptionReply.ERR_UNKNOWN): (Code.NOT_FOUND, "check the export's name; nbdinfo --list shows what there is"),
        int(OptionReply.ERR_SHUTDOWN): (Code.UNAVAILABLE, "start the server again"),
    }.get(refused.reply, (Code.UNSUPPORTED, "check the server's log"))
    return BlockferryError(code, "cannot be opened", cause=refused.cause, next=next_step, volume=volume)
