"""The map of an LVM thin volume from its pool's metadata, made by thin-provisioning-tools.

This is no live pool: a loop device stands for the volume, since not every kernel has device-mapper.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.regions import Provenance
from blockferry.common.volumes import DeviceVolume
from blockferry.common.volumes.device import ThinProof

from tests.images import BLOCK, MIB, build, noise
from tests.processes import loop_device

REGION = 65536

METADATA = """<superblock uuid="" time="1" transaction="3" version="2" data_block_size="128" nr_data_blocks="4096">
  <device dev_id="1" mapped_blocks="3" transaction="0" creation_time="0" snap_time="1">
    <single_mapping origin_block="0" data_block="0" time="0"/>
    <range_mapping origin_begin="16" data_begin="10" length="2" time="0"/>
  </device>
  <device dev_id="7" mapped_blocks="2100" transaction="1" creation_time="1" snap_time="1">
    <range_mapping origin_begin="5" data_begin="20" length="2100" time="1"/>
  </device>
  <device dev_id="9" mapped_blocks="0" transaction="2" creation_time="1" snap_time="1"/>
</superblock>
"""


@pytest.fixture(scope="module")
def thin_dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What thin_dump says of metadata that thin_restore has made, as the kernel's would be."""
    directory = tmp_path_factory.mktemp("thin")
    (directory / "in.xml").write_text(METADATA)
    with (directory / "metadata").open("wb") as file:
        file.truncate(4 * MIB)
    words = ["thin_restore", "-i", str(directory / "in.xml"), "-o", str(directory / "metadata")]
    subprocess.run(words, check=True, capture_output=True)
    with (directory / "dump.xml").open("wb") as out:
        subprocess.run(["thin_dump", str(directory / "metadata")], stdout=out, check=True)
    return directory / "dump.xml"


@pytest.mark.parametrize(
    ("device_id", "expected"), [(1, [0, 16, 17]), (7, list(range(5, 2105))), (9, [])], ids=["few", "many", "none"]
)
async def test_a_thin_volume_is_proven_through_its_pool(
    backing: Path, thin_dump: Path, device_id: int, expected: list[int]
) -> None:
    size = 256 * MIB
    build(backing, size, [(0, noise(1, BLOCK))])
    with loop_device(backing) as device:
        proof = ThinProof(thin_dump, f"0 {size // 512} thin 254:2 {device_id}")
        volume = await DeviceVolume.open(Path(device), thin=proof)
        found = await volume.allocation(REGION)
        assert (found.provenance, list(found.regions)) == (Provenance.CONSERVATIVE, expected)
        await volume.close()


async def test_a_thin_volume_is_refused_where_its_pool_proves_nothing(backing: Path, thin_dump: Path) -> None:
    build(backing, MIB)
    with loop_device(backing) as device:
        for table, code in [
            ("0 2048 thin 254:2 1 254:9", Code.UNSUPPORTED),
            ("0 4096 thin 254:2 1", Code.SIZE_MISMATCH),
            ("0 2048 thin 254:2 2", Code.NOT_FOUND),
            ("0 2048 linear 254:2 1", Code.INVALID_ARGUMENT),
        ]:
            with pytest.raises(BlockferryError) as caught:
                await DeviceVolume.open(Path(device), thin=ThinProof(thin_dump, table))
            assert caught.value.code is code
        with pytest.raises(BlockferryError, match="for reading"):
            await DeviceVolume.open(Path(device), writable=True, thin=ThinProof(thin_dump, "0 2048 thin 254:2 1"))
