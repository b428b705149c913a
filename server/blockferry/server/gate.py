"""The gate every write of a replica passes (invariant 4: one writer)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator


class Gate:
    """Many may pass together; whoever closes the gate waits until all who are inside have left.

    Checks made inside the gate hold at the moment of writing, not only on receipt: opening, committing and ending a
    session happen with the gate closed.
    """

    def __init__(self) -> None:
        self._inside = 0
        self._closing = asyncio.Lock()
        self._empty = asyncio.Event()
        self._empty.set()

    @contextlib.asynccontextmanager
    async def passing(self) -> AsyncIterator[None]:
        """Be inside."""
        async with self._closing:
            self._inside += 1
            self._empty.clear()
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                self._empty.set()

    @contextlib.asynccontextmanager
    async def closed(self) -> AsyncIterator[None]:
        """Be alone."""
        async with self._closing:
            await self._empty.wait()
            yield
