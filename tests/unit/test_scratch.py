"""Changes that are thrown away: their bound, where they are, and that nothing of them reaches what is below."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.volumes.scratch import ScratchVolume

from tests.images import BLOCK, KIB, noise
from tests.unit.memory_volume import MemoryVolume

SIZE = 64 * KIB + 100
CONTENT = noise("scratch", SIZE)


async def content_of(volume: ScratchVolume) -> bytes:
    buffer = bytearray(volume.size)
    await volume.read_into(0, memoryview(buffer))
    return bytes(buffer)


async def test_what_is_below_stays(tmp_path: Path) -> None:
    base = MemoryVolume(CONTENT)
    volume = await ScratchVolume.open(base, tmp_path, SIZE * 2)
    assert os.listdir(tmp_path) == []
    await volume.write([(100, b"x" * 10), (BLOCK, b"y" * 2 * BLOCK), (SIZE - 1, b"z")])
    await volume.unmap([(3 * BLOCK, BLOCK), (5 * BLOCK + 7, 3 * BLOCK)])
    expected = bytearray(CONTENT)
    expected[100:110] = b"x" * 10
    expected[BLOCK : 3 * BLOCK] = b"y" * 2 * BLOCK
    expected[-1:] = b"z"
    expected[3 * BLOCK : 4 * BLOCK] = bytes(BLOCK)
    expected[5 * BLOCK + 7 : 8 * BLOCK + 7] = bytes(3 * BLOCK)
    assert await content_of(volume) == expected
    assert bytes(base.data) == CONTENT
    assert base.of("write") == base.of("unmap") == []
    # Four blocks that were written, and both edges of what was unmapped.
    assert volume.bytes_held == 6 * BLOCK
    fd = volume._fd
    await volume.close()
    await volume.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


async def test_the_limit_is_of_what_is_held(tmp_path: Path) -> None:
    volume = await ScratchVolume.open(MemoryVolume(CONTENT), tmp_path, 4 * BLOCK)
    await volume.write([(0, bytes(4 * BLOCK))])
    await volume.write([(5, b"again"), (BLOCK, b"and again")])
    with pytest.raises(BlockferryError) as caught:
        await volume.write([(4 * BLOCK, b"one more")])
    error = caught.value
    assert (error.code, error.offset, error.length) == (Code.OUT_OF_SPACE, 4 * BLOCK, 8)
    assert (
        await content_of(volume)
        == bytes(5) + b"again" + bytes(BLOCK - 10) + b"and again" + bytes(3 * BLOCK - 9) + CONTENT[4 * BLOCK :]
    )
    # What is zeroed takes no room, and gives back what it had.
    assert await volume.unmap([(0, 2 * BLOCK)]) == 2 * BLOCK
    await volume.write([(4 * BLOCK, b"one more"), (6 * BLOCK, b"and another")])
    with pytest.raises(BlockferryError):
        await volume.write([(8 * BLOCK, b"x")])
    await volume.close()


async def test_space_is_given_back(tmp_path: Path) -> None:
    volume = await ScratchVolume.open(MemoryVolume(CONTENT), tmp_path, SIZE * 2)
    await volume.write([(0, CONTENT)])
    await volume.flush()
    os.fsync(volume._fd)
    assert os.fstat(volume._fd).st_blocks * 512 >= SIZE
    await volume.unmap([(0, 64 * KIB)])
    assert os.fstat(volume._fd).st_blocks * 512 <= 2 * BLOCK
    await volume.close()


async def test_reading_at_once(tmp_path: Path) -> None:
    """Only what is wholly here or wholly below; both together have to be put together."""
    volume = await ScratchVolume.open(MemoryVolume(CONTENT), tmp_path, SIZE * 2)
    buffer = memoryview(bytearray(2 * BLOCK))
    assert not volume.read_now(0, buffer), "the volume below cannot"
    await volume.write([(0, b"x" * BLOCK)])
    await volume.unmap([(8 * BLOCK, BLOCK)])
    assert not volume.read_now(0, buffer)
    assert not volume.read_now(8 * BLOCK, buffer[:BLOCK])
    if volume.read_now(0, buffer[:BLOCK]):
        assert buffer[:BLOCK] == b"x" * BLOCK
    await volume.close()


async def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(BlockferryError) as caught:
        await ScratchVolume.open(MemoryVolume(CONTENT), tmp_path / "nowhere", SIZE)
    assert caught.value.code is Code.NOT_FOUND
