"""The states of a replica and what moves it between them (pure).

EMPTY ----open----> SYNCING ---commit---> CONSISTENT ---open---> UPDATING ---commit---> CONSISTENT
                       |  ^                   ^  |                  |
                       +--+ open, close       |  +----promote--> PROMOTED
                                              +--- close ----------+
"""

from __future__ import annotations

import enum

from blockferry.common.errors import BlockferryError, Code


class State(enum.Enum):
    """What a replica is. The names are those of the wire contract."""

    EMPTY = "EMPTY"
    SYNCING = "SYNCING"
    CONSISTENT = "CONSISTENT"
    UPDATING = "UPDATING"
    PROMOTED = "PROMOTED"


class Event(enum.Enum):
    """What happens to a replica."""

    OPEN = "open a session"
    COMMIT = "commit"
    CLOSE = "end the session"
    PROMOTE = "promote"
    DEMOTE = "demote"


TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.EMPTY, Event.OPEN): State.SYNCING,
    (State.SYNCING, Event.OPEN): State.SYNCING,
    (State.SYNCING, Event.COMMIT): State.CONSISTENT,
    (State.SYNCING, Event.CLOSE): State.SYNCING,
    (State.CONSISTENT, Event.OPEN): State.UPDATING,
    (State.CONSISTENT, Event.PROMOTE): State.PROMOTED,
    # Taking over an expired session: the new one replaces it.
    (State.UPDATING, Event.OPEN): State.UPDATING,
    (State.UPDATING, Event.COMMIT): State.CONSISTENT,
    (State.UPDATING, Event.CLOSE): State.CONSISTENT,
    # Promotion drains and fences the session first.
    (State.UPDATING, Event.PROMOTE): State.PROMOTED,
    (State.PROMOTED, Event.DEMOTE): State.CONSISTENT,
}

_NEXT_STEP = {
    State.EMPTY: "sync to it first",
    State.SYNCING: "let its first sync finish",
    State.PROMOTED: "demote it first",
}


def transition(volume: str, state: State, event: Event) -> State:
    """The state after `event`, or WRONG_STATE."""
    after = TRANSITIONS.get((state, event))
    if after is None:
        raise BlockferryError(
            Code.WRONG_STATE,
            f"cannot {event.value}",
            cause=f"the replica is {state.value}",
            next=_NEXT_STEP.get(state, "look at it with blockferry replica show"),
            volume=volume,
        )
    return after


def state_at_rest(*, committed: bool, started: bool, promoted: bool) -> State:
    """The state without a session, derived from what is on disk."""
    if promoted:
        return State.PROMOTED
    if committed:
        return State.CONSISTENT
    return State.SYNCING if started else State.EMPTY
