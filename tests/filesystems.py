"""Real file systems to test on: the temporary directory's own, tmpfs, and loop-mounted XFS, ext4 and Btrfs.

Loop mounts need root, loop devices and the mkfs programs; without them `Unavailable` says what is missing, and tests
skip with that reason.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

MOUNTED = ("xfs", "ext4", "btrfs")
KINDS = ("temporary", "tmpfs", *MOUNTED)

_BLOCK_OPTIONS = {"xfs": ["-b", "size=4096"], "ext4": ["-b", "4096"], "btrfs": ["-s", "4096"]}
"""Blocks of 4 KiB everywhere, so that tests can say exactly what is allocated; ext4 would choose 1 KiB."""

CLONING = frozenset({"xfs", "btrfs"})
"""Kinds whose files can share extents."""

IMAGE_SIZE = 320 * 1024 * 1024
"""Bytes of the sparse backing file: a little more than the least that mkfs.xfs accepts (300 MiB)."""


class Unavailable(Exception):
    """This machine cannot provide the file system; the text says why."""


@contextlib.contextmanager
def mounted(kind: str, directory: Path, size: int = IMAGE_SIZE) -> Iterator[Path]:
    """Make a file system of `kind` (one of `MOUNTED`) in a sparse file in `directory` and mount it there."""
    if os.geteuid() != 0:
        raise Unavailable(f"mounting {kind} needs root")
    maker = shutil.which(f"mkfs.{kind}")
    if maker is None:
        raise Unavailable(f"mkfs.{kind} is not installed")
    image, mountpoint = directory / f"{kind}.img", directory / kind
    image.touch()
    os.truncate(image, size)
    subprocess.run([maker, "-q", *_BLOCK_OPTIONS[kind], str(image)], check=True, capture_output=True)
    mountpoint.mkdir()
    done = subprocess.run(["mount", "-o", "loop", str(image), str(mountpoint)], capture_output=True, text=True)
    if done.returncode != 0:
        raise Unavailable(f"cannot loop-mount {kind}: {done.stderr.strip()}")
    try:
        yield mountpoint
    finally:
        done = subprocess.run(["umount", str(mountpoint)], capture_output=True, text=True)
        if done.returncode != 0:
            # Out of the way all the same, and loudly: something still holds a file open.
            subprocess.run(["umount", "--lazy", str(mountpoint)], check=True, capture_output=True)
            raise RuntimeError(f"cannot unmount {kind}: {done.stderr.strip()}")
        image.unlink()


@contextlib.contextmanager
def provided(kind: str, directory: Path) -> Iterator[Path]:
    """A directory on a file system of `kind` (one of `KINDS`); `directory` holds whatever is needed for it."""
    if kind in MOUNTED:
        with mounted(kind, directory) as mountpoint:
            yield mountpoint
    elif kind == "tmpfs":
        shared = Path("/dev/shm")
        if not shared.is_mount() or not os.access(shared, os.W_OK):
            raise Unavailable("/dev/shm is not a writable tmpfs")
        with tempfile.TemporaryDirectory(dir=shared) as name:
            yield Path(name)
    else:
        yield directory


class FileSystems:
    """One file system of each kind for a whole test session, made when it is first asked for."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._stack = contextlib.ExitStack()
        self._found: dict[str, Path | Unavailable] = {}

    def directory(self, kind: str) -> Path:
        """Where the file system of `kind` is mounted, or `Unavailable`."""
        if kind not in self._found:
            home = self._directory / f"fs-{kind}"
            home.mkdir()
            try:
                self._found[kind] = self._stack.enter_context(provided(kind, home))
            except Unavailable as error:
                self._found[kind] = error
        found = self._found[kind]
        if isinstance(found, Unavailable):
            raise found
        return found

    def close(self) -> None:
        """Unmount everything."""
        self._stack.close()
