"""What an agent does around a snapshot: hooks in their order, whatever becomes of them, and room that is left to the
source's file system."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from blockferry.client import cycle as cycle_module
from blockferry.client import snapshots as snapshots_module
from blockferry.client.cycle import Terms, run_cycle
from blockferry.client.sync import Syncing
from blockferry.common.agent_config import Hooks as HookWords
from blockferry.common.agent_config import Policy
from blockferry.common.errors import BlockferryError, Code

from tests.cycles import Hooks, clones_of, cycle, image, is_running, kept, members, must, policy, refused, same
from tests.filesystems import Unavailable, mounted
from tests.images import MIB, change, noise
from tests.library import generation, replicated
from tests.support import Server, until

_numbers = itertools.count(1)


@pytest.fixture
def home(xfs_pool_root: Path) -> Iterator[Path]:
    made = xfs_pool_root / f"cycles-{next(_numbers)}"
    made.mkdir()
    yield made
    shutil.rmtree(made)


# --- hooks ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hooked(server: Server, volume: str, home: Path) -> Callable[..., tuple[Hooks, dict[str, Policy]]]:
    def make(**parts: Any) -> tuple[Hooks, dict[str, Policy]]:
        fields = {name: parts.pop(name) for name in ("tracking", "hook_timeout") if name in parts}
        hooks = Hooks(home, parts)
        source = home / "a.raw"
        if not source.exists():
            image(home)
        made = policy(source, server, volume, snapshot="command", hooks=hooks.write(), **fields)
        return hooks, {"p": made}

    return make


Hooked = Callable[..., tuple[Hooks, dict[str, Policy]]]


async def test_hooks_run_in_order_and_the_snapshot_is_removed(
    server: Server, volume: str, home: Path, hooked: Hooked
) -> None:
    hooks, policies = hooked()
    report = (await cycle(policies, home / "state"))["p"]
    assert hooks.ran() == ["freeze", "snapshot", "thaw", "remove"]
    assert hooks.snapshots == []
    assert report["commit_id"] in hooks.log.read_text()
    assert report["snapshot"]["method"] == "command"
    assert replicated(server, volume) == (home / "a.raw").read_bytes()
    assert kept("p", policies["p"], home / "state") == []


async def test_snapshots_of_hooks_are_tracked_where_they_are_clones(server: Server, home: Path, hooked: Hooked) -> None:
    hooks, policies = hooked(tracking="reflink")
    await cycle(policies, home / "state")
    assert len(hooks.snapshots) == 1
    report = (await cycle(policies, home / "state"))["p"]
    assert (report["full_compare"], report["tracked"]["regions"]) == (None, 0)
    assert hooks.ran() == ["freeze", "snapshot", "thaw", "freeze", "snapshot", "thaw", "remove"]
    assert hooks.snapshots == [report["commit_id"]]


@pytest.mark.parametrize(
    ("parts", "words", "ran"),
    [
        ({"freeze": "echo no good >&2; exit 3"}, ("freeze hook", "status 3", "no good"), ["freeze", "thaw"]),
        ({"snapshot": "exit 4"}, ("snapshot hook", "status 4"), ["freeze", "snapshot", "remove", "thaw"]),
        ({"snapshot": "echo and more"}, ("of 2 lines",), ["freeze", "snapshot", "remove", "thaw"]),
        ({"thaw": "kill -9 $$"}, ("thaw hook", "signal 9"), ["freeze", "snapshot", "thaw", "remove"]),
    ],
    ids=["freeze", "snapshot", "output", "thaw"],
)
async def test_a_hook_that_fails(
    home: Path, hooked: Hooked, parts: dict[str, str], words: tuple[str, ...], ran: list[str]
) -> None:
    hooks, policies = hooked(**parts)
    await refused(cycle(policies, home / "state"), Code.HOOK, *words)
    assert hooks.ran() == ran
    assert hooks.snapshots == []
    # It is repaired.
    hooks, policies = hooked()
    hooks.log.unlink()
    await cycle(policies, home / "state")
    # What could not be thawed is thawed before anything else.
    assert hooks.ran() == (["thaw"] if "thaw" in parts else []) + ["freeze", "snapshot", "thaw", "remove"]


async def test_a_hook_that_hangs_is_killed_with_all_that_it_started(home: Path, hooked: Hooked) -> None:
    pids = home / "pids"
    hooks, policies = hooked(freeze=f"sleep 1000 & echo $! > {pids}; wait", hook_timeout=0.5)
    began = time.monotonic()
    await refused(cycle(policies, home / "state"), Code.HOOK, "freeze hook", "longer than 0.5 s")
    assert time.monotonic() - began < 30
    assert hooks.ran() == ["freeze", "thaw"]
    child = int(pids.read_text())
    await asyncio.to_thread(until, lambda: not is_running(child), "what the hook has started is gone")


async def test_whoever_gives_up_while_a_source_is_frozen_thaws_it(home: Path, hooked: Hooked) -> None:
    hooks, policies = hooked(snapshot="sleep 1000")
    running = asyncio.create_task(run_cycle(members(policies), Terms(home / "state")))
    await asyncio.to_thread(until, lambda: "snapshot" in hooks.ran(), "the hook runs")
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert sorted(hooks.ran()) == ["freeze", "remove", "snapshot", "thaw"]
    assert hooks.snapshots == []


async def test_a_hook_that_does_not_exist(home: Path, server: Server, volume: str) -> None:
    source = image(home)
    hooks = HookWords(snapshot=("/nowhere/at/all",), freeze=("/bin/true",), thaw=("/bin/true",))
    policies = {"p": policy(source, server, volume, snapshot="command", hooks=hooks)}
    await refused(cycle(policies, home / "state"), Code.HOOK, "/nowhere/at/all", "no such file")
    assert kept("p", policies["p"], home / "state") == []


# --- room -------------------------------------------------------------------------------------------------------------


async def test_below_the_floor_the_base_is_dropped_and_everything_compared(
    server: Server, volume: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = image(home)
    policies = {"p": policy(source, server, volume, snapshot_floor=1 << 20)}
    await cycle(policies, home / "state")
    change(source, [(0, noise("more", 4096))])
    free = [0, 1 << 40]

    def free_bytes(path: Path) -> int:
        return free.pop(0) if len(free) > 1 else free[0]

    monkeypatch.setattr(snapshots_module, "free_bytes", free_bytes)
    report = (await cycle(policies, home / "state"))["p"]
    assert report["full_compare"] == "no changes were tracked"
    assert "less than snapshot_floor (1.0 MiB) is free" in str(report["warning"])
    assert same(server, {volume: source})
    assert len(clones_of(source)) == 1


async def test_below_the_floor_no_snapshot_is_taken(server: Server, volume: str, home: Path) -> None:
    source = image(home)
    policies = {"p": policy(source, server, volume)}
    await cycle(policies, home / "state")
    policies = {"p": policy(source, server, volume, snapshot_floor=100 << 40)}
    await refused(cycle(policies, home / "state"), Code.OUT_OF_SPACE, "snapshot_floor")
    assert (clones_of(source), generation(server, volume)) == ([], 1)


async def test_a_replication_gives_up_before_the_file_system_of_its_source_is_full(
    server: Server, volume: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = image(home)
    policies = {"p": policy(source, server, volume, snapshot_floor=1 << 20)}
    real = Syncing.transfer

    async def transfer(self: Syncing) -> None:
        monkeypatch.setattr(snapshots_module, "free_bytes", lambda path: 0)
        await asyncio.sleep(60)
        await real(self)

    monkeypatch.setattr(cycle_module, "FLOOR_SECONDS", 0.05)
    monkeypatch.setattr(Syncing, "transfer", transfer)
    await refused(cycle(policies, home / "state"), Code.OUT_OF_SPACE, "snapshot_floor")
    assert clones_of(source) == []


async def test_a_file_system_that_is_full(server: Server, volume: str, tmp_path: Path) -> None:
    """A clone needs little and not nothing; where even that is missing nothing is left of it."""
    (tmp_path / "full").mkdir()
    try:
        with mounted("btrfs", tmp_path / "full", 128 * MIB) as place:
            source = image(place)
            policies = {"p": policy(source, server, volume)}
            await cycle(policies, tmp_path / "state")
            with contextlib.suppress(OSError), (place / "filler").open("wb", 0) as filler:
                while True:
                    filler.write(noise("filler", MIB))
            change(source, [])
            with contextlib.suppress(BlockferryError):
                await cycle(policies, tmp_path / "state")
            (place / "filler").unlink()
            must("sync", "-f", place)
            await cycle(policies, tmp_path / "state")
            assert len(clones_of(source)) == 1
            assert same(server, {volume: source})
    except Unavailable as error:
        pytest.skip(f"no btrfs: {error}")
