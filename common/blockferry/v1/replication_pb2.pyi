from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Provenance(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PROVENANCE_UNSPECIFIED: _ClassVar[Provenance]
    PROVENANCE_EXACT: _ClassVar[Provenance]
    PROVENANCE_CONSERVATIVE: _ClassVar[Provenance]
    PROVENANCE_ABSENT: _ClassVar[Provenance]
PROVENANCE_UNSPECIFIED: Provenance
PROVENANCE_EXACT: Provenance
PROVENANCE_CONSERVATIVE: Provenance
PROVENANCE_ABSENT: Provenance

class Run(_message.Message):
    __slots__ = ("first", "count")
    FIRST_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    first: int
    count: int
    def __init__(self, first: _Optional[int] = ..., count: _Optional[int] = ...) -> None: ...

class SessionRef(_message.Message):
    __slots__ = ("session_id", "epoch")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    epoch: int
    def __init__(self, session_id: _Optional[str] = ..., epoch: _Optional[int] = ...) -> None: ...

class PointRef(_message.Message):
    __slots__ = ("volume", "number")
    VOLUME_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    volume: str
    number: int
    def __init__(self, volume: _Optional[str] = ..., number: _Optional[int] = ...) -> None: ...

class OpenSessionRequest(_message.Message):
    __slots__ = ("protocol_version", "capabilities", "volume", "size", "region_size", "grow", "client", "snapshot_id", "resume_session_id", "pool")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    CAPABILITIES_FIELD_NUMBER: _ClassVar[int]
    VOLUME_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    REGION_SIZE_FIELD_NUMBER: _ClassVar[int]
    GROW_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_ID_FIELD_NUMBER: _ClassVar[int]
    RESUME_SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    POOL_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    capabilities: _containers.RepeatedScalarFieldContainer[str]
    volume: str
    size: int
    region_size: int
    grow: bool
    client: str
    snapshot_id: str
    resume_session_id: str
    pool: str
    def __init__(self, protocol_version: _Optional[int] = ..., capabilities: _Optional[_Iterable[str]] = ..., volume: _Optional[str] = ..., size: _Optional[int] = ..., region_size: _Optional[int] = ..., grow: bool = ..., client: _Optional[str] = ..., snapshot_id: _Optional[str] = ..., resume_session_id: _Optional[str] = ..., pool: _Optional[str] = ...) -> None: ...

class OpenSessionResponse(_message.Message):
    __slots__ = ("protocol_version", "capabilities", "session", "replica_uuid", "digest_key", "region_size", "size", "generation", "commit_id", "lease_ms", "bytes_in_flight", "durable_regions", "base_known", "altered_regions", "base_doubt")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    CAPABILITIES_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    REPLICA_UUID_FIELD_NUMBER: _ClassVar[int]
    DIGEST_KEY_FIELD_NUMBER: _ClassVar[int]
    REGION_SIZE_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    COMMIT_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    BYTES_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    DURABLE_REGIONS_FIELD_NUMBER: _ClassVar[int]
    BASE_KNOWN_FIELD_NUMBER: _ClassVar[int]
    ALTERED_REGIONS_FIELD_NUMBER: _ClassVar[int]
    BASE_DOUBT_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    capabilities: _containers.RepeatedScalarFieldContainer[str]
    session: SessionRef
    replica_uuid: bytes
    digest_key: bytes
    region_size: int
    size: int
    generation: int
    commit_id: bytes
    lease_ms: int
    bytes_in_flight: int
    durable_regions: _containers.RepeatedCompositeFieldContainer[Run]
    base_known: bool
    altered_regions: _containers.RepeatedCompositeFieldContainer[Run]
    base_doubt: str
    def __init__(self, protocol_version: _Optional[int] = ..., capabilities: _Optional[_Iterable[str]] = ..., session: _Optional[_Union[SessionRef, _Mapping]] = ..., replica_uuid: _Optional[bytes] = ..., digest_key: _Optional[bytes] = ..., region_size: _Optional[int] = ..., size: _Optional[int] = ..., generation: _Optional[int] = ..., commit_id: _Optional[bytes] = ..., lease_ms: _Optional[int] = ..., bytes_in_flight: _Optional[int] = ..., durable_regions: _Optional[_Iterable[_Union[Run, _Mapping]]] = ..., base_known: bool = ..., altered_regions: _Optional[_Iterable[_Union[Run, _Mapping]]] = ..., base_doubt: _Optional[str] = ...) -> None: ...

class GetAllocationMapRequest(_message.Message):
    __slots__ = ("session", "point", "region_size")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    POINT_FIELD_NUMBER: _ClassVar[int]
    REGION_SIZE_FIELD_NUMBER: _ClassVar[int]
    session: SessionRef
    point: PointRef
    region_size: int
    def __init__(self, session: _Optional[_Union[SessionRef, _Mapping]] = ..., point: _Optional[_Union[PointRef, _Mapping]] = ..., region_size: _Optional[int] = ...) -> None: ...

class AllocationMapHeader(_message.Message):
    __slots__ = ("provenance", "region_size", "size", "generation", "commit_id", "replica_uuid")
    PROVENANCE_FIELD_NUMBER: _ClassVar[int]
    REGION_SIZE_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    COMMIT_ID_FIELD_NUMBER: _ClassVar[int]
    REPLICA_UUID_FIELD_NUMBER: _ClassVar[int]
    provenance: Provenance
    region_size: int
    size: int
    generation: int
    commit_id: bytes
    replica_uuid: bytes
    def __init__(self, provenance: _Optional[_Union[Provenance, str]] = ..., region_size: _Optional[int] = ..., size: _Optional[int] = ..., generation: _Optional[int] = ..., commit_id: _Optional[bytes] = ..., replica_uuid: _Optional[bytes] = ...) -> None: ...

class GetAllocationMapResponse(_message.Message):
    __slots__ = ("header", "allocated")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    ALLOCATED_FIELD_NUMBER: _ClassVar[int]
    header: AllocationMapHeader
    allocated: _containers.RepeatedCompositeFieldContainer[Run]
    def __init__(self, header: _Optional[_Union[AllocationMapHeader, _Mapping]] = ..., allocated: _Optional[_Iterable[_Union[Run, _Mapping]]] = ...) -> None: ...

class GetRegionDigestsRequest(_message.Message):
    __slots__ = ("session", "point", "piece_size", "pieces", "key", "bypass_cache")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    POINT_FIELD_NUMBER: _ClassVar[int]
    PIECE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PIECES_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    BYPASS_CACHE_FIELD_NUMBER: _ClassVar[int]
    session: SessionRef
    point: PointRef
    piece_size: int
    pieces: _containers.RepeatedCompositeFieldContainer[Run]
    key: bytes
    bypass_cache: bool
    def __init__(self, session: _Optional[_Union[SessionRef, _Mapping]] = ..., point: _Optional[_Union[PointRef, _Mapping]] = ..., piece_size: _Optional[int] = ..., pieces: _Optional[_Iterable[_Union[Run, _Mapping]]] = ..., key: _Optional[bytes] = ..., bypass_cache: bool = ...) -> None: ...

class GetRegionDigestsResponse(_message.Message):
    __slots__ = ("digests", "bytes_read")
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    BYTES_READ_FIELD_NUMBER: _ClassVar[int]
    digests: bytes
    bytes_read: int
    def __init__(self, digests: _Optional[bytes] = ..., bytes_read: _Optional[int] = ...) -> None: ...

class Extent(_message.Message):
    __slots__ = ("offset", "length")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    offset: int
    length: int
    def __init__(self, offset: _Optional[int] = ..., length: _Optional[int] = ...) -> None: ...

class WriteRegionRequest(_message.Message):
    __slots__ = ("session", "offset", "length", "writes", "zeros", "data", "digest", "uncompared")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    WRITES_FIELD_NUMBER: _ClassVar[int]
    ZEROS_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    UNCOMPARED_FIELD_NUMBER: _ClassVar[int]
    session: SessionRef
    offset: int
    length: int
    writes: _containers.RepeatedCompositeFieldContainer[Extent]
    zeros: _containers.RepeatedCompositeFieldContainer[Extent]
    data: bytes
    digest: bytes
    uncompared: bool
    def __init__(self, session: _Optional[_Union[SessionRef, _Mapping]] = ..., offset: _Optional[int] = ..., length: _Optional[int] = ..., writes: _Optional[_Iterable[_Union[Extent, _Mapping]]] = ..., zeros: _Optional[_Iterable[_Union[Extent, _Mapping]]] = ..., data: _Optional[bytes] = ..., digest: _Optional[bytes] = ..., uncompared: bool = ...) -> None: ...

class WriteRegionResponse(_message.Message):
    __slots__ = ("result",)
    RESULT_FIELD_NUMBER: _ClassVar[int]
    result: ChangeResult
    def __init__(self, result: _Optional[_Union[ChangeResult, _Mapping]] = ...) -> None: ...

class UnmapRegionRequest(_message.Message):
    __slots__ = ("session", "offset", "length")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    session: SessionRef
    offset: int
    length: int
    def __init__(self, session: _Optional[_Union[SessionRef, _Mapping]] = ..., offset: _Optional[int] = ..., length: _Optional[int] = ...) -> None: ...

class UnmapRegionResponse(_message.Message):
    __slots__ = ("result",)
    RESULT_FIELD_NUMBER: _ClassVar[int]
    result: ChangeResult
    def __init__(self, result: _Optional[_Union[ChangeResult, _Mapping]] = ...) -> None: ...

class ChangeResult(_message.Message):
    __slots__ = ("mismatch", "bytes_written", "bytes_unmapped", "bytes_read")
    MISMATCH_FIELD_NUMBER: _ClassVar[int]
    BYTES_WRITTEN_FIELD_NUMBER: _ClassVar[int]
    BYTES_UNMAPPED_FIELD_NUMBER: _ClassVar[int]
    BYTES_READ_FIELD_NUMBER: _ClassVar[int]
    mismatch: bool
    bytes_written: int
    bytes_unmapped: int
    bytes_read: int
    def __init__(self, mismatch: bool = ..., bytes_written: _Optional[int] = ..., bytes_unmapped: _Optional[int] = ..., bytes_read: _Optional[int] = ...) -> None: ...

class Change(_message.Message):
    __slots__ = ("write", "unmap")
    WRITE_FIELD_NUMBER: _ClassVar[int]
    UNMAP_FIELD_NUMBER: _ClassVar[int]
    write: WriteRegionRequest
    unmap: UnmapRegionRequest
    def __init__(self, write: _Optional[_Union[WriteRegionRequest, _Mapping]] = ..., unmap: _Optional[_Union[UnmapRegionRequest, _Mapping]] = ...) -> None: ...

class ApplyChangesRequest(_message.Message):
    __slots__ = ("sequence", "session", "changes", "flush", "settled", "last")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    CHANGES_FIELD_NUMBER: _ClassVar[int]
    FLUSH_FIELD_NUMBER: _ClassVar[int]
    SETTLED_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    session: SessionRef
    changes: _containers.RepeatedCompositeFieldContainer[Change]
    flush: bool
    settled: _containers.RepeatedCompositeFieldContainer[Run]
    last: bool
    def __init__(self, sequence: _Optional[int] = ..., session: _Optional[_Union[SessionRef, _Mapping]] = ..., changes: _Optional[_Iterable[_Union[Change, _Mapping]]] = ..., flush: bool = ..., settled: _Optional[_Iterable[_Union[Run, _Mapping]]] = ..., last: bool = ...) -> None: ...

class ApplyChangesResponse(_message.Message):
    __slots__ = ("received", "durable", "totals", "mismatched_offsets", "error")
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    DURABLE_FIELD_NUMBER: _ClassVar[int]
    TOTALS_FIELD_NUMBER: _ClassVar[int]
    MISMATCHED_OFFSETS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    received: int
    durable: int
    totals: ChangeResult
    mismatched_offsets: _containers.RepeatedScalarFieldContainer[int]
    error: bytes
    def __init__(self, received: _Optional[int] = ..., durable: _Optional[int] = ..., totals: _Optional[_Union[ChangeResult, _Mapping]] = ..., mismatched_offsets: _Optional[_Iterable[int]] = ..., error: _Optional[bytes] = ...) -> None: ...

class Retention(_message.Message):
    __slots__ = ("last", "hourly", "daily", "weekly", "monthly", "yearly")
    LAST_FIELD_NUMBER: _ClassVar[int]
    HOURLY_FIELD_NUMBER: _ClassVar[int]
    DAILY_FIELD_NUMBER: _ClassVar[int]
    WEEKLY_FIELD_NUMBER: _ClassVar[int]
    MONTHLY_FIELD_NUMBER: _ClassVar[int]
    YEARLY_FIELD_NUMBER: _ClassVar[int]
    last: int
    hourly: int
    daily: int
    weekly: int
    monthly: int
    yearly: int
    def __init__(self, last: _Optional[int] = ..., hourly: _Optional[int] = ..., daily: _Optional[int] = ..., weekly: _Optional[int] = ..., monthly: _Optional[int] = ..., yearly: _Optional[int] = ...) -> None: ...

class SessionCommit(_message.Message):
    __slots__ = ("session", "volume", "commit_id", "keep")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    VOLUME_FIELD_NUMBER: _ClassVar[int]
    COMMIT_ID_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    session: SessionRef
    volume: str
    commit_id: bytes
    keep: Retention
    def __init__(self, session: _Optional[_Union[SessionRef, _Mapping]] = ..., volume: _Optional[str] = ..., commit_id: _Optional[bytes] = ..., keep: _Optional[_Union[Retention, _Mapping]] = ...) -> None: ...

class CommitSessionsRequest(_message.Message):
    __slots__ = ("commits",)
    COMMITS_FIELD_NUMBER: _ClassVar[int]
    commits: _containers.RepeatedCompositeFieldContainer[SessionCommit]
    def __init__(self, commits: _Optional[_Iterable[_Union[SessionCommit, _Mapping]]] = ...) -> None: ...

class Committed(_message.Message):
    __slots__ = ("volume", "generation", "commit_id", "committed_at_us")
    VOLUME_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    COMMIT_ID_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_AT_US_FIELD_NUMBER: _ClassVar[int]
    volume: str
    generation: int
    commit_id: bytes
    committed_at_us: int
    def __init__(self, volume: _Optional[str] = ..., generation: _Optional[int] = ..., commit_id: _Optional[bytes] = ..., committed_at_us: _Optional[int] = ...) -> None: ...

class CommitSessionsResponse(_message.Message):
    __slots__ = ("commits",)
    COMMITS_FIELD_NUMBER: _ClassVar[int]
    commits: _containers.RepeatedCompositeFieldContainer[Committed]
    def __init__(self, commits: _Optional[_Iterable[_Union[Committed, _Mapping]]] = ...) -> None: ...

class AbortSessionRequest(_message.Message):
    __slots__ = ("session", "discard")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    DISCARD_FIELD_NUMBER: _ClassVar[int]
    session: SessionRef
    discard: bool
    def __init__(self, session: _Optional[_Union[SessionRef, _Mapping]] = ..., discard: bool = ...) -> None: ...

class AbortSessionResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
