"""A small picture of an allocation map, for people (pure)."""

from __future__ import annotations

from blockferry.common.regions import AllocationMap

WIDTH = 64
"""Characters of a row."""
ROWS = 4
"""Rows at most: enough to see where a volume is full without filling the screen."""

BLOCKS = " ░▒▓█"
PLAIN = " .:*#"
"""The same for terminals without block characters: nothing, less than a third, less than two thirds, less than all, all
allocated."""


def shades_for(encoding: str | None) -> str:
    """Characters that an output with this encoding can show."""
    try:
        BLOCKS.encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return PLAIN
    return BLOCKS


def picture(found: AllocationMap, shades: str = BLOCKS, *, width: int = WIDTH, rows: int = ROWS) -> list[str]:
    """Rows of at most `width` characters, the volume from left to right and from top to bottom.

    Each character stands for an equal share of the regions, shaded by how many of them are allocated. A single
    allocated region is never invisible, and a single one that is not keeps a share from looking full.
    """
    count = found.geometry.count
    cells = count if count <= width else width * min(rows, count // width)
    text = "".join(_shade(found, cell * count // cells, (cell + 1) * count // cells, shades) for cell in range(cells))
    return [text[start : start + width] for start in range(0, cells, width)]


def _shade(found: AllocationMap, start: int, end: int, shades: str) -> str:
    held = found.regions.range_cardinality(start, end)
    if held == 0:
        return shades[0]
    if held == end - start:
        return shades[4]
    return shades[1 + held * 3 // (end - start)]
