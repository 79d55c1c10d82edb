"""One HTTP/1.1 connection of a simulated worker, and the bytes of its answers.

Runs in: sim, on the event loop. Contract: requests are parsed by llhttp; one request at a time, what is pipelined behind it is
    not answered and the connection ends after the answer (no router of ours pipelines to a worker). Answers have the heads of
    uvicorn: date, server, content-length or chunked, content-type; no header of the request is echoed. As uvicorn, an idle
    connection is closed after KEEP_ALIVE_S, and malformed bytes get a 400 and the end.
    The application is told of a whole request once, and once more (`on_gone`) when the client leaves before its answer ended.
"""

import asyncio
import logging
import struct
import time
from collections.abc import Callable
from email.utils import formatdate
from http import HTTPStatus
from socket import SO_LINGER, SOL_SOCKET
from typing import Protocol, cast

import httptools
import orjson

from sglfast.sim.fault import CutWriter, SlowWriter, Writer

KEEP_ALIVE_S = 5.0
MAX_BODY_BYTES = 256 << 20
JSON = b"application/json"
TEXT = b"text/plain; charset=utf-8"
EVENT_STREAM = b"text/event-stream; charset=utf-8"
# On, with no time to linger: close sends RST.
LINGER_NOTHING = struct.pack("ii", 1, 0)
LAST_CHUNK = b"0\r\n\r\n"

log = logging.getLogger("sim")

_STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}


class Request:
    """A whole request. path: without the query; headers that nobody here reads are dropped while parsing."""

    __slots__ = ("body", "content_type", "method", "path", "query", "rank")

    def __init__(self) -> None:
        self.method = ""
        self.path = ""
        self.query = ""
        self.content_type = b""
        self.rank = b""
        self.body = b""


class Outlet(Protocol):
    """Where the answer to one request goes: a Connection, or one part of a batch's. See Connection for the methods."""

    on_gone: Callable[[], None] | None

    @property
    def is_paused(self) -> bool:
        """Whether the client reads too slowly."""

    def respond(self, status: int, body: bytes, content_type: bytes = ..., extra: bytes = ...) -> None:
        """Send a whole answer."""

    def respond_json(self, status: int, value: object, extra: bytes = ...) -> None:
        """Send a JSON answer."""

    def start_stream(self) -> None:
        """Begin an SSE answer."""

    def send_chunks(self, chunks: bytes) -> None:
        """Send more of it."""

    def end_stream(self, last: bytes) -> None:
        """Send the last of it."""


class Application(Protocol):
    """What answers requests: a SimWorker."""

    connections: "set[Connection]"

    def handle(self, request: Request, connection: "Connection") -> None:
        """Answer a request through the connection's methods, now or later."""


class _Clock:
    """The date header, made once a second."""

    def __init__(self) -> None:
        self._second = 0
        self._line = b""

    def line(self) -> bytes:
        second = int(time.time())
        if second != self._second:
            self._second = second
            self._line = f"date: {formatdate(second, usegmt=True)}\r\nserver: uvicorn\r\n".encode()
        return self._line


_clock = _Clock()


class Connection(asyncio.Protocol):
    """One client connection; the application answers with `respond`, or with `start_stream` and what follows it.

    on_gone: called when the connection is lost during an answer, then forgotten. is_paused: the client reads too slowly.
    idle_since_s: when the last answer ended (monotonic), 0.0 while there is none or one is under way.
    """

    __slots__ = (
        "_application",
        "_body",
        "_expects_continue",
        "_is_answering",
        "_is_pipelined",
        "_keeps_alive",
        "_parser",
        "_request",
        "_stream_head",
        "_target",
        "_transport",
        "_writer",
        "idle_since_s",
        "is_paused",
        "on_gone",
    )

    def __init__(self, application: Application) -> None:
        self._application = application
        self._parser = httptools.HttpRequestParser(self)
        self._request = Request()
        self._target = b""
        self._body: list[bytes] = []
        self._expects_continue = False
        self._is_answering = False
        self._is_pipelined = False
        self._keeps_alive = True
        self._stream_head = b""
        self.on_gone: Callable[[], None] | None = None
        self.is_paused = False
        self.idle_since_s = 0.0

    # ---- asyncio ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # A cast, because uvloop's transports are none by inheritance.
        self._transport = cast(asyncio.Transport, transport)
        self._writer: Writer = self._transport
        self._application.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._application.connections.discard(self)
        self._is_answering = False
        on_gone, self.on_gone = self.on_gone, None
        if on_gone is not None:
            on_gone()

    def pause_writing(self) -> None:
        self.is_paused = True

    def resume_writing(self) -> None:
        self.is_paused = False

    def data_received(self, data: bytes) -> None:
        if self._is_pipelined:
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # answered as if no upgrade was asked for
        except httptools.HttpParserCallbackError as error:  # a bug of ours
            log.error("a request handler failed", exc_info=error.__context__ or error)
            self._keeps_alive = False
            self.respond(500, b"Internal Server Error", TEXT)
        except httptools.HttpParserError:
            if self._is_answering:
                self._is_pipelined = True
                return
            self._keeps_alive = False
            self._is_answering = True
            self.respond(400, b"Invalid HTTP request received.", TEXT)

    # ---- httptools ----

    def on_message_begin(self) -> None:
        if self._is_answering:
            self._is_pipelined = True
            return
        self._request = Request()
        self._target = b""
        self._body = []
        self._expects_continue = False
        self.idle_since_s = 0.0

    def on_url(self, url: bytes) -> None:
        if not self._is_pipelined:
            self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_pipelined:
            return
        match name.lower():
            case b"content-type":
                self._request.content_type = value
            case b"x-data-parallel-rank":
                self._request.rank = value
            case b"expect":
                self._expects_continue = value.lower() == b"100-continue"

    def on_headers_complete(self) -> None:
        if self._expects_continue and not self._is_pipelined:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        if not self._is_pipelined:
            self._body.append(body)

    def on_message_complete(self) -> None:
        if self._is_pipelined:
            return
        request = self._request
        path, _, query = self._target.partition(b"?")
        request.method = self._parser.get_method().decode("latin-1")
        request.path = path.decode("latin-1")
        request.query = query.decode("latin-1")
        request.body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        self._body = []
        # After a request to upgrade the parser is of no more use.
        self._keeps_alive = self._parser.should_keep_alive() and not self._parser.should_upgrade()
        self._is_answering = True
        self._writer = self._transport
        self._application.handle(request, self)

    # ---- for the application ----

    @property
    def is_answering(self) -> bool:
        """Whether a request waits for the end of its answer; False once the client is gone."""
        return self._is_answering

    def damage(self, mode: str, after_bytes: int) -> None:
        """Let a fault of the writing kind (fault.MODES) act on the answer to the request in hand."""
        if mode == "slow_headers":
            self._writer = SlowWriter(self._transport, asyncio.get_running_loop())
        else:
            self._writer = CutWriter(self._transport, after_bytes, counts_body=mode == "cut_body")

    def respond(self, status: int, body: bytes, content_type: bytes = JSON, extra: bytes = b"") -> None:
        """Send a whole answer. extra: more header lines, each with its CRLF. Does nothing when the client is gone."""
        if not self._is_answering:
            return
        length = f"content-length: {len(body)}\r\n".encode()
        kind = b"content-type: " + content_type + b"\r\n" if body else b""
        head = self._head(status, length + kind + extra)
        self._writer.write(head if self._request.method == "HEAD" else head + body)
        self._end_answer()

    def respond_json(self, status: int, value: object, extra: bytes = b"") -> None:
        """Send a JSON answer."""
        self.respond(status, orjson.dumps(value), JSON, extra)

    def start_stream(self) -> None:
        """Begin an SSE answer; its head goes out with the first chunks."""
        fields = b"content-type: " + EVENT_STREAM + b"\r\ntransfer-encoding: chunked\r\n"
        self._stream_head = self._head(200, fields)

    def send_chunks(self, chunks: bytes) -> None:
        """Send more of a stream's body, see `chunk`. Does nothing when the client is gone."""
        if self._is_answering:
            self._writer.write(self._stream_head + chunks)
            self._stream_head = b""

    def end_stream(self, last: bytes) -> None:
        """Send the last chunks and end the answer."""
        if self._is_answering:
            self.send_chunks(last + LAST_CHUNK)
            self._end_answer()

    def close_idle(self, idle_before_s: float) -> None:
        """Close a connection whose last answer ended before this moment (monotonic seconds)."""
        if 0.0 < self.idle_since_s < idle_before_s:
            self._transport.close()

    def reset(self) -> None:
        """End the connection at once with a TCP reset, as a killed process does."""
        transport = self._transport
        raw = transport.get_extra_info("socket")
        if raw is not None and not transport.is_closing():
            raw.setsockopt(SOL_SOCKET, SO_LINGER, LINGER_NOTHING)
        transport.abort()

    def _head(self, status: int, fields: bytes) -> bytes:
        end = b"\r\n" if self._keeps_alive and not self._is_pipelined else b"connection: close\r\n\r\n"
        return _STATUS_LINES[status] + _clock.line() + fields + end

    def _end_answer(self) -> None:
        self._is_answering = False
        self.on_gone = None
        if self._keeps_alive and not self._is_pipelined:
            self.idle_since_s = time.monotonic()
        else:
            self._writer.close()


def chunk(data: bytes) -> bytes:
    """Return one chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)
