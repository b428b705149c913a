"""The command that writes archives: create."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from blockferry.client.archive_forecast import forecast
from blockferry.client.archiver import ArchiveOptions, archive
from blockferry.client.cli.main import Command
from blockferry.client.cli.render import Console
from blockferry.client.cli.replicate import opened as opened_volume
from blockferry.client.commits import default_state_directory
from blockferry.client.report import Progress
from blockferry.common.archive.creation import DEFAULT_COMPRESSION, open_or_create
from blockferry.common.archive.store import open_store
from blockferry.common.units import human_bytes


async def _create(arguments: argparse.Namespace, console: Console) -> int:
    async with (
        opened_volume(arguments.source, arguments) as source,
        await open_store(arguments.store, arguments.access) as store,
    ):
        if store.notice:
            console.warning(store.notice)
        if arguments.plan:
            report = await forecast(source, store, arguments.access, arguments.volume)
            console.result(report, _plan_lines(report))
            return 0
        progress = Progress()
        compression = arguments.compression or DEFAULT_COMPRESSION
        async with console.showing(progress):
            catalog = await open_or_create(store, arguments.access, compression=compression)
            options = ArchiveOptions(
                volume=arguments.volume,
                staging=(arguments.state_dir or default_state_directory()) / "archive",
                compression=arguments.compression or "",
                live=arguments.live,
            )
            report = await archive(source, catalog, options, progress)
        if not catalog.archive.conditional:
            console.warning("this store cannot refuse to replace objects: let one archiver at a time write to a volume")
    console.result(report, _lines(report))
    return 0


def _part(report: Mapping[str, object], name: str) -> Mapping[str, int]:
    found = report[name]
    assert isinstance(found, dict)
    return found


def _lines(report: Mapping[str, object]) -> list[str]:
    name = f"{report['store']}#{report['volume']}@{report['snapshot']}"
    if report["outcome"] == "present":
        return [f"{report['source']} is in the archive already: {name}"]
    blocks, moved, objects, seconds = (_part(report, part) for part in ("blocks", "bytes", "objects", "seconds"))
    resumed = f", {blocks['kept']} uploaded before" if report["resumed"] else ""
    return [
        f"{report['source']} -> {name}",
        f"  blocks     {blocks['stored']} stored, {blocks['equal']} equal to snapshot {report['base']}, "
        f"{blocks['zero']} zero{resumed}"
        if report["base"]
        else f"  blocks     {blocks['stored']} stored, {blocks['zero']} zero{resumed}",
        f"  read       {human_bytes(moved['source_read'])}; {human_bytes(moved['stored'])} to store",
        f"  uploaded   {human_bytes(moved['uploaded'])} in {objects['data']} data, {objects['meta']} metadata chunks",
        f"  took       {seconds['total']:.1f} s",
    ]


def _plan_lines(report: Mapping[str, object]) -> list[str]:
    blocks, moved, requests = (_part(report, part) for part in ("blocks", "bytes", "requests"))
    base = f"snapshot {report['base']}" if report["base"] else "nothing: all of it is new"
    return [
        f"{report['source']} -> {report['store']}#{report['volume']}",
        f"  made from  {base}",
        f"  to read    {human_bytes(moved['source_read'])} in {blocks['allocated']} blocks, map {report['source_map']}",
        f"  to store   between nothing and {human_bytes(moved['data_max'])} before compression, "
        f"and at most about {human_bytes(moved['metadata'])} of metadata",
        f"  requests   {requests['put_min']} to {requests['put_max']} PUT, {requests['get']} GET, "
        f"{requests['list']} LIST, {requests['delete']} DELETE",
    ]


COMMANDS: dict[str, Command] = {"archive_create": _create}
