"""The strict reader: every mistake at once, each with its dotted path, and nothing secret in any of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import pytest
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.strict import Problem, Reads, leaves, read
from blockferry.common.units import parse_size
from hypothesis import given
from hypothesis import strategies as st


def _even(text: str) -> int:
    if not text.isdigit() or int(text) % 2:
        raise BlockferryError(Code.USAGE, f"{text!r} is odd", cause="so it seems", next="write an even one")
    return int(text)


Even = Annotated[int, Reads(_even, "an even number", numbers=True)]
Hidden = Annotated[int, Reads(_even, "an even number", secret=True)]
Size = Annotated[int, Reads(parse_size, "a size")]


class Leaf(msgspec.Struct, frozen=True):
    size: Size
    colour: Literal["red", "green"] = "red"
    hidden: Hidden = 0


class Root(msgspec.Struct, frozen=True):
    name: str = "nobody"
    count: Annotated[int, msgspec.Meta(ge=1, le=9)] = 1
    flag: bool = False
    even: Even | None = None
    one: Leaf | None = None
    many: dict[Annotated[str, Reads(str, "a name")], Leaf] = {}
    evens: dict[Even, Leaf] = {}
    words: tuple[str, ...] = ("a",)
    leaf: tuple[Leaf, ...] = ()


def lines(document: dict[str, Any]) -> list[str]:
    return [problem.line() for problem in read(Root, document)[1]]


def test_an_empty_document_is_all_defaults() -> None:
    assert read(Root, {}) == (Root(), [])


def test_what_is_right_is_read() -> None:
    document = {
        "name": "x",
        "count": 9,
        "flag": True,
        "even": 4,
        "one": {"size": "1K"},
        "many": {"b": {"size": "1M", "colour": "green"}, "a": {"size": "2M"}},
        "evens": {"2": {"size": "0"}},
        "words": [],
        "leaf": [{"size": "1", "hidden": "2"}],
    }
    found, problems = read(Root, document)
    assert problems == []
    assert found == Root(
        name="x",
        count=9,
        flag=True,
        even=4,
        one=Leaf(1024),
        many={"b": Leaf(1 << 20, "green"), "a": Leaf(2 << 20)},
        evens={2: Leaf(0)},
        words=(),
        leaf=(Leaf(1, hidden=2),),
    )
    assert list(found.many) == ["b", "a"], "the order of the file"


@pytest.mark.parametrize(
    ("document", "line"),
    [
        ({"nane": 1}, "nane: is not a known key; did you mean name?"),
        ({"one": {"size": "1", "coulor": "red"}}, "one.coulor: is not a known key; did you mean one.colour?"),
        ({"one": {"size": "1", "zzz": 1}}, "one.zzz: is not a known key; valid here: size, colour, hidden"),
        (
            {"a b\n\x1b[1m": 1},
            r'"a b\n\u001b[1m": is not a known key; valid here: ' + ", ".join(Root.__struct_fields__),
        ),
        ({"name": 5}, "name: must be text, not 5"),
        ({"name": True}, "name: must be text, not true"),
        ({"name": []}, "name: must be text, not an array"),
        ({"count": "5"}, 'count: must be a whole number from 1 to 9, not "5"'),
        ({"count": 10}, "count: must be a whole number from 1 to 9, not 10"),
        ({"count": 0}, "count: must be a whole number from 1 to 9, not 0"),
        ({"count": True}, "count: must be a whole number from 1 to 9, not true"),
        ({"count": 1.5}, "count: must be a whole number from 1 to 9, not 1.5"),
        ({"count": float("nan")}, "count: must be a whole number from 1 to 9, not NaN"),
        ({"count": 1 << 100000}, "count: must be a whole number from 1 to 9, not a very large number"),
        ({"flag": 1}, "flag: must be true or false, not 1"),
        ({"flag": "true"}, 'flag: must be true or false, not "true"'),
        ({"even": "5"}, "even: '5' is odd: so it seems; write an even one"),
        ({"even": 5}, "even: '5' is odd: so it seems; write an even one"),
        ({"even": True}, "even: must be an even number, not true or false"),
        ({"even": 2.0}, "even: must be an even number, not a number with a fraction"),
        ({"even": {}}, "even: must be an even number, not a table"),
        ({"even": 1 << 100000}, "even: 'a very large number' is odd: so it seems; write an even one"),
        ({"one": 1}, "one: must be a table, not a whole number"),
        ({"one": {}}, "one.size: is missing"),
        ({"one": {"size": 5}}, "one.size: must be a size, not a whole number"),
        ({"one": {"size": "1", "colour": "grey"}}, 'one.colour: must be "red" or "green", not "grey"'),
        ({"one": {"size": "1", "colour": 1}}, 'one.colour: must be "red" or "green", not 1'),
        ({"many": []}, "many: must be a table of named sections, not an array"),
        ({"many": {"x": "y"}}, "many.x: must be a table, not text"),
        ({"many": {"x y": {}}}, 'many."x y".size: is missing'),
        ({"evens": {"3": {"size": "1"}}}, "evens.3: '3' is odd: so it seems; write an even one"),
        ({"words": "a"}, "words: must be an array, not text"),
        ({"words": ["a", 1]}, "words[1]: must be text, not 1"),
        ({"leaf": {"size": "1"}}, "leaf: must be an array, not a table"),
        ({"leaf": [{"size": "1"}, {"size": "?"}]}, "leaf[1].size: '?' is not a size; write a number with K, M, G or T"),
    ],
)
def test_what_is_wrong_is_said_with_its_path(document: dict[str, Any], line: str) -> None:
    assert lines(document) == [line]


def test_everything_wrong_is_said_at_once_and_what_is_right_is_read() -> None:
    document = {
        "nome": 1,
        "count": 0,
        "flag": True,
        "one": {"colour": "blue"},
        "many": {"good": {"size": "1"}, "bad": {"size": "x", "hiden": 1}},
        "words": ["a", 2, "c"],
    }
    found, problems = read(Root, document)
    assert [problem.path for problem in problems] == [
        "nome",
        "count",
        "one.size",
        "one.colour",
        "many.bad.hiden",
        "many.bad.size",
        "words[1]",
    ]
    assert found == Root(flag=True, many={"good": Leaf(1)}, words=("a", "c"))


@pytest.mark.parametrize("value", ["hunter2", "hunter2\n" * 5, ["hunter2"], {"hunter2": "hunter2"}, 20202])
def test_a_secret_is_not_shown(value: object) -> None:
    (problem,) = read(Root, {"one": {"size": "1", "hidden": value}})[1]
    assert problem.path == "one.hidden"
    assert problem.cause.startswith("must be an even number")
    for secret in ("hunter2", "20202", "odd"):
        assert secret not in problem.line()


def test_no_message_grows_with_the_document() -> None:
    long = "x" * 100_000
    document = {long: 1, "even": long, "name": 1, "count": long, "many": {long: {"size": long, long: long}}}
    found = lines(document)
    assert len(found) == 6
    assert max(map(len, found)) < 600


def test_the_text_of_a_problem() -> None:
    assert Problem("a.b", "is wrong", "mend it").line() == "a.b: is wrong; mend it"
    assert Problem("", "is wrong").line() == "is wrong"


def test_the_keys_of_a_schema() -> None:
    assert leaves(Leaf) == ["size", "colour", "hidden"]
    assert leaves(Root) == [
        *("name", "count", "flag", "even"),
        *("one.size", "one.colour", "one.hidden"),
        *("many.NAME.size", "many.NAME.colour", "many.NAME.hidden"),
        *("evens.NAME.size", "evens.NAME.colour", "evens.NAME.hidden"),
        "words",
        *("leaf[].size", "leaf[].colour", "leaf[].hidden"),
    ]


# --- any document ---------------------------------------------------------------------------------------------------

_scalars = (
    st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["1K", "red", "2"])
    | st.datetimes()
    | st.dates()
    | st.times()
)
_keys = st.text(max_size=4) | st.sampled_from([*Root.__struct_fields__, *Leaf.__struct_fields__])
_values = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_keys, inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(_keys, _values, max_size=6))
def test_any_document_is_read_or_refused(document: dict[str, Any]) -> None:
    found, problems = read(Root, document)
    # What was kept is what the schema says, whatever the document said.
    assert isinstance(found.name, str) and isinstance(found.flag, bool) and 1 <= found.count <= 9
    assert found.even is None or found.even % 2 == 0
    assert all(isinstance(word, str) for word in found.words)
    for leaf in (*found.many.values(), *found.evens.values(), *found.leaf, *([found.one] if found.one else [])):
        assert leaf.size >= 0 and leaf.colour in ("red", "green")
    for problem in problems:
        assert problem.path and problem.cause
        assert problem.line().isprintable() or not problem.line().isascii()
    assert set(document) <= set(Root.__struct_fields__) or problems


def test_paths_are_values_like_any_other() -> None:
    class Placed(msgspec.Struct, frozen=True):
        path: Annotated[Path, Reads(Path, "a path")] = Path("/")

    assert read(Placed, {"path": "/a"}) == (Placed(Path("/a")), [])
