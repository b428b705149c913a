"""Servers that are told everything by a configuration file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tests.support import PROGRAMS, Server

Settings = Mapping[str, str]
"""Dotted keys and their values as TOML writes them."""


def document(settings: Settings) -> str:
    """The file that says so: keys without a section first, then a section for each."""
    sections: dict[str, list[str]] = {}
    for path, value in sorted(settings.items(), key=lambda item: "." in item[0]):
        section, _, key = path.rpartition(".")
        sections.setdefault(section, []).append(f"{key} = {value}")
    return "\n".join(
        line for section, lines in sections.items() for line in ([f"[{section}]"] if section else []) + lines
    )


class Configured(Server):
    """A server that is started with `--config` and nothing else, with a pool called main."""

    def __init__(self, pool: Path, settings: Settings) -> None:
        super().__init__(pool)
        self.file = pool.with_name(f"{pool.name}.toml")
        base = {"listen": '["grpc://127.0.0.1:0"]', "pool.main.path": f'"{pool}"'}
        self.file.write_text(document({**base, **settings}))

    @property
    def words(self) -> list[str]:
        """The command line."""
        return [str(PROGRAMS / "blockferry-server"), "--config", str(self.file)]
