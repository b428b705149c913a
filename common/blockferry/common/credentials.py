"""The certificate of a server that runs for months: kept current while it runs, and its expiry announced.

Whoever renews a certificate replaces files; nobody restarts anything. What cannot be used is never taken up: the last
good one stays, and the log says why.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import structlog
from blockferry.common.errors import BlockferryError
from blockferry.common.settings import Tls
from blockferry.common.tls import Material
from blockferry.common.volumes.volume import in_thread

POLL_SECONDS = 1.0
"""Between looks at the files: a revoked certificate is refused this soon after its list was replaced."""

ANNOUNCE_SECONDS = 24 * 3600.0
"""Between two announcements of the same expiry."""

log = structlog.get_logger("blockferry.tls")

Signature = tuple[tuple[int, int, int, int] | None, ...]


class Credentials:
    """What a server shows and trusts. Read `material` each time it is needed."""

    def __init__(self, files: Tls) -> None:
        """Blocks. Raises what `Material.load` raises: a server begins with good files or not at all."""
        self._seen = _signature(files)
        self.material = Material.load(files)
        self._files = files
        self._failed: Signature = ()
        self._announced: dict[str, float] = {}
        log.info("certificate", **self._described())

    def poll(self) -> bool:
        """Take up files that have changed, if they are usable; whether they were. Blocks."""
        signature = _signature(self._files)
        if signature == self._seen:
            return False
        try:
            self.material = Material.load(self._files)
        except BlockferryError as error:
            # Certificate and key are replaced one after the other: only what stays wrong is worth a line.
            if signature == self._failed:
                self._seen = signature
                log.error(
                    "the new certificate files are not used", error=error.line(), next="the last good ones stay in use"
                )
            self._failed = signature
            return False
        self._seen, self._failed = signature, ()
        log.info("certificate files reloaded", **self._described())
        return True

    def _described(self) -> dict[str, object]:
        own = self.material.own
        return {
            "names": own.label,
            "not_after": own.not_after.isoformat(),
            "fingerprint": own.fingerprint,
            "revoked": len(self.material.revocations.serials),
        }

    def announce(self, now: float) -> None:
        """Log what is about to expire, each once a day. `now` in monotonic seconds. Blocks."""
        for line in self.material.warnings(datetime.now(UTC)):
            if now - self._announced.get(line, -ANNOUNCE_SECONDS) >= ANNOUNCE_SECONDS:
                self._announced[line] = now
                log.warning("certificate needs attention", problem=line)

    async def watch(self, after_reload: Callable[[], None] = lambda: None) -> None:
        """Poll and announce until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                await in_thread(self.announce, loop.time())
                await asyncio.sleep(POLL_SECONDS)
                if await in_thread(self.poll):
                    after_reload()
            except OSError as error:
                # Whatever the disk has, the server goes on with what it holds.
                log.error("cannot look at the certificate files", error=str(error))
                await asyncio.sleep(POLL_SECONDS)


def _signature(files: Tls) -> Signature:
    paths: list[Path | None] = [files.cert, files.key, files.ca, files.crl]
    return tuple(_identity(path) for path in paths if path is not None)


def _identity(path: Path) -> tuple[int, int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
