"""`blockferry config check`, and a server with a file that is wrong: everything that is wrong at once, or what it
means."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.support import PROGRAMS, Finished, ok, refused_json, run_cli
from tests.tables import ROOT

WRONG = """\
listn = ["grpc://127.0.0.1:9870"]
[pool.main]
path = "/srv/replicas"
reserve = "10 G"
[tls]
cert = "/c"
ca = "/a"
key = "-----BEGIN PRIVATE KEY-----"
[limits]
sessions = 0
"""

PROBLEMS = [
    ("listn", "is not a known key", "did you mean listen?"),
    ("tls.key", "must be the absolute path of a file with a private key", "what is there instead is not shown"),
    ("pool.main.reserve", "'10 G' is not a size", "write a number with K, M, G or T"),
    ("limits.sessions", "must be a whole number from 1 to 1000000, not 0", ""),
]


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text(WRONG)
    expected = [f"{file}: {path}: {cause}" + (f"; {step}" if step else "") for path, cause, step in PROBLEMS]
    done = run_cli("config", "check", file)
    assert (done.status, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [f"blockferry: {line}" for line in expected]

    found = run_cli("config", "check", file, "--json")
    assert found.status == 1
    error = found.report["error"]
    assert error["code"] == "invalid-argument"
    assert [(one["path"], one["cause"], one["next"]) for one in error["problems"]] == PROBLEMS

    words = [str(PROGRAMS / "blockferry-server"), "--config", str(file)]
    served = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert (served.returncode, served.stdout) == (1, "")
    assert served.stderr.splitlines() == [f"blockferry-server: {line}" for line in expected]
    assert "BEGIN" not in done.stderr + found.stdout + served.stderr


def test_what_a_right_file_means(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text(
        "scrub_every = '7d'\n[pool.main]\npath = '/srv/replicas'\nreserve = '10G'\n"
        "keep_at_least = { last = 3, daily = 7 }\n"
        "[pool.slow]\npath = '/srv/slow'\nquota = '1T'\n[limits]\nsessions = 20\n"
    )
    done = run_cli("config", "check", file)
    assert (done.status, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        f"{file} is a valid configuration of blockferry-server",
        "  listens on   grpc://127.0.0.1:9870",
        "  pool main    /srv/replicas: 10.0 GiB reserved, no quota, keeps at least last=3,daily=7",
        "  pool slow    /srv/slow: the default reserve, a quota of 1.0 TiB, keeps at least last=3",
        "  scrubs       every 7d",
        "  lease        1m",
        "  messages     up to 17.0 MiB",
        "  limits       20 sessions, 1024 calls on 256 connections, 4000 calls per second, 256.0 MiB in flight",
        "  each client  32 sessions, 256 calls on 64 connections, 2000 calls per second, 64.0 MiB in flight",
    ]
    report = ok("config", "check", file)
    assert (report["schema"], report["file"], report["kind"]) == (1, str(file), "server")
    assert report["configuration"]["pool"]["main"] == {
        "path": "/srv/replicas",
        "reserve": 10 << 30,
        "quota": 0,
        "journal_limit": 0,
        "keep_at_least": {"last": 3, "hourly": 0, "daily": 7, "weekly": 0, "monthly": 0, "yearly": 0},
    }
    assert report["configuration"]["limits"]["sessions"] == 20


def test_what_the_file_of_an_agent_means(tmp_path: Path) -> None:
    file = tmp_path / "agent.toml"
    file.write_text(
        "status_page = '127.0.0.1:9871'\n[limits]\nbandwidth = '200M'\n"
        "[policy.db]\nsource = '/srv/db.raw'\ndestination = 'grpc://127.0.0.1:9870/db'\nrpo = '5m'\ngroup = 'erp'\n"
        "[policy.x]\nsource = '/dev/sdb'\ndestination = 'grpc://127.0.0.1:9870/x'\nrpo = '90s'\nsnapshot = 'none'\n"
    )
    done = run_cli("config", "check", file)
    assert (done.status, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        f"{file} is a valid configuration of blockferry-agent",
        "  listens on  grpc+unix:///run/blockferry/agent.sock",
        "  policy db   /srv/db.raw -> grpc://127.0.0.1:9870/db every 5m, snapshots by reflink, changes by reflink, in "
        "group erp",
        "  policy x    /dev/sdb -> grpc://127.0.0.1:9870/x every 90s, without snapshots, changes by digests",
        "  metrics     http://127.0.0.1:9871/metrics",
        "  limits      4 transfers at once, 64.0 MiB in flight, 200.0 MiB/s",
        "  state       /var/lib/blockferry/agent",
    ]
    report = ok("config", "check", file)
    assert (report["kind"], report["configuration"]["policy"]["db"]["rpo"]) == ("agent", 300)
    done = run_cli("config", "check", ROOT / "deploy/agent.toml")
    assert done.status == 0


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    refused_json(run_cli("config", "check", tmp_path / "absent", "--json"), "not-found", "cannot read")
    file = tmp_path / "broken.toml"
    file.write_text("[pool.main\npath = 1\n")
    done: Finished = run_cli("config", "check", file)
    (line,) = done.stderr.splitlines()
    assert done.status == 1 and "this is not TOML" in line and "line 1, column 11" in line
