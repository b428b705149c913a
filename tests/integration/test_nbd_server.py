"""Our NBD server against the clients that people use: libnbd's tools and its shell, QEMU's, nbdkit's nbd plugin, fio,
and our own; and against a model of bytes, over several connections at once."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from blockferry.common.nbd.client import NbdClient
from blockferry.common.nbd.connection import Pending
from blockferry.common.nbd.handshake import encode_client_flags, encode_option, encode_option_reply
from blockferry.common.nbd.protocol import Command, Option, OptionReply
from blockferry.common.nbd.uri import NbdUri
from blockferry.common.settings import Tls
from blockferry.common.volumes import ImageVolume, NbdVolume, Volume
from blockferry.common.volumes.scratch import ScratchVolume
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.certificates import Issuer
from tests.filesystems import FileSystems, Unavailable
from tests.images import KIB, MIB, build, noise
from tests.nbd import nbdkit, qemu_img
from tests.nbd_serving import BOUND, Serving, opener, run, serving

SIZE = 8 * MIB + 512
PIECES = [(0, noise("peers", 64 * KIB)), (MIB, noise("more", MIB + 4096)), (SIZE - 512, noise("tail", 512))]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return build(tmp_path / "image.raw", SIZE, PIECES)


@pytest.fixture
def served(image: Path) -> Iterator[Serving]:
    with serving(opener(image)) as found:
        yield found


def content(path: Path) -> bytes:
    """What a file holds."""
    return path.read_bytes()


def nbdsh(uri: str, script: str) -> str:
    return run("nbdsh", "--uri", uri, "-c", script)


def runs(found: list[dict[str, int]]) -> list[tuple[int, int, int]]:
    return [(one["offset"], one["length"], one["type"]) for one in found]


EXPECTED = [
    (0, 64 * KIB, 0),
    (64 * KIB, MIB - 64 * KIB, 3),
    (MIB, MIB + 4096, 0),
    (2 * MIB + 4096, SIZE - 512 - 2 * MIB - 4096, 3),
    (SIZE - 512, 512, 0),
]
"""(offset, length, flags) of the image in base:allocation."""

# --- libnbd ---------------------------------------------------------------------------------------------------------


def test_nbdinfo(served: Serving) -> None:
    found = json.loads(run("nbdinfo", "--json", served.uri))
    assert (found["protocol"], found["TLS"], found["structured"]) == ("newstyle-fixed", False, True)
    (export,) = found["exports"]
    assert (export["export-name"], export["description"], export["export-size"]) == ("disk", "a disk", SIZE)
    assert export["contexts"] == ["base:allocation"]
    said = {name for name, value in export.items() if value is True}
    assert said == {
        "can_cache", "can_df", "can_fast_zero", "can_flush", "can_fua", "can_multi_conn", "can_trim", "can_zero",
    }  # fmt: skip
    assert (export["block_size_minimum"], export["block_size_maximum"]) == (1, 32 * MIB)
    assert run("nbdinfo", "--size", served.uri) == f"{SIZE}\n"
    listed = json.loads(run("nbdinfo", "--list", "--json", served.uri.replace("/disk", "/")))
    assert [one["export-name"] for one in listed["exports"]] == ["disk"]
    assert runs(json.loads(run("nbdinfo", "--map", "--json", served.uri))) == EXPECTED


def test_nbdcopy_there_and_back(served: Serving, image: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.raw"
    run("nbdcopy", served.uri, copy)
    assert copy.read_bytes() == image.read_bytes()
    assert copy.stat().st_blocks * 512 <= MIB + 256 * KIB
    other = build(tmp_path / "other.raw", SIZE, [(3 * MIB, noise("other", 2 * MIB + 7))])
    run("nbdcopy", "--flush", "--allocated", other, served.uri)
    assert image.read_bytes() == other.read_bytes()
    run("nbdcopy", "--flush", copy, served.uri)
    assert image.read_bytes() == copy.read_bytes()
    with serving(opener(build(tmp_path / "third.raw", SIZE, []))) as third:
        run("nbdcopy", "--requests=64", "--connections=4", served.uri, third.uri)
    assert (tmp_path / "third.raw").read_bytes() == copy.read_bytes()


def test_nbdsh_structured_replies_and_status(served: Serving) -> None:
    served.run(served.export.flush())
    printed = nbdsh(
        served.uri,
        f"""
chunks = []
def chunk(data, offset, kind, error):
    chunks.append((offset, len(data), kind))
h.pread_structured(2 * 1024 * 1024, 0, chunk)
print(sorted(chunks))
chunks.clear()
h.pread_structured(1024 * 1024, 0, chunk, nbd.CMD_FLAG_DF)
print(chunks)
try:
    h.set_strict_mode(0)
    h.pread(10, {SIZE})
except nbd.Error as error:
    print(error.errno)
try:
    h.pwrite(bytes(10), {SIZE} - 5)
except nbd.Error as error:
    print(error.errno)
h.cache(1024 * 1024, 0)
h.zero(4096, 1024 * 1024, nbd.CMD_FLAG_FAST_ZERO)
h.zero(4096, 1024 * 1024 + 4096, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
h.trim(4096, 1024 * 1024 + 8192, nbd.CMD_FLAG_FUA)
h.pwrite(b"x" * 5, 7, nbd.CMD_FLAG_FUA)
h.flush()
assert h.pread(12288, 1024 * 1024) == bytes(12288)
assert h.pread(5, 7) == b"xxxxx"
print(h.get_structured_replies_negotiated(), h.get_protocol())
""",
    )
    hole, data = 2, 1
    assert printed.splitlines() == [
        str([(0, 64 * KIB, data), (64 * KIB, MIB - 64 * KIB, hole), (MIB, MIB, data)]),
        str([(0, MIB, data)]),
        "EINVAL",
        "ENOSPC",
        "True newstyle-fixed",
    ]


def test_nbdsh_block_status(served: Serving) -> None:
    printed = run(
        "nbdsh", "-c", f"""
h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
h.connect_uri({served.uri!r})
found = []
def extents(context, offset, entries, error):
    found.append((context, offset, list(entries)))
h.block_status({SIZE}, 0, extents)
h.block_status({SIZE} - 100, 100, extents, nbd.CMD_FLAG_REQ_ONE)
print(found)
""",
    )  # fmt: skip
    flat = [number for _, length, flags in EXPECTED for number in (length, flags)]
    assert printed.strip() == str([("base:allocation", 0, flat), ("base:allocation", 100, [64 * KIB - 100, 0])])


def test_nbdsh_many_requests_at_once(served: Serving, image: Path) -> None:
    """Each of several connections with sixty in flight, none of which waits for another's."""
    before = image.read_bytes()
    nbdsh(
        served.uri,
        f"""
other = nbd.NBD()
other.connect_uri({served.uri!r})
pending = {{}}
for number in range(60):
    for one in (h, other):
        buffer = nbd.Buffer(4096)
        pending[one, one.aio_pread(buffer, number * 65536)] = (number * 65536, buffer)
data = {{}}
while pending:
    for one in (h, other):
        one.poll(0)
        for key in [key for key in pending if key[0] is one and one.aio_command_completed(key[1])]:
            offset, buffer = pending.pop(key)
            assert data.setdefault(offset, buffer.to_bytearray()) == buffer.to_bytearray()
import hashlib
digest = hashlib.sha256(b"".join(bytes(data[offset]) for offset in sorted(data))).hexdigest()
import sys
expected = hashlib.sha256(b"".join(open({str(image)!r}, "rb").read()[n * 65536:n * 65536 + 4096] for n in range(60)))
assert digest == expected.hexdigest()
""",
    )
    assert image.read_bytes() == before


# --- QEMU -----------------------------------------------------------------------------------------------------------


def test_qemu_img(served: Serving, image: Path, tmp_path: Path) -> None:
    info = json.loads(qemu_img("info", "--output=json", served.uri))
    assert (info["virtual-size"], info["format"]) == (SIZE, "raw")
    found = json.loads(qemu_img("map", "--output=json", "-f", "raw", served.uri))
    assert [(one["start"], one["length"], 0 if one["data"] else 3) for one in found] == EXPECTED
    assert all(one["zero"] != one["data"] for one in found)
    copy = tmp_path / "copy.qcow2"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", served.uri, copy)
    assert "identical" in qemu_img("compare", "-f", "qcow2", "-F", "raw", copy, image)
    assert "identical" in qemu_img("compare", "-f", "raw", "-F", "raw", served.uri, image)
    other = build(tmp_path / "other.raw", SIZE, [(0, noise("other", 3 * MIB))])
    qemu_img("convert", "-n", "-W", "-m", 8, "-f", "raw", "-O", "raw", other, served.uri)
    assert image.read_bytes() == other.read_bytes()


def test_qemu_io(served: Serving, image: Path) -> None:
    commands = [
        "write -P 0x11 0 1M", "write -f -P 0x22 1M 64k", "write -z 512k 4k", "write -z -u 516k 4k", "discard 520k 8k",
        "aio_write -P 0x33 4M 128k", "aio_write -P 0x44 4M 4k", "aio_flush", "flush",
        "read -P 0x11 0 512k", "read -P 0x22 1M 64k", "read -P 0 512k 8k",
    ]  # fmt: skip
    printed = run("qemu-io", "-f", "raw", *(word for one in commands for word in ("-c", one)), served.uri)
    assert "failed" not in printed and "error" not in printed, printed
    after = image.read_bytes()
    assert after[: 512 * KIB] == b"\x11" * 512 * KIB
    assert after[MIB : MIB + 64 * KIB] == b"\x22" * 64 * KIB
    assert after[4 * MIB : 4 * MIB + 128 * KIB].strip(b"\x33") in (b"", b"\x44" * 4096)


def test_qemu_storage_daemon_in_between(served: Serving, image: Path, tmp_path: Path) -> None:
    """As it runs beside a virtual machine, with our export as its disk."""
    path, pid = tmp_path / "daemon.sock", tmp_path / "daemon.pid"
    words = [
        "qemu-storage-daemon", "--pidfile", str(pid),
        "--blockdev", f"driver=nbd,node-name=disk,server.type=unix,server.path={served.socket},export=disk",
        "--nbd-server", f"addr.type=unix,addr.path={path}",
        "--export", "type=nbd,id=export,node-name=disk,name=through,writable=on",
    ]  # fmt: skip
    daemon = subprocess.Popen(words, stdin=subprocess.DEVNULL)
    try:
        for _ in range(2000):
            if pid.exists() and pid.read_text().endswith("\n"):
                break
            assert daemon.poll() is None
            os.sched_yield()
            subprocess.run(["sleep", "0.01"], check=True)
        uri = f"nbd+unix:///through?socket={path}"
        assert "identical" in qemu_img("compare", "-f", "raw", "-F", "raw", uri, image)
        other = build(tmp_path / "other.raw", SIZE, [(2 * MIB, noise("other", MIB))])
        run("nbdcopy", "--flush", other, uri)
        assert image.read_bytes() == other.read_bytes()
    finally:
        daemon.terminate()
        daemon.wait(BOUND)


# --- nbdkit and fio -------------------------------------------------------------------------------------------------


def test_nbdkit_in_between(served: Serving, image: Path, tmp_path: Path) -> None:
    with nbdkit(tmp_path, "nbd", f"socket={served.socket}", "export=disk") as proxy:
        copy = tmp_path / "copy.raw"
        run("nbdcopy", proxy.uri, copy)
        assert copy.read_bytes() == image.read_bytes()
        assert runs(json.loads(run("nbdinfo", "--map", "--json", proxy.uri))) == EXPECTED
        other = build(tmp_path / "other.raw", SIZE, [(5 * MIB, noise("other", MIB))])
        run("nbdcopy", "--flush", other, proxy.uri)
        assert image.read_bytes() == other.read_bytes()


def test_fio_verifies_what_it_writes(served: Serving, tmp_path: Path) -> None:
    """Blocks of several sizes, thirty-two at a time, with flushes between them; each is read back and checked."""
    printed = run(
        *("fio", "--name=verify", "--ioengine=nbd", f"--uri={served.uri}", "--output-format=json"),
        *("--rw=randwrite", "--bsrange=512-128k", "--iodepth=32", "--size=8m", "--fsync=64"),
        *("--verify=crc32c", "--do_verify=1", "--randseed=7", f"--aux-path={tmp_path}"),
    )
    found = json.loads(printed[printed.index("\n{") :] if not printed.startswith("{") else printed)
    (job,) = found["jobs"]
    assert job["error"] == 0
    assert job["read"]["total_ios"] == job["write"]["total_ios"] > 0


# --- what takes no thread ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "tmpfs"])
async def test_what_is_in_memory_is_read_at_once(file_systems: FileSystems, kind: str) -> None:
    """On every file system: much of the speed of small reads hangs on it, and nothing else would show its absence."""
    try:
        path = file_systems.directory(kind) / "in-memory.raw"
    except Unavailable as error:
        pytest.skip(str(error))
    data = noise("memory", MIB)
    build(path, MIB, [(0, data)])
    volume = await ImageVolume.open(path)
    try:
        await volume.read_into(0, memoryview(bytearray(MIB)))
        for offset, length in ((0, 4096), (7, 513), (64 * KIB, 256 * KIB), (MIB - 1, 1)):
            buffer = memoryview(bytearray(length))
            assert volume.read_now(offset, buffer)
            assert buffer == data[offset : offset + length]
        assert not volume.read_now(MIB - 1, memoryview(bytearray(2))), "past the end there is nothing to be read"
    finally:
        await volume.close()
        path.unlink()


# --- our own client, TLS ----------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def client(uri: str) -> AsyncIterator[NbdClient]:
    async with asyncio.timeout(BOUND):
        found = await NbdClient.connect(NbdUri.parse(uri))
        try:
            yield found
        finally:
            await found.close()


async def test_our_own_client(served: Serving, image: Path) -> None:
    async with client(served.uri) as found:
        buffer = bytearray(SIZE)
        holes = await found.read_into(0, memoryview(buffer))
        assert buffer == content(image)
        assert sum(length for _, length in holes) < 3 * MIB, "not known to be holes before a flush"
        await found.flush()
        holes = await found.read_into(0, memoryview(buffer), sparse=True)
        assert sum(length for _, length in holes) > 5 * MIB
        assert (found.export.preferred, found.export.description) == (4096, "a disk")


def test_tls(image: Path, tmp_path: Path) -> None:
    ca = Issuer(tmp_path)
    files, ours, stranger = (
        ca.issue("server", "127.0.0.1", "localhost"),
        ca.issue("client", "x"),
        Issuer(_made(tmp_path / "b")),
    )
    theirs = stranger.issue("client", "x")
    directories = {}
    for name, one, authority in (("good", ours, ca), ("bad", theirs, ca)):
        directory = tmp_path / name
        directory.mkdir()
        for target, source in (
            ("ca-cert.pem", authority.ca),
            ("client-cert.pem", one.cert),
            ("client-key.pem", one.key),
        ):
            (directory / target).write_bytes(source.read_bytes())
        directories[name] = directory
    with serving(opener(image), files=Tls(files.cert, files.key, ca.ca), tcp=True) as served:
        assert served.uri.startswith("nbds://127.0.0.1:")
        good = f"{served.uri}?tls-certificates={directories['good']}"
        found = json.loads(run("nbdinfo", "--json", good))
        assert found["TLS"] is True and found["exports"][0]["export-size"] == SIZE
        copy = tmp_path / "copy.raw"
        run("nbdcopy", good, copy)
        assert copy.read_bytes() == image.read_bytes()
        asyncio.run(_through_tls(good, image))
        for uri in (served.uri.replace("nbds:", "nbd:"), f"{served.uri}?tls-certificates={directories['bad']}"):
            done = subprocess.run(["nbdinfo", uri], capture_output=True, text=True, check=False, timeout=60)
            assert done.returncode == 1 and str(SIZE) not in done.stdout
        assert "TLS" in done.stderr or "tls" in done.stderr


def test_nothing_unencrypted_comes_after_starttls(image: Path, tmp_path: Path) -> None:
    """What somebody on the way puts behind the option would be taken for the client's, if it were looked at later."""
    ca = Issuer(tmp_path)
    files = ca.issue("server", "127.0.0.1")
    with serving(opener(image), files=Tls(files.cert, files.key, ca.ca)) as served:
        for behind, answered in ((b"", True), (encode_option(Option.LIST), False)):
            with socket.socket(socket.AF_UNIX) as one:
                one.settimeout(BOUND)
                one.connect(str(served.socket))
                assert len(one.recv(18)) == 18
                one.sendall(encode_client_flags(3) + encode_option(Option.STARTTLS) + behind)
                assert one.recv(4096) == (encode_option_reply(Option.STARTTLS, OptionReply.ACK) if answered else b"")


def _made(directory: Path) -> Path:
    directory.mkdir()
    return directory


async def _through_tls(uri: str, image: Path) -> None:
    volume = await NbdVolume.open(uri, writable=True)
    try:
        data = noise("tls", 3 * MIB)
        await volume.write([(4096, data)])
        await volume.flush()
        buffer = bytearray(volume.size)
        await volume.read_into(0, memoryview(buffer))
        assert buffer[4096 : 4096 + 3 * MIB] == data and buffer == content(image)
    finally:
        await volume.close()


# --- a model ----------------------------------------------------------------------------------------------------------

MODEL_SIZE = 300 * KIB + 77
offsets = st.integers(0, MODEL_SIZE - 1)
lengths = st.one_of(st.integers(1, 9000), st.integers(1, MODEL_SIZE))
Step = tuple[str, int, int, int, int]
KINDS = ["read", "write", "zero", "fast", "trim", "flush", "status"]
step = st.tuples(st.sampled_from(KINDS), st.integers(0, 2), offsets, lengths, st.integers(1, 255))
steps = st.lists(step, min_size=5, max_size=30)
EXAMPLES = int(os.environ.get("BLOCKFERRY_NBD_EXAMPLES", "25"))


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(history=st.lists(steps, min_size=1, max_size=3), scratch=st.booleans())
def test_any_history_over_several_connections(
    history: list[list[Step]], scratch: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Steps of one list are asked for at once, except where two would touch the same bytes."""
    directory = tmp_path_factory.mktemp("model")
    base = noise("base", 100 * KIB)
    image = build(directory / "image.raw", MODEL_SIZE, [(64 * KIB, base)])
    before = image.read_bytes()

    async def made() -> Volume:
        if not scratch:
            return await ImageVolume.open(image, writable=True)
        return await ScratchVolume.open(await ImageVolume.open(image), directory, 10 * MIB)

    with serving(made) as served:
        model = bytearray(before)
        asyncio.run(_play(served.uri, history, model))
    assert image.read_bytes() == (before if scratch else model)
    image.unlink()


async def _play(uri: str, history: list[list[Step]], model: bytearray) -> None:
    async with contextlib.AsyncExitStack() as stack:
        volumes = []
        for _ in range(3):
            volume = await NbdVolume.open(uri, writable=True)
            stack.push_async_callback(volume.close)
            volumes.append(volume)
        for batch in history:
            taken: list[tuple[int, int]] = []
            asked = []
            for kind, who, offset, length, fill in batch:
                end = min(offset + length, MODEL_SIZE)
                if kind != "flush":
                    if any(offset < other[1] and other[0] < end for other in taken):
                        continue
                    taken.append((offset, end))
                asked.append(_step(volumes[who], kind, offset, end - offset, fill, model))
            await asyncio.wait_for(asyncio.gather(*asked), BOUND)
            for volume in volumes:
                buffer = bytearray(MODEL_SIZE)
                await volume.read_into(0, memoryview(buffer))
                assert buffer == model


async def _step(volume: NbdVolume, kind: str, offset: int, length: int, fill: int, model: bytearray) -> None:
    part = slice(offset, offset + length)
    match kind:
        case "read":
            buffer = bytearray(length)
            expected = bytes(model[part])
            await volume.read_into(offset, memoryview(buffer))
            assert buffer == expected
        case "write":
            model[part] = bytes([fill]) * length
            await volume.write([(offset, bytes([fill]) * length)])
        case "zero":
            model[part] = bytes(length)
            await volume.unmap([(offset, length)])
        case "trim":
            await volume._client._run([(Pending(Command.TRIM, offset, length), 0, None)])
            found = bytearray(length)
            await volume.read_into(offset, memoryview(found))
            assert all(new in (0, old) for new, old in zip(found, model[part], strict=True))
            model[part] = found
        case "fast":
            _, left = await volume.deallocate([(offset, length)])
            if not left:
                model[part] = bytes(length)
        case "flush":
            await volume.flush()
        case "status":
            held = [one async for found in volume._client.data_extents(offset, length) for one in found]
            rest = bytearray(model[part])
            for start, size in held:
                rest[start - offset : start - offset + size] = bytes(size)
            assert not any(rest), "a hole has data"
