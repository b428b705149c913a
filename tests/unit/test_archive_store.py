"""Names of stores, snapshots and objects; asking again; what S3 is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from blockferry.common.archive.remote import s3_config
from blockferry.common.archive.retry import Patience, Retrying
from blockferry.common.archive.store import Access, Exists, Missing, Place, SnapshotName, Transient, is_store_uri
from blockferry.common.errors import BlockferryError, Code
from hypothesis import given
from hypothesis import strategies as st

from tests.archive_faults import CountingStore, FaultyStore, MemoryStore, busy, full, unanswered
from tests.store_contract import CHECKS, Check

KEYS = {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "hush"}


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Pauses are noted and not waited for."""
    made: list[float] = []

    async def sleep(seconds: float) -> None:
        made.append(seconds)

    monkeypatch.setattr("blockferry.common.archive.retry.asyncio.sleep", sleep)
    return made


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_the_store_in_memory_keeps_the_contract(check: Check) -> None:
    await check(MemoryStore())


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_asking_again_keeps_the_contract(check: Check) -> None:
    await check(Retrying(MemoryStore()))


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "place"),
    [
        ("s3://bucket", Place("s3", "bucket", "")),
        ("s3://bucket/", Place("s3", "bucket", "")),
        ("s3://bucket/a/b/", Place("s3", "bucket", "a/b")),
        ("gs://bucket/a", Place("gs", "bucket", "a")),
        ("az://container/a", Place("az", "container", "a")),
        ("file:///srv/archive", Place("file", "", "/srv/archive")),
        ("file:///srv/with%20space/", Place("file", "", "/srv/with space")),
    ],
)
def test_stores_have_names(uri: str, place: Place) -> None:
    assert Place.parse(uri) == place
    assert is_store_uri(uri)


@pytest.mark.parametrize(
    "uri",
    ["", "srv", "http://bucket", "s3://", "s3:///a", "s3://b/../c", "s3://b/a//b", "s3://b?x=1", "s3://u@b", "s3://b#n",
     "file://host/a", "file://relative", "s3://b/a\nb", "s3://b:80/", "file:///a\0"],
)  # fmt: skip
def test_other_names_are_refused(uri: str) -> None:
    with pytest.raises(BlockferryError) as told:
        Place.parse(uri)
    assert told.value.code is Code.INVALID_ARGUMENT and told.value.next


@pytest.mark.parametrize(
    ("uri", "found"),
    [
        ("s3://b/p", SnapshotName("s3://b/p", "", 0)),
        ("s3://b/p#vm", SnapshotName("s3://b/p", "vm", 0)),
        ("file:///a#b#vm@12", SnapshotName("file:///a#b", "vm", 12)),
    ],
)
def test_snapshots_have_names(uri: str, found: SnapshotName) -> None:
    assert SnapshotName.parse(uri) == found


@pytest.mark.parametrize("uri", ["s3://b#", "s3://b#@1", "s3://b#vm@", "s3://b#vm@0", "s3://b#vm@x", "s3://b#.vm"])
def test_other_snapshots_are_refused(uri: str) -> None:
    with pytest.raises(BlockferryError):
        SnapshotName.parse(uri)


# --- asking again -----------------------------------------------------------------------------------------------------


async def test_what_is_transient_is_asked_again_with_growing_pauses(pauses: list[float]) -> None:
    counting = CountingStore(MemoryStore())
    faulty = FaultyStore(counting)
    store = Retrying(faulty)
    await store.put("a", b"x")
    faulty.rule("get", before=busy, times=7)
    assert await store.get("a") == b"x"
    assert store.retries == 7 and counting.counts == {"put": 1, "get": 1}
    assert [0.5 * most <= found <= most for found, most in zip(pauses, (0.25, 0.5, 1, 2, 4, 8, 8), strict=True)] == [
        True
    ] * 7


async def test_patience_ends() -> None:
    faulty = FaultyStore(MemoryStore())
    store = Retrying(faulty)
    await store.put("a", b"x")
    rule = faulty.rule("get", before=busy)
    with pytest.raises(Transient) as told:
        await store.get("a")
    assert rule.seen == Patience().attempts and told.value.code is Code.UNAVAILABLE


async def test_a_store_that_never_answered_is_given_up_sooner() -> None:
    faulty = FaultyStore(MemoryStore())
    rule = faulty.rule(before=unanswered)
    store = Retrying(faulty)
    with pytest.raises(Transient):
        await store.get("a")
    assert rule.seen == Patience().first_attempts


async def test_an_error_is_an_answer() -> None:
    faulty = FaultyStore(MemoryStore())
    store = Retrying(faulty)
    with pytest.raises(Missing):
        await store.get("a")
    rule = faulty.rule(before=unanswered)
    with pytest.raises(Transient):
        await store.get("a")
    assert rule.seen == Patience().attempts


async def test_other_errors_are_not_asked_again() -> None:
    faulty = FaultyStore(MemoryStore())
    rule = faulty.rule("put_new", before=full)
    with pytest.raises(BlockferryError) as told:
        await Retrying(faulty).put_new("a", [b"x"])
    assert told.value.code is Code.OUT_OF_SPACE and rule.seen == 1


async def test_a_lost_answer_to_a_new_object_is_no_conflict() -> None:
    faulty = FaultyStore(MemoryStore())
    faulty.rule("put_new", afterwards=unanswered, times=1)
    store = Retrying(faulty)
    await store.put_new("log/1", [b"ours ", b"alone"])
    assert await store.get("log/1") == b"ours alone"


async def test_a_conflict_after_a_lost_request_is_a_conflict() -> None:
    memory = MemoryStore()
    faulty = FaultyStore(memory)
    faulty.rule("put_new", before=unanswered, times=1)
    store = Retrying(faulty)
    await memory.put_new("log/1", [b"theirs"])
    with pytest.raises(Exists):
        await store.put_new("log/1", [b"ours"])
    assert await store.get("log/1") == b"theirs"


async def test_an_equal_object_of_somebody_else_is_a_conflict() -> None:
    store = Retrying(MemoryStore())
    await store.put_new("a", [b"x"])
    with pytest.raises(Exists):
        await store.put_new("a", [b"x"])


async def test_a_listing_goes_on_where_it_broke() -> None:
    class Breaking(MemoryStore):
        broken = 0

        async def entries(self, prefix: str, *, after: str = "") -> Any:
            told = 0
            async for entry in super().entries(prefix, after=after):
                if told == 3 and self.broken < 3:
                    self.broken += 1
                    raise unanswered(self, prefix)
                told += 1
                yield entry

    inner = Breaking()
    for number in range(11):
        await inner.put_new(f"log/{number:03}", [b"x"])
    assert list(await Retrying(inner).list("log/")) == [f"log/{number:03}" for number in range(11)]
    assert inner.broken == 3


@given(st.lists(st.sampled_from(["before", "afterwards"]), max_size=7))
async def test_however_answers_are_lost_one_object_is_made(faults: list[str]) -> None:
    memory = MemoryStore()
    faulty = FaultyStore(memory)
    for number, kind in enumerate(faults):
        faulty.rule("put_new", after=number, times=1, **{kind: unanswered})
    store = Retrying(faulty, Patience(attempts=8, first_attempts=8))
    await store.put_new("log/1", [b"ours"])
    assert memory.objects == {"log/1": b"ours"}


# --- what S3 is told --------------------------------------------------------------------------------------------------


def config(options: dict[str, str] | None = None, environment: dict[str, str] | None = None, **how: Any) -> Any:
    return s3_config("s3://b", Access(options=options or {}, **how), {**KEYS, **(environment or {})})


def test_credentials_and_endpoint_come_from_the_usual_variables() -> None:
    assert config(
        environment={"AWS_ENDPOINT_URL": "https://s3.example/", "AWS_REGION": "eu-x", "AWS_SESSION_TOKEN": "t"}
    ) == (
        {
            "region": "eu-x",
            "endpoint": "https://s3.example",
            "virtual_hosted_style_request": False,
            "access_key_id": "id",
            "secret_access_key": "hush",
            "session_token": "t",
        },
        True,
    )


def test_options_go_before_variables(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("from a file\n")
    options = {
        "endpoint": "https://other.example", "region": "r", "access_key_id": "k", "secret_access_key_file": str(secret),
        "virtual_hosted": "yes", "conditional": "no",
    }  # fmt: skip
    found, conditional = config(options, {"AWS_ENDPOINT_URL": "https://s3.example", "AWS_REGION": "eu-x"})
    assert not conditional
    assert found == {
        "region": "r",
        "endpoint": "https://other.example",
        "virtual_hosted_style_request": True,
        "access_key_id": "k",
        "secret_access_key": "from a file",
    }


def test_no_credentials_are_told_before_anything_is_asked() -> None:
    with pytest.raises(BlockferryError) as told:
        s3_config("s3://b", Access(), {})
    assert told.value.code is Code.PERMISSION and "AWS_ACCESS_KEY_ID" in told.value.line()
    assert "access_key_id" not in s3_config("s3://b", Access(options={"instance": "yes"}), {})[0]
    assert s3_config("s3://b", Access(options={"anonymous": "yes"}), {})[0]["skip_signature"] is True


def test_plaintext_is_for_this_machine() -> None:
    for endpoint in ("http://127.0.0.1:1", "http://localhost:1", "http://[::1]:1", "https://s3.example"):
        assert config({"endpoint": endpoint})[0]["endpoint"] == endpoint
    with pytest.raises(BlockferryError, match="--insecure"):
        config({"endpoint": "http://s3.example"})
    assert config({"endpoint": "http://s3.example"}, insecure=True)[0]["endpoint"] == "http://s3.example"


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"endpont": "https://x"}, "endpont"),
        ({"secret_access_key": "hush-hush"}, "AWS_SECRET_ACCESS_KEY"),
        ({"endpoint": "s3.example"}, "https://HOST"),
        ({"endpoint": "ftp://s3.example"}, "https://HOST"),
        ({"conditional": "perhaps"}, "yes or no"),
        ({"secret_access_key_file": "/does/not/exist"}, "/does/not/exist"),
    ],
)
def test_wrong_options_are_told(options: dict[str, str], word: str) -> None:
    with pytest.raises(BlockferryError) as told:
        config(options)
    assert word in told.value.line() and "hush" not in told.value.line()
