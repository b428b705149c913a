from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RehydrationState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REHYDRATION_STATE_UNSPECIFIED: _ClassVar[RehydrationState]
    REHYDRATION_STATE_HYDRATING: _ClassVar[RehydrationState]
    REHYDRATION_STATE_HELD_UP: _ClassVar[RehydrationState]
    REHYDRATION_STATE_COMPLETE: _ClassVar[RehydrationState]
    REHYDRATION_STATE_FAILED: _ClassVar[RehydrationState]
REHYDRATION_STATE_UNSPECIFIED: RehydrationState
REHYDRATION_STATE_HYDRATING: RehydrationState
REHYDRATION_STATE_HELD_UP: RehydrationState
REHYDRATION_STATE_COMPLETE: RehydrationState
REHYDRATION_STATE_FAILED: RehydrationState

class RehydrationSource(_message.Message):
    __slots__ = ("uri", "connected", "problem", "bytes_fetched")
    URI_FIELD_NUMBER: _ClassVar[int]
    CONNECTED_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    BYTES_FETCHED_FIELD_NUMBER: _ClassVar[int]
    uri: str
    connected: bool
    problem: str
    bytes_fetched: int
    def __init__(self, uri: _Optional[str] = ..., connected: bool = ..., problem: _Optional[str] = ..., bytes_fetched: _Optional[int] = ...) -> None: ...

class DemandLatency(_message.Message):
    __slots__ = ("demands", "median_ms", "p99_ms", "most_ms")
    DEMANDS_FIELD_NUMBER: _ClassVar[int]
    MEDIAN_MS_FIELD_NUMBER: _ClassVar[int]
    P99_MS_FIELD_NUMBER: _ClassVar[int]
    MOST_MS_FIELD_NUMBER: _ClassVar[int]
    demands: int
    median_ms: float
    p99_ms: float
    most_ms: float
    def __init__(self, demands: _Optional[int] = ..., median_ms: _Optional[float] = ..., p99_ms: _Optional[float] = ..., most_ms: _Optional[float] = ...) -> None: ...

class RehydrationStatus(_message.Message):
    __slots__ = ("primary", "address", "snapshot_id", "state", "problem", "size", "hydrated", "data", "data_left", "fetched", "percent", "rate", "seconds_left", "demand", "sources")
    PRIMARY_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    HYDRATED_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    DATA_LEFT_FIELD_NUMBER: _ClassVar[int]
    FETCHED_FIELD_NUMBER: _ClassVar[int]
    PERCENT_FIELD_NUMBER: _ClassVar[int]
    RATE_FIELD_NUMBER: _ClassVar[int]
    SECONDS_LEFT_FIELD_NUMBER: _ClassVar[int]
    DEMAND_FIELD_NUMBER: _ClassVar[int]
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    primary: str
    address: str
    snapshot_id: str
    state: RehydrationState
    problem: str
    size: int
    hydrated: int
    data: int
    data_left: int
    fetched: int
    percent: float
    rate: float
    seconds_left: float
    demand: DemandLatency
    sources: _containers.RepeatedCompositeFieldContainer[RehydrationSource]
    def __init__(self, primary: _Optional[str] = ..., address: _Optional[str] = ..., snapshot_id: _Optional[str] = ..., state: _Optional[_Union[RehydrationState, str]] = ..., problem: _Optional[str] = ..., size: _Optional[int] = ..., hydrated: _Optional[int] = ..., data: _Optional[int] = ..., data_left: _Optional[int] = ..., fetched: _Optional[int] = ..., percent: _Optional[float] = ..., rate: _Optional[float] = ..., seconds_left: _Optional[float] = ..., demand: _Optional[_Union[DemandLatency, _Mapping]] = ..., sources: _Optional[_Iterable[_Union[RehydrationSource, _Mapping]]] = ...) -> None: ...

class ShowRehydrationRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ShowRehydrationResponse(_message.Message):
    __slots__ = ("status",)
    STATUS_FIELD_NUMBER: _ClassVar[int]
    status: RehydrationStatus
    def __init__(self, status: _Optional[_Union[RehydrationStatus, _Mapping]] = ...) -> None: ...

class WatchRehydrationRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WatchRehydrationResponse(_message.Message):
    __slots__ = ("status",)
    STATUS_FIELD_NUMBER: _ClassVar[int]
    status: RehydrationStatus
    def __init__(self, status: _Optional[_Union[RehydrationStatus, _Mapping]] = ...) -> None: ...

class SnapshotRehydrationRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class SnapshotRehydrationResponse(_message.Message):
    __slots__ = ("path", "state", "hydrated")
    PATH_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    HYDRATED_FIELD_NUMBER: _ClassVar[int]
    path: str
    state: str
    hydrated: int
    def __init__(self, path: _Optional[str] = ..., state: _Optional[str] = ..., hydrated: _Optional[int] = ...) -> None: ...
