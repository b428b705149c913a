"""Block devices and NBD exports as destinations, end to end: real loop devices, nbdkit and qemu-nbd, and real servers.

What a replica on a device holds is looked at on the device itself, and of a qcow2 image by qemu-img.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.filesystems import Unavailable
from tests.images import BLOCK, MIB, Hole, Snapshot, build, change, noise
from tests.nbd import Served, nbdkit, qemu_img, qemu_nbd
from tests.processes import holding, loop_device
from tests.support import Report, Server, ok, refused, refused_json, run_cli, until

SIZE = 8 * MIB + 12 * BLOCK
"""Bytes of a source."""
CAPACITY = 12 * MIB
"""Bytes of a device: what lies behind the source must stay as it is."""

_numbers = itertools.count(1)


class DeviceServer(Server):
    """A server that replicates to devices alone; journals are in `pool`."""

    def __init__(self, journal: Path, devices: dict[str, str], *flags: str) -> None:
        words = [word for name, uri in devices.items() for word in ("--device", f"{name}={uri},journal={journal}")]
        super().__init__(journal, flags=["--lease", "0.2", "--keep-at-least", "last=1", *words, *flags])

    @property
    def words(self) -> list[str]:
        """The command line, without a pool."""
        found = super().words
        at = found.index("--pool")
        return found[:at] + found[at + 2 :]


Serve = Callable[..., DeviceServer]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Starts servers: (name=URI, …)."""
    started: list[DeviceServer] = []

    def start(*flags: str, **devices: str) -> DeviceServer:
        journal = tmp_path / f"journal-{next(_numbers)}"
        journal.mkdir()
        server = DeviceServer(journal, devices, *flags)
        started.append(server)
        server.start()
        return server

    yield start
    for server in started:
        server.stop()


@pytest.fixture
def device(backing: Path) -> Iterator[str]:
    """A loop device that is full of something."""
    build(backing, CAPACITY, [(0, noise("before", CAPACITY))])
    try:
        with loop_device(backing) as made:
            yield made
    except Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return build(
        tmp_path / "source", SIZE, [(0, noise(1, 2 * MIB)), (3 * MIB, noise(2, MIB)), (SIZE - 100, noise(3, 100))]
    )


def content(device: str, size: int = SIZE, offset: int = 0) -> bytes:
    """What a device holds, not what is remembered of it."""
    done = subprocess.run(
        [
            "dd",
            f"if={device}",
            "bs=4K",
            "iflag=skip_bytes,count_bytes",
            f"skip={offset}",
            f"count={size}",
            "status=none",
        ],
        check=True,
        capture_output=True,
    )
    return done.stdout


def sync(server: Server, source: object, name: str = "db", *flags: object) -> Report:
    return ok("sync", source, server.url(name), "--keep", "last=9", *flags)


def show(server: Server, name: str = "db") -> Report:
    return ok("replica", "show", server.url(name))


def applied(server: Server, name: str = "db") -> Report:
    """`replica show` once the journal is applied."""
    until(lambda: show(server, name)["path"] is not None, "the journal is applied")
    return show(server, name)


# --- devices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sector", [512, 4096])
def test_a_file_to_a_device_and_on(serve: Serve, backing: Path, source: Path, sector: int) -> None:
    build(backing, CAPACITY, [(0, noise("before", CAPACITY))])
    with loop_device(backing, "--sector-size", str(sector)) as device:
        server = serve(db=device)
        report = sync(server, source)
        assert report["regions"]["compare"] == 4 and report["regions"]["unmap"] == 5, report["regions"]
        shown = applied(server)
        assert (shown["kind"], shown["state"], shown["path"], shown["size"]) == ("device", "CONSISTENT", device, SIZE)
        assert content(device) == source.read_bytes()
        assert content(device, CAPACITY - SIZE, SIZE) == noise("before", CAPACITY)[SIZE:]
        assert ok("verify", source, server.url("db"))["outcome"] == "equal"
        generations = [source.read_bytes()]
        for number in range(3):
            change(source, [(number * MIB + BLOCK, noise(f"new {number}", 3 * BLOCK)), (MIB, Hole(2 * BLOCK))])
            report = sync(server, source)
            assert report["bytes"]["data_sent"] <= 3 * BLOCK
            generations.append(source.read_bytes())
        for number, held in enumerate(generations, 1):
            older = source.with_name(f"older-{number}")
            older.write_bytes(held)
            assert ok("verify", older, f"{server.url('db')}@{number}")["outcome"] == "equal"
        assert ok("replica", "verify", server.url("db"))["outcome"] == "sound"
        applied(server)
        assert content(device) == generations[-1]
        # What the server has held all the time it need not read.
        assert sync(server, source)["bytes"]["destination_read"] == 0
        # After a restart it is compared, once, and nothing is written.
        assert server.stop() == 0
        server.start()
        report = sync(server, source)
        assert report["bytes"]["destination_read"] > MIB and report["bytes"]["destination_written"] == 0
        assert {path.name for path in server.pool.iterdir() if not path.name.startswith(".")} == {"db"}
        server.stop()


def test_device_to_device_and_back(serve: Serve, device: str, source: Path, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        one = stack.enter_context(loop_device(source))
        server = serve(db=device)
        sync(server, one)
        applied(server)
        assert content(device) == content(one)
        # The first site is lost, and comes back from the second.
        home = build(tmp_path / "home", SIZE, [(0, noise("rubbish", MIB))])
        back = stack.enter_context(loop_device(home))
        first = serve(db=back)
        report = sync(first, server.url("db"))
        assert report["outcome"] == "committed"
        applied(first)
        assert content(back) == content(one)
        first.stop()
        server.stop()


def test_a_device_of_which_nothing_can_be_proven_keeps_equal_blocks(serve: Serve, backing: Path, source: Path) -> None:
    """Zeros are compared before they are written out."""
    build(backing, CAPACITY)
    with loop_device(backing) as device:
        backing.unlink()
        server = serve(db=device)
        report = sync(server, source)
        assert report["destination_map"] == "absent"
        assert report["regions"]["unmap"] == 5 and report["bytes"]["unmapped"] == 0
        assert report["bytes"]["destination_read"] >= SIZE
        assert report["bytes"]["destination_written"] == report["bytes"]["data_sent"] == 3 * MIB + BLOCK
        applied(server)
        assert content(device) == source.read_bytes()
        server.stop()


def test_growth(serve: Serve, backing: Path, source: Path) -> None:
    build(backing, SIZE, [(0, noise("before", SIZE))])
    with loop_device(backing) as device:
        server = serve(db=device)
        sync(server, source)
        os.truncate(source, SIZE + 2 * MIB)
        change(source, [(SIZE + MIB, noise("grown", BLOCK))])
        done = run_cli("sync", source, server.url("db"), "--json", "--quiet")
        refused_json(done, "size-mismatch", "--grow")
        done = run_cli("sync", source, server.url("db"), "--grow", "--json", "--quiet")
        error = refused_json(done, "size-mismatch", str(SIZE), str(SIZE + 2 * MIB), "enlarge the device first")
        assert error["volume"] == "db"
        assert show(server)["state"] == "CONSISTENT" and content(device) == Snapshot.of(source).content[:SIZE]
        with backing.open("ab") as file:
            file.write(noise("what lies there", 4 * MIB))
        subprocess.run(["losetup", "--set-capacity", device], check=True)
        assert sync(server, source, "db", "--grow")["generation"] == 2
        assert applied(server)["size"] == SIZE + 2 * MIB
        assert content(device, SIZE + 2 * MIB) == source.read_bytes()
        assert content(device, 2 * MIB, SIZE + 2 * MIB) == noise("what lies there", 4 * MIB)[2 * MIB :]
        older = source.with_name("older")
        older.write_bytes(source.read_bytes()[:SIZE])
        assert ok("verify", older, f"{server.url('db')}@1")["outcome"] == "equal"
        server.stop()
        # Cut off behind the server's back.
        os.truncate(backing, SIZE)
        subprocess.run(["losetup", "--set-capacity", device], check=True)
        server.start()
        until(lambda: "too small" in (show(server)["notice"] or ""), "it is noticed")
        refused_json(
            run_cli("sync", source, server.url("db"), "--json", "--quiet"), "size-mismatch", "enlarge the device first"
        )
        server.stop()


def test_who_uses_a_device_is_named_and_others_are_kept_out(
    serve: Serve, device: str, source: Path, tmp_path: Path
) -> None:
    subprocess.run(["mkfs.ext4", "-q", "-F", device], check=True, capture_output=True)
    before = content(device, CAPACITY)
    point = tmp_path / "point"
    point.mkdir()
    subprocess.run(["mount", "-o", "ro", device, point], check=True)
    try:
        server = serve(db=device, other="/dev/nothing-of-this-name")
        done = run_cli("sync", source, server.url("db"), "--json", "--quiet")
        refused_json(done, "in-use", device, f"mounted read-only on {point}")
        assert ok("replica", "list", server.address)["replicas"] == []
    finally:
        subprocess.run(["umount", point], check=True)
    assert content(device, CAPACITY) == before
    with holding(Path(device), os.O_RDWR) as pid:
        refused_json(run_cli("sync", source, server.url("db"), "--json", "--quiet"), "in-use", f"({pid})")
    assert sync(server, source)["generation"] == 1
    # The other one is not there, and nobody else minds.
    refused_json(run_cli("sync", source, server.url("other"), "--json", "--quiet"), "not-found", "no such file")
    # As long as the server has it nobody mounts it.
    mounting = subprocess.run(["mount", "-o", "ro", device, point], capture_output=True, text=True, check=False)
    assert mounting.returncode != 0 and "busy" in mounting.stderr
    server.stop()


def test_a_server_starts_without_a_device_and_takes_it_when_it_is_back(
    serve: Serve, backing: Path, source: Path, tmp_path: Path
) -> None:
    link, spare = tmp_path / "by-id", tmp_path / "spare"
    build(backing, CAPACITY)
    build(spare, CAPACITY, [(0, noise("spare", MIB))])
    with loop_device(backing) as device, loop_device(spare) as other:
        link.symlink_to(device)
        server = serve(db=str(link))
        sync(server, source)
        assert applied(server)["path"] == str(link)
        server.stop()
        link.unlink()
        server.start()
        shown = show(server)
        assert shown["state"] == "CONSISTENT" and "out of service" in shown["notice"] and str(link) in shown["notice"]
        refused_json(run_cli("sync", source, server.url("db"), "--json", "--quiet"), "not-found", str(link))
        # Another device by the same name.
        link.symlink_to(other)
        done = run_cli("sync", source, server.url("db"), "--json", "--quiet")
        error = refused_json(done, "wrong-state", "another device", "--device")
        assert error["cause"].count("file:") == 2
        assert content(other, CAPACITY) == spare.read_bytes()
        link.unlink()
        link.symlink_to(device)
        assert show(server)["notice"] is None
        assert sync(server, source)["generation"] == 2
        server.stop()


def test_a_device_is_promoted_used_and_taken_back(serve: Serve, device: str, source: Path, tmp_path: Path) -> None:
    image = tmp_path / "fs"
    image.write_bytes(b"")
    os.truncate(image, SIZE)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    point = tmp_path / "point"
    point.mkdir()
    server = serve(db=device)
    sync(server, image)
    first = image.read_bytes()
    for number in (2, 3):
        change(image, [(4 * MIB, noise(number, 64 * BLOCK))])
        sync(server, image)
    url = server.url("db")
    refused(run_cli("replica", "promote", url, "--quiet"), "all other recovery points are lost", "--yes", status=2)
    report = ok("replica", "promote", f"{url}@1", "--yes")
    assert (report["generation"], report["path"]) == (1, device)
    assert content(device) == first
    assert ok("replica", "promote", f"{url}@1", "--yes") == report
    assert [one["number"] for one in ok("replica", "points", url)["points"]] == [1]
    refused(run_cli("sync", image, url, "--quiet"), "PROMOTED", "demote it first")
    refused(run_cli("verify", image, url, "--quiet"), "it was handed out")
    refused(run_cli("replica", "delete", url, "--yes", "--quiet"), "promoted")
    subprocess.run(["mount", device, point], check=True)
    try:
        (point / "written").write_bytes(noise("by a guest", 100_000))
        server.kill()
        server.start()
        assert show(server)["state"] == "PROMOTED" and show(server)["promotion"]["path"] == device
        done = run_cli("replica", "demote", url, "--keep-changes", "--yes", "--json", "--quiet")
        refused_json(done, "in-use", f"mounted on {point}")
    finally:
        subprocess.run(["umount", point], check=True)
    used = content(device)
    done = run_cli("replica", "demote", url, "--discard", "--yes", "--json", "--quiet")
    refused_json(done, "unsupported", "--keep-changes", "nowhere else")
    assert show(server)["state"] == "PROMOTED"
    report = ok("replica", "demote", url, "--keep-changes", "--yes")
    assert report["generation"] == 4 and show(server)["state"] == "CONSISTENT"
    kept = tmp_path / "kept"
    kept.write_bytes(used)
    assert ok("verify", kept, url)["outcome"] == "equal"
    # The source wins again, and the next point leads back to what was kept.
    assert sync(server, image)["generation"] == 5
    assert ok("verify", image, url)["outcome"] == "equal" and ok("verify", kept, f"{url}@4")["outcome"] == "equal"
    applied(server)
    held = content(device, CAPACITY)
    refused(run_cli("replica", "delete", url, "--quiet"), "on its device stays there", "--yes", status=2)
    ok("replica", "delete", url, "--yes")
    assert content(device, CAPACITY) == held
    assert [path.name for path in server.pool.iterdir() if not path.name.startswith(".")] == []
    server.stop()


def test_the_forecast_is_that_of_the_journal(serve: Serve, device: str, source: Path) -> None:
    server = serve(db=device)
    plan = ok("plan", source, server.url("db"))
    assert (plan["forecast"]["pool"], plan["forecast"]["needed_max"]) == (server.pool.name, 0)
    sync(server, source)
    plan = ok("plan", source, server.url("db"))
    assert plan["forecast"]["needed_max"] == 2 * plan["bytes"]["source_read"]
    (pool,) = ok("pool", "list", server.address)["pools"]
    assert (pool["name"], pool["kind"]) == (server.pool.name, "journal")
    server.stop()


def test_a_journal_has_a_limit_of_its_own(serve: Serve, device: str, source: Path, tmp_path: Path) -> None:
    server = DeviceServer(tmp_path / "j", {})
    server.pool.mkdir()
    server._flags += ["--device", f"db={device},journal={server.pool},limit=1M"]
    server.start()
    try:
        sync(server, source)
        change(source, [(0, noise("too much", 2 * MIB))])
        done = run_cli("sync", source, server.url("db"), "--json", "--quiet")
        refused_json(done, "out-of-space", "journal", str(MIB))
        assert show(server)["generation"] == 1
    finally:
        server.stop()


# --- exports ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def qcow2(path: Path, size: int, sockets: Path) -> Iterator[Served]:
    if not path.exists():
        qemu_img("create", "-q", "-f", "qcow2", path, size)
    with qemu_nbd(sockets, "--format=qcow2", "--discard=unmap", path) as export:
        yield export


def test_qcow2_to_qcow2(serve: Serve, source: Path, tmp_path: Path) -> None:
    here, there = tmp_path / "here.qcow2", tmp_path / "there.qcow2"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", source, here)
    with qcow2(there, SIZE, tmp_path) as export:
        server = serve(db=export.uri)
        for number in range(1, 4):
            with qcow2(here, SIZE, tmp_path) as exported:
                report = sync(server, exported.uri)
            assert report["generation"] == number and report["destination_map"] == "exact"
            change(source, [(number * MIB, noise(f"more {number}", 5 * BLOCK)), (MIB // 2, Hole(16 * BLOCK))])
            qemu_img("convert", "-f", "raw", "-O", "qcow2", source, here)
        shown = applied(server)
        assert (shown["kind"], shown["path"]) == ("device", export.uri)
        assert ok("replica", "verify", server.url("db"))["outcome"] == "sound"
        with qcow2(here, SIZE, tmp_path) as exported:
            sync(server, exported.uri)
        applied(server)
        assert ok("verify", source, server.url("db"))["outcome"] == "equal"
        server.stop()
    assert "identical" in qemu_img("compare", here, there)


def test_an_export_that_fails_in_a_session_and_comes_back(serve: Serve, source: Path, tmp_path: Path) -> None:
    there = tmp_path / "there.qcow2"
    with qcow2(there, CAPACITY, tmp_path) as export:
        server = serve(db=export.uri)
        sync(server, source)
        applied(server)
        socket = export.uri.partition("socket=")[2]
        export.kill()
        until(lambda: "out of service" in (show(server)["notice"] or ""), "it is noticed")
        change(source, [(0, noise("newer", MIB))])
        refused_json(run_cli("sync", source, server.url("db"), "--json", "--quiet"), "io-error", "db: cannot be opened")
        assert show(server)["generation"] == 1
    Path(socket).unlink(missing_ok=True)
    words = ["qemu-nbd", "--persistent", "--shared=8", f"--socket={socket}", "--format=qcow2", str(there)]
    with subprocess.Popen(words) as process:
        try:
            until(lambda: show(server)["notice"] is None, "it is back")
            # Nothing is believed of what was learned before.
            report = sync(server, source)
            assert report["generation"] == 2 and report["bytes"]["destination_read"] > MIB
            applied(server)
            assert ok("verify", source, server.url("db"))["outcome"] == "equal"
            server.stop()
        finally:
            process.terminate()


def test_an_export_is_promoted_and_taken_back(serve: Serve, source: Path, tmp_path: Path) -> None:
    there = tmp_path / "there.raw"
    build(there, CAPACITY, [(0, noise("before", CAPACITY))])
    with nbdkit(tmp_path, "file", there) as export:
        server = serve(db=export.uri)
        sync(server, source)
        first = source.read_bytes()
        change(source, [(0, noise("newer", MIB))])
        sync(server, source)
        assert ok("replica", "promote", f"{server.url('db')}@1", "--yes")["path"] == export.uri
        assert there.read_bytes() == first + noise("before", CAPACITY)[SIZE:]
        change(there, [(MIB, noise("by a guest", BLOCK))])
        assert ok("replica", "demote", server.url("db"), "--keep-changes", "--yes")["generation"] == 3
        report = sync(server, source)
        assert report["generation"] == 4
        applied(server)
        assert there.read_bytes() == source.read_bytes() + noise("before", CAPACITY)[SIZE:]
        server.stop()


def test_an_export_of_large_blocks_is_refused_before_anything_changes(
    serve: Serve, source: Path, tmp_path: Path
) -> None:
    there = build(tmp_path / "there.raw", CAPACITY, [(0, noise("before", MIB))])
    limits = ["blocksize-error-policy=error", "blocksize-preferred=64K"]
    for minimum, size in (("64K", SIZE), ("4K", SIZE + 512)):
        os.truncate(source, size)
        words = [*limits, f"blocksize-minimum={minimum}"]
        with nbdkit(tmp_path, "file", there, *words, filters=["blocksize-policy"]) as export:
            server = serve(db=export.uri)
            done = run_cli("sync", source, server.url("db"), "--json", "--quiet")
            refused_json(done, "unsupported", "blocks of 65536 bytes" if size == SIZE else "blocks of 4096 bytes")
            assert ok("replica", "list", server.address)["replicas"] == []
            server.stop()
    assert there.read_bytes()[:MIB] == noise("before", MIB)
