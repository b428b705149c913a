"""The commands that read archives: list, show, restore, verify."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import AsyncIterator

from blockferry.client.archive_check import Checked, check
from blockferry.client.cli.handover import confirm
from blockferry.client.cli.main import Command
from blockferry.client.cli.picture import picture, shades_for
from blockferry.client.cli.render import Console, table
from blockferry.client.report import SCHEMA, Progress
from blockferry.client.restore import RestoreOptions, restore
from blockferry.client.targets import open_target
from blockferry.common.archive.catalog import Catalog
from blockferry.common.archive.format import ARCHIVE_BLOCK, Superblock
from blockferry.common.archive.reader import SnapshotVolume
from blockferry.common.archive.store import SnapshotName, open_store
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.regions import DEFAULT_REGION_SIZE
from blockferry.common.units import human_bytes

SHOWN = 20
"""Damaged places listed for people; `--json` has them all."""


@contextlib.asynccontextmanager
async def opened(uri: str, arguments: argparse.Namespace, console: Console) -> AsyncIterator[Catalog]:
    """The archive in a store."""
    async with await open_store(uri, arguments.access) as store:
        if store.notice:
            console.warning(store.notice)
        yield await Catalog.open(store, arguments.access)


@contextlib.asynccontextmanager
async def _snapshot(arguments: argparse.Namespace, console: Console) -> AsyncIterator[SnapshotVolume]:
    volume = await SnapshotVolume.open(arguments.snapshot, arguments.access)
    try:
        if volume.notice:
            console.warning(volume.notice)
        yield volume
    finally:
        await volume.close()


def snapshot_fields(superblock: Superblock) -> dict[str, object]:
    """A snapshot for `--json`. Sizes in bytes."""
    blocks = superblock.root.blocks if superblock.root is not None else 0
    return {
        "number": superblock.number,
        "snapshot_id": f"archive:{superblock.volume}:{superblock.attempt}",
        "created": superblock.created,
        "size": superblock.size,
        "data": min(blocks * ARCHIVE_BLOCK, superblock.size),
        "stored": superblock.stored,
        "base": superblock.base or None,
        "source": superblock.source,
        "source_snapshot_id": superblock.snapshot_id or None,
    }


# --- list and show ----------------------------------------------------------------------------------------------------


async def _list(arguments: argparse.Namespace, console: Console) -> int:
    rows = [("VOLUME", "SNAPSHOT", "CREATED", "SIZE", "DATA", "STORED", "SOURCE")]
    volumes: list[dict[str, object]] = []
    problems: list[str] = []
    async with opened(arguments.store, arguments, console) as catalog:
        for name in await catalog.names():
            try:
                uuid = await catalog.volume(name)
                found = await (await catalog.log(uuid)).snapshots()
            except BlockferryError as error:
                # One volume that is damaged does not hide the others.
                if error.code not in (Code.CORRUPT_STATE, Code.NOT_FOUND, Code.UNSUPPORTED):
                    raise
                problems.append(error.line())
                volumes.append({"volume": name, "uuid": None, "snapshots": [], "problem": error.line()})
                continue
            shown = [snapshot_fields(one) for one in found]
            volumes.append({"volume": name, "uuid": uuid.hex(), "snapshots": shown, "problem": None})
            rows += [_row(name, one) for one in found] or [(name, "none", "", "", "", "", "")]
        archive = catalog.archive
    report = {
        "schema": SCHEMA,
        "store": catalog.store.uri,
        "archive": archive.id,
        "created": archive.created,
        "encryption": archive.encryption,
        "compression": archive.compression,
        "volumes": volumes,
    }
    lines = table(rows) if len(rows) > 1 else [f"the archive in {catalog.store.uri} has no snapshots"]
    console.result(report, [*lines, *(f"PROBLEM  {one}" for one in problems)])
    return 1 if problems else 0


def _row(name: str, one: Superblock) -> tuple[str, str, str, str, str, str, str]:
    data = one.root.blocks * ARCHIVE_BLOCK if one.root is not None else 0
    size, held, stored = map(human_bytes, (one.size, min(data, one.size), one.stored))
    return name, f"@{one.number}", one.created, size, held, stored, one.source


async def _show(arguments: argparse.Namespace, console: Console) -> int:
    async with _snapshot(arguments, console) as volume:
        superblock = volume.superblock
        found = await volume.allocation(DEFAULT_REGION_SIZE)
        report: dict[str, object] = {
            "schema": SCHEMA,
            "uri": volume.uri,
            "volume": superblock.volume,
            **snapshot_fields(superblock),
            "encryption": volume.archive.encryption,
            "data_chunks": superblock.data_chunks,
            "meta_chunks": superblock.meta_chunks,
        }
    base = f"@{superblock.base}" if superblock.base else "none: it was archived whole"
    lines = [
        f"{volume.uri}: snapshot @{superblock.number}",
        f"  created    {superblock.created} from {superblock.source}",
        f"  size       {human_bytes(superblock.size)} ({superblock.size} bytes), of which "
        f"{human_bytes(float(str(report['data'])))} hold data",
        f"  base       {base}",
        f"  stored     {human_bytes(superblock.stored)} more than its base, in at most {superblock.data_chunks} chunks",
        f"  encryption {volume.archive.encryption}",
    ]
    lines += [f"  |{row}|" for row in picture(found, shades_for(getattr(sys.stdout, "encoding", None)))]
    console.result(report, lines)
    return 0


# --- restore ----------------------------------------------------------------------------------------------------------


async def _restore(arguments: argparse.Namespace, console: Console) -> int:
    progress = Progress()
    options = RestoreOptions(arguments.overwrite, arguments.allow_damaged, arguments.state_dir)
    async with _snapshot(arguments, console) as snapshot:
        if arguments.overwrite:
            confirm(arguments, arguments.target, f"what is on it will be replaced by {snapshot.uri}", "target")
        target = await open_target(arguments.target, snapshot.size, insecure=arguments.insecure, tls=arguments.tls)
        try:
            async with console.showing(progress):
                report = await restore(snapshot, target, options, progress)
        finally:
            await target.close()
    console.result(report, _restore_lines(report))
    return 3 if report["damaged"] else 0


def _restore_lines(report: dict[str, object]) -> list[str]:
    blocks, results, moved, damaged, seconds = (
        report[name] for name in ("blocks", "results", "bytes", "damaged", "seconds")
    )
    assert isinstance(blocks, dict) and isinstance(results, dict) and isinstance(moved, dict)
    assert isinstance(damaged, list) and isinstance(seconds, dict)
    lines = [
        f"{report['snapshot']} -> {report['target']}: snapshot @{report['number']} {report['outcome']}",
        f"  blocks     {results['changed']} restored, {results['equal']} were there, {results['zero']} deallocated, "
        f"{blocks['skip']} zero on both sides",
        f"  read       {human_bytes(moved['archive_read'])} from the archive, "
        f"{human_bytes(moved['target_read'])} at the target",
        f"  written    {human_bytes(moved['target_written'])}; unmapped {human_bytes(moved['unmapped'])}",
        f"  took       {seconds['total']:.1f} s",
    ]
    lost = sum(one["length"] for one in damaged)
    if damaged:
        lines.append(f"  DAMAGED    {human_bytes(lost)} could not be read and are zeros now:")
    lines += [f"  damaged at {one['offset']}, {one['length']} bytes: {one['cause']}" for one in damaged[:SHOWN]]
    if len(damaged) > SHOWN:
        lines.append(f"  and {len(damaged) - SHOWN} more ranges; --json lists them all")
    return lines


# --- verify -----------------------------------------------------------------------------------------------------------


async def _verify(arguments: argparse.Namespace, console: Console) -> int:
    name = SnapshotName.parse(arguments.archive)
    share = 0.0 if arguments.metadata else arguments.sample
    progress = Progress()
    async with opened(name.store, arguments, console) as catalog, console.showing(progress):
        phase = progress.start("verify")
        names = [name.name] if name.name else await catalog.names()
        checked = await check(catalog, names, name.number, share, phase)
        progress.finish()
    console.result(_verify_report(arguments.archive, checked, share), _verify_lines(arguments.archive, checked, share))
    return 3 if checked.findings else 0


def _verify_report(uri: str, checked: Checked, share: float) -> dict[str, object]:
    return {
        "schema": SCHEMA,
        "archive": uri,
        "outcome": "damaged" if checked.findings else "sound",
        "share": share,
        "snapshots": checked.snapshots,
        "nodes": checked.nodes,
        "blocks": {"known": checked.blocks, "read": checked.blocks_read},
        "bytes": {"archive_read": checked.bytes_read},
        "findings": [one.fields() for one in checked.findings],
    }


def _verify_lines(uri: str, checked: Checked, share: float) -> list[str]:
    read = f"{checked.blocks_read} of {checked.blocks} blocks ({human_bytes(checked.bytes_read)}) read"
    lines = [
        f"{uri}: {checked.snapshots} snapshots, {checked.nodes} nodes, "
        + (read if share else f"{checked.blocks} blocks accounted for, none read")
        + ("" if checked.findings else "; all sound")
    ]
    for one in checked.findings[:SHOWN]:
        where = f" at {one.offset}, {one.length} bytes" if one.length else ""
        number = f"@{one.snapshot}" if one.snapshot else ""
        lines.append(f"  {one.volume}{number}{where}: {one.what}" + (f": {one.cause}" if one.cause else ""))
    if len(checked.findings) > SHOWN:
        lines.append(f"  and {len(checked.findings) - SHOWN} more; --json lists them all")
    return lines


COMMANDS: dict[str, Command] = {
    "archive_list": _list,
    "archive_show": _show,
    "archive_restore": _restore,
    "archive_verify": _verify,
}
