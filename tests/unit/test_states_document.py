"""The transitions that docs/states.md draws are those of server/session.py, cell by cell and in both directions:
neither can change alone."""

from __future__ import annotations

import itertools

import pytest
from blockferry.common.errors import BlockferryError
from blockferry.server.session import TRANSITIONS, Event, State, transition

from tests.tables import code, document, first_word, table

SECTION = "## Transitions"
DRAWN = table(document("docs/states.md"), SECTION)
PAIRS = [pytest.param(*pair, id=f"{pair[0].name}-{pair[1].name}") for pair in itertools.product(State, Event)]


def test_every_state_and_every_event_is_drawn_once() -> None:
    assert [code(name) for name in DRAWN.columns] == [state.value for state in State]
    assert [first_word(name) for name in DRAWN.rows] == [event.name for event in Event]


@pytest.mark.parametrize(("state", "event"), PAIRS)
def test_a_cell_is_what_happens(state: State, event: Event) -> None:
    (cell,) = [
        text
        for (row, column), text in DRAWN.cells.items()
        if (first_word(row), code(column)) == (event.name, state.value)
    ]
    after = TRANSITIONS.get((state, event))
    if after is not None:
        assert cell == f"`{after.value}`"
        return
    with pytest.raises(BlockferryError) as caught:
        transition("db", state, event)
    assert cell == f"refused: `{caught.value.code.name}`"


def test_there_are_no_transitions_but_those_drawn() -> None:
    drawn = {
        (code(column), first_word(row)): code(cell)
        for (row, column), cell in DRAWN.cells.items()
        if not cell.startswith("refused")
    }
    assert drawn == {(state.value, event.name): after.value for (state, event), after in TRANSITIONS.items()}


def test_every_state_is_explained_and_is_in_the_picture() -> None:
    text = document("docs/states.md")
    explained = table(text, "# The states of a replica")
    assert [code(name) for name in explained.rows] == [state.value for state in State]
    picture = text.split("```")[1]
    for state in State:
        assert state.value in picture
    for event in {event for _, event in TRANSITIONS}:
        assert event.name.lower() in picture
