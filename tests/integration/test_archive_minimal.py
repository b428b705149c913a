"""docs/archive-format.md suffices: a reader written from it alone restores what is archived, and refuses what it must.

Every value that the document says something about is changed in turn, with the tags made anew where there are some.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from blockferry.common.archive import format, tree
from blockferry.common.archive.columns import encode_node, encode_remap
from blockferry.common.archive.format import ARCHIVE_BLOCK, Kind
from blockferry.common.archive.keys import Secret
from blockferry.common.archive.reader import SnapshotVolume
from blockferry.common.archive.store import Access, open_store
from blockferry.common.errors import BlockferryError

from tests.archives import Made, Maker, moved, noise
from tests.integration import archive_minimal_reader as minimal

A = ARCHIVE_BLOCK
SIZE = 20 * A + 100
PROGRAM = Path(minimal.__file__)


def test_it_imports_nothing_of_ours() -> None:
    assert not re.search(r"^\s*(from|import) (blockferry|tests)", PROGRAM.read_text(), re.MULTILINE)


async def made(root: Path, secret: Secret | None = None, **how: Any) -> Maker:
    """A chain of three snapshots in trees that are deep."""
    os.mkdir(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tree, "MAX_ENTRIES", 4)
        maker = await Maker(await open_store(f"file://{root}"), secret=secret, **how).create()
        one = await maker.snapshot(SIZE, {block: noise(block) for block in range(20)})
        two = await maker.snapshot(SIZE, {3: None, 5: noise(55), 20: b"\7" * 100}, base=one)
        await maker.snapshot(SIZE, dict.fromkeys(range(4, 12)), base=two)
    return maker


# --- restoring --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["none", "key file", "passphrase"])
@pytest.mark.parametrize("level", [0, 3])
async def test_it_restores_every_snapshot(tmp_path: Path, kind: str, level: int) -> None:
    value = bytes(range(40)) if kind == "key file" else b"open sesame"
    secret = None if kind == "none" else Secret(kind, value)  # type: ignore[arg-type]
    maker = await made(tmp_path / "store", secret, level=level)
    told = None if kind == "none" else (kind, value)
    for snapshot in maker.snapshots:
        minimal.restore(tmp_path / "store", f"vm@{snapshot.number}", tmp_path / "out", told)
        assert (tmp_path / "out").read_bytes() == snapshot.content
    minimal.restore(tmp_path / "store", "vm", tmp_path / "out", told)
    assert (tmp_path / "out").read_bytes() == maker.snapshots[-1].content


async def test_it_is_a_program(tmp_path: Path) -> None:
    maker = await made(tmp_path / "store", Secret("passphrase", b"open sesame"))
    (tmp_path / "phrase").write_text("open sesame\n")
    words = [sys.executable, str(PROGRAM), str(tmp_path / "store"), "vm@2", str(tmp_path / "out")]
    done = await asyncio.to_thread(
        subprocess.run, [*words, "--passphrase-file", str(tmp_path / "phrase")], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "out").read_bytes() == maker.snapshots[1].content
    done = await asyncio.to_thread(subprocess.run, words, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "refused: archive: it is encrypted\n")


async def test_deleted_snapshots_and_moved_blocks(tmp_path: Path) -> None:
    maker = await made(tmp_path / "store")
    one = maker.snapshots[0]
    anew = await maker.snapshot(SIZE, {block: noise(block) for block in range(20)})
    moves = sorted(moved(one.entries[block], anew.entries[block]) for block in range(4))
    maker.number += 1
    await maker.log(Kind.REMAP, encode_remap(moves), anew.attempt)
    await maker.delete(anew.number)
    await maker.store.delete(format.data_name(maker.volume, one.attempt, 0))
    minimal.restore(tmp_path / "store", "vm@1", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == one.content
    minimal.restore(tmp_path / "store", "vm", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == maker.snapshots[2].content
    with pytest.raises(minimal.Refused, match="no such snapshot"):
        minimal.restore(tmp_path / "store", f"vm@{anew.number}", tmp_path / "out")


# --- refusing ---------------------------------------------------------------------------------------------------------


class Forger:
    """Changes one thing of an archive and makes tags anew, as anybody can where there is no key."""

    def __init__(self, root: Path, maker: Maker) -> None:
        self.root = root
        self.maker = maker
        self.last = maker.snapshots[-1]

    def path(self, name: str) -> Path:
        return self.root / name

    @property
    def log(self) -> Path:
        """The newest superblock."""
        return self.path(format.log_name(self.maker.volume, self.maker.number))

    @property
    def meta(self) -> Path:
        """The first nodes of the newest snapshot."""
        return self.path(format.meta_name(self.maker.volume, self.last.attempt, 0))

    def json(self, name: str, **changes: object) -> None:
        """Other values in a JSON file; None takes a field away."""
        found = {**json.loads(self.path(name).read_bytes()), **changes}
        kept = {key: value for key, value in found.items() if value is not None}
        self.path(name).write_bytes(json.dumps(kept, separators=(",", ":")).encode())

    def header(self, path: Path, offset: int, value: bytes) -> None:
        """Other bytes in a header, under a tag that is right for them."""
        frame = bytearray(path.read_bytes())
        frame[offset : offset + len(value)] = value
        number = self.maker.number if path == self.log else 0
        volume = bytes(16) if path.parent.name == "names" else self.maker.volume
        context = bytes(frame[:32]) + volume + struct.pack("<QQ", number, 0)
        frame[-16:] = blake3(context + frame[32:-16]).digest(16)
        path.write_bytes(frame)

    def record(self, path: Path, **changes: object) -> None:
        """Other values in a record that stands in a frame."""
        name = path.parent.name == "names"
        kind = Kind.NAME if name else Kind.SUPERBLOCK
        sealer = type(self.maker.sealer)(None) if name else self.maker.sealer
        number = 0 if name else self.maker.number
        attempt, body = sealer.open_frame(kind, path.read_bytes(), "x", number=number)
        found = json.loads(body)
        for key, value in changes.items():
            inside, _, field = key.partition("__")
            if field:
                found[inside][field] = value
            elif value is None:
                del found[key]
            else:
                found[key] = value
        body = json.dumps(found, separators=(",", ":")).encode()
        path.write_bytes(sealer.seal_frame(kind, attempt, body, number=number))

    def leaf(self, change: Callable[[bytearray], bytes | bytearray]) -> None:
        """Another body for a leaf, which becomes the root of the newest snapshot."""
        node = next(node for node in reversed(self.maker.nodes.values()) if node.level == 0)
        self.root_node(change(bytearray(encode_node(node))), 0, node.blocks)

    def inner(self, change: Callable[[bytearray], bytes | bytearray]) -> None:
        """Another body for an inner node, likewise."""
        node = next(node for node in reversed(self.maker.nodes.values()) if node.level == 1)
        self.root_node(change(bytearray(encode_node(node))), 1, node.blocks)

    def root_node(self, body: bytes | bytearray, level: int, blocks: int) -> None:
        attempt = self.last.attempt
        frame = self.maker.sealer.seal_frame(Kind.NODE, attempt, bytes(body), number=77)
        self.path(format.meta_name(self.maker.volume, attempt, 77)).write_bytes(frame)
        root = {
            "attempt": attempt.hex(),
            "chunk": 77,
            "offset": 0,
            "length": len(frame),
            "level": level,
            "blocks": blocks,
        }
        self.record(self.log, root=root)


def put(at: int, layout: str, *values: int) -> Callable[[bytearray], bytearray]:
    """Other values at an offset of a body."""

    def change(body: bytearray) -> bytearray:
        struct.pack_into("<" + layout, body, at, *values)
        return body

    return change


def column(body: bytearray, index: int) -> int:
    """Where a column of a node begins: 0 keys, 1 attempts' indexes, 2 chunks, 3 offsets, 4 lengths, 5 codecs or
    blocks, 6 digests."""
    count, known = (int(one) for one in struct.unpack_from("<HH", body, 2))
    return 8 + 16 * known + sum(count * size for size in (8, 2, 4, 4, 4, 1, 32)[:index])


def at_column(index: int, layout: str, value: int, skip: int = 0) -> Callable[[bytearray], bytearray]:
    return lambda body: put(column(body, index) + skip, layout, value)(body)


Forgery = Callable[[Forger], object]

FORGERIES: dict[str, tuple[Forgery, str]] = {
    # archive.json
    "format": (lambda it: it.json("archive.json", format="other"), "format"),
    "version": (lambda it: it.json("archive.json", version=2), "version"),
    "later version": (lambda it: it.json("archive.json", version=2, more=1), "version"),
    "archive id": (lambda it: it.json("archive.json", id="ABC"), "id"),
    "chunk size": (lambda it: it.json("archive.json", chunk_size=8388608), "sizes"),
    "block size": (lambda it: it.json("archive.json", block_size=65536), "sizes"),
    "encryption": (lambda it: it.json("archive.json", encryption="rot13"), "encryption"),
    "unknown field": (lambda it: it.json("archive.json", more=1), "unknown"),
    "missing field": (lambda it: it.json("archive.json", created=None), "missing"),
    "encrypted, it says": (lambda it: it.json("archive.json", encryption="aes-256-gcm"), "encrypted"),
    # frames
    "magic": (lambda it: it.header(it.log, 0, b"BFAX"), "magic"),
    "frame version": (lambda it: it.header(it.log, 4, b"\2"), "version"),
    "kind of another": (lambda it: it.header(it.log, 5, b"\3"), "kind"),
    "kind of nothing": (lambda it: it.header(it.log, 5, b"\x63"), "kind"),
    "flags": (lambda it: it.header(it.log, 6, b"\4"), "flags"),
    "flag: compressed": (lambda it: it.header(it.path("names/vm"), 6, b"\1"), "zstd"),
    "flag: encrypted": (lambda it: it.header(it.log, 6, b"\3"), "unlike"),
    "zero": (lambda it: it.header(it.log, 7, b"\1"), "zero"),
    "length": (lambda it: it.header(it.log, 8, struct.pack("<I", 9)), "size does not match"),
    "length above all": (lambda it: it.header(it.log, 8, struct.pack("<I", (64 << 20) + 1)), "length of the body"),
    "length of what follows": (lambda it: it.header(it.log, 12, struct.pack("<I", 9)), "what follows"),
    "attempt": (lambda it: it.header(it.log, 16, bytes(16)), "another attempt"),
    "tag": (lambda it: it.log.write_bytes(it.log.read_bytes()[:-1] + b"\0"), "tag"),
    "cut": (lambda it: it.log.write_bytes(it.log.read_bytes()[:-1]), "what follows"),
    "more": (lambda it: it.log.write_bytes(it.log.read_bytes() + b"\0"), "what follows"),
    "nothing": (lambda it: it.log.write_bytes(b""), "no frame"),
    "another's number": (
        lambda it: it.log.write_bytes(it.path(format.log_name(it.maker.volume, 2)).read_bytes()), "tag",
    ),
    # records
    "name of another": (lambda it: it.record(it.path("names/vm"), name="other"), "another object"),
    "volume is no id": (lambda it: it.record(it.path("names/vm"), volume="x"), "another object"),
    "name with more": (lambda it: it.record(it.path("names/vm"), more=1), "unknown"),
    "number": (lambda it: it.record(it.log, number=2), "number"),
    "volume": (lambda it: it.record(it.log, volume="0" * 32), "volume"),
    "attempt in the record": (lambda it: it.record(it.log, attempt="0" * 32), "another attempt"),
    "size": (lambda it: it.record(it.log, size=0), "size"),
    "size of a block": (lambda it: it.record(it.log, block_size=4096), "size"),
    "superblock with more": (lambda it: it.record(it.log, more=1), "unknown"),
    "superblock with less": (lambda it: it.record(it.log, stored=None), "missing"),
    "root with more": (lambda it: it.record(it.log, root__more=1), "unknown"),
    "level of the root": (lambda it: it.record(it.log, root__level=1), "level"),
    "blocks of the root": (lambda it: it.record(it.log, root__blocks=1), "blocks"),
    "chunk of the root": (lambda it: it.record(it.log, root__chunk=9), "missing"),
    "offset of the root": (lambda it: it.record(it.log, root__offset=1), "too short|magic"),
    "length of the root": (lambda it: it.record(it.log, root__length=40), "what follows"),
    # nodes
    "level": (lambda it: it.leaf(put(0, "B", 1)), "level"),
    "level above all": (lambda it: it.leaf(put(0, "B", 8)), "counts"),
    "zero in a node": (lambda it: it.leaf(put(1, "B", 1)), "counts"),
    "second zero in a node": (lambda it: it.leaf(put(6, "H", 1)), "counts"),
    "no entries": (lambda it: it.leaf(put(2, "H", 0)), "counts"),
    "too many entries": (lambda it: it.leaf(put(2, "H", 257)), "counts"),
    "fewer entries": (lambda it: it.leaf(put(2, "H", 1)), "longer|attempt|length|outside|codec"),
    "more attempts": (lambda it: it.leaf(put(4, "H", 9)), "shorter|ascend|another node|outside"),
    "keys": (lambda it: it.leaf(at_column(0, "Q", 0, skip=8)), "ascend"),
    "keys behind the end": (lambda it: it.leaf(at_column(0, "Q", 1 << 40)), "another node"),
    "index": (lambda it: it.leaf(at_column(1, "H", 9)), "not there"),
    "chunk": (lambda it: it.leaf(at_column(2, "I", 999)), "missing"),
    "offset behind a chunk": (lambda it: it.leaf(at_column(3, "I", 1 << 24)), "outside"),
    "offset": (lambda it: it.leaf(at_column(3, "I", 9)), "digest|zstd|size"),
    "length 0": (lambda it: it.leaf(at_column(4, "I", 0)), "length of 0"),
    "length of a block": (lambda it: it.leaf(at_column(4, "I", 60)), "digest|zstd|length|size"),
    "unknown codec": (lambda it: it.leaf(at_column(5, "B", 2)), "codec"),
    "codec": (lambda it: it.leaf(at_column(5, "B", 0)), "length"),
    "digest": (lambda it: it.leaf(at_column(6, "B", 0)), "digest"),
    "shorter": (lambda it: it.leaf(lambda body: body[:-1]), "shorter"),
    "longer": (lambda it: it.leaf(lambda body: body + b"\0"), "longer"),
    "blocks below": (lambda it: it.inner(at_column(5, "Q", 1)), "blocks"),
    "key of a child": (lambda it: it.inner(at_column(0, "Q", 1 << 3)), "smallest key|another node"),
    # chunks
    "a chunk that is gone": (lambda it: it.path(_chunk(it)).unlink(), "missing"),
    "a chunk that is cut": (lambda it: it.path(_chunk(it)).write_bytes(it.path(_chunk(it)).read_bytes()[:30]), "short"),
    "a node that is gone": (lambda it: it.meta.unlink(), "missing"),
}  # fmt: skip


def _chunk(it: Forger) -> str:
    entry = it.last.entries[0]
    return format.data_name(it.maker.volume, entry.attempt, entry.chunk)


async def _ours(root: Path) -> None:
    volume = await SnapshotVolume.open(f"file://{root}#vm", Access())
    try:
        await volume.read_into(0, memoryview(bytearray(volume.size)))
    finally:
        await volume.close()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """An archive to make copies of."""
    return asyncio.run(made(tmp_path_factory.mktemp("original") / "store"))


@pytest.mark.parametrize("name", FORGERIES)
async def test_what_the_document_says_is_refused(tmp_path: Path, original: Maker, name: str) -> None:
    forgery, word = FORGERIES[name]
    shutil.copytree(original.store.uri.removeprefix("file://"), tmp_path / "store")
    forgery(Forger(tmp_path / "store", original))
    with pytest.raises(minimal.Refused, match=word):
        minimal.restore(tmp_path / "store", "vm", tmp_path / "out")
    with pytest.raises(BlockferryError) as told:
        await _ours(tmp_path / "store")
    assert told.value.next


KEY_FORGERIES: dict[str, dict[str, object]] = {
    "version": {"version": 2},
    "id": {"id": "0" * 32},
    "archive": {"archive": "0" * 32},
    "kdf": {"kdf": "md5"},
    "salt": {"salt": "00" * 32},
    "nonce": {"nonce": "00" * 12},
    "wrapped": {"wrapped": "00" * 48},
    "memory": {"n": 1 << 24, "r": 64},
    "unknown field": {"more": 1},
    "missing field": {"salt": None},
}


@pytest.mark.parametrize("name", KEY_FORGERIES)
async def test_keys_that_were_changed_are_refused(tmp_path: Path, name: str) -> None:
    maker = await made(tmp_path / "store", Secret("passphrase", b"open sesame"))
    (tmp_path / "phrase").write_text("open sesame")
    (key,) = await maker.store.list("keys/")
    Forger(tmp_path / "store", maker).json(key, **KEY_FORGERIES[name])
    with pytest.raises(minimal.Refused):
        minimal.restore(tmp_path / "store", "vm", tmp_path / "out", ("passphrase", b"open sesame"))
    with pytest.raises(BlockferryError) as told:
        await SnapshotVolume.open(f"file://{tmp_path}/store#vm", Access(passphrase_file=tmp_path / "phrase"))
    assert key in told.value.line()


async def test_encrypted_objects_that_were_changed_are_refused(tmp_path: Path) -> None:
    secret = Secret("key file", bytes(range(32)))
    maker = await made(tmp_path / "store", secret)
    (tmp_path / "key").write_bytes(secret.value)
    last: Made = maker.snapshots[-1]
    for name in (
        format.log_name(maker.volume, last.number),
        format.meta_name(maker.volume, last.attempt, 0),
        format.data_name(maker.volume, last.entries[0].attempt, 0),
        "names/vm",
    ):
        path = tmp_path / "store" / name
        whole = path.read_bytes()
        for at in (16, 40):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with pytest.raises(minimal.Refused):
                minimal.restore(tmp_path / "store", "vm", tmp_path / "out", ("key file", secret.value))
        path.write_bytes(whole)
    minimal.restore(tmp_path / "store", "vm", tmp_path / "out", ("key file", secret.value))
    assert (tmp_path / "out").read_bytes() == last.content
