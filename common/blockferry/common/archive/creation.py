"""Creating an archive, and volumes in it."""

from __future__ import annotations

import contextlib
import secrets
from datetime import UTC, datetime

from blockferry.common.archive import format
from blockferry.common.archive.catalog import Catalog, read_secret
from blockferry.common.archive.format import NOBODY, Archive, Kind, Name
from blockferry.common.archive.keys import SCRYPT, wrap
from blockferry.common.archive.seal import KEY_SIZE, parse_level
from blockferry.common.archive.store import Access, Exists, ObjectStore
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.volumes.volume import in_thread

DEFAULT_COMPRESSION = "zstd:3"


def now() -> str:
    """RFC 3339 in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


async def open_or_create(
    store: ObjectStore,
    access: Access,
    *,
    compression: str = DEFAULT_COMPRESSION,
    scrypt: tuple[int, int, int] = SCRYPT,
) -> Catalog:
    """The archive in the store; a new one where there is none. Raises what `Catalog.open` does."""
    try:
        return await Catalog.open(store, access)
    except BlockferryError as error:
        if error.code is not Code.NOT_FOUND:
            raise
    return await create(store, access, compression=compression, scrypt=scrypt)


async def create(
    store: ObjectStore,
    access: Access,
    *,
    compression: str = DEFAULT_COMPRESSION,
    scrypt: tuple[int, int, int] = SCRYPT,
) -> Catalog:
    """Make an archive, or open the one that somebody else has made meanwhile."""
    parse_level(compression)
    secret = await in_thread(read_secret, access)
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
            return Catalog(store, record, key)
    except Exists:
        pass
    if wrapped is not None:
        await store.delete(format.key_name(wrapped.id))
    return await Catalog.open(store, access)


async def volume_or_new(catalog: Catalog, name: str) -> bytes:
    """The id of a volume, which is given one where it has none yet."""
    try:
        return await catalog.volume(name)
    except BlockferryError as error:
        if error.code is not Code.NOT_FOUND:
            raise
    body = format.encode(Name(name=name, volume=secrets.token_hex(format.ID_SIZE), created=now()))
    with contextlib.suppress(Exists):
        frame = catalog.sealer().seal_frame(Kind.NAME, NOBODY, body)
        await catalog.store.put_new(format.volume_name(name), [frame])
    # Whatever it is now: without conditional writes another's may have replaced ours.
    return await catalog.volume(name)


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
