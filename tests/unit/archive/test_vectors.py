"""Frozen bytes: what was written once is read for ever. Only that which zstd has packed may be written differently: its
output is free to change between releases of zstd."""

from __future__ import annotations

from pathlib import Path

import pytest
from blockferry.common.archive import format
from blockferry.common.archive.columns import decode_node, decode_remap, decode_trailer
from blockferry.common.archive.keys import Secret, unwrap

from tests.unit.archive import examples
from tests.unit.archive.examples import ATTEMPT

DIRECTORY = Path(__file__).with_name("vectors")
NAMES = sorted(path.name for path in DIRECTORY.iterdir())


def frozen(name: str) -> bytes:
    path = DIRECTORY / name
    return path.read_bytes() if name.endswith(".json") else bytes.fromhex(path.read_text())


def test_there_is_one_of_everything() -> None:
    expected = {name if name.endswith(".json") else f"{name}.hex" for name in examples.vectors()}
    assert set(NAMES) == expected


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith((".json", ".body.hex"))])
def test_what_is_not_packed_is_written_as_ever(name: str) -> None:
    assert examples.vectors()[name.removesuffix(".hex")] == frozen(name)


@pytest.mark.parametrize("name", examples.RECORDS)
def test_records(name: str) -> None:
    record = examples.RECORDS[name]
    assert format.decode(frozen(f"{name}.json"), type(record), name) == record


def test_bodies() -> None:
    assert decode_node(frozen("leaf.body.hex"), "leaf") == examples.LEAF
    assert decode_node(frozen("inner.body.hex"), "inner") == examples.INNER
    assert decode_trailer(frozen("trailer.body.hex"), "trailer") == examples.TRAILER
    assert decode_trailer(frozen("trailer-bare.body.hex"), "trailer") == examples.BARE
    assert decode_remap(frozen("remap.body.hex"), "remap") == examples.MOVES


@pytest.mark.parametrize("how", ["plain", "encrypted"])
@pytest.mark.parametrize("name", examples.FRAMES)
def test_frames(name: str, how: str) -> None:
    kind, body, number, offset = examples.FRAMES[name]
    sealer = examples.sealers()[how]
    frame = frozen(f"{name}.{how}.frame.hex")
    assert sealer.open_frame(kind, frame, name, number=number, offset=offset) == (ATTEMPT, body)


@pytest.mark.parametrize("how", ["plain", "encrypted"])
@pytest.mark.parametrize(("name", "data", "block"), [("block", examples.BLOCK, 3), ("noise", examples.NOISE, 1 << 40)])
def test_blocks(name: str, data: bytes, block: int, how: str) -> None:
    sealer = examples.sealers()[how]
    stored = frozen(f"{name}.{how}.block.hex")
    assert sealer.digest(data) == stored[1:33]
    assert sealer.open_block(ATTEMPT, block, stored[0], stored[33:], len(data), stored[1:33]) == data


@pytest.mark.parametrize(
    ("name", "secret"), [("key-key-file", examples.KEY_FILE), ("key-passphrase", examples.PASSPHRASE)]
)
def test_keys(name: str, secret: Secret) -> None:
    key = format.decode(frozen(f"{name}.json"), format.Key, name)
    assert unwrap(secret, key, name) == examples.KEY
