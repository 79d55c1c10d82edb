"""sglfast.edge.relay: what control answers, handed on by a shard."""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator

import pytest
from edge_harness import Edge, run, settled
from raw_client import WAIT_S, request
from scripted_worker import Worker

from sglfast._httphead import RequestHead, ResponseHead, scan_request
from sglfast.edge import relay
from sglfast.edge.relay import ask_control, relayed

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def head_of(data: bytes) -> RequestHead:
    head = scan_request(data, 65536)
    assert isinstance(head, RequestHead)
    return head


METRICS = head_of(request("GET", "/metrics"))


async def asked(handler: Handler, head: RequestHead = METRICS, body: bytes = b"", timeout_s: float = 5.0) -> tuple[ResponseHead, bytes]:
    """ask_control of a control that answers with `handler`."""
    name = f"sglfast-test-{time.time_ns()}"
    async with await asyncio.start_unix_server(handler, sock=_listener(name)):
        return await ask_control(f"@{name}", head, body, timeout_s)


def _listener(name: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind("\0" + name)
    listener.listen()
    return listener


def sends(data: bytes) -> Handler:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = await reader.readuntil(b"\r\n\r\n")
        assert asked.startswith(b"GET /metrics HTTP/1.1\r\n")
        with contextlib.suppress(ConnectionError):  # what is too much is not read to its end
            for at in range(0, len(data), 70_000):
                writer.write(data[at : at + 70_000])
                await writer.drain()
        writer.close()

    return handler


# ---- which paths ----


@pytest.mark.parametrize(
    ("path", "methods", "kind"),
    [
        (b"/metrics", "GET HEAD", "metrics"),
        (b"/engine_metrics", "GET HEAD", "metrics"),
        (b"/health_generate", "GET HEAD", "info"),
        (b"/server_info", "GET HEAD", "info"),
        (b"/get_server_info", "GET HEAD", "info"),
        (b"/model_info", "GET HEAD", "info"),
        (b"/get_model_info", "GET HEAD", "info"),
        (b"/workers", "GET HEAD POST", "admin"),
        (b"/workers/abc", "GET HEAD PUT DELETE", "admin"),
        (b"/workers/http%3A%2F%2Fa%3A1", "GET HEAD PUT DELETE", "admin"),
        (b"/workers/", "GET HEAD PUT DELETE", "admin"),
        (b"/add_worker", "POST", "admin"),
        (b"/remove_worker", "POST", "admin"),
        (b"/list_workers", "GET HEAD", "admin"),
        (b"/get_loads", "GET HEAD", "admin"),
        (b"/flush_cache", "POST", "admin"),
    ],
)
def test_paths(path: bytes, methods: str, kind: str) -> None:
    found = relayed(path)
    assert found is not None
    every = ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS")
    assert [method for method in every if found.takes(method.encode())] == methods.split()
    assert found.kind == kind


@pytest.mark.parametrize("path", [b"/", b"/worker", b"/workersx", b"/v1/workers", b"/metrics/", b"/flush_cache/x", b""])
def test_other_paths_are_not_controls(path: bytes) -> None:
    assert relayed(path) is None


# ---- asking ----


def test_answer_of_control() -> None:
    body = b"# metrics\n" * 300_000
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4\r\ncontent-length: %d\r\n\r\n" % len(body)
    answer, found = run(asked(sends(head + body)))
    assert (answer.status, found) == (200, body)
    assert b"\r\nContent-Type: text/plain; version=0.0.4\r\n" in answer.kept
    answer, found = run(asked(sends(b"HTTP/1.1 299 Strange\r\nContent-Length: 0\r\n\r\n")))
    assert (answer.status, found) == (299, b"")


def test_the_request_arrives_as_the_client_sent_it() -> None:
    seen: list[bytes] = []

    async def control(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        seen.append(head + await reader.readexactly(11))
        writer.write(b"HTTP/1.1 202 Accepted\r\nlocation: /workers/7\r\ncontent-length: 2\r\n\r\n{}")
        writer.close()

    sent = request("POST", "/workers?a=%2F", "authorization: Bearer k", "connection: x-hop", "x-hop: 1", body=b'{"url":"x"}')
    answer, body = run(asked(control, head_of(sent), b'{"url":"x"}'))
    lines = seen[0].split(b"\r\n")
    assert lines[0] == b"POST /workers?a=%2F HTTP/1.1"
    assert {b"host: control", b"authorization: Bearer k", b"connection: close", b"content-length: 11"} < set(lines)
    assert b"x-hop: 1" not in lines
    assert seen[0].endswith(b'\r\n\r\n{"url":"x"}')
    assert (answer.status, body) == (202, b"{}")
    assert b"\r\nlocation: /workers/7\r\n" in answer.kept


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"HTTP/1.1 200 OK\r\ncontent-le",
        b"HTTP/1.1 200 OK\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 99999999999\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 abc\r\ncontent-length: 0\r\n\r\n",
        b"\r\n\r\n",
        b"x" * 300_000,
    ],
)
def test_broken_answers_of_control(data: bytes) -> None:
    with pytest.raises(ConnectionError):
        run(asked(sends(data)))


def test_control_that_does_not_answer() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    with pytest.raises(TimeoutError):
        run(asked(silent, timeout_s=0.1))
    with pytest.raises(OSError, match="refused"):
        run(ask_control("@sglfast-nobody-listens-here", METRICS, b"", 5.0))


# ---- at a real shard ----


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.close()


@contextlib.contextmanager
def control_that_says(*answers: bytes) -> Iterator[tuple[str, list[bytes], socket.socket]]:
    """A control that gives these answers in turn: its address, what it was asked, its listener."""
    name = f"sglfast-test-{time.time_ns()}"
    listener, seen = _listener(name), list[bytes]()
    listener.settimeout(20)

    def serve() -> None:
        for data in answers:
            peer, _ = listener.accept()
            with peer:
                seen.append(peer.recv(65536))
                peer.sendall(data)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield "@" + name, seen, listener
        thread.join(20)
        assert not thread.is_alive()
    finally:
        listener.close()


def ok(body: bytes, *lines: str, status: str = "200 OK") -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", *lines, f"content-length: {len(body)}", "", ""]).encode() + body


def test_metrics_come_from_control(worker: Worker) -> None:
    body = b"sglfast_up 1\n" * 10
    answer = ok(body, "content-type: text/plain")
    with (
        control_that_says(answer, answer) as (address, seen, listener),
        Edge([worker], control_address=address) as edge,
        settled(edge),
        edge.client() as client,
    ):
        found = client.ask(request("GET", "/metrics", "x-request-id: m-1"))
        assert (found.status, found.body, found.request_id) == (200, body, b"m-1")
        assert found.header("content-type") == [b"text/plain"]
        client.send(request("HEAD", "/metrics") + request("GET", "/health"))
        found = client.read_answer(is_head=True)
        assert found.header("content-length") == [b"%d" % len(body)]
        assert client.read_answer().body == b"OK", "the pipeline goes on"
        assert all(head.startswith(b"GET /metrics HTTP/1.1\r\n") for head in seen)
        listener.close()
        found = client.ask(request("GET", "/metrics"))
        assert (found.status, found.code) == (503, "control_unavailable")
        assert client.ask(request("GET", "/health")).body == b"OK"
        assert client.ask(request("POST", "/metrics", body=b"")).header("allow") == [b"GET, HEAD"]
        assert client.ask(request("DELETE", "/workers", body=b"")).header("allow") == [b"GET, HEAD, POST"]


def test_administration_goes_to_control_and_back(worker: Worker) -> None:
    added = ok(b'{"status":"accepted"}', "location: /workers/7", "content-type: application/json", status="202 Accepted")
    gone = ok(b'{"error":"x"}', "content-type: application/json", status="404 Not Found")
    with control_that_says(added, gone) as (address, seen, _), Edge([worker], control_address=address) as edge, settled(edge):
        with edge.client() as client:
            found = client.ask(request("POST", "/workers?x=1", "authorization: Bearer k", body=b'{"url": "u"}'))
            assert (found.status, found.body, found.header("location")) == (202, b'{"status":"accepted"}', [b"/workers/7"])
            assert len(found.request_id) == 32
            found = client.ask(request("DELETE", "/workers/http%3A%2F%2Fa%3A1", "x-request-id: d-1"))
            assert (found.status, found.request_id) == (404, b"d-1")
        assert seen[0].startswith(b"POST /workers?x=1 HTTP/1.1\r\n")
        assert seen[0].endswith(b'{"url": "u"}')
        assert b"authorization: Bearer k\r\n" in seen[0]
        assert seen[1].startswith(b"DELETE /workers/http%3A%2F%2Fa%3A1 HTTP/1.1\r\n")


def test_a_large_body_does_not_reach_control(worker: Worker) -> None:
    with Edge([worker], control_address="@nobody") as edge, settled(edge):
        with edge.client() as client:
            found = client.ask(request("POST", "/workers", body=b"x" * (relay._BODY_LIMIT_BYTES + 1)))
            assert (found.status, found.code) == (413, "payload_too_large")
        # Elsewhere: that one is closed when its body has not come at once.
        assert edge.ask(request("GET", "/health")).body == b"OK"


def test_a_client_that_leaves_while_control_works_leaves_nothing(worker: Worker) -> None:
    name = f"sglfast-test-{time.time_ns()}"
    listener = _listener(name)
    with listener, Edge([worker], control_address="@" + name) as edge, settled(edge):
        with edge.client() as client:
            client.send(request("GET", "/workers"))
            peer, _ = listener.accept()
        with peer:
            peer.settimeout(8)
            while peer.recv(65536):
                pass  # its end comes when the shard has let go


def test_who_waits_for_control_when_the_shard_stops_is_told_so(worker: Worker) -> None:
    name = f"sglfast-test-{time.time_ns()}"
    listener = _listener(name)
    with listener, Edge([worker], control_address="@" + name) as edge, edge.client() as client:
        client.send(request("GET", "/workers"))
        peer, _ = listener.accept()
        with peer:
            edge.control.send(b"q")
            assert edge.process.wait(WAIT_S) == 0
            found = client.read_answer()
            assert (found.status, found.code, found.closes) == (503, "shutting_down", True)
            assert client.has_ended()
            assert edge.log() == ""
