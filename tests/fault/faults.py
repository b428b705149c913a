"""Injected failures of disk.py's functions, for servers inside the test's own process."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from blockferry.common import disk


class Injected:
    """Lets the `when`th call from now of `disk.NAME` fail with `number` (an errno). `seen` is what the file
    `look` held then."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        name: str,
        number: int,
        *,
        when: int = 1,
        look: Path | None = None,
    ) -> None:
        self.calls = 0
        self.failed = 0
        self.seen = ""
        self._patch = monkeypatch
        self._name = name
        self._real: Callable[..., Any] = getattr(disk, name)

        def maybe(*args: Any) -> Any:
            self.calls += 1
            if self.calls == when:
                self.failed += 1
                self.seen = look.read_text() if look is not None else ""
                raise OSError(number, os.strerror(number))
            return self._real(*args)

        monkeypatch.setattr(disk, name, maybe)

    def over(self) -> None:
        """The disk is whole again."""
        self._patch.setattr(disk, self._name, self._real)
