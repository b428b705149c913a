"""Death of the agent at every crash point of a replication: SIGKILL exactly there, in a process of its own.

After each one the members of the group are at the same generation; the next replication succeeds, whatever it finds,
and brings each replica to what its source holds; then there is one snapshot for each of them, nothing is frozen, and
nothing else is left. A name that is never hit fails.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path

import blockferry.client
import pytest
from blockferry.common.agent_config import Policy

from tests.cycles import REGION, Hooks, clones_of, cycle, generations, kept, policy, same, status_of_cycle
from tests.fault.stage import KILLED
from tests.images import build, change, noise
from tests.support import Server

PASSES = int(os.environ.get("BLOCKFERRY_CRASH_PASSES", "0"))
"""Passes tried of a name; 0: the second one, which is the other member's, or where there is none the first."""
SIZE = 24 * REGION + 512

_numbers = itertools.count(1)
_root = Path(str(blockferry.client.__file__)).parent
NAMED = {
    name
    for path in _root.glob("*.py")
    for name in re.findall(r"crash_point\(\s*\"([^\"]+)\"", path.read_text())
    # Archives have tests of their own.
    if not name.startswith(("archive-", "restore-"))
}
CLONES_ONLY = {"cycle-clone-begun", "cycle-cloned"}
HOOKS_ONLY = {"cycle-freezing", "cycle-frozen", "cycle-thawed"}
EVERY = {"atomic-before-rename": 9, "rename-before-fsync": 11}
"""Names that fire for every small file: every so many passes are tried."""


def _passes(name: str) -> range:
    if name in EVERY:
        return range(1, 60, 1 if PASSES else EVERY[name])
    return range(1, PASSES + 1) if PASSES else range(2, 0, -1)


@pytest.fixture(scope="module")
def server(xfs_pool_root: Path) -> Iterator[Server]:
    pool = xfs_pool_root / f"cycle-pool-{next(_numbers)}"
    pool.mkdir()
    found = Server(pool, flags=["--lease", "1s", "--keep-at-least", "last=1"]).start()
    yield found
    found.stop()


class World:
    """Two volumes that belong together, and their agent's state."""

    def __init__(self, server: Server, home: Path, *, hooks: bool) -> None:
        self.server = server
        self.state = home / "state"
        self.hooks = Hooks(home) if hooks else None
        self.sources: dict[str, Path] = {}
        self.policies: dict[str, Policy] = {}
        number = next(_numbers)
        for name in ("x", "y"):
            volume, source = f"{name}-{number}", home / f"{name}.raw"
            build(source, SIZE, [(region * REGION, noise(f"{name} {region}", REGION)) for region in range(0, 24, 2)])
            self.sources[volume] = source
            more = {"snapshot": "command", "tracking": "reflink", "hooks": self.hooks.write()} if self.hooks else {}
            self.policies[volume] = policy(source, server, volume, group="g", **more)
        self._changes = itertools.count(1)

    def change(self) -> None:
        """Write to both."""
        number = next(self._changes)
        for volume, source in self.sources.items():
            at = (number * 5) % 24 * REGION + 4096
            change(source, [(at, noise(f"{volume} {number}", 8192)), (SIZE - 700, noise(number, 700))])

    async def check(self) -> None:
        """After a death."""
        one, other = generations(self.server, list(self.sources))
        assert one == other, "one of the group was committed without the other"
        reports = await cycle(self.policies, self.state)
        assert same(self.server, self.sources)
        assert {report["generation"] for report in reports.values()} == {one + 1}
        for volume, one_policy in self.policies.items():
            assert kept(volume, one_policy, self.state) == ["base"]
        if self.hooks is None:
            assert len(clones_of(next(iter(self.sources.values())))) == 2
        else:
            assert len(self.hooks.snapshots) == 2
            ran = self.hooks.ran()
            assert ran.count("thaw") >= ran.count("freeze")
        # And a change tracker whose base this is tells all there is to tell.
        self.change()
        reports = await cycle(self.policies, self.state)
        assert same(self.server, self.sources)
        assert [report["full_compare"] for report in reports.values()] == [None, None]


async def _dies(server: Server, home: Path, name: str, *, hooks: bool) -> None:
    world = World(server, home, hooks=hooks)
    await cycle(world.policies, world.state)
    hits = 0
    for number in _passes(name):
        world.change()
        status = status_of_cycle(world.policies, world.state, f"{name}:{number}")
        assert status in (0, KILLED)
        if status == KILLED:
            hits += 1
            await world.check()
        exhausted = status == 0 and (PASSES or name in EVERY)
        if exhausted or (hits and not PASSES and name not in EVERY):
            break
    assert hits, f"{name} is never passed"
    print(f"{hits} deaths at {name}")


@pytest.fixture
def home(xfs_pool_root: Path) -> Path:
    made = xfs_pool_root / f"cycle-home-{next(_numbers)}"
    made.mkdir()
    return made


@pytest.mark.parametrize("name", sorted((NAMED | EVERY.keys()) - HOOKS_ONLY))
async def test_the_agent_dies(server: Server, home: Path, name: str) -> None:
    await _dies(server, home, name, hooks=False)


_BY_HOOKS = {name for name in NAMED if name.startswith(("cycle-snapshot-", "cycle-remov", "cycle-sessions"))}


@pytest.mark.parametrize("name", sorted(HOOKS_ONLY | _BY_HOOKS))
async def test_the_agent_dies_where_hooks_take_the_snapshots(server: Server, home: Path, name: str) -> None:
    await _dies(server, home, name, hooks=True)


@pytest.mark.parametrize("name", ["client-session-opened", "cycle-transferred", "client-commit-answered"])
async def test_the_agent_dies_in_its_first_replication(server: Server, home: Path, name: str) -> None:
    world = World(server, home, hooks=False)
    assert status_of_cycle(world.policies, world.state, name) == KILLED
    one = await cycle(world.policies, world.state)
    assert {report["outcome"] for report in one.values()} == {"committed"}
    assert same(server, world.sources)
    assert len(clones_of(next(iter(world.sources.values())))) == 2
