"""gRPC at both ends: serving descriptors, dialling addresses, and errors that keep their fields on the way.

Handlers and calls are made from the service descriptors of `protos/`, so that every service is served, called, metered
and has its errors translated in this one place.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeVar, cast

import grpc
import grpc.aio
from blockferry.common.address import Address
from blockferry.common.errors import BlockferryError, Code, from_os_error
from blockferry.common.regions import MAX_REGION_SIZE
from blockferry.common.settings import Tls
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

if TYPE_CHECKING:
    from blockferry.common.credentials import Credentials
    from blockferry.common.tls import Material

M = TypeVar("M", bound=Message)

MAX_MESSAGE = MAX_REGION_SIZE + 1024 * 1024
"""Bytes: one whole region of the largest size and its envelope."""

_DOMAIN = "blockferry"
_DETAILS_KEY = "grpc-status-details-bin"

KEEPALIVE_SECONDS = 10
"""A peer that vanished without closing is noticed after twice this. Both sides must agree, or the server answers
`too_many_pings`."""

PING_SECONDS = 30
"""While data is under way a ping queues up behind it, and this is how long it may take. A shorter time would cut off
slow lines: at 256 kbit/s the kernel's buffer takes 20 s to empty."""

WINDOW = 4 * 1024 * 1024
"""Bytes of a stream that may be on their way to a receiver who does not read on. Left to itself gRPC measures the
bandwidth and lets this grow to tens of MiB, which pass by every bound of ours."""

_COMMON_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_send_message_length", MAX_MESSAGE),
    ("grpc.max_receive_message_length", MAX_MESSAGE),
    ("grpc.keepalive_time_ms", KEEPALIVE_SECONDS * 1000),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_SECONDS * 1000),
    ("grpc.http2.ping_timeout_ms", PING_SECONDS * 1000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", WINDOW),
    # The largest there is: a message of data is then one frame instead of 256. See docs/performance.md.
    ("grpc.http2.max_frame_size", (1 << 24) - 1),
]
_SERVER_OPTIONS = [
    *_COMMON_OPTIONS,
    # Otherwise a second server binds the same port silently and gets half of the calls.
    ("grpc.so_reuseport", 0),
    # Otherwise a client that waits for a disk to go on is cut off for its pings within a minute.
    ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_SECONDS * 500),
    ("grpc.keepalive_permit_without_calls", 1),
]
_BOUNDS = ("grpc.max_receive_message_length", "grpc.max_allowed_incoming_connections", "grpc.max_concurrent_streams")
"""What an administrator may bound."""

_CLIENT_OPTIONS = [*_COMMON_OPTIONS, ("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]

_STATUS = {
    Code.USAGE: grpc.StatusCode.INVALID_ARGUMENT,
    Code.INVALID_ARGUMENT: grpc.StatusCode.INVALID_ARGUMENT,
    Code.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    Code.EXISTS: grpc.StatusCode.ALREADY_EXISTS,
    Code.UNREADABLE: grpc.StatusCode.PERMISSION_DENIED,
    Code.PERMISSION: grpc.StatusCode.PERMISSION_DENIED,
    Code.TLS: grpc.StatusCode.UNAUTHENTICATED,
    Code.UNSUPPORTED: grpc.StatusCode.FAILED_PRECONDITION,
    Code.SIZE_MISMATCH: grpc.StatusCode.FAILED_PRECONDITION,
    Code.REGION_SIZE_MISMATCH: grpc.StatusCode.FAILED_PRECONDITION,
    Code.IN_USE: grpc.StatusCode.FAILED_PRECONDITION,
    Code.STALE_EPOCH: grpc.StatusCode.FAILED_PRECONDITION,
    Code.WRONG_STATE: grpc.StatusCode.FAILED_PRECONDITION,
    Code.OUT_OF_SPACE: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Code.LIMITED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Code.READ_ONLY: grpc.StatusCode.FAILED_PRECONDITION,
    Code.IO_ERROR: grpc.StatusCode.DATA_LOSS,
    Code.SOURCE_CHANGED: grpc.StatusCode.ABORTED,
    Code.DATA_MISMATCH: grpc.StatusCode.DATA_LOSS,
    Code.CORRUPT_STATE: grpc.StatusCode.DATA_LOSS,
    Code.HOOK: grpc.StatusCode.ABORTED,
    Code.UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    Code.PROTOCOL: grpc.StatusCode.INVALID_ARGUMENT,
    Code.INTERNAL: grpc.StatusCode.INTERNAL,
}


def message_class(descriptor: Any) -> type[Message]:
    """The generated class of a message descriptor."""
    module = importlib.import_module(descriptor.file.name.removesuffix(".proto").replace("/", ".") + "_pb2")
    return cast(type[Message], getattr(module, descriptor.name))


# --- errors -----------------------------------------------------------------------------------------------------


def to_status(error: BlockferryError | OSError) -> status_pb2.Status:
    """Pack an error into google.rpc.Status with one ErrorInfo."""
    if isinstance(error, OSError):
        error = from_os_error(error, "the call failed")
    info = error_details_pb2.ErrorInfo(reason=error.code.name, domain=_DOMAIN)
    for name, value in error.fields().items():
        if value is not None and name != "code":
            info.metadata[name] = _utf8(str(value))
    status = status_pb2.Status(code=_STATUS[error.code].value[0], message=_utf8(error.line()))
    status.details.add().Pack(info)
    return status


def _utf8(text: str) -> str:
    """Paths may hold bytes that are no UTF-8; protobuf strings may not."""
    return text.encode("utf-8", "backslashreplace").decode()


def from_rpc_error(error: grpc.aio.AioRpcError, address: str, program: str = "blockferry-server") -> BlockferryError:
    """The error the server meant; or, where it never answered, what happened to the connection."""
    answered = False
    for key, value in error.trailing_metadata() or ():
        if key == _DETAILS_KEY:
            answered = True
            found = from_status(value if isinstance(value, bytes) else value.encode())
            if found is not None:
                return found
    details = error.details() or error.code().name
    code = error.code()
    if code is grpc.StatusCode.INTERNAL and not answered:
        # What gRPC makes of a peer that died in the middle of a message, or of a write on a stream that has just ended;
        # a server of ours sends details with INTERNAL.
        code = grpc.StatusCode.UNAVAILABLE
    match code:
        case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.CANCELLED | grpc.StatusCode.UNKNOWN:
            lost = "failed to connect" not in details.lower()
            return BlockferryError(
                Code.UNAVAILABLE,
                f"lost the connection to {address}" if lost else f"cannot reach {address}",
                cause="the server went away" if lost else "no server answers there",
                next=f"check that {program} runs there, then run this again",
            )
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            # gRPC's own words: a message that is larger than the receiver takes, or no room for another call.
            return BlockferryError(
                Code.LIMITED,
                f"{address} refuses a call",
                cause=details,
                next="use a smaller --region-size, or raise limits.message_size in the server's configuration",
            )
        case grpc.StatusCode.UNIMPLEMENTED:
            return BlockferryError(
                Code.PROTOCOL, f"{address} does not know this call", cause=details, next="update the server"
            )
        case _:
            return BlockferryError(Code.INTERNAL, f"{address} failed", cause=details, next="look at the server's log")


def from_status(data: bytes) -> BlockferryError | None:
    """Unpack what `to_status` packed, or None where it is something else."""
    try:
        status = status_pb2.Status.FromString(data)
        infos = [_error_info(detail) for detail in status.details]
    except DecodeError:
        return None
    for info in infos:
        if info.domain == _DOMAIN and info.reason in Code.__members__:
            fields = info.metadata
            return BlockferryError(
                Code[info.reason],
                fields.get("message", status.message),
                cause=fields.get("cause", ""),
                next=fields.get("next", ""),
                volume=fields.get("volume"),
                offset=_number(fields.get("offset")),
                length=_number(fields.get("length")),
                expected=fields.get("expected"),
                found=fields.get("found"),
            )
    return None


def _error_info(detail: Any) -> error_details_pb2.ErrorInfo:
    info = error_details_pb2.ErrorInfo()
    detail.Unpack(info)
    return info


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isascii() and text.isdigit() else None


# --- serving ----------------------------------------------------------------------------------------------------


def _log() -> Any:
    # Imported here because it takes a fifth of a second, and a command line that only calls never logs.
    import structlog

    return structlog.get_logger("blockferry.rpc")


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: BlockferryError) -> NoReturn:
    """End a call with an error and all its fields."""
    status = to_status(error)
    await context.abort(
        _STATUS[error.code], status.message, trailing_metadata=((_DETAILS_KEY, status.SerializeToString()),)
    )
    raise AssertionError


class Gatekeeper(Protocol):
    """Says who may do what."""

    def admit(self, method: str, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Callable[[], None]:
        """Let a call in, by its `Service/Method` and its request (of a stream: the first, None where there is none).
        What is returned says whether the call may still go on. Both raise PERMISSION or TLS, and have logged why."""


@dataclass
class Outcome:
    """How a call ended: `ok`, a code of ours, or `cancelled` where its client went away."""

    code: str = "cancelled"


Watch = Callable[[str], contextlib.AbstractContextManager[Outcome]]
"""Wraps every call; gets its name, `Service/Method`, and knows at the end how it came out."""


def unwatched(_: str) -> contextlib.AbstractContextManager[Outcome]:
    """Nobody wants to know."""
    return contextlib.nullcontext(Outcome())


def _guarded(
    method: MethodDescriptor,
    implementation: Callable[..., Any],
    gatekeeper: Gatekeeper,
    decode: Callable[[bytes], Any],
    watch: Watch,
) -> Callable[..., Any]:
    """Wrap a servicer method so that nothing runs that is not admitted, every failure leaves with its fields, and a bug
    with a line in the log. Requests are decoded here, because gRPC has no words for one that cannot be."""
    name = f"{method.containing_service.name}/{method.name}"

    async def failed(context: grpc.aio.ServicerContext[Any, Any], error: Exception, outcome: Outcome) -> None:
        if isinstance(error, OSError):
            error = from_os_error(error, f"{method.name} failed")
        if isinstance(error, DecodeError):
            error = BlockferryError(
                Code.PROTOCOL, f"{method.name} cannot be read", cause=str(error), next="use a client that works"
            )
        if not isinstance(error, BlockferryError):
            _log().error("bug", method=method.name, exc_info=error)
            error = BlockferryError(Code.INTERNAL, f"{method.name} failed", cause=repr(error), next="report this")
        if error.code not in (Code.PERMISSION, Code.TLS):
            fields = {key: value for key, value in error.fields().items() if value is not None}
            _log().info("refused", method=method.name, **fields)
        outcome.code = error.code.value
        await abort(context, error)

    if method.server_streaming:

        async def stream(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
            with watch(name) as outcome:
                try:
                    if method.client_streaming:
                        first = await anext(request, None)
                        first = first if first is None else decode(first)
                        still = gatekeeper.admit(name, first, context)
                        request = _admitted(first, request, still, decode)
                    else:
                        request = decode(request)
                        still = gatekeeper.admit(name, request, context)
                    async with contextlib.aclosing(implementation(request, context)) as responses:
                        async for response in responses:
                            still()
                            yield response
                    outcome.code = "ok"
                except grpc.aio.AbortError:
                    raise
                except Exception as error:
                    await failed(context, error, outcome)

        return stream

    async def unary(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        with watch(name) as outcome:
            try:
                request = decode(request)
                gatekeeper.admit(name, request, context)
                response = await implementation(request, context)
                outcome.code = "ok"
                return response
            except grpc.aio.AbortError:
                raise
            except Exception as error:
                await failed(context, error, outcome)

    return unary


async def _admitted(
    first: Any, others: AsyncIterator[bytes], still: Callable[[], None], decode: Callable[[bytes], Any]
) -> AsyncIterator[Any]:
    """The requests of a stream, while it may go on."""
    if first is None:
        return
    yield first
    async for request in others:
        still()
        yield decode(request)


def add_service(
    server: grpc.aio.Server,
    service: ServiceDescriptor,
    servicer: object,
    gatekeeper: Gatekeeper,
    *,
    raw: Collection[str] = (),
    watch: Watch = unwatched,
) -> None:
    """Serve every method of `service` by the method of `servicer` with the same name. Missing ones are
    UNIMPLEMENTED. Methods in `raw` get the bytes of their requests and parse them themselves."""
    handlers: dict[str, Any] = {}
    for method in service.methods:
        implementation = getattr(servicer, method.name, None)
        if implementation is None:
            continue
        kind = ("stream" if method.client_streaming else "unary") + ("_stream" if method.server_streaming else "_unary")
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        handlers[method.name] = make(
            _guarded(
                method,
                implementation,
                gatekeeper,
                bytes if method.name in raw else message_class(method.input_type).FromString,
                watch,
            ),
            request_deserializer=None,
            response_serializer=message_class(method.output_type).SerializeToString,
        )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))


Server = grpc.aio.Server


def make_server(
    *,
    interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
    message_size: int = MAX_MESSAGE,
    connections: int | None = None,
    streams: int | None = None,
) -> grpc.aio.Server:
    """A server with the options both sides agree on; nothing is bound yet. It takes messages of `message_size` bytes,
    so many `connections`, and so many `streams` on each (None: any number)."""
    bounds = zip(_BOUNDS, (message_size, connections, streams), strict=True)
    options = {**dict(_SERVER_OPTIONS), **{name: bound for name, bound in bounds if bound is not None}}
    return grpc.aio.server(interceptors=interceptors, options=list(options.items()))


def bind(server: grpc.aio.Server, uri: str, *, insecure: bool, credentials: Credentials | None = None) -> str:
    """Bind `uri` and return the address clients can use. Raises IN_USE, UNSUPPORTED, or TLS where a certificate is
    needed and there is none."""
    address = Address.parse(uri)
    _refuse_plaintext(address, insecure)
    try:
        if address.tls:
            port = server.add_secure_port(address.target, _server_credentials(address, credentials))
        else:
            port = server.add_insecure_port(address.target)
    except RuntimeError as error:
        raise BlockferryError(
            Code.IN_USE,
            f"cannot listen on {uri}",
            cause="the address is taken or is not one of this machine",
            next="choose another port or stop whatever uses it",
        ) from error
    if address.target.startswith("unix:"):
        return uri
    return f"{'grpcs' if address.tls else 'grpc'}://{address.target.rpartition(':')[0]}:{port}"


def _server_credentials(address: Address, credentials: Credentials | None) -> grpc.ServerCredentials:
    """Every handshake takes the files as they are then; nobody without a certificate comes in."""
    if credentials is None:
        raise _no_certificate(address)
    shown = credentials.material

    def current() -> grpc.ServerCertificateConfiguration | None:
        # gRPC asks from a thread of its own. None means what it has already.
        nonlocal shown
        if shown is credentials.material:
            return None
        shown = credentials.material
        return _configuration(shown)

    return grpc.dynamic_ssl_server_credentials(
        _configuration(shown), cast(Callable[[], grpc.ServerCertificateConfiguration], current), True
    )


def _configuration(material: Material) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(material.key, material.chain)], material.ca)


def _no_certificate(address: Address) -> BlockferryError:
    return BlockferryError(
        Code.TLS,
        f"cannot use {address.uri}",
        cause="no certificate of this side is named",
        next="name it with --tls-cert, --tls-key and --tls-ca",
    )


def _refuse_plaintext(address: Address, insecure: bool) -> None:
    if not address.tls and not address.loopback and not insecure:
        raise BlockferryError(
            Code.UNSUPPORTED,
            f"{address.uri} is not on this machine",
            cause="without TLS anybody on the way could read and change whole disks",
            next="use grpcs://, a loopback address, or --insecure on both sides if the network itself is trusted",
        )


# --- calling ----------------------------------------------------------------------------------------------------


def _material(address: Address, tls: Tls | None) -> Material:
    # Imported here because it takes a while, and most commands need none.
    from blockferry.common.tls import Material

    if tls is None:
        raise _no_certificate(address)
    return Material.load(tls)


class Connection:
    """A channel to one server that counts serialized bytes and raises BlockferryError."""

    def __init__(
        self, address: Address, *, insecure: bool = False, tls: Tls | None = None, program: str = "blockferry-server"
    ) -> None:
        """`program` is what should answer there. `tls` is used exactly where the address asks for TLS. Raises
        UNSUPPORTED for plaintext to another machine, and TLS where our own certificate cannot be used."""
        _refuse_plaintext(address, insecure)
        self.address = address
        self._program = program
        self.sent = 0
        self.received = 0
        self._answered = False
        self._material = _material(address, tls) if address.tls else None
        if self._material is None:
            self._channel = grpc.aio.insecure_channel(address.target, options=_CLIENT_OPTIONS)
        else:
            mine = self._material
            credentials = grpc.ssl_channel_credentials(mine.ca, mine.key, mine.chain)
            self._channel = grpc.aio.secure_channel(address.target, credentials, options=_CLIENT_OPTIONS)

    async def close(self) -> None:
        """Close the channel and cancel its calls."""
        await self._channel.close()

    def _serializer(self, message: Message) -> bytes:
        data = message.SerializeToString()
        self.sent += len(data)
        return data

    def _deserializer(self, kind: type[M]) -> Callable[[bytes], M]:
        def parse(data: bytes) -> M:
            self.received += len(data)
            self._answered = True
            return kind.FromString(data)

        return parse

    @contextlib.contextmanager
    def translated(self) -> Iterator[None]:
        """Turn gRPC's errors into ours."""
        try:
            yield
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, self.address.uri, self._program) from error

    @contextlib.asynccontextmanager
    async def _explained(self) -> AsyncIterator[None]:
        """As `translated`, and where the server has never said a word, why."""
        try:
            with self.translated():
                yield
        except BlockferryError as error:
            if error.code is not Code.UNAVAILABLE or self._answered:
                raise
            from blockferry.common.diagnosis import why_unreachable

            reason = await asyncio.to_thread(why_unreachable, self.address, self._material)
            raise reason or error from error

    async def call(self, method: str, request: Message, response: type[M]) -> M:
        """A unary call; `method` is `Service/Method`."""
        multi = self._channel.unary_unary(
            f"/blockferry.v1.{method}",
            request_serializer=self._serializer,
            response_deserializer=self._deserializer(response),
        )
        async with self._explained():
            return await cast(Awaitable[M], multi(request))

    async def stream(self, method: str, request: Message, response: type[M]) -> AsyncGenerator[M, None]:
        """A call that is answered by a stream."""
        multi = self._channel.unary_stream(
            f"/blockferry.v1.{method}",
            request_serializer=self._serializer,
            response_deserializer=self._deserializer(response),
        )
        call = multi(request)
        try:
            async with self._explained():
                async for message in call:
                    yield message
        finally:
            call.cancel()

    def _counted(self, data: bytes) -> bytes:
        self.sent += len(data)
        return data

    def bidirectional(self, method: str, response: type[M]) -> grpc.aio.StreamStreamCall[bytes, M]:
        """A call with streams both ways that sends messages already serialized. Use it inside `translated()`."""
        multi = self._channel.stream_stream(
            f"/blockferry.v1.{method}",
            request_serializer=self._counted,
            response_deserializer=self._deserializer(response),
        )
        return multi()
