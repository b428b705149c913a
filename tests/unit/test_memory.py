"""What an agent remembers: over restarts, over reboots, and what it does with a directory that is not its own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from blockferry.client.memory import VERSION, Clock, Failure, Memory, Moment, Outcome, StateDirectory
from blockferry.common.errors import BlockferryError, Code

from tests.tables import document


class FakeClock(Clock):
    """Shows whatever it is set to."""

    def __init__(self, now: float, wall: float, boot: str = "first") -> None:
        self.shown = now, wall, boot

    def now(self) -> float:
        return self.shown[0]

    def wall(self) -> float:
        return self.shown[1]

    def boot(self) -> str:
        return self.shown[2]


def test_what_was_remembered_is_there_after_a_restart(tmp_path: Path) -> None:
    directory = StateDirectory(tmp_path / "deep" / "state")
    assert directory.load("p") is None
    error = BlockferryError(Code.IO_ERROR, "no", cause="a \udcff byte", next="do", volume="p", offset=1, length=2)
    memory = Memory(
        "/s", "grpc://h:1/p", True, Moment(1.5, 2.5, "b"), Outcome(1.0, 2.0, 3, "ab"), Failure.of(error, 4.0)
    )
    directory.save("p", memory)
    directory.close()
    again = StateDirectory(tmp_path / "deep" / "state")
    assert again.load("p") == memory
    assert memory.failure is not None
    assert (memory.failure.cause, memory.failure.next, memory.failure.offset) == ("a \\udcff byte", "do", 1)
    again.close()


def test_the_file_is_as_it_is_described(tmp_path: Path) -> None:
    directory = StateDirectory(tmp_path)
    outcome = Outcome(1760000000.0, 1.5, 7, "ab", 1 << 30, 4096, 65536, 5000, 0, 270.0, "")
    memory = Memory("/srv/vm/db.raw", "grpcs://dr1:9870/db", False, Moment(1760000000.0, 86400.5, "b"), outcome)
    directory.save("db", memory)
    directory.close()
    written = (tmp_path / "policies/db.json").read_text()
    assert written == (
        '{"source":"/srv/vm/db.raw","destination":"grpcs://dr1:9870/db","paused":false,'
        '"committed":{"wall":1760000000.0,"now":86400.5,"boot":"b"},'
        '"last":{"wall":1760000000.0,"seconds":1.5,"generation":7,"commit_id":"ab","volume_size":1073741824,'
        '"data_sent":4096,"source_read":65536,"wire_sent":5000,"unmapped":0,"interval":270.0,"full":""},"failure":null}'
    )
    described = re.search(r'^\{"source":"/srv/vm/db.raw","destination".*\}$', document("docs/formats.md"), re.MULTILINE)
    assert described is not None
    assert described[0].replace("…", "b").replace("<id>", "ab") == written
    assert (tmp_path / "version").read_text() == f"blockferry-agent state {VERSION}\n"


def test_two_agents_cannot_have_one_directory(tmp_path: Path) -> None:
    first = StateDirectory(tmp_path)
    with pytest.raises(BlockferryError) as caught:
        StateDirectory(tmp_path)
    assert caught.value.code is Code.IN_USE
    assert "another blockferry-agent has it open" in caught.value.line()
    first.close()
    StateDirectory(tmp_path).close()


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        (f"blockferry-agent state {VERSION + 1}\n", Code.UNSUPPORTED, f"its version is {VERSION + 1}, and this one"),
        ("something else\n", Code.CORRUPT_STATE, "is not an agent's"),
        ("", Code.CORRUPT_STATE, "is not an agent's"),
        ("blockferry-agent state \n", Code.CORRUPT_STATE, "is not an agent's"),
        ("blockferry-agent state -1\n", Code.CORRUPT_STATE, "is not an agent's"),
    ],
)
def test_a_directory_of_another_version(tmp_path: Path, content: str, code: Code, words: str) -> None:
    StateDirectory(tmp_path).close()
    (tmp_path / "version").write_text(content)
    for _ in range(2):
        # Twice: a refusal leaves no lock.
        with pytest.raises(BlockferryError) as caught:
            StateDirectory(tmp_path)
        assert caught.value.code is code
        assert words in caught.value.line()
    assert (tmp_path / "version").read_text() == content


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"source": 1}', b"\xff", b'{"source": "/s"}'])
def test_a_damaged_file_is_a_policy_of_which_nothing_is_known(tmp_path: Path, content: bytes) -> None:
    directory = StateDirectory(tmp_path)
    (tmp_path / "policies" / "p.json").write_bytes(content)
    assert directory.load("p") is None
    directory.save("p", Memory("/s", "grpc://h:1/p"))
    assert directory.load("p") == Memory("/s", "grpc://h:1/p")
    directory.close()


def test_a_place_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BlockferryError) as caught:
        StateDirectory(tmp_path / "file" / "state")
    assert "for the agent's state" in caught.value.line()


def test_moments() -> None:
    before = FakeClock(now=1000.0, wall=50_000.0)
    moment = Moment.at(before, 940.0)
    assert moment == Moment(49_940.0, 940.0, "first")
    # The wall clock jumps, and the process is started anew: nothing changes.
    assert moment.on(FakeClock(now=1100.0, wall=0.0)) == 940.0
    # After a reboot the wall clock is all there is.
    assert moment.on(FakeClock(now=10.0, wall=50_100.0, boot="second")) == -150.0
    # One that has gone back makes it now, not later.
    assert moment.on(FakeClock(now=10.0, wall=0.0, boot="second")) == 10.0
    assert moment.on(FakeClock(now=10.0, wall=0.0, boot="first")) == 10.0


def test_the_clocks_of_this_host() -> None:
    clock = Clock()
    assert clock.now() <= clock.now()
    assert 0 <= clock.minute() < 1440
    assert Moment.at(clock, clock.now()).on(clock) <= clock.now()
