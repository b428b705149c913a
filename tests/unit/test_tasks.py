"""Tasks that are kept: what ends by surprise is told, and everything ends in time."""

from __future__ import annotations

import asyncio

from blockferry.common.tasks import Supervisor


class Incidents:
    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []

    def __call__(self, name: str, error: BaseException | None) -> None:
        self.told.append((name, repr(error)))


async def _for_ever() -> None:
    await asyncio.Event().wait()


async def _fail() -> None:
    raise ValueError("no")


async def _nothing() -> None:
    pass


async def test_work_may_end_and_its_exceptions_are_its_own() -> None:
    incidents = Incidents()
    supervisor = Supervisor(incidents)
    supervisor.work("good", _nothing())
    supervisor.work("bad", _fail())
    supervisor.work("cancelled", _for_ever()).cancel()
    assert await supervisor.drain(10.0) == []
    assert incidents.told == [("bad", "ValueError('no')")]
    assert not supervisor.failed.done()


async def test_a_service_that_ends_is_an_incident_whatever_the_way() -> None:
    for ends, error in ((_nothing, "None"), (_fail, "ValueError('no')")):
        incidents = Incidents()
        supervisor = Supervisor(incidents)
        supervisor.service("watch", ends())
        assert await supervisor.failed == "watch"
        assert incidents.told == [("watch", error)]


async def test_a_service_that_somebody_cancels_has_ended_by_surprise() -> None:
    supervisor = Supervisor()
    supervisor.service("watch", _for_ever()).cancel()
    assert await supervisor.failed == "watch"


async def test_the_end_has_two_phases() -> None:
    incidents = Incidents()
    supervisor = Supervisor(incidents)
    may_end = asyncio.Event()
    stubborn_may_end = asyncio.Event()
    cleaned: list[str] = []

    async def clean() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cleaned.append("clean")

    async def stubborn() -> None:
        while not stubborn_may_end.is_set():
            try:
                await stubborn_may_end.wait()
            except asyncio.CancelledError:
                continue

    supervisor.service("service", _for_ever())
    supervisor.work("short", _wait_for(may_end))
    supervisor.work("long", clean())
    supervisor.work("stubborn", stubborn())
    await asyncio.sleep(0)
    assert supervisor.names() == ["long", "short", "stubborn"]
    may_end.set()
    assert await supervisor.drain(0.05) == ["long", "stubborn"]
    assert await supervisor.cancel(0.05) == ["stubborn"]
    assert cleaned == ["clean"]
    assert not supervisor.failed.done() and incidents.told == []
    stubborn_may_end.set()
    await asyncio.sleep(0)


async def _wait_for(event: asyncio.Event) -> None:
    await event.wait()


async def test_nothing_to_end() -> None:
    supervisor = Supervisor()
    assert await supervisor.drain(0.0) == []
    assert await supervisor.cancel(0.0) == []
