"""What stands between us and a device: nbdkit's filters, injected errors, servers that are slow, stop or vanish.

Every failure surfaces with the volume, where it was and why, and ends a command with another exit status than 0; a
server that does not answer never holds anybody up for longer than its bound. `tests/integration/test_nbd.py` has the
rest of NBD.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.nbd.client import NbdClient
from blockferry.common.nbd.uri import NbdUri
from blockferry.common.volumes import NbdVolume

from tests.fault.proxy import DOWN, proxied
from tests.images import BLOCK, KIB, MIB, build, noise
from tests.library import differences, generation, replicated, synced
from tests.nbd import Served, nbdkit, qemu_nbd
from tests.support import Server, ok, refused, refused_json, run_cli

SIZE = 12 * MIB + 512
BOUND = 20.0
"""Seconds after which something hangs."""
PATIENCE = 0.5
"""Seconds without progress that are tolerated here; the command line tolerates a minute."""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Data in three places, the tail among them, which is no whole block."""
    pieces = [(MIB, noise("one", MIB)), (9 * MIB + 4 * KIB, noise("two", 64 * KIB)), (SIZE - 512, noise("tail", 512))]
    return build(tmp_path / "image.raw", SIZE, pieces)


def content(path: Path) -> bytes:
    """What a file holds."""
    return path.read_bytes()


@contextlib.asynccontextmanager
async def impatient(uri: str, *, writable: bool = False, timeout: float = PATIENCE) -> AsyncIterator[NbdVolume]:
    """An export as a volume that gives up soon."""
    client = await NbdClient.connect(NbdUri.parse(uri), timeout=timeout)
    volume = NbdVolume(client, writable=writable)
    try:
        yield volume
    finally:
        await asyncio.wait_for(volume.close(), BOUND)


async def refusal(work: Awaitable[object]) -> BlockferryError:
    with pytest.raises(BlockferryError) as caught:
        await asyncio.wait_for(work, BOUND)
    return caught.value


# --- filters in front of a source -------------------------------------------------------------------------------------


FILTERS = {
    "noparallel": ["serialize=all-requests"],
    "noextents": [],
    "blocksize-policy": ["blocksize-minimum=512", "blocksize-maximum=64K", "blocksize-error-policy=error"],
    "blocksize": ["minblock=512", "maxdata=128K"],
    "delay": ["delay-read=30ms", "delay-extents=30ms"],
    "nozero": [],
    "cacheextents": [],
}
"""nbdkit's filters and their parameters."""


@pytest.mark.parametrize("name", FILTERS)
async def test_what_a_filter_lets_through_arrives(
    server: Server, volume: str, image: Path, tmp_path: Path, name: str
) -> None:
    with nbdkit(tmp_path, "file", image, *FILTERS[name], filters=[name]) as served:
        async with impatient(served.uri) as source:
            report = await synced(source, server, volume, tmp_path)
            assert report["bytes"]["data_sent"] == MIB + 64 * KIB + 512
            assert report["source_map"] == "exact"
            # Regions with data, as far as the server tells, are read once.
            assert report["bytes"]["source_read"] == (SIZE if name == "noextents" else 2 * MIB + 512)
            assert await differences(source, server, volume) == []
        # Of a source nothing is changed, and nothing trimmed.
        assert not [one for one in served.operations() if one.split()[0] in ("Trim", "Write", "Zero")]
    assert replicated(server, volume) == content(image)


async def test_truncate_in_front_of_a_source(server: Server, volume: str, image: Path, tmp_path: Path) -> None:
    with nbdkit(tmp_path, "file", image, "truncate=14M", filters=["truncate"]) as served:
        async with impatient(served.uri) as source:
            assert (await synced(source, server, volume, tmp_path))["volume_size"] == 14 * MIB
    assert replicated(server, volume) == content(image) + bytes(14 * MIB - SIZE)
    with nbdkit(tmp_path, "file", image, "truncate=8M", filters=["truncate"]) as served:
        async with impatient(served.uri) as source:
            error = await refusal(synced(source, server, volume, tmp_path))
            assert (error.code, error.expected, error.found) == (Code.SIZE_MISMATCH, str(14 * MIB), str(8 * MIB))


# --- errors of a source -----------------------------------------------------------------------------------------------

BAD = 9 * MIB + 12 * KIB
"""A sector that cannot be read."""


def bad_sector(directory: Path, image: Path, *words: str) -> contextlib.AbstractContextManager[Served]:
    """An export of an image that cannot be read where `BAD` is."""
    plugin = [
        "eval",
        f"get_size=stat -c %s {image}",
        f"pread=if [ $4 -le {BAD} ] && [ $(( $4 + $3 )) -gt {BAD} ]; then echo EIO bad sector >&2; exit 1; fi; "
        f"dd if={image} iflag=skip_bytes,count_bytes skip=$4 count=$3 status=none",
    ]
    return nbdkit(directory, *plugin, *words)


def test_a_bad_sector_of_a_source(server: Server, volume: str, image: Path, tmp_path: Path) -> None:
    with bad_sector(tmp_path, image) as served:
        for words in (
            ["sync", served.uri, server.url(volume)],
            ["verify", served.uri, image],
            ["verify", image, served.uri],
        ):
            error = refused_json(run_cli(*words, "--json", "--quiet"), "io-error", "EIO", "cannot read")
            assert error["volume"] == served.uri
            assert error["offset"] <= BAD < error["offset"] + error["length"]
    assert generation(server, volume) == 0
    # What could be read is there, is compared, and is not sent again.
    report = server.sync(image, volume)
    assert report["bytes"]["data_sent"] <= MIB + 64 * KIB + 512
    assert replicated(server, volume) == content(image)


async def test_a_map_that_cannot_be_had_is_never_a_map_of_nothing(
    server: Server, volume: str, image: Path, tmp_path: Path
) -> None:
    server.sync(image, volume)
    for errno, code in (
        ("EIO", "io-error"),
        ("ENOMEM", "io-error"),
        ("EPERM", "unreadable"),
        ("ESHUTDOWN", "unavailable"),
    ):
        parameters = [f"error-extents={errno}", "error-extents-rate=100%"]
        with nbdkit(tmp_path, "--readonly", "file", image, *parameters, filters=["error"]) as served:
            async with impatient(served.uri) as source:
                found = await refusal(source.allocation(MIB))
                assert (found.code.value, found.offset, found.length) == (code, 0, SIZE)
                assert errno in found.cause
            if errno != "EIO":
                continue
            for words in (
                ["sync", served.uri, server.url(volume)],
                ["plan", served.uri, server.url(volume)],
                ["verify", server.url(volume), served.uri],
                ["volume", "show", served.uri],
            ):
                error = refused_json(run_cli(*words, "--json", "--quiet"), code, errno, "cannot read the allocation")
                assert (error["volume"], error["offset"], error["length"]) == (served.uri, 0, SIZE)
    assert generation(server, volume) == 1


def test_a_read_that_fails_once_in_a_while(server: Server, volume: str, tmp_path: Path) -> None:
    """However many reads go well before or beside it: no generation, unless all of them did."""
    path = build(tmp_path / "full.raw", 64 * MIB, [(0, noise("full", 64 * MIB))])
    with nbdkit(tmp_path, "file", path, "error-pread-rate=50%", filters=["error"]) as served:
        for _ in range(2):
            before = served.logged().count("return=-1")
            done = run_cli("sync", served.uri, server.url(volume), "--quiet")
            if served.logged().count("return=-1") > before:
                refused(done, served.uri, "EIO", "offset")
            else:
                assert done.status == 0
                assert replicated(server, volume) == content(path)
        assert served.logged().count("return=-1") > 0


# --- servers that are slow, stop or vanish ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nbdkit", "qemu-nbd"])
async def test_a_server_that_stops_answering_ends_a_sync_within_its_bound(
    server: Server, volume: str, image: Path, tmp_path: Path, kind: str
) -> None:
    """Stopped, as on a host that hangs: the connection stays and nothing comes."""
    start = nbdkit(tmp_path, "file", image) if kind == "nbdkit" else qemu_nbd(tmp_path, "-f", "raw", "-r", image)
    with start as served:
        async with impatient(served.uri) as source:
            with served.stopped():
                error = await refusal(synced(source, server, volume, tmp_path))
            assert (error.code, error.volume) == (Code.UNAVAILABLE, served.uri)
            assert error.offset is not None and error.length is not None
            assert "no progress for 0.5 s" in error.cause
            # It has failed for good, also when the server goes on.
            with pytest.raises(BlockferryError):
                await source.read_into(0, memoryview(bytearray(BLOCK)))
    assert generation(server, volume) == 0


async def test_a_slow_server_that_makes_progress_is_waited_for(
    server: Server, volume: str, image: Path, tmp_path: Path
) -> None:
    """Each answer takes a while, and all of them together far more than is tolerated."""
    words = ["delay-read=250ms", "delay-extents=250ms", "blocksize-maximum=64K"]
    with nbdkit(tmp_path, "--threads=1", "file", image, *words, filters=["delay", "blocksize-policy"]) as served:
        async with impatient(served.uri, timeout=1.5) as source:
            report = await asyncio.wait_for(synced(source, server, volume, tmp_path), BOUND)
    assert report["seconds"]["total"] > 1.5
    assert report["bytes"]["data_sent"] == MIB + 64 * KIB + 512
    assert replicated(server, volume) == content(image)


async def test_a_handshake_that_does_not_come_to_an_end(image: Path, tmp_path: Path) -> None:
    with nbdkit(tmp_path, "file", image, "delay-open=30", filters=["delay"]) as served:
        error = await refusal(NbdClient.connect(NbdUri.parse(served.uri), handshake=PATIENCE))
        assert error.code is Code.UNAVAILABLE
        assert "did not answer in 0.5 s" in error.cause
        served.kill()


async def test_a_server_that_does_not_let_go(image: Path, tmp_path: Path) -> None:
    with nbdkit(tmp_path, "file", image, "delay-close=30", filters=["delay"]) as served:
        async with impatient(served.uri) as source:
            await source.read_into(0, memoryview(bytearray(BLOCK)))
        served.kill()


@pytest.mark.parametrize("at", [MIB // 2, 3 * MIB // 2], ids=["first", "second"])
def test_a_connection_that_breaks_in_the_middle_of_an_answer(
    server: Server, volume: str, image: Path, tmp_path: Path, at: int
) -> None:
    with nbdkit(tmp_path, "file", image, tcp=True) as served:
        port = served.uri.rpartition(":")[2].strip("/")
        with proxied(f"127.0.0.1:{port}") as proxy:
            proxy.judge = lambda way, passed, _: way != DOWN or passed < at
            uri = "nbd://" + proxy.address.removeprefix("grpc://") + "/"
            done = run_cli("sync", uri, server.url(volume), "--json", "--quiet", timeout=BOUND)
            error = refused_json(done, "unavailable", uri, "connection", "check the server")
            assert error["offset"] is not None and error["length"] is not None
            assert proxy.cuts
    assert generation(server, volume) == 0
    server.sync(image, volume)
    assert replicated(server, volume) == content(image)


# --- writing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("filters", [[], ["nozero"]], ids=["zeroes", "nozero"])
async def test_a_server_that_fills_up_says_where(tmp_path: Path, filters: list[str]) -> None:
    """Of a write in many pieces the one that failed is named."""
    disk = build(tmp_path / "disk", 4 * MIB, [(0, noise("disk", 4 * MIB))])
    full = 2 * MIB
    plugin = [
        "eval",
        "get_size=echo 4194304",
        f"pread=dd if={disk} iflag=skip_bytes,count_bytes skip=$4 count=$3 status=none",
        f"pwrite=if [ $(( $4 + $3 )) -gt {full} ]; then cat >/dev/null; echo ENOSPC full >&2; exit 1; fi; "
        f"dd of={disk} oflag=seek_bytes conv=notrunc seek=$4 status=none",
        "flush=exit 0",
        "can_flush=exit 0",
        "blocksize-maximum=256K",
        "blocksize-error-policy=error",
    ]
    with nbdkit(tmp_path, *plugin, filters=[*filters, "blocksize-policy"]) as served:
        async with impatient(served.uri, writable=True) as volume:
            error = await refusal(volume.write([(MIB, noise("new", 2 * MIB))]))
            assert (error.code, error.length) == (Code.OUT_OF_SPACE, 256 * KIB)
            assert error.offset == full
            error = await refusal(volume.unmap([(3 * MIB, BLOCK)]))
            assert (error.code, error.offset, error.length) == (Code.OUT_OF_SPACE, 3 * MIB, BLOCK)
            # The connection goes on: it is the disk that has failed.
            await volume.write([(0, b"x" * BLOCK)])
            assert await volume.unmap([(BLOCK, BLOCK)]) == BLOCK
            await volume.flush()
        assert not [one for one in served.operations() if one.startswith("Trim")]
    assert content(disk)[: 2 * BLOCK] == b"x" * BLOCK + bytes(BLOCK)
    assert content(disk)[full:] == noise("disk", 4 * MIB)[full:]


async def test_a_flush_that_fails_is_told(tmp_path: Path) -> None:
    plugin = [
        "eval", "get_size=echo 1048576", "pread=head -c $3 /dev/zero", "pwrite=cat >/dev/null",
        "can_flush=exit 0", "flush=echo EIO lost >&2; exit 1",
    ]  # fmt: skip
    with nbdkit(tmp_path, *plugin) as served:
        async with impatient(served.uri, writable=True) as volume:
            await volume.write([(0, b"x" * BLOCK)])
            error = await refusal(volume.flush())
            assert (error.code, error.volume) == (Code.IO_ERROR, served.uri)
            assert "EIO" in error.cause and error.what == "cannot flush"
            # The map of a volume that cannot be flushed is none.
            assert (await refusal(volume.allocation(MIB))).code is Code.IO_ERROR


WRITES: dict[str, Callable[[NbdVolume], Awaitable[object]]] = {
    "write": lambda volume: volume.write([(BLOCK, b"x" * BLOCK)]),
    "zero": lambda volume: volume.unmap([(BLOCK, BLOCK)]),
    "flush": lambda volume: volume.flush(),
}


@pytest.mark.parametrize("name", WRITES)
async def test_a_server_that_stops_in_the_middle_of_a_change(image: Path, tmp_path: Path, name: str) -> None:
    with nbdkit(tmp_path, "file", image) as served:
        async with impatient(served.uri, writable=True) as volume:
            with served.stopped():
                error = await refusal(WRITES[name](volume))
            assert (error.code, error.volume) == (Code.UNAVAILABLE, served.uri)
            assert (error.offset, error.length) == ((0, 0) if name == "flush" else (BLOCK, BLOCK))
            # Nobody knows what it did: nothing more is written there.
            assert (await refusal(WRITES["write"](volume))).code is Code.UNAVAILABLE


async def test_what_is_offered_read_only_is_never_written(image: Path, tmp_path: Path) -> None:
    before = content(image)
    with nbdkit(tmp_path, "--readonly", "file", image) as served:
        assert (await refusal(NbdVolume.open(served.uri, writable=True))).code is Code.READ_ONLY
        async with impatient(served.uri) as volume:
            for work in WRITES.values():
                if work is not WRITES["flush"]:
                    assert (await refusal(work(volume))).code is Code.READ_ONLY
        assert not [one for one in served.operations() if one.split()[0] in ("Write", "Zero", "Trim", "Flush")]
    assert content(image) == before


# --- exactly these requests -------------------------------------------------------------------------------------------


def test_requests_of_a_source_that_others_may_write(server: Server, volume: str, image: Path, tmp_path: Path) -> None:
    """Before the map is drawn the server flushes: what is not on its way to the disk yet may look like a hole. Then
    each run of regions with data is read in one request, up to a batch, and nothing else is."""
    map_of_it = ["Flush", f"Extents offset=0x0 count={SIZE:#x} req_one=0"]
    reads = [
        "Read offset=0x100000 count=0x100000",
        "Read offset=0x900000 count=0x100000",
        "Read offset=0xc00000 count=0x200",
    ]
    with nbdkit(tmp_path, "file", image) as served:
        seen = 0

        def asked() -> list[str]:
            nonlocal seen
            found = served.operations()[seen:]
            seen += len(found)
            return found

        ok("volume", "show", served.uri)
        assert asked() == map_of_it
        ok("sync", served.uri, server.url(volume))
        found = asked()
        assert (found[:2], sorted(found[2:])) == (map_of_it, reads)
        # Nothing changed; then one block did. Either way each region is read once, to be hashed and to be sent.
        for edit in (b"", noise("edit", BLOCK)):
            with image.open("r+b") as file:
                file.seek(MIB)
                file.write(edit)
            report = ok("sync", served.uri, server.url(volume))
            assert report["bytes"]["data_sent"] == len(edit)
            found = asked()
            assert (found[:2], sorted(found[2:])) == (map_of_it, reads)
        assert ok("verify", served.uri, server.url(volume))["outcome"] == "equal"
        found = asked()
        assert (found[:2], sorted(found[2:])) == (map_of_it, reads)
