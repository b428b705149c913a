"""`make bench`: run the benchmarks (all, or those named), print tables, write JSON, fail where a bound is broken."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import agents, allocation, archive, commits, datapath, floor, nbd, nbdserver, rehydrate, schedule, tracking

ENTRIES = {
    allocation.NAME: allocation.measure,
    datapath.NAME: datapath.measure,
    nbd.NAME: nbd.measure,
    nbdserver.NAME: nbdserver.measure,
    rehydrate.NAME: rehydrate.measure,
    datapath.TLS_NAME: datapath.measure_tls,
    commits.NAME: commits.measure,
    floor.NAME: floor.measure,
    tracking.NAME: tracking.measure,
    schedule.NAME: schedule.measure,
    agents.NAME: agents.measure,
    archive.NAME: archive.measure,
}
RESULTS = Path(__file__).resolve().parent / "results"


def show(console: Console, result: dict[str, Any]) -> None:
    """The table of one benchmark and what became of its bounds."""
    rows: list[dict[str, Any]] = result["rows"]
    table = Table(title=result["title"], title_justify="left")
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="left" if isinstance(rows[0][name], str) else "right")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    console.print(table)
    console.print(result["summary"])
    for sentence in result["broken"]:
        console.print(f"[bold red]broken[/bold red]: {sentence}")


def main() -> int:
    """Exit status: 0 within all bounds, 1 not."""
    parser = argparse.ArgumentParser(prog="bench", description="Measure blockferry against its bounds.")
    parser.add_argument("names", nargs="*", choices=[*ENTRIES, []], metavar="NAME", help=f"of {', '.join(ENTRIES)}")
    names = parser.parse_args().names or [name for name in ENTRIES if name != datapath.TLS_NAME]
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
    machine = {"python": platform.python_version(), "kernel": platform.release(), "processors": os.cpu_count()}
    broken = False
    RESULTS.mkdir(exist_ok=True)
    for name in names:
        try:
            result = ENTRIES[name]()
        except (OSError, AssertionError) as error:
            Console(stderr=True, highlight=False).print(f"[bold red]{name} failed[/bold red]: {error}", soft_wrap=True)
            broken = True
            continue
        show(console, result)
        written = RESULTS / f"{name}.json"
        written.write_text(json.dumps({**result, "machine": machine, "at": int(time.time())}, indent=2) + "\n")
        console.print(f"figures in bench/results/{written.name}\n")
        broken = broken or bool(result["broken"])
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
