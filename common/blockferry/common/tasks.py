"""Named tasks of a program that runs for years: none ends unseen, and all end when it does.

A *service* is to run as long as the program: if it ends by itself, that is an incident, and the program had better be
started anew. *Work* may end; if it does so with an exception, that is an incident, too, but only its own. The end has
two phases: work may finish within a time, then everything is cancelled, within another.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import structlog

log = structlog.get_logger("blockferry.tasks")

Incident = Callable[[str, BaseException | None], None]
"""Is told the name of a task that has ended by surprise, and why, if there is a why."""


def _no_more(name: str, error: BaseException | None) -> None:
    """The log has it already."""


class Supervisor:
    """Keeps the tasks of a program."""

    def __init__(self, on_incident: Incident = _no_more) -> None:
        self._on_incident = on_incident
        self._services: set[asyncio.Task[Any]] = set()
        self._work: set[asyncio.Task[Any]] = set()
        self._ending = False
        self.failed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Done once a service has ended by itself, with its name."""

    def service(self, name: str, task: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run something that never ends."""
        return self._start(self._services, name, task)

    def work(self, name: str, task: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run something that ends."""
        return self._start(self._work, name, task)

    def names(self) -> list[str]:
        """Of the work that is not done."""
        return sorted(task.get_name() for task in self._work)

    async def drain(self, seconds: float) -> list[str]:
        """Let work end by itself; the names of what has not."""
        if self._work:
            await asyncio.wait(self._work, timeout=seconds)
        return self.names()

    async def cancel(self, seconds: float) -> list[str]:
        """Cancel everything; the names of what has not ended even so, which the end of the process takes with it."""
        self._ending = True
        left = self._work | self._services
        for task in left:
            task.cancel()
        if left:
            _, left = await asyncio.wait(left, timeout=seconds)
        for task in left:
            log.error("task does not end", task=task.get_name(), seconds=seconds)
        return sorted(task.get_name() for task in left)

    def _start(self, kind: set[asyncio.Task[Any]], name: str, task: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        started = asyncio.create_task(task, name=name)
        kind.add(started)
        started.add_done_callback(self._ended)
        return started

    def _ended(self, task: asyncio.Task[Any]) -> None:
        surprising = task in self._services and not self._ending
        self._services.discard(task)
        self._work.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is None and not surprising:
            return
        log.error("task ended by surprise", task=task.get_name(), exc_info=error)
        if surprising and not self.failed.done():
            self.failed.set_result(task.get_name())
        self._on_incident(task.get_name(), error)
