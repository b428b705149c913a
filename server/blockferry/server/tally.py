"""What a replica has done since its server started: plain numbers, which metrics.py shows."""

from __future__ import annotations

from dataclasses import dataclass

from blockferry.server.apply import Result


@dataclass
class Tally:
    """Counts, and bytes where nothing else is said. They only grow."""

    sessions: int = 0
    """Opened."""
    commits: int = 0
    """Generations that sessions have committed."""
    commit_seconds: float = 0.0
    """Which those took, from the request to the durable record."""
    written: int = 0
    unmapped: int = 0
    """That held data before."""
    read_for_digests: int = 0
    read_for_changes: int = 0
    """To leave equal bytes alone, and to check what was changed."""
    digests_known: int = 0
    """That were not read, because their digests were known: bytes avoided."""

    def add(self, change: Result) -> None:
        """One change was applied."""
        self.written += change.written
        self.unmapped += change.unmapped
        self.read_for_changes += change.read
