"""Between protobuf messages and the project's own types (pure)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator

import msgspec
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.regions import AllocationMap, Geometry, Provenance, Run
from blockferry.common.retention import Retention
from blockferry.v1 import replication_pb2 as pb

PROTOCOL_VERSION = 1

RUNS_PER_MESSAGE = 8192
"""About 80 KiB per message: a fragmented map streams, and a small one is one message."""

_TO_WIRE = {
    Provenance.EXACT: pb.PROVENANCE_EXACT,
    Provenance.CONSERVATIVE: pb.PROVENANCE_CONSERVATIVE,
    Provenance.ABSENT: pb.PROVENANCE_ABSENT,
}
_FROM_WIRE = {value: key for key, value in _TO_WIRE.items()}


def provenance_to_wire(provenance: Provenance) -> pb.Provenance:
    """The message's enumeration value."""
    return _TO_WIRE[provenance]


def runs_to_wire(runs: Iterable[Run]) -> list[pb.Run]:
    """Run messages."""
    return [pb.Run(first=first, count=count) for first, count in runs]


def runs_from_wire(runs: Iterable[pb.Run]) -> Iterator[Run]:
    """(first, count) pairs, unchecked."""
    return ((run.first, run.count) for run in runs)


def retention_to_wire(keep: Retention) -> pb.Retention:
    """The message."""
    return pb.Retention(**msgspec.structs.asdict(keep))


def retention_from_wire(message: pb.Retention) -> Retention:
    """The rules."""
    return Retention(**{name: getattr(message, name) for name in Retention.__struct_fields__})


def map_to_messages(allocation: AllocationMap, header: pb.AllocationMapHeader) -> Iterator[pb.GetAllocationMapResponse]:
    """The stream that carries a map; the header's geometry and provenance are filled in."""
    header.provenance = provenance_to_wire(allocation.provenance)
    header.region_size = allocation.geometry.region_size
    header.size = allocation.geometry.size
    message = pb.GetAllocationMapResponse(header=header)
    for first, count in allocation.runs():
        message.allocated.add(first=first, count=count)
        if len(message.allocated) == RUNS_PER_MESSAGE:
            yield message
            message = pb.GetAllocationMapResponse()
    if message.HasField("header") or message.allocated:
        yield message


async def map_from_messages(
    messages: AsyncIterator[pb.GetAllocationMapResponse],
) -> tuple[AllocationMap, pb.AllocationMapHeader]:
    """Read a map from its stream. Raises PROTOCOL where the stream breaks its own rules."""
    header: pb.AllocationMapHeader | None = None
    runs: list[Run] = []
    async for message in messages:
        if header is None:
            header = message.header
        runs.extend(runs_from_wire(message.allocated))
    if header is None or header.provenance not in _FROM_WIRE:
        raise _unusable("it has no header")
    try:
        geometry = Geometry(header.size, header.region_size)
    except BlockferryError as error:
        raise _unusable(error.what) from error
    return AllocationMap.from_runs(geometry, runs, _FROM_WIRE[header.provenance]), header


def _unusable(cause: str) -> BlockferryError:
    return BlockferryError(
        Code.PROTOCOL,
        "the allocation map is not usable",
        cause=cause,
        next="check that both sides run a released version of blockferry",
    )
