"""The command line: sizes, exit statuses, and one clear line for every mistake."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from blockferry.client.cli.agent import COMMANDS as AGENT_COMMANDS
from blockferry.client.cli.archive import COMMANDS as ARCHIVE_COMMANDS
from blockferry.client.cli.archive_read import COMMANDS as ARCHIVE_READ_COMMANDS
from blockferry.client.cli.config import COMMANDS as CONFIG_COMMANDS
from blockferry.client.cli.export import COMMANDS as EXPORT_COMMANDS
from blockferry.client.cli.handover import COMMANDS as HANDOVER_COMMANDS
from blockferry.client.cli.main import _parse_rate, _parse_region_size, build_parser, main
from blockferry.client.cli.pki import COMMANDS as PKI_COMMANDS
from blockferry.client.cli.pools import COMMANDS as POOL_COMMANDS
from blockferry.client.cli.rehydration import COMMANDS as REHYDRATION_COMMANDS
from blockferry.client.cli.replicate import COMMANDS
from blockferry.common.errors import BlockferryError
from blockferry.common.units import parse_size
from hypothesis import given
from hypothesis import strategies as st

DEST = "grpc://127.0.0.1:1/db"


# --- sizes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1", 1),
        ("100", 100),
        ("007", 7),
        ("64K", 65536),
        ("64k", 65536),
        ("1M", 2**20),
        ("3g", 3 * 2**30),
        ("16T", 2**44),
        ("9" * 15 + "T", (10**15 - 1) * 2**40),
    ],
)
def test_sizes_are_binary(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "K", "-1", "-1K", "+1", "1.5M", "1 M", " 1", "1\n", "1KB", "1KiB", "1P", "0x10", "1e3", "1_000"),
        *("\u0661", "1\u212a", "\u00b2", "M1", "1MM", "9" * 16, "9" * 5000),
    ],
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(BlockferryError, match="is not a size; write a number with K, M, G or T"):
        parse_size(text)


@given(st.text(max_size=8))
def test_no_text_breaks_the_parser_of_sizes(text: str) -> None:
    try:
        found = parse_size(text)
    except BlockferryError:
        return
    assert found >= 0
    assert text.isascii()


@given(st.integers(0, 10**15 - 1), st.sampled_from(["", "K", "M", "G", "T"]))
def test_a_size_is_its_number_times_its_unit(number: int, unit: str) -> None:
    assert parse_size(f"{number}{unit}") == number * 1024 ** " KMGT".index(unit or " ")


def test_region_sizes_and_rates_have_bounds() -> None:
    assert _parse_region_size("64K") == 65536
    assert _parse_rate("1") == 1
    for text in ("0", "32K", "3M", "32M", "1", "x"):
        with pytest.raises(BlockferryError):
            _parse_region_size(text)
    for text in ("0", "-1", "x"):
        with pytest.raises(BlockferryError):
            _parse_rate(text)


# --- usage ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["no-such-command"],
        ["sync"],
        ["sync", "a.img"],
        ["sync", "a.img", DEST, "extra"],
        ["sync", "a.img", DEST, "--no-such-flag"],
        ["sync", "a.img", DEST, "--region-size", "3M"],
        ["sync", "a.img", DEST, "--region-size", "0"],
        ["sync", "a.img", DEST, "--region-size"],
        ["sync", "a.img", DEST, "--bwlimit", "0"],
        ["sync", "a.img", DEST, "--bwlimit", "fast"],
        ["sync", "a.img", DEST, "--keep", "sometimes"],
        ["plan", "a.img", DEST, "--bwlimit", "1M"],
        ["plan", "a.img", DEST, "--live"],
        ["verify", "a.img"],
        ["volume"],
        ["volume", "show"],
        ["volume", "destroy", "a.img"],
        ["replica"],
        ["replica", "list"],
        ["replica", "show"],
        ["pool"],
        ["pool", "list"],
        ["config"],
        ["config", "check"],
        ["sync", "a.img", DEST, "--pool", "../b"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_status_2_and_nothing_on_stdout(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.splitlines()[-1].startswith("blockferry")
    assert "Traceback" not in told.err


def leaves(parser: argparse.ArgumentParser, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every command a parser knows."""
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not groups:
        yield words
    for group in groups:
        for name, inner in group.choices.items():
            yield from leaves(inner, (*words, name))


def test_every_command_can_be_run_and_asked_for_help(capsys: pytest.CaptureFixture[str]) -> None:
    found = list(leaves(build_parser()))
    assert {"_".join(words) for words in found} == {
        *COMMANDS,
        *ARCHIVE_COMMANDS,
        *ARCHIVE_READ_COMMANDS,
        *POOL_COMMANDS,
        *REHYDRATION_COMMANDS,
        *HANDOVER_COMMANDS,
        *EXPORT_COMMANDS,
        *CONFIG_COMMANDS,
        *PKI_COMMANDS,
        *AGENT_COMMANDS,
        *REHYDRATION_COMMANDS,
    }
    for words in found:
        with pytest.raises(SystemExit) as caught:
            main([*words, "--help"])
        assert caught.value.code == 0
        assert "--json" in capsys.readouterr().out


# --- exit statuses ----------------------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two images that differ in two blocks, one of another size."""
    size = 3 * 2**20 + 5
    (tmp_path / "a.img").write_bytes(b"x" * size)
    changed = bytearray(b"x" * size)
    changed[5000] = changed[-1] = 0
    (tmp_path / "b.img").write_bytes(changed)
    (tmp_path / "short.img").write_bytes(b"x" * (size - 1))
    return tmp_path


def test_equal_is_0_and_different_is_3_with_the_ranges(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = str(images / "a.img"), str(images / "b.img")
    assert main(["verify", a, a, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["outcome"] == "equal"
    assert main(["verify", a, b, "--json", "--quiet"]) == 3
    told = capsys.readouterr()
    report = json.loads(told.out)
    assert report["outcome"] == "different"
    assert report["ranges"] == [{"offset": 4096, "length": 4096}, {"offset": 3 * 2**20, "length": 5}]
    assert report["bytes"] == {"compared": 3 * 2**20 + 5, "proven_zero": 0, "different": 4101}
    assert told.err == ""
    assert main(["verify", a, b, "--quiet"]) == 3
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["volume", "show", "missing.img"], "not-found"),
        (["volume", "show", "."], "unsupported"),
        (["volume", "show", "/dev/null"], "unsupported"),
        (["volume", "show", ""], "invalid-argument"),
        (["volume", "show", "file://host/a.img"], "invalid-argument"),
        (["verify", "a.img", "short.img"], "size-mismatch"),
        (["verify", "a.img", "missing.img"], "not-found"),
        (["sync", "a.img", "somewhere"], "invalid-argument"),
        (["sync", "a.img", "grpc://127.0.0.1:1"], "invalid-argument"),
        (["sync", "a.img", "grpc://127.0.0.1:1/../x"], "invalid-argument"),
        (["sync", "a.img", "grpc://192.0.2.1:1/db"], "unsupported"),
        (["plan", "missing.img", DEST], "not-found"),
        (["replica", "show", "grpc://127.0.0.1:1"], "invalid-argument"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_a_failure_is_exit_status_1_one_line_and_an_error_object(
    images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], code: str
) -> None:
    monkeypatch.chdir(images)
    before = {path.name: path.stat().st_mtime_ns for path in images.iterdir()}
    assert main([*arguments, "--quiet"]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    (line,) = told.err.splitlines()
    assert line.startswith("blockferry: ")
    assert main([*arguments, "--json", "--quiet"]) == 1
    told = capsys.readouterr()
    assert (told.err.splitlines(), list(json.loads(told.out))) == ([line], ["error"])
    error = json.loads(told.out)["error"]
    assert error["code"] == code
    assert {"code", "volume", "offset", "length", "cause", "next"} <= set(error)
    assert {path.name: path.stat().st_mtime_ns for path in images.iterdir()} == before


def test_showing_a_volume(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = images / "sparse.img"
    with path.open("wb") as file:
        file.truncate(5 * 2**20)
        file.seek(3 * 2**20)
        file.write(b"x")
    assert main(["volume", "show", str(path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["size"], report["regions"], report["allocated_regions"]) == (5 * 2**20, 5, 1)
    assert (report["map"], report["runs"], report["writers"]) == ("exact", 1, [])
    assert main(["volume", "show", path.as_uri()]) == 0
    assert "map exact" in capsys.readouterr().out


PROGRAM = [sys.executable, "-c", "import sys; from blockferry.client.cli.main import main; sys.exit(main())"]


@pytest.mark.parametrize("arguments", [["volume", "show"], ["volume", "show", "--json"]])
def test_a_name_that_is_not_utf8_can_be_shown(tmp_path: Path, arguments: list[str]) -> None:
    name = os.fsencode(tmp_path) + b"/\xff.img"
    with open(name, "wb") as file:
        file.write(b"x")
    # Most locales with UTF-8 make Python strict about what it prints; the one of a test environment may not.
    strict = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run([*PROGRAM, *arguments, name], capture_output=True, env=strict)
    assert (done.returncode, done.stderr) == (0, b"")
    assert name in done.stdout or json.loads(done.stdout)["uri"] == os.fsdecode(name)
    missing = subprocess.run([*PROGRAM, *arguments, name + b"2"], capture_output=True, env=strict)
    assert missing.returncode == 1
    assert len(missing.stderr.splitlines()) == 1


LOST = "cannot print the result: standard output: {}; what was asked for is done and only its report is lost"


@pytest.mark.parametrize(
    ("stdout", "cause"),
    [("gone", "broken pipe"), ("full", "no space left on device"), ("closed", "bad file descriptor")],
)
@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        pytest.param(["volume", "show", "a.img"], LOST, id="a result"),
        pytest.param(["volume", "show", "a.img", "--json"], LOST, id="a report"),
        pytest.param(["verify", "a.img", "b.img", "--json", "--quiet"], LOST, id="a report of differences"),
        pytest.param(["--help"], LOST, id="help"),
        pytest.param(["sync", "--help"], LOST, id="help for a command"),
        pytest.param(["volume", "show", "no.img", "--json"], "cannot open no.img: no such file", id="an error"),
        pytest.param(["volume", "show", "no.img"], "cannot open no.img: no such file", id="an error without JSON"),
    ],
)
def test_a_stdout_that_breaks_is_one_line_and_exit_status_1(
    images: Path, stdout: str, cause: str, arguments: list[str], line: str
) -> None:
    """Whoever reads it has gone, its disk is full, or it was never open: no traceback, neither now nor when Python
    flushes at its end."""
    reading, writing = os.pipe()
    os.close(reading)
    words = ["sh", "-c", 'exec "$@" >&-', "sh"] if stdout == "closed" else []
    with open(writing, "wb") as gone, open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*words, *PROGRAM, *arguments],
            stdout={"gone": gone, "full": full, "closed": None}[stdout],
            stderr=subprocess.PIPE,
            text=True,
            cwd=images,
        )
    (told,) = done.stderr.splitlines()
    assert told.startswith(f"blockferry: {line.format(cause)}")
    assert done.returncode == 1


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_standard_descriptor_that_is_closed_is_no_reason_to_abort(images: Path, number: int) -> None:
    words = ["sh", "-c", f'exec "$@" {number}>&-', "sh", *PROGRAM, "volume", "show", "a.img", "--json", "--quiet"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=images)
    assert done.returncode == (1 if number == 1 else 0)
    assert (json.loads(done.stdout)["uri"] == "a.img") if number != 1 else not done.stdout
    # What belongs to stderr never comes out of stdout.
    missing = subprocess.run([*words, "--region-size"], capture_output=True, text=True, cwd=images)
    assert missing.returncode == 2
    assert list(json.loads(missing.stdout)) == ["error"] if number != 1 else not missing.stdout


@pytest.mark.parametrize("stdout", ["/dev/full", "/dev/null"])
def test_a_usage_error_that_cannot_be_told_as_json_is_told_all_the_same(stdout: str) -> None:
    with open(stdout, "wb") as broken:
        done = subprocess.run([*PROGRAM, "sync", "--json"], stdout=broken, stderr=subprocess.PIPE, text=True)
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("blockferry: usage error")
    assert done.returncode == 2
