"""Whether a sync fits: what it may need on the destination's disk, against the room of the pool it goes to."""

from __future__ import annotations

from dataclasses import dataclass

from blockferry.client.plan import Plan
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.rpc import Connection
from blockferry.v1 import replicas_pb2 as pb


@dataclass(frozen=True)
class Forecast:
    """Bytes: `free` in the pool's file system, of which `reserve` stay free; `needed_max` is the most a sync takes on
    top of what the replica holds (`held`); `quota` is the most it may hold, 0 for any amount."""

    pool: str
    free: int
    reserve: int
    needed_max: int
    held: int
    quota: int

    @property
    def fits(self) -> bool:
        """Whether there is room even if every block has to be written."""
        within_quota = not self.quota or self.held + self.needed_max <= self.quota
        return self.needed_max <= self.free - self.reserve and within_quota

    def fields(self) -> dict[str, object]:
        """The `forecast` object of reports."""
        return {
            "pool": self.pool,
            "free": self.free,
            "reserve": self.reserve,
            "quota": self.quota or None,
            "held": self.held,
            "needed_max": self.needed_max,
            "fits": self.fits,
        }


def needed_max(plan: Plan, kind: str, *, committed: bool) -> int:
    """Bytes that a sync takes at most. A clone takes what is written. A journal takes that, and applying it takes the
    same again: room for what was a hole, and the bytes that were there before. A first sync needs no journal, and on a
    device nothing else."""
    if not committed:
        return 0 if kind == "device" else plan.bytes_to_read
    return plan.bytes_to_read * (1 if kind == "clones" else 2)


def forecast(plan: Plan, pools: list[pb.Pool], replica: pb.Replica | None, pool: str, volume: str = "") -> Forecast:
    """The forecast for a replica called `volume`, or for a new one (None) in the pool called `pool` (empty: the first).
    Raises NOT_FOUND where there is no such pool, and INVALID_ARGUMENT where the replica is in another one."""
    if replica is not None and pool not in ("", replica.pool):
        raise BlockferryError(
            Code.INVALID_ARGUMENT,
            f"{replica.volume} is not in pool {pool}",
            cause=f"it exists in pool {replica.pool}",
            next=f"leave --pool out, or say --pool {replica.pool}",
            volume=replica.volume,
            expected=replica.pool,
            found=pool,
        )
    home = next((one.name for one in pools if volume in one.devices), "")
    name = replica.pool if replica is not None else home or pool or pools[0].name
    for one in pools:
        if one.name == name:
            committed = replica is not None and replica.generation > 0
            return Forecast(
                pool=name,
                free=one.free,
                reserve=one.reserve,
                needed_max=needed_max(plan, "device" if volume in one.devices else one.kind, committed=committed),
                held=replica.bytes_held if replica is not None else 0,
                quota=one.quota,
            )
    raise BlockferryError(
        Code.NOT_FOUND,
        f"there is no pool {name}",
        cause=f"the server has {', '.join(one.name for one in pools)}",
        next="list what there is with blockferry pool list",
    )


async def ask_forecast(connection: Connection, volume: str, pool: str, plan: Plan) -> Forecast | None:
    """Ask the server; None where it is too old to say."""
    try:
        found = await connection.call("Replicas/ListPools", pb.ListPoolsRequest(), pb.ListPoolsResponse)
    except BlockferryError as error:
        if error.code is Code.PROTOCOL:
            return None
        raise
    try:
        shown = await connection.call("Replicas/GetReplica", pb.GetReplicaRequest(volume=volume), pb.GetReplicaResponse)
    except BlockferryError as error:
        if error.code is not Code.NOT_FOUND:
            raise
        return forecast(plan, list(found.pools), None, pool, volume)
    return forecast(plan, list(found.pools), shown.replica, pool, volume)
