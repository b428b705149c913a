"""The house rules that only show from outside: what the wheel installs, that generated code is current, that the three
source roots stay one namespace, and that no module outgrows its reader."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from deploy import protos

ROOT = Path(__file__).resolve().parents[2]
SOURCE_ROOTS = ("client", "common", "server")
MOST_LINES = 600


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Standard output of a program that must succeed; no PYTHONPATH may lend it this checkout."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        command, cwd=cwd, env={**clean, **environment}, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of what it is made of: a build must leave nothing behind in the checkout."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in SOURCE_ROOTS:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", copy / "dist", cwd=copy)
    (built,) = (copy / "dist").iterdir()
    return built


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with nothing but what the wheel installs."""
    target = tmp_path_factory.mktemp("site")
    run(
        *(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps"),
        *("--target", target, wheel),
        cwd=target,
    )
    return target


def test_the_wheel_puts_only_blockferry_at_top_level(site: Path) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert {entry.name for entry in site.iterdir()} == {"blockferry", f"blockferry-{version}.dist-info", "bin"}
    assert {entry.name for entry in (site / "blockferry").iterdir()} == {"client", "common", "server", "v1"}


def test_the_wheel_has_every_module(site: Path) -> None:
    def modules(root: Path) -> set[str]:
        return {
            str(path.relative_to(root))
            for path in (root / "blockferry").rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }

    assert modules(site) == set().union(*(modules(ROOT / root) for root in SOURCE_ROOTS))


SCRIPTS = ["blockferry", "blockferry-agent", "blockferry-rehydrate", "blockferry-server"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_console_scripts_run_from_the_installed_wheel(site: Path, script: str) -> None:
    assert sorted(entry.name for entry in (site / "bin").iterdir()) == SCRIPTS
    # Dependencies come from this environment, blockferry itself from the wheel.
    where = "import blockferry.common as found; print(found.__path__[0])"
    assert run(sys.executable, "-c", where, cwd=site, PYTHONPATH=str(site)).strip() == str(site / "blockferry/common")
    shown = run(site / "bin" / script, "--help", cwd=site, PYTHONPATH=str(site))
    assert shown.startswith(f"usage: {script} ")


def test_generated_code_is_what_protos_say() -> None:
    assert protos.stale() == []


def test_stale_generated_code_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check can fail: a changed, a missing and a left-over module are each named."""
    protos.generate(tmp_path)
    generated = tmp_path / "blockferry/v1"
    (generated / "replicas_pb2.py").unlink()
    (generated / "replication_pb2.pyi").write_text("# changed\n")
    (generated / "gone_pb2.py").touch()
    monkeypatch.setattr(protos, "GENERATED", tmp_path)
    assert protos.stale() == [
        f"blockferry/v1/{name}" for name in ("gone_pb2.py", "replicas_pb2.py", "replication_pb2.pyi")
    ]


@pytest.mark.parametrize("root", SOURCE_ROOTS)
def test_blockferry_is_a_namespace(root: str) -> None:
    """One `__init__.py` there would hide the other two roots."""
    assert (ROOT / root / "blockferry").is_dir()
    assert not (ROOT / root / "blockferry/__init__.py").exists()
    assert not (ROOT / root / "__init__.py").exists()


def test_no_module_is_longer_than_its_reader_likes() -> None:
    modules = [
        path
        for root in (*SOURCE_ROOTS, "tests", "bench", "deploy")
        for path in (ROOT / root).rglob("*.py")
        if not path.name.endswith("_pb2.py")
    ]
    assert ROOT / "client/blockferry/client/plan.py" in modules
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in modules}
    assert {name: count for name, count in lengths.items() if count > MOST_LINES} == {}


def test_requirements_are_pinned_hashed_and_name_no_place() -> None:
    text = (ROOT / "requirements-dev.txt").read_text()
    entries = [line for line in text.splitlines() if not line.startswith(" ")]
    assert all(line.endswith("\\") and "==" in line for line in entries)
    assert text.count("--hash=sha256:") >= len(entries)
    for word in ("://", "--index", "--extra-index", "--find-links", "file:", " @ ", "/"):
        assert word not in text
    pinned = {line.split("==")[0] for line in entries}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [*project["project"]["dependencies"], *project["dependency-groups"]["dev"]]
    assert {name.split("=")[0].split(">")[0].split("<")[0] for name in wanted} <= pinned
