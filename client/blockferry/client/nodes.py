"""Tree nodes for an archiver: new ones are laid into staged metadata chunks, old ones come from the archive.

A node is fetched with the whole chunk it is in, once: its neighbours are asked for next. A node that is already in a
chunk which an earlier run of the attempt has stored is not laid down again.
"""

from __future__ import annotations

import collections
import os
from collections.abc import Iterator

from blake3 import blake3
from blockferry.client.staging import Staging
from blockferry.common import disk
from blockferry.common.archive import format
from blockferry.common.archive.columns import Node, NodeRef, decode_node, encode_node
from blockferry.common.archive.format import CHUNK_SIZE, HEADER, TAIL_SIZE, Header, Kind
from blockferry.common.archive.seal import Sealer
from blockferry.common.archive.store import ObjectStore
from blockferry.common.durable import write_unsynced
from blockferry.common.errors import BlockferryError, from_os_error
from blockferry.common.volumes import in_thread

NODES_HELD = 64
"""Decoded nodes kept in memory: a path, and the leaves around it. About 5 MiB."""


class Nodes:
    """`load` and `save` for one run of an attempt."""

    def __init__(self, staging: Staging, store: ObjectStore, sealer: Sealer, attempt: bytes) -> None:
        self._staging = staging
        self._store = store
        self._sealer = sealer
        self._attempt = attempt
        self._held: collections.OrderedDict[NodeRef, Node] = collections.OrderedDict()
        self._known = self._nodes_stored()
        self._number = max(staging.state.meta, default=-1)
        self._fd = -1
        self._offset = 0
        self.laid: dict[int, int] = {}
        """the metadata chunks of this run, to be stored: bytes by number"""
        self.used: set[str] = set()
        """names of the cached chunks that were needed"""

    def close(self) -> None:
        """Let go of the chunk that is being laid down."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    # --- new nodes --------------------------------------------------------------------------------------------------

    async def save(self, node: Node) -> NodeRef:
        """Lay a node down."""
        ref = await in_thread(self._save, node)
        self._hold(ref, node)
        return ref

    def _save(self, node: Node) -> NodeRef:
        body = encode_node(node)
        known = self._known.get(_digest(body))
        if known is not None:
            return known
        if self._fd < 0:
            self._begin_chunk()
        frame = self._seal(body)
        if self._offset + len(frame) > CHUNK_SIZE:
            self._begin_chunk()
            frame = self._seal(body)
        try:
            view = memoryview(frame)
            while view:
                view = view[disk.pwrite(self._fd, view, self._offset + len(frame) - len(view)) :]
        except OSError as error:
            raise from_os_error(error, f"cannot write {self._staging.meta_path(self._number)}") from error
        ref = NodeRef(self._attempt, self._number, self._offset, len(frame))
        self._offset += len(frame)
        self.laid[self._number] = self._offset
        return ref

    def _seal(self, body: bytes) -> bytes:
        return self._sealer.seal_frame(Kind.NODE, self._attempt, body, number=self._number, offset=self._offset)

    def _begin_chunk(self) -> None:
        self.close()
        self._number, self._offset = self._number + 1, 0
        path = self._staging.meta_path(self._number)
        try:
            disk.unlink(path)
            self._fd = disk.create(path)
        except OSError as error:
            raise from_os_error(error, f"cannot write {path}") from error
        self.laid[self._number] = 0

    def read_chunk(self, number: int) -> bytes:
        """A metadata chunk that was laid down."""
        try:
            return self._staging.meta_path(number).read_bytes()
        except OSError as error:
            raise from_os_error(error, f"cannot read {self._staging.meta_path(number)}") from error

    @property
    def chunks(self) -> int:
        """All metadata chunks of the attempt have numbers below this."""
        return self._number + 1

    # --- nodes of earlier runs ----------------------------------------------------------------------------------------

    def _nodes_stored(self) -> dict[bytes, NodeRef]:
        """Where nodes are that an earlier run has stored, by the digest of their bodies."""
        found = {}
        for number, noted in self._staging.state.meta.items():
            if not noted.done:
                continue
            try:
                data = self._staging.meta_path(number).read_bytes()
            except OSError:
                continue
            if len(data) != noted.size or data[-TAIL_SIZE:] != noted.tail:
                # Not what was stored: its nodes are laid down anew.
                continue
            try:
                for ref, body in self._frames(number, data):
                    found[_digest(body)] = ref
            except BlockferryError:
                continue
        return found

    def _frames(self, number: int, data: bytes) -> Iterator[tuple[NodeRef, bytes]]:
        name = self._staging.meta_path(number).name
        view, offset = memoryview(data), 0
        while offset < len(data):
            length = HEADER.size + Header.decode(view[offset:], name).stored
            frame = view[offset : offset + length]
            _, body = self._sealer.open_frame(Kind.NODE, frame, name, number=number, offset=offset)
            yield NodeRef(self._attempt, number, offset, length), body
            offset += length

    # --- nodes of the archive -----------------------------------------------------------------------------------------

    async def load(self, ref: NodeRef) -> Node:
        """The node at a reference."""
        node = self._held.get(ref)
        if node is None:
            if ref.attempt == self._attempt:
                frame = await in_thread(self._read_staged, ref)
                node = await in_thread(self._decode, ref, frame)
            else:
                node = await self._load_stored(ref)
        self._hold(ref, node)
        return node

    def _hold(self, ref: NodeRef, node: Node) -> None:
        self._held[ref] = node
        self._held.move_to_end(ref)
        if len(self._held) > NODES_HELD:
            self._held.popitem(last=False)

    def _read_staged(self, ref: NodeRef) -> bytes:
        try:
            with self._staging.meta_path(ref.chunk).open("rb", buffering=0) as file:
                return os.pread(file.fileno(), ref.length, ref.offset)
        except OSError as error:
            raise from_os_error(error, f"cannot read {self._staging.meta_path(ref.chunk)}") from error

    async def _load_stored(self, ref: NodeRef) -> Node:
        path = self._staging.cache_path(ref.attempt, ref.chunk)
        self.used.add(path.name)

        def cached() -> Node:
            with path.open("rb", buffering=0) as file:
                return self._decode(ref, os.pread(file.fileno(), ref.length, ref.offset))

        try:
            return await in_thread(cached)
        except (OSError, BlockferryError):
            # Not there, or not what it was: the archive has it.
            data = await self._store.get(format.meta_name(self._sealer.volume, ref.attempt, ref.chunk))
        try:
            await in_thread(write_unsynced, path, data)
        except OSError as error:
            raise from_os_error(error, f"cannot write {path}") from error
        return await in_thread(self._decode, ref, data[ref.offset : ref.offset + ref.length])

    def _decode(self, ref: NodeRef, frame: bytes) -> Node:
        return open_node(self._sealer, ref, frame)


def open_node(sealer: Sealer, ref: NodeRef, frame: bytes) -> Node:
    """The node in a frame. Raises CORRUPT_STATE unless it belongs at that reference."""
    name = format.meta_name(sealer.volume, ref.attempt, ref.chunk)
    attempt, body = sealer.open_frame(Kind.NODE, frame, name, number=ref.chunk, offset=ref.offset)
    if attempt != ref.attempt:
        raise format.damaged(name, "it holds a node of another attempt")
    return decode_node(body, name)


def _digest(body: bytes) -> bytes:
    return blake3(body).digest(16)
