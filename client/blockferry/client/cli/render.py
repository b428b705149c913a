"""What people see: progress, summaries and errors. stdout carries results only; everything else goes to stderr."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence

from blockferry.client.report import Phase, Progress
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.units import human_bytes

REFRESH_SECONDS = 0.1
PLAIN_SECONDS = 10.0
"""Without a terminal a line of progress every this often: silence worries people, and a log should not be flooded."""


def human_seconds(seconds: float) -> str:
    """Seconds as `0:42` or `3:05:07`."""
    whole = int(seconds + 0.5)
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of aligned columns; the first row is the heading."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _print(text: str) -> None:
    """Print on stdout at once, or raise OSError; what it did not take is then given up, and so is stdout."""
    if sys.stdout is None:
        # Python's answer to a closed descriptor, which print() takes for a place where nobody listens.
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    try:
        print(text, flush=True)
    except OSError:
        # Python would try once more at its end, and fail with a traceback.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        raise


class Console:
    """Where a command's words go. With `json` stdout carries one object; `quiet` leaves only results and errors."""

    def __init__(self, *, json: bool, quiet: bool) -> None:
        self.json = json
        self.quiet = quiet

    def result(self, report: Mapping[str, object], lines: Sequence[str]) -> None:
        """Print a result: the report as JSON, or its lines for people. Raises IO_ERROR if stdout does not take it."""
        if not self.json and self.quiet:
            return
        try:
            _print(json.dumps(report) if self.json else "\n".join(lines))
        except OSError as error:
            raise BlockferryError(
                Code.IO_ERROR,
                "cannot print the result",
                cause=f"standard output: {os.strerror(error.errno).lower() if error.errno else error}",
                next="what was asked for is done and only its report is lost; run it again to see one",
            ) from error

    def warning(self, text: str) -> None:
        """One line on stderr about something that works, for now."""
        if not self.quiet:
            print(f"blockferry: warning: {text}", file=sys.stderr, flush=True)

    def error(self, error: BlockferryError) -> None:
        """One line on stderr, or one for each thing that is wrong; with `json` also the error object on stdout, if that
        takes it."""
        if self.json:
            # If it does not, the line below says all there is to say.
            with contextlib.suppress(OSError):
                _print(json.dumps({"error": error.fields()}))
        for line in error.lines():
            print(f"blockferry: {line}", file=sys.stderr, flush=True)

    @contextlib.asynccontextmanager
    async def showing(self, progress: Progress) -> AsyncIterator[None]:
        """Show progress while the body runs."""
        if self.quiet:
            yield
            return
        show = _show_bar if sys.stderr.isatty() else _show_lines
        task = asyncio.create_task(show(progress), name="progress")
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def _show_bar(progress: Progress) -> None:
    from rich.console import Console as Terminal
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Task,
        TaskID,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as Bars
    from rich.text import Text

    class Amount(DownloadColumn):
        def render(self, task: Task) -> Text:
            return super().render(task) if task.fields["counted"] else Text("")

    class Rate(TransferSpeedColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{human_bytes(speed)}/s" if speed and task.fields["counted"] else "")

    bars = Bars(
        TextColumn("{task.description:>9}"),
        BarColumn(),
        Amount(binary_units=True),
        Rate(),
        TextColumn("time left"),
        TimeRemainingColumn(),
        TextColumn("[yellow]{task.fields[note]}"),
        console=Terminal(file=sys.stderr),
    )
    shown: list[tuple[Phase, TaskID]] = []

    def update() -> None:
        for phase in progress.phases[len(shown) :]:
            shown.append((phase, bars.add_task(phase.name, total=phase.total or None, note="", counted=False)))
        for phase, task in shown:
            # A phase without bytes to count (the map, the commit) is a moving bar, and full when it is over.
            total = phase.total or (1 if phase.over else None)
            bars.update(
                task, total=total, completed=phase.done or int(phase.over), note=phase.note(), counted=bool(phase.total)
            )

    with bars:
        try:
            while True:
                update()
                await asyncio.sleep(REFRESH_SECONDS)
        finally:
            update()


async def _show_lines(progress: Progress) -> None:
    known = 0
    began = last = time.monotonic()
    while True:
        await asyncio.sleep(REFRESH_SECONDS)
        now = time.monotonic()
        if len(progress.phases) != known:
            known, began, last = len(progress.phases), now, now
            print(f"{progress.phases[-1].name} ...", file=sys.stderr, flush=True)
        elif progress.phases and now - last >= PLAIN_SECONDS:
            last = now
            print(_line(progress.phases[-1], now - began), file=sys.stderr, flush=True)


def _line(phase: Phase, seconds: float) -> str:
    rate = phase.done / seconds
    left = human_seconds((phase.total - phase.done) / rate) if rate > 0 and phase.total else "unknown"
    return (
        f"{phase.name}: {human_bytes(phase.done)} of {human_bytes(phase.total)}, "
        f"{human_bytes(rate)}/s, time left {left}" + (f", {note}" if (note := phase.note()) else "")
    )
