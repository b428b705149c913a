"""One run of an archiver over small chunks, in a process that may be killed: `archive-life IMAGE STORE STAGING LOG ID`.

Every object that the store has taken is a line in LOG by then. ID is the snapshot's, empty for an image that may
change."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from blockferry.client import nodes, packer
from blockferry.client.archiver import ArchiveOptions, archive
from blockferry.client.report import Progress
from blockferry.common.archive import tree
from blockferry.common.archive.creation import open_or_create
from blockferry.common.archive.directory import DirectoryStore
from blockferry.common.archive.store import Access
from blockferry.common.digests import Data
from blockferry.common.volumes import ImageVolume

from tests.archive_faults import WrappedStore

CHUNK = 1024 * 1024
"""Bytes of a data chunk: three blocks that do not pack."""
META = 512
"""Bytes of a metadata chunk: a node or two of four entries."""
ENTRIES = 4


class Logging(WrappedStore):
    """Writes down what is there."""

    def __init__(self, store: DirectoryStore, path: Path) -> None:
        super().__init__(store)
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    async def put_new(self, key: str, parts: Sequence[Data]) -> None:
        await super().put_new(key, parts)
        os.write(self._fd, f"{key}\n".encode())


async def _run(image: Path, store: Path, staging: Path, log: Path, snapshot_id: str) -> None:
    source = await ImageVolume.open(image)
    source.snapshot_id = snapshot_id
    access = Access()
    catalog = await open_or_create(Logging(await DirectoryStore.open(store), log), access, compression="none")
    await archive(source, catalog, ArchiveOptions("vm", staging, uploads=2), Progress())
    await source.close()


def main() -> int:
    """Exit status 0, or a traceback."""
    packer.CHUNK_SIZE = CHUNK  # type: ignore[attr-defined]
    nodes.CHUNK_SIZE = META  # type: ignore[attr-defined]
    tree.MAX_ENTRIES = ENTRIES  # type: ignore[attr-defined]
    image, store, staging, log = map(Path, sys.argv[1:5])
    asyncio.run(_run(image, store, staging, log, sys.argv[5]))
    return 0
