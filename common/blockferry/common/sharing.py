"""Which regions of a file may differ from another one of its file system, by the extents they share. Blocking."""

from __future__ import annotations

import os

from blockferry.common import linux
from blockferry.common.extents import changed_regions
from blockferry.common.regions import BLOCK_SIZE, Geometry
from pyroaring import BitMap

WINDOW = 1024 * 1024 * 1024
"""Bytes of the files looked at together: their extents are held in memory, at most one for each 4 KiB."""


def regions_not_shared(base_fd: int, new_fd: int, geometry: Geometry) -> BitMap:
    """The regions of an open file, of the size that `geometry` says, that are not proven to hold what another one holds
    there. Neither may be written meanwhile. Raises OSError where the file system does not tell its extents."""
    base_size = os.fstat(base_fd).st_size
    both = min(geometry.size, base_size)
    if base_size != geometry.size:
        # What follows the end of a file in its last block is in no file.
        both -= both % BLOCK_SIZE
    changed = BitMap()
    for start in range(0, both, WINDOW):
        end = min(start + WINDOW, both)
        base = list(linux.extents(base_fd, start, end, sync=True))
        new = list(linux.extents(new_fd, start, end, sync=True))
        # Only now: it must have been there all the time that the other was looked at.
        again = linux.extents(base_fd, start, end)
        changed |= changed_regions(base, new, again, geometry, start, end)
    if both < geometry.size:
        changed.add_range(both // geometry.region_size, geometry.count)
    return changed
