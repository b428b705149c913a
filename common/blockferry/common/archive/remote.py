"""Stores of cloud providers and whatever speaks S3, through obstore. One request each: trying again is `retry.py`'s.

obstore says what went wrong by a class and a text. The classes tell objects that are missing or there already; all else
is told by the status and the error code of S3 in the text (Amazon S3 API Reference, "Error Responses").
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar
from urllib.parse import urlsplit

from blockferry.common.address import is_loopback
from blockferry.common.archive.store import (
    Access,
    Entry,
    Exists,
    Missing,
    ObjectStore,
    Place,
    Transient,
    check_key,
    check_prefix,
    exists,
    missing,
    too_short,
)
from blockferry.common.digests import Data
from blockferry.common.errors import BlockferryError, Code

T = TypeVar("T")

CONNECT_SECONDS = 10
REQUEST_SECONDS = 30.0
"""For the least request; a store that has not answered it by then will not."""
SLOWEST = 128 * 1024
"""Bytes per second that a request may fall to: 16 MiB may take two minutes more."""
LIST_PAGE = 1000
"""Keys of one answer (Amazon S3 API Reference, ListObjectsV2)."""

S3_OPTIONS = {
    "endpoint": "URL of a store that is not Amazon's (default $AWS_ENDPOINT_URL)",
    "region": "default $AWS_REGION, else us-east-1",
    "access_key_id": "default $AWS_ACCESS_KEY_ID",
    "secret_access_key_file": "a file that holds the secret key (default $AWS_SECRET_ACCESS_KEY)",
    "virtual_hosted": "yes: the bucket is part of the endpoint's host name",
    "conditional": "no: the store does not know If-None-Match",
    "anonymous": "yes: requests are not signed",
    "instance": "yes: credentials come from the machine's or container's provider",
    "ca_file": "authorities of the endpoint's certificate, PEM",
}
"""Every `--store-option` of s3://."""

_STATUS = re.compile(r"status code: (\d{3})|HTTP status (?:client|server) error \((\d{3})")
_REDIRECT = "Received redirect without LOCATION"
_S3_CODE = re.compile(r"<Code>([A-Za-z0-9]+)</Code>")
_TRANSIENT = {429, 500, 502, 503, 504}

_Meaning = tuple[frozenset[str], frozenset[int], Code, str, str]

_MEANINGS: tuple[_Meaning, ...] = (
    (
        frozenset({"NoSuchBucket"}), frozenset(),
        Code.NOT_FOUND, "{endpoint} has no bucket {bucket}",
        "make the bucket, or check its name, the endpoint and the region",
    ),
    (
        frozenset({"QuotaExceeded", "InsufficientStorage", "XMinioStorageFull"}), frozenset({507}),
        Code.OUT_OF_SPACE, "the store is full or its quota is used up ({said})",
        "free space or raise the quota, then run it again",
    ),
    (
        frozenset({"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"}), frozenset({401}),
        Code.PERMISSION, "{endpoint} does not accept the credentials ({said})",
        "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and that they are for this endpoint",
    ),
    (
        frozenset({"RequestTimeTooSkewed"}), frozenset(),
        Code.PERMISSION, "this machine's clock differs too much from the store's",
        "set the clock, then run it again",
    ),
    (
        frozenset({"PermanentRedirect", "TemporaryRedirect", "AuthorizationHeaderMalformed"}), frozenset({301, 307}),
        Code.INVALID_ARGUMENT, "the bucket is in another region or at another endpoint",
        "give its region (AWS_REGION) or endpoint (AWS_ENDPOINT_URL)",
    ),
    (
        frozenset({"AccessDenied"}), frozenset({403}),
        Code.PERMISSION, "the bucket {bucket} is somebody else's, or these credentials have no right to do this",
        "check the name of the bucket and the rights of the credentials",
    ),
)  # fmt: skip
"""What S3 says by a code or a status, the first that fits."""


class RemoteStore(ObjectStore):
    """A bucket, or what lies under a prefix of it. Open one with `RemoteStore.open`."""

    def __init__(self, place: Place, store: Any, *, conditional: bool, endpoint: str) -> None:
        self.uri = place.uri
        self.conditional = conditional
        self._bucket = place.bucket
        self._store = store
        self._endpoint = endpoint

    @classmethod
    def open(cls, place: Place, access: Access) -> RemoteStore:
        """Raises INVALID_ARGUMENT (an unknown option, plaintext to another machine) and PERMISSION (no credentials).
        Nothing is asked of the store."""
        if place.scheme == "s3":
            return cls._open_s3(place, access)
        return cls._open_other(place, access)

    @classmethod
    def _open_s3(cls, place: Place, access: Access) -> RemoteStore:
        from obstore.store import S3Store

        config: Any
        config, conditional = s3_config(place.uri, access, os.environ)
        endpoint = config.get("endpoint", "")
        client = _client_options()
        client["allow_http"] = endpoint.startswith("http://")
        if "root_certificate" in config:
            client["root_certificate"] = config.pop("root_certificate")
        try:
            store = S3Store(
                place.bucket,
                prefix=place.prefix or None,
                config=config,
                client_options=client,
                retry_config=_NO_RETRIES,
            )
        except Exception as error:
            raise _unusable(place.uri, _short(str(error))) from error
        return cls(place, store, conditional=conditional, endpoint=endpoint or "Amazon S3")

    @classmethod
    def _open_other(cls, place: Place, access: Access) -> RemoteStore:
        from obstore.store import AzureStore, GCSStore

        if access.options:
            raise _unusable(place.uri, "it takes no --store-option; credentials come from the environment")
        kind: Any = GCSStore if place.scheme == "gs" else AzureStore
        try:
            store = kind(
                place.bucket,
                prefix=place.prefix or None,
                client_options=_client_options(),
                retry_config=_NO_RETRIES,
            )
        except Exception as error:
            raise _unusable(place.uri, _short(str(error))) from error
        provider = "Google Cloud Storage" if place.scheme == "gs" else "Azure Blob Storage"
        found = cls(place, store, conditional=True, endpoint=provider)
        found.notice = f"{provider} has never been tried with this version; restore and verify what you archive there"
        return found

    # --- requests -----------------------------------------------------------------------------------------------------

    async def put_new(self, key: str, parts: Sequence[Data]) -> None:
        mode = "create" if self.conditional else "overwrite"
        if not self.conditional and await self._is_there(key):
            raise exists(self.uri, key)
        try:
            await self._put(key, parts, mode)
        except Exists:
            # 409 may also say that another request for the key is under way, and that one may still fail.
            if not await self._is_there(key):
                raise self._transient("write", key, "another request for it is under way") from None
            raise

    async def put(self, key: str, data: Data) -> None:
        await self._put(key, [data], "overwrite")

    async def _put(self, key: str, parts: Sequence[Data], mode: str) -> None:
        import obstore

        size = sum(len(part) for part in parts)
        # One buffer goes as it is; several would be joined there anyway.
        body: Any = parts[0] if len(parts) == 1 else b"".join(parts)
        await self._ask(
            "write",
            check_key(key),
            size,
            lambda: obstore.put_async(self._store, key, body, mode=mode, use_multipart=False),  # type: ignore[arg-type]
        )

    async def _is_there(self, key: str) -> bool:
        import obstore

        try:
            await self._ask("look for", check_key(key), 0, lambda: obstore.head_async(self._store, key))
        except Missing:
            return False
        return True

    async def get(self, key: str) -> bytes:
        import obstore

        async def fetch() -> bytes:
            found = await obstore.get_async(self._store, key)
            return bytes(await found.bytes_async())

        return await self._ask("read", check_key(key), 0, fetch)

    async def get_range(self, key: str, offset: int, length: int) -> bytes:
        import obstore

        found = await self._ask(
            "read",
            check_key(key),
            length,
            lambda: obstore.get_range_async(self._store, key, start=offset, length=length),
        )
        if len(found) != length:
            raise too_short(self.uri, key, offset, length, len(found))
        return bytes(found)

    async def entries(self, prefix: str, *, after: str = "") -> AsyncIterator[Entry]:
        import obstore

        pages = obstore.list(
            self._store, check_prefix(prefix).removesuffix("/") or None, offset=after or None, chunk_size=LIST_PAGE
        )
        while True:
            page = await self._ask("list", prefix, 0, lambda: _next(pages))
            if page is None:
                return
            for one in page:
                yield Entry(one["path"], one["size"], one["last_modified"])

    async def delete(self, key: str) -> None:
        import obstore

        try:
            await self._ask("delete", check_key(key), 0, lambda: obstore.delete_async(self._store, key))
        except Missing:
            return

    async def _ask(self, what: str, key: str, size: int, request: Callable[[], Awaitable[T]]) -> T:
        try:
            async with asyncio.timeout(REQUEST_SECONDS + size / SLOWEST):
                return await request()
        except TimeoutError as error:
            raise self._transient(what, key, "no answer in time") from error
        except BlockferryError:
            raise
        except Exception as error:
            raise self._told(what, key, error) from error

    # --- what an error means ------------------------------------------------------------------------------------------

    def _transient(self, what: str, key: str, cause: str) -> Transient:
        return Transient(
            Code.UNAVAILABLE,
            f"{self.uri}: cannot {what} {key or 'objects'}",
            cause=f"{self._endpoint}: {cause}",
            next="check that the endpoint is right and reachable, then run it again",
        )

    def _told(self, what: str, key: str, error: Exception) -> BlockferryError:
        text, kind = str(error), type(error).__name__
        code = found.group(1) if (found := _S3_CODE.search(text)) else ""
        status = int(found.group(1) or found.group(2)) if (found := _STATUS.search(text)) else 0
        if _REDIRECT in text:
            status = 301
        for codes, statuses, meaning, cause, next_step in _MEANINGS:
            if code in codes or status in statuses:
                cause = cause.format(endpoint=self._endpoint, bucket=self._bucket, said=code or status)
                return BlockferryError(
                    meaning, f"{self.uri}: cannot {what} {key or 'objects'}", cause=cause, next=next_step
                )
        if kind == "AlreadyExistsError":
            return exists(self.uri, key)
        if isinstance(error, FileNotFoundError):
            return missing(self.uri, key)
        if status in _TRANSIENT:
            return self._transient(what, key, f"it answers {status} {code}".strip())
        if status == 0 and not kind.startswith(("Permission", "Unauthenticated")):
            # No answer at all: a connection that was refused, cut or timed out.
            return self._transient(what, key, _short(text))
        return BlockferryError(
            Code.IO_ERROR,
            f"{self.uri}: cannot {what} {key or 'objects'}",
            cause=f"{self._endpoint} answers {status or kind} {code}".strip(),
            next="check that the endpoint is an object store of this kind",
        )


_NO_RETRIES: Any = {"max_retries": 0, "retry_timeout": timedelta(seconds=CONNECT_SECONDS)}


def _client_options() -> Any:
    # Deadlines of whole requests depend on their size, and are kept by `_ask`.
    return {"connect_timeout": timedelta(seconds=CONNECT_SECONDS), "timeout": timedelta(hours=1), "allow_http": False}


async def _next(pages: Any) -> Any:
    try:
        return await anext(pages)
    except StopAsyncIteration:
        return None


def _short(text: str) -> str:
    """What happened rather than where: the words that say it, or the beginning of the text."""
    for words in ("connection refused", "dns error", "timed out", "certificate", "connection closed", "reset"):
        if words in text.lower():
            return words
    return text.split("\n", 1)[0].strip()[:200]


def _unusable(uri: str, cause: str) -> BlockferryError:
    return BlockferryError(
        Code.INVALID_ARGUMENT, f"cannot open the store {uri}", cause=cause, next="see docs/archive.md for its options"
    )


def s3_config(uri: str, access: Access, environment: Mapping[str, str]) -> tuple[dict[str, Any], bool]:
    """What obstore is told of an S3 store, and whether the store knows conditional writes."""
    options = dict(access.options)
    if "secret_access_key" in options:
        raise _unusable(uri, "a secret on the command line is shown to everybody; use AWS_SECRET_ACCESS_KEY")
    unknown = sorted(set(options) - set(S3_OPTIONS))
    if unknown:
        raise _unusable(uri, f"it has no option {unknown[0]}; there are {', '.join(sorted(S3_OPTIONS))}")

    def told(option: str, *variables: str) -> str:
        return options.get(option) or next((environment[name] for name in variables if environment.get(name)), "")

    config: dict[str, Any] = {"region": told("region", "AWS_REGION", "AWS_DEFAULT_REGION") or "us-east-1"}
    endpoint = told("endpoint", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
    if endpoint:
        config["endpoint"] = _checked_endpoint(uri, endpoint, access.insecure)
    config["virtual_hosted_style_request"] = _switch(uri, "virtual_hosted", options, default=False)
    if _switch(uri, "anonymous", options, default=False):
        config["skip_signature"] = True
    elif not _switch(uri, "instance", options, default=False):
        key, secret = told("access_key_id", "AWS_ACCESS_KEY_ID"), environment.get("AWS_SECRET_ACCESS_KEY", "")
        if "secret_access_key_file" in options:
            secret = _read(uri, options["secret_access_key_file"]).decode("utf-8", "replace").strip()
        if not key or not secret:
            raise BlockferryError(
                Code.PERMISSION,
                f"cannot open the store {uri}",
                cause="there are no credentials",
                next="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or --store-option instance=yes or anonymous=yes",
            )
        config |= {"access_key_id": key, "secret_access_key": secret}
        if token := environment.get("AWS_SESSION_TOKEN"):
            config["session_token"] = token
    if "ca_file" in options:
        config["root_certificate"] = _read(uri, options["ca_file"])
    return config, _switch(uri, "conditional", options, default=True)


def _checked_endpoint(uri: str, endpoint: str, insecure: bool) -> str:
    try:
        parts = urlsplit(endpoint)
        host = parts.hostname
    except ValueError as error:
        raise _unusable(uri, f"the endpoint {endpoint!r} is no URL") from error
    if parts.scheme not in ("http", "https") or not host or parts.query or parts.username:
        raise _unusable(uri, f"the endpoint {endpoint!r} is not of the form https://HOST[:PORT]")
    if parts.scheme == "http" and not (is_loopback(host) or insecure):
        raise BlockferryError(
            Code.INVALID_ARGUMENT,
            f"cannot open the store {uri}",
            cause=f"the endpoint {endpoint} is not on this machine and has no TLS",
            next="write https://, or allow plaintext with --insecure",
        )
    return endpoint.rstrip("/")


def _switch(uri: str, name: str, options: Mapping[str, str], *, default: bool) -> bool:
    found = options.get(name)
    if found is None:
        return default
    if found not in ("yes", "no"):
        raise _unusable(uri, f"the option {name} is yes or no, not {found!r}")
    return found == "yes"


def _read(uri: str, path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(1 << 20)
    except OSError as error:
        raise _unusable(uri, f"cannot read {path}: {os.strerror(error.errno or 0).lower()}") from error
