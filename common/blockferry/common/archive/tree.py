"""A copy-on-write B+ tree from archive block numbers to where the blocks are (pure; US10853312B2).

A new snapshot's tree is made from its parent's in one pass over the changes, in order. Subtrees without changes are not
even loaded: the new tree refers to them. Changed leaves and the nodes above them are written anew, filled up to 256
entries; neighbours that were both changed are joined where they became small. Holes have no entry, no node is empty.

Nodes come and go through callbacks, so that the same code works on staged files, on a store and on a dict in tests.
Memory is that of one path of nodes, and of a reference for each leaf that is new.
"""

from __future__ import annotations

import bisect
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from blockferry.common.archive.columns import MAX_ENTRIES, Child, Entry, Inner, Leaf, Node, NodeRef

Load = Callable[[NodeRef], Awaitable[Node]]
"""The node at a reference; raises BlockferryError."""
Save = Callable[[Node], Awaitable[NodeRef]]
"""Lays a new node down and says where."""
Edit = tuple[int, Entry | None]
"""A block and where it is now; None for a hole."""

_NO_END = 1 << 63


class Root(NamedTuple):
    """A tree that is not empty."""

    ref: NodeRef
    level: int
    blocks: int


# --- reading --------------------------------------------------------------------------------------------------------


async def find(root: Root | None, block: int, load: Load) -> Entry | None:
    """Where a block is; None for a hole."""
    ref = root.ref if root is not None else None
    while ref is not None:
        node = await load(ref)
        index = bisect.bisect_right(node.keys, block) - 1
        if index < 0:
            return None
        if isinstance(node, Leaf):
            return node.items[index] if node.keys[index] == block else None
        ref = node.items[index].ref
    return None


async def leaves(
    root: Root | None, load: Load, first: int = 0, end: int = _NO_END
) -> AsyncIterator[list[tuple[int, Entry]]]:
    """The blocks from `first` up to `end`, ascending and with where each is: a list for each leaf that has some."""
    stack = [root.ref] if root is not None else []
    while stack:
        node = await load(stack.pop())
        if isinstance(node, Leaf):
            low, high = bisect.bisect_left(node.keys, first), bisect.bisect_left(node.keys, end)
            if low < high:
                yield list(zip(node.keys[low:high], node.items[low:high], strict=True))
        else:
            low = max(bisect.bisect_right(node.keys, first) - 1, 0)
            high = bisect.bisect_left(node.keys, end)
            stack += [child.ref for child in reversed(node.items[low:high])]


async def nodes(root: Root | None, load: Load) -> AsyncIterator[tuple[NodeRef, Node]]:
    """Every node of a tree, parents first."""
    stack = [root.ref] if root is not None else []
    while stack:
        ref = stack.pop()
        node = await load(ref)
        yield ref, node
        if isinstance(node, Inner):
            stack += [child.ref for child in reversed(node.items)]


# --- making ---------------------------------------------------------------------------------------------------------


class _Changes:
    """Edits in order, one of which can be looked at before it is taken."""

    def __init__(self, batches: AsyncIterator[Sequence[Edit]]) -> None:
        self._batches = batches
        self._batch: Sequence[Edit] = ()
        self._next = 0
        self._last = -1

    async def next_block(self) -> int:
        """The block of the next edit; beyond all blocks where there is none."""
        while self._next >= len(self._batch):
            try:
                self._batch, self._next = await anext(self._batches), 0
            except StopAsyncIteration:
                return _NO_END
        return self._batch[self._next][0]

    def take(self) -> Edit:
        edit = self._batch[self._next]
        assert edit[0] > self._last, f"block {edit[0]} after {self._last}"
        self._next += 1
        self._last = edit[0]
        return edit


@dataclass
class _Filler:
    """Gathers what nodes of one level are filled with. Holds back up to two nodes' worth, so that the last ones can
    share evenly."""

    level: int
    save: Save
    pieces: list[tuple[int, Child]] | _Filler
    """where finished nodes go"""
    keys: list[int] = field(default_factory=list)
    items: list[Any] = field(default_factory=list)
    """entries at level 0, children above"""
    saved: int = 0

    async def add(self, key: int, item: Entry | Child) -> None:
        self.keys.append(key)
        self.items.append(item)
        if len(self.keys) == 2 * MAX_ENTRIES:
            await self._save(MAX_ENTRIES)

    async def flush(self) -> None:
        if len(self.keys) > MAX_ENTRIES:
            await self._save((len(self.keys) + 1) // 2)
        if self.keys:
            await self._save(len(self.keys))

    async def _save(self, count: int) -> None:
        node = self.node(count)
        del self.keys[:count], self.items[:count]
        child = Child(await self.save(node), node.blocks)
        self.saved += 1
        if isinstance(self.pieces, _Filler):
            await self.pieces.add(node.keys[0], child)
        else:
            self.pieces.append((node.keys[0], child))

    def node(self, count: int) -> Node:
        """A node of the first `count` items."""
        keys, items = self.keys[:count], self.items[:count]
        return Inner(self.level, keys, items) if self.level else Leaf(keys, items)


class _Editor:
    def __init__(self, changes: _Changes, load: Load, save: Save) -> None:
        self._changes = changes
        self._load = load
        self._save = save

    async def edit(self, node: Node, end: int, out: _Filler) -> None:
        """Put what fills `node` into `out`, with the edits of blocks before `end`."""
        if isinstance(node, Leaf):
            await self._edit_leaf(node, end, out)
        else:
            await self._edit_inner(node, end, out)

    async def _edit_leaf(self, leaf: Leaf, end: int, out: _Filler) -> None:
        for key, entry in zip(leaf.keys, leaf.items, strict=True):
            if await self.insert(key, out) == key:
                _, now = self._changes.take()
                if now is not None:
                    await out.add(key, now)
            else:
                await out.add(key, entry)
        await self.insert(end, out)

    async def insert(self, end: int, out: _Filler) -> int:
        """Take the edits before `end`, of blocks that are in no leaf yet; return the block of the next one."""
        while (block := await self._changes.next_block()) < end:
            _, entry = self._changes.take()
            if entry is not None:
                await out.add(block, entry)
        return block

    async def _edit_inner(self, node: Inner, end: int, out: _Filler) -> None:
        below = _Filler(node.level - 1, self._save, out)
        for key, child, before in zip(node.keys, node.items, [*node.keys[1:], end], strict=True):
            if await self._changes.next_block() < before:
                await self.edit(await self._load(child.ref), before, below)
            else:
                await below.flush()
                await out.add(key, child)
        await below.flush()


async def edit(root: Root | None, batches: AsyncIterator[Sequence[Edit]], load: Load, save: Save) -> Root | None:
    """The tree with these edits, which must ascend; None where no block is left. `save` is called for new nodes only,
    children first."""
    changes = _Changes(batches)
    editor = _Editor(changes, load, save)
    if await changes.next_block() == _NO_END:
        return root
    pieces: list[tuple[int, Child]] = []
    top = _Filler(root.level if root is not None else 0, save, pieces)
    if root is not None:
        await editor.edit(await load(root.ref), _NO_END, top)
    else:
        await editor.insert(_NO_END, top)
    while top.saved or len(top.keys) > MAX_ENTRIES:
        await top.flush()
        found, pieces = pieces, []
        top = _Filler(top.level + 1, save, pieces)
        for key, child in found:
            await top.add(key, child)
    return await _rooted(top, load)


async def _rooted(top: _Filler, load: Load) -> Root | None:
    """The tree whose root has what is in `top`, without a chain of nodes that have one child."""
    if not top.keys:
        return None
    if top.level == 0 or len(top.keys) > 1:
        node = top.node(len(top.keys))
        return Root(await top.save(node), top.level, node.blocks)
    only, level = top.items[0], top.level - 1
    while level:
        node = await load(only.ref)
        if isinstance(node, Leaf) or len(node.items) > 1:
            break
        only, level = node.items[0], level - 1
    return Root(only.ref, level, only.blocks)
