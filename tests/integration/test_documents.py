"""What the documents say is so: links go somewhere, every module is in README.md, its commands exist, and the example
client of docs/protocol.md does what it says against a real server."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from blockferry.client.cli.main import build_parser
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.rpc import to_status

from bench.peers import blockferry, serving

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
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


def test_commands_of_the_readme_are_commands() -> None:
    blocks = "".join(re.findall(r"^```\n(.*?)^```$", README, re.MULTILINE | re.DOTALL))
    lines = [line.split("#")[0] for line in blocks.splitlines() if line.startswith("blockferry ")]
    assert len(lines) == 6
    for line in lines:
        build_parser().parse_args(line.split()[1:])


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
    table = dict(re.findall(r"^\| (`[A-Z_`, ]+`) \| ([A-Z_]+) \|$", PROTOCOL, re.MULTILINE))
    listed = {reason: status for reasons, status in table.items() for reason in re.findall(r"[A-Z_]+", reasons)}
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
