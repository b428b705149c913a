"""Random lives of a source and its agent: whatever was written, trimmed, brought back, interrupted, killed or restarted
in between, every replication that says it is committed has made the replica what the source held."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
from pathlib import Path

import pytest
from blockferry.common.agent_config import Policy

from tests.cycles import HELD, REGION, SIZE, clones_of, cycle, held, image, kept, policy, status_of_cycle
from tests.fault.raw import Raw, Refused
from tests.fault.stage import KILLED
from tests.images import change, noise
from tests.support import Server

STEPS = int(os.environ.get("BLOCKFERRY_CYCLE_STEPS", "30"))
SEED = int(os.environ.get("BLOCKFERRY_CYCLE_SEED", "1"))
DEATHS = (
    "cycle-cloned", "cycle-snapshot-taken", "cycle-sessions-open", "client-changes-sent", "client-transferred",
    "client-commit-minted", "client-commit-answered", "client-commit-confirmed", "cycle-confirmed", "cycle-base-kept",
)  # fmt: skip
_numbers = itertools.count(1)


class Life:
    """What may happen, each by its name."""

    def __init__(self, server: Server, home: Path, volume: str, seed: int) -> None:
        self.rng = random.Random(seed)
        self.server = server
        self.home = home
        self.volume = volume
        self.state = home / "state"
        self.source = image(home)
        self.policies: dict[str, Policy] = {"p": policy(self.source, server, volume)}
        self.tracked = 0

    def write(self) -> None:
        for _ in range(self.rng.randrange(1, 6)):
            length = self.rng.choice((512, 4096, REGION, 3 * REGION))
            at = self.rng.randrange(SIZE - length)
            change(self.source, [(at, noise(self.rng.random().hex(), length))])

    def trim(self) -> None:
        at, length = self.rng.randrange(SIZE - REGION), self.rng.choice((4096, REGION, 5 * REGION))
        words = ["fallocate", "--punch-hole", "--offset", str(at), "--length", str(length), str(self.source)]
        subprocess.run(words, check=True)

    def set_aside(self) -> None:
        """A copy to be brought back later: it shares what the source has now."""
        subprocess.run(["cp", "--reflink=always", str(self.source), str(self.home / "copy")], check=True)

    def bring_back(self) -> None:
        """Extents of an earlier day are in the source again, at their places."""
        if (self.home / "copy").exists():
            words = ["cp", "--reflink=always", "--no-preserve=all", str(self.home / "copy"), str(self.source)]
            subprocess.run(words, check=True)

    def defragment(self) -> None:
        """The same bytes at other places."""
        content = self.source.read_bytes()
        self.source.write_bytes(content)

    def disturb(self) -> None:
        """Somebody else's session, which is given up half-way."""
        with Raw(self.server.address) as raw:
            try:
                session = raw.open(self.volume, SIZE).session
            except Refused as refused:
                if refused.reason != "IN_USE":
                    raise
                # An agent was killed a moment ago, and its lease runs.
                return
            for _ in range(3):
                raw.write(session, self.rng.randrange(40) * REGION, noise(self.rng.random().hex(), REGION))
            raw.abort(session)

    def restart(self) -> None:
        self.server.stop()
        self.server.start()

    def kill_server(self) -> None:
        self.server.kill()
        self.server.start()

    def kill_agent(self) -> None:
        doom = f"{self.rng.choice(DEATHS)}:{self.rng.choice((1, 1, 2))}"
        assert status_of_cycle(self.policies, self.state, doom) in (0, HELD, KILLED)

    async def replicate(self) -> None:
        before = self.source.read_bytes()
        report = (await cycle(self.policies, self.state))["p"]
        self.tracked += report["full_compare"] is None
        assert held(self.server, self.volume, SIZE) == before, report
        assert kept("p", self.policies["p"], self.state) == ["base"]
        assert len(clones_of(self.source)) == 1

    def step(self) -> str:
        """One of them, at random; its name."""
        what = self.rng.choice(
            [
                self.write, self.write, self.write, self.trim, self.set_aside, self.bring_back, self.defragment,
                self.disturb, self.restart, self.kill_server, self.kill_agent, self.kill_agent,
            ]
        )  # fmt: skip
        what()
        return what.__name__


@pytest.mark.parametrize("clones", [True, False], ids=["clones", "journal"])
async def test_a_life(xfs_pool_root: Path, ext4_pool_root: Path, volume: str, clones: bool) -> None:
    pool = (xfs_pool_root if clones else ext4_pool_root) / f"lives-{next(_numbers)}"
    home = xfs_pool_root / f"life-{next(_numbers)}"
    pool.mkdir()
    home.mkdir()
    server = Server(pool, flags=["--lease", "1s"]).start()
    try:
        life = Life(server, home, volume, SEED)
        await life.replicate()
        names = []
        for number in range(STEPS):
            names.append(life.step())
            if number % 3 == 2:
                try:
                    await life.replicate()
                except AssertionError as error:
                    raise AssertionError(f"after {', '.join(names[-6:])} of seed {SEED}") from error
        assert life.tracked > STEPS // 6, "hardly anything was tracked"
        print(f"{STEPS} steps, {life.tracked} replications tracked")
    finally:
        server.kill()
