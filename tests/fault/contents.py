"""What a replica's directory holds, read without its server."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from blockferry.common.volumes import Volume
from blockferry.server.external import BINDING_NAME
from blockferry.server.generations import Point
from blockferry.server.store import Store

from tests.unit.devices import base_of


async def read_all(volume: Volume) -> bytes:
    """Every byte of a volume."""
    found = bytearray(volume.size)
    await volume.read_into(0, memoryview(found))
    return bytes(found)


async def content_of(store: Store, point: Point) -> bytes:
    """What a generation holds."""
    volume = await store.content.open_point(point)
    try:
        return await read_all(volume)
    finally:
        await volume.close()


async def contents_in(directory: Path, scratch: Path, device: Path | None = None) -> dict[int, bytes]:
    """What every generation in a replica's directory holds, by number, or in that and on its device. Copies are opened:
    the server goes on."""
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        copy = Path(name) / directory.name
        try:
            shutil.copytree(directory, copy)
        except shutil.Error:
            # A redo goes a moment after it was applied.
            shutil.rmtree(copy)
            shutil.copytree(directory, copy)
        base = None
        if device is not None:
            (copy / BINDING_NAME).unlink(missing_ok=True)
            base = base_of(Path(name) / "device", copy)
            shutil.copyfile(device, base.path)
        store = Store(copy, clones=False, base=base)
        try:
            return {point.number: await content_of(store, point) for point in store.generations.points}
        finally:
            store.abandon()


def files_of(store: Store, *, work: bool = False) -> tuple[set[str], set[str]]:
    """The files that a replica at rest needs, and those that it may have."""
    points = store.generations.points
    kind = store.content.kind
    needed = {"replica.json", "commits.log", "session.json"} | images_of([one.commit_id for one in points], kind)
    if kind == "device":
        needed |= {BINDING_NAME}
    allowed = {f"{one.commit_id.hex()}.digests" for one in points} | {"progress.json"}
    if work:
        allowed |= {"work.img"} if kind == "clones" else {"work.redo", "work.redo.index"}
    return needed, needed | allowed


def images_of(commit_ids: list[bytes], kind: str) -> set[str]:
    """The files that hold the generations with these commit ids, oldest first."""
    if kind == "clones":
        return {f"{one.hex()}.img" for one in commit_ids}
    undo = {f"{one.hex()}.undo{suffix}" for one in commit_ids[:-1] for suffix in ("", ".index")}
    return undo | ({"image.raw"} if commit_ids and kind == "journal" else set())
