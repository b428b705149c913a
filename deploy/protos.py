"""Generate `blockferry.v1` from protos/: `python -m deploy.protos [--check]`.

Only messages and their type stubs are generated: calls and handlers are made from the service descriptors at run time
(`blockferry.common.rpc`). `--check` writes nothing and exits 1 if the committed code is not what would be generated.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
GENERATED = ROOT / "common"
PATTERN = "blockferry/v1/*_pb2.py*"


def generate(target: Path) -> None:
    """Write the generated modules of every .proto below `target`; raise RuntimeError where protoc fails."""
    sources = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.rglob("*.proto"))
    if protoc.main(["protoc", f"-I{PROTOS}", f"--python_out={target}", f"--pyi_out={target}", *sources]) != 0:
        raise RuntimeError("protoc failed; its message is above")


def contents(root: Path) -> dict[str, bytes]:
    """The generated files below `root`: path relative to it, and bytes."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.glob(PATTERN))}


def stale() -> list[str]:
    """Files that are missing, left over or not what protos/ says."""
    with tempfile.TemporaryDirectory() as directory:
        generate(Path(directory))
        fresh = contents(Path(directory))
    committed = contents(GENERATED)
    return sorted(name for name in fresh.keys() | committed.keys() if fresh.get(name) != committed.get(name))


def main() -> int:
    """Exit status: 0 done or current, 1 not current."""
    parser = argparse.ArgumentParser(description="Generate blockferry.v1 from protos/.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the code is not current")
    if not parser.parse_args().check:
        for name in contents(GENERATED):
            (GENERATED / name).unlink()
        generate(GENERATED)
        return 0
    found = stale()
    for name in found:
        print(f"common/{name} is not what protos/ says; run make protos", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
