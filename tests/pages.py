"""What a status page says, as numbers."""

from __future__ import annotations

import socket
import urllib.request

Samples = dict[str, float]
"""By name with labels, as the page writes them."""


def free_port() -> int:
    """A port that nobody has, for programs that must be told one."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def scraped(url: str) -> Samples:
    """Every sample of ours on a page of metrics."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    samples = (line.rpartition(" ") for line in lines if line.startswith("blockferry_"))
    return {name: float(value) for name, _, value in samples}


def grown(before: Samples, after: Samples) -> Samples:
    """What has changed, but for what measures time."""
    return {
        name: value - before.get(name, 0)
        for name, value in after.items()
        if value != before.get(name, 0) and "seconds" not in name and "_created" not in name
    }
