"""blockferry-agent: keeps replicas of this host's volumes current, by policies."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from pathlib import Path

import structlog
import uvloop
from blockferry.client import alarm, cycle
from blockferry.client.agent import Agent, Cycle, Watched
from blockferry.client.agent_metrics import Meters, Standings
from blockferry.client.memory import StateDirectory
from blockferry.client.plan import Plan
from blockferry.client.service import NEEDS, AgentService, Planner
from blockferry.client.sync import SyncOptions, plan
from blockferry.common import linux, notify, rpc, telemetry
from blockferry.common.access import AccessControl
from blockferry.common.address import Address
from blockferry.common.agent_config import AgentConfig
from blockferry.common.config import load_agent
from blockferry.common.credentials import Credentials
from blockferry.common.durable import make_directories
from blockferry.common.errors import BlockferryError, Code, from_os_error
from blockferry.common.metrics import Pages, metrics_page, new_registry
from blockferry.common.serving import add_health_and_reflection
from blockferry.common.tasks import Supervisor
from blockferry.common.volumes import in_thread, open_volume
from blockferry.v1 import agent_pb2

log = structlog.get_logger("blockferry.agent")

DEFAULT_CONFIG = Path("/etc/blockferry/agent.toml")

DRAIN_SECONDS = 30.0
"""After SIGTERM runs may end by themselves within this time; a second signal cuts it short."""

CANCEL_SECONDS = 15.0
"""Then they are cancelled, and end their sessions within this time."""

MESSAGE_BYTES = 64 * 1024
"""Of a request: the name of a policy, and reflection's questions."""

CONNECTIONS = 64
STREAMS = 32
"""Of those who look at it, and of each: nobody needs more, and a source host has other things to do."""

CLOSE_SECONDS = 1.0
"""Calls to the agent itself may finish within this time."""


class Signals:
    """What this process was told: to end, to hurry, to reload."""

    def __init__(self) -> None:
        self.end, self.hurry, self.reload = asyncio.Event(), asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._ended)
        loop.add_signal_handler(signal.SIGHUP, self.reload.set)

    def _ended(self) -> None:
        (self.hurry if self.end.is_set() else self.end).set()


async def serve(path: Path, run_cycle: Cycle = cycle.run_cycle) -> None:
    """Run until SIGTERM or SIGINT. Raises what keeps it from starting, and INTERNAL if a part of it ends by itself."""
    signals = Signals()
    config = await in_thread(load_agent, path)
    supervisor = Supervisor()
    credentials = await in_thread(Credentials, config.tls) if config.tls else None
    state = await in_thread(StateDirectory, config.state_dir)
    registry = new_registry()
    agent = await Agent.open(
        config, state, run_cycle, supervisor, alarm=alarm.sound, recover=cycle.recover, watcher=Meters(registry)
    )
    Standings(agent, registry)
    access = AccessControl(NEEDS, config.grant, credentials)
    server = rpc.make_server(message_size=MESSAGE_BYTES, connections=CONNECTIONS, streams=STREAMS)
    pages = Pages({"/metrics": metrics_page(registry)})
    try:
        descriptor = agent_pb2.DESCRIPTOR.services_by_name["Agent"]
        rpc.add_service(server, descriptor, AgentService(agent, access, _planner(agent)), access)
        await add_health_and_reflection(server, [descriptor.full_name])
        await in_thread(_make_directories, config)
        addresses = [rpc.bind(server, uri, insecure=config.insecure, credentials=credentials) for uri in config.listen]
        if config.status_page:
            addresses.append(f"{await pages.open(config.status_page)}/metrics")
        await server.start()
        for address in addresses:
            print(f"listening on {address}", flush=True)
        supervisor.service("schedule", agent.run())
        supervisor.service("reload", _reload(path, agent, access, signals))
        if credentials is not None:
            supervisor.service("certificates", credentials.watch())
        notify.ready()
        supervisor.failed.add_done_callback(lambda _: signals.end.set())
        await signals.end.wait()
    finally:
        notify.stopping()
        agent.end()
        await _drain(signals, supervisor)
        await supervisor.cancel(CANCEL_SECONDS)
        await pages.close()
        await server.stop(CLOSE_SECONDS)
        state.close()
    if supervisor.failed.done():
        raise BlockferryError(
            Code.INTERNAL,
            "blockferry-agent ends",
            cause=f"its task {supervisor.failed.result()} has ended by itself",
            next="it may be started again at once; report what its log says",
        )


def _make_directories(config: AgentConfig) -> None:
    """For sockets; whoever may enter one may use the socket in it."""
    for uri in config.listen:
        socket = Address.parse(uri).target.removeprefix("unix:")
        if socket.startswith("/"):
            try:
                make_directories(Path(socket).parent)
            except OSError as error:
                raise from_os_error(error, f"cannot listen on {uri}") from error


async def _drain(signals: Signals, supervisor: Supervisor) -> None:
    """Let runs end by themselves, as long as nobody hurries."""
    names = supervisor.names()
    if not names:
        return
    log.info("waits for what runs", runs=names, seconds=DRAIN_SECONDS)
    hurry = asyncio.create_task(signals.hurry.wait(), name="hurry")
    drain = asyncio.create_task(supervisor.drain(DRAIN_SECONDS), name="drain")
    await asyncio.wait([hurry, drain], return_when=asyncio.FIRST_COMPLETED)
    hurry.cancel()
    drain.cancel()
    if left := supervisor.names():
        log.warning("cancels what runs", runs=left, next="their next run goes on from what is there")


async def _reload(path: Path, agent: Agent, access: AccessControl, signals: Signals) -> None:
    """Take up the file again whenever SIGHUP comes. One that is wrong changes nothing."""
    while True:
        await signals.reload.wait()
        signals.reload.clear()
        notify.reloading()
        try:
            config = await in_thread(load_agent, path)
        except BlockferryError as error:
            log.error("the new configuration is not used", problems=error.lines(), next="the old one stays in use")
        else:
            _say_what_stays(agent.config, config)
            await agent.reload(config)
            access.grants = config.grant
            log.info("configuration reloaded", policies=len(config.policy))
        notify.ready()


def _say_what_stays(before: AgentConfig, after: AgentConfig) -> None:
    """These are looked at only once."""
    for name in ("state_dir", "listen", "status_page", "tls"):
        if getattr(before, name) != getattr(after, name):
            log.warning("a change that takes effect with the next start", key=name)


def _planner(agent: Agent) -> Planner:
    """Plans of the volumes as they are."""

    async def planned(one: Watched) -> Plan:
        config, policy = agent.config, one.policy
        source = await open_volume(policy.source, insecure=config.insecure, tls=config.tls)
        try:
            options = SyncOptions(region_size=policy.region_size, insecure=config.insecure, tls=config.tls)
            return (await plan(source, policy.address, options))[0]
        finally:
            await source.close()

    return planned


def main() -> int:
    """Entry point of the console script."""
    linux.occupy_standard_descriptors()
    parser = argparse.ArgumentParser(
        prog="blockferry-agent",
        description="Keep replicas of this host's volumes current.",
        epilog="SIGHUP reads the file again; what runs goes on.",
    )
    parser.add_argument(
        "--config", type=Path, default=DEFAULT_CONFIG, metavar="FILE", help=f"what to do (default {DEFAULT_CONFIG})"
    )
    arguments = parser.parse_args()
    try:
        telemetry.configure_logging()
        linux.keep_freed_memory()
        uvloop.run(serve(arguments.config))
    except BlockferryError as error:
        for line in error.lines():
            print(f"blockferry-agent: {line}", file=sys.stderr)
        return 1
    return 0
