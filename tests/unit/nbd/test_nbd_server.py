"""The server of NBD, request by request: what a volume is asked for, what is answered, and in which order."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from blockferry.common.errors import Code
from blockferry.common.nbd.answers import PIECE
from blockferry.common.nbd.protocol import Allocation, Command, CommandFlag, Errno

from tests.images import BLOCK, KIB, MIB, noise
from tests.unit.nbd.raw import BASE, BOUND, Raw, served
from tests.unit.nbd.volumes import CONTENT, SIZE, Batching, Volume

FUA, DF = CommandFlag.FUA, CommandFlag.DF
HOLE = int(Allocation.HOLE | Allocation.ZERO)


@pytest.fixture(params=[Volume, Batching])
def volume(request: pytest.FixtureRequest) -> Volume:
    kind: type[Volume] = request.param
    return kind()


async def until_waiting(volume: Volume, count: int, kind: str) -> None:
    """Until so many operations of a kind have come."""
    async with asyncio.timeout(BOUND):
        while len(volume.of(kind)) < count:  # noqa: ASYNC110
            await asyncio.sleep(0.001)


# --- reading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structured", [True, False])
async def test_reads_of_any_size(volume: Volume, tmp_path: Path, structured: bool) -> None:
    ranges = [(0, 1), (1, 511), (4096, 4096), (MIB - 7, MIB + 100), (0, SIZE), (SIZE - 1, 1), (3 * MIB, 2 * MIB + 5)]
    async with served(volume, tmp_path, read_only=True) as one:
        client = await one.open(structured=structured)
        for offset, length in ranges:
            assert (await client.fine(Command.READ, offset, length)).whole == CONTENT[offset : offset + length]
        cookies = {client.ask(Command.READ, offset, length): (offset, length) for offset, length in ranges}
        for _ in range(len(ranges)):
            found = await client.answer()
            offset, length = cookies.pop(found.cookie)
            assert found.whole == CONTENT[offset : offset + length]
        nothing = await client.fine(Command.READ, 5, 0)
        assert nothing.whole == b""
    assert all(length <= PIECE for _, length in volume.of("read"))


async def test_holes_are_told_and_not_sent(volume: Volume, tmp_path: Path) -> None:
    async with served(volume, tmp_path, read_only=True) as one:
        client = await one.open()
        found = await client.fine(Command.READ, MIB - 64 * KIB, 512 * KIB)
        assert list(found.data) == [MIB - 64 * KIB] and len(found.data[MIB - 64 * KIB]) == 64 * KIB
        assert found.holes == [(MIB, 448 * KIB)]
        assert (await client.fine(Command.READ, MIB, MIB)).holes == [(MIB, MIB)]
        # A small one is not looked at, and one in one chunk has to be data.
        assert (await client.fine(Command.READ, MIB, 4096)).data == {MIB: bytes(4096)}
        whole = await client.fine(Command.READ, MIB, MIB, DF)
        assert (whole.data, whole.chunks) == ({MIB: bytes(MIB)}, 1)
        plain = await one.open(structured=False)
        assert (await plain.fine(Command.READ, MIB, MIB)).data == {MIB: bytes(MIB)}


async def test_what_is_not_flushed_yet_is_read_and_not_looked_at(volume: Volume, tmp_path: Path) -> None:
    async with served(volume, tmp_path) as one:
        client = await one.open()
        assert not (await client.fine(Command.READ, MIB, MIB)).holes, "who knows what was done to it before"
        await client.fine(Command.FLUSH)
        assert (await client.fine(Command.READ, MIB, MIB)).holes == [(MIB, MIB)]
        await client.fine(Command.WRITE, 0, data=b"x")
        assert not (await client.fine(Command.READ, MIB, MIB)).holes
        await client.fine(Command.FLUSH)
        assert (await client.fine(Command.READ, MIB, MIB)).holes == [(MIB, MIB)]


async def test_a_slow_read_holds_up_nothing(tmp_path: Path) -> None:
    volume = Volume()
    volume.slow = {0: asyncio.Event(), MIB: asyncio.Event()}
    async with served(volume, tmp_path) as one:
        client = await one.open()
        slow = client.ask(Command.READ, 0, 4096)
        slower = client.ask(Command.READ, MIB, 2 * MIB)
        for number in range(100):
            offset = 3 * MIB + number * BLOCK
            assert (await client.fine(Command.READ, offset, BLOCK)).whole == CONTENT[offset : offset + BLOCK]
        await client.fine(Command.WRITE, 3 * MIB, data=b"meanwhile")
        await client.fine(Command.FLUSH)
        volume.slow[MIB].set()
        found = await client.answer()
        assert (found.cookie, found.whole) == (slower, CONTENT[MIB : 3 * MIB])
        volume.slow[0].set()
        found = await client.answer()
        assert (found.cookie, found.whole) == (slow, CONTENT[:4096])


async def test_one_bad_read_of_many(volume: Volume, tmp_path: Path) -> None:
    volume.bad = {5 * BLOCK: Code.IO_ERROR}
    async with served(volume, tmp_path, read_only=True) as one:
        for structured in (True, False):
            client = await one.open(structured=structured)
            cookies = {client.ask(Command.READ, number * BLOCK, BLOCK): number for number in range(20)}
            for _ in range(20):
                found = await client.answer()
                number = cookies.pop(found.cookie)
                assert found.error == (Errno.EIO if number == 5 else 0)
                assert found.message == ("bad at 20480" if number == 5 and structured else "")
                if number != 5:
                    assert found.whole == CONTENT[number * BLOCK : (number + 1) * BLOCK]


async def test_a_long_read_that_fails_half_way(volume: Volume, tmp_path: Path) -> None:
    volume.bad = {3 * PIECE: Code.UNAVAILABLE}
    async with served(volume, tmp_path, read_only=True) as one:
        client = await one.open()
        found = await client.get(Command.READ, 2 * PIECE, 3 * PIECE)
        assert (found.error, found.data) == (Errno.EIO, {2 * PIECE: CONTENT[2 * PIECE : 3 * PIECE]})
        assert (await client.fine(Command.READ, 0, 5)).whole == CONTENT[:5]
        # Its answer has begun as a success: without chunks there is no other way to say so.
        plain = await one.open(structured=False)
        plain.ask(Command.READ, 2 * PIECE, 3 * PIECE)
        await plain.read(16 + PIECE)
        assert await plain.ended()


# --- changing -------------------------------------------------------------------------------------------------------


async def test_writes_of_any_size(volume: Volume, tmp_path: Path) -> None:
    expected = bytearray(CONTENT)
    async with served(volume, tmp_path) as one:
        client = await one.open()
        cookies = set()
        for number, (offset, length) in enumerate([(0, 1), (4095, 2), (8192, 4096), (MIB + 3, 3 * MIB + 1)]):
            data = noise(number, length)
            expected[offset : offset + length] = data
            cookies.add(client.ask(Command.WRITE, offset, data=data))
        for _ in range(len(cookies)):
            found = await client.answer()
            assert not found.error
            cookies.remove(found.cookie)
        assert volume.data == expected
        assert not (await client.fine(Command.WRITE, 7, 0)).error
        assert (await client.fine(Command.READ, 0, SIZE)).whole == expected
    assert all(length <= PIECE for _, length in volume.of("write"))


async def test_writes_that_overlap_end_in_the_order_in_which_they_came(tmp_path: Path) -> None:
    volume = Volume()
    volume.slow = {0: asyncio.Event()}
    async with served(volume, tmp_path) as one:
        first, second = await one.open(), await one.open()
        early = first.ask(Command.WRITE, 0, data=b"early" * 100)
        await first.fine(Command.WRITE, 10 * BLOCK, data=b"elsewhere")
        # The same block, though not the same bytes.
        late = second.ask(Command.WRITE, 600, data=b"late")
        zeroes = second.ask(Command.WRITE_ZEROES, 602, 100)
        await second.fine(Command.WRITE, 20 * BLOCK, data=b"elsewhere")
        assert volume.of("write") == [(10 * BLOCK, 9), (20 * BLOCK, 9)]
        volume.slow[0].set()
        assert (await first.answer()).cookie == early
        assert [(await second.answer()).cookie for _ in range(2)] == [late, zeroes]
    touched = [one for one in volume.operations if one[1] < BLOCK and one[0] != "flush"]
    assert touched == [("write", 0, 500), ("write", 600, 4), ("unmap", 602, 100)]
    assert volume.data[598:604] == CONTENT[598:600] + b"la" + bytes(2)


async def test_one_bad_write_of_many(volume: Volume, tmp_path: Path) -> None:
    volume.bad = {3 * BLOCK: Code.OUT_OF_SPACE}
    async with served(volume, tmp_path) as one:
        client = await one.open()
        cookies = {client.ask(Command.WRITE, number * BLOCK, data=b"new" * 100): number for number in range(6)}
        found = {cookies[answer.cookie]: answer for answer in [await client.answer() for _ in cookies]}
        assert {number: answer.error for number, answer in found.items()} == {
            number: Errno.ENOSPC if number == 3 else 0 for number in range(6)
        }
        assert found[3].message == "bad at 12288"


async def test_a_long_write_that_fails_half_way(volume: Volume, tmp_path: Path) -> None:
    volume.bad = {PIECE: Code.IO_ERROR}
    async with served(volume, tmp_path) as one:
        client = await one.open()
        assert (await client.get(Command.WRITE, 0, data=bytes(4 * MIB))).error == Errno.EIO
        # Its data is all gone from the line.
        assert (await client.fine(Command.READ, 0, 5)).whole == bytes(5)


async def test_a_write_is_durable_where_it_is_asked_to_be(volume: Volume, tmp_path: Path) -> None:
    async with served(volume, tmp_path) as one:
        client = await one.open()
        volume.operations.clear()
        await client.fine(Command.WRITE, 0, data=b"x")
        assert volume.operations == [("write", 0, 1)]
        await client.fine(Command.WRITE, 5, data=b"y", flags=FUA)
        await client.fine(Command.WRITE_ZEROES, 9, 5, FUA)
        await client.fine(Command.READ, 0, 1, FUA)
        assert [kind for kind, _, _ in volume.operations] == ["write", "write", "flush", "unmap", "flush", "read"]
        volume.flush_fails = True
        assert (await client.get(Command.TRIM, 0, 5, FUA)).error == Errno.EIO


async def test_flushes_are_shared(volume: Volume, tmp_path: Path) -> None:
    async with served(volume, tmp_path) as one:
        clients = [await one.open() for _ in range(3)]
        volume.flushing.clear()
        first = clients[0].ask(Command.FLUSH)
        await until_waiting(volume, 1, "flush")
        for client in clients:
            for _ in range(4):
                client.ask(Command.FLUSH)
        for client in clients:
            # None of these waits for a flush, so that all that came before has been taken.
            await client.fine(Command.READ, 0, 1)
        volume.flushing.set()
        assert (await clients[0].answer()).cookie == first
        for client in clients:
            for _ in range(4):
                assert not (await client.answer()).error
        assert volume.flushes == 2, "the one under way, and one for all others"


async def test_after_a_flush_that_failed_nothing_is_written(volume: Volume, tmp_path: Path) -> None:
    async with served(volume, tmp_path) as one:
        client, other = await one.open(), await one.open(contexts=BASE)
        await client.fine(Command.WRITE, 0, data=b"written")
        volume.flush_fails = True
        assert (await client.get(Command.FLUSH)).error == Errno.EIO
        volume.flush_fails = False
        before = list(volume.operations)
        for command in (Command.TRIM, Command.WRITE_ZEROES, Command.FLUSH):
            assert (await other.get(command, 0, 5)).error == Errno.EIO
        assert (await other.get(Command.WRITE, 0, data=b"later")).error == Errno.EIO
        assert volume.operations == before
        assert (await other.fine(Command.READ, 0, 7)).whole == b"written"
        assert (await other.fine(Command.BLOCK_STATUS, 0, MIB)).status == {1: ((MIB, 0),)}


async def test_zeroing(volume: Volume, tmp_path: Path) -> None:
    async with served(volume, tmp_path) as one:
        client = await one.open()
        volume.operations.clear()
        await client.fine(Command.WRITE_ZEROES, 100, 200)
        await client.fine(Command.WRITE_ZEROES, 0, 2 * BLOCK, CommandFlag.FAST_ZERO)
        await client.fine(Command.WRITE_ZEROES, 3 * BLOCK, BLOCK, CommandFlag.NO_HOLE)
        assert volume.operations == [("unmap", 100, 200), ("unmap", 0, 2 * BLOCK), ("write", 3 * BLOCK, BLOCK)]
        fast = await client.get(Command.WRITE_ZEROES, 0, BLOCK, CommandFlag.FAST_ZERO | CommandFlag.NO_HOLE)
        assert fast.error == Errno.ENOTSUP
        volume._zeroing = "write"
        volume.operations.clear()
        assert (await client.get(Command.WRITE_ZEROES, 0, BLOCK, CommandFlag.FAST_ZERO)).error == Errno.ENOTSUP
        # A trim promises nothing: what can only be written out is left alone.
        await client.fine(Command.TRIM, 8 * BLOCK, BLOCK)
        assert volume.operations == []
        await client.fine(Command.WRITE_ZEROES, 3 * BLOCK, 3 * BLOCK)
        assert volume.operations == [("unmap", 3 * BLOCK, 3 * BLOCK)]


# --- what is known --------------------------------------------------------------------------------------------------


async def test_block_status(volume: Volume, tmp_path: Path) -> None:
    async with served(volume, tmp_path, read_only=True) as one:
        client = await one.open(contexts=BASE)
        found = await client.fine(Command.BLOCK_STATUS, 0, SIZE)
        assert found.status == {1: ((MIB, 0), (MIB, HOLE), (SIZE - 2 * MIB, 0))}
        found = await client.fine(Command.BLOCK_STATUS, 100, MIB)
        assert found.status == {1: ((MIB - 100, 0), (100, HOLE))}
        found = await client.fine(Command.BLOCK_STATUS, 0, SIZE, CommandFlag.REQ_ONE)
        assert found.status == {1: ((MIB, 0),)}
        plain = await one.open()
        assert (await plain.get(Command.BLOCK_STATUS, 0, SIZE)).error == Errno.EINVAL


async def test_a_status_is_of_what_is_on_the_disk(volume: Volume, tmp_path: Path) -> None:
    async with served(volume, tmp_path) as one:
        client = await one.open(contexts=BASE)
        await client.fine(Command.WRITE, MIB, data=b"x")
        for _ in range(2):
            found = await client.fine(Command.BLOCK_STATUS, MIB, 2 * BLOCK)
            assert found.status == {1: ((BLOCK, 0), (BLOCK, HOLE))}
        assert volume.flushes == 1


class Telling(Volume):
    """It tells something of its own."""

    contexts = ("blockferry:hydrated",)

    async def status(self, context: str, offset: int, length: int) -> list[tuple[int, int]]:
        assert context == "blockferry:hydrated"
        return [(1, 1), (2, 1), (length - 3, 0)]


async def test_a_context_of_the_volume(tmp_path: Path) -> None:
    async with served(Telling(), tmp_path, read_only=True) as one:
        both = await one.open(contexts=(*BASE, "blockferry:hydrated"))
        found = await both.fine(Command.BLOCK_STATUS, 0, 2 * MIB)
        assert found.status == {1: ((MIB, 0), (MIB, HOLE)), 2: ((3, 1), (2 * MIB - 3, 0))}
        only = await one.open(contexts=("blockferry:hydrated",))
        assert (await only.fine(Command.BLOCK_STATUS, 0, 10, CommandFlag.REQ_ONE)).status == {1: ((3, 1),)}


async def test_prefetching(volume: Volume, tmp_path: Path) -> None:
    async with served(volume, tmp_path, read_only=True) as one:
        client = await one.open()
        await client.fine(Command.CACHE, 5, MIB)
        assert volume.prefetched == [(5, MIB)]


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structured", [True, False])
async def test_what_is_refused_is_answered_and_changes_nothing(
    volume: Volume, tmp_path: Path, structured: bool
) -> None:
    async with served(volume, tmp_path) as one:
        client = await one.open(structured=structured)
        volume.operations.clear()
        for command, offset, length, flags, expected in (
            (Command.READ, SIZE, 1, 0, Errno.EINVAL),
            (Command.READ, 0, 1, 1 << 14, Errno.EINVAL),
            (Command.WRITE_ZEROES, SIZE - 1, 2, 0, Errno.ENOSPC),
            (42, 0, 0, 0, Errno.EINVAL),
        ):
            assert (await client.get(command, offset, length, flags)).error == expected
        long = await client.get(Command.WRITE, SIZE - 1, data=bytes(3 * MIB))
        assert (long.error, bool(long.message)) == (Errno.ENOSPC, structured)
        assert volume.operations == []
        assert (await client.fine(Command.READ, 0, 5)).whole == CONTENT[:5]


async def test_a_read_only_export(volume: Volume, tmp_path: Path) -> None:
    async with served(volume, tmp_path, read_only=True) as one:
        client = await one.open()
        assert (await client.get(Command.WRITE, 0, data=b"x" * 100)).error == Errno.EPERM
        for command in (Command.TRIM, Command.WRITE_ZEROES):
            assert (await client.get(command, 0, 5)).error == Errno.EPERM
        await client.fine(Command.FLUSH)
    assert volume.operations == []


async def test_garbage_ends_its_own_connection_only(volume: Volume, tmp_path: Path) -> None:
    async with served(volume, tmp_path) as one:
        good = await one.open()
        for garbage in (b"\0" * 28, b"GET / HTTP/1.1\r\n\r\n" * 10):
            bad = await one.open()
            bad.writer.write(garbage)
            assert await bad.ended()
        long = await one.open()
        long.ask(Command.WRITE, 0, 32 * MIB + 1)
        assert await long.ended()
        for garbage in (b"\xff" * 4, b"\0\0\0\3" + b"NOTANOPTION" * 9):
            bad = await Raw.connect(one.path)
            bad.writer.write(garbage)
            await bad.read(18)
            assert await bad.ended()
        assert (await good.fine(Command.READ, 0, 5)).whole == CONTENT[:5]
        assert one.server.clients == 1
