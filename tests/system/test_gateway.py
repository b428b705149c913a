"""Archives in a real S3: a Ceph object gateway on loopback."""

from __future__ import annotations

import asyncio
import os
import secrets
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from blockferry.common.archive.catalog import Catalog
from blockferry.common.archive.format import ARCHIVE_BLOCK
from blockferry.common.archive.keys import Secret
from blockferry.common.archive.store import Access, open_store
from blockferry.common.errors import BlockferryError, Code

from tests import gateway as ceph
from tests.archives import Maker, noise
from tests.gateway import Gateway, User
from tests.images import MIB, Hole, build, change
from tests.images import noise as noise_of
from tests.store_contract import CHECKS, Check
from tests.support import Report, finish, ok, refused_json, run_cli, start_cli

A = ARCHIVE_BLOCK
SIZE = 40 * A + 4096


@dataclass(frozen=True)
class Site:
    """A gateway, two users, and a bucket of each."""

    gateway: Gateway
    ours: User
    theirs: User


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    """Starts once."""
    if os.geteuid() != 0:
        pytest.skip("a Ceph cluster needs root")
    if missing := ceph.missing_tools():
        pytest.skip(f"{missing[0]} is not installed")
    # Nothing of it is worth keeping, and names of sockets are short.
    with tempfile.TemporaryDirectory(prefix="rgw-") as root:
        gateway = Gateway(Path(root)).start()
        try:
            found = Site(gateway, gateway.user("ours"), gateway.user("theirs"))
            gateway.bucket(found.ours, "ours")
            gateway.bucket(found.theirs, "theirs")
            yield found
        finally:
            gateway.stop()


@pytest.fixture(autouse=True)
def _environment(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    for name, value in site.gateway.environment(site.ours).items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def uri() -> str:
    """A prefix that no other test uses."""
    return f"s3://ours/{secrets.token_hex(8)}/archive"


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_a_real_one_keeps_the_contract(check: Check, uri: str) -> None:
    async with await open_store(uri) as store:
        await check(store)


async def archived(uri: str, secret: Secret | None = None) -> Maker:
    """Two snapshots, with blocks that pack and blocks that do not."""
    async with await open_store(uri) as store:
        maker = await Maker(store, secret=secret, chunk_blocks=16).create()
        one = await maker.snapshot(SIZE, {block: noise(block) for block in range(0, 40, 2)})
        await maker.snapshot(SIZE, {1: secrets.token_bytes(A), 2: None, 40: b"\1" * 4096}, base=one)
    return maker


def test_restore_and_verify(uri: str, tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(secrets.token_bytes(32))
    secret = Secret("key file", (tmp_path / "key").read_bytes())
    maker = asyncio.run(archived(uri, secret))
    key = ("--key-file", tmp_path / "key")
    for made in maker.snapshots:
        image = tmp_path / f"{made.number}.raw"
        report = ok("archive", "restore", f"{uri}#vm@{made.number}", image, *key)
        assert image.read_bytes() == made.content and report["outcome"] == "restored"
    checked = ok("archive", "verify", uri, *key)
    assert (checked["outcome"], checked["snapshots"], checked["blocks"]["read"]) == ("sound", 2, 22)
    assert ok("verify", f"{uri}#vm", tmp_path / "2.raw", *key)["outcome"] == "equal"
    (listed,) = ok("archive", "list", uri, *key)["volumes"]
    assert [one["number"] for one in listed["snapshots"]] == [1, 2]


def test_what_was_created_is_restored(uri: str, tmp_path: Path) -> None:
    """An image that changes, by the command line alone."""
    image = build(tmp_path / "vm.raw", 40 * MIB, [(0, noise_of("a", MIB)), (20 * MIB, noise_of("b", 3 * MIB))])
    (tmp_path / "phrase").write_text("open sesame\n")
    key = ("--passphrase-file", tmp_path / "phrase")
    first = ok("archive", "create", image, uri, "--volume", "vm", *key)
    before = image.read_bytes()
    change(image, [(20 * MIB, Hole(MIB)), (30 * MIB, noise_of("c", MIB))])
    second = ok("archive", "create", image, uri, "--volume", "vm", *key)
    assert (first["blocks"]["stored"], second["blocks"]["stored"], second["blocks"]["equal"]) == (16, 4, 12)
    for number, content in ((first["snapshot"], before), (second["snapshot"], image.read_bytes())):
        ok("archive", "restore", f"{uri}#vm@{number}", tmp_path / f"{number}.raw", *key)
        assert (tmp_path / f"{number}.raw").read_bytes() == content
    assert ok("archive", "verify", uri, *key)["outcome"] == "sound"


def test_the_store_decides_who_commits(uri: str, tmp_path: Path) -> None:
    image = tmp_path / "vm.raw"
    image.write_bytes(secrets.token_bytes(4 * A))
    running = [
        start_cli("archive", "create", image, uri, "--volume", "vm", "--json", "--state-dir", tmp_path / f"{number}")
        for number in range(3)
    ]
    assert sorted([finish(process).report["snapshot"] for process in running]) == [1, 2, 3]

    async def conditional() -> bool:
        async with await open_store(uri) as store:
            return (await Catalog.open(store, Access())).archive.conditional

    assert asyncio.run(conditional())


def told(*words: object, code: str) -> Report:
    return refused_json(run_cli(*words, "--json", "--quiet", timeout=180), code)


def test_a_wrong_endpoint(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{ceph._free_port()}")
    error = told("archive", "list", uri, code="unavailable")
    assert "connection refused" in error["cause"] and "endpoint" in error["next"]


def test_an_endpoint_that_is_not_this_machine(uri: str) -> None:
    error = told("archive", "list", uri, "--store-option", "endpoint=http://192.0.2.1", code="invalid-argument")
    assert "--insecure" in error["next"]


def test_wrong_credentials(site: Site, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-this-one")
    error = told("archive", "list", uri, code="permission")
    assert "credentials" in error["cause"] and "not-this-one" not in str(error)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    assert "credentials" in told("archive", "list", uri, code="permission")["cause"]
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    assert "no credentials" in told("archive", "list", uri, code="permission")["cause"]


def test_a_bucket_that_is_not_ours() -> None:
    error = told("archive", "list", "s3://theirs/archive", code="permission")
    assert "somebody else's" in error["cause"]


def test_a_bucket_that_is_not_there() -> None:
    error = told("archive", "list", "s3://nobodys-bucket/archive", code="not-found")
    assert "no bucket nobodys-bucket" in error["cause"]


def test_no_archive(uri: str) -> None:
    assert "archive.json" in told("archive", "list", uri, code="not-found")["cause"]


async def test_a_store_that_is_full(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    user = site.gateway.user("small")
    site.gateway.bucket(user, "small")
    site.gateway.quota(user, 4 * MIB)
    for name, value in site.gateway.environment(user).items():
        monkeypatch.setenv(name, value)
    async with await open_store("s3://small/a") as store:

        async def fill() -> None:
            for number in range(20):
                await store.put_new(f"data/{number}", [secrets.token_bytes(MIB)])

        with pytest.raises(BlockferryError) as told_full:
            await fill()
        assert told_full.value.code is Code.OUT_OF_SPACE
        # What is there can still be read and removed.
        assert len(await store.get("data/0")) == MIB
        await store.delete("data/0")
