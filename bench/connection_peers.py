"""The peers of bench/connections.py, each kind a process of its own, so that none of them slows what another measures.

    python bench/connection_peers.py worker PORT            until SIGTERM
    python bench/connection_peers.py normal PORT RATE       a line SECONDS on stdin -> a JSON line of latencies
    python bench/connection_peers.py idle PORT COUNT        opens, prints a JSON line; a line on stdin -> one more, and ends
    python bench/connection_peers.py slow PORT COUNT        the same

Latency is counted from the moment when a request was to be sent, not from when a connection was free for it: a stall is seen by all
whom it met. p99_us is the median of the p99 of each second, so that a hiccup of the machine does not decide; whole_p99_us is of all.
Clients come from 127.0.0.2 to 127.0.0.9, so that no address runs short of ports.
"""

import asyncio
import collections
import functools
import json
import os
import random
import resource
import socket
import statistics
import sys
import time
from collections.abc import Callable
from typing import cast

import uvloop
from load import MODEL, chat

NORMAL_CONNECTIONS = 32
LARGE_BYTES = 4 << 20
SLOW_PAUSE_S = 1.0  # on average between two bytes of a slow sender, and two reads of a slow reader
_SLOW_READ_BYTES = 4096
_PIECE = b"data: " + b"x" * 16000 + b"\n\n"
_STREAM_PIECE = b"%x\r\n%b\r\n" % (len(_PIECE), _PIECE)
_PLAIN = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
_SSE_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def _raise_files_limit() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _step_back() -> None:
    """These clients share a core with those whose latency is measured."""
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    os.nice(5)


# ---- the worker ----


class WorkerEnd(asyncio.Protocol):
    """A worker's connection: /v1/chat/completions is answered at once, /v1/completions with much, /generate by a stream without end."""

    def __init__(self) -> None:
        self.seen = b""
        self.left_bytes = 0
        self.is_stream = False
        self.is_paused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.seen += data
        head, end, body = self.seen.partition(b"\r\n\r\n")
        if not end or len(body) < _length_in(head):
            return
        self.seen = b""
        if head.startswith(b"POST /generate "):
            self.transport.write(_SSE_HEAD)
            self.is_stream = True
            self.send()
        elif head.startswith(b"POST /v1/completions "):
            self.transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % LARGE_BYTES)
            self.left_bytes = LARGE_BYTES
            self.send()
        else:
            self.transport.write(_ANSWER if head.startswith(b"POST") else _PLAIN % (2, b"{}"))

    def send(self) -> None:
        while not self.is_paused and not self.transport.is_closing() and (self.is_stream or self.left_bytes):
            piece = _STREAM_PIECE if self.is_stream else b"x" * min(self.left_bytes, 65536)
            self.left_bytes -= min(self.left_bytes, len(piece))
            self.transport.write(piece)

    def pause_writing(self) -> None:
        self.is_paused = True

    def resume_writing(self) -> None:
        self.is_paused = False
        self.send()


_ANSWER = _PLAIN % (len(chat(2048).worker_answer), chat(2048).worker_answer.encode())


def _length_in(head: bytes) -> int:
    _, _, rest = head.lower().partition(b"content-length:")
    return int(rest.partition(b"\r\n")[0] or 0)


async def worker(port: int) -> None:
    listener = socket.create_server(("127.0.0.1", port), backlog=4096)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)  # inherited: what nobody reads must not be made for long
    server = await asyncio.get_running_loop().create_server(WorkerEnd, sock=listener, backlog=4096)
    await server.serve_forever()


# ---- clients ----


async def _stdin_line() -> str:
    return await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)


async def _until(is_true: Callable[[], bool], within_s: float) -> None:
    """Return when it is true, or when the time is over."""
    end_s = time.monotonic() + within_s
    while not is_true() and time.monotonic() < end_s:  # noqa: ASYNC110 - protocols of many connections count into it
        await asyncio.sleep(0.01)


def _say(**found: object) -> None:
    print(json.dumps(found), flush=True)


class NormalEnd(asyncio.Protocol):
    """A connection of the normal load: requests wait in line, answers are timed."""

    def __init__(self, load: "NormalLoad") -> None:
        self.load = load
        self.due_s: float | None = None
        self.received_bytes = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.load.free.append(self)

    def send(self, due_s: float) -> None:
        self.due_s = due_s
        self.received_bytes = 0
        self.transport.write(self.load.request)

    def data_received(self, data: bytes) -> None:
        if not self.received_bytes:
            self.load.failures += not data.startswith(b"HTTP/1.1 200 ")
        self.received_bytes += len(data)
        if data.endswith(_ANSWER[-16:]) and self.due_s is not None:
            self.load.latencies.append((self.due_s, time.monotonic() - self.due_s))
            self.due_s = None
            if self.load.waiting:
                self.send(self.load.waiting.popleft())
            else:
                self.load.free.append(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.load.failures += self.due_s is not None
        if self in self.load.free:
            self.load.free.remove(self)


class NormalLoad:
    """Requests at a fixed rate over connections that are kept."""

    def __init__(self, port: int, rate: float) -> None:
        self.port = port
        self.rate = rate
        self.request = chat(2048).request(port)
        self.free: list[NormalEnd] = []
        self.waiting: collections.deque[float] = collections.deque()
        self.latencies: list[tuple[float, float]] = []  # (when it was sent, how long it took)
        self.failures = 0

    async def run(self, seconds: float) -> dict[str, object]:
        """The load for so long; what it saw."""
        self.latencies, self.failures = [], 0
        while len(self.free) < NORMAL_CONNECTIONS:
            await asyncio.get_running_loop().create_connection(lambda: NormalEnd(self), "127.0.0.1", self.port)
        begun_s = time.monotonic()
        total = int(self.rate * seconds)
        sent = 0
        while sent < total:
            now_s = time.monotonic()
            while sent < total and sent / self.rate <= now_s - begun_s:
                sent += 1
                if self.free:
                    self.free.pop().send(now_s)
                else:
                    self.waiting.append(now_s)
            await asyncio.sleep(0.001)
        await _until(lambda: len(self.latencies) + self.failures >= total, 10.0)
        windows: dict[int, list[float]] = collections.defaultdict(list)
        for sent_s, took_s in self.latencies:
            windows[int(sent_s - begun_s)].append(took_s)
        times = [took_s for _, took_s in self.latencies]
        return {
            "p50_us": _at(times, 0.5),
            "p99_us": round(statistics.median(_at(window, 0.99) for window in windows.values())),
            "whole_p99_us": _at(times, 0.99),
            "max_us": _at(times, 1.0),
            "answered": len(times),
            "failures": total - len(times),
        }


def _at(times_s: list[float], share: float) -> int:
    """A quantile, in microseconds."""
    return round(1e6 * sorted(times_s)[min(int(share * len(times_s)), len(times_s) - 1)])


async def normal(port: int, rate: float) -> None:
    load = NormalLoad(port, rate)
    _say(ready=True)
    while line := (await _stdin_line()).strip():
        _say(**await load.run(float(line)))


class IdleEnd(asyncio.Protocol):
    """A connection that says nothing, or only once."""

    open_count = 0
    answered = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        IdleEnd.open_count += 1

    def data_received(self, data: bytes) -> None:
        IdleEnd.answered += data.startswith(b"HTTP/1.1 200 ")

    def connection_lost(self, exc: Exception | None) -> None:
        IdleEnd.open_count -= 1


async def idle(port: int, count: int) -> None:
    """Every second connection has been used once."""
    loop = asyncio.get_running_loop()
    begun_s = time.monotonic()
    request = chat(2048).request(port)
    transports = []
    for first in range(0, count, 256):
        batch = [loop.create_connection(IdleEnd, sock=await _connected(port, number)) for number in range(first, min(first + 256, count))]
        transports += [transport for transport, _ in await asyncio.gather(*batch)]
    for number, transport in enumerate(transports):
        if number % 2:
            transport.write(request)
            if number % 64 == 63:
                await asyncio.sleep(0.005)
    await _until(lambda: IdleEnd.answered >= count // 2, 120.0)
    _say(opened=IdleEnd.open_count, answered=IdleEnd.answered, seconds=round(time.monotonic() - begun_s, 2))
    await _stdin_line()
    _say(open_at_end=IdleEnd.open_count)
    for transport in transports:
        transport.abort()
    await asyncio.sleep(0.5)


async def _connected(port: int, number: int, rcvbuf_bytes: int = 0) -> socket.socket:
    sock = socket.socket()
    sock.setblocking(False)
    if rcvbuf_bytes:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, rcvbuf_bytes)
    sock.setsockopt(socket.IPPROTO_IP, 24, 1)  # IP_BIND_ADDRESS_NO_PORT: the port is chosen at connect, per peer
    sock.bind((f"127.0.0.{2 + number % 8}", 0))
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
    return sock


class Slow:
    """So many slow clients of four kinds; whoever is cut comes again. outcomes: kind -> what ended its connections."""

    def __init__(self, port: int, count: int) -> None:
        self.port = port
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.connected = 0
        head = b"POST %b HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n"
        body = b'{"model": "%b", "prompt": "hello"}' % MODEL.encode()
        asks = {path: head % (path, len(body)) + body for path in (b"/v1/completions", b"/generate")}
        self.kinds = {
            "head": functools.partial(self.sender, b"", chat(8192).request(port)),
            "body": functools.partial(self.sender, head % (b"/generate", 1 << 20), b"x" * (1 << 20)),
            "large": functools.partial(self.reader, asks[b"/v1/completions"]),
            "stream": functools.partial(self.reader, asks[b"/generate"]),
        }
        names = list(self.kinds)
        self.tasks = [asyncio.create_task(self.repeat(names[number % len(names)], number)) for number in range(count)]

    async def repeat(self, kind: str, number: int) -> None:
        await asyncio.sleep(random.uniform(0.0, 2.0))
        while True:
            try:
                is_reader = kind in ("large", "stream")
                with await _connected(self.port, number, 4096 if is_reader else 0) as sock:
                    self.connected += 1
                    try:
                        outcome = await self.kinds[kind](sock)
                    finally:
                        self.connected -= 1
            except OSError as error:
                outcome = type(error).__name__
            self.outcomes[f"{kind}: {outcome}"] += 1
            await asyncio.sleep(0.1)

    async def sender(self, at_once: bytes, then: bytes, sock: socket.socket) -> str:
        """A byte at a time, until the router answers or closes."""
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(sock, at_once)
        for at in range(len(then)):
            await loop.sock_sendall(sock, then[at : at + 1])
            await _pause()
            try:
                answer = sock.recv(4096)
            except BlockingIOError:
                continue
            return answer[9:12].decode() if answer else "closed"
        return "all sent"

    async def reader(self, request: bytes, sock: socket.socket) -> str:
        """A large answer in small bites."""
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(sock, request)
        while await loop.sock_recv(sock, _SLOW_READ_BYTES):
            await _pause()
        return "closed"


async def _pause() -> None:
    await asyncio.sleep(random.uniform(0.5, 1.5) * SLOW_PAUSE_S)


async def slow(port: int, count: int) -> None:
    clients = Slow(port, count)
    await _until(lambda: clients.connected >= 0.95 * count, 60.0)
    _say(connected=clients.connected)
    await _stdin_line()
    _say(connected=clients.connected, outcomes=dict(clients.outcomes))
    for task in clients.tasks:
        task.cancel()
    await asyncio.gather(*clients.tasks, return_exceptions=True)


if __name__ == "__main__":
    _raise_files_limit()
    kind, port_text, *rest = sys.argv[1:]
    if kind == "worker":
        uvloop.run(worker(int(port_text)))
    elif kind == "normal":
        uvloop.run(normal(int(port_text), float(rest[0])))
    else:
        _step_back()
        uvloop.run({"idle": idle, "slow": slow}[kind](int(port_text), int(rest[0])))
