"""Both ends of a stream comparison, as one process on one core: workers that stream events at a fixed pace, clients that read them.

    python bench/stream_peers.py workers PORT...            until SIGTERM
    python bench/stream_peers.py clients PORT STREAMS SECONDS   prints one JSON line {"chunks", "bytes", "seconds"}

Every stream sends one event of about 220 bytes, as SGLang does for a token, each INTERVAL_MS, at a phase of its own, as one chunk.
"""

import asyncio
import json
import random
import sys
import time

import uvloop
from load import stream_request

INTERVAL_MS = 20
_DELTA = {"index": 0, "delta": {"content": " token"}, "logprobs": None, "finish_reason": None, "matched_stop": None}
_EVENT = b"data: " + json.dumps(
    {"id": "chatcmpl-0123456789abcdef", "object": "chat.completion.chunk", "created": 1760000000, "model": "m", "choices": [_DELTA]}
).encode() + b"\n\n"  # fmt: skip
CHUNK = b"%x\r\n%b\r\n" % (len(_EVENT), _EVENT)
_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
_PLAIN = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"


class WorkerEnd(asyncio.Protocol):
    """A worker's connection: GET is answered at once, POST by a stream without end."""

    def __init__(self) -> None:
        self.seen = b""
        self.timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.seen += data
        if self.timer is not None or b"\r\n\r\n" not in self.seen:
            return
        if self.seen.startswith(b"GET"):
            self.seen = b""
            self.transport.write(_PLAIN)  # type: ignore[attr-defined]
            return
        self.transport.write(_HEAD)  # type: ignore[attr-defined]
        self.timer = asyncio.get_running_loop().call_later(random.random() * INTERVAL_MS / 1e3, self.send)

    def send(self) -> None:
        self.transport.write(CHUNK)  # type: ignore[attr-defined]
        self.timer = asyncio.get_running_loop().call_later(INTERVAL_MS / 1e3, self.send)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.timer is not None:
            self.timer.cancel()


class ClientEnd(asyncio.Protocol):
    """A client's connection: asks once, counts what comes."""

    received_bytes = 0

    def __init__(self, port: int) -> None:
        self._request = stream_request(port)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.write(self._request)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        ClientEnd.received_bytes += len(data)


async def workers(ports: list[int]) -> None:
    loop = asyncio.get_running_loop()
    servers = [await loop.create_server(WorkerEnd, "127.0.0.1", port, backlog=1024) for port in ports]
    await asyncio.gather(*(server.serve_forever() for server in servers))


async def clients(port: int, streams: int, seconds: float) -> None:
    loop = asyncio.get_running_loop()
    for _ in range(streams):
        await loop.create_connection(lambda: ClientEnd(port), "127.0.0.1", port)
    await asyncio.sleep(1.0)  # all streams run
    print("ready", flush=True)
    await loop.run_in_executor(None, sys.stdin.readline)  # the measuring side has looked at its clock
    before, started = ClientEnd.received_bytes, time.monotonic()
    await asyncio.sleep(seconds)
    received, took = ClientEnd.received_bytes - before, time.monotonic() - started
    print(json.dumps({"chunks": received / len(CHUNK), "bytes": received, "seconds": took}), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "workers":
        uvloop.run(workers([int(port) for port in sys.argv[2:]]))
    else:
        uvloop.run(clients(int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])))
