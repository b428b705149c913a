"""The forecast is an upper bound, and says so against the room of the right pool."""

from __future__ import annotations

import pytest
from blockferry.client.forecast import Forecast, forecast
from blockferry.client.plan import decide
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.regions import AllocationMap, Geometry, Provenance
from blockferry.v1 import replicas_pb2 as pb
from hypothesis import given
from hypothesis import strategies as st
from pyroaring import BitMap

REGION = 65536
GEOMETRY = Geometry(9 * REGION + 100, REGION)
PLAN = decide(
    AllocationMap(GEOMETRY, BitMap([0, 1, 2, 9]), Provenance.EXACT),
    AllocationMap(GEOMETRY, BitMap([2, 3, 9]), Provenance.EXACT),
)
MOST = 3 * REGION + 100
POOLS = [
    pb.Pool(name="fast", kind="clones", free=50 * REGION, reserve=47 * REGION),
    pb.Pool(name="bulk", kind="journal", free=100 * REGION, quota=8 * REGION),
]


@pytest.mark.parametrize(
    ("replica", "pool", "expected"),
    [
        (None, "", Forecast("fast", 50 * REGION, 47 * REGION, MOST, 0, 0)),
        (None, "bulk", Forecast("bulk", 100 * REGION, 0, MOST, 0, 8 * REGION)),
        (
            pb.Replica(pool="bulk", generation=0, bytes_held=REGION),
            "",
            Forecast("bulk", 100 * REGION, 0, MOST, REGION, 8 * REGION),
        ),
        (
            pb.Replica(pool="bulk", generation=2, bytes_held=REGION),
            "bulk",
            Forecast("bulk", 100 * REGION, 0, 2 * MOST, REGION, 8 * REGION),
        ),
        (pb.Replica(pool="fast", generation=2), "", Forecast("fast", 50 * REGION, 47 * REGION, MOST, 0, 0)),
    ],
    ids=["new", "new-in-a-pool", "first-sync", "journal", "clones"],
)
def test_of_which_pool_and_how_much(replica: pb.Replica | None, pool: str, expected: Forecast) -> None:
    assert forecast(PLAN, POOLS, replica, pool) == expected


def test_pools_that_a_sync_would_be_refused_for() -> None:
    with pytest.raises(BlockferryError, match="there is no pool slow") as caught:
        forecast(PLAN, POOLS, None, "slow")
    assert caught.value.code is Code.NOT_FOUND
    with pytest.raises(BlockferryError, match="v is not in pool fast: it exists in pool bulk") as caught:
        forecast(PLAN, POOLS, pb.Replica(volume="v", pool="bulk"), "fast")
    assert caught.value.code is Code.INVALID_ARGUMENT


@given(*[st.integers(0, 100)] * 5)
def test_it_fits_if_neither_reserve_nor_quota_is_broken(
    free: int, reserve: int, needed: int, held: int, quota: int
) -> None:
    found = Forecast("p", free, reserve, needed, held, quota)
    assert found.fits is (free - needed >= reserve and (quota == 0 or held + needed <= quota))
