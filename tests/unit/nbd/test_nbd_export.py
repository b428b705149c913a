"""An export without a server: the size of its answers is bounded, whatever the volume holds."""

from __future__ import annotations

from blockferry.common.nbd.export import MAX_EXTENTS, STATUS_WINDOW, Export
from blockferry.common.nbd.protocol import BASE_ALLOCATION, Allocation

from tests.images import BLOCK, MIB
from tests.unit.memory_volume import MemoryVolume

HOLE = int(Allocation.HOLE | Allocation.ZERO)
TIB = 1 << 40


class Striped(MemoryVolume):
    """A large volume without memory: data in every second block from `start` to `end`."""

    def __init__(self, start: int, end: int) -> None:
        super().__init__(b"")
        self.size = 4 * TIB
        self.start, self.end = start, end
        self.looks: list[tuple[int, int]] = []

    async def data_extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        self.looks.append((offset, length))
        first = max(offset, self.start)
        return [(at, BLOCK) for at in range(first, min(offset + length, self.end), 2 * BLOCK)]


async def test_a_volume_without_data_takes_few_looks() -> None:
    volume = Striped(0, 0)
    export = Export("disk", volume, read_only=True)
    length = (1 << 32) - BLOCK
    assert await export.status(BASE_ALLOCATION, TIB, length, MAX_EXTENTS) == [(length, HOLE)]
    first, most = STATUS_WINDOW
    assert volume.looks[0] == (TIB, first) and max(size for _, size in volume.looks) == most
    assert len(volume.looks) == 20
    assert sum(size for _, size in volume.looks) == length


async def test_a_fragmented_volume_ends_its_answer_early() -> None:
    volume = Striped(MIB, TIB)
    export = Export("disk", volume, read_only=True)
    found = await export.status(BASE_ALLOCATION, 0, 1 << 31, MAX_EXTENTS)
    assert len(found) == MAX_EXTENTS
    assert found[:3] == [(MIB, HOLE), (BLOCK, 0), (BLOCK, HOLE)]
    assert sum(size for _, size in volume.looks) <= STATUS_WINDOW[0] * 7
    # The next question goes on from there.
    end = sum(length for length, _ in found)
    assert (await export.status(BASE_ALLOCATION, end, MIB, 1))[0][0] == BLOCK


def test_what_is_offered() -> None:
    volume = MemoryVolume(bytes(MIB))
    for preferred, expected in ((1, 4096), (4096, 4096), (5000, 8192), (64 * MIB, MIB)):
        volume.preferred_size = preferred
        offer = Export("disk", volume, read_only=False, description="a disk").offer
        assert (offer.sizes.minimum, offer.sizes.preferred, offer.sizes.maximum) == (1, expected, 32 * MIB)
    assert (offer.name, offer.size, offer.description, offer.contexts) == ("disk", MIB, "a disk", (BASE_ALLOCATION,))
