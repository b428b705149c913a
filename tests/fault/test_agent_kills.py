"""An agent and its server are killed at random instants: what was missed is made up for, and nothing is lost."""

from __future__ import annotations

import functools
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.agents import Agent
from tests.images import MIB, build, change, noise
from tests.support import Server, own_directory, run_cli, until

KILLS = int(os.environ.get("BLOCKFERRY_AGENT_KILLS", "4"))
SEED = int(os.environ.get("BLOCKFERRY_SOAK_SEED", "5"))
SIZE = 8 * MIB
NAMES = ("alone", "one", "other")


@pytest.fixture
def site(xfs_pool_root: Path) -> Iterator[tuple[Agent, Server, dict[str, Path]]]:
    """A policy and a group of two, due every second, and the server they go to."""
    root = own_directory(xfs_pool_root, "killed")
    (root / "pool").mkdir()
    server = Server(root / "pool", flags=("--lease", "0.5")).start()
    images = {name: build(root / f"{name}.raw", SIZE, [(0, noise(name, SIZE // 2))]) for name in NAMES}
    policies = {
        name: {
            "source": str(image),
            "destination": server.url(name),
            "rpo": "1s",
            "region_size": "64K",
            **({} if name == "alone" else {"group": "both"}),
        }
        for name, image in images.items()
    }
    agent = Agent(root / "agent", policies).start()
    try:
        yield agent, server, images
    finally:
        agent.kill()
        server.stop()


@pytest.mark.timeout(0 if KILLS > 100 else 300)
def test_killed_at_random_and_caught_up(site: tuple[Agent, Server, dict[str, Path]]) -> None:
    agent, server, images = site
    chance = random.Random(SEED)
    until(lambda: all(agent.generation(name) for name in NAMES), "all are replicated once")
    for number in range(KILLS):
        newest = {name: server.show(name)["generation"] for name in NAMES}
        for name, image in images.items():
            offset = chance.randrange(0, SIZE - 64 * 1024, 4096)
            change(image, [(offset, noise(f"{name}-{number}", 5 * 4096))])
        time.sleep(chance.uniform(0.0, 1.2))
        killed = chance.choice(["agent", "server", "both"])
        if killed != "server":
            agent.kill()
        if killed != "agent":
            server.kill()
            server.start()
        if killed != "server":
            agent.start()
        for name in NAMES:
            # Whatever was under way is over: this one begins after the last change.
            until(functools.partial(synced, agent, name), f"{name} is replicated after kill {number} (seed {SEED})")
            shown = server.show(name)
            assert shown["generation"] >= newest[name]
            assert Path(shown["path"]).read_bytes() == images[name].read_bytes(), (name, number, SEED)
        policies = agent.policies()
        one, other = (policies[name]["last_committed"] for name in ("one", "other"))
        assert (one["began_at"], one["seconds"]) == (other["began_at"], other["seconds"]), "committed together"
    assert agent.stop() == 0
    snapshots = [path for path in images["alone"].parent.rglob("*") if "alone" in path.name and path.is_file()]
    assert len(snapshots) <= 6, f"what was interrupted is not left lying about: {snapshots}"


def synced(agent: Agent, name: str) -> bool:
    """Whether a run that is asked for now is committed."""
    return run_cli("agent", "sync", name, "--wait", "--quiet", "--agent", agent.address).status == 0
