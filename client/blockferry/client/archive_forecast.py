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
"""Bytes of an entry of a leaf, at most."""
CHILD_SIZE = 32
"""Bytes of an entry of a node above the leaves, at most."""
NODE_SIZE = 128
"""Bytes of a node beside its entries."""

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
    touched = len(blocks) + (old if changed is None else min(old, len(changed)))
    metadata = _metadata(touched, len(blocks) + old)
    fixed = COMMIT_PUTS + (0 if known else 1) + (0 if created else CREATION_PUTS + encrypted)
    # Blocks do not fill a chunk to its end: a whole one may be left out.
    chunks = -(-data // (CHUNK_SIZE - 2 * ARCHIVE_BLOCK))
    return {
        "blocks": {"allocated": len(blocks), "in_base": old},
        "bytes": {"source_read": data, "data_min": 0, "data_max": data, "metadata": metadata},
        "requests": {
            "put_min": fixed,
            "put_max": fixed + chunks + -(-metadata // CHUNK_SIZE),
            # archive.json, the name, the superblock read back; what is new is looked for first; with all metadata of
            # earlier snapshots in the staging directory.
            "get": 3 + (not known) + (not created) + (created and encrypted) + (base is not None),
            "list": 1 + (created and encrypted),
            "delete": 1 + (not created),
        },
    }


def _metadata(touched: int, blocks: int) -> int:
    """Bytes of new nodes, where at worst each of the blocks that are touched is in a leaf of its own. Leaves are taken
    to be half full, as splitting makes them."""
    if not touched:
        return 0
    all_nodes = 1 + 2 * blocks // MAX_ENTRIES
    count = min(touched, all_nodes)
    total = count * NODE_SIZE + min(count * MAX_ENTRIES, blocks) * ENTRY_SIZE
    while all_nodes > 1:
        below, all_nodes = all_nodes, 1 + 2 * all_nodes // MAX_ENTRIES
        count = min(count, all_nodes)
        total += count * NODE_SIZE + min(count * MAX_ENTRIES, below) * CHILD_SIZE
    return total
