"""Strict reading: from a document (what a TOML parser returns) to a frozen struct, with everything wrong said at once
(pure).

The schema is a msgspec struct. Its fields may be structs, `dict[str, T]` (a table of named sections), `tuple[T, ...]`
(an array), `T | None` (may be left out), whatever `msgspec.convert` checks by itself, with `msgspec.Meta` as its range,
and `Annotated[T, Reads(...)]`: text that means something. Unlike `msgspec.convert` the walk does not end at the first
mistake, and knows the nearest key to an unknown one.
"""

from __future__ import annotations

import difflib
import json
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, cast

import msgspec
from blockferry.common.errors import BlockferryError

S = TypeVar("S", bound=msgspec.Struct)

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+", re.ASCII)
_LONGEST_KEY = 64
"""Characters of a key that are shown, and of what a parser says of a value: a document may be all one key."""
_LONGEST_TEXT = 300
_MOST_BITS = 256

_KINDS: list[tuple[type | tuple[type, ...], str]] = [
    (bool, "true or false"),
    (str, "text"),
    (int, "a whole number"),
    (float, "a number with a fraction"),
    (Mapping, "a table"),
    (list, "an array"),
]


@dataclass(frozen=True)
class Reads:
    """In `Annotated`: `parse` makes the value from its text, or raises BlockferryError."""

    parse: Callable[[str], object]
    what: str
    """What is expected, for whoever wrote something else, such as `a size such as "10G"`."""
    numbers: bool = False
    """A whole number counts as its digits."""
    secret: bool = False
    """A value that is wrong is not shown: it might be what the right one only points to."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: the dotted path of its key, what is wrong with it, and what to do."""

    path: str
    cause: str
    next: str = ""

    def line(self) -> str:
        """All of it in one line."""
        text = f"{self.path}: {self.cause}" if self.path else self.cause
        return f"{text}; {self.next}" if self.next else text


class _Wrong:
    """Stands for a value that had a problem."""


_WRONG = _Wrong()


def read(schema: type[S], document: Mapping[str, object]) -> tuple[S, list[Problem]]:
    """The struct a document describes, and everything wrong with the document; where something is, the struct has the
    default in its place. Every field of `schema` itself has a default."""
    walk = _Walk()
    found = walk.table(schema, document, "")
    return cast(S, found), walk.problems


class _Walk:
    def __init__(self) -> None:
        self.problems: list[Problem] = []

    def _wrong(self, path: str, cause: str, next: str = "") -> _Wrong:
        self.problems.append(Problem(path, _shortened(cause), next))
        return _WRONG

    def value(self, kind: Any, value: object, path: str) -> object:
        """A value of `kind`, or _WRONG."""
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            return self.table(kind, value, path)
        origin, parameters = typing.get_origin(kind), typing.get_args(kind)
        if origin in (types.UnionType, typing.Union):
            (one,) = (one for one in parameters if one is not types.NoneType)
            return self.value(one, value, path)
        if origin is dict:
            return self._sections(parameters[0], parameters[1], value, path)
        if origin is tuple:
            return self._array(parameters[0], value, path)
        reads = next((one for one in getattr(kind, "__metadata__", ()) if isinstance(one, Reads)), None)
        return self._text(reads, value, path) if reads is not None else self._plain(kind, value, path)

    def table(self, schema: type[msgspec.Struct], value: object, path: str) -> object:
        """A struct with every field that is right; _WRONG if it needs one that is not."""
        if not isinstance(value, Mapping):
            return self._wrong(path, f"must be a table, not {_kind_of(value)}")
        kinds = typing.get_type_hints(schema, include_extras=True)
        self._refuse_unknown(value, kinds, path)
        fields: dict[str, object] = {}
        complete = True
        for field in msgspec.structs.fields(schema):
            below = join(path, field.name)
            found: object = _WRONG
            if field.name in value:
                found = self.value(kinds[field.name], value[field.name], below)
            elif field.required:
                self._wrong(below, "is missing")
            if found is not _WRONG:
                fields[field.name] = found
            elif field.required:
                complete = False
        return schema(**fields) if complete else _WRONG

    def _refuse_unknown(self, value: Mapping[str, object], known: Mapping[str, Any], path: str) -> None:
        for name in value:
            if name not in known:
                nearest = difflib.get_close_matches(name[:_LONGEST_KEY], known, 1)
                hint = f"did you mean {join(path, nearest[0])}?" if nearest else f"valid here: {', '.join(known)}"
                self._wrong(join(path, name), "is not a known key", hint)

    def _sections(self, name_kind: Any, kind: Any, value: object, path: str) -> object:
        if not isinstance(value, Mapping):
            return self._wrong(path, f"must be a table of named sections, not {_kind_of(value)}")
        found = {}
        for name, section in value.items():
            below = join(path, name)
            results = self.value(name_kind, name, below), self.value(kind, section, below)
            if _WRONG not in results:
                found[results[0]] = results[1]
        return found

    def _array(self, kind: Any, value: object, path: str) -> object:
        if not isinstance(value, list):
            return self._wrong(path, f"must be an array, not {_kind_of(value)}")
        found = [self.value(kind, one, f"{path}[{index}]") for index, one in enumerate(value)]
        return tuple(one for one in found if one is not _WRONG)

    def _text(self, reads: Reads, value: object, path: str) -> object:
        number = reads.numbers and isinstance(value, int) and not isinstance(value, bool)
        if not isinstance(value, str) and not number:
            return self._wrong(path, f"must be {reads.what}, not {_kind_of(value)}")
        try:
            return reads.parse(value if isinstance(value, str) else _digits(value))
        except BlockferryError as error:
            if reads.secret:
                return self._wrong(path, f"must be {reads.what}", "what is there instead is not shown")
            return self._wrong(path, ": ".join(filter(None, (error.what, error.cause))), error.next)

    def _plain(self, kind: Any, value: object, path: str) -> object:
        try:
            return msgspec.convert(value, kind)
        except msgspec.ValidationError:
            return self._wrong(path, f"must be {_expected(kind)}, not {_shown(value)}")


def join(path: str, name: str) -> str:
    """The dotted path of a key in a table, quoted as TOML would have it."""
    if len(name) > _LONGEST_KEY:
        name = f"{name[:_LONGEST_KEY]}..."
    shown = name if _BARE_KEY.fullmatch(name) else json.dumps(name)
    return f"{path}.{shown}" if path else shown


def leaves(schema: type[msgspec.Struct], path: str = "") -> list[str]:
    """The dotted paths of all keys of a schema; `NAME` stands for the name of a section, `[]` for an array of them."""
    found: list[str] = []
    kinds = typing.get_type_hints(schema, include_extras=True)
    for name in schema.__struct_fields__:
        found += _leaves_of(kinds[name], join(path, name))
    return found


def _leaves_of(kind: Any, path: str) -> list[str]:
    origin, parameters = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        (one,) = (one for one in parameters if one is not types.NoneType)
        return _leaves_of(one, path)
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return leaves(kind, path)
    if origin is dict:
        return _leaves_of(parameters[1], f"{path}.NAME")
    if origin is tuple and isinstance(parameters[0], type) and issubclass(parameters[0], msgspec.Struct):
        return _leaves_of(parameters[0], f"{path}[]")
    return [path]


def _kind_of(value: object) -> str:
    return next((name for kind, name in _KINDS if isinstance(value, kind)), "a date or time")


def _expected(kind: Any) -> str:
    """In words, for kinds that need no parser of their own."""
    if typing.get_origin(kind) is Literal:
        options: Sequence[str] = typing.get_args(kind)
        return " or ".join(f'"{option}"' for option in options)
    meta: Sequence[object] = getattr(kind, "__metadata__", ())
    base = typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind
    text = {bool: "true or false", int: "a whole number", str: "text"}[base]
    for one in meta:
        if isinstance(one, msgspec.Meta):
            text += f" from {one.ge}" + (f" to {one.le}" if one.le is not None else "")
    return text


def _shown(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return _digits(value)
    return _shortened(json.dumps(value)) if isinstance(value, bool | float | str) else _kind_of(value)


def _digits(value: object) -> str:
    # Hexadecimal numbers of any length can be written, and Python refuses to print the longest.
    return str(value) if isinstance(value, int) and value.bit_length() < _MOST_BITS else "a very large number"


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}..."
