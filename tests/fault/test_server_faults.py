"""The server dies at any instant of a sync: the last committed generation is what it was, and the next sync succeeds.

The instants are drawn from a seed. On a pool that can clone, a committed generation is never written again; each round
says which of two contents the newest generation has, and it must be that one to the last byte.
"""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from tests.conftest import ServerFactory
from tests.images import MIB, Hole, Piece, Zeros, build, change, noise
from tests.support import Server, finish, refused, start_cli

SIZE = 12 * MIB
ROUNDS = 10
LONGEST = 2.5
"""Seconds after its start in which a sync at 8 MiB/s of all of SIZE may be hit: about what it takes, so that the kills
fall before the session, into maps, transfer and commit, and sometimes after the end."""


def edit(dice: random.Random) -> list[Piece]:
    """Everything written anew, and then a trim and zeros somewhere, so that each kind of change is under way."""
    at = dice.randrange(0, SIZE - 2 * MIB)
    return [(0, noise(dice.random().hex(), SIZE)), (at, Hole(MIB + 12345)), (dice.randrange(SIZE - MIB), Zeros(MIB))]


def sync_and_kill(server: Server, source: Path, volume: str, delay: float) -> bool:
    """Start a sync and kill the server after `delay` seconds; whether the client saw a commit."""
    process = start_cli("sync", source, server.url(volume), "--bwlimit", "8M", "--quiet")
    time.sleep(delay)
    server.kill()
    done = finish(process)
    if done.status == 0:
        return True
    refused(done, server.address, "run this again")
    return False


def test_the_last_generation_survives_kills_at_any_instant(start_cloning_server: ServerFactory, tmp_path: Path) -> None:
    server, volume = start_cloning_server(), "killed"
    dice = random.Random(20)
    source = build(tmp_path / "source.img", SIZE, edit(dice))
    assert server.sync(source, volume)["generation"] == 1
    committed = source.read_bytes()
    generation, before, after = 1, 0, 0
    for number in range(ROUNDS):
        change(source, edit(dice))
        wanted = source.read_bytes()
        # One instant in each tenth of the time, so that ten kills cover all of it.
        delay = (number + dice.random()) * LONGEST / ROUNDS
        seen = sync_and_kill(server, source, volume, delay)
        server.start()
        found = server.show(volume)
        # A commit whose answer was lost is a commit all the same.
        assert found["generation"] in ({generation + 1} if seen else {generation, generation + 1})
        assert (found["state"], found["session_client"]) == ("CONSISTENT", None)
        if found["generation"] == generation:
            before += 1
            assert Path(found["path"]).read_bytes() == committed, f"kill {number} after {delay:.3f} s"
        else:
            after += 1
            assert Path(found["path"]).read_bytes() == wanted, f"kill {number} after {delay:.3f} s"
        generation = server.sync(source, volume)["generation"]
        assert generation == found["generation"] + 1
        committed = wanted
        assert server.image(volume).read_bytes() == committed
    print(f"{before} kills before the commit, {after} after it")
    assert before >= 3, "the kills came too late to prove anything"


@pytest.mark.parametrize("seed", range(3))
def test_a_first_sync_that_is_killed_leaves_no_generation(
    start_server: ServerFactory, tmp_path: Path, volume: str, seed: int
) -> None:
    server = start_server()
    dice = random.Random(seed)
    source = build(tmp_path / "source.img", SIZE, edit(dice))
    before = server.bytes_written()
    process = start_cli("sync", source, server.url(volume), "--bwlimit", "8M", "--quiet")
    # In the middle of the data, at a byte drawn from the seed.
    wanted = dice.randrange(MIB, 8 * MIB)
    while server.bytes_written() < before + wanted:
        assert process.poll() is None
        time.sleep(0.005)
    server.kill()
    refused(finish(process), server.address, "run this again")
    server.start()
    found = server.show(volume)
    assert (found["generation"], found["path"], found["state"]) == (0, None, "SYNCING")
    report = server.sync(source, volume)
    assert report["generation"] == 1
    # What had arrived is not sent again.
    assert report["bytes"]["data_sent"] < SIZE - 2 * MIB
    assert report["results"]["equal"] >= 1
    assert server.image(volume).read_bytes() == source.read_bytes()
