"""A server process that may die, a replica on it, and what must hold afterwards; for the tests that kill.

The source's client runs in the test's own process, or in a child where it is the one to die.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from blockferry.client.report import Progress
from blockferry.client.sync import SyncOptions, sync
from blockferry.common.address import Address
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.framing import Outgoing, encode_request, encode_write
from blockferry.common.retention import Retention
from blockferry.common.rpc import Connection
from blockferry.common.volumes import ImageVolume
from blockferry.server.identity import PoolIdentity
from blockferry.v1 import replicas_pb2 as replicas
from blockferry.v1 import replication_pb2 as pb

from tests import zygote
from tests.fault.contents import contents_in, images_of
from tests.images import BLOCK, KIB, MIB, Piece, build, noise
from tests.support import Report, Server, command, finish

CRASH_POINT = "BLOCKFERRY_CRASH_POINT"

REGION = 64 * KIB
KEEP = 2
"""Recovery points kept."""

STATE_FILES = {"replica.json", "commits.log", "session.json", "progress.json"}
"""What lies in a replica's directory beside images and digests while a server runs."""

KILLED = -signal.SIGKILL
SMALL = 40 * REGION + 3 * BLOCK

PLAIN_SIZE = 1024 * MIB

_names = itertools.count(1)


def picture(generation: int, regions: int) -> list[Piece]:
    """The pieces of an image: of every seven regions one is a hole and one differs from generation to generation."""
    found: list[Piece] = []
    for region in range(regions):
        if (region + generation) % 7 == 0:
            continue
        seed = f"{region} {generation}" if (region + generation) % 7 == 1 else f"{region}"
        found.append((region * REGION, noise(seed, REGION)))
    return found


class DoomedServer(Server):
    """A server that kills itself at a crash point (`NAME:PASS`), once: the next one lives."""

    def __init__(self, pool: Path, doom: str = "", flags: Sequence[str] = ()) -> None:
        super().__init__(pool, flags=["--keep-at-least", "last=1", *flags])
        self.doom = doom
        self.shot = False
        """It has been killed, and its end has not been seen."""

    @property
    def environment(self) -> dict[str, str]:
        """Where it dies."""
        return {**super().environment, CRASH_POINT: self.doom}

    def status(self) -> int | None:
        """The exit status, or None while it runs; reaps it."""
        if self._process is None or self._process.poll() is None:
            return None
        status = self._process.returncode
        self.kill()
        return status

    def shoot(self) -> None:
        """SIGKILL, if it still runs; somebody else waits for its end."""
        if self._process is not None and self._process.poll() is None:
            self.shot = True
            self._process.kill()

    async def death(self) -> int:
        """Wait until it dies; its exit status."""
        fd = os.pidfd_open(self.pid)
        ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(fd, ended.set)
        try:
            await ended.wait()
        finally:
            asyncio.get_running_loop().remove_reader(fd)
            os.close(fd)
        status = self.status()
        assert status is not None
        return status

    def status_of_start(self) -> int | None:
        """Start it where it may die at once: the exit status, or None if it runs."""
        self._process = zygote.popen(
            self.words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=self.environment
        )
        Server.running.append(self)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            self.address = line.decode().strip().rpartition(" ")[2]
            return None
        self._process.wait(30)
        return self.status()


@dataclass
class Death:
    """How the server died."""

    status: int


class Stage:
    """One replica. `contents` are those of the generations known to be committed, by number."""

    def __init__(self, server: DoomedServer, scratch: Path, *, size: int = SMALL, clones: bool = True):
        self.server = server
        self.volume = f"volume-{next(_names)}"
        self.clones = clones
        self.size = size
        self.source = scratch / f"{self.volume}.img"
        self.state = scratch / f"{self.volume}-state"
        self.contents: dict[int, bytes] = {}
        self.former = self.attempted = b""
        self.in_doubt = False
        """A client died, and its commit may still be on its way."""
        self._generations = itertools.count(1)

    @property
    def directory(self) -> Path:
        """The replica's."""
        return self.server.pool / self.volume

    @property
    def newest(self) -> int:
        """The number of the newest generation known to be committed; 0 for none."""
        return max(self.contents, default=0)

    def session_mark(self) -> int:
        """Another number whenever a session was opened or ended."""
        try:
            return (self.directory / "session.json").stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    def change_source(self) -> None:
        """Give the source other content."""
        build(self.source, self.size, picture(next(self._generations), self.size // REGION))
        self.former, self.attempted = self.attempted, self.source.read_bytes()

    @property
    def options(self) -> SyncOptions:
        """How every sync here is done."""
        return SyncOptions(region_size=REGION, keep=Retention(last=KEEP), state_directory=self.state)

    @property
    def words(self) -> list[str]:
        """The command line of a sync."""
        return command(
            "sync", self.source, self.server.url(self.volume), "--region-size", REGION, "--keep", f"last={KEEP}",
            "--state-dir", self.state, "--json", "--quiet",
        )  # fmt: skip

    def beside(self) -> Stage:
        """Another replica on the same server."""
        return Stage(self.server, self.source.parent, size=self.size, clones=self.clones)

    def start_client(self, *flags: object) -> subprocess.Popen[str]:
        """A sync in a process of its own; the test ends it."""
        words = [*self.words, *map(str, flags)]
        return zygote.popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def status_of_client(self, doom: str) -> int:
        """Run a client that dies at a crash point; its exit status."""
        environment = {**os.environ, CRASH_POINT: doom}
        words, pipe = self.words, subprocess.PIPE
        return finish(zygote.popen(words, stdout=pipe, stderr=pipe, text=True, env=environment)).status

    async def sync(self) -> Report:
        """Sync the source as it is; the generation is known afterwards."""
        source = await ImageVolume.open(self.source)
        try:
            report = await sync(source, Address.parse(self.server.url(self.volume)), self.options, Progress())
        finally:
            await source.close()
        self.answered(report)
        return report

    def answered(self, report: Report) -> None:
        """A client has been told that its commit happened."""
        if self.in_doubt and report["generation"] == self.newest + 2:
            self.contents[self.newest + 1] = self.former
        self.in_doubt = False
        assert report["generation"] == self.newest + 1
        self.contents[self.newest + 1] = self.attempted

    async def survive(self, step: Coroutine[object, object, object]) -> Death | None:
        """Go through a step; if the server dies meanwhile the next one is started at once, as a supervisor does it."""
        died = asyncio.Event()
        watch = asyncio.create_task(self._replace(died))
        try:
            await step
        except BlockferryError as error:
            if error.code not in (Code.UNAVAILABLE, Code.STALE_EPOCH):
                raise
            return await asyncio.wait_for(watch, 30)
        # It may be dying at this very moment.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(died.wait(), 0.05)
        if died.is_set() or self.server.shot:
            return await watch
        watch.cancel()
        return None

    async def _replace(self, died: asyncio.Event) -> Death:
        status = await self.server.death()
        died.set()
        self.server.shot = False
        self.server.doom = ""
        await asyncio.to_thread(self.server.start)
        return Death(status)

    async def checkpoint(self) -> None:
        """Half a session of an immutable snapshot, made durable and ended."""
        async with self._session("a snapshot") as (connection, ref):
            call = connection.bidirectional("Replication/ApplyChanges", pb.ApplyChangesResponse)
            data = noise("half", REGION)
            write = pb.WriteRegionRequest(offset=0, length=REGION, writes=[pb.Extent(offset=0, length=REGION)])
            changes: list[Outgoing] = [encode_write(write, [data])]
            await call.write(encode_request(pb.ApplyChangesRequest(sequence=1, session=ref, flush=True), changes))
            with connection.translated():
                async for response in call:
                    if response.durable == 1:
                        break
                else:
                    raise AssertionError("the stream ended without a durable acknowledgement")
            call.cancel()
            await connection.call(
                "Replication/AbortSession", pb.AbortSessionRequest(session=ref), pb.AbortSessionResponse
            )

    async def discard(self) -> None:
        """A session that is given up with its work."""
        async with self._session("") as (connection, ref):
            await connection.call(
                "Replication/AbortSession", pb.AbortSessionRequest(session=ref, discard=True), pb.AbortSessionResponse
            )

    @contextlib.asynccontextmanager
    async def _session(self, snapshot_id: str) -> AsyncIterator[tuple[Connection, pb.SessionRef]]:
        connection = Connection(Address.parse(self.server.url(self.volume)))
        try:
            opened = await connection.call(
                "Replication/OpenSession",
                pb.OpenSessionRequest(
                    protocol_version=1, volume=self.volume, size=self.size, region_size=REGION,
                    snapshot_id=snapshot_id,
                ),
                pb.OpenSessionResponse,
            )  # fmt: skip
            yield connection, opened.session
        finally:
            await connection.close()

    async def restart(self) -> None:
        """An orderly end and another start."""
        assert await asyncio.to_thread(self.server.stop) == 0
        await asyncio.to_thread(self.server.start)

    # --- what must hold -----------------------------------------------------------------------------------------------

    async def points(self) -> dict[int, replicas.RecoveryPoint]:
        """The recovery points, by number, once the newest is one complete image."""
        connection = Connection(Address.parse(self.server.url(self.volume)))
        try:
            while True:
                found = await connection.call(
                    "Replicas/ListRecoveryPoints",
                    replicas.ListRecoveryPointsRequest(volume=self.volume),
                    replicas.ListRecoveryPointsResponse,
                )
                if not found.points or found.points[0].path:
                    return {point.number: point for point in found.points}
                await asyncio.sleep(0.01)
        except BlockferryError as error:
            if error.code is not Code.NOT_FOUND or self.contents:
                raise
            return {}
        finally:
            await connection.close()

    async def verify(self) -> None:
        """After a death: the newest generation is the one before or the one that was asked for, every point is what was
        committed, and nothing lies about that nobody needs."""
        points = await self.points()
        if max(points, default=0) == self.newest + 1:
            # It was committed, and its client does not know yet.
            self.contents[self.newest + 1] = self.attempted
        self.in_doubt = False
        expected = set(range(max(self.newest - KEEP + 1, 1), self.newest + 1))
        # The oldest may not be dropped yet.
        assert expected <= points.keys() <= expected | {self.newest - KEEP} - {0}
        await self._verify_contents(points)
        self._verify_files(points, work=True)

    async def verify_next(self) -> None:
        """The next sync succeeds, and leaves exactly what is needed."""
        self.change_source()
        await self.sync()
        await self.verify_rest()

    async def verify_rest(self) -> None:
        """After a sync: the recovery points are those that are kept, whole, and nothing else lies about."""
        points = await self.points()
        assert points.keys() == set(range(max(self.newest - KEEP + 1, 1), self.newest + 1))
        await self._verify_contents(points)
        self._verify_files(points, work=False)

    async def _verify_contents(self, points: dict[int, replicas.RecoveryPoint]) -> None:
        if points and not self.clones:
            found = await contents_in(self.directory, self.source.parent)
            assert found == {number: self.contents[number] for number in sorted(points)}
        for number, point in points.items():
            assert self.clones or number == max(points) or not point.path
            if point.path:
                there = await asyncio.to_thread(Path(point.path).read_bytes)
                assert there == self.contents[number], f"generation {number} is not what was committed"

    def _verify_files(self, points: dict[int, replicas.RecoveryPoint], *, work: bool) -> None:
        assert [path.name for path in self.server.pool.iterdir() if path.name.startswith(".new-")] == []
        if not self.directory.exists():
            assert not points
            return
        files = {path.name for path in self.directory.iterdir()}
        commit_ids = [points[number].commit_id for number in sorted(points)]
        images = images_of(commit_ids, "clones" if self.clones else "journal")
        allowed = STATE_FILES | images | {f"{commit_id.hex()}.digests" for commit_id in commit_ids}
        if work and self.clones:
            allowed.add("work.img")
        elif work:
            allowed |= {"work.redo", "work.redo.index"} if points else {"image.raw"}
        assert files <= allowed, f"nobody needs {sorted(files - allowed)}"
        assert images <= files


StageFactory = Callable[..., Stage]
"""(root, doom, clones=…, size=…)"""


@contextlib.contextmanager
def stages(scratch: Path, kind: type[Stage] = Stage) -> Iterator[StageFactory]:
    """Makes stages of a kind, each with a pool and a server of its own, and clears them away."""
    made: list[Stage] = []

    def make(root: Path, doom: str = "", *, clones: bool = True, size: int = SMALL) -> Stage:
        pool = root / f"pool-{next(_names)}-{scratch.name}"
        pool.mkdir()
        # A pool that is known already: the start of the server is not part of the life that is gone through.
        PoolIdentity(pool).settle({})
        made.append(kind(DoomedServer(pool, doom), scratch, clones=clones, size=size))
        return made[-1]

    try:
        yield make
    finally:
        for stage in made:
            stage.server.kill()
            shutil.rmtree(stage.server.pool)


@contextlib.contextmanager
def plain_xfs(base: Path) -> Iterator[Path]:
    """A mounted file system that cannot clone files."""
    image, mount = base / "disk.img", base / "mount"
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(PLAIN_SIZE)
    subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=0", str(image)], check=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(mount)], check=True)
    try:
        yield mount
    finally:
        subprocess.run(["umount", str(mount)], check=True)
