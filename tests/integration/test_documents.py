"""What the documents say is so: links go somewhere, every module is in README.md, commands and flags exist, failback is
the one line it is said to be, every file on disk, RPC and error is described, and the example client of
docs/protocol.md does what it says against a real server."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from blockferry.client import replica, snapshots, transfer
from blockferry.client.cli import export as cli_export
from blockferry.client.cli.main import DEFAULT_SCRATCH, build_parser
from blockferry.common import rpc
from blockferry.common.config import ClientLimits, LimitsConfig
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.nbd import answers, client, connection, export, rules
from blockferry.common.nbd import protocol as nbd_protocol
from blockferry.common.nbd import server as nbd_server
from blockferry.common.nbd.peer import Limits
from blockferry.common.retention import DEFAULT
from blockferry.common.rpc import to_status
from blockferry.common.volumes import nbd
from blockferry.server import (
    base,
    changes,
    clones,
    content,
    groups,
    identity,
    journal,
    pool,
    scrub,
    scrubber,
    space,
    store,
)
from blockferry.server.arguments import configuration
from blockferry.server.rehydrate import main as rehydrate
from blockferry.v1 import rehydration_pb2, replicas_pb2, replication_pb2

from bench.nbd import MOST_RATIO
from bench.peers import blockferry, script, serving
from tests.integration.test_interop import FORMATS, MOST_SECONDS
from tests.tables import document, first_word, table

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
DESIGN = (ROOT / "docs/design.md").read_text()
README = (ROOT / "README.md").read_text()
PROTOCOL = (ROOT / "docs/protocol.md").read_text()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_go_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)#][^)]*)\)", document.read_text())
    local = [link.split("#")[0] for link in links if "://" not in link]
    assert [link for link in local if not (document.parent / link).exists()] == []


def test_every_module_is_in_the_readme() -> None:
    modules = [
        path
        for root in ("client/blockferry/client", "server/blockferry/server", "common/blockferry/common")
        for path in (ROOT / root).rglob("*.py")
        if path.name != "__init__.py" and path.parent.name != "volumes"
    ]
    assert len(modules) > 20
    table = README[README.index("## Where to look") :]
    assert sorted({path.name for path in modules if f"{path.name}`" not in table}) == []


def code_blocks(document: Path) -> list[str]:
    """Lines of blocks that name no language, without their comments."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", document.read_text(), re.MULTILINE | re.DOTALL)
    blocks = "".join(block for language, block in fenced if not language)
    return [line.split(" #")[0].rstrip() for line in blocks.splitlines()]


def test_commands_of_the_documents_are_commands() -> None:
    lines = {path.name: [line.split() for line in code_blocks(path)] for path in DOCUMENTS}
    clients = [words for found in lines.values() for words in found if words[:1] == ["blockferry"]]
    servers = [words for found in lines.values() for words in found if words[:1] == ["blockferry-server"]]
    disks = [words for found in lines.values() for words in found if words[:1] == ["blockferry-rehydrate"]]
    assert (len(clients), len(servers), len(disks)) == (74, 8, 2)
    for words in disks:
        rehydrate.parser().parse_args(words[1:])
    for words in clients:
        build_parser().parse_args(words[1:])
    assert [words[1:] for words in servers if "--config" in words] == [["--config", "/etc/blockferry/server.toml"]] * 2
    parsed = {words[2]: configuration(words[1:]) for words in servers if "--config" not in words}
    (device,) = (found.device for name, found in parsed.items() if name.startswith("db="))
    assert {name: one.journal for name, one in device.items()} == {"db": Path("/srv/journal")}
    named = {words: found.pool for words, found in parsed.items() if found.pool}
    assert {words: [(name, str(pool.path)) for name, pool in pools.items()] for words, pools in named.items()} == {
        "/srv/replicas": [("main", "/srv/replicas")],
        "/srv/home": [("main", "/srv/home")],
        "fast=/srv/nvme": [("fast", "/srv/nvme"), ("bulk", "/srv/disks")],
    }


def test_commands_in_the_text_are_commands() -> None:
    spans = {span for path in DOCUMENTS for span in re.findall(r"`(blockferry [a-z][^`]*)`", path.read_text())}
    # In running text a command may be named without its arguments.
    complete = [span.split() for span in spans if "grpc://" in span]
    assert len(complete) == 2
    for words in complete:
        build_parser().parse_args(words[1:])
    known = re.findall(r"^    ([a-z]+)(?: |$)", build_parser().format_help(), re.MULTILINE)
    assert {
        "plan", "sync", "verify", "volume", "replica", "pool", "archive", "agent", "status", "rehydration", "pki",
        "config",
    } == set(known)  # fmt: skip
    assert {span.split()[1] for span in spans} <= set(known)


def test_flags_of_the_documents_exist() -> None:
    """Code that begins with a flag means one of ours; flags of other programs come after the program's name."""
    named = {flag for path in DOCUMENTS for flag in re.findall(r"`(--[a-z][a-z-]*)", path.read_text())}
    commands = (
        "sync",
        "plan",
        "replica demote",
        "replica adopt",
        "replica export",
        "agent sync",
        "rehydration snapshot",
        "archive create",
        "archive restore",
        "archive verify",
    )
    programs = ("blockferry-server", "blockferry-rehydrate")
    helped = [*map(run_help, programs), *(run_help("blockferry", *words.split()) for words in commands)]
    known = {flag for text in helped for flag in re.findall(r"--[a-z][a-z-]*", text)}
    assert {"--keep", "--keep-at-least", "--keep-changes", "--live"} <= named <= known


def run_help(program: str, *arguments: str) -> str:
    done = subprocess.run(
        [script(program), *arguments, "--help"], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout


def test_formats_and_bounds_of_the_volumes_are_those_that_are_tested() -> None:
    text = document("docs/volumes.md")
    assert [first_word(row) for row in table(text, "## Image formats").rows] == list(FORMATS)
    bounds = table(text, "## Bounds")
    values = [bounds.cells[row, "value"] for row in bounds.rows]
    mib = 1024 * 1024
    assert values == [
        f"{client.HANDSHAKE_SECONDS:g} s",
        f"{client.TIMEOUT_SECONDS:g} s",
        f"{connection.CLOSE_SECONDS:g} s",
        f"{client.CONNECTIONS}",
        f"{connection.MAX_REQUESTS}",
        f"{nbd_protocol.MAX_PAYLOAD // mib} MiB, or less if the server says so",
        f"{client.ZERO_SIZE // mib} MiB",
        f"{nbd.STATUS_REQUESTS}",
        f"{MOST_SECONDS:g} s",
        f"{MOST_RATIO:g} times",
    ]


def test_bounds_of_the_nbd_server_are_those_of_the_code() -> None:
    text, limits, mib = document("docs/nbd.md"), Limits(), 1024 * 1024
    bounds = table(text, "## Bounds")
    assert [bounds.cells[row, "value"] for row in bounds.rows] == [
        f"{limits.handshake:g} s",
        f"{limits.handshakes}",
        f"{limits.connections}",
        f"{limits.bytes_in_flight // mib} MiB",
        f"{limits.bytes_each // mib} MiB",
        f"{answers.PIECE // mib} MiB",
        f"{limits.requests}",
        f"{nbd_protocol.MAX_OPTION_PAYLOAD // 1024} KiB",
    ]
    joined = " ".join(text.split())
    assert f"of {export.SPARSE_LEAST // 1024} KiB and more" in joined
    assert f"DF up to {rules.DF_SIZE // mib} MiB" in joined
    assert f"finished for up to {nbd_server.CLOSE_SECONDS:g} s" in joined
    assert f"reads for {cli_export.PATIENCE_SECONDS:g} s" in joined
    assert f"`--scratch-limit` ({DEFAULT_SCRATCH // 1024**3}G)" in joined
    assert {one.name for one in nbd_protocol.Errno} - {"ENOMEM"} == set(
        re.findall(r"^\| (E[A-Z]+) \|", text, re.MULTILINE)
    )


def test_every_flag_of_sync_is_in_the_readme() -> None:
    flags = set(re.findall(r"--[a-z][a-z-]*", run_help("blockferry", "sync"))) - {"--help"}
    assert len(flags) == 16
    assert {flag for flag in flags if flag not in README} == set()


def test_failback_is_the_line_of_the_readme(tmp_path: Path) -> None:
    section = README[README.index("### Failback") : README.index("### Any file system")]
    (line,) = re.findall(r"^blockferry (sync .*?) +#", section, re.MULTILINE)
    content = b"away and back".ljust(3 << 20, b"\0")
    (tmp_path / "vm.raw").write_bytes(content)
    with serving(tmp_path / "away") as away, serving(tmp_path / "home") as home:
        line = line.replace("grpc://127.0.0.1:9870", away.address).replace("grpc://127.0.0.1:9871", home.address)
        words = line.split()
        assert words == ["sync", f"{away.address}/vm", f"{home.address}/vm"]
        state = tmp_path / "state"
        blockferry("sync", str(tmp_path / "vm.raw"), f"{away.address}/vm", state=state)
        there = blockferry(*words, state=state).report
        assert (there["outcome"], there["generation"]) == ("committed", 1)
        assert blockferry("plan", *words[1:], state=state).report["outcome"] == "planned"
        equal = blockferry("verify", f"{away.address}/vm@1", f"{home.address}/vm", state=state).report
        assert equal["outcome"] == "equal"
        shown = blockferry("replica", "show", f"{home.address}/vm", state=state).report
        assert Path(shown["path"]).read_bytes() == content


def test_every_file_of_a_replica_is_described() -> None:
    """The names that store.py, pool.py and commits.py give to files."""
    names = {store._IDENTITY, store.LOG, store._SESSION, store._PROGRESS, store._CLEAN, pool._LOCK}
    names |= {"work.img", "work.redo", base.IMAGE_NAME, pool.SEEDS, content.PROMOTED, scrub.NAME, identity.NAME}
    assert len(names) == 13
    names |= {
        f"{groups.PREFIX}ID",
        f"{snapshots.DIRECTORY}/POLICY.json",
        f"COMMIT-ID{clones.IMAGE}",
        f"COMMIT-ID{journal.REDO}",
        f"COMMIT-ID{journal.UNDO}",
        f"COMMIT-ID{store._DIGESTS}",
        store.NEW_PREFIX,
        "commits/REPLICA-UUID.json",
    }
    layout = DESIGN[DESIGN.index("## On disk") : DESIGN.index("## The house")]
    assert {name for name in names if name not in layout} == set()
    versions = f"now {store.FORMAT}. A newer server"
    assert versions in " ".join(layout.split())


def test_every_call_and_field_of_a_request_is_described() -> None:
    calls = {
        method.name
        for file in (replication_pb2, replicas_pb2, rehydration_pb2)
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    assert len(calls) == 22
    assert {call for call in calls if call not in PROTOCOL} == set()
    for message in ("OpenSessionRequest", "ApplyChangesRequest", "ApplyChangesResponse", "SessionCommit"):
        fields = replication_pb2.DESCRIPTOR.message_types_by_name[message].fields_by_name
        assert {name for name in fields if name not in PROTOCOL} == set()


def test_numbers_of_the_documents_are_those_of_the_code() -> None:
    """Bounds that people plan with."""
    mib = 1024 * 1024
    text = " ".join(DESIGN.split())
    assert f"every {changes.CHECKPOINT_BYTES // mib} MiB or {changes.CHECKPOINT_SECONDS:.0f} seconds" in text
    assert f"batches of {transfer.BATCH_SIZE // mib} MiB" in text
    half = transfer.BYTES_IN_FLIGHT // 2 // mib
    assert f"at most {half} MiB of buffers for source data and {half} MiB of changes" in text
    assert f"The server accepts {ClientLimits().bytes_in_flight // mib} MiB for all streams of a client" in text
    assert f"one message and twice a window of {rpc.WINDOW // mib} MiB at the server" in text
    assert f"After {replica.STALL_SECONDS:.0f} s without an acknowledgement" in text
    assert f"clock, {LimitsConfig().lease:.0f} s unless" in text
    assert f"for about {sum(replica.COMMIT_RETRY_SECONDS):.0f} seconds" in text
    noticed = 2 * rpc.KEEPALIVE_SECONDS, rpc.KEEPALIVE_SECONDS + rpc.PING_SECONDS
    assert "is given up after {} s, while data is under way after {} s".format(*noticed) in " ".join(PROTOCOL.split())
    pools = " ".join((ROOT / "docs/pools.md").read_text().split())
    gib = space.DEFAULT_RESERVE >> 30
    share = space.DEFAULT_RESERVE_SHARE
    assert f"The default is {gib}G, or {100 // share} % of a file system that is smaller than {gib * share}G" in pools
    assert f"checkpoint (256 MiB or 5 s) and at least every {space.LOOK_BYTES // mib} MiB" in pools
    assert f"at most {scrubber.SCRUB_RATE // mib} MiB/s. That is {scrubber.SCRUB_RATE * 86400 >> 40} TiB a day" in pools
    assert f"(at first `last={DEFAULT.last}`)" in " ".join(README.split())


def test_tests_that_documents_name_exist() -> None:
    named = {
        name
        for path in DOCUMENTS
        for name in re.findall(r"`(tests/\w+/\w+\.py|bench/\w+\.py|\w+\.py)`", path.read_text())
    }
    # Without a directory: those of continuity.md, which says where they are. All other modules are not tests.
    assert "Tests without a directory are in `tests/fault/`." in (ROOT / "docs/continuity.md").read_text()
    named = {
        name if "/" in name else f"tests/fault/{name}" for name in named if "/" in name or name.startswith("test_")
    }
    assert {name.rpartition("/")[0] for name in named} == {"tests/fault", "tests/integration", "tests/unit", "bench"}
    assert {name for name in named if not (ROOT / name).exists()} == set()


def test_decisions_are_numbered_and_titled() -> None:
    decisions = sorted((ROOT / "docs/decisions").glob("*.md"))
    assert [int(path.name[:4]) for path in decisions] == list(range(1, len(decisions) + 1))
    for path in decisions:
        assert path.read_text().startswith(f"# {int(path.name[:4])}. "), path.name


def test_make_targets_of_the_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        name for path in DOCUMENTS for name in re.findall(r"(?:^|`)make ([a-z]+)\b", path.read_text(), re.MULTILINE)
    }
    assert {"demo", "test", "check"} <= named <= targets


def test_continuous_integration_runs_the_command_of_the_readme() -> None:
    assert "\nmake test " in README
    assert (ROOT / ".ci/run").read_text().splitlines()[-1] == "exec make test"


def test_errors_are_listed_with_their_status() -> None:
    listed = dict(re.findall(r"^\| `([A-Z_]+)` \| ([A-Z_]+) \| [^|]+ \|$", PROTOCOL, re.MULTILINE))
    import grpc

    names = {code.value[0]: code.name for code in grpc.StatusCode}
    assert listed == {code.name: names[to_status(BlockferryError(code, "x")).code] for code in Code}


def test_the_example_client_works(tmp_path: Path) -> None:
    (example,) = re.findall(r"^```python\n(.*?)^```$", PROTOCOL, re.MULTILINE | re.DOTALL)
    with serving(tmp_path / "pool") as server:
        port = server.address.rpartition(":")[2]
        assert example.count("127.0.0.1:9870") == 1
        done = subprocess.run(
            [sys.executable, "-c", example.replace(":9870", f":{port}")],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.splitlines() == [
            "generation 1",
            "FAILED_PRECONDITION: STALE_EPOCH: run the sync again; it continues with what is already there",
        ]
        shown = blockferry("replica", "show", f"{server.address}/from-anywhere", state=tmp_path / "state").report
    image = Path(shown["path"]).read_bytes()
    assert image == bytes(4096) + b"hello".ljust((1 << 20) - 4096, b"\0")
