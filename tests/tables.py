"""Tables of the documents, for tests that hold them against the code."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Table:
    """One table: the names of its rows and columns as they are written, and its cells by both."""

    columns: list[str]
    rows: list[str]
    cells: dict[tuple[str, str], str]
    """(row, column) -> text"""


def document(name: str) -> str:
    """A document of the repository."""
    return (ROOT / name).read_text()


def table(text: str, heading: str) -> Table:
    """The first table below a heading; every row must be complete and named once."""
    (_, below) = re.split(rf"^{re.escape(heading)}$", text, maxsplit=1, flags=re.MULTILINE)
    lines = re.search(r"(?:^\|.*\|\n)+", below, re.MULTILINE)
    assert lines is not None, f"no table below {heading!r}"
    head, rule, *body = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines[0].splitlines()]
    assert set("".join(rule)) == {"-"}, rule
    columns, rows = head[1:], [row[0] for row in body]
    assert len(set(columns)) == len(columns) and len(set(rows)) == len(rows), "a name is there twice"
    assert {len(row) for row in body} == {len(head)}, "a row is not complete"
    cells = {(row[0], column): text for row in body for column, text in zip(columns, row[1:], strict=True)}
    return Table(columns, rows, cells)


def code(text: str) -> str:
    """The first thing in a text that is set as code."""
    found = re.search(r"`([^`]+)`", text)
    assert found is not None, f"nothing is set as code in {text!r}"
    return found[1]


def first_word(text: str) -> str:
    """What a row is about: the text before a colon, without its quotes."""
    return text.split(":")[0].strip("`")
