"""Object stores: whole objects under short keys, in a bucket or a directory.

Three layers, each an `ObjectStore`: what talks to the store and tries once (`remote.py`, `directory.py`), what tries
again (`retry.py`), and whoever wraps one to count or, in tests, to break it. An object never changes after `put_new`:
everything the archive must not lose is written that way.
"""

from __future__ import annotations

import abc
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from urllib.parse import unquote, urlsplit

from blockferry.common.digests import Data
from blockferry.common.errors import BlockferryError, Code

SCHEMES = ("s3", "gs", "az", "file")

_KEY = re.compile(r"[A-Za-z0-9._-]{1,255}(/[A-Za-z0-9._-]{1,255})*", re.ASCII)
_PREFIX = re.compile(r"[A-Za-z0-9._ =+@-]+(/[A-Za-z0-9._ =+@-]+)*", re.ASCII)


class Exists(BlockferryError):  # noqa: N818 what it says is that
    """A key that should be new has an object already: somebody else was quicker, or it is ours from before."""


class Missing(BlockferryError):  # noqa: N818 what it says is that
    """There is no such object."""


class Transient(BlockferryError):  # noqa: N818 what it says is that
    """The store did not answer, or said that it cannot now. What was asked for may have happened all the same."""


@dataclass(frozen=True)
class Entry:
    """An object as listed: its key, its size in bytes, and when the store says it was written."""

    key: str
    size: int
    modified: datetime


@dataclass(frozen=True)
class Access:
    """How archives are reached and read. `options` are the store's (`--store-option KEY=VALUE`); of the two files at
    most one is set, and only an encrypted archive needs one. Neither's content is ever kept here."""

    options: Mapping[str, str] = field(default_factory=dict)
    key_file: Path | None = None
    passphrase_file: Path | None = None
    insecure: bool = False
    """Allows plaintext to other machines."""


class ObjectStore(abc.ABC):
    """Objects by key. A key has parts of letters, digits, dots, dashes and underscores, with `/` between them.

    Every method may raise BlockferryError, which names the store and the key. Nothing outside of the store's own prefix
    is ever read, listed, written or deleted.
    """

    uri: str
    """As people write it, without anything secret."""
    conditional: bool = True
    """`put_new` is decided by the store, for all writers. Without it two at the same time may both believe they made
    the object."""
    notice: str = ""
    """What people should know before they rely on it; empty for nothing."""

    @abc.abstractmethod
    async def put_new(self, key: str, parts: Sequence[Data]) -> None:
        """Make an object of `parts`, one after the other, durably. Raises Exists where there is one, even of the same
        bytes; whoever asks again after an answer that was lost gets no Exists for his own object (`Retrying`)."""

    @abc.abstractmethod
    async def put(self, key: str, data: Data) -> None:
        """Make an object, or replace it, durably."""

    @abc.abstractmethod
    async def get(self, key: str) -> bytes:
        """All bytes of an object. Raises Missing."""

    @abc.abstractmethod
    async def get_range(self, key: str, offset: int, length: int) -> bytes:
        """Exactly `length` bytes, at least one, from `offset`. Raises Missing, and DATA_MISMATCH for an object that
        ends before that."""

    @abc.abstractmethod
    def entries(self, prefix: str, *, after: str = "") -> AsyncIterator[Entry]:
        """The objects whose key begins with `prefix`, which is empty or ends with `/`, in the order of their keys; only
        those behind the key `after` if it is given."""

    async def list(self, prefix: str, *, after: str = "") -> Sequence[str]:
        """The keys of `entries`."""
        return [entry.key async for entry in self.entries(prefix, after=after)]

    @abc.abstractmethod
    async def delete(self, key: str) -> None:
        """Remove an object, which may be gone already."""

    async def close(self) -> None:
        """Let go of what is open."""
        return

    async def __aenter__(self) -> ObjectStore:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()


def check_key(key: str) -> str:
    """Return `key`, or raise INVALID_ARGUMENT: nothing else reaches a store, so nothing outside of its prefix does."""
    if _KEY.fullmatch(key) is None or any(part in (".", "..") or part.startswith(".") for part in key.split("/")):
        raise BlockferryError(
            Code.INVALID_ARGUMENT,
            f"{key!r} is not a usable key",
            next="report this: keys are made by blockferry itself",
        )
    return key


def check_prefix(prefix: str) -> str:
    """Return `prefix`, or raise INVALID_ARGUMENT unless it is empty or a key with `/` behind it."""
    if prefix:
        check_key(prefix.removesuffix("/"))
        if not prefix.endswith("/"):
            raise BlockferryError(Code.INVALID_ARGUMENT, f"{prefix!r} is not a prefix", next="report this")
    return prefix


def missing(uri: str, key: str) -> Missing:
    """The error for an object that is not there."""
    return Missing(
        Code.NOT_FOUND,
        f"{uri} has no object {key}",
        next="check the name of the store; if it is right, an object of the archive was lost or deleted",
    )


def exists(uri: str, key: str) -> Exists:
    """The error for a key that is taken."""
    return Exists(Code.EXISTS, f"{uri} has an object {key} already", next="run it again; a new name is chosen")


def too_short(uri: str, key: str, offset: int, length: int, found: int) -> BlockferryError:
    """The error for an object that ends too early: its missing bytes are never taken for zeros."""
    return BlockferryError(
        Code.DATA_MISMATCH,
        f"{uri}: object {key} is cut off",
        cause=f"bytes {offset} to {offset + length} were asked for and {found} bytes came",
        next="restore the object from a copy of the store, or use another snapshot",
    )


# --- by name ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where a store is: `s3://BUCKET/PREFIX`, `gs://…`, `az://CONTAINER/PREFIX` or `file:///DIRECTORY`."""

    scheme: str
    bucket: str
    """Empty for a directory."""
    prefix: str
    """Without slashes at its ends; the absolute path of a directory."""

    @property
    def uri(self) -> str:
        """The way it is always written."""
        if self.scheme == "file":
            return f"file://{self.prefix}"
        return f"{self.scheme}://{self.bucket}" + (f"/{self.prefix}" if self.prefix else "")

    @classmethod
    def parse(cls, uri: str) -> Place:
        """Raises INVALID_ARGUMENT."""
        if any(character < " " or character == "\x7f" for character in uri):
            raise _bad_uri(uri, "it has a control character")
        try:
            parts = urlsplit(uri)
            odd = bool(parts.port or parts.username or parts.query or parts.fragment)
        except ValueError as error:
            raise _bad_uri(uri, str(error)) from error
        if parts.scheme not in SCHEMES:
            raise _bad_uri(uri, f"{parts.scheme or 'no'} scheme")
        if odd:
            raise _bad_uri(uri, "it has a part that stores do not have; an endpoint is an option of its own")
        path = unquote(parts.path)
        if parts.scheme == "file":
            if parts.netloc not in ("", "localhost") or not path.startswith("/") or "\0" in path:
                raise _bad_uri(uri, "a directory is written file:///DIRECTORY")
            return cls("file", "", path.rstrip("/") or "/")
        prefix = path.strip("/")
        if not parts.netloc:
            raise _bad_uri(uri, "it names no bucket")
        if prefix and (_PREFIX.fullmatch(prefix) is None or {".", "..", ""} & set(prefix.split("/"))):
            raise _bad_uri(uri, "a prefix has letters, digits and . _ - = + @ between its slashes")
        return cls(parts.scheme, parts.netloc, prefix)


def is_store_uri(uri: str) -> bool:
    """Whether `uri` names a store, or something in one, rather than a local file."""
    return uri.split(":", 1)[0] in SCHEMES and "://" in uri


def _bad_uri(uri: str, cause: str) -> BlockferryError:
    return BlockferryError(
        Code.INVALID_ARGUMENT,
        f"{uri!r} is not a usable store",
        cause=cause,
        next="write s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, az://CONTAINER/PREFIX or file:///DIRECTORY",
    )


@dataclass(frozen=True)
class SnapshotName:
    """`STORE#NAME[@NUMBER]`: an archived snapshot; `number` 0 for the newest one, `name` empty for the whole store."""

    store: str
    name: str
    number: int

    @classmethod
    def parse(cls, uri: str) -> SnapshotName:
        """Raises INVALID_ARGUMENT."""
        from blockferry.common.address import check_volume_name

        store, mark, rest = uri.rpartition("#")
        if not mark:
            return cls(uri, "", 0)
        name, at, digits = rest.partition("@")
        if at and not (digits.isascii() and digits.isdigit() and len(digits) < 19 and int(digits) > 0):
            raise BlockferryError(
                Code.INVALID_ARGUMENT,
                f"{uri!r} is not a usable snapshot",
                cause="after @ comes the number of a snapshot, 1 or more",
                next="write STORE#NAME@NUMBER; blockferry archive list STORE names them",
            )
        return cls(store, check_volume_name(name), int(digits) if at else 0)


async def open_store(uri: str, access: Access | None = None) -> ObjectStore:
    """Open a store by its URI. Raises INVALID_ARGUMENT (URI or option), NOT_FOUND (a directory that is not there), and
    PERMISSION where no credentials were given. Nothing is asked of a remote store yet."""
    place = Place.parse(uri)
    access = access or Access()
    if place.scheme == "file":
        from blockferry.common.archive.directory import DirectoryStore

        if access.options:
            raise BlockferryError(Code.INVALID_ARGUMENT, f"{place.uri} has no options", next="leave --store-option out")
        return await DirectoryStore.open(Path(place.prefix))
    # obstore takes a tenth of a second to import: only where it is used.
    from blockferry.common.archive.remote import RemoteStore
    from blockferry.common.archive.retry import Retrying

    return Retrying(RemoteStore.open(place, access))
