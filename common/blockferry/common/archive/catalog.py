"""What an archive holds: its key, its volumes and their snapshots.

The log of a volume is the truth about it. The newest snapshot is found from the log's end, so that opening one costs
the same however many there were before.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from blockferry.common.archive import format, keys
from blockferry.common.archive.columns import Move, decode_remap
from blockferry.common.archive.format import Archive, Deletion, Header, Key, Kind, Name, Superblock
from blockferry.common.archive.keys import Secret
from blockferry.common.archive.seal import Sealer
from blockferry.common.archive.store import Access, Missing, ObjectStore
from blockferry.common.errors import BlockferryError, Code, from_os_error
from blockferry.common.volumes.volume import in_thread

REQUESTS = 16
"""Small objects read at once."""


@dataclass(frozen=True)
class Remap:
    """Where blocks are that a repacking has moved."""

    number: int
    moves: Sequence[Move]


LogRecord = Superblock | Deletion | Remap


class Catalog:
    """An archive that was found and, where it is encrypted, opened. Make one with `Catalog.open`."""

    def __init__(self, store: ObjectStore, archive: Archive, key: bytes | None) -> None:
        self.store = store
        self.archive = archive
        self._key = key

    @classmethod
    async def open(cls, store: ObjectStore, access: Access) -> Catalog:
        """Raises NOT_FOUND (no archive there), PERMISSION (no key, or one that opens nothing), USAGE (a key for an
        archive without encryption), CORRUPT_STATE and UNSUPPORTED (a later version)."""
        try:
            data = await store.get(format.ARCHIVE_NAME)
        except Missing as error:
            raise BlockferryError(
                Code.NOT_FOUND,
                f"there is no archive in {store.uri}",
                cause=f"it has no {format.ARCHIVE_NAME}",
                next="check the name; blockferry archive create makes an archive",
            ) from error
        archive = format.decode(data, Archive, _named(store, format.ARCHIVE_NAME))
        secret = await in_thread(read_secret, access)
        if archive.encryption == "none":
            if secret is not None:
                raise BlockferryError(
                    Code.USAGE,
                    f"the archive in {store.uri} is not encrypted",
                    cause=f"a {secret.kind} was given for it",
                    next="check that this is the right archive, then leave the key out",
                )
            return cls(store, archive, None)
        return cls(store, archive, await _archive_key(store, archive, secret))

    def sealer(self, volume: bytes = format.NOBODY) -> Sealer:
        """Opens what belongs to a volume, or to the archive itself."""
        return Sealer(self._key, volume)

    async def names(self) -> list[str]:
        """Names of the volumes."""
        return [key.removeprefix(format.NAMES) for key in await self.store.list(format.NAMES)]

    async def volume(self, name: str) -> bytes:
        """The UUID of a volume. Raises NOT_FOUND."""
        key = format.volume_name(name)
        try:
            data = await self.store.get(key)
        except Missing as error:
            raise BlockferryError(
                Code.NOT_FOUND,
                f"the archive in {self.store.uri} has no volume {name}",
                cause=f"there is no {key}",
                next=f"see which it has: blockferry archive list {self.store.uri}",
            ) from error
        shown = _named(self.store, key)
        record = format.decode(self.sealer().open_frame(Kind.NAME, data, shown)[1], Name, shown)
        if record.name != name:
            raise format.damaged(shown, f"it is that of {record.name}")
        return bytes.fromhex(record.volume)

    async def log(self, volume: bytes) -> Log:
        """The log of a volume, as it is now."""
        log = Log(self.store, self.sealer(volume), conditional=self.archive.conditional)
        await log.refresh()
        return log


class Log:
    """The records of one volume's log. Each is read once."""

    def __init__(self, store: ObjectStore, sealer: Sealer, *, conditional: bool) -> None:
        self._store = store
        self._sealer = sealer
        self._conditional = conditional
        self._names: dict[int, str] = {}
        self._records: dict[int, LogRecord] = {}
        self._turns = asyncio.Semaphore(REQUESTS)

    @property
    def numbers(self) -> list[int]:
        """Numbers of all records, ascending."""
        return sorted(self._names)

    async def refresh(self) -> list[int]:
        """Look for records that are newer than those known; return their numbers."""
        prefix = format.log_prefix(self._sealer.volume)
        newest = max(self._names.values(), default="")
        found: dict[int, list[str]] = {}
        for key in await self._store.list(prefix, after=newest if self._conditional else ""):
            parsed = format.parse_log_name(key)
            if parsed is None:
                continue
            if self._conditional and parsed.attempt is None:
                found.setdefault(parsed.number, []).append(key)
            elif not self._conditional and parsed.done:
                found.setdefault(parsed.number, []).append(key.removesuffix(format.DONE))
        new = sorted(number for number in found if number not in self._names)
        # Without conditional writes several may have finished the same number: the smallest name counts.
        self._names.update((number, min(found[number])) for number in new)
        return new

    async def record(self, number: int) -> LogRecord:
        """One record. Raises CORRUPT_STATE, UNSUPPORTED; Missing for one that the log does not have."""
        if number not in self._records:
            async with self._turns:
                self._records[number] = await self._read(number)
        return self._records[number]

    async def records(self, numbers: Iterable[int] | None = None) -> list[LogRecord]:
        """Several of them, or all."""
        wanted = self.numbers if numbers is None else list(numbers)
        return await asyncio.gather(*(self.record(number) for number in wanted))

    async def _read(self, number: int) -> LogRecord:
        key = self._names.get(number) or format.log_name(self._sealer.volume, number)
        data = await self._store.get(key)
        name = _named(self._store, key)
        kind = Header.decode(data, name).kind
        if kind not in (Kind.SUPERBLOCK, Kind.DELETION, Kind.REMAP):
            raise format.damaged(name, f"it holds a {kind.name.lower()}")
        attempt, body = self._sealer.open_frame(kind, data, name, number=number)
        if kind is Kind.REMAP:
            return Remap(number, decode_remap(body, name))
        record: Superblock | Deletion
        if kind is Kind.SUPERBLOCK:
            record = format.decode(body, Superblock, name)
        else:
            record = format.decode(body, Deletion, name)
        if record.number != number or record.volume != self._sealer.volume.hex():
            raise format.damaged(name, "it belongs to another number or volume")
        if isinstance(record, Superblock) and record.attempt != attempt.hex():
            raise format.damaged(name, "it belongs to another attempt")
        return record

    # --- snapshots ----------------------------------------------------------------------------------------------------

    async def snapshots(self) -> list[Superblock]:
        """All that exist, the oldest first."""
        records = await self.records()
        deleted = _deleted(records)
        return [one for one in records if isinstance(one, Superblock) and one.number not in deleted]

    async def newest(self) -> Superblock | None:
        """The newest one; None where there is none."""
        deleted: set[int] = set()
        for number in reversed(self.numbers):
            record = await self.record(number)
            if isinstance(record, Superblock) and number not in deleted:
                return record
            deleted |= _deleted([record])
        return None

    async def snapshot(self, number: int) -> Superblock | None:
        """The one with this number; None where there is none or it was deleted."""
        if number not in self._names:
            return None
        record = await self.record(number)
        later = await self.records(one for one in self.numbers if one > number)
        return record if isinstance(record, Superblock) and number not in _deleted(later) else None

    async def is_deleted(self, number: int, since: Iterable[int]) -> bool:
        """Whether the records with the numbers `since` delete a snapshot."""
        return number in _deleted(await self.records(since))

    async def moves(self) -> dict[tuple[bytes, int, int], Move]:
        """Where blocks are now that repacking has moved, by where they were."""
        found: dict[tuple[bytes, int, int], Move] = {}
        for record in await self.records():
            if isinstance(record, Remap):
                found.update(((one.attempt, one.chunk, one.offset), one) for one in record.moves)
        return found


def _deleted(records: Iterable[LogRecord]) -> set[int]:
    return {number for one in records if isinstance(one, Deletion) for number in one.snapshots}


def _named(store: ObjectStore, key: str) -> str:
    return f"{store.uri}/{key}"


# --- keys -------------------------------------------------------------------------------------------------------------


def read_secret(access: Access) -> Secret | None:
    """What opens an encrypted archive, from the file that was named; None where none was. Raises USAGE and UNREADABLE.
    Blocking."""
    if access.key_file is not None and access.passphrase_file is not None:
        raise BlockferryError(Code.USAGE, "a key file and a passphrase are one too many", next="leave one of them out")
    if access.key_file is not None:
        return Secret.key_file(_content(access.key_file), str(access.key_file))
    if access.passphrase_file is not None:
        return Secret.passphrase(_content(access.passphrase_file), str(access.passphrase_file))
    return None


def _content(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(keys.MAX_SECRET + 1)
    except OSError as error:
        raise from_os_error(error, f"cannot read {path}") from error


async def _archive_key(store: ObjectStore, archive: Archive, secret: Secret | None) -> bytes:
    if secret is None:
        raise BlockferryError(
            Code.PERMISSION,
            f"the archive in {store.uri} is encrypted",
            cause="no key was given",
            next="give --key-file or --passphrase-file, whichever it was created with",
        )
    found = await store.list(format.KEYS)
    failure: BlockferryError | None = None
    for key in found:
        name = _named(store, key)
        try:
            record = format.decode(await store.get(key), Key, name)
            if record.archive != archive.id or format.key_name(record.id) != key:
                raise format.damaged(name, "it is that of another archive or has another's name")
            opened = await in_thread(keys.unwrap, secret, record, name)
        except BlockferryError as error:
            # Another one may open the archive all the same.
            failure = failure or error
            continue
        if opened is not None:
            return opened
    if failure is not None:
        raise failure
    raise BlockferryError(
        Code.PERMISSION,
        f"the archive in {store.uri} cannot be opened with this {secret.kind}",
        cause=f"none of its {len(found)} key objects is for it: {', '.join(found) or 'all are lost'}",
        next="give the key file or passphrase that the archive was created with",
    )
