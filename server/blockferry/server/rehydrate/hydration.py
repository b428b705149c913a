"""One disk: opened or begun anew, filled behind its guest, snapshotted, closed.

begin    sources agree ──▶ primary made ──▶ map, bound to both        resume    map ──▶ its primary; no source needed
run      sweep ┐
         commits of the map ┼──▶ everything is hydrated, durably ──▶ sources let go ──▶ the disk is served on
         touch ┘
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog
from blockferry.common import disk, linux
from blockferry.common.address import check_volume_name
from blockferry.common.durable import make_directories, rename_durably
from blockferry.common.errors import BlockferryError, Code, from_os_error
from blockferry.common.rehydration import Counts, Rate, latency
from blockferry.common.settings import Tls
from blockferry.common.volumes import in_thread
from blockferry.server.rehydrate import primary as primaries
from blockferry.server.rehydrate.map import Binding, HydrationMap
from blockferry.server.rehydrate.primary import NEW, Primary, is_external, make_image, open_external, open_image
from blockferry.server.rehydrate.sources import Opener, Sources, source_opener
from blockferry.server.rehydrate.volume import HydratingVolume
from blockferry.v1 import rehydration_pb2 as pb
from pyroaring import BitMap

log = structlog.get_logger("blockferry.rehydrate")

COMMIT_SECONDS = 5.0
"""Between two commits of the map, where the guest flushes less often: what is fetched again after a crash."""

SAMPLE_SECONDS = 1.0
"""Between two looks at how much is left."""

CHECK_SECONDS = 3.0
"""For sources at the start of a rehydration that goes on: whoever answers must have the right snapshot."""

_LOCK = "lock"
_SNAPSHOTS = "snapshots"


@dataclass(frozen=True)
class Options:
    """What the command line says. `bandwidth` in bytes per second, 0 for any number; `source_timeout` in seconds."""

    sources: Sequence[str]
    primary: str
    state: Path
    bandwidth: int = 0
    source_timeout: float = 20.0
    overwrite: bool = False
    insecure: bool = False
    tls: Tls | None = None


class Hydration:
    """One disk of this process. Make it with `open`."""

    def __init__(self, options: Options, lock: int, volume: HydratingVolume, sources: Sources) -> None:
        self.options = options
        self.volume = volume
        self.sources = sources
        self.completed = asyncio.Event()
        """Everything is in the primary, durably."""
        self._lock = lock
        self._rate = Rate()

    @classmethod
    async def open(cls, options: Options, opener: Opener | None = None) -> Hydration:
        """Begin, or resume what --state says. Raises what is wrong with any of the parts; nothing is changed then."""
        opener = opener or source_opener(insecure=options.insecure, tls=options.tls)
        lock = await in_thread(_lock_state, options.state)
        try:
            resumed = await in_thread(HydrationMap.exists, options.state)
            begin = cls._resume if resumed else cls._begin
            sources, primary, hydration = await begin(options, opener)
        except OSError as error:
            os.close(lock)
            raise from_os_error(error, f"cannot use {options.state}") from error
        except BaseException:
            os.close(lock)
            raise
        volume = HydratingVolume(
            primary.volume,
            hydration,
            sources,
            source_timeout=options.source_timeout,
            bandwidth=options.bandwidth,
            fresh=primary.fresh,
        )
        return cls(options, lock, volume, sources)

    @staticmethod
    async def _begin(options: Options, opener: Opener) -> tuple[Sources, Primary, HydrationMap]:
        sources = await Sources.first(options.sources, opener)
        try:
            size, uri = sources.size, options.primary
            primary: Primary | None = None
            if is_external(uri):
                primary = await open_external(
                    uri, size, binding=None, overwrite=options.overwrite, insecure=options.insecure
                )
                identity = primary.identity
            else:
                identity = await make_image(Path(uri), size, overwrite=options.overwrite)
            binding = Binding(identity, size, sources.snapshot_id, uri, time.time_ns() // 1000)
            try:
                hydration = await in_thread(HydrationMap.create, options.state, binding)
            except BaseException:
                if primary is not None:
                    await primary.volume.close()
                raise
            if primary is None:
                try:
                    primary = await open_image(Path(uri), binding, fresh=True)
                except BaseException:
                    hydration.close()
                    raise
            return sources, primary, hydration
        except BaseException:
            await sources.close()
            raise

    @staticmethod
    async def _resume(options: Options, opener: Opener) -> tuple[Sources, Primary, HydrationMap]:
        hydration = await in_thread(HydrationMap.open, options.state)
        try:
            binding = hydration.binding
            sources = Sources(options.sources, binding.size, binding.snapshot_id, opener)
            if is_external(options.primary):
                primary = await open_external(options.primary, binding.size, binding=binding, insecure=options.insecure)
            else:
                primary = await open_image(Path(options.primary), binding)
            try:
                if not hydration.complete:
                    await sources.check(CHECK_SECONDS)
            except BaseException:
                await primary.volume.close()
                raise
            return sources, primary, hydration
        except BaseException:
            hydration.close()
            raise

    # --- at work ------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Fill the primary; comes back when everything is there, durably, and the sources are let go. A volume whose
        flush has failed never comes there: it is for whoever waits to end this."""
        volume = self.volume
        beside = [
            asyncio.create_task(volume.fetcher.touch(), name="touch"),
            asyncio.create_task(self._commits(), name="commits"),
            asyncio.create_task(self._samples(), name="samples"),
        ]
        try:
            await volume.fetcher.sweep()
            while not volume.map.settled:
                with contextlib.suppress(BlockferryError):
                    # Said by _commits.
                    await volume.flush()
                    continue
                await asyncio.sleep(SAMPLE_SECONDS)
        finally:
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)
        await volume.fetcher.idle()
        await self.sources.close()
        volume.batches = volume.primary.batches
        self._rate.take(time.monotonic(), 0)
        self.completed.set()
        log.info("everything is hydrated", primary=volume.uri, fetched=volume.fetcher.bytes_fetched)

    async def _commits(self) -> None:
        said = ""
        while True:
            await asyncio.sleep(COMMIT_SECONDS)
            try:
                if not self.volume.map.settled:
                    await self.volume.flush()
                said = ""
            except BlockferryError as error:
                if error.line() != said:
                    said = error.line()
                    log.error("cannot commit what is hydrated", error=said)

    async def _samples(self) -> None:
        while True:
            self._rate.take(time.monotonic(), self._left())
            await asyncio.sleep(SAMPLE_SECONDS)

    def _left(self) -> int:
        hydration, allocated = self.volume.map, self.volume.fetcher.allocated
        whole = self.volume.size if allocated is None else hydration.bytes_in(allocated)
        return whole - hydration.bytes_hydrated(allocated)

    # --- what people want to know -------------------------------------------------------------------------------------

    def status(self, address: str = "") -> pb.RehydrationStatus:
        """How far it is."""
        volume, fetcher, hydration = self.volume, self.volume.fetcher, self.volume.map
        allocated = fetcher.allocated
        data = 0 if allocated is None else hydration.bytes_in(allocated)
        left = 0 if allocated is None else self._left()
        counts = Counts(volume.size, hydration.bytes_hydrated(), data, left)
        state = pb.REHYDRATION_STATE_HYDRATING
        problem = ""
        if volume.failed is not None:
            state, problem = pb.REHYDRATION_STATE_FAILED, volume.failed.line()
        elif self.completed.is_set():
            state = pb.REHYDRATION_STATE_COMPLETE
        elif fetcher.problem or all(one.problem for one in self.sources.all):
            state = pb.REHYDRATION_STATE_HELD_UP
            problem = fetcher.problem or self.sources.all[0].problem
        elif fetcher.damaged:
            problem = f"no source has {len(fetcher.damaged)} parts whole"
        return pb.RehydrationStatus(
            primary=volume.uri,
            address=address,
            snapshot_id=hydration.binding.snapshot_id,
            state=state,
            problem=problem,
            size=counts.size,
            hydrated=counts.hydrated,
            data=counts.data,
            data_left=counts.data_left,
            fetched=fetcher.bytes_fetched,
            percent=100.0 if self.completed.is_set() else min(counts.percent, 99.9),
            rate=max(self._rate.per_second, 0.0),
            seconds_left=0.0 if self.completed.is_set() else self._rate.seconds_left(),
            demand=latency(fetcher.latencies, fetcher.demands),
            sources=[
                pb.RehydrationSource(
                    uri=one.uri, connected=one.is_open, problem=one.problem, bytes_fetched=one.bytes_fetched
                )
                for one in self.sources.all
            ],
        )

    # --- snapshots ----------------------------------------------------------------------------------------------------

    async def snapshot(self, name: str) -> tuple[Path, Path, int]:
        """Copy primary and map as of one moment: (image, its --state, bytes hydrated). Raises UNSUPPORTED where the
        primary's file system cannot share extents, WRONG_STATE where the name is taken, INVALID_ARGUMENT."""
        check_volume_name(name)
        if is_external(self.options.primary):
            raise _no_snapshot(self.options.primary, "it is no image")
        path = Path(self.options.primary)
        target, state = path.with_name(f"{path.name}.{name}"), self.options.state / _SNAPSHOTS / name
        if target.exists() or HydrationMap.exists(state):
            raise BlockferryError(
                Code.WRONG_STATE, f"there is a snapshot {name} already", next="choose another name", volume=str(path)
            )
        async with self.volume.quiet():
            identity = await in_thread(_clone, path, target)
            hydrated = self.volume.map.hydrated()
        binding = self.volume.map.binding
        binding = Binding(identity, binding.size, binding.snapshot_id, str(target), time.time_ns() // 1000)
        await in_thread(_keep_clone, target, state, binding, hydrated)
        return target, state, self.volume.map.bytes_in(hydrated)

    # --- the end ------------------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """Commit what is hydrated, and let go of everything. Raises what a last flush fails with, after that."""
        try:
            await self.volume.fetcher.close()
            if self.volume.failed is None:
                await self.volume.flush()
        finally:
            await self.sources.close()
            await self.volume.close()
            os.close(self._lock)


def _lock_state(state: Path) -> int:
    try:
        make_directories(state)
        fd = disk.create(state / _LOCK)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            os.close(fd)
            raise
        return fd
    except BlockingIOError as error:
        raise BlockferryError(
            Code.IN_USE,
            f"{state} is in use",
            cause="another blockferry-rehydrate works with it",
            next="one process serves one disk; stop that one, or use another --state",
        ) from error
    except OSError as error:
        raise from_os_error(error, f"cannot use {state}") from error


def _clone(path: Path, target: Path) -> str:
    """Share all extents with a new file, which does not have its name yet; its identity. Blocking."""
    new = target.with_name(target.name + NEW)
    try:
        disk.unlink(new)
        source = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            copy = disk.create(new)
            try:
                linux.reflink(source, copy)
                identity = primaries.file_identity(copy)
            finally:
                os.close(copy)
        finally:
            os.close(source)
    except OSError as error:
        disk.unlink(new)
        if error.errno in linux.NOT_SUPPORTED or error.errno == errno.EXDEV:
            raise _no_snapshot(str(path), "its file system cannot share extents between files") from error
        raise from_os_error(error, "cannot take a snapshot", volume=str(path)) from error
    disk.crash_point("rehydrate-cloned")
    return identity


def _keep_clone(target: Path, state: Path, binding: Binding, hydrated: BitMap) -> None:
    """Make it durable, with the map it belongs to, and give it its name."""
    new = target.with_name(target.name + NEW)
    try:
        fd = os.open(new, os.O_RDWR | os.O_CLOEXEC)
        try:
            disk.fsync(fd)
        finally:
            os.close(fd)
        make_directories(state)
        HydrationMap.create(state, binding, hydrated).close()
        disk.crash_point("rehydrate-snapshot-mapped")
        rename_durably(new, target)
    except OSError as error:
        disk.unlink(new)
        raise from_os_error(error, "cannot take a snapshot", volume=binding.uri) from error


def _no_snapshot(uri: str, cause: str) -> BlockferryError:
    return BlockferryError(
        Code.UNSUPPORTED,
        f"{uri} cannot be snapshotted",
        cause=cause,
        next="keep the primary as an image on XFS or Btrfs",
        volume=uri,
    )
