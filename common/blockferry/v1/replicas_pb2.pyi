from blockferry.v1 import replication_pb2 as _replication_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ReplicaState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REPLICA_STATE_UNSPECIFIED: _ClassVar[ReplicaState]
    REPLICA_STATE_EMPTY: _ClassVar[ReplicaState]
    REPLICA_STATE_SYNCING: _ClassVar[ReplicaState]
    REPLICA_STATE_CONSISTENT: _ClassVar[ReplicaState]
    REPLICA_STATE_UPDATING: _ClassVar[ReplicaState]
    REPLICA_STATE_PROMOTED: _ClassVar[ReplicaState]
REPLICA_STATE_UNSPECIFIED: ReplicaState
REPLICA_STATE_EMPTY: ReplicaState
REPLICA_STATE_SYNCING: ReplicaState
REPLICA_STATE_CONSISTENT: ReplicaState
REPLICA_STATE_UPDATING: ReplicaState
REPLICA_STATE_PROMOTED: ReplicaState

class Replica(_message.Message):
    __slots__ = ("volume", "replica_uuid", "size", "region_size", "state", "generation", "commit_id", "committed_at_us", "bytes_held", "path", "session_client", "pool", "scrub", "notice", "kind", "promotion")
    VOLUME_FIELD_NUMBER: _ClassVar[int]
    REPLICA_UUID_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    REGION_SIZE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    COMMIT_ID_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_AT_US_FIELD_NUMBER: _ClassVar[int]
    BYTES_HELD_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    SESSION_CLIENT_FIELD_NUMBER: _ClassVar[int]
    POOL_FIELD_NUMBER: _ClassVar[int]
    SCRUB_FIELD_NUMBER: _ClassVar[int]
    NOTICE_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    PROMOTION_FIELD_NUMBER: _ClassVar[int]
    volume: str
    replica_uuid: bytes
    size: int
    region_size: int
    state: ReplicaState
    generation: int
    commit_id: bytes
    committed_at_us: int
    bytes_held: int
    path: str
    session_client: str
    pool: str
    scrub: Scrub
    notice: str
    kind: str
    promotion: Promotion
    def __init__(self, volume: _Optional[str] = ..., replica_uuid: _Optional[bytes] = ..., size: _Optional[int] = ..., region_size: _Optional[int] = ..., state: _Optional[_Union[ReplicaState, str]] = ..., generation: _Optional[int] = ..., commit_id: _Optional[bytes] = ..., committed_at_us: _Optional[int] = ..., bytes_held: _Optional[int] = ..., path: _Optional[str] = ..., session_client: _Optional[str] = ..., pool: _Optional[str] = ..., scrub: _Optional[_Union[Scrub, _Mapping]] = ..., notice: _Optional[str] = ..., kind: _Optional[str] = ..., promotion: _Optional[_Union[Promotion, _Mapping]] = ...) -> None: ...

class Promotion(_message.Message):
    __slots__ = ("generation", "commit_id", "promoted_at_us", "path")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    COMMIT_ID_FIELD_NUMBER: _ClassVar[int]
    PROMOTED_AT_US_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    generation: int
    commit_id: bytes
    promoted_at_us: int
    path: str
    def __init__(self, generation: _Optional[int] = ..., commit_id: _Optional[bytes] = ..., promoted_at_us: _Optional[int] = ..., path: _Optional[str] = ...) -> None: ...

class Scrub(_message.Message):
    __slots__ = ("at_us", "generation", "bytes", "rotten", "problem")
    AT_US_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    ROTTEN_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    at_us: int
    generation: int
    bytes: int
    rotten: _containers.RepeatedCompositeFieldContainer[ReadRange]
    problem: str
    def __init__(self, at_us: _Optional[int] = ..., generation: _Optional[int] = ..., bytes: _Optional[int] = ..., rotten: _Optional[_Iterable[_Union[ReadRange, _Mapping]]] = ..., problem: _Optional[str] = ...) -> None: ...

class Pool(_message.Message):
    __slots__ = ("name", "path", "kind", "total", "free", "reserve", "quota", "replicas", "bytes_held", "problem", "notice", "devices")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    FREE_FIELD_NUMBER: _ClassVar[int]
    RESERVE_FIELD_NUMBER: _ClassVar[int]
    QUOTA_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    BYTES_HELD_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    NOTICE_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    name: str
    path: str
    kind: str
    total: int
    free: int
    reserve: int
    quota: int
    replicas: int
    bytes_held: int
    problem: str
    notice: str
    devices: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., path: _Optional[str] = ..., kind: _Optional[str] = ..., total: _Optional[int] = ..., free: _Optional[int] = ..., reserve: _Optional[int] = ..., quota: _Optional[int] = ..., replicas: _Optional[int] = ..., bytes_held: _Optional[int] = ..., problem: _Optional[str] = ..., notice: _Optional[str] = ..., devices: _Optional[_Iterable[str]] = ...) -> None: ...

class ListPoolsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListPoolsResponse(_message.Message):
    __slots__ = ("pools",)
    POOLS_FIELD_NUMBER: _ClassVar[int]
    pools: _containers.RepeatedCompositeFieldContainer[Pool]
    def __init__(self, pools: _Optional[_Iterable[_Union[Pool, _Mapping]]] = ...) -> None: ...

class ListReplicasRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListReplicasResponse(_message.Message):
    __slots__ = ("replicas",)
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    replicas: _containers.RepeatedCompositeFieldContainer[Replica]
    def __init__(self, replicas: _Optional[_Iterable[_Union[Replica, _Mapping]]] = ...) -> None: ...

class GetReplicaRequest(_message.Message):
    __slots__ = ("volume",)
    VOLUME_FIELD_NUMBER: _ClassVar[int]
    volume: str
    def __init__(self, volume: _Optional[str] = ...) -> None: ...

class GetReplicaResponse(_message.Message):
    __slots__ = ("replica",)
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    replica: Replica
    def __init__(self, replica: _Optional[_Union[Replica, _Mapping]] = ...) -> None: ...

class ReadRange(_message.Message):
    __slots__ = ("offset", "length")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    offset: int
    length: int
    def __init__(self, offset: _Optional[int] = ..., length: _Optional[int] = ...) -> None: ...

class ReadRegionsRequest(_message.Message):
    __slots__ = ("point", "ranges")
    POINT_FIELD_NUMBER: _ClassVar[int]
    RANGES_FIELD_NUMBER: _ClassVar[int]
    point: _replication_pb2.PointRef
    ranges: _containers.RepeatedCompositeFieldContainer[ReadRange]
    def __init__(self, point: _Optional[_Union[_replication_pb2.PointRef, _Mapping]] = ..., ranges: _Optional[_Iterable[_Union[ReadRange, _Mapping]]] = ...) -> None: ...

class ReadRegionsResponse(_message.Message):
    __slots__ = ("offset", "data", "zeros")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    ZEROS_FIELD_NUMBER: _ClassVar[int]
    offset: int
    data: bytes
    zeros: int
    def __init__(self, offset: _Optional[int] = ..., data: _Optional[bytes] = ..., zeros: _Optional[int] = ...) -> None: ...

class HoldPointRequest(_message.Message):
    __slots__ = ("point",)
    POINT_FIELD_NUMBER: _ClassVar[int]
    point: _replication_pb2.PointRef
    def __init__(self, point: _Optional[_Union[_replication_pb2.PointRef, _Mapping]] = ...) -> None: ...

class HoldPointResponse(_message.Message):
    __slots__ = ("generation", "commit_id")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    COMMIT_ID_FIELD_NUMBER: _ClassVar[int]
    generation: int
    commit_id: bytes
    def __init__(self, generation: _Optional[int] = ..., commit_id: _Optional[bytes] = ...) -> None: ...

class RecoveryPoint(_message.Message):
    __slots__ = ("number", "commit_id", "committed_at_us", "size", "bytes_held", "path", "kept_by", "problem")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    COMMIT_ID_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_AT_US_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    BYTES_HELD_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    KEPT_BY_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    number: int
    commit_id: bytes
    committed_at_us: int
    size: int
    bytes_held: int
    path: str
    kept_by: _containers.RepeatedScalarFieldContainer[str]
    problem: str
    def __init__(self, number: _Optional[int] = ..., commit_id: _Optional[bytes] = ..., committed_at_us: _Optional[int] = ..., size: _Optional[int] = ..., bytes_held: _Optional[int] = ..., path: _Optional[str] = ..., kept_by: _Optional[_Iterable[str]] = ..., problem: _Optional[str] = ...) -> None: ...

class ListRecoveryPointsRequest(_message.Message):
    __slots__ = ("volume",)
    VOLUME_FIELD_NUMBER: _ClassVar[int]
    volume: str
    def __init__(self, volume: _Optional[str] = ...) -> None: ...

class ListRecoveryPointsResponse(_message.Message):
    __slots__ = ("points",)
    POINTS_FIELD_NUMBER: _ClassVar[int]
    points: _containers.RepeatedCompositeFieldContainer[RecoveryPoint]
    def __init__(self, points: _Optional[_Iterable[_Union[RecoveryPoint, _Mapping]]] = ...) -> None: ...

class VerifyReplicaRequest(_message.Message):
    __slots__ = ("point",)
    POINT_FIELD_NUMBER: _ClassVar[int]
    point: _replication_pb2.PointRef
    def __init__(self, point: _Optional[_Union[_replication_pb2.PointRef, _Mapping]] = ...) -> None: ...

class VerifyReplicaResponse(_message.Message):
    __slots__ = ("bytes_done", "bytes_total", "rotten", "bytes_unrecorded")
    BYTES_DONE_FIELD_NUMBER: _ClassVar[int]
    BYTES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    ROTTEN_FIELD_NUMBER: _ClassVar[int]
    BYTES_UNRECORDED_FIELD_NUMBER: _ClassVar[int]
    bytes_done: int
    bytes_total: int
    rotten: _containers.RepeatedCompositeFieldContainer[ReadRange]
    bytes_unrecorded: int
    def __init__(self, bytes_done: _Optional[int] = ..., bytes_total: _Optional[int] = ..., rotten: _Optional[_Iterable[_Union[ReadRange, _Mapping]]] = ..., bytes_unrecorded: _Optional[int] = ...) -> None: ...

class PromoteReplicaRequest(_message.Message):
    __slots__ = ("point", "confirm")
    POINT_FIELD_NUMBER: _ClassVar[int]
    CONFIRM_FIELD_NUMBER: _ClassVar[int]
    point: _replication_pb2.PointRef
    confirm: str
    def __init__(self, point: _Optional[_Union[_replication_pb2.PointRef, _Mapping]] = ..., confirm: _Optional[str] = ...) -> None: ...

class PromoteReplicaResponse(_message.Message):
    __slots__ = ("bytes_done", "bytes_total", "promotion")
    BYTES_DONE_FIELD_NUMBER: _ClassVar[int]
    BYTES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    PROMOTION_FIELD_NUMBER: _ClassVar[int]
    bytes_done: int
    bytes_total: int
    promotion: Promotion
    def __init__(self, bytes_done: _Optional[int] = ..., bytes_total: _Optional[int] = ..., promotion: _Optional[_Union[Promotion, _Mapping]] = ...) -> None: ...

class DemoteReplicaRequest(_message.Message):
    __slots__ = ("volume", "keep_changes", "confirm")
    VOLUME_FIELD_NUMBER: _ClassVar[int]
    KEEP_CHANGES_FIELD_NUMBER: _ClassVar[int]
    CONFIRM_FIELD_NUMBER: _ClassVar[int]
    volume: str
    keep_changes: bool
    confirm: str
    def __init__(self, volume: _Optional[str] = ..., keep_changes: bool = ..., confirm: _Optional[str] = ...) -> None: ...

class DemoteReplicaResponse(_message.Message):
    __slots__ = ("generation", "commit_id")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    COMMIT_ID_FIELD_NUMBER: _ClassVar[int]
    generation: int
    commit_id: bytes
    def __init__(self, generation: _Optional[int] = ..., commit_id: _Optional[bytes] = ...) -> None: ...

class DeleteReplicaRequest(_message.Message):
    __slots__ = ("volume", "confirm")
    VOLUME_FIELD_NUMBER: _ClassVar[int]
    CONFIRM_FIELD_NUMBER: _ClassVar[int]
    volume: str
    confirm: str
    def __init__(self, volume: _Optional[str] = ..., confirm: _Optional[str] = ...) -> None: ...

class DeleteReplicaResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AdoptReplicaRequest(_message.Message):
    __slots__ = ("volume", "seed", "region_size", "pool")
    VOLUME_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    REGION_SIZE_FIELD_NUMBER: _ClassVar[int]
    POOL_FIELD_NUMBER: _ClassVar[int]
    volume: str
    seed: str
    region_size: int
    pool: str
    def __init__(self, volume: _Optional[str] = ..., seed: _Optional[str] = ..., region_size: _Optional[int] = ..., pool: _Optional[str] = ...) -> None: ...

class AdoptReplicaResponse(_message.Message):
    __slots__ = ("size", "region_size")
    SIZE_FIELD_NUMBER: _ClassVar[int]
    REGION_SIZE_FIELD_NUMBER: _ClassVar[int]
    size: int
    region_size: int
    def __init__(self, size: _Optional[int] = ..., region_size: _Optional[int] = ...) -> None: ...
