"""The decision: one of four actions per region, from the allocation data of both sites and nothing else (pure)."""

from __future__ import annotations

from dataclasses import dataclass

from blockferry.common.errors import BlockferryError, Code
from blockferry.common.regions import AllocationMap, Geometry, Provenance
from pyroaring import BitMap


@dataclass(frozen=True)
class Plan:
    """What a sync does with each region. The three sets are disjoint; every other region is skipped."""

    geometry: Geometry
    source_map: Provenance
    destination_map: Provenance
    unmap: BitMap
    send: BitMap
    compare: BitMap

    @property
    def skip_count(self) -> int:
        """Regions that both maps prove to be zeros."""
        return self.geometry.count - len(self.unmap) - len(self.send) - len(self.compare)

    def counts(self) -> dict[str, int]:
        """The `regions` object of reports."""
        return {
            "skip": self.skip_count,
            "unmap": len(self.unmap),
            "send": len(self.send),
            "compare": len(self.compare),
        }

    @property
    def bytes_to_read(self) -> int:
        """Bytes the source will read."""
        return self.geometry.bytes_in(self.send) + self.geometry.bytes_in(self.compare)


def decide(source: AllocationMap, destination: AllocationMap) -> Plan:
    """The four cases. Raises SIZE_MISMATCH unless both maps describe the same geometry."""
    if source.geometry != destination.geometry:
        raise BlockferryError(
            Code.SIZE_MISMATCH,
            "the two maps do not describe the same volume",
            cause=f"{source.geometry} against {destination.geometry}",
            next="use the same region size, and --grow where the source is larger",
        )
    src, dst = source.regions, destination.regions
    return Plan(
        geometry=source.geometry,
        source_map=source.provenance,
        destination_map=destination.provenance,
        # Neither in src nor in dst: skip. Both maps prove zeros.
        compare=src & dst,
        unmap=dst - src,
        send=src - dst,
    )
