"""What a power failure may leave behind: a recorder of every change to files, and a weak model of a file system.

The recorder stands in for the functions of `common/disk.py` and for fallocate and reflink in `common/linux.py`. It
carries the operations out and notes them. The model is as weak as a file system may be:

- what was done to a file since its last fsync survives in any subset, an append also torn or as its size alone;
- what was done to names in a directory since its last fsync survives up to any moment, each directory by itself;
- a rename is atomic; nothing else orders data and names but fsync.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import fcntl
import os
import random
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import pytest
from blockferry.common import disk, linux
from blockferry.common.digests import Data
from blockferry.common.volumes import volume
from blockferry.server.cache import Stamp
from blockferry.server.rehydrate import primary

P = ParamSpec("P")
T = TypeVar("T")

ROOT = 0
"""The node of the directory everything happens in; it exists durably."""

_TRAMPOLINES = {"disk.py", "volume.py"}
_SOURCES = f"{os.sep}blockferry{os.sep}"


class Killed(BaseException):
    """The process died here. Not an Exception: nobody may survive it."""


@dataclass(frozen=True)
class Call:
    """Who flushed: `site` is FILE:LINE of the flush itself; `purpose` the functions above it, innermost first."""

    site: str
    purpose: str


@dataclass(frozen=True)
class Write:
    """Bytes written to a file."""

    file: int
    offset: int
    data: bytes


@dataclass(frozen=True)
class Resize:
    """A file truncated or extended."""

    file: int
    size: int


@dataclass(frozen=True)
class Zero:
    """A hole punched, or a range zeroed; the size stays."""

    file: int
    offset: int
    length: int


@dataclass(frozen=True)
class Clone:
    """A file that took over all extents of another, which held `content`."""

    file: int
    content: bytes


@dataclass(frozen=True)
class Name:
    """A name created, or removed where `node` is None."""

    directory: int
    name: str
    node: int | None
    is_directory: bool = False


@dataclass(frozen=True)
class Rename:
    """A name moved over another one in the same directory."""

    directory: int
    source: str
    target: str


@dataclass(frozen=True)
class FlushFile:
    """fsync of a file."""

    file: int
    call: Call


@dataclass(frozen=True)
class FlushNames:
    """fsync of a directory."""

    directory: int
    call: Call


@dataclass(frozen=True)
class Mark:
    """Something a test wants to know about this moment: a promise made, or about to be made."""

    what: Any


Change = Write | Resize | Zero | Clone
Operation = Change | Name | Rename | FlushFile | FlushNames | Mark


def _caller() -> Call:
    """The chain of blockferry's functions that led to a flush."""
    frame: types.FrameType | None = sys._getframe(2)
    site, names = "", []
    while frame is not None:
        name = os.path.basename(frame.f_code.co_filename)
        if _SOURCES in frame.f_code.co_filename and name not in _TRAMPOLINES:
            site = site or f"{name}:{frame.f_lineno}"
            names.append(f"{name}:{frame.f_code.co_name}")
        frame = frame.f_back
    return Call(site, " < ".join(names))


class _Inline(concurrent.futures.Executor):
    """Runs everything at once: the order of operations is the same in every run, and the stack shows who asked."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> concurrent.futures.Future[T]:
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)
        return future


class Recorder:
    """Carries out and notes what happens below `root`. `doomed` says before which operation the process dies."""

    def __init__(self, root: Path, doomed: Callable[[Operation], bool] = lambda operation: False) -> None:
        self.log: list[Operation] = []
        self.dead = False
        self._doomed = doomed
        self._nodes = {root.stat().st_ino: ROOT}
        self._held: list[int] = []

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Stand in for the disk."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(volume, "_executor", _Inline())
            for name in _FUNCTIONS:
                patch.setattr(disk, name, getattr(self, "_" + name))
            patch.setattr(linux, "fallocate", self._fallocate)
            patch.setattr(linux, "reflink", self._reflink)
            patch.setattr(Stamp, "of", classmethod(lambda cls, path: self._stamp(path)))
            patch.setattr(primary, "file_identity", lambda fd: f"file:{self._node(fd)}")
            try:
                yield
            finally:
                for fd in self._held:
                    os.close(fd)

    def mark(self, what: object) -> None:
        """Note a promise."""
        self.log.append(Mark(what))

    def revive(self) -> None:
        """A new process takes over; it does not die again."""
        self.dead = False
        self._doomed = lambda operation: False

    def _note(self, operation: Operation) -> None:
        if self.dead or self._doomed(operation):
            self.dead = True
            raise Killed(repr(operation)[:100])
        self.log.append(operation)

    def _node(self, fd: int) -> int:
        return self._nodes[os.fstat(fd).st_ino]

    def _directory(self, path: Path) -> int:
        return self._nodes[path.stat().st_ino]

    def _adopt(self, path: Path) -> int:
        """Number a new node. It is held open, so that its inode is not used again."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._held.append(fd)
        node = len(self._nodes)
        self._nodes[os.fstat(fd).st_ino] = node
        return node

    def _stamp(self, path: Path) -> Stamp:
        info = path.stat()
        node = self._nodes[info.st_ino]
        changes = [index for index, one in enumerate(self.log) if isinstance(one, Change) and one.file == node]
        return Stamp(node, info.st_size, changes[-1] if changes else -1)

    # --- the functions of disk.py and linux.py ---------------------------------------------------------------------

    def _create(self, path: Path, flags: int = os.O_RDWR) -> int:
        if path.exists():
            if flags & os.O_TRUNC:
                self._note(Resize(self._directory(path), 0))
            return _disk["create"](path, flags)  # type: ignore[no-any-return]
        directory = self._directory(path.parent)
        self._note(Name(directory, path.name, len(self._nodes)))
        fd: int = _disk["create"](path, flags)
        self._adopt(path)
        return fd

    def _make_directory(self, path: Path) -> None:
        self._note(Name(self._directory(path.parent), path.name, len(self._nodes), is_directory=True))
        _disk["make_directory"](path)
        self._adopt(path)

    def _pwrite(self, fd: int, data: Data, offset: int) -> int:
        self._note(Write(self._node(fd), offset, bytes(data)))
        assert os.pwrite(fd, data, offset) == len(data)
        return len(data)

    def _append(self, fd: int, data: Data) -> int:
        appending = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_APPEND
        offset = os.fstat(fd).st_size if appending else os.lseek(fd, 0, os.SEEK_CUR)
        self._note(Write(self._node(fd), offset, bytes(data)))
        assert os.write(fd, data) == len(data)
        return len(data)

    def _truncate(self, fd: int, size: int) -> None:
        if os.fstat(fd).st_size != size:
            self._note(Resize(self._node(fd), size))
            os.ftruncate(fd, size)

    def _fsync(self, fd: int) -> None:
        self._note(FlushFile(self._node(fd), _caller()))

    def _fsync_directory(self, path: Path) -> None:
        node = self._nodes.get(path.stat().st_ino)
        if node is not None:
            self._note(FlushNames(node, _caller()))

    def _rename(self, source: Path, target: Path) -> None:
        assert source.parent == target.parent, "a move between directories is not in the model"
        self._note(Rename(self._directory(source.parent), source.name, target.name))
        os.replace(source, target)

    def _link(self, source: Path, target: Path) -> None:
        self._note(Name(self._directory(target.parent), target.name, self._nodes[source.stat().st_ino]))
        os.link(source, target)

    def _unlink(self, path: Path) -> None:
        if path.exists():
            self._note(Name(self._directory(path.parent), path.name, None))
            path.unlink()

    def _fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        # Any other mode that we use makes zeros and keeps the size.
        if mode != linux.RESERVE:
            self._note(Zero(self._node(fd), offset, length))
        _fallocate(fd, mode, offset, length)

    def _reflink(self, source_fd: int, target_fd: int) -> None:
        content = os.pread(source_fd, os.fstat(source_fd).st_size, 0)
        self._note(Clone(self._node(target_fd), content))
        os.pwrite(target_fd, content, 0)


_FUNCTIONS = (
    "create", "make_directory", "pwrite", "append", "truncate", "fsync", "fsync_directory", "rename", "link",
    "unlink",
)  # fmt: skip
_disk: dict[str, Callable[..., Any]] = {name: getattr(disk, name) for name in ("create", "make_directory")}
_fallocate = linux.fallocate


@contextlib.contextmanager
def on_a_state(stamps: dict[int, Stamp]) -> Iterator[None]:
    """Run blockferry on a materialised state: nothing is flushed, clones are copies, and inodes and change times are
    those of the model (`stamps` by real inode)."""

    def of(path: Path) -> Stamp:
        info = path.stat()
        return stamps.get(info.st_ino) or Stamp(-info.st_ino, info.st_size, info.st_ctime_ns)

    def identity(fd: int) -> str:
        inode = os.fstat(fd).st_ino
        return f"file:{stamps[inode].inode if inode in stamps else -inode}"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(volume, "_executor", _Inline())
        patch.setattr(disk, "fsync", lambda fd: None)
        patch.setattr(disk, "fsync_directory", lambda path: None)
        patch.setattr(linux, "reflink", lambda one, other: os.sendfile(other, one, 0, os.fstat(one).st_size))
        patch.setattr(Stamp, "of", classmethod(lambda cls, path: of(path)))
        patch.setattr(primary, "file_identity", identity)
        yield


# --- the model ------------------------------------------------------------------------------------------------------

_LOST, _WHOLE, _TORN, _SIZE_ONLY = range(4)


@dataclass
class _File:
    durable: bytes = b""
    changed: int = -1
    """Number of the operation that last changed it durably: stands for its change time."""
    pending: list[tuple[int, Change]] = field(default_factory=list)
    flushes: int = 0


@dataclass
class _Directory:
    durable: dict[str, int] = field(default_factory=dict)
    pending: list[Name | Rename] = field(default_factory=list)
    flushes: int = 0

    def after(self, count: int) -> dict[str, int]:
        """The names once the first `count` pending operations have reached the disk."""
        names = dict(self.durable)
        for operation in self.pending[:count]:
            if isinstance(operation, Rename):
                names[operation.target] = names.pop(operation.source)
            elif operation.node is None:
                del names[operation.name]
            else:
                names[operation.name] = operation.node
        return names


Choice = tuple[dict[int, int], dict[int, tuple[int, ...]]]
"""How much of each directory and of each file reached the disk."""


class FileSystem:
    """Takes operations one by one; `states` are what a power failure may leave at this moment."""

    def __init__(self) -> None:
        self._files: dict[int, _File] = {}
        self._directories = {ROOT: _Directory()}
        self._count = 0

    def take(self, operation: Operation, *, flushed: bool = True) -> None:
        """The next operation. `flushed` False: the flush never happened."""
        self._count += 1
        match operation:
            case Write() | Resize() | Zero() | Clone():
                self._file(operation.file).pending.append((self._count - 1, operation))
            case Name() | Rename():
                self._names(operation.directory).pending.append(operation)
                if isinstance(operation, Name) and operation.is_directory and operation.node is not None:
                    self._names(operation.node)
            case FlushFile() if flushed:
                file = self._file(operation.file)
                fates = (_WHOLE,) * len(file.pending)
                file.durable, file.changed = _content(file, fates)
                file.pending.clear()
                file.flushes += 1
            case FlushNames() if flushed:
                directory = self._names(operation.directory)
                directory.durable = directory.after(len(directory.pending))
                directory.pending.clear()
                directory.flushes += 1

    def _file(self, node: int) -> _File:
        return self._files.setdefault(node, _File())

    def _names(self, node: int) -> _Directory:
        return self._directories.setdefault(node, _Directory())

    def states(self, rng: random.Random, samples: int, seen: set[object]) -> Iterator[State]:
        """Everything or nothing of names and data, and `samples` random mixtures; those `seen` before are left out."""
        choices = [self._uniform(names, data) for names in (True, False) for data in (True, False)]
        choices += [self._mixture(rng) for _ in range(samples)]
        for names, fates in choices:
            state = State(self, names, fates)
            if state.key not in seen:
                seen.add(state.key)
                yield state

    def _uniform(self, names: bool, data: bool) -> Choice:
        return (
            {node: len(one.pending) if names else 0 for node, one in self._directories.items()},
            {node: (_WHOLE if data else _LOST,) * len(one.pending) for node, one in self._files.items()},
        )

    def _mixture(self, rng: random.Random) -> Choice:
        weights = rng.choice(((1, 1, 0, 0), (1, 8, 0, 0), (8, 1, 0, 0), (1, 1, 1, 1)))
        fates = {node: tuple(rng.choices(range(4), weights, k=len(one.pending))) for node, one in self._files.items()}
        # Each directory and each file may also have been lucky, or not.
        names = {
            node: rng.choice((0, len(one.pending), rng.randint(0, len(one.pending))))
            for node, one in self._directories.items()
        }
        for node, one in self._files.items():
            lucky = rng.random()
            if lucky < 0.5:
                fates[node] = ((_WHOLE if lucky < 0.25 else _LOST),) * len(one.pending)
        return names, fates


def _content(file: _File, fates: tuple[int, ...]) -> tuple[bytes, int]:
    """A file with those of its pending changes that reached the disk, and the last one of them."""
    content, changed = bytearray(file.durable), file.changed
    for fate, (number, change) in zip(fates, file.pending, strict=True):
        if fate == _LOST:
            continue
        changed = number
        match change:
            case Write(_, offset, data):
                end = offset + len(data)
                if fate == _SIZE_ONLY:
                    content.extend(bytes(max(0, end - len(content))))
                    continue
                if fate == _TORN:
                    data = data[: len(data) // 2]
                content.extend(bytes(max(0, offset - len(content))))
                content[offset : offset + len(data)] = data
            case Resize(_, size):
                del content[size:]
                content.extend(bytes(size - len(content)))
            case Zero(_, offset, length):
                length = min(length, len(content) - offset)
                if length > 0:
                    content[offset : offset + length] = bytes(length)
            case Clone(_, cloned):
                content[:] = cloned
    return bytes(content), changed


class State:
    """One thing a power failure may leave."""

    def __init__(self, system: FileSystem, names: dict[int, int], fates: dict[int, tuple[int, ...]]) -> None:
        self._system = system
        self._directories: dict[int, dict[str, int]] = {}
        self._fates: dict[int, tuple[int, ...]] = {}
        known: list[tuple[int, int, object]] = []
        left = [ROOT]
        while left:
            node = left.pop()
            directory = system._names(node)
            self._directories[node] = directory.after(names.get(node, 0))
            known.append((node, directory.flushes, names.get(node, 0)))
            for child in self._directories[node].values():
                if child in system._directories:
                    left.append(child)
                else:
                    file = system._file(child)
                    self._fates[child] = fates.get(child, ())
                    known.append((child, file.flushes, self._fates[child]))
        self.key = tuple(sorted(known, key=lambda one: one[0]))
        """Equal for equal states."""

    def materialise(self, target: Path) -> dict[int, Stamp]:
        """Build it in an empty directory; the stamps of its files by real inode."""
        stamps: dict[int, Stamp] = {}
        self._build(ROOT, target, stamps)
        return stamps

    def _build(self, node: int, target: Path, stamps: dict[int, Stamp]) -> None:
        for name, child in self._directories[node].items():
            path = target / name
            if child in self._directories:
                path.mkdir()
                self._build(child, path, stamps)
            else:
                content, changed = _content(self._system._file(child), self._fates[child])
                path.write_bytes(content)
                stamps[path.stat().st_ino] = Stamp(child, len(content), changed)
