"""The server's side of the handshake: options in, replies out, until a client has chosen an export (pure).

    greeting ─▶ options, one by one ─▶ STARTTLS ─▶ options again, as if nothing had been said ─▶ an export
                                   └──────────────────────────────────────────────────────────▶

Where TLS is demanded nothing is told without it, not even which exports there are.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from blockferry.common.nbd import handshake
from blockferry.common.nbd.handshake import BlockSizes, OptionHeader, encode_option_reply
from blockferry.common.nbd.protocol import (
    BASE_ALLOCATION,
    Buffer,
    HandshakeFlag,
    Info,
    Option,
    OptionReply,
    ProtocolError,
    TransmissionFlag,
    decode_text,
)


@dataclass(frozen=True)
class Offer:
    """What is said of an export. Sizes in bytes."""

    name: str
    size: int
    flags: TransmissionFlag
    sizes: BlockSizes
    description: str = ""
    contexts: tuple[str, ...] = (BASE_ALLOCATION,)
    """Metadata contexts."""


class Step(enum.Enum):
    """What comes after an option."""

    OPTION = "another option"
    TLS = "TLS, and then another option"
    TRANSMISSION = "requests"
    END = "nothing"


class Negotiation:
    """One client's. `exports` by name; the first is also meant by the empty name. `tls` demands TLS. `full` says why
    nobody else is let in, or nothing."""

    def __init__(self, exports: Mapping[str, Offer], *, tls: bool, full: Callable[[], str] = str) -> None:
        self._exports = exports
        self._tls = tls
        self._full = full
        self._encrypted = False
        self._flags = HandshakeFlag(0)
        self.structured = False
        self.chosen: Offer | None = None
        self._contexts_of = ""
        self._contexts: tuple[str, ...] = ()

    @property
    def contexts(self) -> tuple[str, ...]:
        """Those agreed upon for the chosen export, by number - 1."""
        return self._contexts if self.chosen is not None and self.chosen.name == self._contexts_of else ()

    @staticmethod
    def greeting() -> bytes:
        """What is said first."""
        return handshake.encode_greeting(HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES)

    def client_flags(self, data: Buffer) -> None:
        """The answer to the greeting. Raises ProtocolError."""
        self._flags = handshake.decode_client_flags(data)

    def encrypted(self) -> None:
        """TLS is there; whatever was said without it is forgotten."""
        self._encrypted = True
        self.structured = False
        self._contexts_of, self._contexts = "", ()

    def option(self, header: OptionHeader, payload: Buffer) -> tuple[list[bytes], Step]:
        """What is answered to an option, and what comes then. Raises ProtocolError where nothing can be answered."""
        option = header.option
        if option != Option.EXPORT_NAME and not self._flags & HandshakeFlag.FIXED_NEWSTYLE:
            raise ProtocolError(f"option {option} of a client that does not know the fixed newstyle handshake")
        if self._tls and not self._encrypted and option not in (Option.ABORT, Option.STARTTLS):
            if option == Option.EXPORT_NAME:
                raise ProtocolError("an export was chosen without TLS")
            return [_refusal(option, OptionReply.ERR_TLS_REQD, "say STARTTLS first")], Step.OPTION
        try:
            match option:
                case Option.EXPORT_NAME:
                    return self._export_name(decode_text(payload))
                case Option.ABORT:
                    return [encode_option_reply(option, OptionReply.ACK)], Step.END
                case Option.STARTTLS:
                    return self._starttls(payload)
                case Option.LIST:
                    _expect_nothing(payload)
                    listed = [handshake.ListedExport(one.name, one.description) for one in self._exports.values()]
                    return _answer(option, [(OptionReply.SERVER, one.encode()) for one in listed])
                case Option.STRUCTURED_REPLY:
                    _expect_nothing(payload)
                    self.structured = True
                    return _answer(option)
                case Option.INFO | Option.GO:
                    return self._go(option, handshake.GoRequest.decode(payload))
                case Option.LIST_META_CONTEXT | Option.SET_META_CONTEXT:
                    return self._meta_context(option, handshake.MetaContextRequest.decode(payload))
        except ProtocolError as error:
            if option == Option.EXPORT_NAME:
                raise
            return [_refusal(option, OptionReply.ERR_INVALID, str(error))], Step.OPTION
        return [_refusal(option, OptionReply.ERR_UNSUP, f"option {option} is not known here")], Step.OPTION

    def _starttls(self, payload: Buffer) -> tuple[list[bytes], Step]:
        _expect_nothing(payload)
        if self._encrypted:
            raise ProtocolError("TLS is there already")
        if not self._tls:
            return [_refusal(Option.STARTTLS, OptionReply.ERR_UNSUP, "this server has no TLS")], Step.OPTION
        return [encode_option_reply(Option.STARTTLS, OptionReply.ACK)], Step.TLS

    def _find(self, name: str) -> Offer | None:
        return self._exports.get(name) or (next(iter(self._exports.values()), None) if not name else None)

    def _choose(self, offer: Offer) -> Offer:
        self.chosen = offer
        return offer

    def _info(self, offer: Offer) -> handshake.ExportInfo:
        return handshake.ExportInfo(
            offer.size, offer.flags | (TransmissionFlag.SEND_DF if self.structured else TransmissionFlag(0))
        )

    def _export_name(self, name: str) -> tuple[list[bytes], Step]:
        offer, full = self._find(name), self._full()
        if offer is None or full:
            raise ProtocolError(full or f"there is no export {name!r}")
        zeroes = 0 if self._flags & HandshakeFlag.NO_ZEROES else handshake.EXPORT_NAME_ZEROES
        return [self._info(self._choose(offer)).encode(), bytes(zeroes)], Step.TRANSMISSION

    def _go(self, option: int, request: handshake.GoRequest) -> tuple[list[bytes], Step]:
        offer = self._find(request.name)
        if offer is None:
            return [_refusal(option, OptionReply.ERR_UNKNOWN, "there is no such export")], Step.OPTION
        if option == Option.GO and (full := self._full()):
            return [_refusal(option, OptionReply.ERR_POLICY, full)], Step.OPTION
        infos: list[handshake.AnyInfo] = [self._info(offer), offer.sizes]
        if Info.NAME in request.infos:
            infos.append(handshake.NameInfo(offer.name))
        if Info.DESCRIPTION in request.infos and offer.description:
            infos.append(handshake.DescriptionInfo(offer.description))
        replies, _ = _answer(option, [(OptionReply.INFO, handshake.encode_info(one)) for one in infos])
        if option == Option.INFO:
            return replies, Step.OPTION
        self._choose(offer)
        return replies, Step.TRANSMISSION

    def _meta_context(self, option: int, request: handshake.MetaContextRequest) -> tuple[list[bytes], Step]:
        setting = option == Option.SET_META_CONTEXT
        if setting:
            self._contexts_of, self._contexts = "", ()
        offer = self._find(request.export)
        if offer is None:
            return [_refusal(option, OptionReply.ERR_UNKNOWN, "there is no such export")], Step.OPTION
        if setting and not self.structured:
            raise ProtocolError("metadata contexts need structured replies")
        if setting:
            found = tuple(name for name in offer.contexts if name in request.queries)
            self._contexts_of, self._contexts = offer.name, found
        else:
            found = tuple(name for name in offer.contexts if _asks_for(request.queries, name))
        contexts = [handshake.MetaContext(number if setting else 0, name) for number, name in enumerate(found, 1)]
        return _answer(option, [(OptionReply.META_CONTEXT, one.encode()) for one in contexts])


def _asks_for(queries: Sequence[str], name: str) -> bool:
    """Without a query all are meant; `base:` means all of its namespace."""
    return not queries or name in queries or name[: name.index(":") + 1] in queries


def _expect_nothing(payload: Buffer) -> None:
    if len(payload):
        raise ProtocolError("this option has no payload")


def _answer(option: int, replies: Sequence[tuple[int, bytes]] = ()) -> tuple[list[bytes], Step]:
    encoded = [encode_option_reply(option, reply, payload) for reply, payload in replies]
    return [*encoded, encode_option_reply(option, OptionReply.ACK)], Step.OPTION


def _refusal(option: int, reply: OptionReply, text: str) -> bytes:
    return encode_option_reply(option, reply, text.encode())
