"""`make demo` does what it promises where no terminal is attached: three syncs with their figures, and a healthy file
system at the far end."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).resolve().parents[2] / "deploy/demo.py"
PATH = os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin:/sbin"


def run_demo(tmp_path: Path, path: str = PATH) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, DEMO],
        env={**os.environ, "TMPDIR": str(tmp_path), "PATH": path},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], list[Path]]:
    """One run, and what it left in its temporary directory."""
    directory = tmp_path_factory.mktemp("demo")
    return run_demo(directory), list(directory.iterdir())


def test_the_demo_succeeds_and_cleans_up(demo: tuple[subprocess.CompletedProcess[str], list[Path]]) -> None:
    done, left = demo
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "demo: everything is as expected"
    assert left == []


@pytest.mark.parametrize(
    ("line", "count"),
    [
        (r"first sync: generation 1, [\d.]+ s", 1),
        (r"after changes and a trim: generation 2, [\d.]+ s", 1),
        (r"nothing changed: generation 3, [\d.]+ s", 1),
        (r"skipped +\d+ .*neither site holds data", 3),
        (r"compared +\d+ .*both do: \d+ were equal", 3),
        (r"sent +\d+ .*only the source does", 3),
        (r"unmapped +\d+ .*only the destination did", 3),
        (r"a plain copy sends 1\.0 GiB: [\d.]+% saved", 3),
        (r"data sent 0 B, unmapped 0 B, on the wire [\d.]+ KiB both ways", 1),
        (r"verify: equal, .* compared, the rest proven zero", 1),
        (r"e2fsck: the replica .* is a healthy file system", 1),
    ],
)
def test_the_demo_shows(demo: tuple[subprocess.CompletedProcess[str], list[Path]], line: str, count: int) -> None:
    assert len(re.findall(rf"^{line} *$", demo[0].stdout, re.MULTILINE)) == count


def test_piped_output_is_plain_and_fits_80_columns(
    demo: tuple[subprocess.CompletedProcess[str], list[Path]],
) -> None:
    assert demo[0].stdout.isascii()
    assert "\x1b" not in demo[0].stdout
    assert max(map(len, demo[0].stdout.splitlines())) <= 80


def test_a_step_that_fails_fails_the_demo(tmp_path: Path) -> None:
    """An e2fsck that reports damage must not go unnoticed."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "e2fsck").write_text("#!/bin/sh\necho the file system is damaged\nexit 4\n")
    (tools / "e2fsck").chmod(0o755)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    done = run_demo(scratch, f"{tools}:{PATH}")
    assert done.returncode == 1
    assert "e2fsck ended with status 4: the file system is damaged" in done.stderr
    assert list(scratch.iterdir()) == []
