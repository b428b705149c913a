"""What clients can make the server of NBD hold, and how connections and the server end."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.nbd.answers import PIECE
from blockferry.common.nbd.peer import Limits
from blockferry.common.nbd.protocol import Command, Errno, Option, OptionReply
from blockferry.common.volumes import ImageVolume

from tests.images import BLOCK, MIB, noise
from tests.unit.nbd.raw import BASE, BOUND, Raw, served
from tests.unit.nbd.volumes import CONTENT, SIZE, Batching, Volume


@pytest.fixture(params=[Volume, Batching])
def volume(request: pytest.FixtureRequest) -> Volume:
    kind: type[Volume] = request.param
    return kind()


# --- bounds ---------------------------------------------------------------------------------------------------------


async def test_who_chooses_no_export_has_to_go(volume: Volume, tmp_path: Path) -> None:
    async with served(volume, tmp_path, limits=Limits(handshake=0.1)) as one:
        client = await one.open()
        silent = await Raw.connect(one.path)
        half = await Raw.connect(one.path)
        await half.greet()
        half.writer.write(b"IHAVEO")
        for bad in (silent, half):
            await (bad.read(18) if bad is silent else asyncio.sleep(0))
            assert await bad.ended()
        assert (await client.fine(Command.READ, 0, 5)).whole == CONTENT[:5], "it has all the time there is"


async def test_idle_connections_keep_nobody_out(volume: Volume, tmp_path: Path) -> None:
    async with served(volume, tmp_path, limits=Limits(handshakes=8)) as one:
        idle = [await Raw.connect(one.path) for _ in range(100)]
        client = await one.open()
        assert (await client.fine(Command.READ, 0, 5)).whole == CONTENT[:5]
        for bad in idle[:92]:
            await bad.read(18)
            assert await bad.ended()
        assert len(one.server._handshaking) <= 8
        for bad in idle:
            bad.cut()


async def test_so_many_clients_and_no_more(volume: Volume, tmp_path: Path) -> None:
    async with served(volume, tmp_path, limits=Limits(connections=3)) as one:
        clients = [await one.open() for _ in range(3)]
        late = await Raw.connect(one.path)
        await late.greet()
        ((kind, text),) = await late.option(Option.GO, b"\0\0\0\4disk\0\0")
        assert (kind, text) == (OptionReply.ERR_POLICY, b"the server has 3 clients, and takes no more")
        clients[0].cut()
        async with asyncio.timeout(BOUND):
            while one.server.clients > 2:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        # The same connection may ask again.
        assert (await late.option(Option.GO, b"\0\0\0\4disk\0\0"))[-1] == (OptionReply.ACK, b"")


async def test_who_never_reads_is_in_nobodys_way(volume: Volume, tmp_path: Path) -> None:
    limits = Limits(bytes_in_flight=4 * MIB, bytes_each=2 * MIB, requests=32)
    async with served(volume, tmp_path, limits=limits) as one:
        greedy = [await one.open() for _ in range(8)]
        for client in greedy:
            for _ in range(1000):
                client.ask(Command.READ, 0, 4 * MIB)
        good = await one.open(contexts=BASE)
        for _ in range(3):
            assert (await good.fine(Command.READ, 0, 3 * MIB)).whole == CONTENT[: 3 * MIB]
            await good.fine(Command.WRITE, 0, data=CONTENT[: 2 * MIB])
            await good.fine(Command.BLOCK_STATUS, 0, SIZE)
        # Everybody's bound, and one step for each connection.
        assert one.server.room.most <= 4 * MIB + 9 * PIECE
        for client in greedy:
            client.cut()


async def test_data_that_never_comes_is_in_nobodys_way(volume: Volume, tmp_path: Path) -> None:
    limits = Limits(bytes_in_flight=2 * MIB, bytes_each=2 * MIB)
    async with served(volume, tmp_path, limits=limits) as one:
        for _ in range(8):
            client = await one.open()
            client.ask(Command.WRITE, 0, 32 * 1024)  # of which nothing follows
            half = await one.open()
            half.ask(Command.WRITE, 0, 3 * MIB)
            half.writer.write(bytes(MIB + 5))
        good = await one.open()
        # The same place: what has not arrived takes no turn.
        await good.fine(Command.WRITE, 0, data=noise("good", 3 * MIB))
        assert (await good.fine(Command.READ, MIB, MIB)).whole == noise("good", 3 * MIB)[MIB : 2 * MIB]
        assert one.server.room.most <= 2 * MIB + 17 * PIECE


async def test_requests_that_are_not_answered_are_bounded(tmp_path: Path) -> None:
    volume = Volume()
    volume.slow = {0: asyncio.Event()}
    async with served(volume, tmp_path, limits=Limits(requests=10)) as one:
        client, other = await one.open(), await one.open()
        for _ in range(50):
            client.ask(Command.READ, 0, 1)
        async with asyncio.timeout(BOUND):
            while max(peer._requests for peer in one.server._clients) < 10:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        for _ in range(3):
            assert (await other.fine(Command.READ, 5, 1)).whole == CONTENT[5:6]
            assert sorted(peer._requests for peer in one.server._clients) == [0, 10]
        volume.slow[0].set()
        assert [(await client.answer()).whole for _ in range(50)] == [CONTENT[:1]] * 50


# --- the end --------------------------------------------------------------------------------------------------------


async def test_a_client_that_dies_leaves_nothing(tmp_path: Path) -> None:
    volume = Volume()
    volume.slow = {0: asyncio.Event(), BLOCK: asyncio.Event()}
    async with served(volume, tmp_path) as one:
        client, other = await one.open(), await one.open()
        for _ in range(5):
            client.ask(Command.READ, 0, MIB)
        client.ask(Command.WRITE, BLOCK, data=b"arrived")
        client.ask(Command.WRITE, BLOCK, data=b"waits for it")
        client.ask(Command.WRITE, 2 * BLOCK, 100)
        client.writer.write(b"half of it")
        async with asyncio.timeout(BOUND):
            while one.export.ordering.waiting < 1:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        client.cut()
        async with asyncio.timeout(BOUND):
            while one.server.clients > 1:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        late = other.ask(Command.WRITE, BLOCK, data=b"later")
        volume.slow[BLOCK].set()
        assert (await other.answer()).cookie == late
        # What had arrived was made, in its order; what had not was not.
        assert volume.of("write") == [(BLOCK, 7), (BLOCK, 12), (BLOCK, 5)]
        assert volume.of("read") == []
        assert one.server.room.used == 0


async def test_goodbye(tmp_path: Path) -> None:
    """What was asked for before is answered."""
    volume = Volume()
    volume.slow = {0: asyncio.Event()}
    async with served(volume, tmp_path) as one:
        client = await one.open()
        slow = client.ask(Command.READ, 0, 3)
        await client.fine(Command.READ, 1, 1)
        client.ask(Command.DISC)
        client.ask(Command.READ, 5, 5)
        volume.slow[0].set()
        found = await client.answer()
        assert (found.cookie, found.whole) == (slow, CONTENT[:3])
        assert await client.ended()


async def test_a_server_that_stops(tmp_path: Path) -> None:
    """What is under way is finished, what comes is refused, and what was written is flushed."""
    volume = Volume()
    volume.slow = {0: asyncio.Event()}
    async with served(volume, tmp_path) as one:
        client = await one.open()
        slow = client.ask(Command.WRITE, 0, data=b"slow")
        await client.fine(Command.READ, 1, 1)
        stopping = asyncio.create_task(one.server.close())
        async with asyncio.timeout(BOUND):
            while one.path.exists():  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        assert (await client.get(Command.READ, 5, 5)).error == Errno.ESHUTDOWN
        assert (await client.get(Command.WRITE, 5, data=b"more")).error == Errno.ESHUTDOWN
        volume.slow[0].set()
        found = await client.answer()
        assert (found.cookie, found.error) == (slow, 0)
        await stopping
        assert await client.ended()
        assert volume.operations[-2:] == [("write", 0, 4), ("flush", 0, 0)]


async def test_a_socket_that_is_taken(volume: Volume, tmp_path: Path) -> None:
    from blockferry.common.nbd.server import NbdServer
    from blockferry.common.nbd.uri import NbdListen

    async with served(volume, tmp_path) as one:
        where = NbdListen(str(one.path), "", 0)
        with pytest.raises(BlockferryError) as caught:
            await NbdServer([one.export]).listen(where)
        assert caught.value.code is Code.IN_USE
        assert (await (await one.open()).fine(Command.READ, 0, 5)).whole == CONTENT[:5]
        with pytest.raises(BlockferryError) as caught:
            await NbdServer([one.export]).listen(NbdListen("", "0.0.0.0", 0))
        assert caught.value.code is Code.UNSUPPORTED
    # One that was left behind by a server that died is nobody's.
    import socket

    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(one.path))
    async with served(volume, tmp_path) as two:
        assert (await (await two.open()).fine(Command.READ, 0, 5)).whole == CONTENT[:5]


async def test_an_image_is_read_in_place(tmp_path: Path) -> None:
    """What is in memory is answered without a thread; what is not with one."""
    image = tmp_path / "image.raw"
    image.write_bytes(CONTENT)
    volume = await ImageVolume.open(image, writable=True)
    async with served(volume, tmp_path) as one:
        client = await one.open()
        asked = [(offset, length) for offset in (0, 7, MIB, SIZE - 300) for length in (1, 300)]
        cookies = {client.ask(Command.READ, *wanted): wanted for wanted in asked}
        for _ in asked:
            found = await client.answer()
            offset, length = cookies.pop(found.cookie)
            assert found.whole == CONTENT[offset : offset + length]
        volume._now = None
        cookies = {client.ask(Command.READ, *wanted): wanted for wanted in asked}
        for _ in asked:
            found = await client.answer()
            offset, length = cookies.pop(found.cookie)
            assert found.whole == CONTENT[offset : offset + length]
        data = noise("new", 3 * MIB)
        await client.fine(Command.WRITE, 5, data=data)
        assert (await client.fine(Command.READ, 5, 3 * MIB)).whole == data
    await volume.close()
