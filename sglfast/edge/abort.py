"""Tell an engine to end a request that nobody waits for: `POST /abort_request` with the request's `rid`.

Runs in: shards, event loop. Contract: best effort and never in anybody's way: a connection of its own, ABORT_SECS in all, so many at once
    for a worker and no more (whose connection was closed may notice that, too). The answer is not looked at.
The rid: engines refuse a rid that they have, so it is never the client's `x-request-id`, which a client may use again. When the
    router has made the request id, the first attempt's rid is the same; each further attempt has a fresh one, because an engine may
    still have the one before. A body that names a `rid` is its client's affair and stays as it is.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

from sglfast import _counters
from sglfast.edge.header_lines import value_of

if TYPE_CHECKING:
    from sglfast._httphead import RequestHead
    from sglfast.edge.upstream import Upstream

ABORT_SECS = 5.0
_AT_ONCE = 64


class _AbortCall(asyncio.Protocol):
    """Sends its bytes and is done at the first of the answer, or when the connection ends."""

    def __init__(self, data: bytes, loop: asyncio.AbstractEventLoop) -> None:
        self._data = data
        self.transport: asyncio.Transport | None = None
        self.done = loop.create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.write(self._data)

    def data_received(self, data: bytes) -> None:
        self._end()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end()

    def _end(self) -> None:
        if not self.done.done():
            self.done.set_result(None)


def abort(upstream: Upstream, head: RequestHead, rid: bytes) -> None:
    """Ask the worker to end the request `rid`. head: the request's, for what it shows of itself to the worker."""
    shard = upstream.shard
    if upstream.aborts_running >= _AT_ONCE or upstream.is_removed:
        return
    shard.column.add(_counters.S_ABORTS)
    # A worker that asks for a key was shown this one with the request.
    shown = upstream.key_line
    if shown is None:
        value = value_of(head.kept, b"authorization")
        shown = b"" if value is None else b"authorization: %b\r\n" % value
    body = b'{"rid":"%b"}' % rid
    data = (
        b"POST /abort_request HTTP/1.1\r\nhost: %b\r\n%bcontent-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%b"
        % (upstream.host_header, shown, len(body), body)
    )
    upstream.aborts_running += 1
    upstream.keep(shard.loop.create_task(_send(upstream, data)))


async def _send(upstream: Upstream, data: bytes) -> None:
    call: _AbortCall | None = None
    try:
        async with asyncio.timeout(ABORT_SECS):
            call = await upstream.connect(lambda: _AbortCall(data, upstream.shard.loop))
            await call.done
    except (OSError, TimeoutError, ValueError):
        pass  # the closed connection has to do
    finally:
        upstream.aborts_running -= 1
        if call is not None and call.transport is not None:
            call.transport.abort()
