"""An open session: what the server knows of its one writer and of the work, while it lasts. None of it is on disk."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from blockferry.common.errors import BlockferryError
from blockferry.common.regions import Geometry
from blockferry.common.volumes import Volume
from blockferry.server.cache import DigestCache
from pyroaring import BitMap


@dataclass
class Session:
    """One writer's fenced access."""

    session_id: str
    epoch: int
    client: str
    geometry: Geometry
    volume: Volume
    snapshot_id: str
    owner: str
    """The identity that opened it; empty where there are none."""
    last_seen: float
    """Monotonic seconds of the last call."""
    settled: BitMap
    """Regions that hold what the source's immutable snapshot holds."""
    digests: DigestCache
    altered: BitMap | None = None
    """Regions in which it began with something else than the newest generation holds; None where nobody can say."""
    doubt: str = ""
    """Why nobody can say."""
    allocated: BitMap | None = None
    """Regions that may hold data, once a map was asked for; all others are proven zero."""
    failed: BlockferryError | None = None
    """A flush failed: nothing about the work image can be believed any more (invariant 3)."""
    applying: asyncio.Lock = field(default_factory=asyncio.Lock)
    racing: list[BitMap] = field(default_factory=list)
    """For everybody who reads the work image, the regions that changed meanwhile."""

    def change(self, first: int, count: int) -> None:
        """These regions change: to be said before the change, and again after it. Whoever reads a region meanwhile
        began after the first word or will hear the second."""
        self.digests.forget(first, count)
        for changed in self.racing:
            changed.add_range(first, first + count)

    @contextlib.contextmanager
    def watching(self) -> Iterator[BitMap]:
        """The regions that change in here."""
        changed = BitMap()
        self.racing.append(changed)
        try:
            yield changed
        finally:
            # By identity: list.remove would take away an equal set that belongs to another reader.
            self.racing = [one for one in self.racing if one is not changed]
