"""sim/http.py over real sockets, under several ways to cut a request into packets."""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from sglfast.sim.http import Connection, Request, chunk

WAIT_S = 20
POST = b"POST /a/b?x=1&y HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\nX-Data-Parallel-Rank: 4\r\n"


class Echo:
    """Answers with what was asked; paths choose other ways to answer."""

    def __init__(self) -> None:
        self.connections: set[Connection] = set()
        self.requests: list[Request] = []
        self.gone = asyncio.Event()
        self.waiting: asyncio.Queue[Connection] = asyncio.Queue()

    def handle(self, request: Request, connection: Connection) -> None:
        self.requests.append(request)
        match request.path:
            case "/stream":
                connection.start_stream()
                connection.send_chunks(chunk(b"data: 1\n\n"))
                connection.send_chunks(chunk(b"data: 2\n\n"))
                connection.end_stream(chunk(b"data: [DONE]\n\n"))
            case "/wait":
                connection.on_gone = self.gone.set
                self.waiting.put_nowait(connection)
            case "/reset":
                connection.reset()
            case "/bug":
                raise RuntimeError("a bug")
            case _:
                connection.respond_json(200, {"path": request.path, "length": len(request.body)}, b"x-more: 1\r\n")


class Client:
    """A raw connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes, size: int = 1 << 20) -> None:
        for at in range(0, len(data), size):
            self.writer.write(data[at : at + size])
            await self.writer.drain()
            await asyncio.sleep(0)

    async def head(self) -> bytes:
        return await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), WAIT_S)

    async def answer(self) -> tuple[bytes, bytes]:
        head = await self.head()
        length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
        return head, await asyncio.wait_for(self.reader.readexactly(length), WAIT_S)

    async def rest(self) -> bytes:
        return await asyncio.wait_for(self.reader.read(), WAIT_S)


def serve(test: Callable[[Echo, Client], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        echo = Echo()
        server = await asyncio.get_running_loop().create_server(lambda: Connection(echo), "127.0.0.1", 0)
        try:
            client = Client(*await asyncio.open_connection(*server.sockets[0].getsockname()))
            try:
                await test(echo, client)
            finally:
                client.writer.close()
                with contextlib.suppress(ConnectionError):
                    await client.writer.wait_closed()
        finally:
            server.close()
            for connection in list(echo.connections):
                connection.reset()
            for _ in range(10):
                await asyncio.sleep(0)

    asyncio.run(run())


@pytest.mark.parametrize("size", [1, 5, 1 << 20])
@pytest.mark.parametrize(
    "body",
    [
        b"Content-Length: 5\r\n\r\nhello",
        b"Transfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n",
        b"Expect: 100-continue\r\nContent-Length: 5\r\n\r\nhello",
    ],
    ids=["length", "chunked", "continue"],
)
def test_a_request_arrives_whole_however_it_is_cut(body: bytes, size: int) -> None:
    async def test(echo: Echo, client: Client) -> None:
        for _ in range(2):  # twice: keep-alive
            await client.send(POST + body, size)
            if b"Expect" in body:
                assert await client.head() == b"HTTP/1.1 100 Continue\r\n\r\n"
            head, answer = await client.answer()
            assert answer == b'{"path":"/a/b","length":5}'
            lines = head.decode().split("\r\n")
            assert lines[0] == "HTTP/1.1 200 OK"
            assert lines[1].startswith("date: ")
            assert lines[1].endswith(" GMT")
            assert lines[2:] == ["server: uvicorn", "content-length: 26", "content-type: application/json", "x-more: 1", "", ""]
        for request in echo.requests:
            assert (request.method, request.path, request.query) == ("POST", "/a/b", "x=1&y")
            assert (request.content_type, request.rank, request.body) == (b"application/json", b"4", b"hello")

    serve(test)


def test_a_stream_is_chunked_and_keeps_the_connection() -> None:
    async def test(echo: Echo, client: Client) -> None:
        for _ in range(2):
            await client.send(b"GET /stream HTTP/1.1\r\n\r\n")
            head = await client.head()
            assert b"content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n" in head
            body = await asyncio.wait_for(client.reader.readuntil(b"\r\n0\r\n\r\n"), WAIT_S)
            assert body == b"9\r\ndata: 1\n\n\r\n9\r\ndata: 2\n\n\r\ne\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"

    serve(test)


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n",
        b"GET / HTTP/1.0\r\n\r\n",
        b"GET / HTTP/1.1\r\nUpgrade: h2c\r\nConnection: upgrade\r\n\r\n",
    ],
    ids=["close", "http10", "upgrade"],
)
def test_a_connection_that_is_not_kept(request_bytes: bytes) -> None:
    async def test(echo: Echo, client: Client) -> None:
        await client.send(request_bytes)
        head, _ = await client.answer()
        assert b"connection: close\r\n" in head
        assert await client.rest() == b""

    serve(test)


def test_a_head_request_gets_no_body() -> None:
    async def test(echo: Echo, client: Client) -> None:
        await client.send(b"HEAD / HTTP/1.1\r\n\r\n")
        assert b"content-length: 23\r\n" in await client.head()
        await client.send(b"GET /2 HTTP/1.1\r\n\r\n")
        _, body = await client.answer()
        assert body == b'{"path":"/2","length":0}'

    serve(test)


def test_what_is_pipelined_is_not_answered_and_the_connection_ends() -> None:
    async def test(echo: Echo, client: Client) -> None:
        await client.send(b"GET /wait HTTP/1.1\r\n\r\nGET /2 HTTP/1.1\r\n\r\n")
        connection = await asyncio.wait_for(echo.waiting.get(), WAIT_S)
        await client.send(b"GET /3 HTTP/1.1\r\n\r\n")
        await asyncio.sleep(0.05)  # a close with unread bytes would be a reset
        connection.respond(200, b"ok")
        head, body = await client.answer()
        assert b"connection: close" in head
        assert body == b"ok"
        assert await client.rest() == b""
        assert [request.path for request in echo.requests] == ["/wait"]

    serve(test)


@pytest.mark.parametrize("garbage", [b"\x16\x03\x01\x02\x00\x01\x00", b"GET / HTTP/1.1\r\nno colon\r\n\r\n", b"GET\r\n\r\n"])
def test_malformed_bytes_get_400_and_the_end(garbage: bytes) -> None:
    async def test(echo: Echo, client: Client) -> None:
        await client.send(garbage)
        head, body = await client.answer()
        assert head.startswith(b"HTTP/1.1 400 Bad Request\r\n")
        assert body == b"Invalid HTTP request received."
        assert await client.rest() == b""
        assert echo.requests == []

    serve(test)


def test_a_client_that_leaves_is_noticed_at_once() -> None:
    async def test(echo: Echo, client: Client) -> None:
        await client.send(b"POST /wait HTTP/1.1\r\nContent-Length: 0\r\n\r\n")
        connection = await asyncio.wait_for(echo.waiting.get(), WAIT_S)
        assert connection.is_answering
        client.writer.close()
        await asyncio.wait_for(echo.gone.wait(), WAIT_S)
        assert not connection.is_answering
        assert echo.connections == set()
        # Whatever is said to it now goes nowhere.
        connection.respond(200, b"late")
        connection.end_stream(b"late")

    serve(test)


def test_leaving_between_requests_is_nobodys_loss() -> None:
    async def test(echo: Echo, client: Client) -> None:
        await client.send(b"GET / HTTP/1.1\r\n\r\n")
        await client.answer()
        client.writer.close()
        for _ in range(1000):
            if not echo.connections:
                break
            await asyncio.sleep(0.01)
        assert echo.connections == set()
        assert not echo.gone.is_set()

    serve(test)


def test_reset_is_a_tcp_reset() -> None:
    async def test(echo: Echo, client: Client) -> None:
        await client.send(b"GET /reset HTTP/1.1\r\n\r\n")
        with pytest.raises(ConnectionResetError):
            await client.rest()

    serve(test)


def test_a_bug_in_a_handler_is_answered_with_500(caplog: pytest.LogCaptureFixture) -> None:
    async def test(echo: Echo, client: Client) -> None:
        await client.send(b"GET /bug HTTP/1.1\r\n\r\n")
        head, _ = await client.answer()
        assert head.startswith(b"HTTP/1.1 500 ")
        assert "a bug" in caplog.text

    serve(test)


def test_idle_connections_are_closed_busy_ones_are_not() -> None:
    async def test(echo: Echo, client: Client) -> None:
        loop = asyncio.get_running_loop()
        far = loop.time() + 1000
        await client.send(b"GET /a")
        await asyncio.sleep(0.01)
        (connection,) = echo.connections
        connection.close_idle(far)  # no answer yet
        await client.send(b" HTTP/1.1\r\n\r\n")
        await client.answer()
        connection.close_idle(connection.idle_since_s)  # not long enough
        await client.send(b"GET /wait HTTP/1.1\r\n\r\n")
        assert await asyncio.wait_for(echo.waiting.get(), WAIT_S) is connection
        connection.close_idle(far)  # busy
        connection.respond(200, b"ok")
        await client.answer()
        connection.close_idle(far)
        assert await client.rest() == b""

    serve(test)


def test_a_slow_reader_is_seen() -> None:
    async def test(echo: Echo, client: Client) -> None:
        client.writer.transport.pause_reading()
        await client.send(b"GET /wait HTTP/1.1\r\n\r\n")
        connection = await asyncio.wait_for(echo.waiting.get(), WAIT_S)
        connection.start_stream()
        piece = chunk(b"x" * 65_536)
        sent = 0
        while not connection.is_paused:
            connection.send_chunks(piece)
            sent += 1
            assert sent < 1000
        client.writer.transport.resume_reading()
        await asyncio.wait_for(client.reader.readexactly(sent * 65_536), WAIT_S)
        assert not connection.is_paused

    serve(test)
