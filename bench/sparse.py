"""Sparse images of any nominal size with the same data, and a comparison that does not trust blockferry."""

from __future__ import annotations

import os
import random
from pathlib import Path

from blockferry.common.linux import data_extents

MIB = 1024 * 1024
GIB = 1024 * MIB
TIB = 1024 * GIB

REGION = MIB
BLOCK = 4096


def place_for_huge_files() -> Path:
    """A directory whose file system takes files of 16 TiB: tmpfs by preference, else the temporary directory if that is
    on XFS or Btrfs (ext4 ends 4 KiB short of 16 TiB). Raises OSError where there is none."""
    for directory in (Path("/dev/shm"), Path(os.environ.get("TMPDIR", "/var/tmp"))):
        probe = directory / f".blockferry-probe-{os.getpid()}"
        try:
            with probe.open("wb") as file:
                file.truncate(16 * TIB)
        except OSError:
            continue
        finally:
            probe.unlink(missing_ok=True)
        return directory
    raise OSError("no place for a file of 16 TiB: mount a tmpfs on /dev/shm, or point TMPDIR at XFS or Btrfs")


def scattered_regions(size: int, count: int) -> list[int]:
    """Numbers of `count` regions spread over a volume of `size` bytes, no two of them neighbours, so that volumes of
    any size have equally many runs."""
    slot = size // REGION // count
    if slot < 2:
        raise ValueError(f"{count} regions of {REGION} bytes do not fit apart from each other into {size} bytes")
    draw = random.Random(size)
    return [number * slot + draw.randrange(slot - 1) for number in range(count)]


def write_image(path: Path, size: int, regions: list[int], bytes_per_region: int) -> None:
    """A sparse image with `bytes_per_region` of data somewhere in each region; the same data whatever the size."""
    draw = random.Random("data")
    with path.open("wb") as file:
        file.truncate(size)
        for region in regions:
            offset = draw.randrange((REGION - bytes_per_region) // BLOCK + 1) * BLOCK
            os.pwrite(file.fileno(), draw.randbytes(bytes_per_region), region * REGION + offset)


def same_bytes(left: Path, right: Path) -> bool:
    """Whether two images are equal, reading only what either file system reports as data."""
    with left.open("rb") as a, right.open("rb") as b:
        size = os.fstat(a.fileno()).st_size
        if size != os.fstat(b.fileno()).st_size:
            return False
        for file in (a, b):
            for start, length in list(data_extents(file.fileno(), 0, size)):
                for offset in range(start, start + length, MIB):
                    count = min(MIB, start + length - offset)
                    if os.pread(a.fileno(), count, offset) != os.pread(b.fileno(), count, offset):
                        return False
    return True
