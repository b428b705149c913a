"""The tree against a dict: edits, holes, sharing with the parent, and what it costs."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Iterable, Sequence

import pytest
from blockferry.common.archive import tree
from blockferry.common.archive.columns import MAX_ENTRIES, Entry, Inner, Leaf, Node, NodeRef, decode_node, encode_node
from blockferry.common.archive.tree import Edit, Root
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.archive.examples import some

ATTEMPT = some("attempt", 16)
Model = dict[int, Entry]


class Memory:
    """Nodes by reference, encoded as they are in an archive, and who asked for which."""

    def __init__(self) -> None:
        self.bodies: dict[NodeRef, bytes] = {}
        self.loaded: list[NodeRef] = []

    async def load(self, ref: NodeRef) -> Node:
        self.loaded.append(ref)
        return decode_node(self.bodies[ref], "node")

    async def save(self, node: Node) -> NodeRef:
        ref = NodeRef(ATTEMPT, len(self.bodies), 0, 1)
        self.bodies[ref] = encode_node(node)
        return ref

    async def edit(self, root: Root | None, edits: Iterable[Edit], batch: int = 7) -> Root | None:
        return await tree.edit(root, batched(list(edits), batch), self.load, self.save)

    async def content(self, root: Root | None, first: int = 0, end: int = 1 << 60) -> Model:
        found: list[tuple[int, Entry]] = []
        async for leaf in tree.leaves(root, self.load, first, end):
            assert leaf
            found += leaf
        assert [key for key, _ in found] == sorted({key for key, _ in found})
        return dict(found)

    async def check(self, root: Root | None, model: Model) -> set[NodeRef]:
        """Everything that holds of a tree; its nodes."""
        assert await self.content(root) == model
        if root is None:
            assert not model
            return set()
        assert root.blocks == len(model)
        refs: set[NodeRef] = set()
        # (reference, level, smallest key, end)
        pending: list[tuple[NodeRef, int, int | None, int, int]] = [(root.ref, root.level, None, 1 << 60, len(model))]
        while pending:
            ref, level, first, end, blocks = pending.pop()
            assert ref not in refs
            refs.add(ref)
            node = await self.load(ref)
            assert (node.level, node.blocks) == (level, blocks) and 1 <= len(node.keys) <= MAX_ENTRIES
            assert first in (None, node.keys[0]) and node.keys[-1] < end
            if isinstance(node, Inner):
                ends = [*node.keys[1:], end]
                pending += [
                    (child.ref, level - 1, key, until, child.blocks)
                    for key, child, until in zip(node.keys, node.items, ends, strict=True)
                ]
        top = await self.load(root.ref)
        assert isinstance(top, Leaf) or len(top.items) > 1
        return refs


async def batched(edits: Sequence[Edit], size: int) -> AsyncIterator[Sequence[Edit]]:
    yield ()
    for start in range(0, len(edits), size):
        yield edits[start : start + size]


def entry(number: int) -> Entry:
    return Entry(ATTEMPT, number % 1000, 0, 1 + number % 100, number % 2, number.to_bytes(32, "little"))


def apply(model: Model, edits: Iterable[Edit]) -> Model:
    found = dict(model)
    for key, value in edits:
        if value is None:
            found.pop(key, None)
        else:
            found[key] = value
    return found


@st.composite
def histories(draw: st.DrawFn) -> list[list[Edit]]:
    """Edits of several snapshots: runs and single blocks, written or let go of, over a few thousand blocks."""
    found = []
    for number in range(draw(st.integers(1, 5))):
        edits: dict[int, Entry | None] = {}
        for _ in range(draw(st.integers(0, 6))):
            first = draw(st.integers(0, 3000))
            length = draw(st.sampled_from([1, 2, 100, 256, 257, 1000]))
            step = draw(st.sampled_from([1, 1, 2, 37]))
            hole = draw(st.booleans())
            edits.update(
                (key, None if hole else entry(key * 10 + number)) for key in range(first, first + length * step, step)
            )
        found.append(sorted(edits.items()))
    return found


@settings(max_examples=25)
@given(histories(), st.integers(1, 300))
async def test_trees_are_what_a_dict_is(history: list[list[Edit]], batch: int) -> None:
    memory = Memory()
    snapshots: list[tuple[Root | None, Model]] = [(None, {})]
    for edits in history:
        root, model = snapshots[-1]
        snapshots.append((await memory.edit(root, edits, batch), apply(model, edits)))
    # All of them: what came later has changed nothing of what was before.
    for root, model in snapshots:
        await memory.check(root, model)
    root, model = snapshots[-1]
    for key in [*list(model)[::50], 0, 3333, 1 << 45]:
        assert await tree.find(root, key, memory.load) == model.get(key)
    for first, end in ((0, 1), (100, 700), (2999, 3001), (500, 500)):
        expected = {key: value for key, value in model.items() if first <= key < end}
        assert await memory.content(root, first, end) == expected


async def test_no_edits_make_no_node_and_look_at_none() -> None:
    memory = Memory()
    assert await memory.edit(None, []) is None
    root = await memory.edit(None, [(key, entry(key)) for key in range(1000)])
    made = len(memory.bodies)
    assert await memory.edit(root, []) == root
    assert len(memory.bodies) == made and memory.loaded == []


async def test_only_the_path_to_a_changed_block_is_new_and_only_it_is_looked_at() -> None:
    memory = Memory()
    model = {key: entry(key) for key in range(257 * 256)}
    root = await memory.edit(None, model.items(), 5000)
    assert root is not None and root.level == 2
    before = await memory.check(root, model)
    memory.loaded.clear()
    edits = [(50_000, entry(1))]
    changed = await memory.edit(root, edits)
    assert len(memory.loaded) == 3
    after = await memory.check(changed, apply(model, edits))
    assert len(after - before) == 3 and len(before - after) == 3
    assert await memory.content(root) == model


async def test_every_third_leaf_changed_shares_the_others() -> None:
    memory = Memory()
    model = {key: entry(key) for key in range(256 * 90)}
    root = await memory.edit(None, model.items(), 5000)
    before = await memory.check(root, model)
    edits = [(key, entry(key + 1)) for key in range(0, 256 * 90, 256 * 3)]
    after = await memory.check(await memory.edit(root, edits), apply(model, edits))
    assert len(before) == 91 and len(after - before) == 31


async def test_leaves_of_a_full_volume_are_full() -> None:
    """What a metadata share of 0.05 % needs: a first archive has no half-empty nodes but the last two."""
    memory = Memory()
    for count in (256, 257, 512, 256 * 256 + 1):
        memory.bodies.clear()
        root = await memory.edit(None, [(key, entry(key)) for key in range(count)], 1000)
        leaves = [node for body in memory.bodies.values() if isinstance(node := decode_node(body, ""), Leaf)]
        assert len(leaves) == -(-count // 256), count
        assert root is not None and root.level == (0 if count == 256 else 1 if count <= 65536 else 2)


async def test_what_is_left_of_changed_neighbours_is_joined() -> None:
    memory = Memory()
    model = {key: entry(key) for key in range(256 * 100)}
    root = await memory.edit(None, model.items(), 5000)
    edits: list[Edit] = [(key, None) for key in range(256 * 100) if key % 64]
    root = await memory.edit(root, edits)
    assert len(await memory.check(root, apply(model, edits))) == 1 + 2
    edits = [(key, None) for key in range(256 * 100) if key != 6400]
    root = await memory.edit(root, edits)
    assert root is not None and root.level == 0
    assert len(await memory.check(root, {6400: entry(6400)})) == 1


async def test_a_tree_that_shrinks_to_what_it_shares_has_no_chain_above_it() -> None:
    memory = Memory()
    model = {key: entry(key) for key in range(257 * 256)}
    root = await memory.edit(None, model.items(), 5000)
    # All but the untouched first leaf goes.
    edits: list[Edit] = [(key, None) for key in range(256, 257 * 256)]
    root = await memory.edit(root, edits, 5000)
    assert root is not None and root.level == 0
    await memory.check(root, {key: entry(key) for key in range(256)})
    assert await memory.edit(root, [(key, None) for key in range(256)]) is None


async def test_blocks_put_into_gaps_split_what_they_overfill() -> None:
    memory = Memory()
    rng = random.Random(5)
    model: Model = {}
    root: Root | None = None
    for _ in range(40):
        edits = [(key, entry(key)) for key in sorted(rng.sample(range(1 << 20), 400))]
        root, model = await memory.edit(root, edits), apply(model, edits)
    nodes = await memory.check(root, model)
    assert len(nodes) < 2.2 * len(model) / MAX_ENTRIES


async def test_edits_must_ascend() -> None:
    memory = Memory()
    for edits in ([(5, entry(1)), (5, None)], [(5, entry(1)), (4, entry(2))]):
        with pytest.raises(AssertionError):
            await memory.edit(None, edits)


async def test_every_node_is_told_once_parents_first() -> None:
    memory = Memory()
    root = await memory.edit(None, [(key, entry(key)) for key in range(1000)])
    told = [(ref, node.level) async for ref, node in tree.nodes(root, memory.load)]
    assert [level for _, level in told] == [1, 0, 0, 0, 0]
    assert {ref for ref, _ in told} == set(memory.bodies)
    assert [one async for one in tree.nodes(None, memory.load)] == []


async def test_a_hole_is_found_nowhere() -> None:
    memory = Memory()
    assert await tree.find(None, 5, memory.load) is None
    root = await memory.edit(None, [(key, entry(key)) for key in range(10, 2000, 10)])
    for key in (0, 9, 11, 1991, 5000):
        assert await tree.find(root, key, memory.load) is None
    assert await tree.find(root, 1990, memory.load) == entry(1990)
