"""What systemd is told, and that nothing happens where nobody asked."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from blockferry.common import notify


@pytest.mark.parametrize("abstract", [False, True])
def test_what_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool) -> None:
    name = f"@blockferry-test-{tmp_path.name}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(name.replace("@", "\0", 1))
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        notify.ready()
        notify.stopping()
        notify.reloading()
        assert [listener.recv(100) for _ in range(2)] == [b"READY=1", b"STOPPING=1"]
        first, second = listener.recv(100).split(b"\n")
        assert first == b"RELOADING=1"
        assert second.startswith(b"MONOTONIC_USEC=") and int(second.partition(b"=")[2]) > 0


def test_nobody_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nothing"))
    notify.ready()
    monkeypatch.delenv("NOTIFY_SOCKET")
    notify.ready()
