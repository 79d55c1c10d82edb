"""A TCP proxy that stands between a router and a worker and does to the connection what networks and dying workers do.

A thread with a loop of its own. Requests of the data plane are hit by `mode`; health checks and the rest pass, unless `hits_all`.

    pass         bytes go through
    refuse       nothing listens: connections are refused by the kernel
    reset        the connection is reset as soon as the request has arrived
    stall        the request arrives at the worker, no byte of the answer comes back
    cut_header   the answer ends inside its head
    cut_body     the answer ends inside its body: between two chunks, or in the middle of a counted length
    cut_chunk    the answer ends inside a chunk
    slow         the answer's head comes byte by byte
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
import time
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar
from urllib.parse import urlsplit

T = TypeVar("T")
MODES = ("pass", "refuse", "reset", "stall", "cut_header", "cut_body", "cut_chunk", "slow")
_WAIT_S = 10.0


class _CutError(Exception):
    """The fault has done its work: both connections end."""


class FaultProxy:
    """One proxy for one worker. hits: requests that were hit; left_s: when the router closed a connection before its answer ended."""

    def __init__(self, target_url: str) -> None:
        parts = urlsplit(target_url)
        self._target = (parts.hostname or "", parts.port or 80)
        self._mode = "pass"
        self.hits_all = False
        self.hits = 0
        self.left_s: list[float] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self._listener.setblocking(False)
        self._port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"proxy {self._port}", daemon=True)
        self._thread.start()
        self._run(self._listen())

    @property
    def mode(self) -> str:
        return self._mode

    @mode.setter
    def mode(self, mode: str) -> None:
        assert mode in MODES, mode
        was_refusing, self._mode = self._mode == "refuse", mode
        if mode == "refuse" and not was_refusing:
            self._run(self._refuse())
        elif was_refusing and mode != "refuse":
            self._run(self._listen())

    def close(self) -> None:
        """End all connections and the thread."""
        self._run(self._end_connections())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_WAIT_S)
        self._loop.close()
        self._listener.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        done: Future[T] = asyncio.run_coroutine_threadsafe(work, self._loop)
        return done.result(_WAIT_S)

    # ---- in the loop ----

    async def _listen(self) -> None:
        # The same socket listens that held the port meanwhile: nobody else can have it.
        self._listener.listen(256)
        self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        # Not asyncio.start_server: closing that one loses what it has just accepted.
        with contextlib.suppress(OSError):
            sock, _ = self._listener.accept()
            task = asyncio.ensure_future(self._serve(sock))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            task.add_done_callback(lambda _: sock.close())

    async def _refuse(self) -> None:
        await self._end_connections()
        self._listener.close()
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(("127.0.0.1", self._port))
        self._listener.setblocking(False)

    async def _end_connections(self) -> None:
        self._loop.remove_reader(self._listener)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, sock: socket.socket) -> None:
        writer: asyncio.StreamWriter | None = None
        back: asyncio.StreamWriter | None = None
        try:
            reader, writer = await asyncio.open_connection(sock=sock)
            worker, back = await asyncio.open_connection(*self._target)
            await _Relay(self, reader, writer, worker, back).run()
        except (OSError, EOFError, _CutError):
            pass  # either side is gone
        finally:
            for side in (writer, back):
                if side is not None:
                    side.close()
            for side in (writer, back):
                with contextlib.suppress(OSError):
                    if side is not None:
                        await side.wait_closed()

    def take(self, head: bytes) -> str:
        """What a request with this head suffers."""
        if self._mode == "pass" or not (self.hits_all or head.startswith((b"POST /v1/", b"POST /generate"))):
            return "pass"
        self.hits += 1
        return self._mode


class _Relay:
    """One connection of the router and the one to the worker that belongs to it."""

    def __init__(
        self, proxy: FaultProxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, worker: asyncio.StreamReader,
        back: asyncio.StreamWriter,
    ) -> None:  # fmt: skip
        self.proxy, self.reader, self.writer, self.worker, self.back = proxy, reader, writer, worker, back

    async def run(self) -> None:
        begun = b""
        while True:
            head = begun + await self.reader.readuntil(b"\r\n\r\n")
            fault = self.proxy.take(head)
            if fault == "reset":
                self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.writer.transport.abort()
                raise _CutError
            self.back.write(head + await self.reader.readexactly(_length(head)))
            begun = await self._while_router_waits(self._answer(fault))

    async def _while_router_waits(self, answer: Coroutine[Any, Any, None]) -> bytes:
        """Give the answer as long as the router is there; returns the first byte of its next request, if it has come already."""
        answering = asyncio.ensure_future(answer)
        watching = asyncio.ensure_future(self.reader.read(1))
        try:
            await asyncio.wait({answering, watching}, return_when=asyncio.FIRST_COMPLETED)
            if watching.done() and (watching.exception() or not watching.result()):
                self.proxy.left_s.append(time.monotonic())
                raise EOFError("the router closed")
            await answering
            return watching.result() if watching.done() else b""
        finally:
            for task in (answering, watching):
                task.cancel()
            await asyncio.gather(answering, watching, return_exceptions=True)

    async def _answer(self, fault: str) -> None:
        if fault == "stall":
            await asyncio.Event().wait()
        head = await self.worker.readuntil(b"\r\n\r\n")
        if fault == "cut_header":
            await self._cut_after(head[:20])
        if fault == "slow":
            for at in range(len(head)):
                self.writer.write(head[at : at + 1])
                await asyncio.sleep(0.001)
        else:
            self.writer.write(head)
        if b"transfer-encoding: chunked" in head.lower():
            await self._chunks(fault)
            return
        left = _length(head)
        if fault in ("cut_body", "cut_chunk"):
            await self._cut_after(await self.worker.readexactly(left // 2))
        while left:
            data = await self.worker.read(min(left, 65536))
            if not data:
                raise _CutError
            self.writer.write(data)
            await self.writer.drain()
            left -= len(data)

    async def _chunks(self, fault: str) -> None:
        number = 0
        while True:
            line = await self.worker.readuntil(b"\r\n")
            size = int(line, 16)
            data = await self.worker.readexactly(size + 2)
            if number == 2 and fault == "cut_body":
                await self._cut_after(b"")
            if number == 2 and fault == "cut_chunk":
                await self._cut_after(line + data[: size // 2])
            self.writer.write(line + data)
            await self.writer.drain()
            if not size:
                return
            number += 1

    async def _cut_after(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()
        raise _CutError


def _length(head: bytes) -> int:
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return int(line[15:])
    return 0
