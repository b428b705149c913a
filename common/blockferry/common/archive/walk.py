"""The tree of one snapshot, read from a store.

Siblings stand side by side in metadata chunks, so that many of them come with one request. What a parent says of a
child is checked against the child: a node that is whole but is not the one that was meant is damage, too.
"""

from __future__ import annotations

import asyncio
import bisect
import collections
from collections.abc import AsyncIterator, Callable, Container, Sequence
from typing import NamedTuple

from blockferry.common.archive import format
from blockferry.common.archive.columns import Entry, Inner, Leaf, Node, NodeRef, decode_node
from blockferry.common.archive.fetch import Range, ranges
from blockferry.common.archive.format import Kind, Superblock
from blockferry.common.archive.seal import Sealer
from blockferry.common.archive.store import Missing, ObjectStore
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.volumes.volume import in_thread

NODES = 256
"""Nodes kept, of up to 256 entries each: about 20 MiB."""
SIBLINGS = 64
"""Nodes asked for at once: about a MiB of them, in one or two requests."""

Damage = Callable[[BlockferryError, int, int], None]
"""Told of an error and the blocks, (first, end), that cannot be read for it."""


def is_damage(error: BlockferryError) -> bool:
    """Whether asking again would not change it: something in the archive is not what it was."""
    return isinstance(error, Missing) or error.code in (Code.DATA_MISMATCH, Code.CORRUPT_STATE)


class _Part(NamedTuple):
    """A subtree, and what is known of it beforehand. `first` is None for the root, whose smallest block nobody says."""

    ref: NodeRef
    level: int
    blocks: int
    first: int | None
    end: int


class TreeReader:
    """Reads the tree of a snapshot. What it reads is kept, within bounds."""

    def __init__(self, store: ObjectStore, sealer: Sealer, superblock: Superblock) -> None:
        self._store = store
        self._sealer = sealer
        self._superblock = superblock
        self._blocks = -(-superblock.size // superblock.block_size)
        self._nodes: collections.OrderedDict[NodeRef, Node] = collections.OrderedDict()

    async def leaves(
        self, first: int = 0, end: int | None = None, damage: Damage | None = None
    ) -> AsyncIterator[list[tuple[int, Entry]]]:
        """The blocks from `first` up to `end` and where each is, ascending, a list for each leaf. Nodes that are
        damaged are an error, or told to `damage` and passed over."""
        async for _, node, entries in self._walk(self._root(), first, self._blocks if end is None else end, damage):
            if isinstance(node, Leaf) and entries:
                yield entries

    async def nodes(
        self, damage: Damage | None = None, known: Container[NodeRef] = ()
    ) -> AsyncIterator[tuple[NodeRef, Node]]:
        """Every node, parents first, but for those that are `known` and what is below them."""
        async for ref, node, _ in self._walk(self._root(), 0, self._blocks, damage, known):
            yield ref, node

    def _root(self) -> list[_Part]:
        root = self._superblock.root
        if root is None:
            return []
        ref = NodeRef(bytes.fromhex(root.attempt), root.chunk, root.offset, root.length)
        return [_Part(ref, root.level, root.blocks, None, self._blocks)]

    async def _walk(
        self,
        parts: Sequence[_Part],
        first: int,
        end: int,
        damage: Damage | None,
        known: Container[NodeRef] = (),
    ) -> AsyncIterator[tuple[NodeRef, Node, list[tuple[int, Entry]]]]:
        parts = [part for part in parts if part.ref not in known]
        for start in range(0, len(parts), SIBLINGS):
            group = parts[start : start + SIBLINGS]
            for part, node in zip(group, await self._load(group, damage), strict=True):
                if isinstance(node, Leaf):
                    low, high = bisect.bisect_left(node.keys, first), bisect.bisect_left(node.keys, end)
                    yield part.ref, node, list(zip(node.keys[low:high], node.items[low:high], strict=True))
                elif isinstance(node, Inner):
                    yield part.ref, node, []
                    below = [one for one in _children(node, part) if one.end > first and (one.first or 0) < end]
                    async for found in self._walk(below, first, end, damage, known):
                        yield found

    # --- loading ------------------------------------------------------------------------------------------------------

    async def _load(self, parts: Sequence[_Part], damage: Damage | None) -> list[Node | None]:
        """The nodes of some subtrees; None for those that were told to `damage`."""
        found: dict[int, Node] = {}
        wanted: list[tuple[int, NodeRef]] = []
        for number, part in enumerate(parts):
            if (node := self._nodes.get(part.ref)) is not None:
                self._nodes.move_to_end(part.ref)
                found[number] = node
            else:
                wanted.append((number, part.ref))
        for result in await asyncio.gather(
            *(self._fetch(one, parts, damage) for one in ranges(wanted, count=SIBLINGS))
        ):
            found.update(result)
        return [found.get(number) for number in range(len(parts))]

    async def _fetch(self, one: Range[NodeRef], parts: Sequence[_Part], damage: Damage | None) -> dict[int, Node]:
        name = format.meta_name(self._sealer.volume, one.attempt, one.chunk)
        try:
            data = await self._store.get_range(name, one.offset, one.length)
        except BlockferryError as error:
            if damage is None or not is_damage(error):
                raise
            if len(one.items) == 1:
                number = one.items[0][0]
                damage(error, parts[number].first or 0, parts[number].end)
                return {}
            # Some of them may still be whole.
            found: dict[int, Node] = {}
            for item in one.items:
                found.update(await self._fetch(ranges([item])[0], parts, damage))
            return found
        return await in_thread(self._open, one, memoryview(data), parts, damage)

    def _open(
        self, one: Range[NodeRef], data: memoryview, parts: Sequence[_Part], damage: Damage | None
    ) -> dict[int, Node]:
        found: dict[int, Node] = {}
        for number, ref in one.items:
            start = ref.offset - one.offset
            try:
                node = self._decode(data[start : start + ref.length], parts[number])
            except BlockferryError as error:
                if damage is None or not is_damage(error):
                    raise
                damage(error, parts[number].first or 0, parts[number].end)
                continue
            found[number] = self._nodes[ref] = node
            while len(self._nodes) > NODES:
                self._nodes.popitem(last=False)
        return found

    def _decode(self, frame: memoryview, part: _Part) -> Node:
        ref = part.ref
        name = format.meta_name(self._sealer.volume, ref.attempt, ref.chunk)
        shown = f"{self._store.uri}/{name} (node at {ref.offset})"
        attempt, body = self._sealer.open_frame(Kind.NODE, frame, shown, number=ref.chunk, offset=ref.offset)
        node = decode_node(body, shown)
        if attempt != ref.attempt:
            raise format.damaged(shown, "it belongs to another attempt")
        if (node.level, node.blocks) != (part.level, part.blocks):
            raise format.damaged(shown, "it is not the node that its parent means")
        if part.first not in (None, node.keys[0]) or node.keys[-1] >= part.end:
            raise format.damaged(shown, "it has blocks that its parent does not give it")
        return node


def _children(node: Inner, part: _Part) -> list[_Part]:
    ends = [*node.keys[1:], part.end]
    return [
        _Part(child.ref, node.level - 1, child.blocks, first, end)
        for first, child, end in zip(node.keys, node.items, ends, strict=True)
    ]
