"""Ways to take a snapshot, and to remove one: a clone of a file, or programs of the administrator's."""

from __future__ import annotations

import abc
import os
import re
import stat
from collections.abc import Collection, Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

from blockferry.client.hooks import run_hook
from blockferry.common import disk
from blockferry.common.address import is_address
from blockferry.common.agent_config import Policy
from blockferry.common.disk import crash_point
from blockferry.common.durable import make_directories
from blockferry.common.errors import BlockferryError, Code, from_os_error
from blockferry.common.nbd.uri import is_nbd_uri
from blockferry.common.volumes import in_thread

CLONES = ".blockferry-snapshots"
"""Directory beside the source where clones are, unless the policy says another."""

_PREFIX = "blockferry-"
_SUFFIX = ".snapshot"


class Method(abc.ABC):
    """Makes the snapshots of one policy."""

    def __init__(self, name: str, policy: Policy) -> None:
        self.name = name
        self.policy = policy

    @property
    @abc.abstractmethod
    def place(self) -> Path | None:
        """Where it takes space for snapshots, if that is known."""

    @abc.abstractmethod
    def path_for(self, commit_id: str) -> str:
        """Where the snapshot will be; empty if only making it tells."""

    @abc.abstractmethod
    async def make(self, path: str, environment: Mapping[str, str]) -> str:
        """Take one; where it is."""

    @abc.abstractmethod
    async def unmake(self, path: str, environment: Mapping[str, str]) -> None:
        """Remove one, or what there is of it: it may be there in part, or not at all."""

    async def strays(self, known: Collection[str]) -> list[Path]:
        """Remove whatever lies about of this policy beside what is `known`; what that was."""
        return []


class Clones(Method):
    """Files that share the extents of the source (FICLONE), read-only."""

    @property
    def place(self) -> Path:
        return self.policy.snapshot_dir or Path(os.path.realpath(self._source)).parent / CLONES

    @property
    def _source(self) -> Path:
        return path_of(self.policy.source) or Path(self.policy.source)

    def path_for(self, commit_id: str) -> str:
        return str(self.place / f"{_PREFIX}{self.name}-{commit_id}{_SUFFIX}")

    async def make(self, path: str, environment: Mapping[str, str]) -> str:
        try:
            await in_thread(self._begin, Path(path))
            crash_point("cycle-clone-begun")
            # By a process of its own: other writers of the source wait meanwhile, and only a process that is killed
            # gives up before a clone of very many extents is complete (ioctl_ficlone(2)).
            words = ("cp", "--reflink=always", "--", str(self._source), path)
            await run_hook("clone", words, {"LC_ALL": "C"}, self.policy.clone_limit, self.name)
            crash_point("cycle-cloned")
            await in_thread(_seal, Path(path))
        except OSError as error:
            raise from_os_error(error, f"cannot clone {self.policy.source}", volume=self.name) from error
        except BlockferryError as error:
            if error.code is not Code.HOOK:
                raise
            raise self._explained(error) from error
        return path

    def _begin(self, path: Path) -> None:
        make_directories(path.parent)
        # Nobody else's file is ever written to.
        os.close(disk.create(path, os.O_WRONLY | os.O_EXCL))

    def _explained(self, error: BlockferryError) -> BlockferryError:
        if "No space left" in error.cause:
            code, next_step = Code.OUT_OF_SPACE, "free or add space; nothing was changed"
        elif "took longer" in error.cause:
            code, next_step = (
                Code.UNAVAILABLE,
                "defragment the source, raise clone_limit, or take snapshots another way",
            )
        elif "No such file" in error.cause:
            code, next_step = Code.NOT_FOUND, "check the path of the source"
        else:
            code, next_step = Code.UNSUPPORTED, 'have it on XFS or Btrfs, or write snapshot = "command" or "none"'
        cause = error.cause.replace("cp took", "it took")
        return BlockferryError(
            code, f"cannot clone {self.policy.source}", cause=cause, next=next_step, volume=self.name
        )

    async def unmake(self, path: str, environment: Mapping[str, str]) -> None:
        if not _is_ours(Path(path), self.name):
            return
        try:
            await in_thread(disk.unlink, Path(path))
        except OSError as error:
            raise from_os_error(error, f"cannot remove {path}", volume=self.name) from error

    async def strays(self, known: Collection[str]) -> list[Path]:
        return await in_thread(self._strays, known)

    def _strays(self, known: Collection[str]) -> list[Path]:
        found = []
        try:
            for path in sorted(self.place.iterdir()):
                if _is_ours(path, self.name) and str(path) not in known and stat.S_ISREG(path.lstat().st_mode):
                    disk.unlink(path)
                    found.append(path)
        except OSError:
            # There are none, or the next attempt to take one says what is wrong.
            return found
        return found


class Commands(Method):
    """Whatever the hooks make: the snapshot hook prints where it is."""

    @property
    def place(self) -> Path | None:
        source = path_of(self.policy.source)
        return self.policy.snapshot_dir or (source.parent if source is not None and source.is_file() else None)

    def path_for(self, commit_id: str) -> str:
        return ""

    async def make(self, path: str, environment: Mapping[str, str]) -> str:
        words, seconds = self.policy.hooks.snapshot, self.policy.hook_timeout
        said = (await run_hook("snapshot", words, environment, seconds, self.name)).split("\n")
        lines = [line.strip() for line in said if line.strip()]
        if len(lines) != 1 or not (
            lines[0].startswith(("/", "file://")) or is_nbd_uri(lines[0]) or is_address(lines[0])
        ):
            raise BlockferryError(
                Code.HOOK,
                f"{self.name}: the snapshot hook failed",
                cause=f"it printed {lines[-1][:100]!r} last, of {len(lines)} lines" if lines else "it printed nothing",
                next="have it print one line on standard output: the absolute path or the URI of the snapshot",
                volume=self.name,
            )
        return lines[0]

    async def unmake(self, path: str, environment: Mapping[str, str]) -> None:
        words = self.policy.hooks.remove
        if words:
            await run_hook("remove", words, environment, self.policy.hook_timeout, self.name)


def path_of(uri: str) -> Path | None:
    """The file that a volume's URI names, if it names one."""
    if uri.startswith("file://"):
        return Path(unquote(urlsplit(uri).path))
    return Path(uri) if uri.startswith("/") else None


def _is_ours(path: Path, policy: str) -> bool:
    """Whether a file has the name of a snapshot of this policy: nothing else is ever removed."""
    return re.fullmatch(rf"{_PREFIX}{re.escape(policy)}-[0-9a-f]{{32}}{re.escape(_SUFFIX)}", path.name) is not None


def _seal(path: Path) -> None:
    """Make a clone read-only. One that a power failure takes away is no base, and costs a comparison of everything."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        disk.set_mode(fd, 0o400)
    finally:
        os.close(fd)
