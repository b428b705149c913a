"""The command line of blockferry-server and its file: what comes out of both."""

from __future__ import annotations

from pathlib import Path

import pytest
from blockferry.common.config import ConfigError, LimitsConfig, PoolConfig, ServerConfig
from blockferry.common.errors import BlockferryError
from blockferry.common.retention import Retention
from blockferry.server.arguments import configuration

FILE = """\
listen = ["grpc://127.0.0.1:1", "grpc://127.0.0.1:2"]
scrub_every = "1d"
[pool.main]
path = "/srv/main"
reserve = "1G"
[pool.second]
path = "/srv/second"
quota = "2G"
keep_at_least = { daily = 7 }
[limits]
lease = "30s"
sessions = 5
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "server.toml"
    path.write_text(FILE)
    return str(path)


def test_without_a_file_the_command_line_says_it_all() -> None:
    assert configuration(["--pool", "/srv/x"]) == ServerConfig(pool={"main": PoolConfig(Path("/srv/x"))})
    found = configuration(
        ["--pool", "a=/a", "--pool", "b=/b", "--listen", "grpc://127.0.0.1:5", "--listen", "grpc+unix:///s", "--quota",
         "1M", "--reserve", "0", "--journal-limit", "2M", "--keep-at-least", "daily=2", "--lease", "1.5",
         "--scrub-every", "1h", "--insecure"]
    )  # fmt: skip
    pools = {name: PoolConfig(Path(f"/{name}"), 0, 1 << 20, 2 << 20, Retention(daily=2)) for name in "ab"}
    assert found == ServerConfig(
        listen=("grpc://127.0.0.1:5", "grpc+unix:///s"),
        insecure=True,
        scrub_every=3600,
        pool=pools,
        limits=LimitsConfig(lease=1.5),
    )
    assert list(found.pool) == ["a", "b"]


def test_what_the_command_line_does_not_say_is_as_in_the_file(file: str) -> None:
    assert configuration(["--config", file]) == ServerConfig(
        listen=("grpc://127.0.0.1:1", "grpc://127.0.0.1:2"),
        scrub_every=86400,
        pool={
            "main": PoolConfig(Path("/srv/main"), reserve=1 << 30),
            "second": PoolConfig(Path("/srv/second"), quota=2 << 30, keep_at_least=Retention(daily=7)),
        },
        limits=LimitsConfig(lease=30.0, sessions=5),
    )


def test_addresses_take_the_place_of_those_of_the_file(file: str) -> None:
    assert configuration(["--config", file, "--listen", "grpc://127.0.0.1:0"]).listen == ("grpc://127.0.0.1:0",)


def test_a_pool_is_added_or_moved(file: str) -> None:
    found = configuration(["--config", file, "--pool", "third=/t", "--pool", "second=/elsewhere"]).pool
    assert list(found) == ["main", "second", "third"]
    assert found["second"] == PoolConfig(Path("/elsewhere"), quota=2 << 30, keep_at_least=Retention(daily=7))
    assert found["third"] == PoolConfig(Path("/t"))


@pytest.mark.parametrize(
    ("flag", "value", "field", "expected"),
    [
        ("--reserve", "0", "reserve", 0),
        ("--quota", "0", "quota", 0),
        ("--journal-limit", "3M", "journal_limit", 3 << 20),
        ("--keep-at-least", "last=9", "keep_at_least", Retention(last=9)),
    ],
)
def test_what_is_said_of_pools_counts_for_all(file: str, flag: str, value: str, field: str, expected: object) -> None:
    before = configuration(["--config", file])
    after = configuration(["--config", file, flag, value])
    assert [getattr(pool, field) for pool in after.pool.values()] == [expected, expected]
    assert after.limits == before.limits and after.listen == before.listen


def test_the_rest_takes_the_place_of_what_the_file_says(file: str) -> None:
    assert configuration(["--config", file, "--scrub-every", "0"]).scrub_every == 0
    assert configuration(["--config", file, "--lease", "2m"]).limits == LimitsConfig(lease=120.0, sessions=5)


def test_insecure_on_the_command_line_counts_for_addresses_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "open.toml"
    path.write_text("listen = ['grpc://0.0.0.0:1']\n[pool.main]\npath = '/srv'\n")
    with pytest.raises(ConfigError, match=r"listen\[0\]"):
        configuration(["--config", str(path)])
    assert configuration(["--config", str(path), "--insecure"]).insecure


@pytest.mark.parametrize("words", [[], ["--insecure"], ["--config"]])
def test_nothing_to_serve_is_wrong_usage(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if words == ["--config"]:
        (tmp_path / "empty.toml").touch()
        words = ["--config", str(tmp_path / "empty.toml")]
    with pytest.raises(SystemExit) as caught:
        configuration(words)
    assert caught.value.code == 2
    assert "nothing to serve: give --pool [NAME=]DIR, or --config FILE" in capsys.readouterr().err


@pytest.mark.parametrize("lease", ["0", "0.01", "nan", "x", "25h", "-1", ""])
def test_what_is_no_lease_is_wrong_usage(lease: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        configuration(["--pool", "/p", f"--lease={lease}"])
    assert caught.value.code == 2
    assert "is not a lease; write seconds from 0.1 to 86400" in capsys.readouterr().err


def test_a_pool_named_twice_on_the_command_line_is_refused() -> None:
    with pytest.raises(BlockferryError, match="both are called main"):
        configuration(["--pool", "/a", "--pool", "/b"])
