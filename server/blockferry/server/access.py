"""What each call of a server needs, and whose a session is; common/access.py decides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from blockferry.common.access import AccessControl, Context, Identity, Need, Right, Trust, caller_of, denied
from blockferry.common.framing import decode_request
from blockferry.common.settings import Grant
from blockferry.v1 import replication_pb2 as pb

# --- what each call needs ---------------------------------------------------------------------------------------------


def _volume(right: Right) -> Callable[[Any], Need]:
    return lambda request: (right, [request.volume])


def _point(right: Right) -> Callable[[Any], Need]:
    return lambda request: (right, [request.point.volume])


def _target(right: Right) -> Callable[[Any], Need]:
    """A committed generation; or what a session works on, which is its own."""
    return lambda request: (
        (Right.WRITE, [request.session])
        if request.WhichOneof("target") == "session"
        else (right, [request.point.volume])
    )


def _session(request: Any) -> Need:
    return Right.WRITE, [request.session]


NEEDS: dict[str, Callable[[Any], Need]] = {
    "Replication/OpenSession": _volume(Right.WRITE),
    "Replication/GetAllocationMap": _target(Right.LOOK),
    # Digests with a key of the caller's choice tell a 4 KiB block from every guess at it: that is reading.
    "Replication/GetRegionDigests": _target(Right.READ),
    "Replication/WriteRegion": _session,
    "Replication/UnmapRegion": _session,
    # The first message, as bytes; the others belong to the same session.
    "Replication/ApplyChanges": lambda data: (Right.WRITE, [decode_request(data)[0].session] if data else []),
    "Replication/CommitSessions": lambda request: (
        Right.WRITE,
        [target for commit in request.commits for target in (commit.volume, commit.session)],
    ),
    "Replication/AbortSession": _session,
    "Replicas/ListReplicas": lambda _: (Right.LOOK, []),
    "Replicas/GetReplica": _volume(Right.LOOK),
    "Replicas/ListPools": lambda _: (Right.LOOK, []),
    "Replicas/ReadRegions": _point(Right.READ),
    # Who may not read has no reason to keep what others would have dropped.
    "Replicas/HoldPoint": _point(Right.READ),
    "Replicas/ListRecoveryPoints": _volume(Right.LOOK),
    "Replicas/VerifyReplica": _point(Right.VERIFY),
    "Replicas/PromoteReplica": _point(Right.MANAGE),
    "Replicas/DemoteReplica": _volume(Right.MANAGE),
    "Replicas/DeleteReplica": _volume(Right.MANAGE),
    "Replicas/AdoptReplica": _volume(Right.MANAGE),
}
"""By `Service/Method`. A call that is not here is refused to everybody."""


# --- whose a session is -----------------------------------------------------------------------------------------------


class Pools(Protocol):
    """Who has which session."""

    def owner_of(self, session_id: str) -> tuple[str, str | None] | None:
        """Volume and owner of a session; no owner where it is over, None where it is unknown."""


class Access(AccessControl):
    """Asks for the decision at each call, and whether a session is the caller's."""

    def __init__(self, pools: Pools, grants: Sequence[Grant] = (), trust: Trust | None = None) -> None:
        super().__init__(NEEDS, grants, trust)
        self._pools = pools

    def owner(self, context: Context) -> str:
        """Whom a session that the caller opens belongs to."""
        return caller_of(context).key

    def require_target(self, identity: Identity, method: str, right: Right, target: object) -> None:
        """A volume by its name, or a session by its reference."""
        if isinstance(target, pb.SessionRef):
            self._require_session(identity, method, right, target)
        else:
            super().require_target(identity, method, right, target)

    def _require_session(self, identity: Identity, method: str, right: Right, ref: pb.SessionRef) -> None:
        found = self._pools.owner_of(ref.session_id)
        if found is None:
            # Nobody's: the service says that it is over, to whoever might have had one.
            self.require(identity, method, right, None)
            return
        volume, owner = found
        self.require(identity, method, right, volume)
        if owner not in (None, identity.key):
            raise denied(identity, method, volume, f"the session belongs to {owner or 'a client without a name'}")
