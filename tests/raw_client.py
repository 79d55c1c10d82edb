"""A blocking client that speaks raw bytes, and the bytes of requests.

Every wait has a bound. Whatever is read as a whole answer has passed llhttp as well: an answer that only a lenient reader takes
fails the test.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

import httptools

WAIT_S = 20.0  # bound of every wait; only a failing test spends it

Headers = list[tuple[bytes, bytes]]


def request(
    method: str, target: str, *headers: str, body: bytes | None = None, version: str = "1.1", host: str | None = "edge.test"
) -> bytes:
    """Bytes of a request; `content-length` is added for a body, `host` unless it is None."""
    lines = [f"{method} {target} HTTP/{version}"]
    lines += [f"host: {host}"] if host is not None else []
    lines += headers
    lines += [f"content-length: {len(body)}"] if body is not None else []
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + (body or b"")


def post(body: bytes = b"{}", *headers: str, target: str = "/v1/chat/completions", version: str = "1.1") -> bytes:
    """Bytes of a request that is relayed to a worker."""
    return request("POST", target, *headers, body=body, version=version)


def chunk(data: bytes) -> bytes:
    """One chunk; the empty one ends a body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def chunked(data: bytes, *sizes: int) -> bytes:
    """A whole body in chunks of these sizes, the rest in a last one."""
    pieces, at = [], 0
    for size in sizes:
        pieces.append(data[at : at + size])
        at += size
    return b"".join(chunk(piece) for piece in [*pieces, data[at:]] if piece) + chunk(b"")


def reset(sock: socket.socket) -> None:
    """Close with RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


@dataclass
class Answer:
    """One answer as it came. body is decoded, raw is not; interim: statuses of the 1xx answers before it."""

    status: int
    reason: bytes
    headers: Headers
    raw_head: bytes
    body: bytes = b""
    raw_body: bytes = b""
    interim: list[int] = field(default_factory=list)

    def header(self, name: str) -> list[bytes]:
        """All values of a header."""
        return [value for key, value in self.headers if key.lower() == name.encode()]

    @property
    def code(self) -> str | None:
        """The router's own error code."""
        found = self.header("x-router-error-code")
        assert len(found) <= 1
        return found[0].decode() if found else None

    @property
    def closes(self) -> bool:
        return self.header("connection") == [b"close"]

    @property
    def request_id(self) -> bytes:
        found = self.header("x-request-id")
        assert len(found) == 1, f"x-request-id must be there once: {self.raw_head!r}"
        return found[0]


class _Strict:
    """Collects what llhttp reads of answers."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.is_complete = False

    def on_body(self, data: bytes) -> None:
        self.pieces.append(data)

    def on_message_complete(self) -> None:
        self.is_complete = True


class Client:
    """A blocking client connection with a buffer."""

    def __init__(self, port: int, rcvbuf_bytes: int = 0) -> None:
        self.sock = socket.socket()
        if rcvbuf_bytes:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, rcvbuf_bytes)
        self.sock.settimeout(WAIT_S)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.connect(("127.0.0.1", port))
        self.buffer = b""

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def send(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.sock.sendall(piece)

    def send_what_fits(self, data: bytes) -> None:
        """Send, and do not mind that the other side closes meanwhile."""
        with contextlib.suppress(ConnectionError):
            self.sock.sendall(data)

    def ask(self, data: bytes) -> Answer:
        self.send(data)
        return self.read_answer()

    def half_close(self) -> None:
        self.sock.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        reset(self.sock)

    def read_until(self, marker: bytes) -> bytes:
        """Everything up to and including the marker."""
        while (at := self.buffer.find(marker)) < 0:
            self._more(f"waiting for {marker!r}")
        out, self.buffer = self.buffer[: at + len(marker)], self.buffer[at + len(marker) :]
        return out

    def read_exactly(self, size: int) -> bytes:
        pieces, had = [self.buffer], len(self.buffer)
        while had < size:
            piece = self._recv(f"waiting for {size} bytes")
            pieces.append(piece)
            had += len(piece)
        data = b"".join(pieces)
        self.buffer = data[size:]
        return data[:size]

    def read_to_end(self) -> bytes:
        """What comes until the router closes in the orderly way."""
        pieces = [self.buffer]
        self.buffer = b""
        while True:
            piece = self.sock.recv(1 << 18)
            if not piece:
                return b"".join(pieces)
            pieces.append(piece)

    def has_ended(self) -> bool:
        """Whether the router closes now, without another byte."""
        try:
            return self.read_to_end() == b""
        except ConnectionResetError:
            return self.buffer == b""

    def is_silent(self, for_s: float) -> bool:
        """Whether nothing comes, not even an end, for so long."""
        self.sock.settimeout(for_s)
        try:
            return not self.buffer and self.sock.recv(1, socket.MSG_PEEK) is None
        except TimeoutError:
            return True
        finally:
            self.sock.settimeout(WAIT_S)

    def read_head(self) -> Answer:
        """The head of an answer; 1xx answers before it are noted."""
        interim: list[int] = []
        while True:
            raw = self.read_until(b"\r\n\r\n")
            lines = raw.split(b"\r\n")
            version, status, reason = lines[0].split(b" ", 2)
            assert version == b"HTTP/1.1", raw
            headers = [(name, value.strip()) for name, _, value in (line.partition(b":") for line in lines[1:-2])]
            if not status.startswith(b"1"):
                return Answer(int(status), reason, headers, raw, interim=interim)
            interim.append(int(status))

    def read_answer(self, *, is_head: bool = False) -> Answer:
        """A whole answer. is_head: to a HEAD request, so without a body."""
        found = self.read_head()
        framing = found.header("transfer-encoding"), found.header("content-length")
        if is_head or found.status in (204, 304):
            return found
        if framing[0]:
            assert ([value.lower() for value in framing[0]], framing[1]) == ([b"chunked"], []), found.raw_head
            found.raw_body = self._read_chunked()
        elif framing[1]:
            assert len(framing[1]) == 1, found.raw_head
            found.raw_body = self.read_exactly(int(framing[1][0]))
        else:
            assert found.closes, f"an answer without framing must close: {found.raw_head!r}"
            found.raw_body = self.read_to_end()
        strict = _Strict()
        parser = httptools.HttpResponseParser(strict)
        parser.feed_data(found.raw_head + found.raw_body)
        assert strict.is_complete or not any(framing), "llhttp finds the answer incomplete"
        found.body = b"".join(strict.pieces)
        return found

    def _read_chunked(self) -> bytes:
        raw: list[bytes] = []
        while True:
            line = self.read_until(b"\r\n")
            raw.append(line)
            size = int(line[:-2].partition(b";")[0], 16)
            if not size:
                break
            raw.append(self.read_exactly(size + 2))
        while raw[-1] != b"\r\n":
            raw.append(self.read_until(b"\r\n"))
        return b"".join(raw)

    def _recv(self, doing: str) -> bytes:
        try:
            piece = self.sock.recv(1 << 18)
        except TimeoutError:
            raise AssertionError(f"nothing came, {doing}; so far {self.buffer[-200:]!r}") from None
        if not piece:
            raise EOFError(f"the router closed, {doing}; so far {self.buffer[-200:]!r}")
        return piece

    def _more(self, doing: str) -> None:
        self.buffer += self._recv(doing)


@contextlib.contextmanager
def many(count: int, port: int) -> Iterator[list[Client]]:
    """So many clients at once."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(Client(port)) for _ in range(count)]
