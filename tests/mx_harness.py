"""Real parts for tests of the metadata service: a Redis of its own, a service in this process or in one of its own, a client.

Everything listens on loopback at a free port and is ended by whoever started it.
"""

import asyncio
import contextlib
import logging
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import grpc
import pytest
from google.protobuf.message import Message

from sglfast.modelexpress.schema import P2P_SERVICE, p2p
from sglfast.modelexpress.server import Server
from sglfast.modelexpress.settings import ServeSettings, check

ROOT = Path(__file__).parent.parent
WAIT_S = 30.0
REDIS = shutil.which("redis-server") or shutil.which("valkey-server")
NO_REDIS = "needs redis-server or valkey-server (apt-get install redis-server)"
A = TypeVar("A", bound=Message)


class RedisServer:
    """A redis-server with an append-only file in `folder`, written before it answers. It keeps its port when it is started again."""

    def __init__(self, folder: Path) -> None:
        if REDIS is None:
            pytest.skip(NO_REDIS)
        self.folder = folder
        folder.mkdir(exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        log = (self.folder / "log").open("ab")
        flags = {
            "port": self.port,
            "bind": "127.0.0.1",
            "dir": self.folder,
            "appendonly": "yes",
            "appendfsync": "always",
            "save": "",
            "daemonize": "no",
        }
        command = [str(REDIS), *(word for name, value in flags.items() for word in (f"--{name}", str(value)))]
        self._process = subprocess.Popen(command, stdout=log, stderr=log)
        log.close()
        wait_until(self._answers, "redis-server answers")

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self.folder / "log").read_text()
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(16) == b"+PONG\r\n"  # while it loads its file it answers -LOADING
        return False

    def end(self, number: int = signal.SIGKILL) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(WAIT_S)
            self._process = None


@contextlib.contextmanager
def redis_server(folder: Path) -> Iterator[RedisServer]:
    server = RedisServer(folder)
    try:
        server.start()
        yield server
    finally:
        server.end()


def wait_until(is_true: Callable[[], bool], what: str, wait_s: float = WAIT_S) -> None:
    deadline = time.monotonic() + wait_s
    while not is_true():
        assert time.monotonic() < deadline, f"not within {wait_s} s: {what}"
        time.sleep(0.02)


async def until(is_true: Callable[[], bool], what: str, wait_s: float = WAIT_S) -> None:
    """As `wait_until`, while the loop goes on."""
    deadline = time.monotonic() + wait_s
    while not is_true():
        assert time.monotonic() < deadline, f"not within {wait_s} s: {what}"
        await asyncio.sleep(0.01)


class Clock:
    """Unix milliseconds that stand still until they are moved."""

    def __init__(self) -> None:
        self.now_ms = 1_800_000_000_000

    def __call__(self) -> int:
        return self.now_ms

    def pass_secs(self, seconds: float) -> None:
        self.now_ms += round(seconds * 1000)


def settings(storage: str | Path, **more: Any) -> ServeSettings:
    """Settings for a test: free ports, a reaper that scans when it is told to."""
    defaults = {"port": 0, "metrics_port": -1, "scan_interval_secs": 80.0, "shutdown_grace_secs": 2.0}
    return check(ServeSettings(storage=str(storage), **(defaults | more)))


@contextlib.asynccontextmanager
async def serving(config: ServeSettings, clock: Callable[[], int] | None = None) -> AsyncIterator[tuple[Server, "Client"]]:
    """A service in this process and a client of it."""
    log = logging.getLogger("test.modelexpress")
    server = Server(config, log) if clock is None else Server(config, log, clock_ms=clock)
    await server.start()
    try:
        async with Client(f"127.0.0.1:{server.port}") as client:
            yield server, client
    finally:
        await server.stop()


class Client:
    """The calls over a real connection. Each raises grpc.RpcError when the answer is a code."""

    def __init__(self, address: str) -> None:
        self.channel = grpc.aio.insecure_channel(
            address,
            options=[
                ("grpc.max_receive_message_length", 100 << 20),
                ("grpc.max_send_message_length", 200 << 20),
                ("grpc.use_local_subchannel_pool", 1),
            ],
        )

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.channel.close()

    async def raw(self, method: str, data: bytes, metadata: tuple[tuple[str, str], ...] = ()) -> bytes:
        path = method if method.startswith("/") else f"/{P2P_SERVICE}/{method}"
        answer: bytes = await self.channel.unary_unary(path)(data, timeout=WAIT_S, metadata=metadata)
        return answer

    async def ask(self, method: str, request: Message, answer: type[A]) -> A:
        return answer.FromString(await self.raw(method, request.SerializeToString()))

    async def publish(self, request: p2p.PublishMetadataRequest) -> p2p.PublishMetadataResponse:
        return await self.ask("PublishMetadata", request, p2p.PublishMetadataResponse)

    async def list(self, **fields: Any) -> list[p2p.SourceInstanceRef]:
        return list((await self.ask("ListSources", p2p.ListSourcesRequest(**fields), p2p.ListSourcesResponse)).instances)

    async def get(self, source_id: str, worker_id: str) -> p2p.GetMetadataResponse:
        request = p2p.GetMetadataRequest(mx_source_id=source_id, worker_id=worker_id)
        return await self.ask("GetMetadata", request, p2p.GetMetadataResponse)

    async def update(self, source_id: str, worker_id: str, rank: int, status: int, load: float | None = None) -> p2p.UpdateStatusResponse:
        request = p2p.UpdateStatusRequest(
            mx_source_id=source_id, worker_id=worker_id, worker_rank=rank, status=status, source_load=load  # type: ignore[arg-type]
        )  # fmt: skip
        return await self.ask("UpdateStatus", request, p2p.UpdateStatusResponse)


def publication(model: str = "m", worker_id: str = "w", rank: int = 0, n_tensors: int = 1, **worker: Any) -> p2p.PublishMetadataRequest:
    """A publish as SGLang's first ModelExpress support sends it: a session id, tensors in the legacy field."""
    tensors = [p2p.TensorDescriptor(name=f"layers.{i}.weight", addr=(1 << 40) + i, size=4096, device_id=rank) for i in range(n_tensors)]
    worker = {"worker_rank": rank, "transfer_engine_session_id": "10.0.0.1:12345", "tensors": tensors} | worker
    identity = p2p.SourceIdentity(model_name=model, backend_framework=p2p.BACKEND_FRAMEWORK_SGLANG, tensor_parallel_size=2, dtype="auto")
    return p2p.PublishMetadataRequest(identity=identity, worker_id=worker_id, worker=p2p.WorkerMetadata(**worker))


class ServeProcess:
    """`sglfast modelexpress serve` as a process of its own. flags: without --port and --metrics-port."""

    def __init__(self, *flags: str, log: Path) -> None:
        self.log = log
        command = [sys.executable, "-m", "sglfast", "modelexpress", "serve", "--port", "0", "--metrics-port", "0", *flags]
        with log.open("ab") as stderr:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"serving 127\.0\.0\.1:(\d+), metrics at http://127\.0\.0\.1:(\d+)/metrics", line)
        if found is None:
            self.end(signal.SIGKILL)
            raise AssertionError(f"the service did not start: {line!r}\n{log.read_text()}")
        self.address, self.metrics_port = f"127.0.0.1:{found[1]}", int(found[2])

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send the signal, wait; returns the exit code."""
        self.process.send_signal(number)
        try:
            return self.process.wait(WAIT_S)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
            assert self.process.stdout is not None
            self.process.stdout.close()
