"""Commands on a pseudo-terminal, so that tests see what people see while a command runs, and type what they type."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
import threading
from collections.abc import Iterator

from tests.support import command, until

COLUMNS = 160

_STALL = re.compile(r"waiting for the destination for (\d+) s")
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class OnTerminal:
    """`blockferry` at work on a terminal. Its standard output is not looked at."""

    def __init__(self, *args: object, typing: bool = False) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": str(COLUMNS)}
        try:
            self.process = subprocess.Popen(
                command(*args),
                stdin=theirs if typing else None,
                stdout=subprocess.DEVNULL,
                stderr=theirs,
                env=environment,
                text=True,
            )
        finally:
            os.close(theirs)
        self._drawn = bytearray()
        # Somebody must read all the time: a full terminal stops whoever draws on it.
        self._reader = threading.Thread(target=self._read, name="terminal", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        # EIO is how Linux says that the last writer has closed the terminal.
        with contextlib.suppress(OSError):
            while part := os.read(self._ours, 65536):
                self._drawn += part

    @property
    def drawn(self) -> str:
        """Everything drawn so far, without the escape sequences."""
        return _ESCAPES.sub("", bytes(self._drawn).decode(errors="replace"))

    def type(self, text: str, after: str) -> None:
        """Type a line once `after` is shown; fail if the command ends before that."""
        until(lambda: after in self.drawn or self.process.poll() is not None, f"{after!r} is shown")
        assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.drawn[-2000:]}"
        os.write(self._ours, f"{text}\n".encode())

    def await_stall(self, seconds: int, timeout: float = 60) -> None:
        """Wait until people are told that the destination has not kept up for so long; fail if the command ends."""

        def told() -> bool:
            return max((int(found) for found in _STALL.findall(self.drawn)), default=0) >= seconds

        until(lambda: told() or self.process.poll() is not None, f"a stall of {seconds} s is shown", timeout)
        assert told(), f"ended with {self.process.returncode}:\n{self.drawn[-2000:]}"

    def finish(self, timeout: float = 60) -> tuple[int, str]:
        """Wait for its end: the exit status and everything it drew."""
        status = self.process.wait(timeout)
        self._reader.join(10)
        return status, self.drawn

    def close(self) -> None:
        """Kill it if it is still there."""
        self.process.kill()
        self.process.wait()
        self._reader.join(10)
        os.close(self._ours)


@contextlib.contextmanager
def on_terminal(*args: object, typing: bool = False) -> Iterator[OnTerminal]:
    """Start `blockferry` on a terminal of its own, its standard input too if there is `typing`; it is killed in the
    end."""
    terminal = OnTerminal(*args, typing=typing)
    try:
        yield terminal
    finally:
        terminal.close()
