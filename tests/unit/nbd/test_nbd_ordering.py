"""Changes that overlap take their turns in the order in which they came; all others never wait."""

from __future__ import annotations

from blockferry.common.nbd.ordering import Ordering, Span
from blockferry.common.regions import BLOCK_SIZE
from hypothesis import given
from hypothesis import strategies as st

B = BLOCK_SIZE


class Changes:
    """Changes of an `Ordering`, by name."""

    def __init__(self) -> None:
        self.ordering = Ordering()
        self.begun: list[str] = []
        self.spans: dict[str, Span] = {}

    def enter(self, name: str, offset: int, length: int) -> bool:
        span = self.ordering.enter(offset, length, lambda later: self._begin(name, later))
        if span is not None:
            self._begin(name, span)
        return span is not None

    def _begin(self, name: str, span: Span) -> None:
        self.begun.append(name)
        self.spans[name] = span

    def leave(self, name: str) -> None:
        self.ordering.leave(self.spans.pop(name))


def test_what_does_not_overlap_goes_on() -> None:
    changes = Changes()
    assert changes.enter("a", 0, B)
    assert changes.enter("b", B, B)
    assert changes.enter("c", 10 * B, 5)
    assert changes.ordering.running == 3
    assert not changes.enter("d", 10 * B + 4000, 1), "the same block"
    changes.leave("b")
    assert changes.begun == ["a", "b", "c"]
    changes.leave("c")
    assert changes.begun == ["a", "b", "c", "d"]
    assert (changes.ordering.running, changes.ordering.waiting) == (2, 0)


def test_nobody_overtakes_who_waits() -> None:
    changes = Changes()
    assert changes.enter("first", 0, B)
    assert not changes.enter("wide", 0, 10 * B)
    # It would not be in the way of what is under way, but of what has been waiting for longer.
    assert not changes.enter("late", 9 * B, B)
    assert changes.enter("elsewhere", 20 * B, B)
    changes.leave("first")
    assert changes.begun == ["first", "elsewhere", "wide"]
    changes.leave("wide")
    assert changes.begun[-1] == "late"


@given(st.lists(st.one_of(st.tuples(st.integers(0, 12 * B), st.integers(1, 4 * B)), st.integers(0, 20)), max_size=60))
def test_any_history(steps: list[tuple[int, int] | int]) -> None:
    """Against a list of all that came: a change runs exactly if nothing before it that is not over overlaps it."""
    changes = Changes()
    alive: list[tuple[str, Span]] = []
    for number, step in enumerate(steps):
        if isinstance(step, tuple):
            offset, length = step
            name = str(number)
            changes.enter(name, offset, length)
            alive.append((name, (offset // B * B, -(-(offset + length) // B) * B)))
        else:
            running = [name for name, _ in alive if name in changes.spans]
            if not running:
                continue
            over = running[step % len(running)]
            alive = [one for one in alive if one[0] != over]
            changes.leave(over)
        expected = {
            name
            for index, (name, span) in enumerate(alive)
            if not any(span[0] < other[1] and other[0] < span[1] for _, other in alive[:index])
        }
        assert set(changes.spans) == expected
        assert changes.ordering.running == len(expected)
        assert changes.ordering.waiting == len(alive) - len(expected)
