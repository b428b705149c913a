"""Tells systemd what a service is up to (sd_notify(3)); does nothing where nobody asked."""

from __future__ import annotations

import contextlib
import os
import socket
import time


def notify(*lines: str) -> None:
    """Send lines such as `READY=1` to whoever `NOTIFY_SOCKET` names."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return
    # A name that begins with @ is in the abstract namespace (unix(7)).
    address = f"\0{path[1:]}" if path.startswith("@") else path
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.sendto("\n".join(lines).encode(), address)


def ready() -> None:
    """It serves, or has taken up its configuration again."""
    notify("READY=1")


def reloading() -> None:
    """It takes up its configuration; `ready` follows."""
    notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")


def stopping() -> None:
    """It is about to end."""
    notify("STOPPING=1")
