"""Images with holes and deltas over them, and what they hold as plain bytes."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from blockferry.common.regions import BLOCK_SIZE
from blockferry.common.volumes import ImageVolume
from blockferry.server.delta import Delta
from hypothesis import strategies as st
from pyroaring import BitMap64

B = BLOCK_SIZE
MOST = 12
"""Blocks of the largest volume here."""


@contextlib.contextmanager
def quick_directory() -> Iterator[Path]:
    """A directory for files that a test makes by the hundred: in memory, where there is such a file system."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_mount() and os.access(memory, os.W_OK) else None) as name:
        yield Path(name)


def stamped(tag: int, block: int, length: int = B) -> bytes:
    """The beginning of a block that nothing else here holds; never zeros."""
    return (bytes([tag + 1, block + 1, 0xA5, 0xFF]) * (B // 4))[:length]


def shortened(block: int, size: int) -> int:
    """Bytes of a block in a volume of `size` bytes."""
    return max(0, min(B, size - block * B))


@dataclass
class Image:
    """A file: its size, and the blocks that are not holes."""

    size: int
    held: set[int] = field(default_factory=set)

    def content(self) -> bytes:
        """What it holds."""
        found = bytearray(self.size)
        for block in self.held:
            length = shortened(block, self.size)
            found[block * B : block * B + length] = stamped(100, block, length)
        return bytes(found)

    async def make(self, path: Path) -> ImageVolume:
        """The file."""
        volume = await ImageVolume.create(path, self.size)
        content = self.content()
        await volume.write([(block * B, content[block * B : (block + 1) * B]) for block in sorted(self.held)])
        return volume


@dataclass
class Layer:
    """A delta: the size of its volume, and its blocks."""

    tag: int
    size: int
    data: set[int]
    zero: set[int]

    def over(self, below: bytes) -> bytes:
        """What is read through it, of a volume of its size or less."""
        found = bytearray(below)
        for block in self.data | self.zero:
            length = shortened(block, min(len(below), self.size))
            content = stamped(self.tag, block, length) if block in self.data else bytes(length)
            found[block * B : block * B + length] = content
        return bytes(found)

    def make(self, path: Path) -> Delta:
        """The file."""
        delta = Delta.create(path, self.size)
        for block in sorted(self.data):
            delta.write([(block * B, stamped(self.tag, block, shortened(block, self.size)))])
        delta.data, delta.zero = BitMap64(sorted(self.data)), BitMap64(sorted(self.zero))
        delta.flush()
        delta.save(delta.data, delta.zero)
        return delta


def cut(content: bytes, size: int) -> bytes:
    """A content in a volume of another size: what it grows by reads as zeros."""
    return content[:size] + bytes(max(0, size - len(content)))


sizes = st.one_of(st.integers(1, MOST * B), st.integers(1, MOST).map(lambda blocks: blocks * B))


def blocks_in(size: int) -> st.SearchStrategy[set[int]]:
    """Some blocks of a volume."""
    return st.sets(st.integers(0, -(-size // B) - 1))


@st.composite
def images(draw: st.DrawFn, size: int | None = None) -> Image:
    """A file with holes."""
    size = draw(sizes) if size is None else size
    return Image(size, draw(blocks_in(size)))


@st.composite
def layers(draw: st.DrawFn, tag: int, size: int) -> Layer:
    """A delta of a volume of `size` bytes."""
    data = draw(blocks_in(size))
    return Layer(tag, size, data, draw(blocks_in(size)) - data)
