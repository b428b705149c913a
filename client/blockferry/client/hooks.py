"""Programs of the administrator's that are run around a snapshot: bounded in time and in what they may say.

Each runs in a process group of its own, which is killed when it takes too long or when whoever waits for it is
cancelled. What it acts on is in its environment (docs/snapshots.md).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Coroutine, Mapping, Sequence

import structlog
from blockferry.common.errors import BlockferryError, Code

log = structlog.get_logger("blockferry.hooks")

MOST_OUTPUT = 64 * 1024
"""Bytes of each output that are kept: a hook says one line, or what went wrong."""

_MOST_SHOWN = 300
"""Characters of what a hook said on its standard error that an error repeats."""


async def run_hook(name: str, words: Sequence[str], environment: Mapping[str, str], seconds: float, volume: str) -> str:
    """Run the hook called `name` of a policy; what it printed on its standard output. `environment` is added to the
    agent's own. Raises HOOK where it cannot be run, fails, or takes longer than `seconds`."""
    try:
        process = await asyncio.create_subprocess_exec(
            *words,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, **environment, "BLOCKFERRY_HOOK": name},
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        cause = os.strerror(error.errno).lower() if isinstance(error, OSError) and error.errno else str(error)
        raise _failed(name, volume, f"{words[0]} cannot be run: {cause}", "check its path and its mode") from error
    try:
        async with asyncio.timeout(seconds):
            said, complained = await asyncio.gather(_head(process.stdout), _head(process.stderr))
            status = await process.wait()
    except TimeoutError as error:
        await _kill(process)
        raise _failed(
            name,
            volume,
            f"{words[0]} took longer than {seconds:g} s and was killed",
            "make it faster, or raise hook_timeout",
        ) from error
    except BaseException:
        await _kill(process)
        raise
    if status:
        complaint = " ".join(complained.split())[-_MOST_SHOWN:]
        how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
        raise _failed(
            name,
            volume,
            f"{words[0]} {how}" + (f": {complaint}" if complaint else ""),
            "look at what it does, and repair it",
        )
    return said


async def finished(work: Coroutine[object, object, None]) -> None:
    """Finish `work` even if nobody waits for it any more: whoever is cancelled here goes on when it is over."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([task])
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("failed while the agent gave up", error=str(error))
        raise


async def _head(stream: asyncio.StreamReader | None) -> str:
    """What a hook says first; the rest is read and dropped, so that it never waits for us."""
    assert stream is not None
    kept = b""
    while part := await stream.read(MOST_OUTPUT):
        kept += part[: MOST_OUTPUT - len(kept)]
    return kept.decode("utf-8", "backslashreplace")


async def _kill(process: asyncio.subprocess.Process) -> None:
    """Kill it and all that it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    waiting = asyncio.ensure_future(process.wait())
    while not waiting.done():
        try:
            await asyncio.shield(waiting)
        except asyncio.CancelledError:
            # It was killed: this is only until the kernel says so.
            await asyncio.wait([waiting], timeout=1)
            raise


def _failed(name: str, volume: str, cause: str, next_step: str) -> BlockferryError:
    return BlockferryError(Code.HOOK, f"{volume}: the {name} hook failed", cause=cause, next=next_step, volume=volume)
