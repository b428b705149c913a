"""A store in a directory: `file:///DIRECTORY`.

An object is written under a name in `.incoming`, flushed, and given its key by link(2), which replaces nothing; then
the directory is flushed. So an object that has its key is whole and durable, whatever happens at any instant.
(obstore's local store flushes nothing.) A writer holds a lock on what it writes: what nobody holds was left by one that
died.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from blockferry.common import disk
from blockferry.common.archive.store import Entry, ObjectStore, check_key, check_prefix, exists, missing, too_short
from blockferry.common.digests import Data
from blockferry.common.durable import make_directories
from blockferry.common.errors import BlockferryError, Code, from_os_error
from blockferry.common.volumes.volume import in_thread

INCOMING = ".incoming"
"""Where objects are while they are written; keys never begin with a dot."""


class DirectoryStore(ObjectStore):
    """Open one with `DirectoryStore.open`."""

    def __init__(self, root: Path) -> None:
        self.uri = f"file://{root}"
        self._root = root
        self._swept = False

    @classmethod
    async def open(cls, root: Path) -> DirectoryStore:
        """Raises NOT_FOUND where there is no such directory: it may be one that should be mounted."""
        try:
            found = await in_thread(root.is_dir)
        except OSError as error:
            raise from_os_error(error, f"cannot open the store file://{root}") from error
        if not found:
            raise BlockferryError(
                Code.NOT_FOUND,
                f"there is no store file://{root}",
                cause="it is not a directory",
                next="make it, or mount what should be there",
            )
        return cls(root)

    async def put_new(self, key: str, parts: Sequence[Data]) -> None:
        await in_thread(self._write, key, parts, self._link)

    async def put(self, key: str, data: Data) -> None:
        await in_thread(self._write, key, [data], disk.rename)

    def _write(self, key: str, parts: Sequence[Data], place: Callable[[Path, Path], None]) -> None:
        target = self._path(key)
        try:
            incoming = self._root / INCOMING
            make_directories(incoming)
            make_directories(target.parent)
            if not self._swept:
                self._swept = True
                _sweep(incoming)
            temporary, fd = _new_file(incoming)
            try:
                for part in parts:
                    view = memoryview(part).cast("B")
                    while view:
                        view = view[disk.append(fd, view) :]
                disk.fsync(fd)
                disk.crash_point("object-before-link")
                place(temporary, target)
                disk.crash_point("object-before-flush")
            finally:
                disk.unlink(temporary)
                os.close(fd)
            disk.fsync_directory(target.parent)
        except FileExistsError as error:
            raise exists(self.uri, key) from error
        except OSError as error:
            raise self._failed(error, "cannot write", key) from error

    def _link(self, source: Path, target: Path) -> None:
        # Whoever finds the key taken may rely on the object: its name is made durable for him, too.
        try:
            disk.link(source, target)
        except FileExistsError:
            disk.fsync_directory(target.parent)
            raise

    async def get(self, key: str) -> bytes:
        return await in_thread(self._read, key, 0, None)

    async def get_range(self, key: str, offset: int, length: int) -> bytes:
        return await in_thread(self._read, key, offset, length)

    def _read(self, key: str, offset: int, length: int | None) -> bytes:
        try:
            with self._path(key).open("rb", buffering=0) as file:
                wanted = os.fstat(file.fileno()).st_size - offset if length is None else length
                found = bytearray()
                while len(found) < wanted:
                    part = os.pread(file.fileno(), wanted - len(found), offset + len(found))
                    if not part:
                        raise too_short(self.uri, key, offset, wanted, len(found))
                    if len(part) == wanted:
                        return part
                    found += part
                return bytes(found)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise missing(self.uri, key) from error
        except OSError as error:
            raise self._failed(error, "cannot read", key) from error

    async def entries(self, prefix: str, *, after: str = "") -> AsyncIterator[Entry]:
        for entry in await in_thread(lambda: sorted(self._walk(check_prefix(prefix)), key=lambda one: one.key)):
            if entry.key > after:
                yield entry

    def _walk(self, prefix: str) -> Iterator[Entry]:
        try:
            with os.scandir(self._inside(prefix)) as found:
                for one in found:
                    if one.name.startswith("."):
                        continue
                    if one.is_dir(follow_symlinks=False):
                        yield from self._walk(f"{prefix}{one.name}/")
                    elif one.is_file(follow_symlinks=False):
                        info = one.stat(follow_symlinks=False)
                        yield Entry(prefix + one.name, info.st_size, datetime.fromtimestamp(info.st_mtime, UTC))
        except (FileNotFoundError, NotADirectoryError):
            # Of the directory, or of a file that was removed meanwhile.
            return
        except OSError as error:
            raise self._failed(error, "cannot list", prefix) from error

    async def delete(self, key: str) -> None:
        await in_thread(self._delete, key)

    def _delete(self, key: str) -> None:
        path = self._path(key)
        try:
            disk.unlink(path)
            disk.fsync_directory(path.parent)
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise self._failed(error, "cannot delete", key) from error

    def _path(self, key: str) -> Path:
        return self._inside(check_key(key))

    def _inside(self, name: str) -> Path:
        path = self._root / name
        for parent in list(path.parents)[: name.count("/")]:
            # A link would lead out of the store.
            if parent.is_symlink():
                raise BlockferryError(
                    Code.UNSUPPORTED,
                    f"{self.uri}: {name} is not used",
                    cause=f"{parent} is a symbolic link",
                    next="put the directory itself there",
                )
        return path

    def _failed(self, error: OSError, what: str, key: str) -> BlockferryError:
        return from_os_error(error, f"{self.uri}: {what} {key or 'what is there'}")


def _new_file(incoming: Path) -> tuple[Path, int]:
    while True:
        path = incoming / secrets.token_hex(16)
        fd = disk.create(path, os.O_WRONLY | os.O_EXCL)
        fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink:
            return path, fd
        # Somebody swept between the two calls.
        os.close(fd)


def _sweep(incoming: Path) -> None:
    """Remove what writers that died have left."""
    for path in incoming.iterdir():
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            disk.unlink(path)
        except BlockingIOError:
            pass
        finally:
            os.close(fd)
