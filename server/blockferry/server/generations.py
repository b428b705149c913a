"""The log of a replica: what was committed, dropped, adopted, promoted. Everything else is derived from it. Blocking.

Invariant 3: one fsynced record is the commit.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec
from blockferry.common.durable import Log
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.retention import DEFAULT, Retention


@dataclass(frozen=True)
class Point:
    """A committed generation: number, commit id (16 bytes), size in bytes, time in microseconds since 1970."""

    number: int
    commit_id: bytes
    size: int
    committed_at_us: int


@dataclass(frozen=True)
class Promotion:
    """A recovery point that was handed out: its number, the identity of what was handed out, and when."""

    number: int
    commit_id: bytes
    at_us: int
    in_place: bool = False
    """No copy of it was: there are no other points, and nobody can say what it holds now."""


class Generations:
    """What the log says. Records are added one at a time, durably, or not at all."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            # A new one would forget every generation, and their images would be taken for work.
            raise corrupt(path, "it is missing")
        self._log = Log(path)
        self.points: list[Point] = []
        """Committed generations, oldest first."""
        self.last_number = 0
        self.committed_size: int | None = None
        """Bytes of the newest commit; None before the first."""
        self.adopted_size: int | None = None
        """Bytes of the image that was adopted before the first commit."""
        self.promoted: Promotion | None = None
        self.keep = DEFAULT
        """How the replica's source wants its recovery points kept."""
        try:
            for record in self._log.records:
                self._replay(record)
        except BaseException:
            self._log.close()
            raise

    def close(self) -> None:
        """Let go of the log; everything in it is durable."""
        self._log.close()

    # --- looking --------------------------------------------------------------------------------------------------

    @property
    def newest(self) -> Point | None:
        """The newest committed generation that still exists."""
        return self.points[-1] if self.points else None

    def point(self, number: int) -> Point | None:
        """The generation with this number; 0 means the newest."""
        if number == 0:
            return self.newest
        return next((point for point in self.points if point.number == number), None)

    def committed(self, commit_id: bytes) -> Point | None:
        """The generation a commit id became, even if retention has dropped it since."""
        for record in reversed(self._log.records):
            if record.get("kind") == "commit" and record.get("commit_id") == commit_id.hex():
                return _point_of(record)
        return None

    def was_committed(self, name: str) -> bool:
        """Whether `name`, by which some file goes, is a commit id that became a generation."""
        with contextlib.suppress(ValueError):
            return self.committed(bytes.fromhex(name)) is not None
        return False

    def next(self, commit_id: bytes, size: int) -> Point:
        """The point that a commit now would make."""
        return Point(self.last_number + 1, commit_id, size, _now_us())

    # --- adding ---------------------------------------------------------------------------------------------------

    def commit(self, point: Point, *, demotes: bool) -> None:
        """`point` is the newest generation from here on; with `demotes` the replica is not promoted any more."""
        record: dict[str, object] = {
            "kind": "commit",
            "number": point.number,
            "commit_id": point.commit_id.hex(),
            "size": point.size,
            "at_us": point.committed_at_us,
        }
        if demotes:
            record["demotes"] = True
        self._append(record)

    def drop(self, point: Point) -> None:
        """`point` is given up."""
        self._append({"kind": "drop", "number": point.number})

    def set_keep(self, keep: Retention) -> None:
        """Remember how the source wants its points kept."""
        if keep != self.keep:
            self._append({"kind": "keep", "rules": msgspec.to_builtins(keep)})

    def adopt(self, size: int) -> None:
        """What the first sync starts from is an image of this size that was there before."""
        self._append({"kind": "adopt", "size": size})

    def rewind(self, point: Point) -> None:
        """All generations newer than `point` are given up."""
        self._append({"kind": "rewind", "number": point.number})

    def promote(self, promotion: Promotion) -> None:
        """From here on the replica is promoted."""
        record: dict[str, object] = {
            "kind": "promote",
            "number": promotion.number,
            "commit_id": promotion.commit_id.hex(),
            "at_us": promotion.at_us,
        }
        if promotion.in_place:
            record["in_place"] = True
        self._append(record)

    def _append(self, record: dict[str, object]) -> None:
        self._log.append(record)
        self._replay(record)

    # --- replaying ------------------------------------------------------------------------------------------------

    def _replay(self, record: dict[str, object]) -> None:
        match record:
            case {"kind": "commit"} if (point := _point_of(record)) is not None:
                if self.promoted is not None and self.promoted.in_place:
                    # What the one that was handed out held is what this one began with, and nowhere else.
                    self.points = []
                self.points.append(point)
                self.last_number, self.committed_size = point.number, point.size
                if record.get("demotes"):
                    self.promoted = None
            # "overwrite" was written by updates in place, before there was a journal.
            case {"kind": "drop" | "overwrite", "number": int(number)}:
                self.points = [point for point in self.points if point.number != number]
            case {"kind": "keep", "rules": dict(rules)}:
                with contextlib.suppress(msgspec.ValidationError):
                    self.keep = msgspec.convert(rules, Retention)
                    return
                raise self._unknown(record)
            case {"kind": "adopt", "size": int(size)}:
                self.adopted_size = size
            case {"kind": "promote"} if (promotion := _promotion_of(record)) is not None:
                self.promoted = promotion
                if promotion.in_place:
                    self.points = [point for point in self.points if point.number == promotion.number]
            case {"kind": "rewind", "number": int(number)} if self.point(number) is not None:
                self.points = [point for point in self.points if point.number <= number]
                self.committed_size = self.points[-1].size
            case _:
                raise self._unknown(record)

    def _unknown(self, record: dict[str, object]) -> BlockferryError:
        return corrupt(self._log.path, f"unknown record {record!r}")


def _point_of(record: dict[str, object]) -> Point | None:
    match record:
        case {"number": int(number), "commit_id": str(commit_id), "size": int(size), "at_us": int(at_us)}:
            with contextlib.suppress(ValueError):
                return Point(number, bytes.fromhex(commit_id), size, at_us)
    return None


def _promotion_of(record: dict[str, object]) -> Promotion | None:
    match record:
        case {"number": int(number), "commit_id": str(commit_id), "at_us": int(at_us)}:
            with contextlib.suppress(ValueError):
                return Promotion(number, bytes.fromhex(commit_id), at_us, record.get("in_place") is True)
    return None


def _now_us() -> int:
    return time.time_ns() // 1000


def corrupt(path: Path, cause: str) -> BlockferryError:
    """Something in a replica's directory that cannot be believed."""
    return BlockferryError(
        Code.CORRUPT_STATE,
        f"{path} is damaged",
        cause=cause,
        next="restore it from a backup of the pool, or delete the replica and sync it anew",
    )
