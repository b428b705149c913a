"""A test that does not run proves nothing: a skip whose reason is not in `allowed-skips.txt` fails the run.

Hooks of pytest, for `tests/conftest.py`. With several workers (pytest-xdist) the reports of all of them reach the
process that controls them, and only that one decides.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

ALLOWED = Path(__file__).with_name("allowed-skips.txt")

_skipped: list[tuple[str, str]] = []
"""(test, reason) in the order of reports"""


def unlisted(skipped: Iterable[tuple[str, str]], allowed: str) -> list[tuple[str, str]]:
    """What was skipped for a reason that is no line of `allowed`; its empty lines and those with `#` are none."""
    known = {line.strip() for line in allowed.splitlines() if line.strip() and not line.startswith("#")}
    return [(test, reason) for test, reason in skipped if reason not in known]


def _note(report: pytest.TestReport | pytest.CollectReport) -> None:
    # An expected failure is reported as skipped too, and has run.
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        _skipped.append((report.nodeid, reason.removeprefix("Skipped: ")))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _note(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    _note(report)


def _refused(config: pytest.Config) -> list[tuple[str, str]]:
    return [] if hasattr(config, "workerinput") else unlisted(_skipped, ALLOWED.read_text())


def pytest_sessionfinish(session: pytest.Session) -> None:
    passed = (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
    if _refused(session.config) and session.exitstatus in passed:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if found := _refused(config):
        terminalreporter.section("skipped without leave", red=True)
        for test, reason in found:
            terminalreporter.line(f"{test}: {reason}")
        terminalreporter.line(f"Provide what is missing, or put the reason into {ALLOWED.name} and say why.")
