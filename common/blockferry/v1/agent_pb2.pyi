from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PolicyState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    POLICY_STATE_UNSPECIFIED: _ClassVar[PolicyState]
    POLICY_STATE_WAITING: _ClassVar[PolicyState]
    POLICY_STATE_QUEUED: _ClassVar[PolicyState]
    POLICY_STATE_RUNNING: _ClassVar[PolicyState]
    POLICY_STATE_BACKING_OFF: _ClassVar[PolicyState]
    POLICY_STATE_OUTSIDE_WINDOW: _ClassVar[PolicyState]
    POLICY_STATE_PAUSED: _ClassVar[PolicyState]
POLICY_STATE_UNSPECIFIED: PolicyState
POLICY_STATE_WAITING: PolicyState
POLICY_STATE_QUEUED: PolicyState
POLICY_STATE_RUNNING: PolicyState
POLICY_STATE_BACKING_OFF: PolicyState
POLICY_STATE_OUTSIDE_WINDOW: PolicyState
POLICY_STATE_PAUSED: PolicyState

class Policy(_message.Message):
    __slots__ = ("name", "source", "destination", "group", "rpo_ms", "state", "lag_ms", "rpo_missed", "due_in_ms", "failures", "last_error", "progress", "last_committed", "runs_begun", "runs_ended", "snapshot", "tracking")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    DESTINATION_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    RPO_MS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    LAG_MS_FIELD_NUMBER: _ClassVar[int]
    RPO_MISSED_FIELD_NUMBER: _ClassVar[int]
    DUE_IN_MS_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    LAST_ERROR_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    LAST_COMMITTED_FIELD_NUMBER: _ClassVar[int]
    RUNS_BEGUN_FIELD_NUMBER: _ClassVar[int]
    RUNS_ENDED_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    TRACKING_FIELD_NUMBER: _ClassVar[int]
    name: str
    source: str
    destination: str
    group: str
    rpo_ms: int
    state: PolicyState
    lag_ms: int
    rpo_missed: bool
    due_in_ms: int
    failures: int
    last_error: PolicyError
    progress: RunProgress
    last_committed: CommittedRun
    runs_begun: int
    runs_ended: int
    snapshot: str
    tracking: str
    def __init__(self, name: _Optional[str] = ..., source: _Optional[str] = ..., destination: _Optional[str] = ..., group: _Optional[str] = ..., rpo_ms: _Optional[int] = ..., state: _Optional[_Union[PolicyState, str]] = ..., lag_ms: _Optional[int] = ..., rpo_missed: bool = ..., due_in_ms: _Optional[int] = ..., failures: _Optional[int] = ..., last_error: _Optional[_Union[PolicyError, _Mapping]] = ..., progress: _Optional[_Union[RunProgress, _Mapping]] = ..., last_committed: _Optional[_Union[CommittedRun, _Mapping]] = ..., runs_begun: _Optional[int] = ..., runs_ended: _Optional[int] = ..., snapshot: _Optional[str] = ..., tracking: _Optional[str] = ...) -> None: ...

class PolicyError(_message.Message):
    __slots__ = ("code", "message", "cause", "next", "volume", "offset", "length", "line", "at_us")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    NEXT_FIELD_NUMBER: _ClassVar[int]
    VOLUME_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    LINE_FIELD_NUMBER: _ClassVar[int]
    AT_US_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    cause: str
    next: str
    volume: str
    offset: int
    length: int
    line: str
    at_us: int
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ..., cause: _Optional[str] = ..., next: _Optional[str] = ..., volume: _Optional[str] = ..., offset: _Optional[int] = ..., length: _Optional[int] = ..., line: _Optional[str] = ..., at_us: _Optional[int] = ...) -> None: ...

class RunProgress(_message.Message):
    __slots__ = ("began_at_us", "phase", "bytes_done", "bytes_total", "bytes_per_second", "left_ms", "note")
    BEGAN_AT_US_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    BYTES_DONE_FIELD_NUMBER: _ClassVar[int]
    BYTES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    LEFT_MS_FIELD_NUMBER: _ClassVar[int]
    NOTE_FIELD_NUMBER: _ClassVar[int]
    began_at_us: int
    phase: str
    bytes_done: int
    bytes_total: int
    bytes_per_second: int
    left_ms: int
    note: str
    def __init__(self, began_at_us: _Optional[int] = ..., phase: _Optional[str] = ..., bytes_done: _Optional[int] = ..., bytes_total: _Optional[int] = ..., bytes_per_second: _Optional[int] = ..., left_ms: _Optional[int] = ..., note: _Optional[str] = ...) -> None: ...

class CommittedRun(_message.Message):
    __slots__ = ("began_at_us", "took_ms", "generation", "commit_id", "volume_size", "data_sent", "wire_sent", "source_read", "unmapped", "changed_per_second", "full_compare")
    BEGAN_AT_US_FIELD_NUMBER: _ClassVar[int]
    TOOK_MS_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    COMMIT_ID_FIELD_NUMBER: _ClassVar[int]
    VOLUME_SIZE_FIELD_NUMBER: _ClassVar[int]
    DATA_SENT_FIELD_NUMBER: _ClassVar[int]
    WIRE_SENT_FIELD_NUMBER: _ClassVar[int]
    SOURCE_READ_FIELD_NUMBER: _ClassVar[int]
    UNMAPPED_FIELD_NUMBER: _ClassVar[int]
    CHANGED_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    FULL_COMPARE_FIELD_NUMBER: _ClassVar[int]
    began_at_us: int
    took_ms: int
    generation: int
    commit_id: bytes
    volume_size: int
    data_sent: int
    wire_sent: int
    source_read: int
    unmapped: int
    changed_per_second: int
    full_compare: str
    def __init__(self, began_at_us: _Optional[int] = ..., took_ms: _Optional[int] = ..., generation: _Optional[int] = ..., commit_id: _Optional[bytes] = ..., volume_size: _Optional[int] = ..., data_sent: _Optional[int] = ..., wire_sent: _Optional[int] = ..., source_read: _Optional[int] = ..., unmapped: _Optional[int] = ..., changed_per_second: _Optional[int] = ..., full_compare: _Optional[str] = ...) -> None: ...

class ListPoliciesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListPoliciesResponse(_message.Message):
    __slots__ = ("policies",)
    POLICIES_FIELD_NUMBER: _ClassVar[int]
    policies: _containers.RepeatedCompositeFieldContainer[Policy]
    def __init__(self, policies: _Optional[_Iterable[_Union[Policy, _Mapping]]] = ...) -> None: ...

class GetPolicyRequest(_message.Message):
    __slots__ = ("policy",)
    POLICY_FIELD_NUMBER: _ClassVar[int]
    policy: str
    def __init__(self, policy: _Optional[str] = ...) -> None: ...

class GetPolicyResponse(_message.Message):
    __slots__ = ("policy",)
    POLICY_FIELD_NUMBER: _ClassVar[int]
    policy: Policy
    def __init__(self, policy: _Optional[_Union[Policy, _Mapping]] = ...) -> None: ...

class SyncPolicyRequest(_message.Message):
    __slots__ = ("policy",)
    POLICY_FIELD_NUMBER: _ClassVar[int]
    policy: str
    def __init__(self, policy: _Optional[str] = ...) -> None: ...

class SyncPolicyResponse(_message.Message):
    __slots__ = ("policy", "runs_before")
    POLICY_FIELD_NUMBER: _ClassVar[int]
    RUNS_BEFORE_FIELD_NUMBER: _ClassVar[int]
    policy: Policy
    runs_before: int
    def __init__(self, policy: _Optional[_Union[Policy, _Mapping]] = ..., runs_before: _Optional[int] = ...) -> None: ...

class PausePolicyRequest(_message.Message):
    __slots__ = ("policy",)
    POLICY_FIELD_NUMBER: _ClassVar[int]
    policy: str
    def __init__(self, policy: _Optional[str] = ...) -> None: ...

class PausePolicyResponse(_message.Message):
    __slots__ = ("policy",)
    POLICY_FIELD_NUMBER: _ClassVar[int]
    policy: Policy
    def __init__(self, policy: _Optional[_Union[Policy, _Mapping]] = ...) -> None: ...

class ResumePolicyRequest(_message.Message):
    __slots__ = ("policy",)
    POLICY_FIELD_NUMBER: _ClassVar[int]
    policy: str
    def __init__(self, policy: _Optional[str] = ...) -> None: ...

class ResumePolicyResponse(_message.Message):
    __slots__ = ("policy",)
    POLICY_FIELD_NUMBER: _ClassVar[int]
    policy: Policy
    def __init__(self, policy: _Optional[_Union[Policy, _Mapping]] = ...) -> None: ...

class PlanPolicyRequest(_message.Message):
    __slots__ = ("policy",)
    POLICY_FIELD_NUMBER: _ClassVar[int]
    policy: str
    def __init__(self, policy: _Optional[str] = ...) -> None: ...

class PlanPolicyResponse(_message.Message):
    __slots__ = ("volume_size", "region_size", "source_map", "destination_map", "skip", "unmap", "send", "compare", "source_read", "destination_read", "unmapped_max", "data_sent_max")
    VOLUME_SIZE_FIELD_NUMBER: _ClassVar[int]
    REGION_SIZE_FIELD_NUMBER: _ClassVar[int]
    SOURCE_MAP_FIELD_NUMBER: _ClassVar[int]
    DESTINATION_MAP_FIELD_NUMBER: _ClassVar[int]
    SKIP_FIELD_NUMBER: _ClassVar[int]
    UNMAP_FIELD_NUMBER: _ClassVar[int]
    SEND_FIELD_NUMBER: _ClassVar[int]
    COMPARE_FIELD_NUMBER: _ClassVar[int]
    SOURCE_READ_FIELD_NUMBER: _ClassVar[int]
    DESTINATION_READ_FIELD_NUMBER: _ClassVar[int]
    UNMAPPED_MAX_FIELD_NUMBER: _ClassVar[int]
    DATA_SENT_MAX_FIELD_NUMBER: _ClassVar[int]
    volume_size: int
    region_size: int
    source_map: str
    destination_map: str
    skip: int
    unmap: int
    send: int
    compare: int
    source_read: int
    destination_read: int
    unmapped_max: int
    data_sent_max: int
    def __init__(self, volume_size: _Optional[int] = ..., region_size: _Optional[int] = ..., source_map: _Optional[str] = ..., destination_map: _Optional[str] = ..., skip: _Optional[int] = ..., unmap: _Optional[int] = ..., send: _Optional[int] = ..., compare: _Optional[int] = ..., source_read: _Optional[int] = ..., destination_read: _Optional[int] = ..., unmapped_max: _Optional[int] = ..., data_sent_max: _Optional[int] = ...) -> None: ...

class WatchPoliciesRequest(_message.Message):
    __slots__ = ("policy",)
    POLICY_FIELD_NUMBER: _ClassVar[int]
    policy: str
    def __init__(self, policy: _Optional[str] = ...) -> None: ...

class WatchPoliciesResponse(_message.Message):
    __slots__ = ("policies", "complete")
    POLICIES_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    policies: _containers.RepeatedCompositeFieldContainer[Policy]
    complete: bool
    def __init__(self, policies: _Optional[_Iterable[_Union[Policy, _Mapping]]] = ..., complete: bool = ...) -> None: ...
