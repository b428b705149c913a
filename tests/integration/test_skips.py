"""A test that is skipped for a reason nobody allowed fails the run; one that is expected to fail does not.

Each sample has a reason of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.skips import ALLOWED, unlisted

ROOT = Path(__file__).resolve().parents[2]


SKIPPED = {
    "in_a_test": "import pytest\ndef test_one(): pytest.skip('no loop devices')\n",
    "by_a_mark": "import pytest\n@pytest.mark.skip(reason='no root')\ndef test_one(): pass\n",
    "in_a_fixture": "import pytest\n@pytest.fixture\ndef a(): pytest.skip('no XFS')\ndef test_one(a): pass\n",
    "of_a_module": "import pytest\npytest.skip('no network', allow_module_level=True)\n",
}
PASSED = "import pytest\n@pytest.mark.xfail\ndef test_one(): assert False\ndef test_two(): pass\n"


def run(directory: Path, files: dict[str, str], *options: str) -> subprocess.CompletedProcess[str]:
    for name, text in files.items():
        (directory / f"test_{name}.py").write_text(text)
    # Without the plugins that the samples do not use: they take longest to start.
    plugins = ["-p", "tests.skips", "-p", "no:hypothesispytest", "-p", "no:asyncio", "-p", "no:timeout"]
    words = [sys.executable, "-m", "pytest", *plugins, *options, "-c", os.devnull, "--rootdir", str(directory)]
    return subprocess.run(
        [*words, str(directory)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("options", [("-p", "no:xdist"), ("--numprocesses", "2", "--dist", "loadfile")], ids=str)
def test_skips_fail_the_run_and_say_why(tmp_path: Path, options: tuple[str, ...]) -> None:
    done = run(tmp_path, {**SKIPPED, "passed": PASSED}, *options)
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout + done.stderr
    refused = done.stdout.split("skipped without leave")[1].split("Provide what is missing")[0].splitlines()[1:]
    assert sorted(refused) == [
        "test_by_a_mark.py::test_one: no root",
        "test_in_a_fixture.py::test_one: no XFS",
        "test_in_a_test.py::test_one: no loop devices",
        "test_of_a_module.py: no network",
    ]


def test_an_expected_failure_is_no_skip(tmp_path: Path) -> None:
    done = run(tmp_path, {"passed": PASSED})
    assert done.returncode == pytest.ExitCode.OK, done.stdout + done.stderr
    assert "without leave" not in done.stdout


def test_reasons_are_allowed_by_whole_lines() -> None:
    skipped = [("a", "no loop devices"), ("b", "no XFS"), ("c", "no XFS here")]
    assert unlisted(skipped, "# no XFS here\n\nno loop devices\n  no XFS\n") == [("c", "no XFS here")]
    assert unlisted(skipped, "") == skipped


def test_nothing_is_allowed_today() -> None:
    assert unlisted([("a", line) for line in ALLOWED.read_text().splitlines()], ALLOWED.read_text()) != []
    assert all(line.startswith("#") for line in ALLOWED.read_text().splitlines())
