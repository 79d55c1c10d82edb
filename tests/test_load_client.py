"""LoadClient against a scripted server: times, token counts, kept connections, every kind of failure.

Other tests of load/ use the server too: `serving(script)`.
"""

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
import uvloop

from sglfast.errors import ConfigError
from sglfast.load.client import TAIL_TRIM_BYTES, Answer, LoadClient, _Connection, _Exchange

T = TypeVar("T")

SSE_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n"
USAGE = {"prompt_tokens": 700, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 640}}


@dataclass
class Seen:
    """A request that the server got, on its `connection`-th connection."""

    connection: int
    path: str
    headers: dict[str, str]
    body: bytes


# What to do for a request: bytes are written, a float is a pause in seconds, an Event is waited for, None resets the connection.
Script = Callable[[Seen], Iterable[bytes | float | threading.Event | None]]


@dataclass
class ScriptedServer:
    script: Script
    url: str = ""
    seen: list[Seen] = field(default_factory=list)
    connections: int = 0

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = self.connections
        self.connections += 1
        with contextlib.closing(writer), contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                lines = head.split("\r\n")
                headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:] if line)}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                seen = Seen(number, lines[0].split(" ")[1], headers, body)
                self.seen.append(seen)
                for step in self.script(seen):
                    if step is None:
                        writer.transport.abort()
                    elif isinstance(step, float):
                        await asyncio.sleep(step)
                    elif isinstance(step, threading.Event):
                        while not step.is_set():  # noqa: ASYNC110
                            await asyncio.sleep(0.005)
                    else:
                        writer.write(step)
                        await writer.drain()
                if headers.get("x-close") or writer.transport.is_closing():
                    break


@contextlib.contextmanager
def serving(script: Script) -> Iterator[ScriptedServer]:
    """A server in a thread of its own, on a free port of the loopback."""
    state = ScriptedServer(script)
    ready = threading.Event()
    stops: list[Callable[[], object]] = []

    async def serve() -> None:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        stops.append(lambda: loop.call_soon_threadsafe(stop.set))
        server = await asyncio.start_server(state.handle, "127.0.0.1", 0)
        state.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        ready.set()
        await stop.wait()
        server.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))  # which cancels the connections that are left
    thread.start()
    try:
        assert ready.wait(10)
        yield state
    finally:
        stops[0]()
        thread.join(10)


def uvloop_run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on the event loop that `sglfast replay` uses."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(coroutine)


def event(value: object) -> bytes:
    """One SSE event."""
    return b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n"


def chunk(data: bytes) -> bytes:
    """One chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def text_event(text: str) -> bytes:
    return event({"choices": [{"index": 0, "text": text, "finish_reason": None}]})


def usage_event(usage: object = USAGE) -> bytes:
    return event({"choices": [], "usage": usage})


def whole_stream(headers: bytes = b"", usage: object = USAGE) -> bytes:
    """A good streamed answer of one output event."""
    body = chunk(text_event(" ok")) + chunk(usage_event(usage)) + chunk(event(b"[DONE]")) + b"0\r\n\r\n"
    return SSE_HEAD + headers + b"\r\n" + body


def ask(url: str, count: int = 1, timeout_s: float = 20.0, headers: str = "") -> tuple[list[Answer], LoadClient]:
    """Send `count` requests one after the other with one client."""

    async def run() -> tuple[list[Answer], LoadClient]:
        client = LoadClient(url)
        request = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n{headers}\r\n{{}}".encode()
        try:
            return [await client.send(request, timeout_s=timeout_s) for _ in range(count)], client
        finally:
            await client.close()

    return uvloop_run(run())


def test_ttft_is_the_first_event_with_output() -> None:
    def script(_: Seen) -> Iterator[bytes | float]:
        yield SSE_HEAD + b"x-sglfast-kv: worker=http://w:1; rank=0\r\n\r\n"
        yield chunk(event({"choices": [{"delta": {"role": "assistant", "content": ""}}]}))
        yield 0.2
        yield chunk(event({"choices": [{"delta": {"content": "a"}}]}))
        yield 0.4
        yield chunk(event({"choices": [{"delta": {"content": "b"}}]}) + usage_event() + event(b"[DONE]")) + b"0\r\n\r\n"

    with serving(script) as server:
        (answer,), _ = ask(server.url)
    assert answer.error == ""
    assert 0.2 <= answer.ttft_s < answer.latency_s - 0.1
    assert answer.kv == "worker=http://w:1; rank=0"
    assert (answer.usage.prompt_tokens, answer.usage.cached_tokens, answer.usage.output_tokens) == (700, 640, 3)


def test_answer_that_comes_byte_by_byte() -> None:
    def script(_: Seen) -> Iterator[bytes]:
        answer = whole_stream()
        for place in range(len(answer)):
            yield answer[place : place + 1]

    with serving(script) as server:
        (answer,), _ = ask(server.url)
    assert (answer.error, answer.usage.cached_tokens) == ("", 640)
    assert 0 < answer.ttft_s < answer.latency_s


def test_output_without_text_counts_as_output() -> None:
    with serving(lambda _: [SSE_HEAD + b"\r\n" + chunk(text_event("") + usage_event() + event(b"[DONE]")) + b"0\r\n\r\n"]) as server:
        (answer,), _ = ask(server.url)
    assert answer.error == ""
    assert answer.ttft_s > 0


def test_connection_is_kept() -> None:
    with serving(lambda _: [whole_stream()]) as server:
        answers, client = ask(server.url, count=5)
    assert [answer.error for answer in answers] == [""] * 5
    assert server.connections == 1
    assert not client.connections


def test_connections_are_used_in_turn() -> None:
    gate = threading.Event()

    def script(seen: Seen) -> Iterator[bytes | threading.Event]:
        if len(server.seen) == 2:
            gate.set()
        yield gate
        yield whole_stream()

    async def run(url: str) -> None:
        client = LoadClient(url)
        request = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
        await asyncio.gather(*(client.send(request, timeout_s=20) for _ in range(2)))
        for _ in range(4):
            assert (await client.send(request, timeout_s=20)).error == ""
        await client.close()

    with serving(script) as server:
        uvloop_run(run(server.url))
    turns = [seen.connection for seen in server.seen[2:]]
    assert turns in ([0, 1, 0, 1], [1, 0, 1, 0])


def test_dead_kept_connection_is_replaced_once() -> None:
    def script(seen: Seen) -> list[bytes | None]:
        is_second_on_first = len(server.seen) == 2
        return [None] if is_second_on_first else [whole_stream()]

    with serving(script) as server:
        answers, client = ask(server.url, count=3)
    assert [answer.error for answer in answers] == ["", "", ""]
    assert client.resends == 1
    assert len(server.seen) == 4


def test_fresh_connection_that_closes_is_an_error() -> None:
    with serving(lambda _: [None]) as server:
        (answer,), client = ask(server.url)
    assert answer.error == "closed"
    assert client.resends == 0
    assert len(server.seen) == 1


@pytest.mark.parametrize(
    ("steps", "error"),
    [
        ([b"HTTP/1.1 503 X\r\ncontent-length: 2\r\nx-router-error-code: no_healthy_workers\r\n\r\nno"], "http_503 no_healthy_workers"),
        ([b"HTTP/1.1 500 X\r\ncontent-length: 2\r\n\r\nno"], "http_500"),
        ([b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"], "no_stream"),
        ([b"HTTP/1.1 200 OK\r\ncont", None], "cut"),
        ([SSE_HEAD + b"\r\n" + chunk(text_event(" a")), None], "cut"),
        ([SSE_HEAD + b"\r\n" + chunk(text_event(" a")) + b"0\r\n\r\n"], "stream_incomplete"),
        ([SSE_HEAD + b"\r\n" + chunk(text_event(" a") + event({"error": {"message": "no"}})) + b"0\r\n\r\n"], "stream_error"),
        ([SSE_HEAD + b"\r\n" + chunk(event({"error": {"message": "no"}}) + event(b"[DONE]")) + b"0\r\n\r\n"], "stream_error"),
        ([SSE_HEAD + b"\r\n" + chunk(text_event(" a") + event(b'{"choices') + event(b"[DONE]")) + b"0\r\n\r\n"], "bad_event"),
        ([b"SSH-2.0-OpenSSH\r\n\r\n"], "bad_http"),
    ],
)
def test_failures_have_names(steps: list[bytes | None], error: str) -> None:
    with serving(lambda _: steps) as server:
        (answer,), client = ask(server.url)
    assert answer.error == error
    assert answer.latency_s > 0
    assert not client.connections
    if error.startswith("http_"):
        assert answer.body == b"no"


def test_body_that_ends_with_the_connection() -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
    with serving(lambda _: [head + text_event(" a") + usage_event() + event(b"[DONE]")]) as server:
        answers, _ = ask(server.url, count=2, headers="x-close: 1\r\n")
    assert [(answer.error, answer.usage.prompt_tokens) for answer in answers] == [("", 700)] * 2
    assert server.connections == 2


def test_interim_answer_is_skipped() -> None:
    with serving(lambda _: [b"HTTP/1.1 100 Continue\r\n\r\n" + whole_stream()]) as server:
        (answer,), _ = ask(server.url)
    assert (answer.error, answer.status) == ("", 200)


def test_timeout() -> None:
    never = threading.Event()
    with serving(lambda _: [never]) as server:
        (answer,), client = ask(server.url, timeout_s=0.1)
    assert answer.error == "timeout"
    assert not client.connections


def test_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    (answer,), _ = ask(f"http://127.0.0.1:{port}")
    assert answer.error == "connect"
    assert b"refused" in answer.body.lower() or b"connect" in answer.body.lower()


def test_closes_although_a_request_was_cancelled_when_its_connection_was_just_made(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run(url: str) -> None:
        client, made = LoadClient(url), []

        def cancelling(connection: _Connection, transport: asyncio.BaseTransport) -> None:
            connection_made(connection, transport)
            made.append(connection)
            asyncio.get_running_loop().call_soon(task.cancel)  # before the task hears of its connection

        connection_made = _Connection.connection_made
        monkeypatch.setattr(_Connection, "connection_made", cancelling)
        task = asyncio.create_task(client.get("/"))
        with pytest.raises(asyncio.CancelledError):
            await task
        assert made
        await asyncio.wait_for(client.close(), 10)

    with socket.create_server(("127.0.0.1", 0)) as listener:  # the kernel answers for it
        uvloop_run(run(f"http://127.0.0.1:{listener.getsockname()[1]}"))


def test_cancelled_request_leaves_no_connection() -> None:
    never = threading.Event()

    async def run(url: str) -> None:
        client = LoadClient(url)
        task = asyncio.create_task(client.send(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", timeout_s=20))
        while not server.seen:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        (connection,) = client.connections
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.wait_for(connection.lost.wait(), 10)
        assert not client.connections
        assert client._take_idle() is None

    with serving(lambda _: [never]) as server:
        uvloop_run(run(server.url))


def test_memory_of_a_long_stream_is_bounded() -> None:
    async def run() -> None:
        exchange = _Exchange(asyncio.get_running_loop().create_future(), 0.0, is_stream=True)
        exchange.add_header(b"Content-Type", b"text/event-stream")
        exchange.answer.status = 200
        piece = text_event("x" * 300)
        for _ in range(20_000):
            exchange.add_body(piece)
            assert exchange.size_bytes == sum(map(len, exchange.pieces)) <= TAIL_TRIM_BYTES
        exchange.add_body(usage_event() + event(b"[DONE]"))
        exchange.finish()
        assert (exchange.answer.error, exchange.answer.usage.cached_tokens) == ("", 640)

    asyncio.run(run())


def test_get_keeps_the_whole_body() -> None:
    body = b"x" * (TAIL_TRIM_BYTES * 3)

    async def run(url: str) -> Answer:
        client = LoadClient(url)
        try:
            return await client.get("/big")
        finally:
            await client.close()

    with serving(lambda _: [b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body]) as server:
        assert uvloop_run(run(server.url)).body == body
    assert server.seen[0].path == "/big"


@pytest.mark.parametrize("url", ["https://x", "127.0.0.1:80", "http://", "http://x:99999", "http://x/path"])
def test_bad_url(url: str) -> None:
    with pytest.raises(ConfigError, match=r"URL .*"):
        LoadClient(url)
