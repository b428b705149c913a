"""The zeroing ladder steps down only where it must, and what is said about writers and loop devices is true."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from blockferry.common import linux
from blockferry.common.linux import NOT_SUPPORTED, Zeroing, ZeroingLadder, data_extents

from tests.filesystems import CLONING, MOUNTED, Unavailable
from tests.processes import holding, loop_device
from tests.unit.conftest import Place

BLOCK = 4096
PUNCH, ZERO = 0x03, 0x11
"""Modes of fallocate(2): PUNCH_HOLE and ZERO_RANGE, each with KEEP_SIZE."""


@contextlib.contextmanager
def opened(path: Path, flags: int = os.O_RDWR) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CREAT, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


# --- what is data -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (0, 20 * BLOCK, [(2 * BLOCK, 3 * BLOCK), (10 * BLOCK, BLOCK)]),
        (0, 2 * BLOCK, []),
        (3 * BLOCK, 4 * BLOCK, [(3 * BLOCK, BLOCK)]),
        (4 * BLOCK + 1, 10 * BLOCK + 7, [(4 * BLOCK + 1, BLOCK - 1), (10 * BLOCK, 7)]),
        (11 * BLOCK, 20 * BLOCK, []),
        (5 * BLOCK, 5 * BLOCK, []),
        (30 * BLOCK, 40 * BLOCK, []),
    ],
)
def test_data_extents_are_cut_to_the_range_asked_for(
    directory: Path, start: int, end: int, expected: list[tuple[int, int]]
) -> None:
    with opened(directory / "file") as fd:
        os.ftruncate(fd, 20 * BLOCK)
        os.pwrite(fd, b"x" * 3 * BLOCK, 2 * BLOCK)
        os.pwrite(fd, b"x", 10 * BLOCK + 100)
        assert list(data_extents(fd, start, end)) == expected


def test_other_errors_than_a_hole_up_to_the_end_are_raised() -> None:
    reading, writing = os.pipe()
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, reading)
        stack.callback(os.close, writing)
        with pytest.raises(OSError) as caught:  # noqa: PT011
            list(data_extents(reading, 0, 1))
        assert caught.value.errno == errno.ESPIPE


# --- the zeroing ladder -----------------------------------------------------------------------------------------


class Fallocate:
    """Stands in for fallocate(2): refuses some modes with an error, and notes every call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, refused: dict[int, int]) -> None:
        self.calls: list[tuple[int, int, int]] = []
        self._refused = refused
        self._real = linux.fallocate
        monkeypatch.setattr(linux, "fallocate", self)

    def __call__(self, fd: int, mode: int, offset: int, length: int) -> None:
        self.calls.append((mode, offset, length))
        if mode in self._refused:
            raise OSError(self._refused[mode], "injected")
        self._real(fd, mode, offset, length)


@pytest.mark.parametrize("number", sorted(NOT_SUPPORTED), ids=errno.errorcode.get)
@pytest.mark.parametrize(
    ("refused", "method"),
    [((), Zeroing.PUNCH_HOLE), ((PUNCH,), Zeroing.ZERO_RANGE), ((PUNCH, ZERO), Zeroing.WRITE)],
    ids=["nothing refused", "no punching", "neither"],
)
def test_the_ladder_takes_the_best_step_that_works_and_remembers_it(
    place: Place, monkeypatch: pytest.MonkeyPatch, refused: tuple[int, ...], method: Zeroing, number: int
) -> None:
    content = os.urandom(10 * BLOCK)
    with opened(place("ext4") / "file") as fd:
        os.write(fd, content)
        fallocate = Fallocate(monkeypatch, dict.fromkeys(refused, number))
        ladder = ZeroingLadder()
        ladder.zero(fd, BLOCK, 2 * BLOCK, len(content))
        assert ladder.method is method
        tried = {Zeroing.PUNCH_HOLE: [PUNCH], Zeroing.ZERO_RANGE: [PUNCH, ZERO], Zeroing.WRITE: [PUNCH, ZERO]}[method]
        assert fallocate.calls == [(mode, BLOCK, 2 * BLOCK) for mode in tried]

        fallocate.calls.clear()
        ladder.zero(fd, 5 * BLOCK, BLOCK, len(content))
        again = [] if method is Zeroing.WRITE else [(tried[-1], 5 * BLOCK, BLOCK)]
        assert fallocate.calls == again
        expected = bytearray(content)
        expected[BLOCK : 3 * BLOCK] = bytes(2 * BLOCK)
        expected[5 * BLOCK : 6 * BLOCK] = bytes(BLOCK)
        assert os.pread(fd, len(content) + 1, 0) == expected


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EPERM, errno.EBADF], ids=errno.errorcode.get)
@pytest.mark.parametrize(("refused", "method"), [((PUNCH,), Zeroing.PUNCH_HOLE), ((ZERO,), Zeroing.ZERO_RANGE)])
def test_a_failure_of_the_disk_is_raised_and_takes_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: tuple[int, ...], method: Zeroing, number: int
) -> None:
    with opened(tmp_path / "file") as fd:
        os.write(fd, b"x" * BLOCK)
        Fallocate(monkeypatch, dict.fromkeys(refused, number))
        ladder = ZeroingLadder(method)
        with pytest.raises(OSError) as caught:  # noqa: PT011
            ladder.zero(fd, 0, BLOCK, BLOCK)
        assert caught.value.errno == number
        assert ladder.method is method
        assert os.pread(fd, BLOCK + 1, 0) == b"x" * BLOCK


@pytest.mark.parametrize("first", Zeroing)
@pytest.mark.parametrize("size", [1, 511, 4095, 4096, 4097, 65537, 2 * 1024 * 1024 + 1])
@pytest.mark.parametrize("reach", [0.0, 0.5, 1.0], ids=["to the end", "from the middle", "one byte"])
def test_zeroing_up_to_the_end_never_changes_the_size(directory: Path, first: Zeroing, size: int, reach: float) -> None:
    offset = min(int(size * reach), size - 1)
    with opened(directory / "file") as fd:
        os.write(fd, b"x" * size)
        ZeroingLadder(first).zero(fd, offset, size - offset, size)
        assert os.fstat(fd).st_size == size
        assert os.pread(fd, size + 1, 0) == b"x" * offset + bytes(size - offset)


def test_fallocate_says_what_went_wrong() -> None:
    with pytest.raises(OSError, match="Bad file descriptor") as caught:
        linux.fallocate(-1, PUNCH, 0, 1)
    assert caught.value.errno == errno.EBADF


# --- clones -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tmpfs", *MOUNTED])
def test_clones_are_made_where_the_file_system_can(place: Place, kind: str) -> None:
    home = place(kind)
    (home / "source").write_bytes(b"x" * 3 * BLOCK)
    with opened(home / "source", os.O_RDONLY) as source, opened(home / "target") as target:
        if kind in CLONING:
            linux.reflink(source, target)
            os.pwrite(target, b"y", 0)
            assert (home / "target").read_bytes() == b"y" + b"x" * (3 * BLOCK - 1)
            assert (home / "source").read_bytes() == b"x" * 3 * BLOCK
        else:
            with pytest.raises(OSError) as caught:  # noqa: PT011
                linux.reflink(source, target)
            assert caught.value.errno in NOT_SUPPORTED


# --- who else is there ------------------------------------------------------------------------------------------


def test_a_writer_in_another_process_is_seen_while_it_is_there(directory: Path) -> None:
    path = directory / "file"
    path.write_bytes(b"x")
    with opened(path, os.O_RDONLY) as fd:
        assert not linux.opened_for_writing(fd)
        for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDWR | os.O_APPEND):
            with holding(path, flags) as process:
                assert linux.opened_for_writing(fd)
                (found,) = linux.writers_of(path)
                assert found.endswith(f" ({process})")
            assert not linux.opened_for_writing(fd)
            assert linux.writers_of(path) == []


def test_a_reader_is_no_writer(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x")
    with opened(path, os.O_RDONLY) as fd, holding(path, os.O_RDONLY):
        assert not linux.opened_for_writing(fd)
        assert linux.writers_of(path) == []


def test_a_writer_in_this_process_counts(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x")
    with opened(path, os.O_RDONLY) as fd, opened(path, os.O_WRONLY):
        assert linux.opened_for_writing(fd)


def test_a_writer_of_a_hard_link_counts(tmp_path: Path) -> None:
    path, other = tmp_path / "file", tmp_path / "other"
    path.write_bytes(b"x")
    os.link(path, other)
    with holding(other, os.O_WRONLY):
        assert len(linux.writers_of(path)) == 1


RACE = """
import fcntl, os, subprocess, sys
from blockferry.common import linux
real = fcntl.fcntl
def racing(fd, command, *arguments):
    result = real(fd, command, *arguments)
    if (command, *arguments) == (fcntl.F_SETLEASE, fcntl.F_RDLCK):
        opening = "import os, sys; os.open(sys.argv[1], os.O_WRONLY | os.O_NONBLOCK)"
        done = subprocess.run([sys.executable, "-c", opening, sys.argv[1]], capture_output=True, text=True)
        assert "BlockingIOError" in done.stderr, done.stderr
    return result
fcntl.fcntl = racing
print(linux.opened_for_writing(os.open(sys.argv[1], os.O_RDONLY)))
"""


def test_somebody_opening_the_file_at_that_very_moment_does_not_kill_us(tmp_path: Path) -> None:
    # Whoever holds a lease is told of its breaking by a signal; the default one, SIGIO, ends the process.
    path = tmp_path / "file"
    path.write_bytes(b"x")
    done = subprocess.run([sys.executable, "-c", RACE, str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr


def test_loop_devices_over_a_file_are_found(tmp_path: Path) -> None:
    path, other = tmp_path / "file", tmp_path / "other"
    for one in (path, other):
        one.write_bytes(bytes(1024 * 1024))
    assert linux.loop_devices_over(path) == []
    try:
        with loop_device(path) as device:
            assert linux.loop_devices_over(path) == [device]
            assert linux.loop_devices_over(other) == []
    except Unavailable as error:
        pytest.skip(str(error))
    assert linux.loop_devices_over(path) == []
