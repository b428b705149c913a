"""Every message that reaches the server may be anything: random bytes, damaged messages, and whole ones whose fields
are random, for every call, against a real process. It answers each within its time, stays up, keeps its memory, reports
no bug, and touches nothing outside its pool.

`make soak` does the same for longer.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from blockferry.v1 import replicas_pb2, replication_pb2
from google.protobuf import descriptor as descriptors
from google.protobuf import message_factory
from google.protobuf.message import DecodeError, Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.images import KIB, MIB
from tests.support import Server, tree, until

EXAMPLES = int(os.environ.get("BLOCKFERRY_FUZZ_EXAMPLES", "900"))
CALL_SECONDS = 20
"""Bound on a hang: a call that says nothing for so long."""
ANSWERS = 40
"""Of a stream that are looked at; whoever asks for much gets much."""
GROWTH = 192 * MIB
"""Bytes of resident memory that may come on top of what it has after a part of the examples. The largest message is
17 MiB, the server's budget 64 MiB."""

SERVICES = {
    "Replication": replication_pb2.DESCRIPTOR.services_by_name["Replication"],
    "Replicas": replicas_pb2.DESCRIPTOR.services_by_name["Replicas"],
}
METHODS = [method for service in SERVICES.values() for method in service.methods]
LIVE = "the open session"
"""Stands for a session that is open when the message is sent."""

NAMES = [
    "a",
    "b",
    "",
    ".",
    "..",
    "../outside",
    "/outside",
    "a/../../outside",
    "a\0",
    "a@1",
    "x" * 128,
    "x" * 129,
    ".seeds",
    "é",
]
NUMBERS = [
    0,
    1,
    2,
    4095,
    4096,
    64 * KIB,
    MIB,
    2 * MIB,
    16 * MIB,
    1 << 31,
    (1 << 32) - 1,
    1 << 32,
    1 << 40,
    (1 << 63) - 1,
    (1 << 64) - 1,
]
CHUNKS = [b"", bytes(16), bytes(32), bytes(range(32)), bytes(4096), b"\xff" * 4096, bytes(64 * KIB)]


def fields_of(kind: Any) -> st.SearchStrategy[Any]:
    """Values for one field, or for one element of it."""
    if kind.type in (kind.TYPE_UINT64, kind.TYPE_UINT32, kind.TYPE_INT64):
        top = {kind.TYPE_UINT64: 1 << 64, kind.TYPE_UINT32: 1 << 32, kind.TYPE_INT64: 1 << 63}[kind.type]
        return st.sampled_from([one for one in NUMBERS if one < top]) | st.integers(0, top - 1)
    if kind.type == kind.TYPE_BOOL:
        return st.booleans()
    if kind.type == kind.TYPE_STRING:
        return st.just("a") | st.just("a") | st.sampled_from(NAMES) | st.text(max_size=20)
    if kind.type == kind.TYPE_BYTES:
        return st.sampled_from(CHUNKS) | st.binary(max_size=200)
    if kind.type == kind.TYPE_ENUM:
        return st.integers(0, 9)
    return messages_of(kind.message_type)


def messages_of(descriptor: Any) -> st.SearchStrategy[Message]:
    """Messages of a type with some of their fields, those that are there random."""
    make = message_factory.GetMessageClass(descriptor)
    if descriptor.name == "SessionRef":
        return st.builds(make, session_id=st.just(LIVE)) | st.builds(make, session_id=st.text(max_size=5))
    fields = {
        field.name: st.lists(fields_of(field), max_size=3) if field.is_repeated else fields_of(field)
        for field in descriptor.fields
    }
    return st.fixed_dictionaries({}, optional=fields).map(lambda found: make(**found))


def damaged(data: bytes, at: int, what: int) -> bytes:
    """One byte changed, or everything behind it cut off."""
    at %= len(data) + 1
    return data[:at] + (bytes([what]) + data[at + 1 :] if what else b"")


def requests_of(method: Any) -> st.SearchStrategy[tuple[Any, list[Message | bytes]]]:
    whole = messages_of(method.input_type)
    broken = st.builds(
        lambda one, at, what: damaged(one.SerializeToString(), at, what),
        whole,
        st.integers(0, 1 << 16),
        st.integers(0, 255),
    )
    one = whole | whole | broken | st.binary(max_size=100)
    many = st.lists(one, min_size=1, max_size=3 if method.client_streaming else 1)
    return many.map(lambda found: (method, found))


def with_live_session(message: Message, ref: Any) -> None:
    """Name the open session where the message stands for it."""
    for field, value in message.ListFields():
        if field.type != field.TYPE_MESSAGE:
            continue
        for one in value if field.is_repeated else [value]:
            if one.DESCRIPTOR.name == "SessionRef" and one.session_id == LIVE:
                one.CopyFrom(ref)
            else:
                with_live_session(one, ref)


class Client:
    """Sends bytes over a UNIX socket, and keeps a session open."""

    def __init__(self, server: Server) -> None:
        self._channel = grpc.insecure_channel(server.address.replace("grpc+unix://", "unix:"), options=[
            ("grpc.max_send_message_length", 64 * MIB), ("grpc.max_receive_message_length", 64 * MIB),
        ])  # fmt: skip
        self.ref = replication_pb2.SessionRef()
        self.statuses: dict[str, int] = {}

    def close(self) -> None:
        self._channel.close()

    def open(self) -> None:
        """Open a session; promotions and deletions of random requests are undone first."""
        for path, request in (
            ("Replicas/DemoteReplica", replicas_pb2.DemoteReplicaRequest(volume="a", confirm="a")),
            (
                "Replication/OpenSession",
                replication_pb2.OpenSessionRequest(
                    protocol_version=1,
                    volume="a",
                    size=2 * MIB + 1,
                    region_size=64 * KIB,
                    client="fuzz",
                    resume_session_id=self.ref.session_id,
                    grow=True,
                ),
            ),
        ):
            call: Any = self._channel.unary_unary(f"/blockferry.v1.{path}")
            try:
                answer = call(request.SerializeToString(), timeout=CALL_SECONDS)
            except grpc.RpcError:
                continue
            if path.endswith("OpenSession"):
                self.ref = replication_pb2.OpenSessionResponse.FromString(answer).session

    def send(self, method: Any, requests: list[Message | bytes]) -> str:
        """Make a call; the name of its status."""
        data = []
        for one in requests:
            if isinstance(one, Message):
                with_live_session(one, self.ref)
            data.append(one if isinstance(one, bytes) else one.SerializeToString())
        kind = ("stream" if method.client_streaming else "unary") + "_stream"
        multi: Any = getattr(self._channel, kind)(f"/{method.containing_service.full_name}/{method.name}")
        call = multi(iter(data) if method.client_streaming else data[0], timeout=CALL_SECONDS)
        began = time.monotonic()
        answers, said = 0, ""
        try:
            for _ in call:
                answers += 1
                if answers == ANSWERS:
                    call.cancel()
                    break
            status = "OK"
        except grpc.RpcError as error:
            status, said = error.code().name, str(error)
        assert not (status == "DEADLINE_EXCEEDED" and not answers), f"{method.name} hangs"
        assert status not in ("UNAVAILABLE", "UNKNOWN", "INTERNAL"), f"{method.name}: {said}"
        assert time.monotonic() - began < CALL_SECONDS + 5
        self.statuses[status] = self.statuses.get(status, 0) + 1
        return status


@pytest.fixture
def fuzzed(tmp_path: Path) -> Iterator[Server]:
    pool = tmp_path / "site" / "pool"
    pool.mkdir(parents=True)
    for name in ("outside", "site/outside"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious").write_text("mine")
    (pool / ".seeds").mkdir()
    (pool / ".seeds" / "a").write_bytes(bytes(2 * MIB + 1))
    (pool / ".seeds" / "link").symlink_to(tmp_path / "outside" / "precious")
    server = Server(
        pool, listen=f"grpc+unix://{tmp_path}/s.sock", flags=("--lease", "0.1", "--reserve", "0", "--quota", "256M")
    )
    yield server.start()
    server.stop()


CHANGES = re.compile(r'\b(\w+)\((?:AT_FDCWD(?:<[^>]*>)?, |\d+(?:<([^>]*)>)?, )?"([^"]*)"(.*)')
"""Of strace: a call, the directory that is open if it names one, the first path it names, and the rest."""


def strangers(trace: str, allowed: Callable[[str], bool]) -> list[str]:
    """Calls that change, or make, something that is not `allowed`."""
    found = []
    for line in trace.splitlines():
        match = CHANGES.search(line)
        if match is None:
            continue
        # As shutil.rmtree does it: a name in a directory that is open.
        name, path, rest = match[1], os.path.join(match[2] or "", match[3]), match[4]
        opens = name in ("open", "openat", "openat2")
        if (not opens or re.search(r"O_(CREAT|WRONLY|RDWR|TRUNC)", rest)) and not allowed(path):
            found.append(line)
    return found


def resident(pid: int) -> int:
    """Bytes of memory a process has."""
    return int(re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[1]) * KIB  # type: ignore[index]


def test_whatever_arrives(fuzzed: Server, tmp_path: Path) -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    trace = tmp_path / "trace"
    tracer = subprocess.Popen(
        ["strace", "-f", "-y", "-qq", "-s", "4096", "-o", trace, "-p", str(fuzzed.pid), "-e",
         "trace=open,openat,openat2,creat,mkdir,mkdirat,unlink,unlinkat,rmdir,rename,renameat,renameat2,link,linkat,"
         "symlink,symlinkat,truncate,chmod,fchmodat,chown,mknod,mknodat"],
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    until(lambda: "TracerPid:\t0" not in Path(f"/proc/{fuzzed.pid}/status").read_text(), "it is traced")
    around = {name: content for name, content in tree(tmp_path).items() if "outside" in name}
    client = Client(fuzzed)
    client.open()
    ends = {"OpenSession", "CommitSessions", "AbortSession", "PromoteReplica", "DeleteReplica", "AdoptReplica"}
    done, settled = 0, 0

    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(METHODS).flatmap(requests_of))
    def fuzz(one: tuple[Any, list[Message | bytes]]) -> None:
        nonlocal done, settled
        method, requests = one
        client.send(method, requests)
        if method.name in ends:
            client.open()
        done += 1
        if done == EXAMPLES // 3:
            settled = resident(fuzzed.pid)

    try:
        fuzz()
        assert done >= EXAMPLES and settled
        assert resident(fuzzed.pid) < settled + GROWTH
        # Many were understood, and many were not.
        # About 4 % and 80 % of a run; far below that it would have lost its way.
        assert client.statuses["OK"] >= EXAMPLES // 60, client.statuses
        assert client.statuses["INVALID_ARGUMENT"] >= EXAMPLES // 12, client.statuses
        log = fuzzed.log.read_text()
        assert '"bug"' not in log and "Traceback" not in log
    finally:
        client.close()
        tracer.terminate()
        tracer.wait()
    assert {name: content for name, content in tree(tmp_path).items() if "outside" in name} == around
    pool = str(fuzzed.pool)
    seen = trace.read_text()
    assert f'"{pool}/a/' in seen
    assert strangers(seen, lambda path: path.startswith(f"{pool}/") and "/../" not in path) == []
    assert fuzzed.stop() == 0


def test_the_trace_is_read_well() -> None:
    """The check above would notice."""
    lines = [
        '12 openat(AT_FDCWD, "/pool/a/x", O_WRONLY|O_CREAT|O_CLOEXEC, 0600) = 3',
        '12 openat(AT_FDCWD, "/etc/passwd", O_RDONLY|O_CLOEXEC) = 3',
        '12 openat(AT_FDCWD, "/etc/passwd", O_RDWR|O_CLOEXEC) = 3',
        '12 rename("/pool/a/x", "/pool/a/y") = 0',
        '12 unlink("/outside") = 0',
        '12 unlinkat(23</pool/.deleted>, "image.raw", 0) = 0',
        '12 unlinkat(23</etc>, "passwd", 0) = 0',
        '12 unlinkat(23, "passwd", 0) = 0',
    ]
    found = strangers("\n".join(lines), lambda path: path.startswith("/pool/"))
    assert found == [lines[2], lines[4], *lines[6:]]


def test_messages_are_damaged() -> None:
    assert damaged(b"abc", 1, 0) == b"a"
    assert damaged(b"abc", 1, 120) == b"axc"
    assert damaged(b"", 5, 120) == b"x"
    assert isinstance(METHODS[0], descriptors.MethodDescriptor)
    with pytest.raises(DecodeError):
        replicas_pb2.GetReplicaRequest.FromString(b"\x0a\x05a")
