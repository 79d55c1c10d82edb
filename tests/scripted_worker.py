"""A worker that answers raw bytes as a test scripts them, and the bytes of answers.

One listening socket and one thread per connection, so that a script reads from top to bottom: it gets a Call (a whole request, or
its head) and sends, waits, closes. Every wait has a bound; what goes wrong in a script is shown by `errors`.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable

from raw_client import WAIT_S, Headers, reset


def answer(body: bytes = b"{}", *headers: str, status: str = "200 OK", version: str = "1.1") -> bytes:
    """Bytes of a worker's answer, framed by content-length."""
    lines = [f"HTTP/{version} {status}", *headers, f"content-length: {len(body)}", "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


def answer_head(*headers: str, status: str = "200 OK", version: str = "1.1") -> bytes:
    """Bytes of a worker's answer head with exactly these lines."""
    return "\r\n".join([f"HTTP/{version} {status}", *headers, "", ""]).encode("latin-1")


SSE_HEAD = answer_head("content-type: text/event-stream", "transfer-encoding: chunked")


class Call:
    """A request at a worker and the connection that it came on.

    head is raw; body is what followed it, with `reads_body` False only what had come with the head.
    """

    def __init__(self, worker: Worker, sock: socket.socket, connection: int, head: bytes, body: bytes) -> None:
        self.worker = worker
        self.sock = sock
        self.connection = connection  # number of the connection at this worker, from 1
        self.head = head
        self.body = body
        lines = head.split(b"\r\n")
        self.request_line = lines[0]
        self.headers: Headers = [(name, value.strip()) for name, _, value in (line.partition(b":") for line in lines[1:-2])]
        self.sent_bytes = 0
        self.sent_all_s = 0.0

    def header(self, name: str) -> list[bytes]:
        """All values of a header."""
        return [value for key, value in self.headers if key.lower() == name.encode()]

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)
        self.sent_bytes += len(data)

    def close(self) -> None:
        """Close in the orderly way, also what the router has not read yet."""
        self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()

    def reset(self) -> None:
        reset(self.sock)

    def wait_for_end(self, within_s: float = WAIT_S) -> bool:
        """Whether the router closes its connection within the time (data that it sends before counts as no end)."""
        self.sock.settimeout(within_s)
        try:
            while self.sock.recv(65536):
                pass
        except TimeoutError:
            return False
        except OSError:
            pass
        return True

    @property
    def is_closed(self) -> bool:
        return self.sock.fileno() < 0


Script = Callable[[Call], None]


def says(*pieces: bytes) -> Script:
    """A script that sends these bytes and keeps the connection."""

    def script(call: Call) -> None:
        for piece in pieces:
            call.send(piece)

    return script


def late(delay_s: float, *pieces: bytes) -> Script:
    """A script that waits, then sends these bytes."""

    def script(call: Call) -> None:
        time.sleep(delay_s)
        says(*pieces)(call)

    return script


def then_closes(*pieces: bytes) -> Script:
    """A script that sends these bytes and closes."""

    def script(call: Call) -> None:
        for piece in pieces:
            call.send(piece)
        call.close()

    return script


def echoes(call: Call) -> None:
    """Answers with the body of the request."""
    call.send(answer(call.body, "content-type: application/json"))


class Worker:
    """An HTTP server whose answers are scripted. `plan(a, b)`: first request a, all further ones b."""

    def __init__(self, name: str = "worker", rcvbuf_bytes: int = 0) -> None:
        self.name = name
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        if rcvbuf_bytes:
            self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, rcvbuf_bytes)
        self.port: int = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.calls: list[Call] = []
        self.errors: list[str] = []
        self.connections = 0
        self._changed = threading.Condition()
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self.reset()
        self._accepting = threading.Thread(target=self._accept, name=f"{name} accepts", daemon=True)
        self._accepting.start()

    def reset(self) -> None:
        """Back to the start: echo every body, no calls seen, connections closed."""
        with self._changed:
            self._plan: list[Script] = [echoes]
            self.reads_body = True  # False: scripts run as soon as the head is there
            self.calls = []
            self.connections = 0
            sockets = list(self._sockets)
        for sock in sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(WAIT_S)
            if thread.is_alive():
                self.errors.append(f"{self.name}: a script did not end")
        self._threads = [thread for thread in self._threads if thread.is_alive()]

    def plan(self, *scripts: Script) -> None:
        with self._changed:
            self._plan = list(scripts)

    def wait_calls(self, count: int) -> list[Call]:
        """The calls so far, when there are at least so many."""
        with self._changed:
            if not self._changed.wait_for(lambda: len(self.calls) >= count, WAIT_S):
                raise AssertionError(f"{self.name} saw {len(self.calls)} calls, expected {count}")
            return list(self.calls)

    @property
    def open_connections(self) -> int:
        with self._changed:
            return len(self._sockets)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)  # wakes accept
        self._accepting.join(WAIT_S)
        self.listener.close()
        self.reset()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._changed:
                self.connections += 1
                self._sockets.add(sock)
                number = self.connections
            thread = threading.Thread(target=self._serve, args=(sock, number), name=f"{self.name} #{number}", daemon=True)
            thread.start()
            self._threads.append(thread)  # only now may it be waited for

    def _serve(self, sock: socket.socket, number: int) -> None:
        data = b""
        try:
            while sock.fileno() >= 0:
                while (end := data.find(b"\r\n\r\n")) < 0:
                    more = sock.recv(65536)
                    if not more:
                        return
                    data += more
                call = Call(self, sock, number, data[: end + 4], b"")
                data = data[end + 4 :]
                size = int(call.header("content-length")[0])  # the router always sends one
                if self.reads_body:
                    pieces, had = [data], len(data)
                    while had < size:
                        more = sock.recv(1 << 18)
                        if not more:
                            return
                        pieces.append(more)
                        had += len(more)
                    data = b"".join(pieces)
                    call.body, data = data[:size], data[size:]
                else:
                    call.body, data = data, b""
                with self._changed:
                    self.calls.append(call)
                    script = self._plan[min(len(self.calls), len(self._plan)) - 1]
                    self._changed.notify_all()
                script(call)
        except OSError:
            pass  # the router closed, or the test did
        except Exception as error:  # shown by the test that owns this worker
            self.errors.append(f"{self.name}: {error!r}")
        finally:
            with self._changed:
                self._sockets.discard(sock)
            sock.close()


class RefusingPort:
    """An address that refuses connections and that nobody else can take."""

    def __init__(self) -> None:
        self._sock = socket.socket()
        self._sock.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._sock.getsockname()[1]}"

    def close(self) -> None:
        self._sock.close()


class SilentPort:
    """An address whose connections are never accepted: the kernel drops them when the backlog is full."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=0)
        self.url = "http://{}:{}".format(*self._listener.getsockname())
        self._fill: list[socket.socket] = []
        for _ in range(8):
            sock = socket.socket()
            sock.setblocking(False)
            sock.connect_ex(self._listener.getsockname())
            self._fill.append(sock)
        time.sleep(0.05)

    def close(self) -> None:
        for sock in [*self._fill, self._listener]:
            sock.close()
