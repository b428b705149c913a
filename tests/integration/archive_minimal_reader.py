"""Restores a snapshot from an archive in a directory: written from docs/archive-format.md alone.

    archive_minimal_reader.py DIRECTORY NAME[@NUMBER] OUTPUT [--key-file FILE | --passphrase-file FILE]

It shares no code with blockferry, so that the document is known to suffice. Whatever it must refuse it refuses with a
`Refused` that says which rule of the document was broken; as a program it prints that and exits with 1.
"""

from __future__ import annotations

import itertools
import json
import re
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blake3
import zstandard
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

CHUNK = 16777216
BLOCK = 262144
NOBODY = bytes(16)
NAME, TRAILER, NODE, SUPERBLOCK, DELETION, REMAP, ATTEMPT, PIN = range(1, 9)
KINDS = range(NAME, PIN + 1)
MAX_BODY = 64 << 20

FIELDS = {
    "archive": "format version id chunk_size block_size compression encryption conditional created",
    "key": "version id archive kdf salt n r p nonce wrapped",
    "name": "name volume created",
    "superblock": "number volume attempt base base_attempt seen created source snapshot_id size block_size root "
    "data_chunks meta_chunks stored",
    "root": "attempt chunk offset length level blocks",
    "deletion": "number volume snapshots chunks grace created",
}


class Refused(Exception):
    """What a reader must refuse."""


def require(rule: object, text: str) -> None:
    """Refuse unless `rule` holds."""
    if not rule:
        raise Refused(text)


def record(data: bytes, kind: str) -> dict[str, Any]:
    """A JSON object with exactly the fields of its kind."""
    try:
        found = json.loads(data)
    except ValueError as error:
        raise Refused(f"{kind}: no JSON") from error
    require(isinstance(found, dict), f"{kind}: no object")
    if found.get("version", 1) != 1:
        raise Refused(f"{kind}: version {found['version']}")
    require(set(found) == set(FIELDS[kind].split()), f"{kind}: unknown or missing fields")
    return dict(found)


def is_id(text: object) -> bool:
    """32 lower-case hexadecimal digits."""
    return isinstance(text, str) and re.fullmatch("[0-9a-f]{32}", text) is not None


def unpack(data: bytes, length: int) -> bytes:
    """One zstd frame whose content's size is `length`."""
    try:
        require(zstandard.frame_content_size(data) == length, "content's size does not match")
        return zstandard.ZstdDecompressor().decompress(data, max_output_size=length, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise Refused("not a zstd frame") from error


@dataclass
class Cpba:
    """Where a block is."""

    attempt: bytes
    chunk: int
    offset: int
    length: int
    codec: int
    digest: bytes


class Columns:
    """A body, taken apart from its beginning."""

    def __init__(self, body: bytes) -> None:
        self.body, self.at = body, 0

    def take(self, layout: str) -> tuple[Any, ...]:
        """Values of one layout."""
        size = struct.calcsize("<" + layout)
        require(self.at + size <= len(self.body), "body shorter than its columns")
        found = struct.unpack_from("<" + layout, self.body, self.at)
        self.at += size
        return found

    def fixed(self, size: int, count: int) -> list[bytes]:
        """Byte strings of one size."""
        return [self.take(f"{size}s")[0] for _ in range(count)]

    def keys(self, count: int) -> list[int]:
        """Numbers, written as differences."""
        gaps = self.take(f"{count}Q")
        require(all(gaps[1:]), "keys do not ascend")
        return list(itertools.accumulate(gaps))

    def end(self) -> None:
        """Nothing is left."""
        require(self.at == len(self.body), "body longer than its columns")


class Archive:
    """One archive in a directory."""

    def __init__(self, root: Path, secret: tuple[str, bytes] | None) -> None:
        self.root = root
        found = record(self.read("archive.json"), "archive")
        require(found["format"] == "blockferry-archive", "archive: another format")
        require((found["chunk_size"], found["block_size"]) == (CHUNK, BLOCK), "archive: other sizes")
        require(found["encryption"] in ("none", "aes-256-gcm"), "archive: unknown encryption")
        require(is_id(found["id"]), "archive: id")
        self.id = bytes.fromhex(found["id"])
        self.conditional = found["conditional"]
        self.encrypted = found["encryption"] != "none"
        require(self.encrypted or secret is None, "archive: a key was given, and it says it is not encrypted")
        require(not self.encrypted or secret is not None, "archive: it is encrypted")
        self.key = self.archive_key(*secret) if secret is not None else b""

    def read(self, name: str) -> bytes:
        """All of an object."""
        try:
            return (self.root / name).read_bytes()
        except OSError as error:
            raise Refused(f"{name} is missing") from error

    def part(self, name: str, offset: int, length: int) -> bytes:
        """Some of an object."""
        found = self.read(name)[offset : offset + length]
        require(len(found) == length, f"{name} is too short")
        return found

    # --- keys -----------------------------------------------------------------------------------------------------

    def archive_key(self, kind: str, secret: bytes) -> bytes:
        """The key that one of the objects in keys/ holds for this secret."""
        for path in sorted((self.root / "keys").iterdir()):
            found = record(path.read_bytes(), "key")
            require(found["id"] == path.name and found["archive"] == self.id.hex(), "key: of another name or archive")
            salt = bytes.fromhex(found["salt"])
            if found["kdf"] == "hkdf-sha256" and kind == "key file":
                wrapping = HKDF(SHA256(), 32, salt, b"blockferry archive v1 key file").derive(secret)
            elif found["kdf"] == "scrypt" and kind == "passphrase":
                require(128 * found["n"] * found["r"] <= 1 << 30, "key: scrypt wants too much memory")
                wrapping = Scrypt(salt, 32, found["n"], found["r"], found["p"]).derive(secret)
            else:
                require(found["kdf"] in ("hkdf-sha256", "scrypt"), "key: unknown kdf")
                continue
            context = b"blockferry archive v1 wrap" + self.id + bytes.fromhex(found["id"])
            try:
                return AESGCM(wrapping).decrypt(bytes.fromhex(found["nonce"]), bytes.fromhex(found["wrapped"]), context)
            except InvalidTag:
                continue
        raise Refused("no key object opens with this secret")

    def derived(self, salt: bytes, purpose: str) -> bytes:
        """A key that comes from the archive key."""
        return HKDF(SHA256(), 32, salt, f"blockferry archive v1 {purpose}".encode()).derive(self.key)

    def opened(self, volume: bytes, attempt: bytes, data: bytes, context: bytes) -> bytes:
        """What was sealed with an attempt's key."""
        require(len(data) >= 12 + 16, "too short to be sealed")
        try:
            return AESGCM(self.derived(volume + attempt, "attempt")).decrypt(data[:12], data[12:], context)
        except InvalidTag as error:
            raise Refused("tag does not match") from error

    # --- frames ---------------------------------------------------------------------------------------------------

    def frame(
        self, data: bytes, kinds: tuple[int, ...], volume: bytes, number: int = 0, offset: int = 0
    ) -> tuple[int, bytes, bytes]:
        """(kind, attempt, body) of a frame that is all of `data`."""
        require(len(data) >= 32, "no frame")
        magic, version, kind, flags, zero, length, stored, attempt = struct.unpack_from("<4sBBBBII16s", data)
        require(magic == b"BFAR", "magic")
        require(version == 1, "version")
        require(kind in KINDS and kind in kinds, "kind")
        require(flags & ~3 == 0, "flags")
        require(zero == 0, "zero")
        require(length <= MAX_BODY, "length of the body")
        require(stored == len(data) - 32, "length of what follows")
        require(bool(flags & 2) == self.encrypted, "encrypted unlike the archive")
        context = data[:32] + volume + struct.pack("<QQ", number, offset)
        if self.encrypted:
            body = self.opened(volume, attempt, data[32:], context)
        else:
            body, tag = data[32:-16], data[-16:]
            require(blake3.blake3(context + body).digest(16) == tag, "tag does not match")
        if flags & 1:
            body = unpack(body, length)
        require(len(body) == length, "length of the body")
        return kind, attempt, body

    # --- names and logs -------------------------------------------------------------------------------------------

    def volume(self, name: str) -> bytes:
        """The id of a volume."""
        _, _, body = self.frame(self.read(f"names/{name}"), (NAME,), NOBODY)
        found = record(body, "name")
        require(found["name"] == name and is_id(found["volume"]), "name: of another object")
        return bytes.fromhex(found["volume"])

    def records(self, volume: bytes) -> Iterator[tuple[int, int, bytes, bytes]]:
        """(number, kind, attempt, body) of the log, from its beginning."""
        names: dict[int, str] = {}
        for path in sorted((self.root / volume.hex() / "log").iterdir()):
            suffix = "" if self.conditional else "-[0-9a-f]{32}[.]done"
            if re.fullmatch(f"[0-9]{{10}}{suffix}", path.name):
                names.setdefault(int(path.name[:10]), path.name.removesuffix(".done"))
        for number, name in sorted(names.items()):
            data = self.read(f"{volume.hex()}/log/{name}")
            yield number, *self.frame(data, (SUPERBLOCK, DELETION, REMAP), volume, number)

    def snapshot(self, volume: bytes, wanted: int) -> tuple[dict[str, Any], list[bytes]]:
        """A superblock, the newest one for 0, and the bodies of the remap records."""
        found: dict[int, dict[str, Any]] = {}
        remaps = []
        for number, kind, attempt, body in self.records(volume):
            if kind == REMAP:
                remaps.append(body)
                continue
            one = record(body, "superblock" if kind == SUPERBLOCK else "deletion")
            require(one["number"] == number and one["volume"] == volume.hex(), "log: of another number or volume")
            if kind == DELETION:
                for gone in one["snapshots"]:
                    if gone < number:
                        found.pop(gone, None)
                continue
            require(one["attempt"] == attempt.hex(), "superblock: of another attempt")
            require(one["size"] >= 1 and one["block_size"] == BLOCK, "superblock: size")
            found[number] = one
        require(found and (not wanted or wanted in found), "there is no such snapshot")
        return found[wanted or max(found)], remaps

    # --- trees ----------------------------------------------------------------------------------------------------

    def blocks(self, volume: bytes, superblock: dict[str, Any]) -> Iterator[tuple[int, Cpba]]:
        """Where all blocks are, ascending."""
        root = superblock["root"]
        if root is None:
            return
        require(set(root) == set(FIELDS["root"].split()), "root: unknown or missing fields")
        most = -(-superblock["size"] // BLOCK)
        place = (bytes.fromhex(root["attempt"]), root["chunk"], root["offset"], root["length"])
        yield from self.node(volume, place, root["level"], None, most, root["blocks"])

    def node(
        self,
        volume: bytes,
        place: tuple[bytes, int, int, int],
        level: int,
        first: int | None,
        end: int,
        blocks: int,
    ) -> Iterator[tuple[int, Cpba]]:
        """What is below a node, which is checked against what its parent says."""
        attempt, chunk, offset, length = place
        data = self.part(f"{volume.hex()}/meta/{attempt.hex()}-{chunk:06}", offset, length)
        _, said, body = self.frame(data, (NODE,), volume, chunk, offset)
        require(said == attempt, "node: of another attempt")
        columns = Columns(body)
        found, zero, count, known, zero2 = columns.take("BBHHH")
        require(found <= 7 and zero == zero2 == 0 and 1 <= count <= 256, "node: counts")
        require(found == level, "node: of another level")
        attempts = columns.fixed(16, known)
        keys = columns.keys(count)
        require(first is None or keys[0] == first, "node: smallest key")
        require(keys[-1] < end, "node: keys of another node")
        indexes, chunks, offsets, lengths = (columns.take(f"{count}{kind}") for kind in "HIII")
        require(max(indexes) < known, "node: an attempt that is not there")
        require(all(lengths), "node: a length of 0")
        require(all(at + size <= CHUNK for at, size in zip(offsets, lengths, strict=True)), "node: outside of a chunk")
        places = [(attempts[which], *rest) for which, *rest in zip(indexes, chunks, offsets, lengths, strict=True)]
        if level == 0:
            codecs = columns.take(f"{count}B")
            digests = columns.fixed(32, count)
            columns.end()
            require(set(codecs) <= {0, 1}, "node: codec")
            require(count == blocks, "node: number of blocks")
            for key, at, codec, digest in zip(keys, places, codecs, digests, strict=True):
                yield key, Cpba(at[0], at[1], at[2], at[3], codec, digest)
            return
        below = columns.take(f"{count}Q")
        columns.end()
        require(sum(below) == blocks, "node: number of blocks")
        for key, at, stop, number in zip(keys, places, [*keys[1:], end], below, strict=True):
            yield from self.node(volume, at, level - 1, key, stop, number)

    # --- blocks ---------------------------------------------------------------------------------------------------

    def moved(self, entry: Cpba, moves: dict[tuple[bytes, int, int], tuple[Any, ...]]) -> Cpba:
        """Where a block is after one remap record."""
        found = moves.get((entry.attempt, entry.chunk, entry.offset))
        return entry if found is None else Cpba(found[0], found[1], found[2], found[3], found[4], entry.digest)

    def moves(self, body: bytes) -> dict[tuple[bytes, int, int], tuple[Any, ...]]:
        """A remap record."""
        columns = Columns(body)
        count, known, zero = columns.take("IHH")
        require(1 <= count <= 262144 and zero == 0, "remap: counts")
        attempts = columns.fixed(16, known)
        old = [columns.take(f"{count}{kind}") for kind in "HII"]
        new = [columns.take(f"{count}{kind}") for kind in "HIII"]
        codecs = columns.take(f"{count}B")
        columns.end()
        require(max((*old[0], *new[0])) < known, "remap: an attempt that is not there")
        was = [(attempts[index], *rest) for index, *rest in zip(*old, strict=True)]
        require(all(one < other for one, other in itertools.pairwise(was)), "remap: moves do not ascend")
        now = [(attempts[index], *rest) for index, *rest in zip(*new, codecs, strict=True)]
        return dict(zip(was, now, strict=True))

    def block(self, volume: bytes, number: int, entry: Cpba, length: int) -> bytes:
        """The content of a block."""
        name = f"{volume.hex()}/data/{entry.attempt.hex()}-{entry.chunk:06}"
        data = self.part(name, entry.offset, entry.length)
        if self.encrypted:
            data = self.opened(volume, entry.attempt, data, volume + entry.attempt + struct.pack("<Q", number))
        if entry.codec == 1:
            data = unpack(data, length)
        require(len(data) == length, "block: length")
        if self.encrypted:
            found = blake3.blake3(data, key=self.derived(volume, "digest")).digest(32)
        else:
            found = blake3.blake3(data).digest(32)
        require(found == entry.digest, "block: digest does not match")
        return data


def restore(root: Path, name: str, output: Path, secret: tuple[str, bytes] | None = None) -> None:
    """Write the snapshot `NAME` or `NAME@NUMBER` of the archive in a directory to a file."""
    archive = Archive(root, secret)
    name, _, number = name.partition("@")
    volume = archive.volume(name)
    superblock, remaps = archive.snapshot(volume, int(number or 0))
    moves = [archive.moves(body) for body in remaps]
    with output.open("wb") as file:
        file.truncate(superblock["size"])
        for block, entry in archive.blocks(volume, superblock):
            for one in moves:
                entry = archive.moved(entry, one)
            length = min(BLOCK, superblock["size"] - block * BLOCK)
            file.seek(block * BLOCK)
            file.write(archive.block(volume, block, entry, length))


def main(words: list[str]) -> int:
    """The program."""
    secret = None
    if len(words) == 5 and words[3] == "--key-file":
        secret = ("key file", Path(words[4]).read_bytes())
    elif len(words) == 5 and words[3] == "--passphrase-file":
        secret = ("passphrase", Path(words[4]).read_bytes().split(b"\n", 1)[0].removesuffix(b"\r"))
    elif len(words) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        restore(Path(words[0]), words[1], Path(words[2]), secret)
    except Refused as error:
        print(f"refused: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
