"""What each site can prove, in all nine combinations: which regions are skipped, unmapped, sent and compared, and how
often each one is read on either side.

Everything but the wire is real: the plan, the transfer, and the replica that applies what arrives. Both volumes are
memory that notes every read.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import cast

import pytest
from blockferry.client.plan import Plan, decide
from blockferry.client.replica import ChangeStream, ReplicaSession
from blockferry.client.report import Phase, Tally
from blockferry.client.transfer import BYTES_IN_FLIGHT, Transfer
from blockferry.common.framing import Outgoing, decode_request, encode_request
from blockferry.common.regions import BLOCK_SIZE, AllocationMap, Geometry, Provenance, Run
from blockferry.common.retention import Retention
from blockferry.common.rpc import Connection
from blockferry.common.volumes import Volume
from blockferry.server.cache import DigestCache
from blockferry.server.replica import Replica
from blockferry.server.store import Store
from blockferry.v1 import replication_pb2 as pb
from pyroaring import BitMap

from tests.images import noise
from tests.unit.memory_volume import MemoryVolume

REGION = 65536
HOLE, EMPTY, DATA = "hole", "empty", "data"
"""A region that nobody doubts to be a hole; one of zeros that an exact map proves and a conservative one does not (a
thin pool's block that was zeroed, say); one with data."""

PAIRS = [*itertools.product((HOLE, EMPTY, DATA), repeat=2), (DATA, DATA)]
"""(source, destination) by region. In the last but one both hold the same, in the last one block differs."""

PROVEN = {
    Provenance.EXACT: {HOLE, EMPTY},
    Provenance.CONSERVATIVE: {HOLE},
    Provenance.ABSENT: set[str](),
}
"""What a map proves to be zeros."""

E, C, A = Provenance.EXACT, Provenance.CONSERVATIVE, Provenance.ABSENT

# One character for each region of PAIRS. Actions: skip (.), unmap, send, compare. Reads: how often it is read. At the
# destination a compared region is read once; once more where it differs, to find the blocks; and a third time after the
# change, to check it, unless every block was in the change (the last region alone). The last column is a destination
# that would have to write zeros: it reads before it does.
#
#  source, destination: actions, reads at the source, at the destination, at one that writes zeros
TABLE: dict[tuple[Provenance, Provenance], tuple[str, str, str, str]] = {
    (E, E): ("..u..usscc", "0000001111", "0000000013", "0010010013"),
    (E, C): (".uu.uusccc", "0000001111", "0000000213", "0110110213"),
    (E, A): ("uuuuuucccc", "0000001111", "0000002213", "1111112213"),
    (C, E): ("..usscsscc", "0001111111", "0000020013", "0010030013"),
    (C, C): (".uusccsccc", "0001111111", "0000120213", "0110130213"),
    (C, A): ("uuuccccccc", "0001111111", "0001122213", "1111132213"),
    (A, E): ("sscsscsscc", "1111111111", "0020020013", "0030030013"),
    (A, C): ("sccsccsccc", "1111111111", "0120120213", "0130130213"),
    (A, A): ("cccccccccc", "1111111111", "1121122213", "1131132213"),
}


class Mapped(MemoryVolume):
    """Memory with a map of a given provenance over regions in these states."""

    def __init__(self, states: Sequence[str], provenance: Provenance, content: bytes, *, zeroing: str) -> None:
        super().__init__(content, zeroing=zeroing)
        self._provenance = provenance
        self._allocated = BitMap(
            region for region, state in enumerate(states) if state not in PROVEN[provenance]
        )  # fmt: skip

    async def allocation(self, region_size: int) -> AllocationMap:
        return AllocationMap(Geometry(self.size, region_size), self._allocated.copy(), self._provenance)

    async def data_extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        return [
            (start, min(start + REGION, offset + length) - start)
            for start in range(offset, offset + length, REGION)
            if start // REGION in self._allocated
        ]

    def regions(self, kind: str) -> Counter[int]:
        """How often each region was read, written or unmapped as a whole; parts of it count as parts."""
        found: Counter[int] = Counter()
        for offset, length in self.of(kind):
            for start in range(offset - offset % REGION, offset + length, REGION):
                found[start // REGION] += min(start + REGION, offset + length) - max(start, offset)
        return found

    def reads(self) -> str:
        """How often each region was read, and nothing was read in part."""
        found = self.regions("read")
        assert all(count % REGION == 0 for count in found.values())
        return "".join(str(found[region] // REGION) for region in range(self.size // REGION))


class DirectSession(ReplicaSession):
    """A session with a replica in this process."""

    def __init__(self, replica: Replica, opened: pb.OpenSessionResponse) -> None:
        super().__init__(cast(Connection, None), replica.name, opened)
        self._replica = replica

    async def allocation(self) -> AllocationMap:
        return await self._replica.session_allocation(self.ref, 0)

    async def digests(self, piece_size: int, pieces: Sequence[Run], tally: Tally) -> bytes:
        found, read = await self._replica.session_digests(self.ref, piece_size, pieces, fresh=False)
        tally.destination_read += read
        return found


class DirectStream(ChangeStream):
    """Changes encoded, decoded and applied on the spot."""

    def __init__(self, replica: Replica, ref: pb.SessionRef, tally: Tally) -> None:
        self._replica = replica
        self._ref = ref
        self._sums = tally
        self._unequal: list[int] = []

    @property
    def rate(self) -> int:
        return 0

    async def send(self, changes: Sequence[Outgoing], *, last: bool = False) -> None:
        _, arrived = decode_request(encode_request(pb.ApplyChangesRequest(), changes))
        for one in arrived:
            if isinstance(one.request, pb.UnmapRegionRequest):
                result = await self._replica.unmap_region(one.request, self._ref)
            else:
                assert one.request is not None
                (result,) = await self._replica.write_regions([(one.request, one.data)], self._ref)
                if result.mismatch:
                    self._unequal.append(one.request.offset)
            self._sums.destination_read += result.read
            self._sums.destination_written += result.written
            self._sums.unmapped += result.unmapped
        self._sums.data_sent += sum(change.payload for change in changes)

    async def drain(self) -> list[int]:
        unequal, self._unequal = self._unequal, []
        return unequal


def content(side: int) -> bytes:
    """What one side holds."""
    found = bytearray(len(PAIRS) * REGION)
    for region, states in enumerate(PAIRS):
        if states[side] == DATA:
            found[region * REGION : (region + 1) * REGION] = noise(region, REGION)
    if side:
        found[-BLOCK_SIZE:] = noise("other", BLOCK_SIZE)
    return bytes(found)


def actions(plan: Plan) -> str:
    """The action of each region by its first letter."""
    chosen = {"u": plan.unmap, "s": plan.send, "c": plan.compare}
    return "".join(
        next((letter for letter, regions in chosen.items() if region in regions), ".") for region in range(len(PAIRS))
    )


@pytest.fixture
async def replica(tmp_path: Path) -> AsyncIterator[Replica]:
    store = Store.create(tmp_path / "db", REGION, clones=False)
    found = Replica("db", "pool", store, 60.0, Retention(last=1))
    yield found
    await found.close()


@pytest.mark.parametrize("zeroing", ["punch-hole", "write"])
@pytest.mark.parametrize("known", TABLE, ids=lambda known: f"{known[0].value}, {known[1].value}")
async def test_every_region_is_treated_and_read_as_the_two_maps_allow(
    replica: Replica,
    monkeypatch: pytest.MonkeyPatch,
    known: tuple[Provenance, Provenance],
    zeroing: str,
) -> None:
    wanted, source_reads, reads, reads_before_writing = TABLE[known]
    source, destination = (
        Mapped([states[side] for states in PAIRS], known[side], content(side), zeroing=zeroing) for side in (0, 1)
    )

    async def begin_work(size: int, snapshot_id: str) -> tuple[Volume, BitMap, DigestCache]:
        return destination, BitMap(), DigestCache()

    monkeypatch.setattr(replica.store, "begin_work", begin_work)
    opened = await replica.open_session(pb.OpenSessionRequest(size=source.size, client="test"))
    tally = Tally()
    session = DirectSession(
        replica,
        pb.OpenSessionResponse(
            session=pb.SessionRef(session_id=opened.session_id, epoch=opened.epoch),
            digest_key=replica.store.identity.key,
            region_size=REGION,
        ),
    )
    plan = decide(await source.allocation(REGION), await session.allocation())
    assert (plan.source_map, plan.destination_map) == known
    assert actions(plan) == wanted
    # The two maps are all that is looked at.
    assert source.operations == destination.operations == []

    stream = DirectStream(replica, session.ref, tally)
    await Transfer(source, session, stream, plan, BYTES_IN_FLIGHT // 2, Phase("transfer"), tally).run()

    assert source.reads() == source_reads
    assert destination.reads() == (reads if zeroing == "punch-hole" else reads_before_writing)
    assert tally.source_read == sum(map(int, source_reads)) * REGION
    assert tally.destination_read == sum(map(int, destination.reads())) * REGION
    # Whatever the maps know, the same is sent, written and zeroed: two regions and a block, and two regions.
    assert destination.regions("write") == {6: REGION, 7: REGION, 9: BLOCK_SIZE}
    assert tally.data_sent == tally.destination_written == 2 * REGION + BLOCK_SIZE
    assert tally.unmapped == 2 * REGION
    zeroed = {region for region, action in enumerate(wanted) if action == "u"} | {2, 5}
    # Nothing that is zero already is written over with zeros; deallocating is exempt.
    assert destination.regions("unmap") == dict.fromkeys(zeroed if zeroing == "punch-hole" else {2, 5}, REGION)
    counts = plan.counts()
    assert tally.zero + tally.equal + tally.changed == counts["send"] + counts["compare"]
    assert (destination.data, source.of("write"), source.of("unmap")) == (source.data, [], [])
