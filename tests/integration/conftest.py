"""A replica driven by a client that knows only what the server describes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

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
