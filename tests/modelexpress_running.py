"""The real metadata service as a process, for tests of what talks to it."""

import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

from sglfast.load.stack import SGLFAST, Child, wait_listening
from sglfast.modelexpress.schema import p2p

WAIT_S = 30.0
SERVICE_PORT = r"serving \S+:(\d+)[,.]"
HOST = "127.0.0.1"


class Service:
    """`sglfast modelexpress serve` on a free port, whose store is empty at every start; flags: more of its flags."""

    def __init__(self, *flags: str) -> None:
        self._flags = flags
        self._child: Child | None = None
        self.port = 0

    @property
    def address(self) -> str:
        return f"{HOST}:{self.port}"

    def start(self) -> None:
        """Start it, again on the same port."""
        self._folder = tempfile.TemporaryDirectory()
        where = ["--host", HOST, "--port", str(self.port), "--metrics-port", "-1", "--storage", f"{self._folder.name}/records.sqlite3"]
        self._child = Child("service", [*SGLFAST, "modelexpress", "serve", *where, *self._flags])
        self.port = wait_listening(self._child, SERVICE_PORT)

    def stop(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.stop()
            self._folder.cleanup()


@contextmanager
def running_service(*flags: str) -> Iterator[Service]:
    service = Service(*flags)
    try:
        service.start()
        yield service
    finally:
        service.stop()


def tensors(count: int = 3, size_bytes: int = 4096) -> list[p2p.TensorDescriptor]:
    return [p2p.TensorDescriptor(name=f"layer.{i}", addr=0x7F0000000000 + i, size=size_bytes, dtype="bfloat16") for i in range(count)]


def record(rank: int = 0, session: str = "10.0.0.1:4711", count: int = 3) -> p2p.WorkerMetadata:
    """What a seed with TransferEngine publishes."""
    payload = p2p.TensorSourceMetadata(tensors=tensors(count))
    return p2p.WorkerMetadata(worker_rank=rank, transfer_engine_session_id=session, tensor_source=payload)


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    """A test's coroutine, bounded."""
    asyncio.run(asyncio.wait_for(coroutine, 3 * WAIT_S))


async def until(condition: Callable[[], Awaitable[bool]], what: str) -> None:
    """Poll until a condition holds; fails with `what` when it does not in time."""
    end_s = time.monotonic() + WAIT_S
    while not await condition():
        assert time.monotonic() < end_s, f"not within {WAIT_S:.0f} s: {what}"
        await asyncio.sleep(0.02)
