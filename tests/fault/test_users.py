"""Client and server as two users who can do nothing but talk to each other.

Both are numbers without a name, without groups and privileges. Proves that every command works, that what each writes
is for its owner alone whatever the umask, that neither can read the other's directory, and that a file of the wrong
user is one clear line. Only root can start them.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fault.users import ServerOf, Stage, User, free_numbers, modes, why_not
from tests.filesystems import Unavailable, mounted
from tests.images import MIB, Hole, build, change, noise
from tests.support import Finished, refused, refused_json

SIZE = 6 * MIB
DIRECTORY, FILE = "40700", "100600"


class Sites:
    """Two users, the stage they act on, and a server with its pool."""

    def __init__(self, place: Path, disk: Path, umask: int) -> None:
        numbers = free_numbers()
        self.stage = Stage(place)
        self.umask = umask
        self.client = User.make(next(numbers), disk / "client")
        self.owner = User.make(next(numbers), disk / "server")
        self.pool = self.directory(self.owner, "pool")
        self.server = ServerOf(self.stage, self.owner, self.pool, place / "server.log", umask)
        self.source = self.own(self.client, build(self.client.home / "source.raw", SIZE, [(0, noise(1, 4 * MIB))]))

    def own(self, user: User, path: Path, mode: int = 0o600) -> Path:
        """Give a file to a user."""
        os.chown(path, user.number, user.number)
        path.chmod(mode)
        return path

    def directory(self, user: User, name: str) -> Path:
        """A directory of a user, mode 0700."""
        path = user.home / name
        path.mkdir()
        return self.own(user, path, 0o700)

    def run(self, *args: object) -> Finished:
        """`blockferry` as the client's user."""
        return self.stage.run(self.client, "blockferry", *args, umask=self.umask)

    def ok(self, *args: object) -> dict[str, Any]:
        """As `run`, with a report."""
        done = self.run(*args, "--json", "--quiet")
        assert (done.status, done.stderr) == (0, "")
        return done.report


@pytest.fixture(params=[0o000, 0o077], ids=["umask-000", "umask-077"])
def sites(request: pytest.FixtureRequest) -> Iterator[Sites]:
    if reason := why_not():
        pytest.skip(f"no two users: {reason}")
    # Nobody else can enter pytest's own temporary directories.
    place = Path(tempfile.mkdtemp(prefix="blockferry-users-"))
    try:
        place.chmod(0o711)
        with mounted("xfs", place) as disk:
            disk.chmod(0o711)
            sites = Sites(place, disk, request.param)
            sites.server.start()
            try:
                yield sites
            finally:
                sites.server.stop()
    except Unavailable as reason:
        pytest.skip(f"no pool that clones: {reason}")
    finally:
        shutil.rmtree(place)


def test_two_users_who_share_nothing(sites: Sites) -> None:
    url = f"{sites.server.address}/vm"
    owned = (sites.owner.number, sites.owner.number)

    # Everything works.
    assert sites.ok("plan", sites.source, url)["regions"]["send"] == 4
    assert sites.ok("sync", sites.source, url)["generation"] == 1
    change(sites.source, [(MIB, noise(2, 4096)), (3 * MIB, Hole(MIB))])
    report = sites.ok("sync", sites.source, url)
    assert (report["generation"], report["bytes"]["data_sent"], report["bytes"]["unmapped"]) == (2, 4096, MIB)
    assert sites.ok("verify", sites.source, url)["outcome"] == "equal"
    shown = sites.ok("replica", "show", url)
    assert (shown["generation"], shown["state"]) == (2, "CONSISTENT")
    assert [point["number"] for point in sites.ok("replica", "points", url)["points"]] == [2, 1]
    assert [replica["volume"] for replica in sites.ok("replica", "list", sites.server.address)["replicas"]] == ["vm"]
    assert sites.ok("replica", "verify", url)["outcome"] == "sound"
    assert sites.ok("sync", f"{url}@1", f"{sites.server.address}/back")["generation"] == 1
    assert sites.ok("volume", "show", sites.source)["size"] == SIZE
    assert Path(shown["path"]).read_bytes() == sites.source.read_bytes()
    assert sites.server.stop() == 0

    # What each has written is its own, whatever the umask.
    found = modes(sites.pool)
    assert {name for name in found if name.startswith("vm/") and not name.endswith((".img", ".digests"))} == {
        "vm/replica.json", "vm/commits.log", "vm/scrub.json", "vm/session.json", "vm/clean.json",
    }  # fmt: skip
    assert sum(name.endswith(".img") for name in found) == sum(name.endswith(".digests") for name in found) == 3
    directories = {".", "vm", "back"}
    assert {name: what for name, what in found.items() if name in directories} == dict.fromkeys(
        directories, (DIRECTORY, *owned)
    )
    files = found.keys() - directories
    assert {name: found[name] for name in files} == dict.fromkeys(files, (FILE, *owned))

    owned = (sites.client.number, sites.client.number)
    state = modes(sites.client.home / ".local")
    assert sum(name.endswith(".json") for name in state) == 2
    for name, what in state.items():
        assert what == (FILE if name.endswith(".json") else DIRECTORY, *owned), name


def test_neither_can_read_what_is_the_others(sites: Sites) -> None:
    url = f"{sites.server.address}/vm"
    sites.ok("sync", sites.source, url)
    image = Path(sites.ok("replica", "show", url)["path"])
    users = {sites.client: sites.owner, sites.owner: sites.client}
    for user, other in users.items():
        own, foreign = ([path for path in one.home.rglob("*") if path.is_file()] for one in (user, other))
        assert len(own) >= 2 and len(foreign) >= 2
        for path in own:
            assert sites.stage.run(user, "cksum", path).status == 0, path
        # Even with every directory open the files are closed.
        for mode in (0o700, 0o711):
            for directory in (other.home, *(path for path in other.home.rglob("*") if path.is_dir())):
                directory.chmod(mode)
            for path in foreign:
                done = sites.stage.run(user, "cksum", path)
                assert done.status == 1 and not done.stdout and "Permission denied" in done.stderr, path
            assert "Permission denied" in sites.stage.run(user, "ls", other.home).stderr
        for directory in (other.home, *(path for path in other.home.rglob("*") if path.is_dir())):
            directory.chmod(0o700)
    # The programs themselves cannot either, and say so.
    error = refused_json(sites.run("volume", "show", image, "--json"), "unreadable", str(image))
    assert error["cause"] == "permission denied"
    done = sites.stage.run(
        sites.owner, "blockferry-server", "--pool", sites.client.home, "--listen", "grpc://127.0.0.1:0"
    )
    refused(done, str(sites.client.home), "permission denied", program="blockferry-server")


@pytest.mark.parametrize("sites", [0o077], indirect=True)
def test_a_file_of_the_wrong_user_is_one_line(sites: Sites) -> None:
    url = f"{sites.server.address}/vm"
    sites.ok("sync", sites.source, url)

    os.chown(sites.source, sites.owner.number, sites.owner.number)
    for command in ("sync", "plan", "verify"):
        refused_json(
            sites.run(command, sites.source, url, "--quiet", "--json"),
            "unreadable",
            str(sites.source),
            "permission denied",
        )
    sites.own(sites.client, sites.source)

    # A state directory in which the commit id cannot be kept: then nothing is committed.
    state = sites.own(sites.owner, sites.client.home / ".local" / "state" / "blockferry" / "commits", 0o700)
    refused_json(sites.run("sync", sites.source, url, "--quiet", "--json"), "unreadable", str(state))
    assert sites.ok("replica", "show", url)["generation"] == 1
    sites.own(sites.client, state, 0o700)

    # The server's own files.
    image = Path(sites.ok("replica", "show", url)["path"])
    sites.own(sites.client, image)
    for words in (("verify", sites.source, url), ("replica", "verify", url), ("sync", url, f"{url}-copy")):
        refused_json(sites.run(*words, "--quiet", "--json"), "unreadable", str(image), "permission denied")
    sites.own(sites.owner, image)
    assert sites.ok("sync", sites.source, url)["generation"] == 2
    assert json.loads(sites.run("verify", sites.source, url, "--quiet", "--json").stdout)["outcome"] == "equal"


@pytest.mark.parametrize("sites", [0o077], indirect=True)
def test_whoever_writes_to_the_source_is_seen_without_privileges(sites: Sites) -> None:
    url = f"{sites.server.address}/vm"
    with sites.source.open("r+b"):
        # Root's descriptors cannot be looked at; a lease tells all the same.
        done = sites.run("sync", sites.source, url, "--quiet")
        refused(done, str(sites.source), "a process that cannot be seen from here", "--live")
        assert sites.ok("sync", sites.source, url, "--live")["generation"] == 1
    assert sites.ok("sync", sites.source, url)["generation"] == 2
