"""What the command lines of both programs share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeVar

from blockferry.common.errors import BlockferryError

T = TypeVar("T")


def argument(parse: Callable[[str], T]) -> Callable[[str], T]:
    """`parse` as the type of an argument: what it refuses becomes a usage error with the same words."""

    def parsed(text: str) -> T:
        try:
            return parse(text)
        except BlockferryError as error:
            raise argparse.ArgumentTypeError(error.line()) from error

    return parsed
