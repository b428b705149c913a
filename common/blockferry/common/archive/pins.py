"""Pins: what a reader relies on is not deleted while it reads.

A pin is written before the snapshot is looked up for good, rewritten while it is needed, and removed afterwards. One
that is left by a reader who died stops counting by itself: deleting goes by when the store says it was written.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
from datetime import UTC, datetime

import msgspec
from blockferry.common.archive import format
from blockferry.common.archive.format import Kind
from blockferry.common.archive.seal import Sealer
from blockferry.common.archive.store import ObjectStore
from blockferry.common.errors import BlockferryError, Code

RENEW_SECONDS = 300.0
"""As docs/archive-format.md says: a small part of any grace period."""


class Pinned:
    """A pin while it is held. Make one with `Pinned.make`, and `close` it."""

    def __init__(self, store: ObjectStore, sealer: Sealer, pin: format.Pin) -> None:
        self._store = store
        self._sealer = sealer
        self._pin = pin
        self._key = format.pin_name(sealer.volume, bytes.fromhex(pin.pin))
        self._task: asyncio.Task[None] | None = None
        self.notice = ""
        """Why the snapshot is not protected; empty where it is."""

    @classmethod
    async def make(cls, store: ObjectStore, sealer: Sealer, snapshot: int, reader: str) -> Pinned:
        """Pin a snapshot. Whoever may only read goes on without: `notice` says so."""
        pin = format.Pin(
            pin=secrets.token_hex(format.ID_SIZE),
            volume=sealer.volume.hex(),
            snapshot=snapshot,
            reader=reader,
            host=socket.gethostname(),
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            renewals=0,
        )
        found = cls(store, sealer, pin)
        try:
            await found._write()
        except BlockferryError as error:
            if error.code not in (Code.PERMISSION, Code.UNREADABLE, Code.READ_ONLY):
                raise
            found.notice = f"the snapshot is not protected from deletion while it is read: {error.line()}"
        else:
            found._task = asyncio.create_task(found._renew(), name=f"pin-{pin.pin}")
        return found

    async def _write(self) -> None:
        attempt = bytes.fromhex(self._pin.pin)
        await self._store.put(self._key, self._sealer.seal_frame(Kind.PIN, attempt, format.encode(self._pin)))

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(RENEW_SECONDS)
            self._pin = msgspec.structs.replace(self._pin, renewals=self._pin.renewals + 1)
            # One that fails is made up for by the next: the grace period is many of them. Should the snapshot be
            # deleted all the same, reading it fails and says what is missing.
            with contextlib.suppress(BlockferryError):
                await self._write()

    async def close(self) -> None:
        """Remove the pin. One that cannot be removed stops counting by itself."""
        if self._task is None:
            return
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._task = None
        with contextlib.suppress(BlockferryError):
            await self._store.delete(self._key)
