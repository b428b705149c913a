"""Other processes that hold files, so that tests see what another program does to a volume."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.filesystems import Unavailable

_HOLD = "import os, sys; os.open(sys.argv[1], int(sys.argv[2])); print('open', flush=True); sys.stdin.read()"


@contextlib.contextmanager
def holding(path: Path, flags: int) -> Iterator[int]:
    """Another process has `path` open with `flags` (of os.open); gives its process id."""
    with subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(path), str(flags)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            assert process.stdout.readline() == b"open\n"
            yield process.pid
        finally:
            process.stdin.close()


@contextlib.contextmanager
def loop_device(path: Path, *options: str) -> Iterator[str]:
    """A loop device over `path`, or `Unavailable`; gives its name. Options are those of losetup."""
    if os.geteuid() != 0:
        raise Unavailable("loop devices need root")
    if shutil.which("losetup") is None:
        raise Unavailable("losetup is not installed")
    done = subprocess.run(["losetup", "--find", "--show", *options, str(path)], capture_output=True, text=True)
    if done.returncode != 0:
        raise Unavailable(f"cannot set up a loop device: {done.stderr.strip()}")
    device = done.stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=True, capture_output=True)
