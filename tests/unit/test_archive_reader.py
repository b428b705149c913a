"""An archived snapshot as a volume: what is read, what is asked of the store, and what damage is told."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from blockferry.common.archive import format, pins, reader, tree, walk
from blockferry.common.archive.catalog import Catalog
from blockferry.common.archive.columns import encode_remap
from blockferry.common.archive.format import ARCHIVE_BLOCK, Kind
from blockferry.common.archive.keys import Secret
from blockferry.common.archive.reader import SnapshotVolume
from blockferry.common.archive.seal import Sealer
from blockferry.common.archive.store import Access, ObjectStore
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.regions import Provenance
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.archive_faults import CountingStore, FaultyStore, MemoryStore, busy, flip
from tests.archives import EXAMPLES, Maker, moved, noise

A = ARCHIVE_BLOCK


@contextlib.asynccontextmanager
async def opened(store: ObjectStore, number: int = 0, name: str = "vm") -> AsyncIterator[SnapshotVolume]:
    uri = f"{store.uri}#{name}" + (f"@{number}" if number else "")
    volume = await SnapshotVolume.of(uri, await Catalog.open(store, Access()), name, number)
    try:
        yield volume
    finally:
        await volume.close()


async def read(volume: SnapshotVolume, offset: int = 0, length: int | None = None) -> bytes:
    buffer = bytearray(b"\xff" * (volume.size - offset if length is None else length))
    await volume.read_into(offset, memoryview(buffer))
    return bytes(buffer)


@contextlib.contextmanager
def small_nodes(entries: int = 4) -> Iterator[None]:
    """Trees that are deep with few blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tree, "MAX_ENTRIES", entries)
        yield


# --- content ----------------------------------------------------------------------------------------------------------


async def test_what_was_archived_is_read_and_holes_are_zeros() -> None:
    maker = await Maker(MemoryStore()).create()
    size = 9 * A + 5000
    made = await maker.snapshot(size, {0: noise(0), 3: noise(3), 4: noise(4), 9: noise(9, 5000)})
    async with opened(maker.store) as volume:
        assert (volume.size, volume.block_size, volume.zeroing) == (size, 4096, "read-only")
        assert volume.snapshot_id == f"archive:{maker.volume.hex()}:{made.attempt.hex()}"
        assert await read(volume) == made.content
        for offset, length in ((1, 1), (A - 1, 2), (3 * A - 1, 2 * A + 2), (9 * A - 7, 5007), (A, 2 * A)):
            assert await read(volume, offset, length) == made.content[offset : offset + length]
        assert await volume.data_extents(0, size) == [(0, A), (3 * A, 2 * A), (9 * A, 5000)]
        assert await volume.data_extents(A // 2, 3 * A) == [(A // 2, A // 2), (3 * A, A // 2)]
        found = await volume.allocation(A)
        assert (list(found.regions), found.provenance) == ([0, 3, 4, 9], Provenance.EXACT)
        smaller = await volume.allocation(65536)
        assert list(smaller.regions) == [*range(4), *range(12, 20), 36]
        assert smaller.provenance is Provenance.CONSERVATIVE


async def test_a_volume_of_zeros_has_no_tree() -> None:
    maker = await Maker(MemoryStore()).create()
    made = await maker.snapshot(3 * A, {})
    async with opened(maker.store) as volume:
        assert made.root is None and await read(volume) == bytes(3 * A)
        assert len((await volume.allocation(A)).regions) == 0


async def test_older_snapshots_stay_as_they_were() -> None:
    maker = await Maker(MemoryStore()).create()
    one = await maker.snapshot(5 * A, {0: noise(0), 1: noise(1), 4: noise(4)})
    two = await maker.snapshot(5 * A, {1: None, 2: noise(22)}, base=one)
    three = await maker.snapshot(5 * A, {0: noise(30)}, base=one)
    for made in (one, two, three):
        async with opened(maker.store, made.number) as volume:
            assert await read(volume) == made.content
    async with opened(maker.store) as volume:
        assert volume.superblock.number == 3


async def test_nothing_is_written() -> None:
    maker = await Maker(MemoryStore()).create()
    await maker.snapshot(A, {})
    async with opened(maker.store) as volume:
        await volume.flush()
        for request in (volume.write([(0, b"x")]), volume.unmap([(0, 1)])):
            with pytest.raises(BlockferryError) as told:
                await request
            assert told.value.code is Code.READ_ONLY


@settings(max_examples=EXAMPLES)
@given(
    tail=st.integers(1, A),
    layers=st.lists(st.dictionaries(st.integers(0, 20), st.booleans(), max_size=12), min_size=1, max_size=4),
    chunk=st.integers(1, 5),
    nodes=st.integers(1, 3),
    encrypted=st.booleans(),
    reads=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=4),
)
async def test_any_chain_of_snapshots_reads_as_it_was(
    tail: int,
    layers: list[dict[int, bool]],
    chunk: int,
    nodes: int,
    encrypted: bool,
    reads: list[tuple[float, float]],
) -> None:
    size = 20 * A + tail
    store = MemoryStore()
    secret = Secret("key file", bytes(range(32))) if encrypted else None
    with small_nodes():
        maker = await Maker(store, secret=secret, chunk_blocks=chunk, chunk_nodes=nodes).create()
        base = None
        for number, layer in enumerate(layers):
            changes = {
                block: noise(100 * number + block, A if block < 20 else tail) if held else None
                for block, held in layer.items()
            }
            base = await maker.snapshot(size, changes, base=base)
    catalog = Catalog(store, (await Catalog.open(store, Access())).archive, None) if not encrypted else None
    for made in maker.snapshots:
        uri = f"{store.uri}#vm@{made.number}"
        held = catalog or Catalog(store, await _archive(store), maker.key)
        volume = await SnapshotVolume.of(uri, held, "vm", made.number)
        assert await read(volume) == made.content
        for start, share in reads:
            offset = int(start * (size - 1))
            length = 1 + int(share * (size - offset - 1))
            assert await read(volume, offset, length) == made.content[offset : offset + length]
        assert list((await volume.allocation(A)).regions) == sorted(made.blocks)
        await volume.close()
    assert not [key for key in store.objects if "/pins/" in key]


async def _archive(store: ObjectStore) -> format.Archive:
    return format.decode(await store.get(format.ARCHIVE_NAME), format.Archive, "archive.json")


# --- what is asked of the store ---------------------------------------------------------------------------------------


async def test_requests_are_few() -> None:
    """Opening asks the same however many snapshots there are; what lies together is read together, once."""
    counting = CountingStore(MemoryStore())
    maker = await Maker(counting, chunk_blocks=64).create()
    base = await maker.snapshot(64 * A, {block: noise(block) for block in range(64)})
    for number in range(5):
        base = await maker.snapshot(64 * A, {number: noise(1000 + number)}, base=base)
    del counting.requests[:]
    async with opened(counting) as volume:
        # archive.json, the name, the newest superblock; the log, and again behind the pin.
        assert counting.counts == {"get": 3, "list": 2, "put": 1}
        del counting.requests[:], counting.ranges[:]
        await read(volume, 8 * A, 32 * A)
        assert counting.count("get_range", "/meta/") == 1
        first = counting.count("get_range", "/data/")
        assert first == 1
        # Known blocks are not asked for again, and neither are nodes.
        await read(volume, 8 * A, 32 * A)
        await read(volume, 8 * A + 4096, 4096)
        assert counting.counts == {"get_range": 2}
    assert counting.count("delete", "/pins/") == 1


async def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk, "NODES", 3)
    monkeypatch.setattr(reader, "BLOCKS", 2)
    with small_nodes():
        maker = await Maker(MemoryStore()).create()
        made = await maker.snapshot(40 * A, {block: noise(block) for block in range(40)})
    async with opened(maker.store) as volume:
        assert await read(volume) == made.content
        assert len(volume.tree._nodes) <= 3 and len(volume._kept) <= 2


async def test_ranges_are_read_side_by_side_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "BYTES_IN_FLIGHT", 8 * A)
    faulty = FaultyStore(MemoryStore())
    maker = await Maker(faulty, chunk_blocks=2).create()
    made = await maker.snapshot(40 * A, {block: noise(block) for block in range(40)})
    active = most = 0

    class Watching(CountingStore):
        async def get_range(self, key: str, offset: int, length: int) -> bytes:
            nonlocal active, most
            active += "/data/" in key
            most = max(most, active)
            await asyncio.sleep(0)
            found = await super().get_range(key, offset, length)
            active -= "/data/" in key
            return found

    async with opened(Watching(faulty)) as volume:
        assert await read(volume) == made.content
    assert most == 4


async def test_a_failed_read_leaves_the_volume_usable() -> None:
    faulty = FaultyStore(MemoryStore())
    maker = await Maker(faulty, chunk_blocks=1).create()
    made = await maker.snapshot(40 * A, {block: noise(block) for block in range(40)})
    async with opened(faulty) as volume:
        rule = faulty.rule("get_range", part="/data/", after=5, times=1, corrupt=flip(0))
        for _ in range(6):
            rule.seen = 0
            with pytest.raises(BlockferryError):
                await read(volume)
        faulty.rules.clear()
        assert await read(volume) == made.content
        assert volume._budget.used == 0


# --- names and keys ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "number", "word"),
    [("other", 0, "no volume other"), ("vm", 9, "vm@9"), ("vm", 2, "vm@2"), ("vm", 3, "vm@3")],
)
async def test_what_is_not_there_is_told(name: str, number: int, word: str) -> None:
    maker = await Maker(MemoryStore()).create()
    await maker.snapshot(A, {})
    await maker.snapshot(A, {})
    await maker.delete(2)
    with pytest.raises(BlockferryError) as told:
        async with opened(maker.store, number, name):
            pass
    assert told.value.code is Code.NOT_FOUND and word in told.value.line() and "archive list" in told.value.next


async def test_the_newest_is_the_newest_that_was_not_deleted() -> None:
    maker = await Maker(MemoryStore()).create()
    for _ in range(3):
        await maker.snapshot(A, {})
    await maker.delete(3)
    async with opened(maker.store) as volume:
        assert volume.superblock.number == 2


async def test_no_archive() -> None:
    with pytest.raises(BlockferryError, match="no archive"):
        await Catalog.open(MemoryStore(), Access())


@pytest.fixture
async def sealed() -> Maker:
    maker = await Maker(MemoryStore(), secret=Secret("passphrase", b"open sesame")).create()
    await maker.snapshot(2 * A, {0: noise(0)})
    return maker


async def open_with(maker: Maker, **files: object) -> Catalog:
    return await Catalog.open(maker.store, Access(**files))  # type: ignore[arg-type]


async def test_the_key_opens(sealed: Maker, tmp_path: Path) -> None:
    (tmp_path / "phrase").write_bytes(b"open sesame\r\nand a second line\n")
    (tmp_path / "wrong").write_bytes(b"open says me\n")
    (tmp_path / "file").write_bytes(bytes(32))
    (tmp_path / "short").write_bytes(b"x")
    (tmp_path / "empty").write_bytes(b"\n")
    catalog = await open_with(sealed, passphrase_file=tmp_path / "phrase")
    volume = await SnapshotVolume.of("file:///memory#vm", catalog, "vm")
    assert await read(volume) == sealed.snapshots[0].content
    await volume.close()
    (key,) = await sealed.store.list("keys/")
    for files, code, word in (
        ({}, Code.PERMISSION, "--passphrase-file"),
        ({"passphrase_file": tmp_path / "wrong"}, Code.PERMISSION, key),
        ({"key_file": tmp_path / "file"}, Code.PERMISSION, key),
        ({"key_file": tmp_path / "short"}, Code.USAGE, "short"),
        ({"passphrase_file": tmp_path / "empty"}, Code.USAGE, "empty"),
        ({"key_file": tmp_path / "none"}, Code.NOT_FOUND, "none"),
        ({"key_file": tmp_path / "file", "passphrase_file": tmp_path / "wrong"}, Code.USAGE, "one too many"),
    ):
        with pytest.raises(BlockferryError) as told:
            await open_with(sealed, **files)
        assert (told.value.code, word in told.value.line()) == (code, True), told.value.line()
        assert "sesame" not in told.value.line() and "says me" not in told.value.line()


async def test_an_archive_that_says_it_is_not_encrypted_is_refused(sealed: Maker, tmp_path: Path) -> None:
    assert isinstance(sealed.store, MemoryStore)
    (tmp_path / "phrase").write_bytes(b"open sesame")
    plain = sealed.store.objects[format.ARCHIVE_NAME].replace(b"aes-256-gcm", b"none")
    sealed.store.objects[format.ARCHIVE_NAME] = plain
    with pytest.raises(BlockferryError, match="not encrypted"):
        await open_with(sealed, passphrase_file=tmp_path / "phrase")
    with pytest.raises(BlockferryError) as told:
        await (await open_with(sealed)).volume("vm")
    assert told.value.code is Code.CORRUPT_STATE and "names/vm" in told.value.line()


# --- pins -------------------------------------------------------------------------------------------------------------


async def pinned(maker: Maker) -> list[format.Pin]:
    found = []
    for key in await maker.store.list(f"{maker.volume.hex()}/pins/"):
        _, body = maker.sealer.open_frame(Kind.PIN, await maker.store.get(key), key)
        found.append(format.decode(body, format.Pin, key))
        assert key.endswith(found[-1].pin)
    return found


async def renewed(maker: Maker) -> None:
    """Wait for three renewals."""
    async with asyncio.timeout(30):
        while (await pinned(maker))[0].renewals < 3:  # noqa: ASYNC110 nothing tells of it
            await asyncio.sleep(0.005)


async def test_a_snapshot_is_pinned_while_it_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pins, "RENEW_SECONDS", 0.005)
    maker = await Maker(MemoryStore()).create()
    await maker.snapshot(A, {})
    async with opened(maker.store):
        (pin,) = await pinned(maker)
        assert (pin.snapshot, pin.volume) == (1, maker.volume.hex())
        await renewed(maker)
    assert await pinned(maker) == []


async def test_a_renewal_that_fails_is_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pins, "RENEW_SECONDS", 0.005)
    faulty = FaultyStore(MemoryStore())
    maker = await Maker(faulty).create()
    await maker.snapshot(A, {})
    async with opened(faulty):
        rule = faulty.rule("put", part="/pins/", times=2, before=busy)
        await renewed(maker)
        assert rule.seen > 2


async def test_whoever_may_only_read_reads_without_a_pin() -> None:
    faulty = FaultyStore(MemoryStore())
    maker = await Maker(faulty).create()
    made = await maker.snapshot(A, {0: noise(0)})
    faulty.rule(
        "put", before=lambda store, key: BlockferryError(Code.PERMISSION, f"{key}: no right", next="ask for one")
    )
    async with opened(faulty) as volume:
        assert "not protected" in volume.notice and await read(volume) == made.content


async def test_a_snapshot_deleted_while_it_is_opened_is_not_opened() -> None:
    memory = MemoryStore()
    maker = await Maker(memory).create()
    await maker.snapshot(A, {})

    class Deleting(CountingStore):
        async def put(self, key: str, data: object) -> None:
            if "/pins/" in key:
                await maker.delete(1)
            await super().put(key, data)  # type: ignore[arg-type]

    with pytest.raises(BlockferryError) as told:
        async with opened(Deleting(memory)):
            pass
    assert told.value.code is Code.NOT_FOUND and await pinned(maker) == []


# --- damage -----------------------------------------------------------------------------------------------------------


async def damage_all(
    store: MemoryStore, part: str, change: Callable[[bytes], bytes | None], check: Callable[[str], None]
) -> int:
    """Change each object whose key has `part`, one at a time, and check."""
    keys = [key for key in store.objects if part in key]
    for key in keys:
        whole = store.objects[key]
        changed = change(whole)
        if changed is None:
            del store.objects[key]
        else:
            store.objects[key] = changed
        with pytest.raises(BlockferryError) as told:
            async with opened(store) as volume:
                await read(volume)
        assert told.value.code in (Code.CORRUPT_STATE, Code.DATA_MISMATCH, Code.NOT_FOUND, Code.UNSUPPORTED)
        assert told.value.next
        check(told.value.line())
        assert key in told.value.line(), (key, told.value.line())
        store.objects[key] = whole
    return len(keys)


CHANGES: dict[str, Callable[[bytes], bytes | None]] = {
    "first": flip(0),
    "header": flip(13),
    "middle": lambda data: flip(len(data) // 2)(data),
    "cut": lambda data: data[: len(data) // 3],
    "empty": lambda data: b"",
    "gone": lambda data: None,
}


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "encrypted"])
async def test_damage_is_detected_and_named(monkeypatch: pytest.MonkeyPatch, how: str, encrypted: bool) -> None:
    """Chunks, nodes, superblocks and names, whichever is damaged and however."""
    store = MemoryStore()
    with small_nodes():
        maker = await Maker(store, secret=Secret("key file", bytes(32)) if encrypted else None, chunk_nodes=1).create()
        await maker.snapshot(20 * A, {block: noise(block) for block in range(20)})
    real = Catalog.open

    async def with_key(found: ObjectStore, access: Access) -> Catalog:
        return Catalog(found, await _archive(found), maker.key) if encrypted else await real(found, access)

    monkeypatch.setattr(Catalog, "open", with_key)
    counts = {
        part: await damage_all(store, part, CHANGES[how], lambda line: None)
        for part in ("/data/", "/meta/", "/log/", "names/")
        # Without its only record a log is empty, which says that there is no snapshot.
        if not (part == "/log/" and how == "gone")
    }
    assert counts["/data/"] == 5 and counts["/meta/"] == 8 and counts["names/"] == 1
    async with opened(store) as volume:
        assert await read(volume) == maker.snapshots[0].content


async def test_an_object_in_anothers_place_is_refused() -> None:
    """Whole and sound, and not what should be there."""
    store = MemoryStore()
    maker = await Maker(store, chunk_blocks=1).create()
    one = await maker.snapshot(4 * A, {block: noise(block) for block in range(4)})
    two = await maker.snapshot(4 * A, {block: noise(10 + block) for block in range(4)}, base=one)
    for first, second in (
        (format.data_name(maker.volume, two.attempt, 0), format.data_name(maker.volume, two.attempt, 1)),
        (format.data_name(maker.volume, two.attempt, 0), format.data_name(maker.volume, one.attempt, 0)),
        (format.meta_name(maker.volume, two.attempt, 0), format.meta_name(maker.volume, one.attempt, 0)),
        (format.log_name(maker.volume, 1), format.log_name(maker.volume, 2)),
    ):
        whole = store.objects[first], store.objects[second]
        store.objects[first], store.objects[second] = whole[1], whole[0]
        with pytest.raises(BlockferryError) as told:
            async with opened(store) as volume:
                await read(volume)
        assert told.value.code in (Code.CORRUPT_STATE, Code.DATA_MISMATCH)
        assert first in told.value.line() or second in told.value.line()
        store.objects[first], store.objects[second] = whole


@pytest.mark.parametrize("part", ["archive.json", "names/vm", "/log/", "/meta/"])
async def test_a_later_version_is_told(part: str) -> None:
    store = MemoryStore()
    maker = await Maker(store).create()
    await maker.snapshot(A, {0: noise(0)})
    (key,) = [one for one in store.objects if part in one]
    if part == "archive.json":
        store.objects[key] = store.objects[key].replace(b'"version":1', b'"version":2,"new":true')
    else:
        later = bytearray(store.objects[key])
        later[4] = 2
        store.objects[key] = bytes(later)
    with pytest.raises(BlockferryError) as told:
        async with opened(store) as volume:
            await read(volume)
    assert told.value.code is Code.UNSUPPORTED and "newer release" in told.value.next and key in told.value.line()


async def test_blocks_that_were_moved_are_found() -> None:
    """By a repacking that has removed the chunk where they were."""
    store = MemoryStore()
    maker = await Maker(store, chunk_blocks=2).create()
    one = await maker.snapshot(2 * A, {0: noise(0), 1: noise(1)})
    anew = await maker.snapshot(2 * A, {0: noise(0), 1: noise(1)})
    moves = [moved(one.entries[block], anew.entries[block]) for block in (0, 1)]
    maker.number += 1
    await maker.log(Kind.REMAP, encode_remap(moves), anew.attempt)
    del store.objects[format.data_name(maker.volume, one.attempt, 0)]
    async with opened(store, one.number) as volume:
        assert await read(volume) == one.content


async def test_a_tree_that_lies_about_its_nodes_is_refused() -> None:
    """Frames that are whole, with a parent that means another node."""
    store = MemoryStore()
    with small_nodes():
        maker = await Maker(store).create()
        made = await maker.snapshot(20 * A, {block: noise(block) for block in range(20)})
    assert made.root is not None
    (key,) = [one for one in store.objects if "/log/" in one]
    _, body = maker.sealer.open_frame(Kind.SUPERBLOCK, store.objects[key], key, number=1)
    for before, after in ((b'"level":2', b'"level":1'), (b'"blocks":20', b'"blocks":19')):
        assert before in body
        frame = maker.sealer.seal_frame(Kind.SUPERBLOCK, made.attempt, body.replace(before, after), number=1)
        store.objects[key] = frame
        with pytest.raises(BlockferryError) as told:
            async with opened(store) as volume:
                await read(volume)
        assert told.value.code is Code.CORRUPT_STATE and "/meta/" in told.value.line()


def test_a_sealer_of_another_volume_opens_nothing() -> None:
    key = bytes(32)
    frame = Sealer(key, bytes([1] * 16)).seal_frame(Kind.NODE, bytes(16), b"body")
    with pytest.raises(BlockferryError):
        Sealer(key, bytes([2] * 16)).open_frame(Kind.NODE, frame, "x")
