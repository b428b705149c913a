"""Images to measure with: made from a seed, the same in every run."""

from __future__ import annotations

import os
import random
from pathlib import Path

MIB = 1024 * 1024
IMAGE_SIZE = 8192 * MIB
DATA_SIZE = 1920 * MIB
"""About a quarter of the image holds data, in pieces of 64 KiB to 4 MiB, as in a file system that has been used."""


def scattered_extents(seed: int, image_size: int = IMAGE_SIZE, data_size: int = DATA_SIZE) -> list[tuple[int, int]]:
    """(offset, length) of the data, ascending, aligned to 64 KiB."""
    generator = random.Random(seed)
    unit = 64 * 1024
    lengths: list[int] = []
    while sum(lengths) < data_size:
        lengths.append(min(unit << generator.randrange(7), data_size - sum(lengths)))
    holes = image_size - data_size
    cuts = sorted(generator.randrange(holes // unit) * unit for _ in lengths)
    found, position = [], 0
    for cut, length in zip(cuts, lengths, strict=True):
        found.append((position + cut, length))
        position += length
    return found


def make_image(path: Path, seed: int, extents: list[tuple[int, int]], image_size: int = IMAGE_SIZE) -> None:
    """A sparse image with random data in `extents`."""
    generator = random.Random(seed)
    with path.open("wb") as file:
        file.truncate(image_size)
        for offset, length in extents:
            file.seek(offset)
            while length:
                # randbytes() cannot make more than 256 MiB.
                step = min(length, 64 * MIB)
                file.write(generator.randbytes(step))
                length -= step
        file.flush()
        os.fsync(file.fileno())


def make_thick_image(path: Path, seed: int, size: int = 2048 * MIB) -> None:
    """A fully allocated image of which every second 4 KiB block, at random, is zeros written as data."""
    generator = random.Random(seed)
    with path.open("wb") as file:
        for _ in range(size // MIB):
            blocks = [generator.randbytes(4096) if index % 2 else bytes(4096) for index in range(256)]
            generator.shuffle(blocks)
            file.write(b"".join(blocks))
        file.flush()
        os.fsync(file.fileno())


def change_blocks(path: Path, seed: int, extents: list[tuple[int, int]], count: int = 200) -> None:
    """Overwrite `count` random 4 KiB blocks inside the data."""
    generator = random.Random(seed)
    with path.open("r+b") as file:
        for _ in range(count):
            offset, length = generator.choice(extents)
            file.seek(offset + generator.randrange(length // 4096) * 4096)
            file.write(generator.randbytes(4096))
        os.fsync(file.fileno())


def same_content(left: Path, right: Path) -> bool:
    """Whether two images are equal byte for byte; where both are holes nothing is read."""
    left_fd, right_fd = os.open(left, os.O_RDONLY), os.open(right, os.O_RDONLY)
    try:
        size = os.fstat(left_fd).st_size
        if os.fstat(right_fd).st_size != size:
            return False
        position = 0
        while position < size:
            start = min(_next_data(left_fd, position, size), _next_data(right_fd, position, size))
            end = min(start + 4 * MIB, size)
            if os.pread(left_fd, end - start, start) != os.pread(right_fd, end - start, start):
                return False
            position = end
        return True
    finally:
        os.close(left_fd)
        os.close(right_fd)


def _next_data(fd: int, position: int, size: int) -> int:
    try:
        return os.lseek(fd, position, os.SEEK_DATA)
    except OSError:
        return size
