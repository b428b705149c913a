"""What an agent remembers over restarts: one small file for each policy, in a directory that is its own.

`version` says how the directory is laid out and is looked at first; a newer one is refused. `lock` is held (flock(2))
as long as the agent runs. `policies/NAME.json` is replaced whole. A file that cannot be read is a policy of which
nothing is known: it is replicated at once, and compared, which is always right.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

import msgspec
import structlog
from blockferry.common import disk
from blockferry.common.durable import make_directories, write_atomic
from blockferry.common.errors import BlockferryError, Code, from_os_error

log = structlog.get_logger("blockferry.agent")

VERSION = 1
"""Of the layout of the directory. A change that an older agent would misread makes it one more."""

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_NAME_OF_VERSION = "blockferry-agent state "


class Clock:
    """The clocks of this host."""

    def now(self) -> float:
        """Seconds that never go back and go on while the host sleeps: CLOCK_BOOTTIME of clock_gettime(2)."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def wall(self) -> float:
        """Seconds since 1970, as far as anybody knows."""
        return time.time()

    def minute(self) -> int:
        """Of the day, in the local time of this host."""
        local = time.localtime(self.wall())
        return local.tm_hour * 60 + local.tm_min

    def boot(self) -> str:
        """Changes whenever `now` begins anew."""
        try:
            return _BOOT_ID.read_text().strip()
        except OSError:
            return ""


class Moment(msgspec.Struct, frozen=True):
    """A time that is understood after a restart: exactly as long as the host has not been started anew, and after that
    as well as the wall clock is right. Seconds."""

    wall: float
    now: float
    boot: str

    @classmethod
    def at(cls, clock: Clock, now: float) -> Moment:
        """The moment when the clock's `now` had this value."""
        return cls(clock.wall() - (clock.now() - now), now, clock.boot())

    def on(self, clock: Clock) -> float:
        """The value of the clock's `now` then; never later than now."""
        if self.boot and self.boot == clock.boot():
            return min(self.now, clock.now())
        return clock.now() - max(0.0, clock.wall() - self.wall)


class Failure(msgspec.Struct, frozen=True):
    """The error of a run, as `BlockferryError.fields` has it, and all of it in a line."""

    code: str
    line: str
    message: str
    cause: str = ""
    next: str = ""
    volume: str = ""
    offset: int | None = None
    length: int | None = None
    wall: float = 0.0
    """When."""

    @classmethod
    def of(cls, error: BlockferryError, wall: float) -> Failure:
        """Of an error. Paths in it may hold bytes that are no UTF-8; JSON and messages may not."""
        return cls(
            error.code.value,
            _utf8(error.line()),
            _utf8(error.what),
            _utf8(error.cause),
            _utf8(error.next),
            _utf8(error.volume or ""),
            error.offset,
            error.length,
            wall,
        )


def _utf8(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


class Outcome(msgspec.Struct, frozen=True):
    """The last run of a policy that was committed. Bytes and seconds; `wall` is when it began."""

    wall: float
    seconds: float
    generation: int
    commit_id: str
    volume_size: int = 0
    data_sent: int = 0
    source_read: int = 0
    wire_sent: int = 0
    unmapped: int = 0
    interval: float = 0.0
    """From the start of the one before to its start; 0 if there was none."""
    full: str = ""
    """Why everything was compared; empty if only what was known to have changed."""


class Memory(msgspec.Struct, frozen=True):
    """What is remembered of a policy."""

    source: str
    destination: str
    paused: bool = False
    committed: Moment | None = None
    """When the newest run that was committed began."""
    last: Outcome | None = None
    failure: Failure | None = None
    """Of the last run, if it failed."""


class StateDirectory:
    """The directory. Everything here blocks."""

    def __init__(self, path: Path) -> None:
        """Make it where it is missing, and lock it. Raises IN_USE while another agent has it, UNSUPPORTED where a newer
        one has written it, and what operating systems raise."""
        self.path = path
        self._policies = path / "policies"
        try:
            make_directories(self._policies)
            self._lock = disk.create(path / "lock")
        except OSError as error:
            raise from_os_error(error, f"cannot use {path} for the agent's state") from error
        try:
            self._take()
        except BaseException:
            os.close(self._lock)
            raise

    def _take(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockferryError(
                Code.IN_USE,
                f"cannot use {self.path} for the agent's state",
                cause="another blockferry-agent has it open",
                next="stop that agent, or give this one another state_dir and other policies",
            ) from error
        version = self.path / "version"
        try:
            found = version.read_text()
        except FileNotFoundError:
            write_atomic(version, f"{_NAME_OF_VERSION}{VERSION}\n".encode())
            return
        except (OSError, UnicodeDecodeError) as error:
            raise self._foreign(f"{version} cannot be read: {error}") from error
        number = found.removeprefix(_NAME_OF_VERSION).strip()
        if found.startswith(_NAME_OF_VERSION) and number.isascii() and number.isdigit():
            if int(number) <= VERSION:
                return
            raise BlockferryError(
                Code.UNSUPPORTED,
                f"cannot use {self.path} for the agent's state",
                cause=f"a newer blockferry-agent has written it: its version is {number}, and this one knows {VERSION}",
                next="update blockferry here, or give this agent another state_dir: everything is compared once then",
                expected=str(VERSION),
                found=number,
            )
        raise self._foreign(f"{version} is not an agent's")

    def _foreign(self, cause: str) -> BlockferryError:
        return BlockferryError(
            Code.CORRUPT_STATE,
            f"cannot use {self.path} for the agent's state",
            cause=cause,
            next="name another state_dir, or remove the file if the directory is an agent's",
        )

    def load(self, policy: str) -> Memory | None:
        """What is remembered of a policy; None where nothing is."""
        file = self._file(policy)
        try:
            return msgspec.json.decode(file.read_bytes(), type=Memory)
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError, msgspec.MsgspecError) as error:
            log.warning(
                "what was remembered of a policy is lost",
                policy=policy,
                file=str(file),
                error=str(error),
                next="it is replicated at once",
            )
            return None

    def save(self, policy: str, memory: Memory) -> None:
        """Remember, durably. Raises IO_ERROR and its like."""
        try:
            write_atomic(self._file(policy), msgspec.json.encode(memory))
        except OSError as error:
            raise from_os_error(error, f"cannot remember policy {policy} in {self.path}") from error

    def _file(self, policy: str) -> Path:
        # Names of policies are names of volumes: they have no slash and begin with no dot.
        return self._policies / f"{policy}.json"

    def close(self) -> None:
        """Let another agent have it."""
        os.close(self._lock)
