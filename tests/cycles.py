"""Replications of policies by the agent's own code: in the test's process, or in one that dies at a crash point.

The processes that die are forked from one that has imported everything: starting an interpreter takes longer than a
replication of what tests replicate.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import subprocess
import time
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from blockferry.client.cycle import Member, Reports, Terms, run_cycle
from blockferry.client.snapshots import Snapshots
from blockferry.common import disk
from blockferry.common.agent_config import Hooks as HookWords
from blockferry.common.agent_config import Policy
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.retention import Retention

from tests.fault.raw import Raw
from tests.images import KIB, build, noise
from tests.library import generation
from tests.support import Server

REGION = 64 * KIB
HELD = 75
"""Exit status of a process that found somebody else's lease still running."""
SIZE = 40 * REGION + 1000
"""Bytes of `image`: the last region is short."""

_HOOKS = """#!/bin/sh
set -e
echo "$BLOCKFERRY_HOOK $BLOCKFERRY_POLICY $BLOCKFERRY_SNAPSHOT_ID" >> {log}
case $BLOCKFERRY_HOOK in
freeze) {freeze} ;;
thaw) {thaw} ;;
snapshot) cp --reflink=always "$BLOCKFERRY_SOURCE" "{place}/$BLOCKFERRY_SNAPSHOT_ID"
    chmod 400 "{place}/$BLOCKFERRY_SNAPSHOT_ID"
    {snapshot}; echo "{place}/$BLOCKFERRY_SNAPSHOT_ID" ;;
remove) rm -f "{place}/$BLOCKFERRY_SNAPSHOT_ID"; {remove} ;;
esac
"""


@dataclass
class Hooks:
    """One program for all hooks, which says in `log` what it was run for; parts of it may be made to fail or hang."""

    place: Path
    """Where its snapshots are: on a file system that clones."""
    parts: dict[str, str] = field(default_factory=dict)

    @property
    def log(self) -> Path:
        return self.place / "hooks.log"

    @property
    def program(self) -> Path:
        return self.place / "hooks.sh"

    def write(self) -> HookWords:
        """The `hooks` of a policy."""
        parts = {name: self.parts.get(name, ":") for name in ("freeze", "thaw", "snapshot", "remove")}
        self.program.write_text(_HOOKS.format(log=self.log, place=self.place, **parts))
        self.program.chmod(0o700)
        words = ("/bin/sh", str(self.program))
        return HookWords(freeze=words, snapshot=words, thaw=words, remove=words)

    def ran(self) -> list[str]:
        """The hooks that ran, in order."""
        return [line.split()[0] for line in self.log.read_text().splitlines()] if self.log.exists() else []

    @property
    def snapshots(self) -> list[str]:
        """The snapshots there are."""
        return sorted(path.name for path in self.place.iterdir() if len(path.name) == 32)


def policy(source: Path, server: Server, volume: str, **fields: Any) -> Policy:
    """A policy with small regions and no floor."""
    fields = {"region_size": REGION, "snapshot_floor": 0, "keep": Retention(last=3), **fields}
    return Policy(source=str(source), destination=fields.pop("destination", server.url(volume)), rpo=300, **fields)


def members(policies: Mapping[str, Policy]) -> list[Member]:
    """All of them, as they take part."""
    return [Member(name, one) for name, one in policies.items()]


async def cycle(policies: Mapping[str, Policy], state: Path, **terms: Any) -> Reports:
    """Replicate them together, as soon as the lease of a client that has died is over."""
    end = time.monotonic() + 60
    while True:
        try:
            return await run_cycle(members(policies), Terms(state, **terms))
        except BlockferryError as error:
            if error.code is not Code.IN_USE or time.monotonic() > end:
                raise
            await asyncio.sleep(0.05)


def kept(name: str, one: Policy, state: Path) -> list[str]:
    """The states of the snapshots that the agent knows of."""
    return [record.state for record in Snapshots(name, one, state).records]


def clones_of(source: Path) -> list[Path]:
    """The clones that lie beside a source."""
    place = source.parent / ".blockferry-snapshots"
    return sorted(place.iterdir()) if place.exists() else []


def same(server: Server, volumes: Mapping[str, Path]) -> bool:
    """Whether the newest generation of each volume is what its source holds."""
    return all(held(server, volume, source.stat().st_size) == source.read_bytes() for volume, source in volumes.items())


def held(server: Server, volume: str, size: int) -> bytes:
    """What the newest generation of a volume of `size` bytes holds, whether or not it is an image yet."""
    with Raw(server.address) as raw:
        return raw.read(volume, 0, 0, size)


def generations(server: Server, volumes: Sequence[str]) -> list[int]:
    """The numbers of the newest generations."""
    return [generation(server, volume) for volume in volumes]


def image(directory: Path, name: str = "a.raw", size: int = SIZE) -> Path:
    """Every second region holds data."""
    return build(
        directory / name, size, [(at, noise(f"{name} {at}", REGION)) for at in range(0, size - REGION, 2 * REGION)]
    )


def run(*words: object) -> int:
    """Run a program of the system's; its exit status."""
    return subprocess.run([str(word) for word in words], capture_output=True, check=False).returncode


def must(*words: object) -> None:
    """Run one that must succeed."""
    assert run(*words) == 0, words


def is_running(pid: int) -> bool:
    """Whether a process still does anything."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def refused(work: Awaitable[object], code: Code, *words: str) -> BlockferryError:
    with pytest.raises(BlockferryError) as caught:
        await work
    assert caught.value.code is code, caught.value
    for word in words:
        assert word in str(caught.value)
    return caught.value


# --- in a process that dies -------------------------------------------------------------------------------------------


def _run(policies: dict[str, Policy], state: Path, doom: str) -> None:
    name, _, count = doom.partition(":")
    disk._crash_at, disk._passes_left = name, int(count or 1)
    try:
        asyncio.run(run_cycle(members(policies), Terms(state)))
    except BlockferryError as error:
        if error.code is not Code.IN_USE:
            raise
        raise SystemExit(HELD) from error


def status_of_cycle(policies: Mapping[str, Policy], state: Path, doom: str) -> int | None:
    """Replicate them in a process that dies at a crash point (`NAME:PASS`); its exit status."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.cycles"])
    process = context.Process(target=_run, args=(dict(policies), state, doom))
    process.start()
    process.join(60)
    try:
        return process.exitcode
    finally:
        if process.is_alive():
            process.kill()
            process.join()
        process.close()
