"""NBD exports as volumes, by the servers that people run: qemu-nbd, and nbdkit with its filters, which inject faults
and write down every request. Requests are counted exactly."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.nbd.client import NbdClient
from blockferry.common.nbd.protocol import Command
from blockferry.common.nbd.uri import NbdUri
from blockferry.common.regions import Provenance
from blockferry.common.volumes import NbdVolume

from tests.images import BLOCK, KIB, MIB, Zeros, build, noise
from tests.nbd import Served, certificates, nbdkit, qemu_img, qemu_io, qemu_nbd
from tests.support import Server, finish, ok, refused, refused_json, run_cli, start_cli, until

BOUND = 20.0
"""Seconds after which something hangs."""


@contextlib.asynccontextmanager
async def opened(uri: str, *, writable: bool = False) -> AsyncIterator[NbdVolume]:
    async with asyncio.timeout(BOUND):
        volume = await NbdVolume.open(uri, writable=writable)
        try:
            yield volume
        finally:
            await volume.close()


async def content_of(volume: NbdVolume) -> bytes:
    buffer = bytearray(volume.size)
    await volume.read_into(0, memoryview(buffer))
    return bytes(buffer)


def content(path: Path) -> bytes:
    """What a file holds."""
    return path.read_bytes()


def held(path: Path) -> int:
    """Bytes of disk a file takes."""
    return path.stat().st_blocks * 512


async def allocated(volume: NbdVolume, region_size: int = MIB) -> list[tuple[int, int]]:
    found = await volume.allocation(region_size)
    assert found.provenance is Provenance.EXACT
    return list(found.runs())


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """4 MiB and a tail that is no whole block, with one extent of data."""
    return build(tmp_path / "image.raw", 4 * MIB + 512, [(MIB + 64 * KIB, noise("nbd", 64 * KIB))])


# --- exactly these requests -----------------------------------------------------------------------------------------


def test_requests_of_the_commands(server: Server, volume: str, image: Path, tmp_path: Path) -> None:
    """One extent of data: the map in one request, the one region that holds data in one read, and nothing else."""
    look, read = "Extents offset=0x0 count=0x400200 req_one=0", "Read offset=0x100000 count=0x100000"
    with nbdkit(tmp_path, "--readonly", "file", image) as served:

        def asked() -> list[str]:
            found = served.operations()[asked_before[0] :]
            asked_before[0] += len(found)
            return found

        asked_before = [0]
        shown = ok("volume", "show", served.uri)
        assert (shown["size"], shown["map"], shown["zeroing"]) == (4 * MIB + 512, "exact", "read-only")
        assert (shown["sector_size"], shown["preferred_size"], shown["holders"]) == (1, 4096, [])
        assert asked() == [look]
        planned = ok("plan", served.uri, server.url(volume))
        assert planned["regions"] == {"skip": 4, "unmap": 0, "send": 1, "compare": 0}
        assert asked() == [look]
        report = ok("sync", served.uri, server.url(volume))
        assert (report["source"], report["source_map"]) == (served.uri, "exact")
        assert report["bytes"]["data_sent"] == 64 * KIB
        assert asked() == [look, read]
        assert server.image(volume).read_bytes() == image.read_bytes()
        # Everything is equal: it is read once more, and nothing is sent.
        report = ok("sync", served.uri, server.url(volume))
        assert report["results"] == {"zero": 0, "equal": 1, "changed": 0}
        assert report["bytes"]["data_sent"] == 0
        assert asked() == [look, read]
        assert ok("verify", served.uri, server.url(volume))["outcome"] == "equal"
        assert asked() == [look, read]
        with image.open("r+b") as file:
            file.seek(MIB + 64 * KIB)
            file.write(b"changed")
        different = run_cli("verify", served.uri, server.url(volume), "--json", "--quiet")
        assert different.status == 3
        assert different.report["ranges"] == [{"offset": MIB + 64 * KIB, "length": BLOCK}]


async def test_requests_of_writing(image: Path, tmp_path: Path) -> None:
    with nbdkit(tmp_path, "file", image) as served:
        async with opened(served.uri, writable=True) as volume:
            assert volume.zeroing == "write-zeroes"
            await volume.write([(0, b"a" * BLOCK), (4 * MIB, b"tail" * 128)])
            assert await volume.unmap([(MIB, MIB)]) == 64 * KIB
            # This server does not say whether it would write zeros out.
            assert await volume.deallocate([(0, BLOCK)]) == (0, [(0, BLOCK)])
            assert await volume.unmap([(0, BLOCK)]) == BLOCK
            await volume.flush()
            assert await allocated(volume) == [(4, 1)]
        assert sorted(served.operations()[:2]) == [
            "Write offset=0x0 count=0x1000 fua=0",
            "Write offset=0x400000 count=0x200 fua=0",
        ]
        assert served.operations()[2:] == [
            "Extents offset=0x100000 count=0x100000 req_one=0",
            "Zero offset=0x100000 count=0x100000 trim=1 fua=0 fast=0",
            "Extents offset=0x0 count=0x1000 req_one=0",
            "Zero offset=0x0 count=0x1000 trim=1 fua=0 fast=0",
            "Flush",
            "Flush",
            "Extents offset=0x0 count=0x400200 req_one=0",
        ]
    assert content(image) == bytes(4 * MIB) + b"tail" * 128
    assert held(image) <= 8 * KIB


async def test_fua_and_written_zeros(tmp_path: Path) -> None:
    """A server that neither flushes nor zeroes: `eval` does what its scripts do."""
    disk = build(tmp_path / "disk", 64 * KIB, [(0, noise("eval", 64 * KIB))])
    plugin = [
        "eval",
        f"get_size=stat -c %s {disk}",
        f"pread=dd if={disk} iflag=skip_bytes,count_bytes skip=$4 count=$3 status=none",
        f"pwrite=dd of={disk} oflag=seek_bytes conv=notrunc seek=$4 status=none",
        "can_write=exit 0",
        "can_fua=echo native",
    ]
    with nbdkit(tmp_path, *plugin, filters=["nozero"]) as served:
        async with opened(served.uri, writable=True) as volume:
            assert volume.zeroing == "write"
            assert await volume.deallocate([(0, BLOCK)]) == (0, [(0, BLOCK)])
            assert await volume.unmap([(0, BLOCK)]) == BLOCK
            await volume.flush()
        assert [one for one in served.operations() if not one.startswith("Extents")] == [
            "Write offset=0x0 count=0x1000 fua=1"
        ]
    assert content(disk) == bytes(BLOCK) + noise("eval", 64 * KIB)[BLOCK:]


async def test_a_server_that_would_write_zeros_out(image: Path, tmp_path: Path) -> None:
    parameters = ["zeromode=emulate", "fastzeromode=slow"]
    with nbdkit(tmp_path, "file", image, *parameters, filters=["nozero"]) as served:
        async with opened(served.uri, writable=True) as volume:
            assert await volume.deallocate([(MIB, MIB)]) == (0, [(MIB, MIB)])
            assert await volume.unmap([(MIB, MIB)]) == 64 * KIB
        # Asked for fast zeros it said no, and asked again it wrote them.
        zeroed = [one for one in served.operations() if one.startswith(("Zero", "Write"))]
        assert zeroed == ["Write offset=0x100000 count=0x100000 fua=0"]
    assert content(image) == bytes(4 * MIB + 512)


# --- what servers can and cannot do ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "exact"),
    [
        ([], True),
        (["--no-sr"], False),
        (["--mask-handshake=0"], False),
        (["--mask-handshake=1"], True),
    ],
    ids=["all", "no structured replies", "newstyle that is not fixed", "zeroes after the export"],
)
@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
async def test_handshakes(image: Path, tmp_path: Path, options: list[str], exact: bool, tcp: bool) -> None:
    with nbdkit(tmp_path, *options, "file", image, tcp=tcp) as served:
        async with opened(served.uri) as volume:
            assert await content_of(volume) == content(image)
            found = await volume.allocation(MIB)
            assert found.provenance is (Provenance.EXACT if exact else Provenance.ABSENT)
            assert list(found.runs()) == ([(1, 1)] if exact else [(0, 5)])


async def test_oldstyle_is_refused(image: Path, tmp_path: Path) -> None:
    with nbdkit(tmp_path, "--oldstyle", "file", image) as served:
        with pytest.raises(BlockferryError, match="oldstyle") as caught:
            await NbdVolume.open(served.uri)
        assert caught.value.code is Code.PROTOCOL


async def test_names_of_exports(tmp_path: Path) -> None:
    exports = tmp_path / "exports"
    exports.mkdir()
    build(exports / "a b+ö", MIB, [(0, b"this one")])
    with nbdkit(tmp_path, "file", f"dir={exports}") as served:
        uri = served.uri.replace(":///", ":///a%20b+%C3%B6")
        async with opened(uri) as volume:
            assert (await content_of(volume))[:9] == b"this one\0"
        with pytest.raises(BlockferryError) as caught:
            await NbdVolume.open(served.uri.replace(":///", ":///other"))
        assert caught.value.code in (Code.NOT_FOUND, Code.UNAVAILABLE)


async def test_read_only_is_refused_for_writing(image: Path, tmp_path: Path) -> None:
    with nbdkit(tmp_path, "--readonly", "file", image) as served:
        with pytest.raises(BlockferryError) as caught:
            await NbdVolume.open(served.uri, writable=True)
        assert caught.value.code is Code.READ_ONLY


async def test_noextents_and_truncate(image: Path, tmp_path: Path) -> None:
    with nbdkit(tmp_path, "--readonly", "file", image, filters=["noextents"]) as served:
        async with opened(served.uri) as volume:
            assert await allocated(volume) == [(0, 5)]
            assert await content_of(volume) == content(image)
    with nbdkit(tmp_path, "--readonly", "file", image, "round-up=2M", filters=["truncate"]) as served:
        async with opened(served.uri) as volume:
            assert volume.size == 6 * MIB
            assert await allocated(volume) == [(1, 1)]
            assert await content_of(volume) == content(image) + bytes(2 * MIB - 512)


async def test_block_sizes(tmp_path: Path) -> None:
    """The filter refuses whatever does not keep to them."""
    data = noise("blocks", MIB)
    path = build(tmp_path / "blocks", MIB, [(0, data)])
    limits = ["blocksize-error-policy=error", "blocksize-preferred=64K"]
    large = ["blocksize-minimum=64K", "blocksize-maximum=256K"]
    with nbdkit(tmp_path, "file", path, *limits, *large, filters=["blocksize-policy"]) as served:
        async with opened(served.uri) as volume:
            assert await content_of(volume) == data
            assert sorted(served.operations()) == [
                f"Read offset={at:#x} count=0x40000" for at in range(0, MIB, 1 << 18)
            ]
            buffer = bytearray(100)
            await volume.read_into(65530, memoryview(buffer))
            assert buffer == data[65530:65630]
        with pytest.raises(BlockferryError, match="65536 bytes"):
            await NbdVolume.open(served.uri, writable=True)
    with nbdkit(tmp_path, "file", path, *limits, "blocksize-minimum=4K", filters=["blocksize-policy"]) as served:
        async with opened(served.uri, writable=True) as volume:
            await volume.write([(BLOCK, bytes(BLOCK))])
            await volume.unmap([(3 * BLOCK, BLOCK)])
    assert content(path)[: 5 * BLOCK] == b"".join(
        bytes(BLOCK) if at in (1, 3) else data[at * BLOCK : (at + 1) * BLOCK] for at in range(5)
    )


async def test_a_hole_alone_proves_nothing(tmp_path: Path) -> None:
    """What a thin device may answer: deallocated, and whatever was there before is read."""
    plugin = [
        "eval",
        "get_size=echo 4194304",
        "pread=head -c $3 /dev/zero | tr '\\0' x",
        "can_extents=exit 0",
        "extents=echo 0 1M hole; echo 1M 1M zero; echo 2M 1M hole,zero; echo 3M 1M",
    ]
    with nbdkit(tmp_path, *plugin) as served:
        async with opened(served.uri) as volume:
            assert await allocated(volume) == [(0, 1), (3, 1)]


async def test_the_server_ends_with_us(image: Path, tmp_path: Path) -> None:
    """Every connection is closed: a server that leaves with its last client does."""
    with nbdkit(tmp_path, "file", image, filters=["exitlast"]) as served:
        async with opened(served.uri) as volume:
            await volume.allocation(MIB)
            assert served.process.poll() is None
        assert served.process.wait(BOUND) == 0


# --- faults ---------------------------------------------------------------------------------------------------------


def test_a_sync_that_cannot_read(server: Server, volume: str, image: Path, tmp_path: Path) -> None:
    with nbdkit(tmp_path, "file", image, "error-pread=EIO", "error-pread-rate=100%", filters=["error"]) as served:
        done = run_cli("sync", served.uri, server.url(volume), "--json", "--quiet")
        error = refused_json(done, "io-error", "EIO", "input/output error", f"offset {MIB}")
        assert (error["volume"], error["offset"], error["length"]) == (served.uri, MIB, MIB)
    assert run_cli("replica", "show", server.url(volume), "--json").report["generation"] == 0


def test_a_sync_that_cannot_have_the_map(server: Server, volume: str, image: Path, tmp_path: Path) -> None:
    """A map that fails is not a map of nothing."""
    parameters = ["error-extents=ENOMEM", "error-extents-rate=100%"]
    with nbdkit(tmp_path, "file", image, *parameters, filters=["error"]) as served:
        refused(run_cli("sync", served.uri, server.url(volume), "--quiet"), served.uri, "ENOMEM", "offset 0")


@pytest.mark.parametrize(
    ("error", "code"), [("ENOSPC", Code.OUT_OF_SPACE), ("EIO", Code.IO_ERROR), ("EPERM", Code.READ_ONLY)]
)
async def test_writes_that_fail(image: Path, tmp_path: Path, error: str, code: Code) -> None:
    parameters = [f"error-pwrite={error}", "error-pwrite-rate=100%", f"error-zero={error}", "error-zero-rate=100%"]
    before = content(image)
    with nbdkit(tmp_path, "file", image, *parameters, filters=["error"]) as served:
        async with opened(served.uri, writable=True) as volume:
            for work in (volume.write([(BLOCK, b"x" * BLOCK)]), volume.unmap([(BLOCK, BLOCK)])):
                with pytest.raises(BlockferryError) as caught:
                    await work
                assert (caught.value.code, caught.value.offset, caught.value.length) == (code, BLOCK, BLOCK)
                assert error in caught.value.cause
    assert content(image) == before


async def test_random_errors_are_all_seen(tmp_path: Path) -> None:
    """Of many reads side by side some fail: each of them either has its data or says so."""
    data = noise("random", MIB)
    path = build(tmp_path / "random", MIB, [(0, data)])
    with nbdkit(tmp_path, "file", path, "error-pread-rate=30%", filters=["error"]) as served:
        async with opened(served.uri) as volume:

            async def one(at: int) -> int:
                buffer = bytearray(BLOCK)
                problem = None
                try:
                    await volume.read_into(at, memoryview(buffer))
                except BlockferryError as error:
                    problem = error
                if problem is None:
                    assert buffer == data[at : at + BLOCK]
                    return 0
                assert (problem.code, problem.offset, problem.length) == (Code.IO_ERROR, at, BLOCK)
                return 1

            failed = sum(await asyncio.gather(*(one(at) for at in range(0, MIB, BLOCK))))
        log = served.logged()
        assert failed == log.count("return=-1") > 0


def test_a_server_that_dies_under_a_sync(server: Server, volume: str, image: Path, tmp_path: Path) -> None:
    with nbdkit(tmp_path, "file", image, "delay-read=30", filters=["delay"]) as served:
        syncing = start_cli("sync", served.uri, server.url(volume), "--quiet")
        until(lambda: any(one.startswith("Read") for one in served.operations()), "the source is read")
        served.kill()
        refused(finish(syncing), served.uri, f"offset {MIB}", "server closed the connection", "check the server")
    assert run_cli("replica", "show", server.url(volume), "--json").report["generation"] == 0


async def test_a_server_that_takes_its_time(image: Path, tmp_path: Path) -> None:
    with nbdkit(tmp_path, "file", image, "delay-read=5", filters=["delay"]) as served:
        client = await NbdClient.connect(NbdUri.parse(served.uri), timeout=0.5)
        with pytest.raises(BlockferryError) as caught:
            await asyncio.wait_for(client.read_into(BLOCK, memoryview(bytearray(BLOCK))), BOUND)
        assert (caught.value.code, caught.value.offset, caught.value.length) == (Code.UNAVAILABLE, BLOCK, BLOCK)
        await asyncio.wait_for(client.close(), BOUND)
        served.kill()


def test_nobody_there(server: Server, volume: str, tmp_path: Path) -> None:
    uri = f"nbd+unix:///?socket={tmp_path}/none"
    refused(run_cli("sync", uri, server.url(volume), "--quiet"), uri, "no such file")
    refused(run_cli("volume", "show", uri + "&x=y"), "'x' is not known", "nbd+unix:///EXPORT?socket=PATH")


# --- TLS ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return certificates(tmp_path_factory.mktemp("tls") / "pki")


def tls_server(
    kind: str, directory: Path, pki: Path, image: Path, *, tcp: bool
) -> contextlib.AbstractContextManager[Served]:
    """One that asks for a client's certificate too."""
    if kind == "nbdkit":
        words = ["--tls=require", f"--tls-certificates={pki}", "--tls-verify-peer", "file", str(image)]
        return nbdkit(directory, *words, tcp=tcp, scheme="nbds")
    creds = f"tls-creds-x509,id=tls0,endpoint=server,verify-peer=on,dir={pki}"
    return qemu_nbd(directory, "--object", creds, "--tls-creds=tls0", "-f", "raw", image, tcp=tcp, scheme="nbds")


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
@pytest.mark.parametrize("kind", ["nbdkit", "qemu-nbd"])
async def test_tls(kind: str, tcp: bool, pki: Path, image: Path, tmp_path: Path) -> None:
    with tls_server(kind, tmp_path, pki, image, tcp=tcp) as served:
        uri = f"{served.uri}{'?' if tcp else '&'}tls-certificates={pki}"
        async with opened(uri, writable=True) as volume:
            assert await content_of(volume) == content(image)
            assert await allocated(volume) == [(1, 1)]
            await volume.write([(2 * MIB, noise("tls", MIB))])
            await volume.flush()
        assert content(image)[2 * MIB : 3 * MIB] == noise("tls", MIB)
        # Of another name, by an authority that is not trusted, without TLS, and without a certificate.
        for wrong, words in (
            (f"{uri}&tls-hostname=other.example", ["TLS failed", "other.example"]),
            (served.uri, ["TLS failed", "certificate verify failed"]),
            (served.uri.replace("nbds", "nbd"), ["ERR_TLS_REQD", "write nbds"]),
        ):
            with pytest.raises(BlockferryError) as caught:
                await asyncio.wait_for(NbdVolume.open(wrong), BOUND)
            for word in words:
                assert word in caught.value.line()
        nobody = ssl.create_default_context(cafile=str(pki / "ca-cert.pem"))
        with pytest.raises(BlockferryError) as caught:
            await asyncio.wait_for(NbdVolume.open(served.uri, tls=nobody), BOUND)
        assert caught.value.code is Code.UNAVAILABLE


async def test_a_server_without_tls_is_not_talked_to_in_the_clear(image: Path, tmp_path: Path, pki: Path) -> None:
    with nbdkit(tmp_path, "file", image, scheme="nbds") as served:
        with pytest.raises(BlockferryError) as caught:
            await NbdVolume.open(f"{served.uri}&tls-certificates={pki}")
        assert caught.value.code is Code.UNSUPPORTED
        assert served.operations() == []


def test_a_sync_over_tls(server: Server, volume: str, image: Path, tmp_path: Path, pki: Path) -> None:
    with tls_server("nbdkit", tmp_path, pki, image, tcp=True) as served:
        report = ok("sync", f"{served.uri}?tls-certificates={pki}", server.url(volume))
        # The same from the flags, where the URI names none.
        files = {"cert": "client-cert.pem", "key": "client-key.pem", "ca": "ca-cert.pem"}
        flags = [f"--tls-{name}={pki / file}" for name, file in files.items()]
        assert ok("verify", served.uri, server.url(volume), *flags)["outcome"] == "equal"
        assert report["bytes"]["data_sent"] == 64 * KIB
    assert server.image(volume).read_bytes() == image.read_bytes()


# --- qemu-nbd -------------------------------------------------------------------------------------------------------


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """A qcow2 image over another: data of both, data that became zeros, and a hole in a cluster's middle."""
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", base, "16M")
    qemu_io(base, "write -P 0x11 0 3M", "write -P 0x22 5M 64k", "write -P 0x33 9M 1M", "write -P 0x44 15M 1M")
    qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top, "17M")
    qemu_io(
        top, "write -P 0x55 1M 512k", "write -z 9M 512k", "write -P 0x66 12345 1000", "write -z 2M 1M", "discard 5M 64k"
    )
    return top


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
def test_a_qcow2_image_becomes_a_replica(server: Server, volume: str, chain: Path, tmp_path: Path, tcp: bool) -> None:
    expected = tmp_path / "expected.raw"
    qemu_img("convert", "-O", "raw", chain, expected)
    with qemu_nbd(tmp_path, "--read-only", "-f", "qcow2", chain, tcp=tcp) as served:
        report = ok("sync", served.uri, server.url(volume))
        assert report["source_map"] == "exact"
        # 0, 1, half of 9 and 15 hold data; 2 and 5 are zeros on top of data.
        assert report["regions"] == {"skip": 13, "unmap": 0, "send": 4, "compare": 0}
        # Qemu tells within a read which clusters are zeros: these are not even sent to us.
        assert report["bytes"]["source_read"] == report["bytes"]["data_sent"] == 3 * MIB + 512 * KIB
        assert ok("verify", served.uri, server.url(volume))["outcome"] == "equal"
    replica = server.image(volume)
    assert replica.read_bytes() == expected.read_bytes()
    assert "identical" in qemu_img("compare", "-f", "raw", "-F", "qcow2", replica, chain)

    # What is trimmed in between is unmapped, and nothing of it travels.
    qemu_io(chain, "write -z -u 0 1M", "write -P 0x77 10M 4k")
    with qemu_nbd(tmp_path, "--read-only", "-f", "qcow2", chain, tcp=tcp) as served:
        report = ok("sync", served.uri, server.url(volume))
    assert report["regions"] == {"skip": 12, "unmap": 1, "send": 1, "compare": 3}
    # A cluster of 64 KiB was allocated for the 4 KiB.
    assert report["bytes"]["data_sent"] == BLOCK
    assert "identical" in qemu_img("compare", "-f", "raw", "-F", "qcow2", server.image(volume), chain)


async def test_writing_a_qcow2_image(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "16M")
    qemu_io(path, "write -P 0x11 0 4M")
    with qemu_nbd(tmp_path, "-f", "qcow2", "--discard=unmap", path) as served:
        async with opened(served.uri, writable=True) as volume:
            await volume.write([(at * 128 * KIB, noise(at, 64 * KIB)) for at in range(50)])
            assert await volume.unmap([(0, MIB), (8 * MIB, MIB)]) == MIB
            held, left = await volume.deallocate([(2 * MIB, MIB)])
            assert (held, list(left)) == (MIB, [])
            await volume.flush()
            assert await allocated(volume) == [(1, 1), (3, 4)]
    expected = bytearray(b"\x11" * 4 * MIB + bytes(12 * MIB))
    for at in range(50):
        expected[at * 128 * KIB : at * 128 * KIB + 64 * KIB] = noise(at, 64 * KIB)
    expected[:MIB] = expected[2 * MIB : 3 * MIB] = bytes(MIB)
    raw = tmp_path / "raw"
    qemu_img("convert", "-O", "raw", path, raw)
    assert content(raw) == expected
    assert "No errors" in qemu_img("check", path)


async def test_raw_by_qemu(image: Path, tmp_path: Path) -> None:
    qemu_img("resize", "-q", "-f", "raw", image, "5M")
    with qemu_nbd(tmp_path, "-f", "raw", image) as served:
        async with opened(served.uri, writable=True) as volume:
            assert await allocated(volume) == [(1, 1)]
            await volume.write([(4 * MIB, b"x" * MIB)])
            assert await volume.unmap([(MIB, MIB)]) == 64 * KIB
            assert await content_of(volume) == bytes(4 * MIB) + b"x" * MIB
            assert await allocated(volume) == [(4, 1)]
    assert content(image) == bytes(4 * MIB) + b"x" * MIB


async def test_a_large_read_by_many_connections(tmp_path: Path) -> None:
    data = noise("large", 40 * MIB)
    path = build(tmp_path / "large.raw", 40 * MIB, [(0, data)])
    with qemu_nbd(tmp_path, "--read-only", "-f", "raw", path) as served:
        async with opened(served.uri) as volume:
            await asyncio.gather(*volume._client._joining)
            assert len(volume._client._connections) == 4
            assert await content_of(volume) == data
            buffer = bytearray(len(data))
            view = memoryview(buffer)
            await asyncio.gather(
                *(volume.read_into(at, view[at : at + MIB]) for at in range(0, 40 * MIB, MIB)),
            )
            assert buffer == data
            assert all(one.sent[Command.READ] for one in volume._client._connections)


def test_what_others_wrote_is_what_is_read(tmp_path: Path, server: Server, volume: str) -> None:
    """nbdcopy writes, blockferry reads: zeros written out are data for the server, and are not sent."""
    source = build(tmp_path / "source.raw", 3 * MIB, [(0, Zeros(MIB)), (MIB, noise("copied", BLOCK))])
    with nbdkit(tmp_path, "memory", "3M") as served:
        subprocess.run(["nbdcopy", "--allocated", source, served.uri], check=True)
        report = ok("sync", served.uri, server.url(volume))
    assert report["bytes"]["data_sent"] == BLOCK
    assert server.image(volume).read_bytes() == source.read_bytes()
