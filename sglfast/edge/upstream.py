"""Connections to one worker: a pool of idle ones, opened on demand; the framing of answers.

Runs in: shards, event loop. Contract: an UpstreamConnection carries one Exchange at a time and tells it `on_head`, `on_body`,
    `on_end` or `on_lost`; it goes back to the idle list only after a complete answer on a connection that both sides keep alive.
    Idle connections live shorter than the worker's own keep-alive, so that a request seldom meets one that is being closed.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast
from urllib.parse import urlsplit

from sglfast import _counters
from sglfast._httphead import MORE, Chunks, ResponseHead, scan_response

if TYPE_CHECKING:
    from sglfast.edge.exchange import Exchange
    from sglfast.edge.shard import Shard

# Framing of the answer that a connection is reading.
IDLE, HEAD, LENGTH, CHUNKED, UNTIL_CLOSE = range(5)


class UpstreamConnection(asyncio.Protocol):
    """One connection to a worker."""

    __slots__ = ("chunks", "exchange", "has_spoken", "idle_since_s", "left", "partial", "state", "transport", "upstream", "uses")

    def __init__(self, upstream: Upstream) -> None:
        self.upstream = upstream
        self.transport: asyncio.Transport | None = None
        self.exchange: Exchange | None = None
        self.chunks: Chunks | None = None
        self.partial = b""
        self.state = IDLE
        self.left = 0
        self.uses = 0
        self.has_spoken = False  # a byte came since the present request was sent
        self.idle_since_s = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.upstream.open_count += 1
        self.upstream.shard.column.add_worker(self.upstream.worker_idx, _counters.W_CONNECTIONS, 1)

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self.upstream.forget(self)
        exchange = self.exchange
        if exchange is not None:
            self.exchange = None
            if self.state == UNTIL_CLOSE and exc is None:
                exchange.on_end(self, is_reusable=False)
            else:
                exchange.on_lost(self)

    def send(self, exchange: Exchange, head: bytes, body: bytes) -> None:
        """Give the connection a request. Small bodies ride with the head; large ones are not copied once more."""
        assert self.transport is not None
        self.exchange = exchange
        self.state = HEAD
        self.has_spoken = False
        self.uses += 1
        if len(body) < 16384:
            self.transport.write(head + body)
        else:
            self.transport.writelines((head, body))

    def data_received(self, data: bytes) -> None:
        exchange = self.exchange
        if exchange is None:
            self.close()  # a worker that speaks out of turn
            return
        exchange.was_active = True
        state = self.state
        if state == CHUNKED:
            self._chunked(exchange, data)
        elif state == LENGTH:
            self._length(exchange, data)
        elif state == HEAD:
            self._head(exchange, data)
        else:
            exchange.on_body(data)

    def _head(self, exchange: Exchange, data: bytes) -> None:
        self.has_spoken = True
        if self.partial:
            data = self.partial + data
            self.partial = b""
        while True:
            head = scan_response(data, self.upstream.shard.config.max_header_bytes)
            if type(head) is not ResponseHead:
                if head == MORE:
                    self.partial = data
                else:
                    self.fail(exchange)
                return
            if head.status >= 200:
                break
            if head.status == 101:
                self.fail(exchange)
                return
            # 100 and 103 are between the worker and us; the client's own 100 was ours
            data = data[head.head_bytes :]
        start = head.head_bytes
        payload = data[start:] if len(data) > start else b""
        left = head.content_length
        if head.status in (204, 304):
            left = 0
        elif head.is_chunked:
            self.chunks = Chunks()
            self.state = CHUNKED
            if exchange.head.is_http10:
                if exchange.on_head(self, head, b"") and payload:
                    self._chunked(exchange, payload)
                return
            end = self.chunks.follow(payload)
            if end == -2:
                self.fail(exchange)
            elif exchange.on_head(self, head, payload if end < 0 else payload[:end]) and end >= 0:
                self._end(exchange, end == len(payload))
            return
        elif left < 0:
            self.state = UNTIL_CLOSE
            exchange.on_head(self, head, payload)
            return
        self.state = LENGTH
        self.left = left - len(payload)
        if self.left > 0:
            exchange.on_head(self, head, payload)
            return
        # The whole answer came at once: one write to the client.
        if exchange.on_head(self, head, payload if self.left == 0 else payload[: self.left]):
            self._end(exchange, self.left == 0)

    def _length(self, exchange: Exchange, data: bytes) -> None:
        self.left -= len(data)
        if self.left > 0:
            exchange.on_body(data)
            return
        exchange.on_body(data if self.left == 0 else data[: self.left])
        self._end(exchange, self.left == 0)

    def _chunked(self, exchange: Exchange, data: bytes) -> None:
        chunks = self.chunks
        assert chunks is not None
        if exchange.decodes_chunks:
            pieces: list[bytes] = []
            end = chunks.decode(data, 0, pieces)
            payload = b"".join(pieces)
        else:
            end = chunks.follow(data)
            payload = data if end < 0 or end == len(data) else data[:end]
        if end == -2:
            self.fail(exchange)
            return
        if payload:
            exchange.on_body(payload)
        if end >= 0:
            self._end(exchange, end == len(data))

    def _end(self, exchange: Exchange, is_reusable: bool) -> None:
        if self.exchange is not exchange:
            return  # the client left while the last bytes were relayed
        self.exchange = None
        self.state = IDLE
        self.chunks = None
        exchange.on_end(self, is_reusable)

    def fail(self, exchange: Exchange) -> None:
        """The worker's bytes are no HTTP answer: the connection cannot be used any more."""
        self.exchange = None
        self.close()
        exchange.on_malformed(self)

    def cut(self) -> None:
        """The worker was removed: close, and tell the exchange from the loop, not from inside of somebody else's choice."""
        exchange = self.exchange
        self.close()
        if exchange is not None:
            self.upstream.shard.loop.call_soon(self._tell_lost, exchange)

    def _tell_lost(self, exchange: Exchange) -> None:
        if not exchange.is_over:
            exchange.on_lost(self)

    def close(self) -> None:
        """Close at once; what was not yet sent is dropped. Never calls back into an exchange."""
        self.exchange = None
        if self.transport is not None:
            self.transport.abort()


class Upstream:
    """The connections of this shard to one worker."""

    __slots__ = (
        "_opening",
        "busy",
        "host",
        "host_header",
        "idle",
        "is_removed",
        "open_count",
        "port",
        "shard",
        "url",
        "worker_idx",
    )

    def __init__(self, shard: Shard, worker_idx: int, url: str) -> None:
        parts = urlsplit(url)
        self.shard = shard
        self.worker_idx = worker_idx
        self.url = url
        self.host = parts.hostname or "127.0.0.1"
        self.port = parts.port or 80
        self.host_header = parts.netloc.encode()
        self.idle: list[UpstreamConnection] = []  # oldest first; the newest is taken first
        self.open_count = 0
        self.is_removed = False
        self._opening: set[asyncio.Task[None]] = set()

    def take_idle(self) -> UpstreamConnection | None:
        """The most recently used idle connection that is still open."""
        while self.idle:
            connection = self.idle.pop()
            if connection.transport is not None and not connection.transport.is_closing():
                return connection
        return None

    def open(self, exchange: Exchange) -> None:
        """Open a connection; then calls `exchange.on_connected` or `exchange.on_unreachable`."""
        task = self.shard.loop.create_task(self._open(exchange))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    async def _open(self, exchange: Exchange) -> None:
        shard = self.shard
        try:
            async with asyncio.timeout(shard.config.connect_timeout_secs):
                _, connection = await shard.loop.create_connection(lambda: UpstreamConnection(self), self.host, self.port)
        except (OSError, TimeoutError, ValueError) as error:  # ValueError: a host that is no name
            shard.column.add_worker(self.worker_idx, _counters.W_CONNECT_ERRORS)
            exchange.on_unreachable(error)
            return
        shard.column.add(_counters.S_UPSTREAM_CONNECTS)
        if connection.transport is None:
            exchange.on_unreachable(ConnectionResetError("closed while it was being opened"))
        elif self.is_removed and not exchange.is_over:
            connection.close()
            exchange.on_unreachable(ConnectionAbortedError("the worker was removed"))
        elif exchange.is_over:
            connection.uses = 1  # it will have been idle when it is used
            self.give_back(connection)
        else:
            exchange.on_connected(connection)

    def give_back(self, connection: UpstreamConnection) -> None:
        """Keep a connection for the next request, or close it when it cannot serve one."""
        transport = connection.transport
        if transport is None:
            return
        # Unsent request bytes: the worker answered before it had read all; it may close at any moment.
        if self.is_removed or transport.get_write_buffer_size() or transport.is_closing():
            connection.close()
            return
        connection.idle_since_s = self.shard.now_s
        self.idle.append(connection)

    def forget(self, connection: UpstreamConnection) -> None:
        """A connection was closed."""
        self.open_count -= 1
        self.shard.column.add_worker(self.worker_idx, _counters.W_CONNECTIONS, -1)
        if connection.state == IDLE and connection in self.idle:
            self.idle.remove(connection)

    def sweep(self, before_s: float) -> None:
        """Close what has been idle since before `before_s` (oldest first, so the cost is what is closed)."""
        while self.idle and self.idle[0].idle_since_s < before_s:
            self.idle.pop(0).close()

    def close(self) -> None:
        """The worker is gone: close idle connections now; whoever still opens one is turned away (Shard.cut ends the busy ones)."""
        self.is_removed = True
        for connection in self.idle[:]:
            connection.close()
        self.idle.clear()
