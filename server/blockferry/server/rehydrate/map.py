"""The hydration map: for which blocks the primary holds the truth, and what of that is durable.

    hydrated   what is read from the primary, as of now: whoever has made a block so calls `mark`
    durable    what a process that starts after a crash may believe

A commit (invariant 5: data before the metadata that vouches for it) captures what was marked up to then, has the
primary flushed, and only then records what it has captured. What is marked meanwhile waits for the next one.

On disk it is a log of common/durable.py: a header that binds it to one primary and one snapshot, a base with the whole
map, and a record of run lengths for each commit. When the records outgrow the base they are folded into a new one.
Beside it lies the seal, which says how many bytes of the log have been durable: the last record of a log may be torn,
but only if nobody was told of it. The seal is not flushed, so that a commit costs one flush here; after a power failure
it may say less than it could, never more.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import os
import secrets
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
from blake3 import blake3
from blockferry.common import disk
from blockferry.common.durable import Log
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.regions import BLOCK_SIZE, Run, runs_of
from pyroaring import BitMap

FORMAT = 1
"""A newer program reads older maps; an older one does not start on a newer map, and changes nothing."""

NAME = "hydration.map"
SEAL = "hydration.seal"

MOST_BLOCKS = 1 << 32
"""Block numbers are 32-bit: 16 TiB."""

FOLD_BYTES = 1024 * 1024
"""Records may grow to this, or to the size of the base if that is larger, before they are folded into it: a map is
written at most about twice."""

MOST_RUNS = 64 * 1024
"""Runs of one record, about 1 MiB; a commit of more writes a new base instead."""

_SEAL_SIZE = 128
_WRONG = "restore it from the same moment as the primary, or begin anew with an empty primary and an empty --state"


class Binding(msgspec.Struct, frozen=True):
    """What a map is about: the primary (what stays the same whatever it is called today), and the snapshot it is filled
    from. Size in bytes, the time in microseconds since 1970."""

    primary: str
    size: int
    snapshot_id: str
    uri: str
    created_at_us: int

    @property
    def blocks(self) -> int:
        """Number of blocks; the last may be short."""
        return -(-self.size // BLOCK_SIZE)


class HydrationMap:
    """One map, open. `create` and `open` block, and so does `commit`; all else is for the event loop."""

    def __init__(self, directory: Path, log: Log, seal: int, binding: Binding, durable: BitMap, base: int) -> None:
        self.directory = directory
        self.binding = binding
        self.blocks = binding.blocks
        self._log = log
        self._seal = seal
        self._name = str(log.records[0]["log"])
        self._base = base
        """Bytes of header and base."""
        self._durable = durable
        self._hydrated = durable.copy()
        self._pending = BitMap()

    # --- opening ----------------------------------------------------------------------------------------------------

    @classmethod
    def create(cls, directory: Path, binding: Binding, hydrated: BitMap | None = None) -> HydrationMap:
        """A new map in a directory that has none: nothing is hydrated, or what is said. Raises UNSUPPORTED where the
        volume is too large, and OSError."""
        if binding.blocks > MOST_BLOCKS:
            raise BlockferryError(
                Code.UNSUPPORTED,
                f"a volume of {binding.size} bytes cannot be rehydrated",
                cause=f"at most {MOST_BLOCKS * BLOCK_SIZE} bytes are possible",
                next="restore it instead",
            )
        durable = BitMap() if hydrated is None else hydrated.copy()
        log = Log.create(directory / NAME, _base_of(binding, durable))
        return cls._opened(directory, log, binding, durable, log.size)

    @classmethod
    def open(cls, directory: Path) -> HydrationMap:
        """The map of a directory. Raises CORRUPT_STATE where anything about it is wrong, UNSUPPORTED where a newer
        program made it, and OSError. A damaged map is never taken for one with less in it."""
        path = directory / NAME
        base, durably = _known_to_be_durable(directory)
        # Whoever made it may have died before its name was durable; the primary is about to get its own.
        disk.fsync_directory(directory)
        try:
            log = Log(path, at_least=durably)
        except BlockferryError as error:
            raise _corrupt(path, error.cause) from error
        try:
            binding, durable = _read(path, log.records)
            return cls._opened(directory, log, binding, durable, base)
        except BaseException:
            log.close()
            raise

    @classmethod
    def _opened(cls, directory: Path, log: Log, binding: Binding, durable: BitMap, base: int) -> HydrationMap:
        found = cls(directory, log, disk.create(directory / SEAL), binding, durable, base)
        # Whatever is in a log that could be opened is durable.
        found._put_seal()
        log.records.clear()
        return found

    @staticmethod
    def exists(directory: Path) -> bool:
        """Whether a directory has a map, whatever state it is in."""
        return (directory / NAME).exists()

    def close(self) -> None:
        """Let go of the files, once. What was not committed is lost, as in a crash."""
        self._log.close()
        seal, self._seal = self._seal, -1
        if seal >= 0:
            os.close(seal)

    # --- what is hydrated -------------------------------------------------------------------------------------------

    def is_hydrated(self, first: int, stop: int) -> bool:
        """Whether all of the blocks are."""
        return self._hydrated.contains_range(first, stop)

    def missing(self, first: int, stop: int) -> list[Run]:
        """Runs of blocks that are not hydrated, ascending."""
        if self._hydrated.contains_range(first, stop):
            return []
        gaps = BitMap()
        gaps.add_range(first, stop)
        gaps -= self._hydrated
        return list(runs_of(gaps, stop, first))

    def mark(self, first: int, stop: int) -> None:
        """The primary holds the truth for these blocks: all of it has been written."""
        if not self._hydrated.contains_range(first, stop):
            new = BitMap()
            new.add_range(first, stop)
            new -= self._hydrated
            self._pending |= new
            self._hydrated |= new

    @property
    def complete(self) -> bool:
        """Everything is hydrated, though perhaps not durably."""
        return len(self._hydrated) == self.blocks

    @property
    def settled(self) -> bool:
        """All that is hydrated is so durably."""
        return not self._pending

    def bytes_hydrated(self, of: BitMap | None = None) -> int:
        """Bytes of blocks (of some of them) that are hydrated."""
        return self.bytes_in(self._hydrated if of is None else of & self._hydrated)

    def bytes_in(self, blocks: BitMap) -> int:
        """Bytes of blocks; the last one of the volume may be short."""
        short = self.blocks * BLOCK_SIZE - self.binding.size if self.blocks - 1 in blocks else 0
        return len(blocks) * BLOCK_SIZE - short

    def hydrated(self) -> BitMap:
        """A copy."""
        return self._hydrated.copy()

    # --- commits ----------------------------------------------------------------------------------------------------

    def capture(self) -> BitMap:
        """What was marked and not captured yet. It goes to `commit` once the primary is flushed, or to `give_back`."""
        captured, self._pending = self._pending, BitMap()
        return captured

    def give_back(self, captured: BitMap) -> None:
        """The commit has failed, and the primary holds everything all the same."""
        self._pending |= captured

    def commit(self, captured: BitMap) -> None:
        """Record durably what was captured before the primary was flushed. Blocking, and never twice at once. After an
        OSError nothing is recorded."""
        if not captured:
            return
        runs = list(runs_of(captured, captured.max() + 1, captured.min()))
        if len(runs) > MOST_RUNS:
            self._fold(captured)
        else:
            self._log.append({"hydrated": [number for run in runs for number in run]})
            self._log.records.clear()
        self._durable |= captured
        self._put_seal()
        if self._log.size > self._base + max(FOLD_BYTES, self._base):
            # It is recorded already: where there is no room for a new base the log grows on.
            with contextlib.suppress(OSError):
                self._fold(BitMap())
                self._put_seal()

    def _fold(self, captured: BitMap) -> None:
        records = _base_of(self.binding, self._durable | captured)
        self._log.replace(records)
        self._log.records.clear()
        self._name, self._base = str(records[0]["log"]), self._log.size

    def _put_seal(self) -> None:
        body = msgspec.json.encode({"log": self._name, "durable": self._log.size})
        line = b"%08x %s" % (zlib.crc32(body), body)
        # Whoever cannot write it has committed all the same.
        with contextlib.suppress(OSError):
            disk.pwrite(self._seal, line.ljust(_SEAL_SIZE), 0)


# --- records (pure, but for the names in errors) ----------------------------------------------------------------------


def _base_of(binding: Binding, durable: BitMap) -> list[dict[str, object]]:
    """Header and base. Each has a name of its own, so that a seal is not taken for that of another one."""
    header = {"format": FORMAT, "log": secrets.token_hex(8), **msgspec.structs.asdict(binding)}
    durable.run_optimize()
    data = durable.serialize()
    return [header, {"base": base64.b64encode(data).decode(), "digest": blake3(data).hexdigest()}]


def _read(path: Path, records: list[dict[str, object]]) -> tuple[Binding, BitMap]:
    if len(records) < 2:
        raise _corrupt(path, "it ends before its first commit")
    header, base, *commits = records
    if header.get("format") != FORMAT:
        raise BlockferryError(
            Code.UNSUPPORTED,
            f"{path} cannot be read",
            cause=f"its format is {header.get('format')!r}, and this program knows {FORMAT}",
            next="use the version of blockferry-rehydrate that made it; nothing was changed",
        )
    try:
        binding = msgspec.convert(header, Binding)
    except msgspec.ValidationError as error:
        raise _corrupt(path, str(error)) from error
    found = _deserialized(base)
    if found is None or (found and found.max() >= binding.blocks):
        raise _corrupt(path, "its base is not what was written")
    for record in commits:
        for first, stop in _runs_in(path, record, binding.blocks):
            found.add_range(first, stop)
    return binding, found


def _deserialized(base: dict[str, object]) -> BitMap | None:
    try:
        data = base64.b64decode(str(base.get("base", "")), validate=True)
    except binascii.Error:
        return None
    # Only what is certainly ours is parsed.
    return BitMap.deserialize(data) if blake3(data).hexdigest() == base.get("digest") else None


def _runs_in(path: Path, record: dict[str, Any], blocks: int) -> Iterable[Run]:
    numbers = record.get("hydrated")
    if not isinstance(numbers, list) or len(numbers) % 2 or not all(type(one) is int for one in numbers):
        raise _corrupt(path, "a record of it is none")
    end = 0
    for first, count in zip(numbers[::2], numbers[1::2], strict=True):
        if count < 1 or first < end or first + count > blocks:
            raise _corrupt(path, f"a record names blocks {first} to {first + count} of {blocks}")
        end = first + count
        yield first, end


def _known_to_be_durable(directory: Path) -> tuple[int, int]:
    """Bytes of the log that are its base, which appeared as a whole, and those that were durable once: these, or what
    the seal says."""
    data = (directory / NAME).read_bytes()
    base = data.find(b"\n", data.find(b"\n") + 1) + 1
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, msgspec.MsgspecError):
        line = (directory / SEAL).read_bytes().rstrip()
        if line[:9] == b"%08x " % zlib.crc32(line[9:]):
            seal = msgspec.json.decode(line[9:])
            header = msgspec.json.decode(data[9 : data.find(b"\n")])
            if header["log"] == seal["log"]:
                return base, max(base, int(seal["durable"]))
    return base, base


def _corrupt(path: Path, cause: str) -> BlockferryError:
    return BlockferryError(Code.CORRUPT_STATE, f"{path} is damaged", cause=cause, next=_WRONG)
