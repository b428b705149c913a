"""Whether a source that should be at rest was written to while it was read.

A file says so by its times and its size. A block device says how many sectors were written to it; whatever was written
without that, by another host or below the device, may still be seen in a sample that is read twice. An export has only
the sample. A committed generation cannot change.
"""

from __future__ import annotations

import hashlib
import os
import random
import stat
from dataclasses import dataclass
from pathlib import Path

from blockferry.common.errors import BlockferryError, Code, from_os_error
from blockferry.common.regions import BLOCK_SIZE
from blockferry.common.volumes import Volume, in_thread
from blockferry.common.volumes.descriptor import DescriptorVolume

SAMPLE_BLOCKS = 64
"""Blocks that are read twice: the ends, where file systems keep what every write to them changes, and others."""

_SEED = 0x626C6F636B
"""The same blocks each time."""

_SECTORS = (6, 13)
"""Fields of /sys/dev/block/*/stat: sectors written and discarded (Documentation/block/stat.rst). The count of requests
would not do: a flush is one, and drawing a map flushes."""


@dataclass(frozen=True)
class Mark:
    """What a source looked like at one moment."""

    words: tuple[tuple[str, object], ...]

    def difference(self, later: Mark) -> str:
        """What has changed, for people; empty if nothing shows."""
        return ", ".join(name for (name, value), (_, now) in zip(self.words, later.words, strict=True) if value != now)


async def look(source: Volume) -> Mark:
    """What tells now whether a source is written to."""
    if source.snapshot_id:
        return Mark(())
    if isinstance(source, DescriptorVolume):
        try:
            info = await in_thread(os.stat, source.path)
            if not stat.S_ISBLK(info.st_mode):
                return Mark(
                    (
                        ("another file has its name", (info.st_dev, info.st_ino)),
                        ("its size", info.st_size),
                        ("its modification time", info.st_mtime_ns),
                        ("its change time", info.st_ctime_ns),
                    )
                )
            # What was written before and is on its way still counts now, and not later.
            await source.flush()
            counted = await in_thread(_counters, info.st_rdev)
        except OSError as error:
            raise from_os_error(error, f"cannot look at {source.uri}", volume=source.uri) from error
        return Mark(
            (
                ("another device has its name", info.st_rdev),
                ("its count of sectors written", counted),
                ("its size", await source.current_size()),
                ("a sample of its blocks", await _sample(source)),
            )
        )
    return Mark((("a sample of its blocks", await _sample(source)),))


def _counters(device: int) -> tuple[int, ...]:
    path = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat")
    fields = path.read_text().split()
    return tuple(int(fields[number]) for number in _SECTORS if number < len(fields))


async def _sample(source: Volume) -> bytes:
    count = -(-source.size // BLOCK_SIZE)
    numbers = {0, 1, count - 1, *random.Random(_SEED).choices(range(count), k=SAMPLE_BLOCKS)}
    found = hashlib.blake2b(digest_size=16)
    for number in sorted(number for number in numbers if number < count):
        offset = number * BLOCK_SIZE
        block = bytearray(min(BLOCK_SIZE, source.size - offset))
        await source.read_into(offset, memoryview(block))
        found.update(block)
    return found.digest()


async def refuse_changed(source: Volume, before: Mark) -> None:
    """Raise SOURCE_CHANGED if the source was written to since `before`."""
    changed = before.difference(await look(source))
    if changed:
        raise BlockferryError(
            Code.SOURCE_CHANGED,
            f"{source.uri} was written to while it was read",
            cause=f"what shows it: {changed}",
            next="stop whatever writes to it, or use snapshots",
            volume=source.uri,
        )
