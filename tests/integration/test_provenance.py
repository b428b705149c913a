"""All nine combinations of what the two sites can prove, from real things: bytes and regions by exact count.

map            as a source                                    as a destination
exact          a raw image                                    a pool on XFS
conservative   a device with the metadata of its thin pool    as below, with what an interrupted session has zeroed
absent         an NBD server without block status             a pool on a file system that calls everything data
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from blockferry.common.regions import Provenance
from blockferry.common.volumes import DeviceVolume, NbdVolume, Volume, open_volume
from blockferry.common.volumes.device import ThinProof

from tests.filesystems import MUTE, FileSystems, Unavailable
from tests.images import BLOCK, KIB, Zeros, build, noise
from tests.library import replicated, synced
from tests.nbd import nbdkit
from tests.processes import loop_device
from tests.support import Server, command

REGION = 64 * KIB
SIZE = 6 * REGION

E, C, A = Provenance.EXACT, Provenance.CONSERVATIVE, Provenance.ABSENT

# What the two sides hold, by region:
#
#            0       1       2       3       4                   5
#   source   zeros   zeros   data    data    data                zeros
#   replica  zeros   data    zeros   data    data, but a block   zeros; data, before they were unmapped
#
# The thin pool has mapped region 0, and not 1 and 5. Actions: skip (.), unmap, send, compare; and how often the
# destination reads each region: a compared one to hash it, where it differs to find the blocks, and after the change to
# check it, unless the change describes every block.
TABLE: dict[tuple[Provenance, Provenance], tuple[str, str]] = {
    (E, E): (".uscc.", "000130"),
    (E, C): ("uuccc.", "002130"),
    (E, A): ("uucccu", "002130"),
    (C, E): ("suscc.", "000130"),
    (C, C): ("cuccc.", "102130"),
    (C, A): ("cucccu", "102130"),
    (A, E): ("scsccs", "020130"),
    (A, C): ("cccccs", "122130"),
    (A, A): ("cccccc", "122131"),
}

THIN_METADATA = """<superblock uuid="" time="1" transaction="3" version="2" data_block_size="128" nr_data_blocks="99">
  <device dev_id="1" mapped_blocks="4" transaction="0" creation_time="0" snap_time="1">
    <single_mapping origin_block="0" data_block="0" time="0"/>
    <range_mapping origin_begin="2" data_begin="10" length="3" time="0"/>
  </device>
</superblock>
"""


@contextlib.contextmanager
def unnamed_loop_device(image: Path) -> Iterator[Path]:
    """A device over an image that has lost its name: the file behind it proves nothing any more."""
    with loop_device(image) as device:
        image.unlink()
        yield Path(device)


@contextlib.asynccontextmanager
async def source_of(known: Provenance, image: Path, directory: Path) -> AsyncIterator[Volume]:
    """The image as a source with such a map."""
    with contextlib.ExitStack() as stack:
        volume: Volume
        if known is E:
            volume = await open_volume(str(image))
        elif known is C:
            (directory / "thin.xml").write_text(THIN_METADATA)
            device = stack.enter_context(unnamed_loop_device(image))
            volume = await DeviceVolume.open(
                device, thin=ThinProof(directory / "thin.xml", f"0 {SIZE // 512} thin 254:2 1")
            )
        else:
            served = stack.enter_context(nbdkit(directory, "--readonly", "--no-sr", "file", image))
            volume = await NbdVolume.open(served.uri)
        try:
            yield volume
        finally:
            await volume.close()


def interrupted(source: Path, url: str) -> None:
    """A sync whose client dies when all is transferred: what it has done stays, uncommitted."""
    words = ["env", "BLOCKFERRY_CRASH_POINT=client-transferred:1", *command("sync", source, url, "--quiet")]
    assert subprocess.run(words, check=False).returncode == -signal.SIGKILL


@pytest.fixture
def pool(request: pytest.FixtureRequest, file_systems: FileSystems, volume: str) -> Iterator[Server]:
    """A server on the file system that is asked for."""
    try:
        directory = file_systems.directory(request.param) / volume
    except Unavailable as error:
        pytest.skip(str(error))
    directory.mkdir()
    server = Server(directory, flags=("--reserve", "0", "--lease", "1")).start()
    yield server
    server.stop()


async def sync_image(image: Path, server: Server, volume: str, state: Path) -> None:
    source = await open_volume(str(image))
    try:
        await synced(source, server, volume, state, region_size=REGION)
    finally:
        await source.close()


async def prepare(server: Server, volume: str, known: Provenance, directory: Path) -> None:
    """Bring the replica to what it holds before the sync that counts, with such a map and no digest known."""
    before = {region: (region * REGION, noise(region, REGION)) for region in (1, 3, 4, 5)}
    first = build(directory / "first.img", SIZE, before.values())
    await sync_image(first, server, volume, directory / "state")
    pieces = [before[region] for region in (1, 3, 4)]
    # Only region 5 is unmapped: of the others nothing comes to be known.
    second = build(directory / "second.img", SIZE, [(0, Zeros(REGION)), (2 * REGION, Zeros(REGION)), *pieces])
    if known is C:
        interrupted(second, server.url(volume))
    else:
        await sync_image(second, server, volume, directory / "state")
        # A server that was killed vouches for no digest.
        server.kill()
        server.start()


@pytest.mark.parametrize(
    ("pool", "known"),
    [("xfs" if known[1] is E else MUTE, known) for known in TABLE],
    ids=[f"{ours.value}, {theirs.value}" for ours, theirs in TABLE],
    indirect=["pool"],
)
async def test_what_is_read_follows_from_both_maps(
    pool: Server, volume: str, known: tuple[Provenance, Provenance], tmp_path: Path
) -> None:
    actions, reads = TABLE[known]
    await prepare(pool, volume, known[1], tmp_path)
    data = bytearray(noise(4, REGION))
    data[5 * BLOCK : 6 * BLOCK] = noise("changed", BLOCK)
    pieces = [(2 * REGION, noise(2, REGION)), (3 * REGION, noise(3, REGION)), (4 * REGION, bytes(data))]
    image = build(tmp_path / "source.img", SIZE, pieces)
    expected = image.read_bytes()

    async with source_of(known[0], image, tmp_path) as source:
        report = await synced(source, pool, volume, tmp_path / "state")

    assert (report["source_map"], report["destination_map"]) == (known[0].value, known[1].value)
    names = {"skip": ".", "unmap": "u", "send": "s", "compare": "c"}
    assert report["regions"] == {name: actions.count(letter) for name, letter in names.items()}
    moved = report["bytes"]
    # The source reads what its own map does not prove to be zeros, once.
    assert moved["source_read"] == {E: 3, C: 4, A: 6}[known[0]] * REGION
    assert moved["destination_read"] == sum(map(int, reads)) * REGION
    # Whatever is known, the same travels and is written.
    assert moved["data_sent"] == moved["destination_written"] == REGION + BLOCK
    assert replicated(pool, volume) == expected
