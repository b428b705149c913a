"""The tests of NBD run twice: the transports of asyncio and uvloop differ in when they do what."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import uvloop


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """For the tests of this directory."""
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
