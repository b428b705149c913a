"""What gRPC itself costs here: the bytes of a full copy through a bare stream of messages, and nothing else.

No disk, no digests, no zero detection: one process sends the same 4 MiB buffer again and again over the project's own
channel, another one drops what it gets. This is the least that any sync through gRPC in Python can take on this
machine, whatever is done around it; `datapath` says what nbdcopy takes for all of a copy.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import uvloop
from blockferry.client.transfer import MESSAGE_SIZE
from blockferry.common import linux, rpc

from bench.workload import DATA_SIZE, MIB

NAME = "floor"
RUNS = 5
_METHOD = "/bench.Floor/Send"


class _Sink(grpc.GenericRpcHandler):
    """Drops a stream of raw messages."""

    def service(self, handler_call_details: Any) -> Any:
        async def receive(requests: AsyncIterator[bytes], _: Any) -> bytes:
            total = 0
            async for message in requests:
                total += len(message)
            return str(total).encode()

        return grpc.stream_unary_rpc_method_handler(receive) if handler_call_details.method == _METHOD else None


async def _serve() -> None:
    server = rpc.make_server()
    server.add_generic_rpc_handlers((_Sink(),))
    print(rpc.bind(server, "grpc://127.0.0.1:0", insecure=False), flush=True)
    await server.start()
    await server.wait_for_termination()


async def _send(target: str) -> None:
    async with grpc.aio.insecure_channel(target, options=rpc._CLIENT_OPTIONS) as channel:
        call: Any = channel.stream_unary(_METHOD)()
        buffer = memoryview(bytearray(MESSAGE_SIZE))
        for _ in range(DATA_SIZE // MESSAGE_SIZE):
            # As in a sync: each message is new bytes.
            await call.write(bytes(buffer))
        await call.done_writing()
        assert int(await call) == DATA_SIZE


def measure() -> dict[str, Any]:
    """Run it; the result has no bound: it is one."""
    words = [sys.executable, "-m", "bench.floor"]
    server = subprocess.Popen([*words, "serve"], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        target = server.stdout.readline().strip().removeprefix("grpc://")
        seconds = []
        for _ in range(RUNS):
            began = time.perf_counter()
            subprocess.run([*words, target], check=True)
            seconds.append(time.perf_counter() - began)
    finally:
        server.terminate()
        server.wait()
    median = statistics.median(seconds)
    row = {
        "what": f"{DATA_SIZE // MIB} MiB in messages of {MESSAGE_SIZE // MIB} MiB, dropped on arrival",
        "median s": f"{median:.2f}",
        "all s": " ".join(f"{one:.2f}" for one in seconds),
        "MB/s": f"{DATA_SIZE / median / 1e6:.0f}",
    }
    return {"name": NAME, "title": "a bare gRPC stream", "rows": [row], "summary": "whole processes", "broken": []}


if __name__ == "__main__":
    linux.keep_freed_memory()
    uvloop.run(_serve() if sys.argv[1] == "serve" else _send(sys.argv[1]))
