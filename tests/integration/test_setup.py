"""What `make demo` and `make test` do on a machine that lacks something: fetch it where they may, exactly what is
missing and with package lists that are up to date; otherwise say what to install and stop."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"

APT = """#!/bin/sh
echo "$*" >> "$(dirname "$0")/log"
here=$(dirname "$0")
case "$*" in
    update*) touch "$here/updated" ;;
    *install*) [ -e "$here/updated" ] || exit 100
        for tool in $APT_BRINGS; do cp "$here/id" "$here/$tool"; done ;;
esac
"""


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A PATH with hardly anything in it. Its package lists are out of date."""
    for tool in ("sh", "env", "dirname", "touch", "cp", "cat"):
        found = shutil.which(tool)
        assert found is not None
        (tmp_path / tool).symlink_to(found)
    return tmp_path


def add(machine: Path, name: str, text: str) -> None:
    (machine / name).write_text(text)
    (machine / name).chmod(0o755)


def run(machine: Path, *command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env={"PATH": str(machine), **environment}, capture_output=True, text=True, timeout=60, check=False
    )


def test_root_gets_what_is_missing_after_one_update(machine: Path) -> None:
    add(machine, "id", "#!/bin/sh\necho 0\n")
    add(machine, "apt-get", APT)
    add(machine, "rsync", "#!/bin/sh\n")
    done = run(machine, DEPLOY / "packages", "rsync", "strace", APT_BRINGS="strace")
    assert done.returncode == 0, done.stderr
    install = "install -qq -y --no-install-recommends strace"
    assert (machine / "log").read_text().splitlines() == [install, "update -qq", install]
    # Nothing is missing any more: apt-get is left alone.
    assert run(machine, DEPLOY / "packages", "rsync", "strace").returncode == 0
    assert len((machine / "log").read_text().splitlines()) == 3


def test_what_apt_does_not_bring_is_listed(machine: Path) -> None:
    add(machine, "id", "#!/bin/sh\necho 0\n")
    add(machine, "apt-get", APT)
    done = run(machine, DEPLOY / "packages", "rsync", "strace", APT_BRINGS="strace")
    assert done.returncode == 1
    assert "  rsync        (commands: rsync)\n" in done.stderr
    assert "(commands: strace)" not in done.stderr
    assert done.stderr.endswith("apt-get install rsync\nThen run this again.\n")


@pytest.mark.parametrize("sudo", [None, "#!/bin/sh\necho a password is required >&2; exit 1\n"])
def test_without_the_right_to_install_nothing_is_tried(machine: Path, sudo: str | None) -> None:
    add(machine, "id", "#!/bin/sh\necho 1000\n")
    add(machine, "apt-get", APT)
    if sudo:
        add(machine, "sudo", sudo)
    done = run(machine, DEPLOY / "packages", "rsync", "strace")
    assert done.returncode == 1
    assert done.stderr.endswith("apt-get install rsync strace\nThen run this again.\n")
    assert not (machine / "log").exists()


def test_sudo_without_a_password_is_used(machine: Path) -> None:
    add(machine, "id", "#!/bin/sh\necho 1000\n")
    add(machine, "apt-get", APT)
    add(machine, "sudo", '#!/bin/sh\n[ "$1" = -n ] && shift\n[ "$1" = true ] || exec "$@"\n')
    done = run(machine, DEPLOY / "packages", "strace", APT_BRINGS="strace")
    assert done.returncode == 0, done.stderr


def test_a_package_that_nobody_knows_is_an_error(machine: Path) -> None:
    done = run(machine, DEPLOY / "packages", "strace", "nonsense")
    assert (done.returncode, done.stderr) == (2, "deploy/packages: no package nonsense is known\n")


OLD = "#!/bin/sh\nexit 1\n"


@pytest.mark.parametrize(
    ("present", "chosen", "said"),
    [
        ([], None, "and no python3 here is that"),
        (["python3", "python3.11"], None, "and no python3 here is that"),
        (["python3"], "python3", "and python3 is not that"),
    ],
)
def test_without_a_python_that_is_new_enough(machine: Path, present: list[str], chosen: str | None, said: str) -> None:
    for name in present:
        add(machine, name, OLD)
    environment = {} if chosen is None else {"PYTHON": chosen}
    done = run(machine, DEPLOY / "make-venv", machine / "venv", **environment)
    assert done.returncode == 1
    assert f"blockferry needs Python 3.11 or newer, {said}." in done.stderr
    assert not (machine / "venv").exists()
