"""Fixtures of the tests of archives."""

from __future__ import annotations

from pathlib import Path

import pytest
from blockferry.client import nodes, packer

from tests.unit.archive.site import Site

SMALL_CHUNK = 1024 * 1024
"""Bytes of a data chunk in these tests: three blocks that do not pack, and a trailer."""
SMALL_META = 512
"""Bytes of a metadata chunk: a small leaf or two."""


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks of little data. Readers do not mind."""
    monkeypatch.setattr(packer, "CHUNK_SIZE", SMALL_CHUNK)


@pytest.fixture
def site(tmp_path: Path, small_chunks: None) -> Site:
    """One that is new."""
    return Site(tmp_path / "staging")


@pytest.fixture
def small_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes of at most four entries, and chunks for one or two of them."""
    from blockferry.common.archive import tree

    monkeypatch.setattr(tree, "MAX_ENTRIES", 4)
    monkeypatch.setattr(nodes, "CHUNK_SIZE", SMALL_META)
