"""A client without manners: calls a server's services directly, so that tests can do what `blockferry` never would."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import grpc
from blockferry.v1 import replicas_pb2 as replicas
from blockferry.v1 import replication_pb2 as pb
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

M = TypeVar("M", bound=Message)

REGION = 64 * 1024
"""The region size of replicas made here, in bytes: many regions in small images."""

TIMEOUT = 60
"""Seconds after which a call that should have been answered fails the test."""


class Refused(Exception):
    """The server said no: gRPC's status code, our reason and the sentence for people."""

    def __init__(self, status: grpc.StatusCode, reason: str, line: str) -> None:
        super().__init__(f"{status.name} {reason}: {line}")
        self.status = status
        self.reason = reason
        self.line = line


def refusal(error: Any) -> Refused:
    """What an error of gRPC says."""
    reason = ""
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            status = status_pb2.Status.FromString(value)
            info = error_details_pb2.ErrorInfo()
            assert len(status.details) == 1 and status.details[0].Unpack(info) and info.domain == "blockferry"
            reason = info.reason
    return Refused(error.code(), reason, error.details() or "")


class Raw:
    """One connection. Use it as a context manager; every refusal is raised as `Refused`."""

    def __init__(self, address: str, options: Sequence[tuple[str, Any]] = ()) -> None:
        self._channel: Any = grpc.insecure_channel(
            address.removeprefix("grpc://"),
            options=[
                ("grpc.use_local_subchannel_pool", 1),
                ("grpc.max_send_message_length", -1),
                ("grpc.max_receive_message_length", -1),
                ("grpc.initial_reconnect_backoff_ms", 100),
                ("grpc.max_reconnect_backoff_ms", 200),
                *options,
            ],
        )

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    # --- any call -------------------------------------------------------------------------------------------------

    def begin(self, method: str, request: Message, response: type[M]) -> Any:
        """Start a unary call; `result()` of what is returned waits for it."""
        multi = self._channel.unary_unary(
            f"/blockferry.v1.{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=response.FromString,
        )
        return multi.future(request, timeout=TIMEOUT, wait_for_ready=True)

    def call(self, method: str, request: Message, response: type[M]) -> M:
        """A unary call."""
        return finished(self.begin(method, request, response), response)

    def stream(self, method: str, request: Message, response: type[M]) -> Any:
        """Start a call that is answered by a stream; nothing is read until the caller does."""
        multi = self._channel.unary_stream(
            f"/blockferry.v1.{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=response.FromString,
        )
        return multi(request, timeout=TIMEOUT, wait_for_ready=True)

    def bidirectional(self, method: str, requests: Iterator[Message | bytes], response: type[M]) -> Any:
        """Start a call with streams both ways; bytes among the requests go out as they are."""
        multi = self._channel.stream_stream(
            f"/blockferry.v1.{method}",
            request_serializer=lambda one: one if isinstance(one, bytes) else one.SerializeToString(),
            response_deserializer=response.FromString,
        )
        return multi(requests, timeout=TIMEOUT, wait_for_ready=True)

    # --- replication ----------------------------------------------------------------------------------------------

    def open(
        self, volume: str, size: int, *, client: str = "raw", region_size: int = REGION, **fields: Any
    ) -> pb.OpenSessionResponse:
        """OpenSession."""
        request = pb.OpenSessionRequest(
            protocol_version=1, volume=volume, size=size, region_size=region_size, client=client, **fields
        )
        return self.call("Replication/OpenSession", request, pb.OpenSessionResponse)

    def write(self, session: pb.SessionRef, offset: int, data: bytes) -> pb.WriteRegionResponse:
        """WriteRegion of a whole region."""
        return self.call("Replication/WriteRegion", write_request(offset, data, session), pb.WriteRegionResponse)

    def apply(
        self, requests: Sequence[pb.ApplyChangesRequest | bytes] | Iterator[pb.ApplyChangesRequest | bytes]
    ) -> list[pb.ApplyChangesResponse]:
        """ApplyChanges: send all, and return every acknowledgement."""
        return received(self.bidirectional("Replication/ApplyChanges", iter(requests), pb.ApplyChangesResponse))

    def commit(
        self, volume: str, session: pb.SessionRef, commit_id: bytes, keep: pb.Retention | None = None
    ) -> pb.Committed:
        """CommitSessions of one session."""
        request = pb.CommitSessionsRequest()
        request.commits.add(session=session, volume=volume, commit_id=commit_id, keep=keep)
        response = self.call("Replication/CommitSessions", request, pb.CommitSessionsResponse)
        assert len(response.commits) == 1
        return response.commits[0]

    def abort(self, session: pb.SessionRef, *, discard: bool = False) -> None:
        """AbortSession."""
        request = pb.AbortSessionRequest(session=session, discard=discard)
        self.call("Replication/AbortSession", request, pb.AbortSessionResponse)

    def digests(self, session: pb.SessionRef, piece_size: int, runs: Sequence[tuple[int, int]]) -> bytes:
        """GetRegionDigests of a session."""
        request = pb.GetRegionDigestsRequest(session=session, piece_size=piece_size, pieces=wire_runs(runs))
        answers = received(self.stream("Replication/GetRegionDigests", request, pb.GetRegionDigestsResponse))
        return b"".join(answer.digests for answer in answers)

    # --- looking --------------------------------------------------------------------------------------------------

    def show(self, volume: str) -> replicas.Replica:
        """GetReplica."""
        request = replicas.GetReplicaRequest(volume=volume)
        return self.call("Replicas/GetReplica", request, replicas.GetReplicaResponse).replica

    def volumes(self) -> set[str]:
        """The names of all replicas."""
        found = self.call("Replicas/ListReplicas", replicas.ListReplicasRequest(), replicas.ListReplicasResponse)
        return {replica.volume for replica in found.replicas}

    def state(self, volume: str) -> str:
        """The name of a replica's state."""
        return replicas.ReplicaState.Name(self.show(volume).state).removeprefix("REPLICA_STATE_")

    def points(self, volume: str) -> list[replicas.RecoveryPoint]:
        """ListRecoveryPoints, newest first."""
        request = replicas.ListRecoveryPointsRequest(volume=volume)
        return list(self.call("Replicas/ListRecoveryPoints", request, replicas.ListRecoveryPointsResponse).points)

    def read(self, volume: str, number: int, offset: int, length: int) -> bytes:
        """ReadRegions of one range of a committed generation."""
        request = replicas.ReadRegionsRequest(point=pb.PointRef(volume=volume, number=number))
        request.ranges.add(offset=offset, length=length)
        answers = received(self.stream("Replicas/ReadRegions", request, replicas.ReadRegionsResponse))
        return b"".join(answer.data or bytes(answer.zeros) for answer in answers)

    # --- handing over ---------------------------------------------------------------------------------------------

    def promote(self, volume: str, number: int = 0) -> replicas.Promotion:
        """PromoteReplica, to its end."""
        request = replicas.PromoteReplicaRequest(point=pb.PointRef(volume=volume, number=number), confirm=volume)
        answers = received(self.stream("Replicas/PromoteReplica", request, replicas.PromoteReplicaResponse))
        assert [answer.HasField("promotion") for answer in answers] == [False] * (len(answers) - 1) + [True]
        promotion = answers[-1].promotion
        assert isinstance(promotion, replicas.Promotion)
        return promotion

    def demote(self, volume: str, *, keep_changes: bool) -> replicas.DemoteReplicaResponse:
        """DemoteReplica."""
        request = replicas.DemoteReplicaRequest(volume=volume, keep_changes=keep_changes, confirm=volume)
        return self.call("Replicas/DemoteReplica", request, replicas.DemoteReplicaResponse)

    def delete(self, volume: str) -> None:
        """DeleteReplica."""
        request = replicas.DeleteReplicaRequest(volume=volume, confirm=volume)
        self.call("Replicas/DeleteReplica", request, replicas.DeleteReplicaResponse)

    def adopt(self, volume: str, seed: str, region_size: int = REGION) -> replicas.AdoptReplicaResponse:
        """AdoptReplica."""
        request = replicas.AdoptReplicaRequest(volume=volume, seed=seed, region_size=region_size)
        return self.call("Replicas/AdoptReplica", request, replicas.AdoptReplicaResponse)


def finished(call: Any, response: type[M]) -> M:
    """The answer of a call that `begin` started."""
    try:
        answer = call.result()
    except grpc.RpcError as error:
        raise refusal(error) from None
    assert isinstance(answer, response)
    return answer


def received(call: Any) -> list[Any]:
    """Everything a streaming call answers."""
    try:
        return list(call)
    except grpc.RpcError as error:
        raise refusal(error) from None


def wire_runs(runs: Sequence[tuple[int, int]]) -> list[pb.Run]:
    """Run messages of (first, count)."""
    return [pb.Run(first=first, count=count) for first, count in runs]


def write_request(offset: int, data: bytes, session: pb.SessionRef | None = None) -> pb.WriteRegionRequest:
    """Replace a whole region."""
    return pb.WriteRegionRequest(
        session=session, offset=offset, length=len(data), data=data, writes=[pb.Extent(offset=0, length=len(data))]
    )


def change_message(
    sequence: int,
    changes: Sequence[pb.WriteRegionRequest | pb.UnmapRegionRequest] = (),
    *,
    session: pb.SessionRef | None = None,
    flush: bool = False,
) -> pb.ApplyChangesRequest:
    """One message of an ApplyChanges stream."""
    wrapped = [
        pb.Change(write=one) if isinstance(one, pb.WriteRegionRequest) else pb.Change(unmap=one) for one in changes
    ]
    return pb.ApplyChangesRequest(sequence=sequence, session=session, changes=wrapped, flush=flush)
