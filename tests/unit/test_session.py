"""The states of a replica: every event in every state, from the table that the documentation draws."""

from __future__ import annotations

import itertools

import pytest
from blockferry.common.errors import BlockferryError, Code
from blockferry.server.session import Event, State, state_at_rest, transition
from blockferry.v1 import replicas_pb2 as pb

ALLOWED = {
    "EMPTY": {"OPEN": "SYNCING"},
    "SYNCING": {"OPEN": "SYNCING", "COMMIT": "CONSISTENT", "CLOSE": "SYNCING"},
    "CONSISTENT": {"OPEN": "UPDATING", "PROMOTE": "PROMOTED"},
    "UPDATING": {
        "OPEN": "UPDATING",
        "COMMIT": "CONSISTENT",
        "CLOSE": "CONSISTENT",
        "PROMOTE": "PROMOTED",
    },
    "PROMOTED": {"DEMOTE": "CONSISTENT"},
}

PAIRS = [pytest.param(*pair, id=f"{pair[0].name}-{pair[1].name}") for pair in itertools.product(State, Event)]


@pytest.mark.parametrize(("state", "event"), PAIRS)
def test_every_event_in_every_state(state: State, event: Event) -> None:
    after = ALLOWED[state.name].get(event.name)
    if after is not None:
        assert transition("db", state, event) is State[after]
        return
    with pytest.raises(BlockferryError) as caught:
        transition("db", state, event)
    error = caught.value
    assert (error.code, error.volume) == (Code.WRONG_STATE, "db")
    assert state.value in error.cause
    assert error.next


def test_the_states_have_the_names_of_the_contract() -> None:
    names = {name.removeprefix("REPLICA_STATE_") for name in pb.ReplicaState.keys()}  # noqa: SIM118
    assert {state.value for state in State} == names - {"UNSPECIFIED"} == set(ALLOWED)


@pytest.mark.parametrize(
    ("committed", "started", "promoted", "state"),
    [
        (False, False, False, State.EMPTY),
        (False, True, False, State.SYNCING),
        (True, False, False, State.CONSISTENT),
        (True, True, False, State.CONSISTENT),
        (True, True, True, State.PROMOTED),
        (True, False, True, State.PROMOTED),
    ],
)
def test_the_state_at_rest_comes_from_what_is_on_disk(
    committed: bool, started: bool, promoted: bool, state: State
) -> None:
    assert state_at_rest(committed=committed, started=started, promoted=promoted) is state
