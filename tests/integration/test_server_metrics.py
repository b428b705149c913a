"""What a server tells Prometheus: every number by its exact growth over a life of one replica."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from blockferry.server.session import State

from tests.configured import Configured
from tests.images import BLOCK, MIB, build, noise
from tests.pages import Samples, free_port, grown, scraped
from tests.support import Server, ok, refused_json, run_cli

LABELS = '{pool="main",volume="db"}'


@pytest.fixture
def serving(xfs_pool_root: Path, volume: str) -> Iterator[tuple[Server, str]]:
    """A server and its page."""
    directory = xfs_pool_root / volume
    directory.mkdir()
    port = free_port()
    server = Configured(directory, {"status_page": f'"127.0.0.1:{port}"'}).start()
    yield server, f"http://127.0.0.1:{port}/metrics"
    server.stop()


def replica(**numbers: float) -> Samples:
    return {f"blockferry_replica_{name}{LABELS}": number for name, number in numbers.items()}


def states(**numbers: float) -> Samples:
    return {
        f'blockferry_replica_state{{pool="main",state="{name}",volume="db"}}': number
        for name, number in numbers.items()
    }


def calls(code: str, *methods: str) -> Samples:
    return {f'blockferry_server_calls_total{{code="{code}",method="Replication/{method}"}}': 1.0 for method in methods}


SYNC = ("OpenSession", "GetAllocationMap", "ApplyChanges", "CommitSessions")


def test_every_number_grows_by_what_was_done(serving: tuple[Server, str], tmp_path: Path) -> None:
    server, url = serving
    source, flags = tmp_path / "source.raw", ("--state-dir", tmp_path / "state")

    def synced(*flags: object) -> Samples:
        before = scraped(url)
        ok("sync", source, server.url("db"), *flags)
        found = grown(before, scraped(url))
        return {name: value for name, value in found.items() if "call_seconds" not in name and "pool_" not in name}

    build(source, 4 * MIB, [(0, noise(1, MIB)), (2 * MIB, noise(2, MIB))])
    started = time.time()
    assert synced(*flags) == {
        **replica(
            generation=1, size_bytes=4 * MIB, points=1, sessions_total=1, commits_total=1, written_bytes_total=2 * MIB
        ),
        **states(CONSISTENT=1),
        **calls("ok", *SYNC),
    }
    committed = scraped(url)[f"blockferry_replica_committed_timestamp_seconds{LABELS}"]
    assert started <= committed <= time.time()

    # Nothing changed: the digests of both regions are known.
    assert synced(*flags) == {
        **replica(generation=1, points=1, sessions_total=1, commits_total=1, digest_avoided_bytes_total=2 * MIB),
        **calls("ok", *SYNC, "GetRegionDigests"),
    }

    # One region is gone, and of the other one a block has changed: read for its digests, and to check the change.
    build(source, 4 * MIB, [(0, noise(1, BLOCK) + noise(3, BLOCK) + noise(1, MIB)[2 * BLOCK :])])
    found = synced(*flags)
    assert found == {
        **replica(
            generation=1, points=1, sessions_total=1, commits_total=1, digest_avoided_bytes_total=MIB,
            written_bytes_total=BLOCK, unmapped_bytes_total=MIB, digest_read_bytes_total=MIB + 64 * 1024,
            change_read_bytes_total=MIB,
        ),
        **calls("ok", *SYNC),
        'blockferry_server_calls_total{code="ok",method="Replication/GetRegionDigests"}': 3.0,
    }  # fmt: skip

    before = scraped(url)
    build(source, 5 * MIB, [])
    refused_json(run_cli("sync", source, server.url("db"), *flags, "--json"), "size-mismatch", "5242880")
    after = grown(before, scraped(url))
    assert {name: value for name, value in after.items() if "calls" in name} == calls("size-mismatch", "OpenSession")


def test_a_page_of_a_server_with_nothing(serving: tuple[Server, str]) -> None:
    _, url = serving
    found = scraped(url)
    assert found['blockferry_pool_free_bytes{pool="main"}'] <= found['blockferry_pool_total_bytes{pool="main"}']
    assert [name for name in found if "replica" in name] == []


def test_the_states_are_all_told(serving: tuple[Server, str], tmp_path: Path) -> None:
    server, url = serving
    server.sync(build(tmp_path / "source.raw", MIB, [(0, noise(1, BLOCK))]), "db")
    shown = {name: value for name, value in scraped(url).items() if name.startswith("blockferry_replica_state")}
    assert shown == states(**{state.value: float(state is State.CONSISTENT) for state in State})
    ok("replica", "promote", server.url("db"), "--yes")
    shown = {name: value for name, value in scraped(url).items() if name.startswith("blockferry_replica_state")}
    assert shown == states(**{state.value: float(state is State.PROMOTED) for state in State})
    ok("replica", "verify", server.url("db"))


def test_every_metric_is_in_the_documents(serving: tuple[Server, str], tmp_path: Path) -> None:
    server, url = serving
    server.sync(build(tmp_path / "source.raw", MIB, [(0, noise(1, BLOCK))]), "db")
    ok("replica", "verify", server.url("db"))
    shown = {name.partition("{")[0].removesuffix("_count").removesuffix("_sum") for name in scraped(url)}
    shown = {name for name in shown if not name.endswith("_created")}
    document = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    of_servers = document.partition("## Of a server")[2].partition("\n## ")[0]
    assert shown == set(re.findall(r"`(blockferry_\w+)`", of_servers))
