"""Processes of users that exist only as numbers, wherever the interpreter and this checkout are.

Both may lie in a directory that nobody but root can enter. So each process gets a mount namespace of its own, in which
they are mounted, read-only, where everybody can reach them; it ends with the process, whatever happens to the tests.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support import Finished, Server

_ENTER = """
set -e
umask "$1"; shift
while [ "$1" != -- ]; do mount -o bind "$1" "$2"; mount -o remount,bind,ro "$2"; shift 2; done
shift
exec "$@"
"""


@dataclass(frozen=True)
class User:
    """A user id, which is the group id too, and a directory of its own."""

    number: int
    home: Path

    @classmethod
    def make(cls, number: int, home: Path) -> User:
        """Make the directory, mode 0700."""
        home.mkdir(mode=0o700)
        os.chown(home, number, number)
        return cls(number, home)


def free_numbers() -> Iterator[int]:
    """User ids that neither the system's list nor any process knows."""
    taken = {user.pw_uid for user in pwd.getpwall()}
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            taken |= {int(one) for one in status.read_text().split("\nUid:")[1].split("\n")[0].split()}
        except (OSError, IndexError):
            continue
    return (number for number in range(47_000, 60_000) if number not in taken)


class Stage:
    """Starts our programs as other users. `place` is a directory that every user can enter."""

    def __init__(self, place: Path) -> None:
        roots = []
        for package in ("client", "server", "common"):
            found = importlib.util.find_spec(f"blockferry.{package}")
            assert found is not None and found.origin is not None
            roots.append(Path(found.origin).parents[2])
        wanted = [Path(sys.base_prefix), Path(sys.prefix), *dict.fromkeys(roots)]
        self._mounts = []
        for number, source in enumerate(wanted):
            target = place / f"mount-{number}"
            target.mkdir()
            self._mounts.append((source, target))
        base, prefix = self._mounts[0][1], self._mounts[1][1]
        self._python = base / Path(sys.executable).resolve().relative_to(sys.base_prefix)
        self._programs = prefix / Path(sys.executable).parent.relative_to(sys.prefix)
        packages = prefix / _packages().relative_to(sys.prefix)
        self._path = os.pathsep.join(map(str, [*(target for _, target in self._mounts[2:]), packages]))

    def words(self, user: User, umask: int, program: str, *args: object) -> list[str]:
        """The command line that runs one of our programs, or a program of the system's."""
        ours = (Path(sys.executable).parent / program).exists()
        mounts = [str(one) for pair in self._mounts for one in pair]
        return [
            *("unshare", "--mount", "--propagation=private", "sh", "-c", _ENTER, "sh", f"{umask:03o}", *mounts, "--"),
            *("setpriv", f"--reuid={user.number}", f"--regid={user.number}", "--clear-groups", "--no-new-privs"),
            *("env", "--ignore-environment", f"HOME={user.home}", f"PATH={os.environ['PATH']}"),
            *(f"PYTHONPATH={self._path}", "PYTHONDONTWRITEBYTECODE=1", f"LD_LIBRARY_PATH={self._mounts[0][1]}/lib"),
            *([str(self._python), str(self._programs / program)] if ours else [program]),
            *map(str, args),
        ]

    def run(self, user: User, program: str, *args: object, umask: int = 0o022) -> Finished:
        """Run a program to its end."""
        words = self.words(user, umask, program, *args)
        done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False, cwd="/")
        return Finished(done.returncode, done.stdout, done.stderr)


def _packages() -> Path:
    """Where installed packages are."""
    found = importlib.util.find_spec("pytest")
    assert found is not None and found.origin is not None
    return Path(found.origin).parents[1]


def why_not() -> str:
    """Why this machine cannot start processes as other users; empty if it can."""
    if os.geteuid() != 0:
        return "only root can start processes as other users"
    missing = [name for name in ("unshare", "setpriv", "mount") if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed"
    done = subprocess.run(["unshare", "--mount", "true"], capture_output=True, text=True, check=False)
    return f"no mount namespaces: {done.stderr.strip()}" if done.returncode else ""


class ServerOf(Server):
    """blockferry-server as another user."""

    def __init__(self, stage: Stage, user: User, pool: Path, log: Path, umask: int = 0o022) -> None:
        super().__init__(pool)
        self.log = log
        self._stage, self._user, self._umask = stage, user, umask

    @property
    def words(self) -> list[str]:
        return self._stage.words(self._user, self._umask, "blockferry-server", *super().words[1:])


def modes(directory: Path) -> dict[str, tuple[str, int, int]]:
    """Type and mode, owner and group of everything in a directory and of itself, by relative name."""
    found = {}
    for path in [directory, *directory.rglob("*")]:
        info = path.lstat()
        found[str(path.relative_to(directory))] = (f"{info.st_mode:o}", info.st_uid, info.st_gid)
    return found
