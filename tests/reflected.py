"""A gRPC client that knows nothing of blockferry: it asks the server what it serves and builds its messages from that.

This is what a client in any language can do with server reflection alone. Nothing here imports blockferry.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.rpc import error_details_pb2, status_pb2
from grpc_reflection.v1alpha import reflection_pb2

from tests.images import MIB
from tests.support import Server

_REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
_DETAILS_KEY = "grpc-status-details-bin"
SECONDS = 30
ENDLESS = ("HoldPoint",)
"""Calls whose answers end with the server alone."""

PACKAGE = "blockferry.v1"
SIZE = 2 * MIB + 100
"""Bytes of the volumes that are driven by hand: two regions and a short one."""


@dataclass(frozen=True)
class Refusal:
    """How a call failed: the status, and the ErrorInfo in its details."""

    status: grpc.StatusCode
    message: str
    reason: str
    domain: str
    fields: dict[str, str]


class Reflected:
    """Calls any method of any service the server describes."""

    def __init__(self, target: str, credentials: grpc.ChannelCredentials | None = None) -> None:
        self._channel = (
            grpc.insecure_channel(target) if credentials is None else grpc.secure_channel(target, credentials)
        )
        self._pool = descriptor_pool.DescriptorPool()
        self._known: set[str] = set()
        self.services = self._list()
        for service in self.services:
            self._learn(reflection_pb2.ServerReflectionRequest(file_containing_symbol=service))

    def close(self) -> None:
        """Close the channel."""
        self._channel.close()

    def _ask(self, request: Any) -> Any:
        call: Any = self._channel.stream_stream(
            _REFLECTION,
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        (answer,) = list(call(iter([request]), timeout=SECONDS))
        assert not answer.HasField("error_response"), answer.error_response
        return answer

    def _list(self) -> list[str]:
        answer = self._ask(reflection_pb2.ServerReflectionRequest(list_services=""))
        return sorted(service.name for service in answer.list_services_response.service)

    def _learn(self, request: Any) -> None:
        for data in self._ask(request).file_descriptor_response.file_descriptor_proto:
            file = descriptor_pb2.FileDescriptorProto.FromString(data)
            if file.name in self._known:
                continue
            self._known.add(file.name)
            for needed in file.dependency:
                if needed not in self._known:
                    self._learn(reflection_pb2.ServerReflectionRequest(file_by_filename=needed))
            self._pool.Add(file)

    def message(self, name: str, **fields: Any) -> Any:
        """A message of the reflected type with this full name; keyword arguments as for generated classes."""
        return message_factory.GetMessageClass(self._pool.FindMessageTypeByName(name))(**fields)

    def methods(self, service: str) -> list[str]:
        """Names of the methods of a service, in the order of its definition."""
        return [method.name for method in self._pool.FindServiceByName(service).methods]

    def call(self, path: str, *requests: dict[str, Any]) -> list[Any]:
        """Call `package.Service/Method` with one request, or with all of them where it takes a stream, and return
        every answer, or the first one of a call that is `ENDLESS`. Raises grpc.RpcError."""
        service, _, name = path.partition("/")
        method = self._pool.FindServiceByName(service).FindMethodByName(name)
        request_class = message_factory.GetMessageClass(method.input_type)
        messages = [request_class(**fields) for fields in requests]
        kind = ("stream" if method.client_streaming else "unary") + ("_stream" if method.server_streaming else "_unary")
        multi = getattr(self._channel, kind)(
            f"/{path}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=message_factory.GetMessageClass(method.output_type).FromString,
        )
        argument: Any = _each(messages) if method.client_streaming else messages[0]
        answer = multi(argument, timeout=SECONDS)
        if name in ENDLESS:
            first = next(answer)
            answer.cancel()
            return [first]
        return list(answer) if method.server_streaming else [answer]

    def stream_refusal(self, path: str, requests: Iterable[dict[str, Any]]) -> Refusal:
        """The failure of a call that takes a stream, whose requests are made while it runs."""
        service, _, name = path.partition("/")
        method = self._pool.FindServiceByName(service).FindMethodByName(name)
        request_class = message_factory.GetMessageClass(method.input_type)
        multi: Any = self._channel.stream_stream(
            f"/{path}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=message_factory.GetMessageClass(method.output_type).FromString,
        )
        try:
            answers = list(multi((request_class(**fields) for fields in requests), timeout=SECONDS))
        except grpc.RpcError as error:
            return _refusal(error)
        raise AssertionError(f"{path} was not refused: {answers}")

    def refusal(self, path: str, *requests: dict[str, Any]) -> Refusal:
        """The failure of a call that must fail."""
        try:
            answers = self.call(path, *requests)
        except grpc.RpcError as error:
            return _refusal(error)
        raise AssertionError(f"{path} was not refused: {answers}")


def _each(messages: Iterable[Any]) -> Iterator[Any]:
    yield from messages


def _refusal(error: Any) -> Refusal:
    (packed,) = [value for key, value in error.trailing_metadata() or () if key == _DETAILS_KEY]
    status = status_pb2.Status.FromString(packed if isinstance(packed, bytes) else packed.encode())
    info = error_details_pb2.ErrorInfo()
    (detail,) = status.details
    assert detail.Unpack(info)
    assert status.code == error.code().value[0]
    assert status.message == error.details()
    return Refusal(error.code(), status.message, info.reason, info.domain, dict(info.metadata))


@dataclass
class Driven:
    """A replica driven by the generic client; `session` is the open one's reference, as fields."""

    client: Reflected
    server: Server
    volume: str
    session: dict[str, Any]
    opened: Any

    def replication(self, method: str, *requests: dict[str, Any]) -> list[Any]:
        """Call a method of Replication."""
        return self.client.call(f"{PACKAGE}.Replication/{method}", *requests)

    def replicas(self, method: str, **fields: Any) -> list[Any]:
        """Call a method of Replicas."""
        return self.client.call(f"{PACKAGE}.Replicas/{method}", fields)

    def write(self, offset: int, data: bytes, at: int = 0, length: int = MIB) -> Any:
        """WriteRegion of one extent; its result."""
        fields = {"offset": offset, "length": length, "writes": [{"offset": at, "length": len(data)}], "data": data}
        (answer,) = self.replication("WriteRegion", {"session": self.session, **fields})
        return answer.result

    def commit(self) -> Any:
        """Commit the session; what was committed."""
        request = {"session": self.session, "volume": self.volume, "commit_id": secrets.token_bytes(16)}
        (answer,) = self.replication("CommitSessions", {"commits": [request]})
        (committed,) = answer.commits
        assert committed.commit_id == request["commit_id"]
        return committed

    def read(self, offset: int = 0, length: int = SIZE) -> bytes:
        """The committed bytes of a range, by ReadRegions."""
        ranges = [{"offset": offset, "length": length}]
        found = b""
        for part in self.replicas("ReadRegions", point={"volume": self.volume}, ranges=ranges):
            assert part.offset == offset + len(found)
            found += bytes(part.zeros) if part.zeros else part.data
        return found

    def map(self, target: dict[str, Any]) -> tuple[Any, list[tuple[int, int]]]:
        """Header and (first, count) runs of the allocation map."""
        answers = self.replication("GetAllocationMap", target)
        return answers[0].header, [(run.first, run.count) for answer in answers for run in answer.allocated]


def open_session(client: Reflected, server: Server, volume: str, size: int = SIZE, **fields: Any) -> Driven:
    """Take a replica."""
    request = {"protocol_version": 1, "volume": volume, "size": size, "client": "generic", **fields}
    (opened,) = client.call(f"{PACKAGE}.Replication/OpenSession", request)
    session = {"session_id": opened.session.session_id, "epoch": opened.session.epoch}
    return Driven(client, server, volume, session, opened)
