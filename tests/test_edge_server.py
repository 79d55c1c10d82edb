"""sglfast.edge.server: client connections. What one request may look like is in tests/test_edge_cases.py."""

import asyncio
import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from edge_harness import Edge, Memory, StubTransport, run, settled, shard_in_loop, stub_client, wait_until
from raw_client import WAIT_S, Client, chunk, many, post, request
from scripted_worker import SSE_HEAD, Call, Worker, answer, answer_head, late, says

from sglfast import _segment
from sglfast._counters import S_CONNECTIONS, S_REQUESTS
from sglfast.edge.server import ClientConnection
from sglfast.edge.shard import Shard

HEALTH = request("GET", "/health")
MB = 1 << 20
CHUNKED_TO_NOWHERE = b"POST /x HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.close()


@pytest.fixture(scope="module")
def patient_shard(worker: Worker) -> Iterator[Edge]:
    with Edge([worker], max_payload_size=100_000, max_header_bytes=4096) as edge:
        yield edge


@pytest.fixture
def edge(patient_shard: Edge) -> Iterator[Edge]:
    with settled(patient_shard):
        yield patient_shard


@pytest.fixture(scope="module")
def impatient_shard(worker: Worker) -> Iterator[Edge]:
    with Edge([worker], header_timeout_secs=0.4, body_timeout_secs=0.4, idle_timeout_secs=1.0, send_timeout_secs=1.0) as edge:
        yield edge


@pytest.fixture
def impatient(impatient_shard: Edge) -> Iterator[Edge]:
    with settled(impatient_shard):
        yield impatient_shard


# ---- keep-alive, pipelines ----


def test_many_requests_on_one_connection(edge: Edge, worker: Worker) -> None:
    with edge.client() as client:
        for number in range(50):
            body = b"x" * number
            assert client.ask(post(body)).body == body
        assert edge.word(S_CONNECTIONS) == 1
    assert worker.connections == 1


def test_pipeline_of_mixed_requests_is_answered_in_order(edge: Edge, worker: Worker) -> None:
    """Slow and quick answers, own answers and relayed ones, framed in all ways."""
    scripts = [
        late(0.05, answer(b"slow")),
        says(SSE_HEAD + chunk(b"data: 1\n\n") + chunk(b"")),
        says(answer_head(status="204 No Content")),
        says(answer(b"e", status="429 Busy")),
    ]
    worker.plan(*scripts * 5)
    sent, expected = b"", []
    for _ in range(5):
        sent += post(b"1") + HEALTH + post(b"2") + request("GET", "/nothing") + post(b"3")
        sent += (
            request("HEAD", "/health")
            + b"POST /generate HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n"
            + chunk(b"4")
            + chunk(b"")
        )
        expected += [(200, b"slow"), (200, b"OK"), (200, b"data: 1\n\n"), (404, None), (204, b""), (200, b""), (429, b"e")]
    with edge.client() as client:
        client.send(sent)
        for at, (status, body) in enumerate(expected):
            found = client.read_answer(is_head=at % 7 == 5)
            assert found.status == status
            assert body is None or found.body == body
    assert [call.body for call in worker.calls] == [b"1", b"2", b"3", b"4"] * 5


def test_one_exchange_at_a_time(edge: Edge, worker: Worker) -> None:
    """The second request of a pipeline is not sent before the first is answered."""

    def script(call: Call) -> None:
        time.sleep(0.1)
        assert len(worker.calls) == 1
        call.send(answer(b"1"))

    worker.plan(script, says(answer(b"2")))
    with edge.client() as client:
        client.send(post() + post())
        assert [client.read_answer().body for _ in range(2)] == [b"1", b"2"]


def test_a_client_that_pipelines_too_much_is_not_read(edge: Edge, worker: Worker) -> None:
    """Waiting bytes are bounded while an answer is made; afterwards all requests are answered."""
    may_answer = threading.Event()

    def script(call: Call) -> None:
        assert may_answer.wait(WAIT_S)
        call.send(answer(b"first"))

    worker.plan(script)
    filler = request("GET", "/health", "x: " + "y" * 4000)
    before_bytes = edge.rss_bytes()
    with edge.client() as client:
        client.send(post())
        client.sock.settimeout(0.5)
        sent = 0
        with contextlib.suppress(TimeoutError):  # until nothing more fits for half a second
            while sent < 20 * MB:
                sent += client.sock.send(filler[sent % len(filler) :])
        assert sent < 16 * MB, "the shard reads on"
        assert edge.rss_bytes() - before_bytes < 4 * MB
        client.sock.settimeout(WAIT_S)
        may_answer.set()
        assert client.read_answer().body == b"first"
        client.send(filler[sent % len(filler) :])
        for _ in range(sent // len(filler) + 1):
            assert client.read_answer().body == b"OK"


def test_long_pipelines_of_quick_answers_are_no_recursion(edge: Edge) -> None:
    for one in (CHUNKED_TO_NOWHERE, b"\r\n" + HEALTH, request("POST", "/x", body=b"1")):
        with edge.client() as client:
            client.send(one * 3000)
            for _ in range(3000):
                assert client.read_answer().status in (200, 404)


def in_process(test: Any) -> None:
    """Run `test(shard, connection, transport)` on a connection whose network the test plays."""
    memory = Memory(["http://127.0.0.1:9"])

    async def wrapped() -> None:
        shard = shard_in_loop(memory)
        await test(shard, *stub_client(shard))

    run(wrapped())


def test_bytes_that_come_before_waiting_ones_got_their_turn_stay_behind_them() -> None:
    """At the end of an exchange the waiting bytes are handled from the loop; what is received before that is younger."""

    async def test(shard: Shard, connection: ClientConnection, transport: StubTransport) -> None:
        connection.data_received(request("GET", "/metrics"))  # asks control, so the connection is busy
        connection.data_received(b"GET /hea")
        assert connection.task is not None
        connection.task.cancel()
        connection.task = None
        connection.on_exchange_end()
        connection.data_received(b"lth HTTP/1.1\r\nhost: a\r\n\r\n")
        await asyncio.sleep(0)
        assert transport.take().startswith(b"HTTP/1.1 200 OK"), "the two halves were put together the wrong way round"
        connection.connection_lost(None)

    in_process(test)


# ---- Expect, limits ----


def test_continue_comes_before_the_body_is_sent(edge: Edge, worker: Worker) -> None:
    for framing, body in (("content-length: 5", b"hello"), ("transfer-encoding: chunked", chunk(b"hello") + chunk(b""))):
        with edge.client() as client:
            client.send(request("POST", "/generate", "expect: 100-continue", framing))
            assert client.read_until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            assert worker.calls == []
            client.send(body)
            assert client.read_answer().body == b"hello"
            worker.reset()


def test_no_continue_to_a_body_that_is_refused(edge: Edge) -> None:
    with edge.client() as client:
        found = client.ask(request("POST", "/generate", "expect: 100-continue", "content-length: 100001"))
        assert (found.status, found.interim) == (413, [])
        assert client.has_ended()


def test_largest_body_passes(edge: Edge) -> None:
    body = b"x" * 100_000
    assert edge.ask(post(body)).body == body
    with edge.client() as client:
        client.send(b"POST /generate HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n" + chunk(body) + chunk(b""))
        assert client.read_answer().body == body


@pytest.mark.parametrize("framing", ["content-length: 5000000", "transfer-encoding: chunked"])
def test_too_large_body_gets_its_413_although_all_of_it_is_sent(framing: str, edge: Edge, worker: Worker) -> None:
    """A client that first sends all and then reads must not lose the answer to a reset."""
    body = b"x" * 5_000_000
    with edge.client() as client:
        client.send(request("POST", "/v1/chat/completions", framing))
        client.send(body if framing.startswith("c") else chunk(body) + chunk(b""))
        found = client.read_answer()
        assert (found.status, found.code, found.closes) == (413, "payload_too_large", True)
        assert client.read_to_end() == b""
    assert worker.calls == []


def test_too_large_body_is_refused_while_it_streams(edge: Edge) -> None:
    with edge.client() as client:
        client.send(b"POST /generate HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n")
        for _ in range(101):
            client.send_what_fits(chunk(b"x" * 1000))
        assert client.read_answer().status == 413  # the body's end was never sent


def test_many_small_chunks_cost_little_memory(edge: Edge) -> None:
    piece = chunk(b"xy") * 10_000
    before_bytes = edge.rss_bytes()
    with edge.client() as client:
        client.send(b"POST /generate HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n")
        for _ in range(4):
            client.send(piece)
        wait_until(lambda: client.is_silent(0.05), "the shard has read it")
        # 40,000 objects of two bytes would be 2 MB and more
        assert edge.rss_bytes() - before_bytes < 1_500_000
        client.send(chunk(b""))
        assert client.read_answer().body == b"xy" * 40_000


@pytest.mark.parametrize("is_unusual", [False, True])
def test_too_large_head(is_unusual: bool, edge: Edge) -> None:
    target = "http://a/health" if is_unusual else "/health"
    fits = request("GET", target, "x: " + "y" * (4096 - len(request("GET", target, "x: "))))
    assert len(fits) == 4096
    assert edge.ask(fits).status == 200
    for data in (request("GET", target, "x: " + "y" * 5000), request("GET", target)[:-2] + b"x: " + b"y" * 5000, b"GET /" + b"a" * 5000):
        with edge.client() as client:
            found = client.ask(data)
            assert (found.status, found.code) == (431, "headers_too_large")
            assert client.has_ended()


# ---- clients that leave ----


@pytest.mark.parametrize("sent", [b"", b"GET /hea", HEALTH[:-2], post(b"12345")[:-3], CHUNKED_TO_NOWHERE[:-4], b"GET http://a"])
@pytest.mark.parametrize("how", ["close", "reset", "half-close"])
def test_client_leaves_before_its_request_is_complete(sent: bytes, how: str, edge: Edge) -> None:
    with edge.client() as client:
        client.send(HEALTH)
        client.read_answer()
        client.send(sent)
        if how == "half-close":
            client.half_close()
            assert client.has_ended()
        elif how == "reset":
            client.reset()
        wait = time.monotonic()
        if how == "close":
            client.sock.close()
        wait_until(lambda: edge.word(S_CONNECTIONS) == 0, "the connection is gone", 1.0)
        assert time.monotonic() - wait < 1.0


def test_answers_that_are_complete_reach_a_client_that_half_closed(edge: Edge) -> None:
    with edge.client() as client:
        client.send(HEALTH * 3)
        client.half_close()
        assert [client.read_answer().body for _ in range(3)] == [b"OK"] * 3
        assert client.has_ended()


# ---- time ----


def test_heads_that_do_not_come(impatient: Edge) -> None:
    openings = [b"GET /health HT", b"GET http://a/health HT", post(b"")[:-1]]
    with many(len(openings), impatient.port) as clients:
        for client in clients:
            client.send(HEALTH)
            client.read_answer()
        time.sleep(0.6)  # the time of a connection between two requests is not the head's
        start = time.monotonic()
        for client, opening in zip(clients, openings, strict=True):
            client.send(opening)
        for client in clients:
            found = client.read_answer()
            assert (found.status, found.code, found.closes) == (408, "request_timeout", True)
            assert time.monotonic() - start > 0.3
            assert client.has_ended()


def test_a_byte_now_and_then_is_no_progress_of_a_head(impatient: Edge) -> None:
    with many(2, impatient.port) as clients:
        clients[0].send(b"GET /health HTTP/1.1\r\n")
        clients[1].send(b"GET http://a/health HTTP/1.1\r\n")
        start = time.monotonic()
        for client in clients:
            while client.is_silent(0.05):
                for each in clients:
                    each.send_what_fits(b"a")
                assert time.monotonic() - start < 3.0, "a slow head was never cut"
            assert client.read_answer().code == "request_timeout"


def test_bodies_that_stop(impatient: Edge, worker: Worker) -> None:
    opening = b"POST /generate HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhel"
    with many(3, impatient.port) as clients:
        for client, sent in zip(clients, (post(b"hello")[:-3], opening, post(b"hello", target="http://a/generate")[:-3]), strict=True):
            client.send(sent)
        for client in clients:
            found = client.read_answer()
            assert (found.status, found.code, found.closes) == (408, "request_timeout", True)
            assert client.has_ended()
    assert worker.calls == []


def trickle(clients: list[Client], body: bytes, piece_bytes: int) -> None:
    """Send bodies of three kinds a piece at a time, 0.1 s apart, as long as the router takes them."""
    chunks = b"".join(chunk(body[at : at + piece_bytes]) for at in range(0, len(body), piece_bytes)) + chunk(b"")
    opening = b"POST /generate HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n"
    sent = [post(body, target="/generate"), opening + chunks, post(body, target="http://a/generate")]
    for client, data in zip(clients, sent, strict=True):
        client.send(data[: data.index(b"\r\n\r\n") + 4])
    bodies = [data[data.index(b"\r\n\r\n") + 4 :] for data in sent]
    for at in range(0, max(map(len, bodies)), piece_bytes):
        time.sleep(0.1)
        for client, data in zip(clients, bodies, strict=True):
            client.send_what_fits(data[at : at + piece_bytes])


def test_bodies_that_go_on_slowly_are_read(impatient: Edge) -> None:
    body = b"0123456789" * 24
    with many(3, impatient.port) as clients:
        trickle(clients, body, 20)
        assert [client.read_answer().body for client in clients] == [body] * 3


def test_a_byte_now_and_then_is_no_progress_of_a_body(impatient: Edge, worker: Worker) -> None:
    with many(3, impatient.port) as clients:
        trickle(clients, b"0123456789" * 2, 1)
        for client in clients:
            found = client.read_answer()
            assert (found.status, found.code, found.closes) == (408, "request_timeout", True)
    assert worker.calls == []


def test_a_body_in_small_pieces_takes_its_size() -> None:
    """Not the size of an object for each byte."""

    async def test(shard: Shard, connection: ClientConnection, transport: StubTransport) -> None:
        size = 100_000
        connection.data_received(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % (2 * size))
        for at in range(size):
            connection.data_received(b"%d" % (at % 10))
        connection.data_received(b"x" * (size - 1))
        assert sum(sys.getsizeof(piece) for piece in connection.pieces) < 2.2 * size
        assert len(connection.pieces) < 100
        connection.data_received(b"y")
        assert connection.exchange is not None
        assert connection.exchange.body == b"0123456789" * (size // 10) + b"x" * (size - 1) + b"y"

    in_process(test)


def test_idle_connection_is_closed_without_an_answer(impatient: Edge) -> None:
    with impatient.client() as fresh, impatient.client() as used:
        used.send(HEALTH)
        used.read_answer()
        start = time.monotonic()
        assert fresh.has_ended()
        assert used.has_ended()
        assert 0.5 < time.monotonic() - start < 4.0


def test_requests_keep_a_connection_alive_past_the_idle_limit(impatient: Edge) -> None:
    with impatient.client() as client:
        for _ in range(3):
            time.sleep(0.45)
            assert client.ask(HEALTH).status == 200


def test_a_refused_client_that_stays_is_cut(edge: Edge) -> None:
    """What it still sends is read for a while, not until send_timeout_secs."""
    with edge.client() as client:
        assert client.ask(b"BAD\r\n\r\n").status == 400
        assert client.has_ended()
        client.send(b"more")
        wait_until(lambda: edge.word(S_CONNECTIONS) == 0, "the shard does not wait for the client's end for ever", 5.0)


def test_the_time_to_send_begins_at_the_end() -> None:
    """However long the exchange took before: else its last bytes would be cut off."""

    async def test(shard: Shard, connection: ClientConnection, transport: StubTransport) -> None:
        shard.now_s += 1000  # a long stream
        transport.unsent_bytes = 100
        connection.close_after_write()
        connection.tick(shard.now_s)
        assert not transport.is_aborted
        connection.tick(shard.now_s + 119)
        assert not transport.is_aborted
        connection.tick(shard.now_s + 121)
        assert transport.is_aborted

    in_process(test)


def test_a_client_that_reads_nothing_is_cut(impatient: Edge, worker: Worker) -> None:
    worker.plan(says(answer(b"x" * 20_000_000)))
    with impatient.client(rcvbuf_bytes=4096) as client:
        client.send(post())
        worker.wait_calls(1)
        wait_until(lambda: impatient.word(S_CONNECTIONS) == 0, "the client is cut", 5.0)


# ---- draining ----


def test_draining_closes_idle_connections_and_says_close_to_the_others(worker: Worker) -> None:
    worker.plan(late(0.4, answer(b"late")))
    with Edge([worker]) as edge, settled(edge), edge.client() as idle, edge.client() as busy, edge.client() as begun:
        assert idle.ask(HEALTH).status == 200
        busy.send(post())
        begun.send(HEALTH[:10])
        worker.wait_calls(1)
        edge.segment.state = _segment.DRAINING
        assert idle.has_ended()
        found = busy.read_answer()
        assert (found.body, found.closes) == (b"late", True)
        assert busy.has_ended()
        begun.send(HEALTH[10:])
        assert begun.read_answer().closes
        assert begun.has_ended()
        assert edge.word(S_REQUESTS) == 1
