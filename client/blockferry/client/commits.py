"""Commit ids at the source: minted here, and durable here before the destination is asked for the commit.

One small file per replica. If the answer to a commit is lost, the id tells the next run whether it happened.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import msgspec
from blockferry.common.durable import make_directories, write_atomic
from blockferry.common.errors import from_os_error

COMMIT_ID_SIZE = 16


def new_commit_id() -> str:
    """One that nobody else has, in hexadecimal."""
    return secrets.token_hex(COMMIT_ID_SIZE)


class CommitRecord(msgspec.Struct, frozen=True):
    """The last commit asked for. Hexadecimal ids; `confirmed` once the destination has said so. `newest_id` and
    `newest_generation` are the newest commit that is confirmed, this one or one before (empty and 0: none)."""

    replica_uuid: str
    volume: str
    source: str
    commit_id: str
    confirmed: bool = False
    newest_id: str = ""
    newest_generation: int = 0


def default_state_directory() -> Path:
    """`$XDG_STATE_HOME/blockferry`, by default `~/.local/state/blockferry`."""
    base = os.environ.get("XDG_STATE_HOME") or os.path.join(os.path.expanduser("~"), ".local", "state")
    return Path(base) / "blockferry"


class CommitLedger:
    """The source's memory of what it asked for, per replica."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory / "commits"

    def _path(self, replica_uuid: bytes) -> Path:
        return self._directory / f"{replica_uuid.hex()}.json"

    def mint(self, replica_uuid: bytes, volume: str, source: str, commit_id: str = "") -> CommitRecord:
        """A new commit id, durable when this returns; or one that was minted with its snapshot."""
        # A path may hold bytes that are no UTF-8; JSON may not.
        source = source.encode("utf-8", "backslashreplace").decode()
        record = CommitRecord(replica_uuid.hex(), volume, source, commit_id or new_commit_id())
        before = self.last(replica_uuid)
        if before is not None:
            record = msgspec.structs.replace(
                record, newest_id=before.newest_id, newest_generation=before.newest_generation
            )
        try:
            make_directories(self._directory)
            self._write(record)
        except OSError as error:
            raise from_os_error(error, f"cannot keep the commit id in {self._directory}", volume=volume) from error
        return record

    def confirm(self, record: CommitRecord, generation: int) -> None:
        """Note that the commit happened, and which generation it made."""
        self._write(
            msgspec.structs.replace(record, confirmed=True, newest_id=record.commit_id, newest_generation=generation)
        )

    def reconcile(self, replica_uuid: bytes, newest_commit_id: bytes, generation: int) -> str:
        """Compare what is known with the replica's newest commit, which made `generation`. Where the answer to the last
        commit was lost, learn that it happened; where the replica no longer has one that was confirmed, say so. Empty:
        nothing to say."""
        last = self.last(replica_uuid)
        if last is None or not newest_commit_id:
            # Without any generation it is being overwritten in place.
            return ""
        newest = newest_commit_id.hex()
        if newest == last.commit_id:
            if not last.confirmed:
                self.confirm(last, generation)
            return ""
        # A generation that is later than ours is another source's.
        if newest == last.newest_id or generation > last.newest_generation:
            return ""
        return (
            f"the replica was at generation {generation}, although generation {last.newest_generation} had been "
            "committed from here: it was restored from a backup or rolled back, and what was newer is lost"
        )

    def last(self, replica_uuid: bytes) -> CommitRecord | None:
        """The last commit asked for, or None where nothing usable is known."""
        try:
            return msgspec.json.decode(self._path(replica_uuid).read_bytes(), type=CommitRecord)
        except (OSError, UnicodeDecodeError, msgspec.MsgspecError):
            return None

    def _write(self, record: CommitRecord) -> None:
        write_atomic(self._path(bytes.fromhex(record.replica_uuid)), msgspec.json.encode(record))
