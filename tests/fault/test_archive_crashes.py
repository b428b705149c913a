"""An archiver that is killed, at every crash point it passes and at every pass of it.

After each death no snapshot is there that is not whole. The next run of the same snapshot uploads exactly what had not
arrived: no block and no node is in the store twice, and no chunk more than that takes is uploaded."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import blockferry.client
import pytest
from blockferry.common.archive.directory import DirectoryStore
from blockferry.common.archive.format import HEADER, TAG_SIZE
from blockferry.common.errors import BlockferryError, Code

from tests import zygote
from tests.fault.test_crash_points import _named as named
from tests.unit.archive.site import Site, content

DATA = content(*range(7), None, *range(20, 25), tail=77)
BLOCKS = 13
"""The last has 77 bytes, and room in any chunk."""
PER_CHUNK = 3

OF_THE_ARCHIVER = sorted(name for name in named(blockferry.client) if name.startswith("archive-"))
BELOW = ["object-before-link", "object-before-flush", "log-before-fsync", "atomic-before-rename", "rename-before-fsync"]
MOST_PASSES = 60
STEP = int(os.environ.get("BLOCKFERRY_CRASH_STEP", "4"))
"""In an ordinary run."""


class Host:
    """An image, a store, a staging directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.image = directory / "image"
        self.store = directory / "store"
        self.log = directory / "log"
        directory.mkdir()
        self.store.mkdir()
        self.image.write_bytes(DATA)

    def run(self, snapshot_id: str, doom: str = "") -> list[str] | None:
        """One run; the objects it has made, or None if it was killed, as it should be at `doom`."""
        process = self.start(snapshot_id, doom)
        _, errors = process.communicate(timeout=60)
        if process.returncode == -signal.SIGKILL and doom:
            return None
        assert process.returncode == 0, errors
        return self.log.read_text().splitlines() if self.log.exists() else []

    def start(self, snapshot_id: str, doom: str = "") -> subprocess.Popen[str]:
        """Begin a run."""
        self.log.unlink(missing_ok=True)
        words = [
            str(zygote.PROGRAMS / "archive-life"),
            str(self.image),
            str(self.store),
            str(self.directory / "staging"),
        ]
        words += [str(self.log), snapshot_id]
        environment = {**zygote.environment(), "BLOCKFERRY_CRASH_POINT": doom}
        return zygote.popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    async def site(self) -> Site:
        """What looks at the store."""
        return Site(self.directory / "nobody", await DirectoryStore.open(self.store))

    def objects(self, kind: str) -> dict[str, bytes]:
        """Chunks in the store."""
        return {path.name: path.read_bytes() for path in self.store.glob(f"*/{kind}/*")}


async def blocks_in(site: Site) -> list[tuple[int, bytes]]:
    """Blocks in the data chunks of the store."""
    try:
        sealer = await site.sealer()
    except BlockferryError as error:
        assert error.code is Code.NOT_FOUND  # noqa: PT017 killed before there was an archive, or the name in it
        return []
    found = []
    for key in await site.store.list(f"{sealer.volume.hex()}/data/"):
        attempt, _, digits = key.rpartition("/")[2].partition("-")
        trailer = await site.trailer(sealer, bytes.fromhex(attempt), int(digits))
        found += list(zip(trailer.keys, trailer.digests, strict=True))
    return found


def nodes_in(host: Host) -> list[bytes]:
    """The bodies of nodes in the metadata chunks of the store, as they stand there: plain, or packed."""
    found = []
    for data in host.objects("meta").values():
        position = 0
        while position < len(data):
            stored = HEADER.unpack_from(data, position)[6]
            found.append(data[position + HEADER.size : position + HEADER.size + stored - TAG_SIZE])
            position += HEADER.size + stored
    return found


async def snapshots_in(site: Site) -> int:
    try:
        return len(await site.snapshots())
    except BlockferryError as error:
        assert error.code is Code.NOT_FOUND  # noqa: PT017
        return 0


async def killed(host: Host, doom: str, snapshot_id: str) -> bool:
    """Whether a run dies at `doom`; if so, everything that must hold then, and of the next run."""
    if host.run(snapshot_id, doom) is not None:
        return False
    await after_death(host, snapshot_id)
    return True


async def after_death(host: Host, snapshot_id: str) -> None:
    """What must hold after a death at any instant, and of the next run."""
    site = await host.site()
    committed = await snapshots_in(site)
    if committed:
        assert await site.read() == DATA
    arrived = {block for block, _ in await blocks_in(site)}
    nodes = len(nodes_in(host))
    made = host.run(snapshot_id)
    assert made is not None
    data = [key for key in made if "/data/" in key]
    remaining = BLOCKS - 1 - len(arrived - {BLOCKS})
    if committed and snapshot_id:
        assert data == [] and await snapshots_in(site) == 1
    else:
        # The last chunk of a run may have nothing but its trailer.
        assert len(data) == max(1, -(-remaining // PER_CHUNK))
        assert await snapshots_in(site) == 1 + committed
    assert await site.read() == DATA
    await site.check(*[DATA] * await snapshots_in(site))
    found = await blocks_in(site)
    assert len(found) == len(set(found)) == BLOCKS
    bodies = nodes_in(host)
    assert len(bodies) == len(set(bodies))
    if not remaining and nodes:
        assert len(bodies) >= nodes


@pytest.mark.parametrize(
    ("name", "snapshot_id"),
    [(name, snapshot_id) for snapshot_id in ("", "one") for name in OF_THE_ARCHIVER]
    + [(name, "one") for name in BELOW],
)
async def test_killed_at_every_crash_point(tmp_path: Path, name: str, snapshot_id: str) -> None:
    hit = 0
    # What fires at every object and every note, and what differs only in what is read, is tried now and then.
    step = STEP if name in BELOW or snapshot_id else max(STEP // 2, 1)
    for number in range(1, MOST_PASSES, step):
        host = Host(tmp_path / f"{number}")
        dies = await killed(host, f"{name}:{number}", snapshot_id)
        shutil.rmtree(host.directory)
        if not dies:
            break
        hit += 1
    assert 0 < hit * step < MOST_PASSES - step, f"{name} was passed {hit} times"


async def test_killed_in_one_run_after_another(tmp_path: Path) -> None:
    """Each run gets one chunk further; the last one has next to nothing to do."""
    host = Host(tmp_path / "host")
    site = await host.site()
    arrived = []
    for _ in range(4):
        assert host.run("", "archive-data-stored:1") is None
        arrived.append(len(await blocks_in(site)))
    assert arrived == sorted(arrived) and arrived[0] >= PER_CHUNK
    made = host.run("")
    assert made is not None
    await site.check(DATA)
    found = await blocks_in(site)
    assert len(found) == len(set(found)) == BLOCKS


async def test_updates_are_resumed_like_first_archives(tmp_path: Path) -> None:
    host = Host(tmp_path / "host")
    site = await host.site()
    host.run("")
    now = content(*range(5), 50, None, 7, *range(20, 24), None, tail=78)
    host.image.write_bytes(now)
    for name in OF_THE_ARCHIVER[::3]:
        host.run("", name)
        host.run("")
    snapshots = await site.snapshots()
    for one in snapshots[1:]:
        assert await site.read(one.number) == now
    await site.check(DATA, *[now] * (len(snapshots) - 1))
    assert await site.stored_twice() == []


def test_there_are_crash_points() -> None:
    assert len(OF_THE_ARCHIVER) >= 10
    assert "BLOCKFERRY_CRASH_POINT" not in os.environ
