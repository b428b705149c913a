"""Agents and servers as processes: policies are kept within their RPO whatever becomes of others; reloads, pauses,
requests, metrics, and two agents that get into each other's way."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.agents import Agent
from tests.certificates import Issuer
from tests.images import MIB, build, change, noise
from tests.reflected import Reflected
from tests.support import Finished, Server, finish, own_directory, refused, refused_json, run_cli, start_cli, until

REGION = 64 * 1024
SLOW = 2 * MIB
"""Bytes per second of transfers that are to be looked at while they last."""

MakeAgent = Callable[..., Agent]


@pytest.fixture
def root(xfs_pool_root: Path) -> Path:
    """A directory of this test on a file system that clones files."""
    return own_directory(xfs_pool_root, "agent")


@pytest.fixture
def make_agent(root: Path) -> Iterator[MakeAgent]:
    """Makes agents, with a directory each; all are stopped at the end."""
    made: list[Agent] = []

    def make(policies: dict[str, dict[str, Any]], **sections: Any) -> Agent:
        made.append(Agent(root / f"agent-{len(made)}", policies, **sections))
        return made[-1]

    try:
        yield make
    finally:
        for agent in made:
            agent.kill()


def source(root: Path, name: str, size: int = 4 * MIB) -> Path:
    """An image with noise in half of it."""
    return build(root / f"{name}.raw", size, [(0, noise(name, size // 2))])


def policy(server: Server, image: Path, volume: str, **said: Any) -> dict[str, Any]:
    """One that is not due again while a test lasts."""
    return {"source": str(image), "destination": server.url(volume), "rpo": "1h", "region_size": "64K", **said}


def test_policies_are_kept_within_their_rpo_whatever_becomes_of_others(
    root: Path, make_agent: MakeAgent, start_cloning_server: Callable[..., Server]
) -> None:
    server = start_cloning_server()
    images = {name: source(root, name) for name in ("a", "b", "g1", "g2")}
    policies = {
        name: policy(server, image, name, rpo="5s", **({"group": "g"} if name.startswith("g") else {}))
        for name, image in images.items()
    }
    told = root / "told"
    tell = f'echo "$BLOCKFERRY_EVENT $BLOCKFERRY_POLICY $BLOCKFERRY_FAILURES $BLOCKFERRY_CODE" >> {told}'
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for name, port in (("refused", 1), ("silent", silent.getsockname()[1])):
            gone = {"destination": f"grpc://127.0.0.1:{port}/{name}", "rpo": "5s"}
            policies[name] = policy(server, source(root, name), name) | gone
        agent = make_agent(
            {**policies, "nowhere": policy(server, root / "nowhere.raw", "nowhere")},
            **{"policy.refused.hooks": {"failure": ["/bin/sh", "-c", tell]}},
        ).start()
        until(lambda: all(agent.generation(name) >= 3 for name in images), "all have three generations")
        shown = agent.policies()
    assert {name for name, one in shown.items() if one["failures"]} >= {"refused", "nowhere"}
    assert not agent.events("RPO missed", policy="a") and not agent.events("RPO missed", policy="g1")
    one, other = (shown[name]["last_committed"] for name in ("g1", "g2"))
    assert (one["began_at"], one["seconds"]) == (other["began_at"], other["seconds"]), "they are committed together"
    error = shown["refused"]["last_error"]
    assert (error["code"], shown["refused"]["state"]) == ("unavailable", "backing-off")
    assert "127.0.0.1:1" in error["message"] and error["next"]
    assert shown["nowhere"]["last_error"]["code"] == "not-found"
    lines = told.read_text().splitlines()
    failed = [line for line in lines if line.startswith("run-failed")]
    assert failed[:2] == ["run-failed refused 1 unavailable", "run-failed refused 2 unavailable"]
    assert "rpo-missed refused" in told.read_text()
    assert agent.stop() == 0
    for name, image in images.items():
        assert server.image(name).read_bytes() == image.read_bytes()


def test_only_what_changed_is_looked_at_and_counted(
    root: Path, make_agent: MakeAgent, start_cloning_server: Callable[..., Server]
) -> None:
    server = start_cloning_server()
    image = source(root, "a", 8 * MIB)
    agent = make_agent({"a": policy(server, image, "a")}).start()
    until(lambda: agent.generation("a") == 1, "it is replicated")
    before = agent.metrics()
    first = agent.policy("a")["last_committed"]
    assert (first["data_sent"], first["volume_size"]) == (4 * MIB, 8 * MIB)
    assert first["full_compare"] == "no changes were tracked"
    assert before['blockferry_policy_state{policy="a",state="waiting"}'] == 1

    change(image, [(MIB, noise("changed", 3 * 4096))])
    second = agent.sync("a")["last_committed"]
    assert (second["generation"], second["data_sent"], second["full_compare"]) == (2, 3 * 4096, None)
    after = agent.metrics()
    # The image is in regions of 64 KiB: one of them has changed.
    expected = {
        'regions_total{decision="compare",policy="a"}': 1,
        'regions_total{decision="send",policy="a"}': 0,
        'regions_total{decision="skip",policy="a"}': 127,
        'regions_total{decision="unmap",policy="a"}': 0,
        'decided_bytes_total{decision="compare",policy="a"}': REGION,
        'bytes_total{policy="a",what="data_sent"}': 3 * 4096,
        'bytes_total{policy="a",what="source_read"}': REGION,
        'bytes_total{policy="a",what="unmapped"}': 0,
        'avoided_bytes_total{policy="a"}': 8 * MIB - 3 * 4096,
        'runs_begun_total{policy="a"}': 1,
        'runs_committed_total{policy="a"}': 1,
        'run_seconds_count{policy="a"}': 1,
        'full_compares_total{policy="a"}': 0,
        'policy_generation{policy="a"}': 1,
    }
    delta = {name: after[f"blockferry_{name}"] - before[f"blockferry_{name}"] for name in expected}
    assert delta == expected
    assert not any(name.startswith("blockferry_errors_total") for name in after)
    server.kill()
    error = refused_json(run_cli("agent", "sync", "a", "--wait", "--json", "--agent", agent.address), "unavailable")
    assert error["next"]
    failed = agent.metrics()
    assert failed['blockferry_errors_total{code="unavailable",policy="a"}'] >= 1
    assert failed['blockferry_runs_committed_total{policy="a"}'] == 2
    server.start()
    assert agent.sync("a")["last_committed"]["generation"] == 3


def test_retention_and_regions_are_those_of_the_policy(
    root: Path, make_agent: MakeAgent, start_cloning_server: Callable[..., Server]
) -> None:
    server = start_cloning_server(flags=("--keep-at-least", "last=0"))
    snapshots = root / "elsewhere"
    rules = ("last", "hourly", "daily", "weekly", "monthly", "yearly")
    agent = make_agent({})
    agent.configure(
        {
            rule: policy(server, source(root, rule), rule, region_size="128K", snapshot_dir=str(snapshots))
            for rule in rules
        },
        **{f"policy.{rule}.keep": {rule: 1} for rule in rules},
    )
    agent.start()
    until(lambda: all(agent.generation(rule) == 1 for rule in rules), "all are replicated")
    for rule in rules:
        (point,) = run_cli("replica", "points", server.url(rule), "--json").report["points"]
        assert point["kept_by"] == ["newest", rule]
        assert server.show(rule)["region_size"] == 128 * 1024
        assert any(rule in path.name for path in snapshots.iterdir())


def test_sighup_while_something_is_on_its_way(
    root: Path, make_agent: MakeAgent, start_cloning_server: Callable[..., Server]
) -> None:
    server = start_cloning_server()
    image = source(root, "a", 64 * MIB)
    slow = policy(server, image, "a", bandwidth=SLOW)
    agent = make_agent({"a": slow}).start()
    until(lambda: (agent.policy("a")["progress"] or {}).get("bytes_done", 0) > 0, "it is on its way")
    # Half of a file: whoever writes it is not done yet.
    whole = agent.file.read_text()
    agent.file.write_text(whole[: whole.index("rpo =") + 5])
    agent.reload("the new configuration is not used")
    (said,) = agent.events("the new configuration is not used")
    assert "this is not TOML" in said["problems"][0]
    assert agent.policy("a")["state"] == "running"
    # At this bandwidth it would take a quarter of a minute.
    agent.configure({"a": slow | {"bandwidth": 0}, "b": policy(server, source(root, "b"), "b")})
    agent.reload()
    until(lambda: agent.generation("a") == agent.generation("b") == 1, "both are replicated")
    assert agent.policy("a")["runs_begun"] == 1, "it was not begun anew"
    assert server.image("a").read_bytes() == image.read_bytes()
    agent.configure({"b": policy(server, root / "b.raw", "b")}, top={"status_page": "127.0.0.1:1"})
    agent.reload()
    assert list(agent.policies()) == ["b"]
    assert [line["key"] for line in agent.events("a change that takes effect with the next start")] == ["status_page"]


def test_pause_resume_and_watch(root: Path, make_agent: MakeAgent, start_cloning_server: Callable[..., Server]) -> None:
    server = start_cloning_server()
    agent = make_agent({"a": policy(server, source(root, "a"), "a")}).start()
    until(lambda: agent.generation("a") == 1, "it is replicated")
    watch = start_cli("agent", "watch", "--json", "--agent", agent.address)
    assert watch.stdout is not None
    assert json.loads(watch.stdout.readline())["complete"]
    assert agent.command("pause", "a")["policies"][0]["state"] == "paused"
    (changed,) = json.loads(watch.stdout.readline())["policies"]
    assert (changed["policy"], changed["state"]) == ("a", "paused")
    error = refused_json(run_cli("agent", "sync", "a", "--json", "--agent", agent.address), "wrong-state")
    assert error["next"] == "resume it: blockferry agent resume a"
    agent.kill()
    agent.start()
    assert agent.policy("a")["state"] == "paused"
    assert agent.command("resume", "a")["policies"][0]["state"] == "waiting"
    assert agent.sync("a")["last_committed"]["generation"] == 2
    done = finish(watch)
    assert done.status == 1 and "lost the connection" in done.stderr, "the agent was killed"


def test_plan_and_status_for_people(
    root: Path, make_agent: MakeAgent, start_cloning_server: Callable[..., Server]
) -> None:
    server = start_cloning_server()
    agent = make_agent({"a": policy(server, source(root, "a"), "a"), "x": policy(server, root / "x", "x")}).start()
    until(lambda: agent.generation("a") == 1 and agent.policy("x")["failures"] > 0, "one works and one fails")
    plan = agent.command("plan", "a")
    assert plan["regions"] == {"skip": 32, "unmap": 0, "send": 0, "compare": 32}
    assert plan["bytes"]["data_sent_max"] == 2 * MIB
    done = run_cli("status", "--agent", agent.address)
    heading, a, x, *notes = done.stdout.splitlines()
    assert heading.split()[:2] == ["POLICY", "STATE"]
    assert a.split()[:2] == ["a", "waiting"] and "of 1:00:00" in a and "due in" in a
    assert x.split()[0] == "x"
    assert notes[0] == "a: everything was compared: no changes were tracked"
    assert notes[1].startswith("x: failed") and ";" in notes[1]
    done = run_cli("agent", "status", "a", "--agent", agent.address)
    assert done.stdout.splitlines()[0] == "a: waiting"
    refused(run_cli("agent", "status", "y", "--agent", agent.address), "there is no policy y", "a, x")
    server.kill()
    # Whose server it is that is away is told apart.
    refused(run_cli("agent", "plan", "a", "--agent", agent.address), server.address, "blockferry-server runs there")
    agent.kill()
    refused(run_cli("status", "--agent", agent.address), "no agent answers there", "blockferry-agent runs there")


def test_the_end_waits_for_what_runs_unless_somebody_hurries(
    root: Path, make_agent: MakeAgent, start_cloning_server: Callable[..., Server]
) -> None:
    server = start_cloning_server()
    image = source(root, "a", 8 * MIB)
    agent = make_agent({"a": policy(server, image, "a", bandwidth=SLOW)}).start()
    until(lambda: (agent.policy("a")["progress"] or {}).get("bytes_done", 0) > 0, "it is on its way")
    assert agent.stop() == 0
    assert server.show("a")["generation"] == 1, "it was let end"
    build(image, 64 * MIB, [(0, noise("more", 64 * MIB))])
    agent.configure({"a": policy(server, image, "b", bandwidth=SLOW)})
    agent.start()
    until(lambda: (agent.policy("a")["progress"] or {}).get("bytes_done", 0) > 0, "it is on its way")
    agent.signal(signal.SIGTERM)
    until(lambda: bool(agent.events("waits for what runs")), "it waits")
    assert agent.stop() == 0
    assert server.show("b")["session_client"] is None, "its session was ended"
    assert agent.events("cancels what runs")


# --- two of them ------------------------------------------------------------------------------------------------------


def failed_start(agent: Agent) -> Finished:
    done = subprocess.run(agent.words, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == ""
    last = [line for line in done.stderr.splitlines() if not line.startswith("{")]
    return Finished(done.returncode, done.stdout, "\n".join(last))


def test_two_agents_on_one_state_directory(root: Path, make_agent: MakeAgent) -> None:
    first = make_agent({}).start()
    second = make_agent({}, top={"state_dir": str(first.state)})
    refused(failed_start(second), "another blockferry-agent has it open", program="blockferry-agent")
    first.stop()
    second.start()


def test_state_of_a_newer_agent(root: Path, make_agent: MakeAgent) -> None:
    agent = make_agent({}).start()
    agent.stop()
    version = agent.state / "version"
    assert version.read_text() == "blockferry-agent state 1\n"
    version.write_text("blockferry-agent state 2\n")
    words = ("a newer blockferry-agent has written it", "its version is 2, and this one knows 1")
    refused(failed_start(agent), *words, program="blockferry-agent")


def test_two_agents_with_one_policy_are_told_apart_by_the_server(
    root: Path, make_agent: MakeAgent, start_cloning_server: Callable[..., Server]
) -> None:
    server = start_cloning_server()
    image = source(root, "a", 64 * MIB)
    first = make_agent({"a": policy(server, image, "a", bandwidth=SLOW)}).start()
    until(lambda: (first.policy("a")["progress"] or {}).get("bytes_done", 0) > 0, "the first is at work")
    second = make_agent({"a": policy(server, image, "a")}).start()
    until(lambda: second.policy("a")["failures"] > 0, "the second is refused")
    error = second.policy("a")["last_error"]
    assert error["code"] == "in-use"
    assert f"process {first.pid}" in error["cause"]
    assert error["next"].endswith("if that is another agent with this policy, stop one of them")
    assert first.policy("a")["state"] == "running", "nothing has become of it"


def test_a_generic_client_can_direct_an_agent(root: Path, make_agent: MakeAgent) -> None:
    gone = {"source": str(root / "x"), "destination": "grpc://127.0.0.1:1/x", "rpo": "1h"}
    agent = make_agent({"x": gone}).start()
    client = Reflected(agent.address.removeprefix("grpc://"))
    assert client.services == [
        "blockferry.v1.Agent",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    ]
    (health,) = client.call("grpc.health.v1.Health/Check", {"service": "blockferry.v1.Agent"})
    assert health.status == 1
    (paused,) = client.call("blockferry.v1.Agent/PausePolicy", {"policy": "x"})
    assert (paused.policy.name, paused.policy.rpo_ms) == ("x", 3_600_000)
    (listed,) = client.call("blockferry.v1.Agent/ListPolicies", {})
    assert [policy.name for policy in listed.policies] == ["x"]
    with pytest.raises(grpc.RpcError) as caught:
        client.call("blockferry.v1.Agent/GetPolicy", {"policy": "y"})
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    client.close()


# --- who may --------------------------------------------------------------------------------------------------------


def test_over_tls_grants_decide(root: Path, make_agent: MakeAgent, tmp_path: Path) -> None:
    ca = Issuer(tmp_path)
    own = ca.issue("agent", "localhost", "127.0.0.1")
    operator, viewer = ca.issue("operator", "ops.example"), ca.issue("viewer", "watch.example")
    policies = {
        name: {"source": str(root / name), "destination": f"grpc://127.0.0.1:1/{name}", "rpo": "1h"}
        for name in ("db-1", "web")
    }
    directory = Path(tempfile.mkdtemp(prefix="agent-"))
    agent = make_agent(
        policies,
        top={"listen": ["grpcs://127.0.0.1:0", f"grpc+unix://{directory}/agent.sock"]},
        tls={"cert": str(own.cert), "key": str(own.key), "ca": str(ca.ca), "crl": str(ca.crl)},
    )
    grants = [("ops.example", "operator", ["*"]), ("watch.example", "viewer", ["db-*"])]
    with agent.file.open("a") as file:
        for san, role, volumes in grants:
            file.write(f'[[grant]]\nsan = "{san}"\nrole = "{role}"\nvolumes = {json.dumps(volumes)}\n')
    agent.page = None
    agent.start()
    watch, operate = viewer.flags(ca.ca), operator.flags(ca.ca)

    def names(*flags: str, address: str = agent.address) -> list[str]:
        done = run_cli("agent", "status", "--json", "--agent", address, *flags)
        return [one["policy"] for one in done.report["policies"]]

    assert names(*operate) == ["db-1", "web"]
    assert names(*watch) == ["db-1"]
    assert names(address=f"grpc+unix://{directory}/agent.sock") == ["db-1", "web"]
    for words in (("pause", "db-1"), ("sync", "db-1"), ("status", "web")):
        refused_json(run_cli("agent", *words, "--json", "--agent", agent.address, *watch), "permission", "is denied")
    assert run_cli("agent", "pause", "db-1", "--agent", agent.address, *operate).status == 0
    denied = agent.events("denied", method="Agent/PausePolicy")
    assert denied[0]["grant"] == '[[grant]] san = "watch.example", role = "operator", volumes = ["db-1"]'
    ca.revoke([viewer])
    until(lambda: run_cli("agent", "status", "--agent", agent.address, *watch).status == 1, "it is revoked")
    agent.stop()
    for path in (*directory.iterdir(), directory):
        (os.rmdir if path == directory else os.unlink)(path)
