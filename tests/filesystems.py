"""Real file systems to test on: the temporary directory's own, tmpfs, loop-mounted XFS, ext4 and Btrfs,
and ext4 through FUSE.

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

MUTE = "fuse2fs"
"""A file system that does not tell holes from data: all of a file is data to SEEK_DATA, as on NFS before version 4.2
and on most of FUSE. Not one of `KINDS`, which do."""

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
    """A directory on a file system of `kind` (one of `KINDS`, or `MUTE`); `directory` holds whatever is needed for
    it."""
    if kind in MOUNTED:
        with mounted(kind, directory) as mountpoint:
            yield mountpoint
    elif kind == MUTE:
        with _mute(directory) as mountpoint:
            yield mountpoint
    elif kind == "tmpfs":
        shared = Path("/dev/shm")
        if not shared.is_mount() or not os.access(shared, os.W_OK):
            raise Unavailable("/dev/shm is not a writable tmpfs")
        with tempfile.TemporaryDirectory(dir=shared) as name:
            yield Path(name)
    else:
        yield directory


@contextlib.contextmanager
def _mute(directory: Path) -> Iterator[Path]:
    """ext4 as a process of its own, which has no SEEK_DATA."""
    if shutil.which("fuse2fs") is None or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        raise Unavailable("fuse2fs or /dev/fuse is not there")
    image, mountpoint = directory / "mute.img", directory / MUTE
    mountpoint.mkdir()
    image.touch()
    os.truncate(image, IMAGE_SIZE)
    subprocess.run(["mkfs.ext4", "-q", *_BLOCK_OPTIONS["ext4"], str(image)], check=True, capture_output=True)
    done = subprocess.run(["fuse2fs", "-o", "rw,fakeroot", str(image), str(mountpoint)], capture_output=True, text=True)
    if done.returncode != 0:
        raise Unavailable(f"cannot mount through FUSE: {done.stderr.strip()}")
    try:
        yield mountpoint
    finally:
        subprocess.run(["umount", str(mountpoint)], check=True, capture_output=True)
        image.unlink()


def allocate_exactly(directory: Path) -> None:
    """Have XFS allocate, for what will be written to clones in a directory, what is written and no more; nothing on any
    other file system.

    By default it sets 128 KiB around such a write aside for later ones. What of that is a hole becomes data to
    SEEK_DATA as soon as its zeros are in the page cache, where reading ahead of a block beside it puts them: 16 KiB at
    first. So how many bytes are read again while an update is under way depends on what was read before, and when
    (`tests/unit/test_image.py` shows it). Nothing but that depends on it, and setting space aside keeps clones from
    falling to pieces: pools are left as they are.
    """
    kind = subprocess.run(["stat", "-f", "-c", "%T", str(directory)], capture_output=True, text=True, check=True)
    if kind.stdout.strip() == "xfs":
        subprocess.run(["xfs_io", "-c", "cowextsize 4096", str(directory)], check=True)


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
