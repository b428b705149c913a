"""Fixtures: a file system that can clone, servers in processes of their own, names nobody else uses."""

from __future__ import annotations

import itertools
import os
import subprocess
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

from tests.filesystems import FileSystems, Unavailable, mounted
from tests.images import MIB
from tests.skips import (  # noqa: F401 hooks of pytest
    pytest_collectreport,
    pytest_runtest_logreport,
    pytest_sessionfinish,
    pytest_terminal_summary,
)
from tests.support import Server

XFS_SIZE = 4096 * MIB
"""Bytes of the mounted file system; its backing file is sparse."""

EXT4_SIZE = 1024 * MIB
"""Bytes of the mounted file system that cannot clone; its backing file is sparse."""

LOG_SHOWN = 4000
"""Characters of a server's log shown with a failure."""

_numbers = itertools.count(1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the log of every running server with a failed test."""
    report = yield
    if report.failed:
        for server in Server.running:
            report.sections.append((f"log of server {server.pid}", server.log.read_text()[-LOG_SHOWN:]))
    return report


@pytest.fixture(scope="session", autouse=True)
def _own_state_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Commit ids of test runs stay out of the home directory of whoever runs them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="session")
def file_systems(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FileSystems]:
    """One file system of each kind, mounted when first used."""
    found = FileSystems(tmp_path_factory.mktemp("file-systems"))
    yield found
    found.close()


@pytest.fixture(scope="session")
def xfs_mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path | str]:
    """A mounted XFS with reflinks, or the reason why there is none."""
    if os.geteuid() != 0:
        yield "mounting XFS needs root"
        return
    base = tmp_path_factory.mktemp("xfs")
    image, mount = base / "disk.img", base / "mount"
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(XFS_SIZE)
    for words in (
        ["mkfs.xfs", "-q", "-m", "reflink=1", str(image)],
        ["mount", "-o", "loop", str(image), str(mount)],
    ):
        try:
            done = subprocess.run(words, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            yield f"{words[0]} is not installed"
            return
        if done.returncode:
            yield f"{' '.join(words)}: {done.stderr.strip()}"
            return
    try:
        yield mount
    finally:
        # Detaches the loop device too: mount made it.
        subprocess.run(["umount", str(mount)], check=True)
        image.unlink()


@pytest.fixture(scope="session")
def xfs_pool_root(xfs_mount: Path | str) -> Path:
    """A directory on a file system that clones files. Skips, saying why, where there is none."""
    if isinstance(xfs_mount, str):
        pytest.skip(f"no file system with reflinks: {xfs_mount}")
    return xfs_mount


@pytest.fixture(scope="session")
def ext4_pool_root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory on a file system that cannot clone files: pools in it keep journals. Skips, saying why, where there
    is none."""
    try:
        with mounted("ext4", tmp_path_factory.mktemp("ext4"), EXT4_SIZE) as mount:
            yield mount
    except Unavailable as error:
        pytest.skip(f"no ext4: {error}")


@pytest.fixture(scope="session")
def pool_root(xfs_mount: Path | str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where pools live: on XFS if it can be mounted, else wherever temporary files are."""
    if isinstance(xfs_mount, str):
        print(f"pools are on a file system that may not clone: {xfs_mount}")
        return tmp_path_factory.mktemp("pools")
    return xfs_mount


ServerFactory = Callable[..., Server]


def _factory(root: Path) -> Iterator[ServerFactory]:
    servers: list[Server] = []

    def start(*, flags: tuple[str, ...] = (), listen: str = "grpc://127.0.0.1:0") -> Server:
        pool = root / f"pool-{next(_numbers)}"
        pool.mkdir()
        servers.append(Server(pool, flags=flags, listen=listen))
        return servers[-1].start()

    try:
        yield start
    finally:
        for server in servers:
            server.stop()


@pytest.fixture
def start_server(pool_root: Path) -> Iterator[ServerFactory]:
    """Starts servers of this test alone, each with a pool of its own; all are stopped at its end."""
    yield from _factory(pool_root)


@pytest.fixture
def start_cloning_server(xfs_pool_root: Path) -> Iterator[ServerFactory]:
    """As `start_server`, on pools that can clone: a committed generation outlives whatever happens to an update."""
    yield from _factory(xfs_pool_root)


@pytest.fixture(scope="module")
def server(pool_root: Path) -> Iterator[Server]:
    """A server shared by the tests of a module. Tests use volumes of their own (`volume`)."""
    for start in _factory(pool_root):
        yield start()


@pytest.fixture
def volume() -> str:
    """A volume name that no other test uses."""
    return f"volume-{next(_numbers)}"
