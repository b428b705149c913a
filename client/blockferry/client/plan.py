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
    tracked: BitMap | None = None
    """The regions looked at, where a change tracker has proven all others untouched; None: all."""
    bytes_avoided: int = 0
    """Bytes that need not be read at the source for that reason."""

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


def decide(source: AllocationMap, destination: AllocationMap, tracked: BitMap | None = None) -> Plan:
    """The four cases, of all regions or of `tracked` ones: that narrows what is looked at, never what is done with it.
    Raises SIZE_MISMATCH unless both maps describe the same geometry."""
    if source.geometry != destination.geometry:
        raise BlockferryError(
            Code.SIZE_MISMATCH,
            "the two maps do not describe the same volume",
            cause=f"{source.geometry} against {destination.geometry}",
            next="use the same region size, and --grow where the source is larger",
        )
    src, dst = source.regions, destination.regions
    bytes_avoided = 0
    if tracked is not None:
        bytes_avoided = source.geometry.bytes_in(src - tracked)
        src, dst = src & tracked, dst & tracked
    return Plan(
        geometry=source.geometry,
        source_map=source.provenance,
        destination_map=destination.provenance,
        tracked=tracked,
        bytes_avoided=bytes_avoided,
        # Neither in src nor in dst: skip. Both maps prove zeros, or a tracker that it was not touched.
        compare=src & dst,
        unmap=dst - src,
        send=src - dst,
    )
