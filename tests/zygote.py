"""Programs of ours without their start: a process that has imported everything forks one for each.

Starting Python and importing everything takes a program most of its time in these tests, and they start thousands. What
runs is the same `main`, in a process of its own with its own descriptors, environment and end; whatever needs more than
that (a debugger around it, another user, a terminal) starts it in the ordinary way.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROGRAMS = Path(sys.executable).parent
NAMES = ("blockferry", "blockferry-server", "blockferry-agent", "blockferry-rehydrate", "archive-life")
"""The last is no program of an installation: tests/fault/archive_life.py."""

_PR_SET_CHILD_SUBREAPER = 36  # prctl(2)
_MOST_BYTES = 1 << 20

# --- the side of the tests --------------------------------------------------------------------------------------------

_zygotes: dict[tuple[int, str], socket.socket] = {}
"""By the process that started it (a worker that was forked has one of its own), and the program."""


def environment() -> dict[str, str]:
    """Of programs: what imports and calls of ours have put into that of the tests is not meant for them."""
    return {name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"}


def _zygote(name: str) -> socket.socket:
    ours = _zygotes.get((os.getpid(), name))
    if ours is None:
        # Its children become ours when their parent ends, so that we can wait for them.
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _MOST_BYTES)
        words = [sys.executable, "-m", "tests.zygote", str(theirs.fileno()), name]
        root = Path(__file__).resolve().parents[1]
        # It ends with its socket; nobody waits for it.
        subprocess.Popen(
            words, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, cwd=root, env=environment()
        ).returncode = 0
        theirs.close()
        _zygotes[os.getpid(), name] = ours
    return ours


class Forked(subprocess.Popen[Any]):
    """A `Popen` of one of our programs that was forked instead of started anew."""

    def _execute_child(self, *arguments: Any) -> None:
        # The hook between the making of the pipes and their closing; its arguments are those of CPython 3.11 to 3.13.
        words, cwd, env = arguments[0], arguments[5], arguments[6]
        stdin, stdout, stderr = arguments[10], arguments[13], arguments[15]
        request = {
            "words": list(map(os.fspath, words)),
            "cwd": os.fspath(cwd or os.getcwd()),
            "env": env,
        }
        descriptors = [fd if fd != -1 else number for number, fd in enumerate((stdin, stdout, stderr))]
        zygote = _zygote(Path(words[0]).name)
        socket.send_fds(zygote, [json.dumps(request).encode()], descriptors)
        self.pid = int(zygote.recv(64))
        self._child_created = True
        for ours, theirs in ((arguments[11], stdin), (arguments[12], stdout), (arguments[14], stderr)):
            if ours != -1 and theirs != -1:
                os.close(theirs)


def popen(words: list[str], **options: Any) -> subprocess.Popen[Any]:
    """`Popen` of `words`, forked if that is one of our programs."""
    ours = words[0] in {str(PROGRAMS / name) for name in NAMES}
    return (Forked if ours else subprocess.Popen)(words, **{"env": environment(), **options})


# --- the side of the programs -----------------------------------------------------------------------------------------


def _main_of(name: str) -> Callable[[], int]:
    """Import one program and nothing of the other: what is imported first may matter."""
    if name == "blockferry":
        from blockferry.client.cli import (  # noqa: F401 main's own choice
            agent,
            archive,
            archive_read,
            config,
            export,
            handover,
            main,
            pki,
            pools,
            rehydration,
            replicate,
        )
        from blockferry.common.archive import directory, reader  # noqa: F401

        return main.main
    if name == "blockferry-agent":
        from blockferry.client import agent_main

        return agent_main.main
    if name == "archive-life":
        from tests.fault import archive_life

        return archive_life.main
    if name == "blockferry-rehydrate":
        from blockferry.server.rehydrate import main as rehydrate

        return rehydrate.main
    from blockferry.server import main as server

    return server.main


def _become(request: dict[str, Any], descriptors: list[int], run: Callable[[], int]) -> None:
    """In the child: run the program to its end."""
    for number, fd in enumerate(descriptors):
        os.dup2(fd, number)
    for fd in descriptors:
        os.close(fd)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.argv = request["words"]
    Path("/proc/self/comm").write_text(Path(sys.argv[0]).name)
    encoding = sys.stdout.encoding
    sys.stdin = open(0, encoding=encoding, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding=encoding, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", 1, encoding=encoding, errors="backslashreplace", closefd=False)  # noqa: SIM115
    # Where it dies is read from the environment when the module is imported.
    importlib.reload(importlib.import_module("blockferry.common.disk"))
    raise SystemExit(run())


def _fork(own: int) -> int | None:
    """The process id of a child that nobody here is the parent of; None in the child."""
    reading, writing = os.pipe()
    between = os.fork()
    if between == 0:
        child = os.fork()
        if child:
            os.write(writing, str(child).encode())
            os._exit(0)
        for fd in (reading, writing, own):
            os.close(fd)
        return None
    os.close(writing)
    pid = int(os.read(reading, 64))
    os.close(reading)
    os.waitpid(between, 0)
    return pid


def main() -> None:
    """Serve until the tests are gone."""
    own = socket.socket(fileno=int(sys.argv[1]))
    run = _main_of(sys.argv[2])
    while True:
        data, descriptors, _, _ = socket.recv_fds(own, _MOST_BYTES, 3)
        if not data:
            return
        request = json.loads(data)
        pid = _fork(own.fileno())
        if pid is None:
            own.detach()
            _become(request, descriptors, run)
        for fd in descriptors:
            os.close(fd)
        own.send(str(pid).encode())


if __name__ == "__main__":
    main()
