"""Opening an NBD export: what is asked for, what servers lack, refuse or get wrong, and nobody in the clear where TLS
is wanted."""

from __future__ import annotations

import asyncio
import ssl
import struct
from pathlib import Path

import pytest
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.nbd import handshake
from blockferry.common.nbd.client import NbdClient
from blockferry.common.nbd.connection import SCRATCH_SIZE
from blockferry.common.nbd.protocol import Option, OptionReply
from blockferry.common.nbd.uri import NbdUri

from tests.images import MIB
from tests.unit.nbd.server import (
    ALL,
    BOUND,
    CONTENT,
    CONTEXT,
    NbdServer,
    connected,
    read,
)


async def refusal(
    server: NbdServer, directory: Path, *, export: str = "disk", handshake: float = BOUND
) -> BlockferryError:
    """The error that opening ends with."""
    async with server.at(directory) as uri, asyncio.timeout(BOUND):
        uri = uri.replace("/disk?", f"/{export}?")
        with pytest.raises(BlockferryError) as caught:
            await NbdClient.connect(NbdUri.parse(uri), handshake=handshake)
        assert caught.value.volume == uri
        assert caught.value.cause and caught.value.next
        return caught.value


async def test_what_is_asked_for(tmp_path: Path) -> None:
    server = NbdServer(CONTENT, sizes=handshake.BlockSizes(512, 4096, MIB + 100))
    async with connected(server, tmp_path) as client:
        assert server.options == [Option.STRUCTURED_REPLY, Option.SET_META_CONTEXT, Option.GO]
        export = client.export
        assert (export.size, export.flags, export.context, export.structured) == (len(CONTENT), ALL, CONTEXT, True)
        assert (export.minimum, export.preferred, export.maximum) == (512, 4096, MIB)
        assert export.description == "a disk"
        assert await read(client, 0, len(CONTENT)) == CONTENT
    assert server.goodbyes == 1


@pytest.mark.parametrize("greeting", [1, 3])
async def test_without_go(tmp_path: Path, greeting: int) -> None:
    server = NbdServer(CONTENT, lacks=[Option.GO], greeting=handshake.encode_greeting(greeting))
    async with connected(server, tmp_path) as client:
        assert server.options[-2:] == [Option.GO, Option.EXPORT_NAME]
        # What was agreed upon before holds all the same.
        assert (client.export.structured, client.export.context) == (True, CONTEXT)
        assert (client.export.minimum, client.export.maximum) == (1, 32 * MIB)
        assert await read(client, 100, 5000) == CONTENT[100:5100]


@pytest.mark.parametrize("greeting", [0, 2])
async def test_the_newstyle_that_is_not_fixed(tmp_path: Path, greeting: int) -> None:
    server = NbdServer(CONTENT, greeting=handshake.encode_greeting(greeting))
    async with connected(server, tmp_path) as client:
        assert server.options == [Option.EXPORT_NAME]
        assert (client.export.structured, client.export.context) == (False, None)
        assert await read(client, 100, 5000) == CONTENT[100:5100]


async def test_without_structured_replies(tmp_path: Path) -> None:
    server = NbdServer(CONTENT, lacks=[Option.STRUCTURED_REPLY])
    async with connected(server, tmp_path) as client:
        assert server.options == [Option.STRUCTURED_REPLY, Option.GO]
        assert (client.export.structured, client.export.context) == (False, None)
        assert await read(client, 0, len(CONTENT)) == CONTENT


async def test_without_allocation(tmp_path: Path) -> None:
    async with connected(NbdServer(CONTENT, lacks=[Option.SET_META_CONTEXT]), tmp_path) as client:
        assert (client.export.structured, client.export.context) == (True, None)
        assert await read(client, 0, len(CONTENT)) == CONTENT


@pytest.mark.parametrize(
    ("lacks", "code", "cause"), [((), Code.NOT_FOUND, "only disk is here"), ((Option.GO,), Code.UNAVAILABLE, "closed")]
)
async def test_an_export_that_is_not_there(tmp_path: Path, lacks: tuple[Option, ...], code: Code, cause: str) -> None:
    error = await refusal(NbdServer(CONTENT, lacks=lacks), tmp_path, export="other")
    assert error.code is code
    assert cause in error.cause


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        (OptionReply.ERR_TLS_REQD, Code.UNREADABLE),
        (OptionReply.ERR_POLICY, Code.UNREADABLE),
        (OptionReply.ERR_SHUTDOWN, Code.UNAVAILABLE),
        (OptionReply.ERR_BLOCK_SIZE_REQD, Code.UNSUPPORTED),
        (0x80001234, Code.UNSUPPORTED),
    ],
)
async def test_refused(tmp_path: Path, reply: int, code: Code) -> None:
    server = NbdServer(CONTENT)
    server.option_replies[Option.GO] = handshake.encode_option_reply(Option.GO, reply, b"\x1b[2Jbecause")
    error = await refusal(server, tmp_path)
    assert error.code is code
    assert error.cause.endswith(": ?[2Jbecause")


async def test_tls_is_asked_for_first(tmp_path: Path) -> None:
    server = NbdServer(CONTENT)
    needed = handshake.encode_option_reply(Option.STRUCTURED_REPLY, OptionReply.ERR_TLS_REQD)
    server.option_replies[Option.STRUCTURED_REPLY] = needed
    error = await refusal(server, tmp_path)
    assert error.code is Code.UNREADABLE
    assert "nbds" in error.next


async def test_tls_or_nothing(tmp_path: Path) -> None:
    """A server, or whoever is in between, that has no TLS gets nothing in the clear."""
    server = NbdServer(CONTENT)
    async with server.at(tmp_path) as uri, asyncio.timeout(BOUND):
        uri = uri.replace("nbd+unix", "nbds+unix")
        with pytest.raises(BlockferryError) as caught:
            await NbdClient.connect(NbdUri.parse(uri), tls=ssl.create_default_context())
        assert caught.value.code is Code.UNSUPPORTED
        assert server.options == [Option.STARTTLS]

        # What is slipped in behind the agreement would be taken for the server's own words.
        ack = handshake.encode_option_reply(Option.STARTTLS, OptionReply.ACK)
        server.option_replies[Option.STARTTLS] = ack + handshake.encode_option_reply(Option.STRUCTURED_REPLY, 1)
        with pytest.raises(BlockferryError) as caught:
            await NbdClient.connect(NbdUri.parse(uri), tls=ssl.create_default_context())
        # It was received before TLS began, or it is no TLS.
        assert caught.value.code is Code.PROTOCOL or "TLS failed" in caught.value.cause
        assert server.options == [Option.STARTTLS] * 2

        server.greeting = handshake.encode_greeting(2)
        with pytest.raises(BlockferryError) as caught:
            await NbdClient.connect(NbdUri.parse(uri), tls=ssl.create_default_context())
        assert caught.value.code is Code.PROTOCOL
        with pytest.raises(BlockferryError, match="contradict"):
            await NbdClient.connect(NbdUri.parse(uri))


WRONG_GREETINGS = {
    "another protocol": b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n",
    "oldstyle": b"NBDMAGIC\0\0\x42\x02\x81\x86\x12\x53" + bytes(136),
}


@pytest.mark.parametrize("name", WRONG_GREETINGS)
async def test_wrong_greetings(tmp_path: Path, name: str) -> None:
    assert (await refusal(NbdServer(CONTENT, greeting=WRONG_GREETINGS[name]), tmp_path)).code is Code.PROTOCOL


_REPLY = struct.Struct(">QIII")
_REPLY_MAGIC = 0x3E889045565A9
WRONG_OPTION_REPLIES = {
    "wrong magic": (Option.GO, b"\xff" * 20),
    "another option": (Option.GO, _REPLY.pack(_REPLY_MAGIC, 6, 1, 0)),
    "too long": (Option.GO, _REPLY.pack(_REPLY_MAGIC, 7, 3, 1 << 31)),
    "no export": (Option.GO, _REPLY.pack(_REPLY_MAGIC, 7, 1, 0)),
    "half an export": (Option.GO, _REPLY.pack(_REPLY_MAGIC, 7, 3, 3) + b"\0\0\0"),
    "a strange reply": (Option.GO, _REPLY.pack(_REPLY_MAGIC, 7, 4, 0)),
    "an error that is no text": (Option.GO, _REPLY.pack(_REPLY_MAGIC, 7, 0x80000006, 1) + b"\xff"),
    "another context": (Option.SET_META_CONTEXT, _REPLY.pack(_REPLY_MAGIC, 10, 4, 8) + b"\0\0\0\x01qemu"),
    "an information for an acknowledgement": (Option.STRUCTURED_REPLY, _REPLY.pack(_REPLY_MAGIC, 8, 3, 0)),
}


@pytest.mark.parametrize("name", WRONG_OPTION_REPLIES)
async def test_wrong_option_replies(tmp_path: Path, name: str) -> None:
    server = NbdServer(CONTENT)
    option, server.option_replies[option] = WRONG_OPTION_REPLIES[name][0], WRONG_OPTION_REPLIES[name][1]
    assert (await refusal(server, tmp_path)).code is Code.PROTOCOL


async def test_more_than_was_asked_for_waits(tmp_path: Path) -> None:
    """Informations that fill the scratch buffer several times, sent at once."""
    server = NbdServer(CONTENT)
    info = handshake.encode_option_reply(Option.GO, 3, handshake.encode_info(handshake.DescriptionInfo("d" * 4000)))
    export = handshake.encode_info(handshake.ExportInfo(len(CONTENT), ALL))
    server.option_replies[Option.GO] = (
        info * (5 * SCRATCH_SIZE // len(info))
        + handshake.encode_option_reply(Option.GO, 3, export)
        + handshake.encode_option_reply(Option.GO, OptionReply.ACK)
    )
    async with connected(server, tmp_path) as client:
        assert client.export.description == "d" * 4000


async def test_a_handshake_that_never_ends(tmp_path: Path) -> None:
    for server in (NbdServer(CONTENT, greeting=b""), NbdServer(CONTENT)):
        server.option_replies[Option.GO] = b""
        error = await refusal(server, tmp_path, handshake=0.2)
        assert error.code is Code.UNAVAILABLE
        assert "0.2 s" in error.cause


async def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(BlockferryError) as caught:
        await NbdClient.connect(NbdUri.parse(f"nbd+unix:///?socket={tmp_path}/none"))
    assert caught.value.code is Code.NOT_FOUND
    (tmp_path / "file").touch()
    with pytest.raises(BlockferryError) as caught:
        await NbdClient.connect(NbdUri.parse(f"nbd+unix:///?socket={tmp_path}/file"))
    assert "refused" in caught.value.cause
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    with pytest.raises(BlockferryError) as caught:
        await NbdClient.connect(NbdUri.parse(f"nbd://127.0.0.1:{port}"))
    assert caught.value.code is Code.UNAVAILABLE
    server.close()
    await server.wait_closed()
    with pytest.raises(BlockferryError) as caught:
        await NbdClient.connect(NbdUri.parse(f"nbd://127.0.0.1:{port}"))
    assert caught.value.code is Code.UNAVAILABLE
