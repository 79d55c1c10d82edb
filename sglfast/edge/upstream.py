"""Connections to one worker: a pool of idle ones, opened on demand; the framing of answers.

Runs in: shards, event loop. Contract: an UpstreamConnection carries one Exchange at a time and tells it `on_head`, `on_body`,
    `on_end` or `on_lost`; it goes back to the idle list only after a complete answer on a connection that both sides keep alive.
    Idle connections live shorter than the worker's own keep-alive, so that a request seldom meets one that is being closed.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar, cast
from urllib.parse import urlsplit

from sglfast import _counters
from sglfast._relay import IDLE, UNTIL_CLOSE, UpstreamBase, WorkerConnectionBase
from sglfast.edge.rank_refusal import RankDoubt

if TYPE_CHECKING:
    from sglfast.edge.exchange import Exchange
    from sglfast.edge.leg import Leg
    from sglfast.edge.pools import Route
    from sglfast.edge.shard import Shard

P = TypeVar("P", bound=asyncio.Protocol)
_OUR_OWN = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)  # errors of a connection that are not the worker's


class UpstreamConnection(WorkerConnectionBase, asyncio.Protocol):
    """One connection to a worker. What every answer does is compiled (cext/relayworker.pxi), the rest is here."""

    __slots__ = ()

    upstream: Upstream
    exchange: Exchange | None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.upstream.open_count += 1
        self.upstream.shard.column.add_worker(self.upstream.worker_idx, _counters.W_CONNECTIONS, 1)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.transport is None:  # told before, by Upstream._open
            return
        self.transport = None
        self.upstream.forget(self)
        exchange = self.exchange
        if exchange is not None:
            self.exchange = None
            if self.state == UNTIL_CLOSE and exc is None:
                self.end_at_close(exchange)
            else:
                exchange.on_lost(self)

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
        if not exchange.is_over and exchange.connection is self:  # meanwhile it may have gone to another worker
            exchange.on_lost(self)


class Upstream(UpstreamBase):
    """The connections of this shard to one worker; taking and giving back is compiled."""

    __slots__ = (
        "_tasks",
        "aborts_running",
        "bootstrap",
        "decode_url_line",
        "doubt",
        "dp_size",
        "generation",
        "host",
        "is_out",
        "is_tls",
        "open_count",
        "port",
        "url",
    )

    def __init__(self, shard: Shard, worker_idx: int, generation: int, url: str) -> None:
        parts = urlsplit(url)
        self.shard = shard
        self.worker_idx = worker_idx
        self.generation = generation
        self.url = url
        self.is_out = False  # it fails its health checks
        self.aborts_running = 0
        self.host = parts.hostname or "127.0.0.1"
        self.is_tls = parts.scheme == "https"
        self.port = parts.port or (443 if self.is_tls else 80)
        self.host_header = parts.netloc.encode()
        # Of pairs: what both are told of the prefill worker, and of the decode worker.
        self.bootstrap = (b"", b"null")
        self.dp_size = 1
        self.rank_ways = None
        self.doubt = RankDoubt()
        self.decode_url_line = b"x-sgl-decode-url: %b\r\n" % url.encode() if url.isascii() and url.isprintable() else b""
        self.log_label = b""
        self.idle: list[UpstreamConnection] = []  # oldest first; the newest is taken first
        self.open_count = 0
        self.is_removed = False
        self._tasks: set[asyncio.Task[None]] = set()

    def open(self, exchange: Leg) -> None:
        """Open a connection; then calls `exchange.on_connected` or `exchange.on_unreachable`, if it still is on the same route."""
        self.keep(self.shard.loop.create_task(self._open(exchange, exchange.route)))

    def keep(self, task: asyncio.Task[None]) -> None:
        """Own a task until it is done."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def connect(self, make: Callable[[], P]) -> P:
        """Connect one more protocol to the worker. Raises OSError, TimeoutError, ValueError (a host that is no name)."""
        async with asyncio.timeout(self.shard.config.connect_timeout_secs):
            loop: asyncio.AbstractEventLoop = self.shard.loop
            tls = self.shard.worker_tls if self.is_tls else None
            _, protocol = await loop.create_connection(make, self.host, self.port, ssl=tls)
            return protocol

    async def _open(self, exchange: Leg, route: Route | None) -> None:
        shard, connection = self.shard, UpstreamConnection(self)
        try:
            await self.connect(lambda: connection)
        except (OSError, TimeoutError, ValueError) as error:
            if connection.transport is not None:  # made when its time was just over: uvloop closes it, and tells it nothing any more
                connection.connection_lost(error)
            is_ours = isinstance(error, OSError) and error.errno in _OUR_OWN
            if not is_ours:
                shard.column.add_worker(self.worker_idx, _counters.W_CONNECT_ERRORS)
            if exchange.route is route and is_ours:
                exchange.on_no_room()
            elif exchange.route is route:
                exchange.on_unreachable(error)
            return
        shard.column.add(_counters.S_UPSTREAM_CONNECTS)
        # An exchange that is over has no route; one whose other half has failed may be at another worker by now.
        is_wanted = exchange.route is route
        if connection.transport is None:
            if is_wanted:
                exchange.on_unreachable(ConnectionResetError("closed while it was being opened"))
        elif self.is_removed and is_wanted:
            connection.close()
            exchange.on_unreachable(ConnectionAbortedError("the worker was removed"))
        elif not is_wanted:
            connection.uses = 1  # it will have been idle when it is used
            self.give_back(connection)
        else:
            try:
                exchange.on_connected(connection)
            except Exception as error:
                exchange.on_mishap(error)

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
