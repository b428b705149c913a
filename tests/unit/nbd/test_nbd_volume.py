"""An NBD export as a Volume, and its URIs."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.nbd import handshake, protocol, transmission
from blockferry.common.nbd.protocol import Command, Errno, Option, TransmissionFlag
from blockferry.common.nbd.uri import NbdUri, is_nbd_uri
from blockferry.common.regions import AllocationMap, Geometry, Provenance
from blockferry.common.volumes import NbdVolume
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.images import BLOCK, KIB, noise
from tests.unit.nbd.server import ALL, NbdServer, chunks, clipped, data_chunk, error_chunk, hole_chunk, status_chunk

REGION = 64 * KIB
CONTENT = noise("volume", 8 * REGION)


@contextlib.asynccontextmanager
async def opened(server: NbdServer, directory: Path, *, writable: bool = False) -> AsyncIterator[NbdVolume]:
    async with server.at(directory) as uri:
        volume = await NbdVolume.open(uri, writable=writable)
        try:
            yield volume
        finally:
            await volume.close()


# --- URIs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "fields"),
    [
        ("nbd://example.com/disk", ("disk", "", "example.com", 10809, False, False)),
        ("nbd://example.com", ("", "", "example.com", 10809, False, False)),
        ("nbd://example.com:1//disk", ("/disk", "", "example.com", 1, False, False)),
        ("nbd://[::1]/hello%20w%C3%B6rld", ("hello wörld", "", "::1", 10809, False, True)),
        ("nbd://localhost/a%3Fb", ("a?b", "", "localhost", 10809, False, True)),
        ("nbds://127.0.0.1/", ("", "", "127.0.0.1", 10809, True, True)),
        ("nbd+unix:///disk?socket=nbd.sock", ("disk", "nbd.sock", "", 10809, False, True)),
        ("nbd+unix:///?socket=/tmp/a+b%26c", ("", "/tmp/a+b&c", "", 10809, False, True)),
        ("nbd+unix:///?socket=%00/abstract", ("", "\0/abstract", "", 10809, False, True)),
        ("nbds+unix:///x?socket=s&tls-hostname=h", ("x", "s", "", 10809, True, True)),
    ],
)
def test_uris(uri: str, fields: tuple[object, ...]) -> None:
    assert is_nbd_uri(uri)
    found = NbdUri.parse(uri)
    assert (found.export, found.socket, found.host, found.port, found.tls, found.local) == fields


def test_whose_certificate_it_must_be() -> None:
    assert NbdUri.parse("nbds://a.example/").tls_hostname == "a.example"
    assert NbdUri.parse("nbds://10.0.0.1/?tls-hostname=a.example").tls_hostname == "a.example"
    assert NbdUri.parse("nbds+unix:///?socket=s").tls_hostname == "localhost"
    assert NbdUri.parse("nbds://a/?tls-certificates=/etc/pki%20x").tls_certificates == "/etc/pki x"


@pytest.mark.parametrize(
    ("uri", "cause"),
    [
        ("nbd://", "no host"),
        ("nbd:disk", "no host"),
        ("nbd:///disk", "no host"),
        ("nbd://h:port/", "Port"),
        ("nbd://h:99999/", "Port"),
        ("nbd://[::1/", "Invalid IPv6"),
        ("nbd://u@h/", "user names"),
        ("nbd://h/a#b", "fragments"),
        ("nbd://h/a\nb", "control character"),
        ("nbd://h/%ff", "decode"),
        ("nbd://h/a%00b", "NUL"),
        ("nbd://h/" + "x" * 4097, "4096"),
        ("nbd://h/?socket=s", "have a socket"),
        ("nbd+unix:///disk", "no socket"),
        ("nbd+unix:///disk?socket=", "no socket"),
        ("nbd+unix://h/disk?socket=s", "no host"),
        ("nbd+unix:///disk?socket=s&socket=t", "twice"),
        ("nbd+unix:///disk?socket=s&timeout=3", "'timeout' is not known"),
        ("nbds://h/?tls-verify-peer=0", "'tls-verify-peer' is not known"),
        ("nbd://h/?tls-hostname=x", "without TLS"),
        ("https://h/", "https scheme"),
    ],
)
def test_uris_that_are_none(uri: str, cause: str) -> None:
    with pytest.raises(BlockferryError) as caught:
        NbdUri.parse(uri)
    assert caught.value.code is Code.INVALID_ARGUMENT
    assert cause in caught.value.cause
    assert "nbd://HOST" in caught.value.next


@given(st.text(max_size=40).map("nbd".__add__) | st.text("nbds+unix:/?=&%[]@#h0socket-tls", max_size=40))
def test_any_text_is_a_uri_or_an_error(text: str) -> None:
    with contextlib.suppress(BlockferryError):
        NbdUri.parse(text)


async def test_plaintext_stays_on_this_machine() -> None:
    with pytest.raises(BlockferryError, match="--insecure"):
        await NbdVolume.open("nbd://192.0.2.1/disk")


async def test_certificates_that_are_not_there(tmp_path: Path) -> None:
    uri = f"nbds://127.0.0.1/?tls-certificates={tmp_path}"
    with pytest.raises(BlockferryError) as caught:
        await NbdVolume.open(uri)
    assert caught.value.code is Code.NOT_FOUND
    (tmp_path / "ca-cert.pem").write_text("no certificate")
    with pytest.raises(BlockferryError) as caught:
        await NbdVolume.open(uri)
    assert (caught.value.code, caught.value.volume) == (Code.UNREADABLE, uri)


# --- the map --------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    extents=st.lists(st.tuples(st.integers(1, 3 * REGION), st.integers(0, 7)), min_size=1, max_size=12),
    cuts=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    beyond=st.booleans(),
)
def test_the_map_of_any_status(extents: list[tuple[int, int]], cuts: list[int], beyond: bool) -> None:
    """Whatever number of extents a reply has, and whether or not its last one reaches past the request."""

    async def run(directory: Path) -> None:
        size = sum(length for length, _ in extents)
        server = NbdServer(bytes(size))

        def answer(request: transmission.Request, data: bytes) -> bytes:
            if request.command != Command.BLOCK_STATUS:
                return server.right(request, data)
            found = clipped(extents, request.offset, request.offset + request.length)
            found = found[: cuts[len(server.requests) % len(cuts)]]
            if beyond and sum(length for length, _ in found) == request.length:
                found[-1] = (found[-1][0] + 5 * REGION, found[-1][1])
            return chunks(request, status_chunk(found))

        server.answer = answer
        async with opened(server, directory) as volume:
            found = await volume.allocation(REGION)
        position, data = 0, []
        for length, flags in extents:
            if not flags & 2:
                data.append((position, length))
            position += length
        assert found == AllocationMap.from_extents(Geometry(size, REGION), data, Provenance.EXACT)

    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(run(Path(directory)))


async def test_a_server_that_does_not_tell(tmp_path: Path) -> None:
    for lacks in ([Option.STRUCTURED_REPLY], [Option.SET_META_CONTEXT]):
        server = NbdServer(CONTENT, lacks=lacks)
        async with opened(server, tmp_path) as volume:
            assert await volume.allocation(REGION) == AllocationMap.full(Geometry(volume.size, REGION))
            assert server.requests == []


@pytest.mark.parametrize(
    ("flags", "flushed"),
    [(ALL, True), (ALL | TransmissionFlag.READ_ONLY, False), (ALL & ~TransmissionFlag.SEND_FLUSH, False)],
)
async def test_the_server_flushes_before_it_is_asked(tmp_path: Path, flags: TransmissionFlag, flushed: bool) -> None:
    server = NbdServer(CONTENT, flags=flags)
    async with opened(server, tmp_path) as volume:
        await volume.allocation(REGION)
    expected = [Command.FLUSH, Command.BLOCK_STATUS] if flushed else [Command.BLOCK_STATUS]
    assert [one.command for one in server.requests] == expected


async def test_a_map_that_fails(tmp_path: Path) -> None:
    server = NbdServer(CONTENT, flags=ALL | TransmissionFlag.READ_ONLY)
    server.answer = lambda request, _: transmission.SimpleReply(request.cookie, Errno.EIO).encode()
    async with opened(server, tmp_path) as volume:
        with pytest.raises(BlockferryError) as caught:
            await volume.allocation(REGION)
    assert (caught.value.code, caught.value.offset, caught.value.length) == (Code.IO_ERROR, 0, len(CONTENT))


# --- reading --------------------------------------------------------------------------------------------------------


async def test_holes_that_the_reply_tells_of(tmp_path: Path) -> None:
    server = NbdServer(CONTENT)
    holes = [(5 * BLOCK, 2 * BLOCK), (10 * BLOCK - 5, BLOCK + 10), (20 * BLOCK + 1, 100), (30 * BLOCK, 2 * BLOCK - 7)]
    size = 32 * BLOCK - 7
    expected = bytearray(CONTENT[BLOCK : BLOCK + size])
    for start, length in holes:
        expected[start : start + length] = bytes(length)

    def answer(request: transmission.Request, data: bytes) -> bytes:
        parts, position = [], request.offset
        for start, length in holes:
            at = request.offset + start
            parts += [data_chunk(position, CONTENT[position:at]), hole_chunk(at, length)]
            position = at + length
        return chunks(request, *parts)

    server.answer = answer
    async with opened(server, tmp_path) as volume:
        buffer = bytearray(b"?" * size)
        found = await volume.read_data_into(BLOCK, memoryview(buffer))
        assert found == [(0, 5 * BLOCK), (7 * BLOCK, 3 * BLOCK), (11 * BLOCK, 19 * BLOCK)]
        for start, length in found:
            assert buffer[start : start + length] == expected[start : start + length]
        assert len(server.requests) == 1
        await volume.read_into(BLOCK, memoryview(buffer))
        assert buffer == expected


async def test_reads_of_many_parts_overlap(tmp_path: Path) -> None:
    server = NbdServer(CONTENT)
    waiting: list[bytes] = []

    def answer(request: transmission.Request, data: bytes) -> bytes:
        waiting.append(server.right(request, data))
        return b"".join(waiting) if len(waiting) == 3 else b""

    server.answer = answer
    async with opened(server, tmp_path) as volume:
        buffer = memoryview(bytearray(3 * BLOCK))
        parts = [(offset, buffer[index * BLOCK : (index + 1) * BLOCK]) for index, offset in enumerate((0, REGION, 99))]
        # Nothing is answered before all three are asked.
        assert await asyncio.wait_for(volume.read_data_many(parts), 10) == [[(0, BLOCK)]] * 3
        assert buffer == b"".join(CONTENT[offset : offset + BLOCK] for offset, _ in parts)


async def test_a_part_that_cannot_be_read(tmp_path: Path) -> None:
    server = NbdServer(CONTENT)
    server.answer = lambda request, data: (
        chunks(request, error_chunk(Errno.EIO)) if request.offset == REGION else server.right(request, data)
    )
    async with opened(server, tmp_path) as volume:
        parts = [(offset, memoryview(bytearray(BLOCK))) for offset in (0, REGION, 2 * REGION)]
        with pytest.raises(BlockferryError) as caught:
            await volume.read_data_many(parts)
    assert (caught.value.code, caught.value.offset, caught.value.length) == (Code.IO_ERROR, REGION, BLOCK)


@pytest.mark.parametrize(
    ("flags", "extents", "whole"),
    [
        (ALL | TransmissionFlag.SEND_DF, 128, True),
        (ALL | TransmissionFlag.SEND_DF, 126, False),
        (ALL, 128, False),
    ],
)
async def test_what_is_in_many_pieces_is_asked_for_in_one(
    tmp_path: Path, flags: TransmissionFlag, extents: int, whole: bool
) -> None:
    server = NbdServer(CONTENT, flags=flags)
    server.status = [(BLOCK, index % 2 * 2) for index in range(extents)]
    server.status.append((len(CONTENT) - extents * BLOCK, 2))
    async with opened(server, tmp_path) as volume:
        buffer = bytearray(REGION)
        assert await volume.read_data_into(REGION, memoryview(buffer)) == [(0, REGION)]
        await volume.allocation(REGION)
        assert await volume.read_data_into(REGION, memoryview(buffer)) == [(0, REGION)]
        assert buffer == CONTENT[REGION : 2 * REGION]
    reads = [one.flags for one in server.requests if one.command == Command.READ]
    assert reads == [0, protocol.CommandFlag.DF if whole else 0]


async def test_a_server_that_cannot_answer_in_one_piece(tmp_path: Path) -> None:
    server = NbdServer(CONTENT, flags=ALL | TransmissionFlag.SEND_DF)
    server.status = [(BLOCK, index % 2 * 2) for index in range(128)]
    server.answer = lambda request, data: (
        chunks(request, error_chunk(Errno.EOVERFLOW))
        if request.flags & protocol.CommandFlag.DF
        else server.right(request, data)
    )
    async with opened(server, tmp_path) as volume:
        await volume.allocation(REGION)
        buffer = bytearray(REGION)
        for _ in range(2):
            assert await volume.read_data_into(REGION, memoryview(buffer)) == [(0, REGION)]
            assert buffer == CONTENT[REGION : 2 * REGION]
    reads = [one.flags for one in server.requests if one.command == Command.READ]
    assert reads == [protocol.CommandFlag.DF, 0, 0]


# --- writing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "sizes", "code"),
    [
        (ALL | TransmissionFlag.READ_ONLY, None, Code.READ_ONLY),
        (ALL & ~TransmissionFlag.SEND_FLUSH & ~TransmissionFlag.SEND_FUA, None, Code.UNSUPPORTED),
        (ALL, handshake.BlockSizes(8192, 8192, 1 << 20), Code.UNSUPPORTED),
    ],
)
async def test_exports_that_cannot_be_written(
    tmp_path: Path, flags: TransmissionFlag, sizes: handshake.BlockSizes | None, code: Code
) -> None:
    server = NbdServer(CONTENT, flags=flags, sizes=sizes)
    async with server.at(tmp_path) as uri:
        with pytest.raises(BlockferryError) as caught:
            await NbdVolume.open(uri, writable=True)
        assert (caught.value.code, caught.value.volume) == (code, uri)
        await (await NbdVolume.open(uri)).close()
    assert server.goodbyes == 2


async def test_an_empty_export(tmp_path: Path) -> None:
    async with NbdServer(b"").at(tmp_path) as uri:
        with pytest.raises(BlockferryError, match="empty"):
            await NbdVolume.open(uri)


async def test_opened_for_reading(tmp_path: Path) -> None:
    async with opened(NbdServer(CONTENT), tmp_path) as volume:
        for work in (volume.write([(0, b"x")]), volume.unmap([(0, BLOCK)]), volume.deallocate([(0, BLOCK)])):
            with pytest.raises(BlockferryError) as caught:
                await work
            assert caught.value.code is Code.READ_ONLY
        assert await volume.writers() == []
        assert await volume.current_size() == len(CONTENT)


async def test_fua_where_nothing_flushes(tmp_path: Path) -> None:
    server = NbdServer(CONTENT, flags=ALL & ~TransmissionFlag.SEND_FLUSH)
    async with opened(server, tmp_path, writable=True) as volume:
        await volume.write([(0, b"x" * BLOCK)])
        await volume.unmap([(BLOCK, BLOCK)])
        await volume.flush()
    assert [(one.command, one.flags & 1) for one in server.requests] == [
        (Command.WRITE, 1), (Command.BLOCK_STATUS, 0), (Command.WRITE_ZEROES, 1),
    ]  # fmt: skip


async def test_unmap_says_what_was_held(tmp_path: Path) -> None:
    server = NbdServer(CONTENT)
    server.status = [(BLOCK, 0), (BLOCK, 3), (BLOCK, 1), (len(CONTENT) - 3 * BLOCK, 2)]
    async with opened(server, tmp_path, writable=True) as volume:
        assert volume.zeroing == "write-zeroes"
        assert await volume.unmap([(0, 2 * BLOCK), (2 * BLOCK, 2 * BLOCK)]) == 2 * BLOCK
        assert await volume.deallocate([(0, 3 * BLOCK)]) == (2 * BLOCK, [])
    assert server.content == bytes(4 * BLOCK) + CONTENT[4 * BLOCK :]
    zeroed = [(one.flags, one.offset, one.length) for one in server.requests if one.command == Command.WRITE_ZEROES]
    # May punch (no NO_HOLE), and the last one may do nothing slower than that.
    assert zeroed == [(0, 0, 2 * BLOCK), (0, 2 * BLOCK, 2 * BLOCK), (16, 0, 3 * BLOCK)]


async def test_a_server_that_would_write_zeros_out_says_so(tmp_path: Path) -> None:
    server = NbdServer(CONTENT)
    server.answer = lambda request, data: (
        transmission.SimpleReply(request.cookie, Errno.ENOTSUP).encode()
        if request.flags & protocol.CommandFlag.FAST_ZERO and request.offset == BLOCK
        else server.right(request, data)
    )
    async with opened(server, tmp_path, writable=True) as volume:
        assert await volume.deallocate([(0, BLOCK), (BLOCK, BLOCK), (2 * BLOCK, BLOCK)]) == (
            2 * BLOCK,
            [(BLOCK, BLOCK)],
        )
        assert volume.zeroing == "write-zeroes"
        assert server.content[: 3 * BLOCK] == bytes(BLOCK) + CONTENT[BLOCK : 2 * BLOCK] + bytes(BLOCK)
        assert await volume.unmap([(BLOCK, BLOCK)]) == BLOCK
    assert server.content == bytes(3 * BLOCK) + CONTENT[3 * BLOCK :]
    assert server.of(Command.WRITE) == []


async def test_a_server_that_says_nothing_of_it_is_not_asked(tmp_path: Path) -> None:
    server = NbdServer(CONTENT, flags=ALL & ~TransmissionFlag.SEND_FAST_ZERO)
    async with opened(server, tmp_path, writable=True) as volume:
        assert await volume.deallocate([(0, BLOCK)]) == (0, [(0, BLOCK)])
    assert server.requests == []
    assert server.content == CONTENT


@pytest.mark.parametrize("announced", [False, True])
async def test_a_server_that_cannot_zero(tmp_path: Path, announced: bool) -> None:
    flags = ALL if announced else ALL & ~TransmissionFlag.SEND_WRITE_ZEROES & ~TransmissionFlag.SEND_FAST_ZERO
    server = NbdServer(CONTENT, flags=flags, lacks=[Option.SET_META_CONTEXT])
    server.answer = lambda request, data: (
        transmission.SimpleReply(request.cookie, Errno.ENOTSUP).encode()
        if request.command == Command.WRITE_ZEROES
        else server.right(request, data)
    )
    async with opened(server, tmp_path, writable=True) as volume:
        assert volume.zeroing == ("write-zeroes" if announced else "write")
        assert await volume.unmap([(BLOCK, 2 * BLOCK)]) == 2 * BLOCK
        assert volume.zeroing == "write"
        assert await volume.unmap([(5 * BLOCK, BLOCK)]) == BLOCK
    assert server.of(Command.WRITE) == [(BLOCK, 2 * BLOCK), (5 * BLOCK, BLOCK)]
    assert len(server.of(Command.WRITE_ZEROES)) == announced
    assert server.content[BLOCK : 3 * BLOCK] == bytes(2 * BLOCK)


async def test_other_failures_of_zeroing_are_failures(tmp_path: Path) -> None:
    server = NbdServer(CONTENT)
    server.answer = lambda request, data: (
        transmission.SimpleReply(request.cookie, Errno.EIO).encode()
        if request.command == Command.WRITE_ZEROES
        else server.right(request, data)
    )
    async with opened(server, tmp_path, writable=True) as volume:
        for work in (volume.unmap([(0, BLOCK)]), volume.deallocate([(0, BLOCK)])):
            with pytest.raises(BlockferryError) as caught:
                await work
            assert (caught.value.code, caught.value.offset, caught.value.length) == (Code.IO_ERROR, 0, BLOCK)
    assert server.content == CONTENT
