"""Death in the middle of handing over: SIGKILL of a real server at each crash point of promoting, demoting, deleting
and adopting, and at those of a commit that a demotion passes, in both kinds of pools.

After each death the newest generation and every recovery point are byte for byte what was committed, no file lies
about that nobody needs, what was promoted or adopted is whole, and the command can be given again.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import blockferry.common
import blockferry.server
import pytest

from tests.fault.raw import REGION, Raw, Refused
from tests.fault.stage import KILLED, DoomedServer
from tests.images import BLOCK, Hole, change, noise
from tests.support import own_directory, until

NAMES = frozenset(
    {
        "promote-copying", "promote-image-flushed", "promote-image-made", "promote-recorded",
        "demote-taken-back", "demote-recorded",
        "delete-renamed",
        "adopt-recorded", "adopt-moved",
    }
)  # fmt: skip
"""The crash points gone through here, each in every kind of pool that has it; all others belong to
test_crash_points.py."""

KINDS = {"clones": "xfs_pool_root", "journal": "ext4_pool_root"}
SIZE = 8 * REGION + 3 * BLOCK + 100
VOLUME = "v"
SEED = "old.raw"


def content(number: int) -> bytes:
    """What a generation holds."""
    image = bytearray(noise("base", SIZE))
    image[number * REGION : (number + 1) * REGION] = noise(f"generation {number}", REGION)
    image[5 * REGION : 6 * REGION] = bytes(REGION)
    return bytes(image)


def commit(raw: Raw, number: int) -> None:
    """Make `content(number)` the newest generation."""
    image = content(number)
    session = raw.open(VOLUME, SIZE).session
    for offset in range(0, SIZE, REGION):
        raw.write(session, offset, image[offset : offset + REGION])
    raw.commit(VOLUME, session, number.to_bytes(16, "big"))


@dataclass
class Scene:
    """One replica on a server of its own. `contents`: what each recovery point must hold."""

    server: DoomedServer
    kind: str
    contents: dict[int, bytes] = field(default_factory=dict)

    @property
    def directory(self) -> Path:
        """The replica's."""
        return self.server.pool / VOLUME

    @property
    def promoted(self) -> Path:
        """What was handed out."""
        return self.directory / "promoted.img"

    def start(self) -> Raw:
        """Start the server; a client of it."""
        self.server.start()
        return Raw(self.server.address)

    def dies(self, name: str, act: Callable[[Raw], object]) -> Raw:
        """Let the server die at its next pass of a crash point, in `act`, and start another; a client of that one."""
        self.server.doom = f"{name}:1"
        with self.start() as raw, pytest.raises(Refused):
            act(raw)
        until(lambda: self.server.status() == KILLED, f"the server dies at {name}", 10)
        self.server.doom = ""
        return self.start()

    def verify(self, raw: Raw, *, promoted: bool = False, work: bool = False) -> None:
        """Every point holds what it must, and nothing else lies about."""
        points = raw.points(VOLUME)
        assert [point.number for point in points] == sorted(self.contents, reverse=True)
        for point in points:
            assert raw.read(VOLUME, point.number, 0, point.size) == self.contents[point.number], point.number
            assert not point.problem
        assert (raw.state(VOLUME) == "PROMOTED") == promoted
        if self.kind == "journal" and not work:
            # It is being applied.
            until(lambda: raw.show(VOLUME).path != "", "the journal is applied")
        assert {path.name for path in self.server.pool.iterdir()} == {
            ".blockferry-lock",
            ".blockferry-pool",
            ".seeds",
            VOLUME,
        }
        files = {path.name for path in self.directory.iterdir()}
        ids = [point.commit_id.hex() for point in points]
        needed = {"replica.json", "commits.log", "session.json"} if points else {"replica.json", "commits.log"}
        needed |= {"promoted.img"} if promoted else set()
        allowed = needed | {"progress.json", "clean.json", *(f"{name}.digests" for name in ids)}
        if self.kind == "clones":
            needed |= {f"{name}.img" for name in ids}
        elif ids:
            needed |= {"image.raw"} | {f"{name}.undo{suffix}" for name in ids[1:] for suffix in ("", ".index")}
        if work:
            allowed |= {"work.img", "image.raw", "session.json", "work.redo", "work.redo.index"}
        allowed |= needed
        assert files <= allowed, f"nobody needs {sorted(files - allowed)}"
        assert needed <= files, f"{sorted(needed - files)} are missing"

    def goes_on(self, raw: Raw) -> None:
        """The next commit succeeds, and leaves exactly what is needed."""
        number = max(self.contents, default=0) + 1
        commit(raw, number)
        self.contents[number] = content(number)
        self.verify(raw)


Scenes = Callable[[bool], Scene]


@pytest.fixture(scope="module", params=KINDS)
def pools(request: pytest.FixtureRequest) -> Iterator[Mapping[bool, Path]]:
    """Pools to copy, in which two generations are committed; in the second one the older of them is promoted and was
    worked on."""
    root = own_directory(request.getfixturevalue(KINDS[request.param]), "handover-crashes") / request.param
    pool = root / "committed"
    (pool / ".seeds").mkdir(parents=True)
    server = DoomedServer(pool)
    server.start()
    with Raw(server.address) as raw:
        for number in (1, 2):
            commit(raw, number)
        until(lambda: raw.show(VOLUME).path != "", "the journal is applied")
        shutil.copytree(pool, root / "as-committed")
        raw.promote(VOLUME, 1)
        change(pool / VOLUME / "promoted.img", [(0, noise("worked on", BLOCK)), (3 * REGION, Hole(REGION))])
    server.stop()
    yield {False: root / "as-committed", True: pool}
    shutil.rmtree(root.parent)


@pytest.fixture
def scenes(pools: Mapping[bool, Path], tmp_path: Path) -> Iterator[Scenes]:
    """Makes scenes, promoted or not."""
    made: list[Scene] = []

    def make(promoted: bool) -> Scene:
        root = pools[False].parent
        pool = root / f"pool-of-{tmp_path.name}"
        shutil.copytree(pools[promoted], pool)
        made.append(Scene(DoomedServer(pool), root.name, {n: content(n) for n in (1, 2)}))
        return made[-1]

    yield make
    for scene in made:
        scene.server.kill()
        shutil.rmtree(scene.server.pool)


def passed(scene: Scene, name: str) -> bool:
    """Whether a kind ever gets there: clones need no copy, and nothing is cloned where there is a journal."""
    never = {"clones": {"promote-copying", "commit-undo-captured"}, "journal": {"open-cloned"}}
    return name not in never[scene.kind]


PROMOTING = [
    ("promote-copying", 1),
    ("promote-image-flushed", 2),
    ("promote-image-made", 1),
    ("log-before-fsync", 2),
    ("promote-recorded", 1),
]
"""(crash point, the point that is promoted)"""

DEMOTING = [
    ("open-cloned", True),
    ("demote-taken-back", True),
    ("commit-undo-captured", True),
    ("commit-renamed", True),
    ("commit-recorded", False),
    ("demote-recorded", True),
]
"""(crash point, whether changes are kept)"""

ADOPTING = ["adopt-recorded", "adopt-moved"]


@pytest.mark.parametrize(("name", "number"), PROMOTING)
def test_dies_while_it_promotes(scenes: Scenes, name: str, number: int) -> None:
    scene = scenes(False)
    if not passed(scene, name):
        return
    with scene.dies(name, lambda raw: raw.promote(VOLUME, number)) as raw:
        # A process that dies leaves what it has written, also what it has not flushed.
        recorded = name in ("promote-recorded", "log-before-fsync")
        scene.verify(raw, promoted=recorded)
        assert raw.promote(VOLUME, number).generation == number
        scene.verify(raw, promoted=True)
        assert scene.promoted.read_bytes() == content(number)
        raw.demote(VOLUME, keep_changes=True)
        scene.contents[3] = content(number)
        scene.verify(raw)
        scene.goes_on(raw)


@pytest.mark.parametrize(("name", "keep"), DEMOTING)
def test_dies_while_it_demotes(scenes: Scenes, name: str, keep: bool) -> None:
    scene = scenes(True)
    if not passed(scene, name):
        return
    worked_on = scene.promoted.read_bytes()
    assert worked_on != content(1)
    with scene.dies(name, lambda raw: raw.demote(VOLUME, keep_changes=keep)) as raw:
        if name in ("commit-recorded", "demote-recorded"):
            scene.contents[3] = worked_on if keep else content(2)
            scene.verify(raw)
            with pytest.raises(Refused, match="CONSISTENT"):
                raw.demote(VOLUME, keep_changes=keep)
        else:
            scene.verify(raw, promoted=True, work=True)
            assert scene.promoted.read_bytes() == worked_on
            # Another fate than the one that was under way: nothing is left of that.
            fate = not keep if name == "demote-taken-back" else keep
            assert raw.demote(VOLUME, keep_changes=fate).generation == 3
            scene.contents[3] = worked_on if fate else content(2)
            scene.verify(raw)
        scene.goes_on(raw)


def test_dies_while_it_deletes(scenes: Scenes) -> None:
    scene = scenes(False)
    with scene.dies("delete-renamed", lambda raw: raw.delete(VOLUME)) as raw:
        assert {path.name for path in scene.server.pool.iterdir()} == {".blockferry-lock", ".blockferry-pool", ".seeds"}
        with pytest.raises(Refused, match="no replica"):
            raw.delete(VOLUME)
        scene.contents.clear()
        scene.goes_on(raw)


@pytest.mark.parametrize("name", ADOPTING)
def test_dies_while_it_adopts(scenes: Scenes, name: str) -> None:
    scene = scenes(False)
    shutil.rmtree(scene.directory)
    scene.contents.clear()
    seed = scene.server.pool / ".seeds" / SEED
    seed.write_bytes(content(2))
    with scene.dies(name, lambda raw: raw.adopt(VOLUME, SEED)) as raw:
        scene.verify(raw, work=True)
        assert raw.state(VOLUME) == "SYNCING"
        if name == "adopt-moved":
            with pytest.raises(Refused) as caught:
                raw.adopt(VOLUME, SEED)
            assert caught.value.reason == "NOT_FOUND", "it is where it belongs"
        else:
            assert seed.read_bytes() == content(2)
            assert raw.adopt(VOLUME, SEED).size == SIZE
        assert not seed.exists()
        found = [path for one in ("work.img", "image.raw") if (path := scene.directory / one).exists()]
        assert [path.read_bytes() for path in found] == [content(2)]
        scene.goes_on(raw)


def test_every_name_of_handing_over_is_gone_through() -> None:
    point = re.compile(r"crash_point\(\s*\"([^\"]+)\"")
    found = {
        name
        for package in (blockferry.server, blockferry.common)
        for path in Path(str(package.__file__)).parent.rglob("*.py")
        for name in point.findall(path.read_text())
    }
    assert {name for name in found if name.split("-")[0] in ("promote", "demote", "delete", "adopt")} == NAMES
    tried = {name for name, _ in PROMOTING} | {name for name, _ in DEMOTING} | {*ADOPTING, "delete-renamed"}
    assert tried >= NAMES
