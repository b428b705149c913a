"""What archiving a source would cost, before anything is read or written."""

from __future__ import annotations

from blockferry.client.archiver import Changed, considered
from blockferry.common.archive.catalog import Catalog
from blockferry.common.archive.columns import MAX_ENTRIES
from blockferry.common.archive.format import ARCHIVE_BLOCK, CHUNK_SIZE, Superblock
from blockferry.common.archive.store import Access, ObjectStore
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.regions import AllocationMap
from blockferry.common.volumes import Volume
from pyroaring import BitMap

ENTRY_SIZE = 64
"""Bytes of metadata for each block, at most: its entry in a leaf, its part of the nodes above, its row in a trailer is
within the data chunk."""
NODE_SIZE = 192
"""Bytes of a node beside its entries, at most."""

CREATION_PUTS = 3
"""archive.json and two to find out what the store can do; a key is one more."""
COMMIT_PUTS = 3
"""The attempt, a data chunk with the last trailer, the superblock."""


async def forecast(
    source: Volume, store: ObjectStore, access: Access, name: str, changed: Changed | None = None
) -> dict[str, object]:
    """The report of `archive create --plan` (schema 1). Writes nothing."""
    base: Superblock | None = None
    known = created = False
    encrypted = access.key_file is not None or access.passphrase_file is not None
    try:
        catalog = await Catalog.open(store, access)
        created = True
        log = await catalog.log(await catalog.volume(name))
        known, base = True, await log.newest()
    except BlockferryError as error:
        # No archive, or no such volume in it, yet.
        if error.code is not Code.NOT_FOUND:
            raise
    found = await source.allocation(ARCHIVE_BLOCK)
    return {
        "schema": 1,
        "source": source.uri,
        "store": store.uri,
        "volume": name,
        "outcome": "planned",
        "base": base.number if base is not None else None,
        "volume_size": source.size,
        "block_size": ARCHIVE_BLOCK,
        "source_map": found.provenance.value,
        **costs(found, base, considered(base, changed, source.size), created=created, known=known, encrypted=encrypted),
    }


def costs(
    found: AllocationMap,
    base: Superblock | None,
    changed: BitMap | None,
    *,
    created: bool,
    known: bool,
    encrypted: bool,
) -> dict[str, object]:
    """Blocks, bytes and requests (pure). Bounds: how much is equal or zero only reading can tell."""
    blocks = found.regions if changed is None else found.regions & changed
    data = found.geometry.bytes_in(blocks)
    old = base.root.blocks if base is not None and base.root is not None else 0
    # At worst each of them is in a leaf of its own. Splitting leaves halves of nodes behind.
    touched = len(blocks) + (old if changed is None else min(old, len(changed)))
    leaves = min(touched, 1 + 2 * (len(blocks) + old) // MAX_ENTRIES)
    metadata = _nodes(leaves) * NODE_SIZE + min(leaves * MAX_ENTRIES, len(blocks) + old) * ENTRY_SIZE
    fixed = COMMIT_PUTS + (0 if known else 1) + (0 if created else CREATION_PUTS + encrypted)
    # Blocks do not fill a chunk to its end: a whole one may be left out.
    chunks = -(-data // (CHUNK_SIZE - 2 * ARCHIVE_BLOCK))
    return {
        "blocks": {"allocated": len(blocks), "in_base": old},
        "bytes": {"source_read": data, "data_min": 0, "data_max": data, "metadata_max": metadata},
        "requests": {
            "put_min": fixed,
            "put_max": fixed + chunks + -(-metadata // CHUNK_SIZE),
            "get_max": _gets(base, created=created, known=known, encrypted=encrypted),
            "list": 1 + encrypted,
            "delete": 1 + (not created),
        },
    }


def _nodes(leaves: int) -> int:
    total, level = 0, leaves
    while level:
        total += level
        level = -(-level // MAX_ENTRIES) if level > 1 else 0
    return total


def _gets(base: Superblock | None, *, created: bool, known: bool, encrypted: bool) -> int:
    # archive.json, the name twice where it is new, the superblock read back; the key; the base, and its metadata.
    metadata = base.meta_chunks if base is not None else 0
    return 3 + (not known) + (not created) + encrypted + (1 + metadata if base is not None else 0)
