"""A replica driven by a client that knows only what the server describes, and a place for backing files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.filesystems import FileSystems, Unavailable
from tests.reflected import Driven, Reflected, open_session
from tests.support import Server


@pytest.fixture
def generic(server: Server) -> Iterator[Reflected]:
    """A client that has learned everything from the server."""
    client = Reflected(server.address.removeprefix("grpc://"))
    yield client
    client.close()


@pytest.fixture
def driven(generic: Reflected, server: Server, volume: str) -> Driven:
    """A replica with an open session and nothing committed."""
    return open_session(generic, server, volume)


@pytest.fixture
def backing(file_systems: FileSystems, volume: str) -> Iterator[Path]:
    """The name of a file on ext4 that a test may make."""
    try:
        path = file_systems.directory("ext4") / volume
    except Unavailable as error:
        pytest.skip(str(error))
    yield path
    path.unlink(missing_ok=True)
