"""Fixtures of the unit tests: no servers, no network, and no I/O beyond temporary directories."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from blockferry.server.store import Store
from hypothesis import settings

from tests.filesystems import KINDS, FileSystems, Unavailable
from tests.unit import stores
from tests.unit.stores import REGION, clones_on

# Shared runners are slow at random: what a test proves is never a time.
settings.register_profile("unit", deadline=None, print_blob=True)
settings.load_profile("unit")

Place = Callable[[str], Path]
"""A new empty directory on a file system of the kind named."""


@pytest.fixture
def place(file_systems: FileSystems) -> Iterator[Place]:
    """Makes directories on file systems by kind; skips where this machine has none of that kind."""
    made: list[Path] = []

    def make(kind: str) -> Path:
        try:
            directory = file_systems.directory(kind) / uuid.uuid4().hex
        except Unavailable as error:
            pytest.skip(str(error))
        directory.mkdir()
        made.append(directory)
        return directory

    yield make
    for directory in made:
        shutil.rmtree(directory)


@pytest.fixture(params=KINDS)
def directory(request: pytest.FixtureRequest, place: Place) -> Path:
    """An empty directory, on every kind of file system in turn."""
    return place(str(request.param))


@pytest.fixture(params=stores.KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def home(place: Place, kind: str) -> Path:
    """An empty directory for replicas on a file system of this kind."""
    return place(kind)


@pytest.fixture
def store(home: Path, kind: str) -> Iterator[Store]:
    """A new replica."""
    made = Store.create(home / "db", REGION, clones=clones_on(kind))
    yield made
    made.abandon()


@pytest_asyncio.fixture(params=["ext4", "xfs"])
async def reserving(request: pytest.FixtureRequest, place: Place) -> AsyncIterator[Store]:
    """A new replica with a journal, on a file system that tells what is reserved from what is written."""
    made = Store.create(place(str(request.param)) / "db", REGION, clones=False)
    yield made
    made.abandon()
