"""The commands that read archives, on a real archive in a directory and real targets."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from blockferry.common.archive.fetch import ranges
from blockferry.common.archive.format import ARCHIVE_BLOCK
from blockferry.common.archive.keys import Secret
from blockferry.common.archive.store import open_store

from tests import zygote
from tests.archives import Made, Maker, noise
from tests.filesystems import Unavailable
from tests.images import BLOCK, Hole, Piece, build, change, extents
from tests.integration import archive_minimal_reader as minimal
from tests.nbd import nbdkit, qemu_img, qemu_nbd
from tests.processes import holding, loop_device
from tests.support import Report, Server, command, finish, ok, refused, refused_json, run_cli

A = ARCHIVE_BLOCK
SIZE = 12 * A + 8192
PASSPHRASE = "a word that nobody should ever see"


@dataclass(frozen=True)
class Archive:
    """An archive in a directory, with two snapshots of `vm`."""

    root: Path
    one: Made
    two: Made
    volume: bytes

    @property
    def uri(self) -> str:
        """Its store."""
        return f"file://{self.root}"

    def snapshot(self, number: int = 0) -> str:
        """One of its snapshots."""
        return f"{self.uri}#vm" + (f"@{number}" if number else "")


async def _make(root: Path, secret: Secret | None = None) -> Archive:
    os.mkdir(root)
    async with await open_store(f"file://{root}") as store:
        maker = await Maker(store, secret=secret, chunk_blocks=3).create()
        one = await maker.snapshot(SIZE, {block: noise(block) for block in (0, 1, 2, 3, 7, 8)})
        sparse = bytes(BLOCK) + b"\1" * BLOCK + bytes(A - 2 * BLOCK)
        changes = {1: noise(11), 3: None, 9: sparse, 12: noise(12, 8192)}
        two = await maker.snapshot(SIZE, changes, base=one)
    return Archive(root, one, two, maker.volume)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    """Nobody changes it."""
    return asyncio.run(_make(tmp_path_factory.mktemp("archive") / "store"))


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Archive, Path]:
    """An encrypted one, and the file with its passphrase."""
    base = tmp_path_factory.mktemp("sealed")
    (base / "passphrase").write_text(PASSPHRASE + "\n")
    return asyncio.run(_make(base / "store", Secret("passphrase", PASSPHRASE.encode()))), base / "passphrase"


def restored(archive: Archive, target: object, *flags: object, number: int = 0) -> Report:
    return ok("archive", "restore", archive.snapshot(number), target, *flags)


# --- looking ----------------------------------------------------------------------------------------------------------


def test_an_archive_is_listed(archive: Archive) -> None:
    report = ok("archive", "list", archive.uri)
    (volume,) = report["volumes"]
    assert (volume["volume"], volume["uuid"], volume["problem"]) == ("vm", archive.volume.hex(), None)
    assert [(one["number"], one["size"], one["data"], one["base"]) for one in volume["snapshots"]] == [
        (1, SIZE, 6 * A, None), (2, SIZE, 7 * A, 1),
    ]  # fmt: skip
    assert volume["snapshots"][1]["stored"] == sum(archive.two.entries[block].length for block in (1, 9, 12))
    done = run_cli("archive", "list", archive.uri)
    assert done.status == 0 and re.findall(r"^vm +@(\d)", done.stdout, re.MULTILINE) == ["1", "2"]


def test_a_snapshot_is_shown(archive: Archive) -> None:
    report = ok("archive", "show", archive.snapshot())
    assert (report["number"], report["encryption"], report["source"]) == (2, "none", "file:///srv/vm.raw")
    done = run_cli("archive", "show", archive.snapshot(1))
    assert done.status == 0 and "@1" in done.stdout and "none: it was archived whole" in done.stdout


def test_a_snapshot_is_a_volume(archive: Archive, tmp_path: Path, server: Server, volume: str) -> None:
    """Everything that reads volumes reads it."""
    image = tmp_path / "vm.raw"
    image.write_bytes(archive.two.content)
    shown = ok("volume", "show", archive.snapshot())
    assert (shown["size"], shown["map"], shown["zeroing"]) == (SIZE, "exact", "read-only")
    assert ok("verify", archive.snapshot(), image)["outcome"] == "equal"
    different = run_cli("verify", archive.snapshot(1), image, "--json", "--quiet")
    assert different.status == 3
    assert sum(one["length"] for one in different.report["ranges"]) > 0
    planned = ok("plan", archive.snapshot(), server.url(volume), "--region-size", "256K")
    assert planned["regions"] == {"skip": 6, "unmap": 0, "send": 7, "compare": 0}
    report = ok("sync", archive.snapshot(), server.url(volume))
    assert report["outcome"] == "committed" and server.image(volume).read_bytes() == archive.two.content
    again = ok("sync", archive.snapshot(1), server.url(volume))
    assert again["outcome"] == "committed" and server.image(volume).read_bytes() == archive.one.content


def pins(archive: Archive) -> set[str]:
    """Those that killed readers have left are there, too."""
    directory = archive.root / archive.volume.hex() / "pins"
    return {path.name for path in directory.iterdir()} if directory.exists() else set()


def test_pins_are_gone_afterwards(archive: Archive, tmp_path: Path) -> None:
    before = pins(archive)
    restored(archive, tmp_path / "vm.raw")
    assert pins(archive) == before


# --- targets ----------------------------------------------------------------------------------------------------------


def test_a_new_image_is_sparse_and_has_its_name_at_last(archive: Archive, tmp_path: Path) -> None:
    image = tmp_path / "vm.raw"
    report = restored(archive, image)
    assert image.read_bytes() == archive.two.content
    assert [path.name for path in tmp_path.iterdir()] == ["vm.raw"]
    assert report["outcome"] == "restored" and report["results"]["changed"] == 7
    assert sum(length for _, length in extents(image)) == report["bytes"]["target_written"]
    older = restored(archive, tmp_path / "older.raw", number=1)
    assert older["number"] == 1 and (tmp_path / "older.raw").read_bytes() == archive.one.content


def test_the_report_for_people(archive: Archive, tmp_path: Path) -> None:
    done = run_cli("archive", "restore", archive.snapshot(), f"file://{tmp_path}/vm.raw")
    assert done.status == 0 and "snapshot @2 restored" in done.stdout and "7 restored" in done.stdout


def test_an_older_image_gets_what_differs(archive: Archive, tmp_path: Path) -> None:
    image = tmp_path / "vm.raw"
    restored(archive, image, number=1)
    inode = image.stat().st_ino
    report = restored(archive, image, "--overwrite", "--yes")
    assert image.read_bytes() == archive.two.content and image.stat().st_ino == inode
    assert report["results"] == {"zero": 1, "equal": 4, "changed": 3}
    assert report["bytes"]["archive_read"] == sum(archive.two.entries[block].length for block in (1, 9, 12))
    back = restored(archive, image, "--overwrite", "--yes", number=1)
    assert image.read_bytes() == archive.one.content and back["results"]["zero"] == 2


def test_a_loop_device(archive: Archive, tmp_path: Path) -> None:
    image = build(tmp_path / "disk.raw", SIZE + 4096, [(SIZE - 8192, b"old")])
    try:
        with loop_device(image) as device:
            refused_json(
                run_cli("archive", "restore", archive.snapshot(), device, "--json"),
                "wrong-state",
                device,
                "--overwrite",
            )
            report = restored(archive, device, "--overwrite", "--yes")
    except Unavailable as error:
        pytest.skip(str(error))
    assert image.read_bytes()[:SIZE] == archive.two.content
    assert report["target_size"] == SIZE + 4096


def test_an_export_in_memory(archive: Archive, tmp_path: Path) -> None:
    with nbdkit(tmp_path, "memory", f"size={SIZE}") as served:
        report = restored(archive, served.uri)
        written = [line for line in served.operations() if line.startswith("Write ")]
        assert report["results"] == {"zero": 0, "equal": 0, "changed": 7} and written
        assert not [line for line in served.operations() if line.startswith("Read ")]
        assert ok("verify", archive.snapshot(), served.uri)["outcome"] == "equal"
        again = restored(archive, served.uri, "--overwrite", "--yes", number=1)
        assert again["results"] == {"zero": 2, "equal": 4, "changed": 2}
        assert ok("verify", archive.snapshot(1), served.uri)["outcome"] == "equal"


def test_a_qcow2_image_through_qemu(archive: Archive, tmp_path: Path) -> None:
    image = tmp_path / "vm.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, SIZE)
    with qemu_nbd(tmp_path, "--format=qcow2", "--discard=unmap", image) as served:
        restored(archive, served.uri)
    qemu_img("convert", "-f", "qcow2", "-O", "raw", image, tmp_path / "vm.raw")
    assert (tmp_path / "vm.raw").read_bytes() == archive.two.content


def test_targets_that_are_refused_are_left_alone(archive: Archive, tmp_path: Path) -> None:
    filled = build(tmp_path / "filled", SIZE, [(A, b"precious")])
    small = build(tmp_path / "small", SIZE - 1)
    os.mkfifo(tmp_path / "fifo")
    for target, code, word in (
        (filled, "wrong-state", "not empty"),
        (small, "size-mismatch", "too small"),
        (tmp_path, "unsupported", "directory"),
        (tmp_path / "fifo", "unsupported", "not a regular file"),
        (tmp_path / "none" / "vm.raw", "not-found", "none"),
        ("grpc://127.0.0.1:9/vm", "invalid-argument", "blockferry sync"),
        (archive.snapshot(), "invalid-argument", "no target"),
    ):
        done = run_cli("archive", "restore", archive.snapshot(), target, "--json", "--quiet")
        error = refused(done, word)
        assert done.report["error"]["code"] == code, error
    assert filled.read_bytes()[A : A + 8] == b"precious" and small.stat().st_size == SIZE - 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fifo", "filled", "small"]


def test_targets_in_use_are_refused(archive: Archive, tmp_path: Path) -> None:
    image = build(tmp_path / "vm.raw", SIZE)
    words = ("archive", "restore", archive.snapshot(), image, "--overwrite", "--yes", "--json", "--quiet")
    with holding(image, os.O_RDWR):
        refused_json(run_cli(*words), "in-use", "vm.raw")
    try:
        with loop_device(image) as device:
            refused_json(run_cli(*words), "in-use", device)
            fd = os.open(device, os.O_RDWR | os.O_EXCL)
            try:
                refused(run_cli("archive", "restore", archive.snapshot(), device, "--overwrite", "--yes"), "in use")
            finally:
                os.close(fd)
    except Unavailable as error:
        pytest.skip(str(error))
    assert image.read_bytes() == bytes(SIZE)


def test_nobody_is_there_to_confirm(archive: Archive, tmp_path: Path) -> None:
    image = build(tmp_path / "vm.raw", SIZE, [(0, b"precious")])
    refused(run_cli("archive", "restore", archive.snapshot(), image, "--overwrite"), "--yes", status=2)
    assert image.read_bytes()[:8] == b"precious"


# --- interrupted ------------------------------------------------------------------------------------------------------


def killed_at(point: str, *words: object) -> None:
    environment = {**zygote.environment(), "BLOCKFERRY_CRASH_POINT": point}
    process = zygote.popen(command(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert finish(process).status == -signal.SIGKILL


@pytest.mark.parametrize(
    "point", ["atomic-before-rename", "restore-begun", "restore-written:1", "restore-written:2", "restore-flushed"]
)
def test_a_restore_that_was_killed_goes_on(archive: Archive, tmp_path: Path, point: str) -> None:
    """What is there is looked at, and only what is missing is fetched."""
    image, partial = tmp_path / "vm.raw", tmp_path / "vm.raw.partial"
    state = ("--state-dir", tmp_path / "state")
    words = ("archive", "restore", archive.snapshot(), image, *state)
    killed_at(point, *words)
    assert not image.exists()
    there = partial.read_bytes()
    blocks = archive.two.blocks
    complete = {block for block, data in blocks.items() if there[block * A :][: len(data)] == data}
    assert point != "restore-flushed" or len(complete) == len(blocks)
    assert bool(complete) == point.startswith(("restore-written", "restore-flushed"))
    report = restored(archive, image, *state)
    assert image.read_bytes() == archive.two.content and not partial.exists()
    assert report["results"] == {"zero": 0, "equal": len(complete), "changed": len(blocks) - len(complete)}
    missing = [(block, archive.two.entries[block]) for block in blocks if block not in complete]
    assert report["bytes"]["archive_read"] == sum(one.length for one in ranges(missing))


def test_a_restore_that_was_killed_at_its_end_is_complete(archive: Archive, tmp_path: Path) -> None:
    image = tmp_path / "vm.raw"
    state = ("--state-dir", tmp_path / "state")
    for point in ("rename-before-fsync:2", "restore-finished"):
        image.unlink(missing_ok=True)
        killed_at(point, "archive", "restore", archive.snapshot(), image, *state)
        assert image.read_bytes() == archive.two.content
        # The same command again finds it whole.
        again = restored(archive, image, *state)
        assert again["results"] == {"zero": 0, "equal": 7, "changed": 0}
    assert list((tmp_path / "state" / "restores").iterdir()) == []


def test_what_was_left_is_not_taken_for_another_snapshot(archive: Archive, tmp_path: Path) -> None:
    image = tmp_path / "vm.raw"
    killed_at("restore-written:2", "archive", "restore", archive.snapshot(), image)
    refused(run_cli("archive", "restore", archive.snapshot(1), image), "not empty")
    restored(archive, image, "--overwrite", "--yes", number=1)
    assert image.read_bytes() == archive.one.content


def test_somebody_who_changed_what_was_left_is_overruled(archive: Archive, tmp_path: Path) -> None:
    image, partial = tmp_path / "vm.raw", tmp_path / "vm.raw.partial"
    killed_at("restore-flushed", "archive", "restore", archive.snapshot(), image)
    with partial.open("r+b") as file:
        file.write(b"changed")
    report = restored(archive, image)
    assert image.read_bytes() == archive.two.content and report["results"]["changed"] == 1


def test_an_interrupt_leaves_no_pin(archive: Archive, tmp_path: Path) -> None:
    before = pins(archive)
    with nbdkit(tmp_path, "memory", f"size={SIZE}", "delay-write=2", filters=["delay"]) as served:
        process = zygote.popen(
            command("archive", "restore", archive.snapshot(), served.uri), stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        while not [line for line in served.operations() if line.startswith("Write ")]:
            assert process.poll() is None
        assert len(pins(archive) - before) == 1
        process.send_signal(signal.SIGTERM)
        assert finish(process).status == 143
        assert pins(archive) == before


# --- damage and keys --------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path: Path) -> tuple[Archive, Path, int]:
    """An archive with a bit flipped in one chunk, the chunk, and the damaged block."""
    archive = asyncio.run(_make(tmp_path / "store"))
    entry = archive.two.entries[7]
    chunk = archive.root / archive.volume.hex() / "data" / f"{entry.attempt.hex()}-{entry.chunk:06}"
    with chunk.open("r+b") as file:
        file.seek(entry.offset + 20)
        byte = file.read(1)[0]
        file.seek(entry.offset + 20)
        file.write(bytes([byte ^ 8]))
    return archive, chunk, 7


def test_damage_is_named_and_can_be_stepped_over(damaged: tuple[Archive, Path, int], tmp_path: Path) -> None:
    archive, chunk, block = damaged
    image = tmp_path / "vm.raw"
    error = refused_json(
        run_cli("archive", "restore", archive.snapshot(), image, "--json", "--quiet"), "data-mismatch", str(chunk)
    )
    assert (error["offset"], error["length"], error["volume"]) == (block * A, A, archive.snapshot())
    assert "--allow-damaged" in error["next"] and not image.exists()
    done = run_cli("archive", "restore", archive.snapshot(), image, "--allow-damaged", "--json", "--quiet")
    assert done.status == 3 and done.report["outcome"] == "damaged"
    assert [(one["offset"], one["length"]) for one in done.report["damaged"]] == [(block * A, A)]
    expected = bytearray(archive.two.content)
    expected[block * A : (block + 1) * A] = bytes(A)
    assert image.read_bytes() == bytes(expected)
    shown = run_cli("archive", "restore", archive.snapshot(), tmp_path / "b.raw", "--allow-damaged")
    assert shown.status == 3 and "DAMAGED" in shown.stdout and str(chunk) in shown.stdout


def test_verify(damaged: tuple[Archive, Path, int], archive: Archive) -> None:
    sound = ok("archive", "verify", archive.uri)
    assert (sound["outcome"], sound["snapshots"], sound["blocks"]) == ("sound", 2, {"known": 9, "read": 9})
    assert ok("archive", "verify", archive.snapshot(2))["snapshots"] == 1
    assert ok("archive", "verify", archive.uri, "--metadata")["blocks"] == {"known": 9, "read": 0}
    assert ok("archive", "verify", archive.uri, "--sample", "100%")["blocks"]["read"] == 9
    rotten, chunk, block = damaged
    assert ok("archive", "verify", rotten.uri, "--metadata")["outcome"] == "sound"
    done = run_cli("archive", "verify", f"{rotten.uri}#vm", "--json", "--quiet")
    assert done.status == 3
    assert [(one["volume"], one["snapshot"], one["offset"]) for one in done.report["findings"]] == [
        ("vm", 2, block * A), ("vm", 1, block * A),
    ]  # fmt: skip
    chunk.unlink()
    shown = run_cli("archive", "verify", rotten.uri, "--metadata")
    assert shown.status == 3 and str(chunk) in shown.stdout and "not in the store" in shown.stdout


def test_a_damaged_record_hides_no_other_volume(tmp_path: Path) -> None:
    archive = asyncio.run(_make(tmp_path / "store"))
    (archive.root / "names" / "other").write_bytes((archive.root / "names" / "vm").read_bytes())
    done = run_cli("archive", "list", archive.uri, "--json", "--quiet")
    assert done.status == 1
    assert [(one["volume"], one["problem"] is None) for one in done.report["volumes"]] == [
        ("other", False),
        ("vm", True),
    ]


def test_an_encrypted_archive_needs_its_key(sealed: tuple[Archive, Path], tmp_path: Path) -> None:
    archive, passphrase = sealed
    wrong = tmp_path / "wrong"
    wrong.write_text("another secret word\n")
    refused(run_cli("archive", "list", archive.uri), "encrypted", "--passphrase-file")
    done = run_cli("archive", "restore", archive.snapshot(), tmp_path / "a.raw", "--passphrase-file", wrong)
    line = refused(done, "passphrase", "keys/")
    assert "secret word" not in line
    refused(run_cli("volume", "show", archive.snapshot(), "--key-file", wrong), "no key file", status=2)
    both = run_cli("archive", "list", archive.uri, "--key-file", wrong, "--passphrase-file", wrong)
    assert both.status == 2
    for words in (
        ("archive", "restore", archive.snapshot(), tmp_path / "vm.raw"),
        ("archive", "verify", archive.uri),
        ("verify", archive.snapshot(), tmp_path / "vm.raw"),
    ):
        done = run_cli(*words, "--passphrase-file", passphrase)
        assert done.status == 0, done.stderr
        assert PASSPHRASE not in done.stdout + done.stderr
    assert (tmp_path / "vm.raw").read_bytes() == archive.two.content


def test_a_secret_on_the_command_line_is_refused_and_not_repeated(archive: Archive) -> None:
    for option in ("secret_access_key=hush-hush", "hush-hush"):
        done = run_cli("archive", "list", "s3://bucket/p", "--store-option", option)
        assert done.status in (1, 2) and "hush" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("words", "word"),
    [
        (("list", "http://x"), "s3://BUCKET"),
        (("list", "file:///does/not/exist"), "mount"),
        (("show", "file:///does/not/exist"), "names no snapshot"),
        (("restore", "file:///does/not/exist#vm@x", "t"), "number of a snapshot"),
        (("verify", "file:///does/not/exist", "--sample", "5"), "such as 5%"),
        (("verify", "file:///does/not/exist", "--sample", "0%"), "such as 5%"),
        (("verify", "file:///does/not/exist", "--sample", "5%", "--metadata"), "not allowed"),
    ],
)
def test_what_cannot_be_meant_is_told(words: tuple[str, ...], word: str) -> None:
    done = run_cli("archive", *words)
    assert done.status in (1, 2) and word in done.stderr and done.stderr.count("\n") == 1


def test_reading_imports_nothing_of_the_network(archive: Archive, tmp_path: Path) -> None:
    """Starting is part of every command: obstore is for remote stores, and no archive is no cryptography."""
    code = (
        "import sys\nfrom blockferry.client.cli import main\nmain.build_parser()\n"
        "print({'obstore', 'cryptography', 'zstandard'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# --- both ways --------------------------------------------------------------------------------------------------------


def test_what_was_created_is_restored_by_us_and_from_the_document(tmp_path: Path) -> None:
    """A chain of snapshots of an image that changes, is trimmed and stays the same."""
    store, image = tmp_path / "store", tmp_path / "vm.raw"
    store.mkdir()
    (tmp_path / "secret").write_bytes(b"0123456789" * 4 + b"\n")
    flags = ("--key-file", tmp_path / "secret")
    build(image, SIZE, [(0, b"first"), (3 * A + 5, b"third" * 9000), (SIZE - 3, b"end")])
    changes: list[list[Piece]] = [[], [(3 * A, Hole(A)), (7 * A, b"seventh" * 5000)], [], [(5, b"!")]]
    contents = []
    for number, pieces in enumerate(changes, 1):
        change(image, pieces)
        report = ok("archive", "create", image, f"file://{store}", "--volume", "vm", *flags)
        assert report["snapshot"] == number
        contents.append(image.read_bytes())
    for number, content in enumerate(contents, 1):
        target = tmp_path / f"{number}.raw"
        ok("archive", "restore", f"file://{store}#vm@{number}", target, *flags)
        assert target.read_bytes() == content
        done = subprocess.run(
            [sys.executable, minimal.__file__, store, f"vm@{number}", tmp_path / "out", *flags],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        assert (tmp_path / "out").read_bytes() == content
    assert ok("archive", "verify", f"file://{store}", *flags)["snapshots"] == 4
