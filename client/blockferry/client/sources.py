"""What must hold of a source before it is read, and after."""

from __future__ import annotations

from blockferry.common.errors import BlockferryError, Code
from blockferry.common.volumes import Volume


async def refuse_in_use(source: Volume, *, live: bool) -> None:
    """Raise IN_USE where somebody may write to the source meanwhile and an inconsistent copy was not asked for."""
    if live:
        return
    writers = await source.writers()
    if writers:
        raise BlockferryError(
            Code.IN_USE,
            f"{source.uri} is in use",
            cause=f"it is open for writing or mounted: {', '.join(writers)}",
            next="use a snapshot, stop what uses it, or say --live to take an inconsistent copy",
            volume=source.uri,
        )


async def refuse_resized(source: Volume) -> None:
    """Raise SOURCE_CHANGED where the source has another size than when it was opened."""
    size = await source.current_size()
    if size != source.size:
        raise BlockferryError(
            Code.SOURCE_CHANGED,
            f"{source.uri} changed its size while it was read",
            cause=f"it had {source.size} bytes and now has {size}",
            next="stop whatever changes it, or use a snapshot",
            volume=source.uri,
            expected=str(source.size),
            found=str(size),
        )
