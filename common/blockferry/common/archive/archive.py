"""Opening an archive, creating one, and the names of the volumes in it."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from datetime import UTC, datetime

from blockferry.common.archive import format
from blockferry.common.archive.format import NOBODY, Archive, Key, Kind, Name
from blockferry.common.archive.keys import SCRYPT, Secret, unwrap, wrap
from blockferry.common.archive.log import Log
from blockferry.common.archive.seal import KEY_SIZE, Sealer, parse_level
from blockferry.common.archive.store import Access, Exists, Missing, ObjectStore
from blockferry.common.errors import BlockferryError, Code, from_os_error
from blockferry.common.volumes.volume import in_thread

DEFAULT_COMPRESSION = "zstd:3"


def now() -> str:
    """RFC 3339 in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def read_secret(access: Access) -> Secret | None:
    """The key file or passphrase that was named; None for none. Blocks. Raises USAGE where it can be none."""
    path = access.key_file or access.passphrase_file
    if path is None:
        return None
    try:
        content = path.read_bytes()
    except OSError as error:
        raise from_os_error(error, f"cannot read {path}") from error
    return (Secret.key_file if access.key_file is not None else Secret.passphrase)(content, str(path))


class OpenArchive:
    """An archive whose key is known, if it has one."""

    def __init__(self, store: ObjectStore, record: Archive, key: bytes | None) -> None:
        self.store = store
        self.record = record
        self._key = key

    @property
    def id(self) -> bytes:
        """Identity of the archive, wherever it was copied to."""
        return bytes.fromhex(self.record.id)

    @property
    def encrypted(self) -> bool:
        return self._key is not None

    @property
    def conditional(self) -> bool:
        """Whether the store decides which of two writers creates an object: as found out at the beginning, unless the
        store is used without that today."""
        return self.record.conditional and self.store.conditional

    def sealer(self, volume: bytes = NOBODY) -> Sealer:
        """For what belongs to a volume, or to none."""
        return Sealer(self._key, volume)

    def log(self, volume: bytes) -> Log:
        """The log of a volume."""
        return Log(self.store, self.sealer(volume), conditional=self.conditional)

    # --- opening and creating ---------------------------------------------------------------------------------------

    @classmethod
    async def open(cls, store: ObjectStore, secret: Secret | None = None) -> OpenArchive:
        """Raises NOT_FOUND where there is no archive, PERMISSION where `secret` does not open it."""
        try:
            data = await store.get(format.ARCHIVE_NAME)
        except Missing as error:
            raise BlockferryError(
                Code.NOT_FOUND,
                f"there is no archive in {store.uri}",
                cause=f"it has no {format.ARCHIVE_NAME}",
                next="check the name of the store; blockferry archive create makes an archive",
            ) from error
        record = format.decode(data, Archive, format.ARCHIVE_NAME)
        if record.encryption == "none":
            if secret is not None:
                # Whoever can write to the store could have put this file there to be sent plaintext.
                raise _refused(
                    store,
                    f"it is not encrypted, and a {secret.kind} was given",
                    f"leave the {secret.kind} out if this is the archive that is meant; otherwise somebody has "
                    "replaced its description",
                )
            return cls(store, record, None)
        if secret is None:
            raise _refused(store, "it is encrypted", "name its key with --key-file or --passphrase-file")
        return cls(store, record, await _find_key(store, record, secret))

    @classmethod
    async def create(
        cls,
        store: ObjectStore,
        secret: Secret | None = None,
        *,
        compression: str = DEFAULT_COMPRESSION,
        scrypt: tuple[int, int, int] = SCRYPT,
    ) -> OpenArchive:
        """Make an archive, or open the one that somebody else has made meanwhile."""
        parse_level(compression)
        conditional = store.conditional and await _refuses_what_exists(store)
        record = Archive(
            id=secrets.token_hex(format.ID_SIZE),
            compression=compression,
            encryption="none" if secret is None else "aes-256-gcm",
            conditional=conditional,
            created=now(),
        )
        key = wrapped = None
        if secret is not None:
            # Before the archive: one that is encrypted always has a key.
            key = secrets.token_bytes(KEY_SIZE)
            wrapped = await in_thread(wrap, secret, key, record.id, scrypt=scrypt)
            await store.put_new(format.key_name(wrapped.id), [format.encode(wrapped)])
        data = format.encode(record)
        try:
            await store.put_new(format.ARCHIVE_NAME, [data])
            if conditional or await store.get(format.ARCHIVE_NAME) == data:
                return cls(store, record, key)
        except Exists:
            pass
        if wrapped is not None:
            await store.delete(format.key_name(wrapped.id))
        return await cls.open(store, secret)

    @classmethod
    async def open_or_create(
        cls, store: ObjectStore, secret: Secret | None, *, compression: str, scrypt: tuple[int, int, int] = SCRYPT
    ) -> OpenArchive:
        """The archive in the store; a new one where there is none."""
        try:
            return await cls.open(store, secret)
        except BlockferryError as error:
            if error.code is not Code.NOT_FOUND:
                raise
        return await cls.create(store, secret, compression=compression, scrypt=scrypt)

    # --- volumes ----------------------------------------------------------------------------------------------------

    async def volumes(self) -> dict[str, bytes]:
        """Ids by name."""
        found = {}
        for key in await self.store.list(format.NAMES):
            found[key.removeprefix(format.NAMES)] = await self._read_name(key)
        return dict(sorted(found.items()))

    async def volume(self, name: str) -> bytes:
        """The id of a volume. Raises NOT_FOUND."""
        try:
            return await self._read_name(format.volume_name(name))
        except Missing as error:
            raise BlockferryError(
                Code.NOT_FOUND,
                f"{self.store.uri} has no volume {name}",
                next=f"blockferry archive list {self.store.uri} names those it has",
                volume=name,
            ) from error

    async def volume_or_new(self, name: str, mint: Callable[[int], bytes] = secrets.token_bytes) -> bytes:
        """The id of a volume, which is given one where it has none yet."""
        try:
            return await self.volume(name)
        except BlockferryError as error:
            if error.code is not Code.NOT_FOUND:
                raise
        volume = mint(format.ID_SIZE)
        body = format.encode(Name(name=name, volume=volume.hex(), created=now()))
        with_name = format.volume_name(name)
        try:
            await self.store.put_new(with_name, [self.sealer().seal_frame(Kind.NAME, NOBODY, body)])
        except Exists:
            pass
        # Whatever it is now: without conditional writes another's may have replaced ours.
        return await self._read_name(with_name)

    async def _read_name(self, key: str) -> bytes:
        _, body = self.sealer().open_frame(Kind.NAME, await self.store.get(key), key)
        record = format.decode(body, Name, key)
        if format.volume_name(record.name) != key:
            raise format.damaged(key, f"it is the name {record.name}")
        return bytes.fromhex(record.volume)


async def _find_key(store: ObjectStore, record: Archive, secret: Secret) -> bytes:
    names = await store.list(format.KEYS)
    for name in names:
        key = format.decode(await store.get(name), Key, name)
        if format.key_name(key.id) != name or key.archive != record.id:
            raise format.damaged(name, "it is the key of another archive, or another key")
        found = await in_thread(unwrap, secret, key, name)
        if found is not None:
            return found
    raise _refused(
        store,
        f"this {secret.kind} opens none of its {len(names)} keys",
        f"give the {secret.kind} with which it was created; without it nothing can be read",
    )


def _refused(store: ObjectStore, cause: str, next_step: str) -> BlockferryError:
    return BlockferryError(
        Code.PERMISSION, f"the archive in {store.uri} cannot be opened", cause=cause, next=next_step
    )


async def _refuses_what_exists(store: ObjectStore) -> bool:
    """Try it: some stores take a condition that they do not know for none."""
    key = f"probe/{secrets.token_hex(format.ID_SIZE)}"
    await store.put_new(key, [b"first"])
    try:
        await store.put_new(key, [b"second"])
    except Exists:
        return await store.get(key) == b"first"
    finally:
        await store.delete(key)
    return False
