"""`blockferry archive create` as people use it: real sources of every kind, a directory for a store, and what is read
back by the commands that read archives and by a reader that was written from the document alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from blockferry.common.archive.format import ARCHIVE_BLOCK

from bench.peers import peak_bytes
from tests.images import build, noise
from tests.integration import archive_minimal_reader as minimal
from tests.nbd import nbdkit, qemu_img, qemu_nbd
from tests.processes import loop_device
from tests.support import Report, Server, command, finish, ok, refused, refused_json, run_cli, start_cli

A = ARCHIVE_BLOCK
SIZE = 12 * A + 8192
PIECES = [(0, noise(1, 3 * A)), (5 * A + 4096, noise(2, A)), (12 * A, noise(3, 8192))]
BLOCKS = 3 + 2 + 1


class Place:
    """A store and a directory for staging."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "store"
        self.state = directory / "state"
        self.root.mkdir()
        self.uri = f"file://{self.root}"

    def create(self, source: object, *flags: object) -> Report:
        """An archive that must succeed; its report."""
        return ok(*self.words(source), *flags)

    def words(self, source: object) -> list[object]:
        """The command."""
        return ["archive", "create", source, self.uri, "--volume", "vm", "--state-dir", self.state]

    def restored(self, target: Path, number: int = 0, *flags: object) -> bytes:
        """What a snapshot is restored to."""
        ok("archive", "restore", f"{self.uri}#vm" + (f"@{number}" if number else ""), target, *flags)
        return target.read_bytes()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return build(tmp_path / "vm.raw", SIZE, PIECES)


def test_an_image_there_and_back(place: Place, image: Path, tmp_path: Path) -> None:
    first = place.create(image)
    assert (first["outcome"], first["snapshot"], first["source_map"]) == ("archived", 1, "exact")
    assert first["blocks"]["stored"] == first["blocks"]["archived"] == BLOCKS
    with image.open("r+b") as file:
        file.seek(A)
        file.write(b"changed")
    second = place.create(image, "--compression", "none")
    assert second["blocks"] == {**first["blocks"], "stored": 1, "equal": BLOCKS - 1}
    assert place.restored(tmp_path / "back.raw") == image.read_bytes()
    assert place.restored(tmp_path / "old.raw", 1)[A : A + 7] == noise(1, 3 * A)[A : A + 7]
    assert ok("archive", "verify", place.uri)["outcome"] == "sound"
    listed = ok("archive", "list", place.uri)["volumes"][0]["snapshots"]
    assert [(one["number"], one["base"]) for one in listed] == [(1, None), (2, 1)]


def test_a_reader_that_was_written_from_the_document_reads_it(place: Place, image: Path, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_bytes(bytes(range(40)))
    place.create(image, "--key-file", key)
    words = [sys.executable, minimal.__file__, str(place.root), "vm", str(tmp_path / "out"), "--key-file", str(key)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out").read_bytes() == image.read_bytes()


def test_exports_and_devices_are_sources(place: Place, image: Path, tmp_path: Path) -> None:
    content = image.read_bytes()
    qcow = tmp_path / "vm.qcow2"
    qemu_img("convert", "-O", "qcow2", image, qcow)
    with qemu_nbd(tmp_path, "--read-only", "--format=qcow2", qcow) as served:
        report = place.create(served.uri)
        assert report["blocks"]["stored"] == BLOCKS
    with nbdkit(tmp_path, "file", f"file={image}") as served:
        assert place.create(served.uri)["blocks"]["equal"] == BLOCKS
    if os.geteuid() == 0:
        with loop_device(image) as device:
            report = place.create(device, "--live")
            assert report["blocks"] == {**report["blocks"], "stored": 0, "equal": BLOCKS}
    assert place.restored(tmp_path / "back.raw") == content


def test_a_generation_of_a_replica_is_archived_once(
    place: Place, image: Path, tmp_path: Path, server: Server, volume: str
) -> None:
    server.sync(image, volume)
    source = f"{server.url(volume)}@1"
    first = place.create(source)
    assert (first["outcome"], first["blocks"]["stored"]) == ("archived", BLOCKS)
    again = place.create(source)
    assert (again["outcome"], again["snapshot"], again["bytes"]["uploaded"]) == ("present", 1, 0)
    assert place.restored(tmp_path / "back.raw") == image.read_bytes()
    # A snapshot in an archive is a source, too.
    other = tmp_path / "other"
    other.mkdir()
    copied = ok(
        "archive", "create", f"{place.uri}#vm", f"file://{other}", "--volume", "copy", "--state-dir", place.state
    )
    assert copied["snapshot_id"] == f"archive:{copied['snapshot_id'].split(':')[1]}:{first['attempt']}"
    assert ok("verify", f"file://{other}#copy", image)["outcome"] == "equal"


def test_the_report_for_people(place: Place, image: Path) -> None:
    done = run_cli(*place.words(image))
    assert done.status == 0
    assert f"{image} -> {place.uri}#vm@1" in done.stdout and f"{BLOCKS} stored" in done.stdout
    done = run_cli(*place.words(image))
    assert f"{BLOCKS} equal to snapshot 1" in done.stdout and "1 data, 0 metadata chunks" in done.stdout


def test_a_plan_writes_nothing(place: Place, image: Path) -> None:
    planned = place.create(image, "--plan")
    assert (planned["outcome"], planned["base"], planned["bytes"]["data_max"]) == ("planned", None, 5 * A + 8192)
    assert list(place.root.iterdir()) == [] and not place.state.exists()
    place.create(image)
    done = run_cli(*place.words(image), "--plan")
    assert done.status == 0 and "snapshot 1" in done.stdout and "requests   3 to " in done.stdout
    assert len(list(place.root.glob("*/log/*"))) == 1


@pytest.mark.parametrize("flag", ["--key-file", "--passphrase-file"])
def test_encryption(place: Place, image: Path, tmp_path: Path, flag: str) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"a secret that is long enough for a key file\n")
    place.create(image, flag, secret)
    assert place.create(image, flag, secret)["blocks"]["equal"] == BLOCKS
    assert place.restored(tmp_path / "back.raw", 0, flag, secret) == image.read_bytes()
    objects = [path.read_bytes() for path in place.root.rglob("*") if path.is_file()]
    assert not any(noise(1, 3 * A)[:64] in data or str(image).encode() in data for data in objects)
    refused_json(run_cli(*place.words(image), "--json"), "permission", "encrypted")
    secret.write_bytes(b"another secret that is long enough for a file\n")
    refused_json(run_cli(*place.words(image), flag, secret, "--json"), "permission")
    assert len(list(place.root.glob("*/log/*"))) == 2


def test_what_cannot_be_is_refused_in_one_line(place: Place, image: Path, tmp_path: Path) -> None:
    refused_json(run_cli("archive", "create", tmp_path / "none", place.uri, "--volume", "vm", "--json"), "not-found")
    missing = f"file://{tmp_path}/nowhere"
    refused_json(run_cli("archive", "create", image, missing, "--volume", "vm", "--json"), "not-found", "nowhere")
    for flags in (["--volume", "a/b"], [], ["--volume", "vm", "--compression", "lz4"], ["--volume", "vm", "--no"]):
        refused(run_cli("archive", "create", image, place.uri, *flags), status=2)
    short = tmp_path / "short"
    short.write_bytes(b"too short")
    refused(run_cli(*place.words(image), "--key-file", short), "32", status=2)
    assert list(place.root.iterdir()) == []
    with image.open("r+b"):
        refused_json(run_cli(*place.words(image), "--json"), "in-use")
    (tmp_path / "file").write_bytes(b"")
    words = [*place.words(image)[:-1], tmp_path / "file"]
    refused_json(run_cli(*words, "--json"), "not-found")


def test_interrupted_and_run_again(place: Place, tmp_path: Path) -> None:
    number, status = signal.SIGTERM, 143
    # Larger than can be stored before the signal comes; chunks of 16 MiB.
    image = build(tmp_path / "vm.raw", 200 * A, [(0, noise(4, 200 * A))])
    process = start_cli(*place.words(image), "--quiet")
    end = time.monotonic() + 60
    while not list(place.root.glob("*/data/*")) and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.002)
    process.send_signal(number)
    done = finish(process)
    assert done.status in (status, 0)
    before = len(list(place.root.glob("*/data/*")))
    report = place.create(image)
    assert ok("verify", f"{place.uri}#vm", image)["outcome"] == "equal"
    if done.status:
        refused(done, "interrupted", status=status)
        assert report["resumed"] and report["blocks"]["kept"] >= 63 * (before - 1)
        assert report["blocks"]["kept"] + report["blocks"]["stored"] == 200
    assert list(place.root.glob("*/attempts/*")) == []


def test_two_processes_archive_one_volume(place: Place, image: Path, tmp_path: Path) -> None:
    other = build(tmp_path / "other.raw", SIZE, PIECES[:2])
    words = [*place.words(other)[:-1], tmp_path / "elsewhere"]
    running = [start_cli(*place.words(image), "--json"), start_cli(*words, "--json")]
    reports = [finish(process).report for process in running]
    assert sorted(report["snapshot"] for report in reports) == [1, 2]
    for report, source in zip(reports, (image, other), strict=True):
        assert ok("verify", f"{place.uri}#vm@{report['snapshot']}", source)["outcome"] == "equal"


HUGE = 1 << 44
BLOCKS_OF_HUGE = int(os.environ.get("BLOCKFERRY_ARCHIVE_BLOCKS", "300"))
MOST_RESIDENT = 400 << 20


def test_a_sparse_volume_of_16_tib_costs_what_it_holds(place: Place, xfs_pool_root: Path, tmp_path: Path) -> None:
    """Memory, time and requests: BLOCKFERRY_ARCHIVE_BLOCKS of its 64 Mi blocks hold 4 KiB. `make soak` has more."""
    path = xfs_pool_root / f"huge-{os.getpid()}.raw"
    step = HUGE // BLOCKS_OF_HUGE // A * A
    try:
        build(path, HUGE, [(number * step, noise(number, 4096)) for number in range(BLOCKS_OF_HUGE)])
        process = subprocess.Popen(
            [*command(*place.words(path)), "--json", "--quiet"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        peak = 0
        while process.poll() is None:
            peak = max(peak, peak_bytes(process.pid))
            time.sleep(0.02)
        report = finish(process).report
        print(f"{BLOCKS_OF_HUGE} blocks: {peak >> 20} MiB resident at most, {report['seconds']['total']} s")
        assert 0 < peak < MOST_RESIDENT
        assert report["blocks"]["stored"] == BLOCKS_OF_HUGE
        assert report["bytes"]["source_read"] == BLOCKS_OF_HUGE * 4096
        assert place.create(path)["blocks"]["equal"] == BLOCKS_OF_HUGE
    finally:
        path.unlink(missing_ok=True)
    sizes = {kind: sum(one.stat().st_size for one in place.root.glob(f"*/{kind}/*")) for kind in ("data", "meta")}
    print(sizes)
    assert sizes["meta"] < 64 * BLOCKS_OF_HUGE + 4096
