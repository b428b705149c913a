"""Real NBD servers for tests: nbdkit, qemu-nbd and qemu-storage-daemon in processes of their own, ended by process id
only."""

from __future__ import annotations

import contextlib
import itertools
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_numbers = itertools.count(1)
START_SECONDS = 20


@dataclass
class Served:
    """A server at work. `uri` names its default export."""

    uri: str
    process: subprocess.Popen[bytes]
    log: Path
    """What nbdkit's log filter writes, where it was asked for."""

    def logged(self) -> str:
        """The log as it is."""
        return self.log.read_text()

    def operations(self) -> list[str]:
        """Requests as nbdkit got them: `Read offset=0x0 count=0x1000`, in order of arrival, whatever the connection."""
        lines = self.logged().splitlines()
        found = (re.fullmatch(r"\S+ \S+ connection=\d+ (\w+) id=\d+ ?(.*?) ?\.\.\.", line) for line in lines)
        return [f"{one[1]} {one[2]}".strip() for one in found if one]

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """It does nothing, as on a host that hangs: its connections stay."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            # The signal is on its way to each thread; one of them may still answer.
            while not all(
                thread.read_text().rpartition(")")[2].split()[0] == "T"
                for thread in Path(f"/proc/{self.process.pid}/task").glob("*/stat")
            ):
                time.sleep(0.001)
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL, as a crash."""
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def _running(words: Sequence[str], ready: Path, uri: str, log: Path) -> Iterator[Served]:
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    try:
        end = time.monotonic() + START_SECONDS
        # The process id is written when the server listens.
        while not (ready.exists() and ready.read_text().endswith("\n")):
            assert process.poll() is None and time.monotonic() < end, f"{words} did not start"
            time.sleep(0.005)
        yield Served(uri, process, log)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        process.stderr.close()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def nbdkit(
    directory: Path, *words: object, filters: Sequence[str] = (), tcp: bool = False, scheme: str = "nbd"
) -> contextlib.AbstractContextManager[Served]:
    """nbdkit with options, a plugin and parameters; the log filter is in front of `filters`."""
    number = next(_numbers)
    ready, log = directory / f"nbdkit-{number}.pid", directory / f"nbdkit-{number}.log"
    where, uri = _where(directory, number, tcp, scheme)
    command = ["nbdkit", "--foreground", "--exit-with-parent", f"--pidfile={ready}"]
    command += [f"--port={where}", "--ipaddr=127.0.0.1"] if tcp else [f"--unix={where}"]
    command += [f"--filter={name}" for name in ("log", *filters)]
    return _running([*command, *map(str, words), f"logfile={log}"], ready, uri, log)


def qemu_nbd(
    directory: Path, *words: object, tcp: bool = False, scheme: str = "nbd"
) -> contextlib.AbstractContextManager[Served]:
    """qemu-nbd with options and an image."""
    number = next(_numbers)
    ready = directory / f"qemu-nbd-{number}.pid"
    where, uri = _where(directory, number, tcp, scheme)
    command = ["qemu-nbd", "--persistent", "--shared=8", f"--pid-file={ready}"]
    command += [f"--port={where}", "--bind=127.0.0.1"] if tcp else [f"--socket={where}"]
    return _running([*command, *map(str, words)], ready, uri, directory / "none")


def storage_daemon(
    directory: Path, image: Path, *, writable: bool = False
) -> contextlib.AbstractContextManager[Served]:
    """qemu-storage-daemon with a qcow2 image, as it runs beside virtual machines. The export is called `disk`."""
    number = next(_numbers)
    ready, path = directory / f"daemon-{number}.pid", directory / f"nbd-{number}.sock"
    writes = "on" if writable else "off"
    command = ["qemu-storage-daemon", "--pidfile", str(ready)]
    command += ["--blockdev", f"driver=file,node-name=file,filename={image},discard=unmap"]
    command += ["--blockdev", "driver=qcow2,node-name=disk,file=file,discard=unmap"]
    command += ["--nbd-server", f"addr.type=unix,addr.path={path}"]
    command += ["--export", f"type=nbd,id=export,node-name=disk,name=disk,writable={writes}"]
    return _running(command, ready, f"nbd+unix:///disk?socket={path}", directory / "none")


def _where(directory: Path, number: int, tcp: bool, scheme: str) -> tuple[str, str]:
    if tcp:
        port = _free_port()
        return str(port), f"{scheme}://127.0.0.1:{port}/"
    path = directory / f"nbd-{number}.sock"
    return str(path), f"{scheme}+unix:///?socket={path}"


def qemu_img(*words: object) -> str:
    """qemu-img, which must succeed; what it printed."""
    done = subprocess.run(["qemu-img", *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def qemu_io(image: Path, *commands: str) -> None:
    """Change a qcow2 image."""
    words = [word for command in commands for word in ("-c", command)]
    done = subprocess.run(["qemu-io", "-f", "qcow2", *words, str(image)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "failed" not in done.stdout, done.stdout + done.stderr


def nbdcopy(image: Path, uri: str) -> None:
    """Fill an export with a raw image of its size."""
    done = subprocess.run(["nbdcopy", str(image), uri], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def certificates(directory: Path) -> Path:
    """A directory as qemu and nbdkit want it: an authority, a server on this machine and a client."""
    directory.mkdir()

    def openssl(*words: object) -> None:
        subprocess.run(["openssl", *map(str, words)], check=True, capture_output=True, cwd=directory)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl("req", "-x509", *key, "-keyout", "ca-key.pem", "-out", "ca-cert.pem", "-days", 2, "-subj", "/CN=tests")
    for name, extensions in (
        ("server", "subjectAltName=DNS:localhost,IP:127.0.0.1\nextendedKeyUsage=serverAuth"),
        ("client", "extendedKeyUsage=clientAuth"),
    ):
        (directory / "extensions").write_text(f"basicConstraints=CA:FALSE\n{extensions}\n")
        openssl("req", "-new", *key, "-keyout", f"{name}-key.pem", "-out", "request", "-subj", f"/CN={name}")
        openssl(
            *("x509", "-req", "-in", "request", "-CA", "ca-cert.pem", "-CAkey", "ca-key.pem", "-CAcreateserial"),
            *("-days", 2, "-extfile", "extensions", "-out", f"{name}-cert.pem"),
        )
    return directory
