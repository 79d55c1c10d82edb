"""A lean streaming HTTP/1.1 client: one request in, one Answer with exact times and token counts out.

Runs in: `sglfast replay`, `sglfast demo`.
Contract: `LoadClient.send` never raises for what a server or network does: the Answer's `error` names it. Time to first token is
    taken when the first SSE event that carries output arrives; events after it are only kept as a short tail, whose last
    `usage` (or `meta_info`) object is read at the end. Connections are kept and used in turn, oldest first, so that the
    shards of a router get equal shares. A kept connection that dies before a byte of the answer is replaced once.
Why not a library: on a machine that also runs the router and the workers, a client that costs as much as they do measures itself.
"""

import asyncio
import time
from collections import deque
from dataclasses import dataclass, field
from typing import cast
from urllib.parse import urlsplit

import httptools

from sglfast.errors import ConfigError
from sglfast.load.sse import TAIL_BYTES, Usage, has_output, read_usage, stream_error

CONNECT_TIMEOUT_S = 10.0
MAX_BODY_BYTES = 64 << 20
TAIL_TRIM_BYTES = 64 << 10


@dataclass(slots=True)
class Answer:
    """What came back. Times in seconds of time.perf_counter(); ttft_s is -1 when no output came.

    error: "" = good, else its kind: connect, connect_timeout, timeout, closed (before an answer), cut (inside it), bad_http,
    http_<status>[ <x-router-error-code>], no_stream, bad_event, stream_error, stream_incomplete (no [DONE]), too_large.
    body: of an error answer or of one that was not asked as a stream.
    """

    started_s: float = 0.0
    ttft_s: float = -1.0
    latency_s: float = 0.0
    status: int = 0
    error: str = ""
    kv: str = ""
    usage: Usage = field(default_factory=Usage)
    body: bytes = b""


class _Exchange:
    """One request on one connection: collects the answer and resolves `done` exactly once."""

    __slots__ = (
        "answer", "done", "error_code", "first_event_s", "has_bytes", "has_framing", "is_sse", "is_stream", "pieces", "scan",
        "size_bytes",
    )  # fmt: skip

    def __init__(self, done: asyncio.Future[None], started_s: float, is_stream: bool) -> None:
        self.done = done
        self.answer = Answer(started_s=started_s)
        self.is_stream = is_stream
        self.is_sse = False
        self.has_bytes = False  # of the answer
        self.has_framing = False  # content-length or chunked: else the end of the connection is the end of the body
        self.error_code = ""
        self.scan: bytes | None = b""  # an unfinished line of the events before the first output; None after it
        self.first_event_s = -1.0
        self.pieces: list[bytes] = []
        self.size_bytes = 0

    def fail(self, error: str) -> None:
        if not self.done.done():
            self.answer.error = error
            self.answer.latency_s = time.perf_counter() - self.answer.started_s
            self.done.set_result(None)

    def add_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name == b"content-type":
            self.is_sse = value.startswith(b"text/event-stream")
        elif name in (b"content-length", b"transfer-encoding"):
            self.has_framing = True
        elif name == b"x-sglfast-kv":
            self.answer.kv = value.decode("latin-1")
        elif name == b"x-router-error-code":
            self.error_code = value.decode("latin-1")

    def add_body(self, data: bytes) -> None:
        if self.scan is not None and self.is_sse and self.is_stream:
            self._look_for_output(self.scan + data)
        self.pieces.append(data)
        self.size_bytes += len(data)
        if self.is_stream and self.size_bytes > TAIL_TRIM_BYTES:
            tail = b"".join(self.pieces)[-TAIL_BYTES:]
            self.pieces, self.size_bytes = [tail], len(tail)

    def _look_for_output(self, text: bytes) -> None:
        lines = text.split(b"\n")
        for line in lines[:-1]:
            if not line.startswith(b"data:"):
                continue
            now_s = time.perf_counter()
            if self.first_event_s < 0:
                self.first_event_s = now_s
            if has_output(line):
                self.answer.ttft_s = now_s - self.answer.started_s
                self.scan = None
                return
        self.scan = lines[-1]

    def finish(self, is_whole: bool = True) -> None:
        """The answer ended: by its framing (`is_whole`) or because the connection did."""
        if self.done.done():
            return
        answer = self.answer
        answer.latency_s = time.perf_counter() - answer.started_s
        text = b"".join(self.pieces)
        if answer.status != 200:
            answer.error = f"http_{answer.status}" + (f" {self.error_code}" if self.error_code else "")
            answer.body = text
        elif not is_whole:
            answer.error = "cut"
        elif not self.is_stream:
            answer.body = text
        elif not self.is_sse:
            answer.error, answer.body = "no_stream", text
        else:
            answer.error = stream_error(text)
            answer.usage = read_usage(text)
            if answer.ttft_s < 0 and self.first_event_s >= 0:  # tokens that are no text (half a character)
                answer.ttft_s = self.first_event_s - answer.started_s
        self.done.set_result(None)


class _Connection(asyncio.Protocol):
    """One kept-alive connection with at most one exchange on it; tells its client when it is free again or gone."""

    def __init__(self, client: "LoadClient") -> None:
        self._client = client
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._exchange: _Exchange | None = None
        self._is_interim = False
        self.lost = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass of it

    def send(self, data: bytes, exchange: _Exchange) -> None:
        self._exchange = exchange
        if self._transport is None or self._transport.is_closing():
            self._end("closed")
        else:
            self._transport.write(data)

    def abort(self, error: str) -> None:
        """Give up: the exchange fails with `error`, the connection is dropped."""
        self._end(error)
        if self._transport is not None:
            self._transport.abort()

    def _end(self, error: str) -> None:
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.fail(error)

    def data_received(self, data: bytes) -> None:
        if self._exchange is None:  # bytes that nobody asked for: the framing is lost
            self.abort("")
            return
        self._exchange.has_bytes = True
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self.abort("bad_http")

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._client.connections.discard(self)
        self.lost.set()
        exchange, self._exchange = self._exchange, None
        self._transport = None
        if exchange is None:
            return
        if not exchange.has_bytes:
            exchange.fail("closed")
        elif exchange.answer.status == 0:
            exchange.fail("cut")
        else:
            exchange.finish(is_whole=exc is None and not exchange.has_framing)

    # ---- called by the parser ----

    def on_message_begin(self) -> None:
        if self._exchange is None:
            raise httptools.HttpParserError("an answer without a request")

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._exchange is not None:
            self._exchange.add_header(name, value)

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        self._is_interim = status < 200
        if self._exchange is not None and not self._is_interim:
            self._exchange.answer.status = status

    def on_body(self, data: bytes) -> None:
        exchange = self._exchange
        if exchange is not None:
            exchange.add_body(data)
            if exchange.size_bytes > MAX_BODY_BYTES:
                self.abort("too_large")

    def on_message_complete(self) -> None:
        if self._is_interim:
            return
        exchange, self._exchange = self._exchange, None
        if exchange is None:
            return
        exchange.finish()
        if self._parser.should_keep_alive():
            self._client.idle.append(self)
        elif self._transport is not None:
            self._transport.close()


class LoadClient:
    """Sends requests to one server, `http://host:port`. Use it inside one event loop, and `close` it.

    resends: requests that were sent a second time because their kept connection had died.
    """

    def __init__(self, url: str) -> None:
        self._hostname, self._port = _address(url)
        self.host = f"[{self._hostname}]:{self._port}" if ":" in self._hostname else f"{self._hostname}:{self._port}"
        self.connections: set[_Connection] = set()
        self.idle: deque[_Connection] = deque()
        self.resends = 0

    async def send(self, request: bytes, *, timeout_s: float, is_stream: bool = True) -> Answer:
        """Send the bytes of a whole request and wait for the end of its answer, at most `timeout_s`."""
        started_s = time.perf_counter()
        connection = self._take_idle()
        if connection is not None:
            answer = await self._exchange(connection, request, started_s, timeout_s, is_stream)
            if answer.error != "closed":
                return answer
            self.resends += 1
        try:
            async with asyncio.timeout(min(CONNECT_TIMEOUT_S, timeout_s)):
                _, connection = await asyncio.get_running_loop().create_connection(lambda: _Connection(self), self._hostname, self._port)
        except TimeoutError:
            return Answer(started_s=started_s, latency_s=time.perf_counter() - started_s, error="connect_timeout")
        except OSError as error:
            return Answer(started_s=started_s, latency_s=time.perf_counter() - started_s, error="connect", body=str(error).encode())
        # Not before: uvloop closes a connection whose making was cancelled at its very end, and tells it nothing any more.
        self.connections.add(connection)
        return await self._exchange(connection, request, started_s, timeout_s, is_stream)

    async def get(self, path: str, *, timeout_s: float = 10.0) -> Answer:
        """GET a path and return its whole body (at most 64 MiB)."""
        head = f"GET {path} HTTP/1.1\r\nhost: {self.host}\r\naccept: */*\r\n\r\n"
        return await self.send(head.encode(), timeout_s=timeout_s, is_stream=False)

    async def close(self) -> None:
        """Drop every connection, and return when the loop has let go of them."""
        connections = list(self.connections)
        for connection in connections:
            connection.abort("closed")
        for connection in connections:
            await connection.lost.wait()

    def _take_idle(self) -> _Connection | None:
        while self.idle:
            connection = self.idle.popleft()
            if connection in self.connections:
                return connection
        return None

    async def _exchange(self, connection: _Connection, request: bytes, started_s: float, timeout_s: float, is_stream: bool) -> Answer:
        loop = asyncio.get_running_loop()
        exchange = _Exchange(loop.create_future(), started_s, is_stream)
        connection.send(request, exchange)
        remaining_s = started_s + timeout_s - time.perf_counter()
        timer = loop.call_later(max(0.0, remaining_s), connection.abort, "timeout")
        try:
            await exchange.done
        except asyncio.CancelledError:
            connection.abort("closed")
            raise
        finally:
            timer.cancel()
        return exchange.answer


def _address(url: str) -> tuple[str, int]:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"URL {url}: {error}") from None
    if parts.scheme != "http" or not parts.hostname or parts.path.strip("/") or parts.query:
        raise ConfigError(f"URL {url}: must look like http://host:port")
    return parts.hostname, port or 80
