"""sglfast.edge.server: client connections. What one request may look like is in tests/test_edge_cases.py."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator

import pytest
from edge_harness import Edge, StubTransport, in_process, settled, wait_until
from raw_client import WAIT_S, chunk, post, request
from scripted_worker import SSE_HEAD, Call, Worker, answer, answer_head, late, says

from sglfast import _segment
from sglfast._counters import S_CONNECTIONS, S_REQUESTS
from sglfast.edge.server import ClientConnection
from sglfast.edge.shard import Shard

HEALTH = request("GET", "/health")
MB = 1 << 20
CHUNKED_TO_NOWHERE = b"POST /x HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"


@pytest.fixture(scope="module")
def patient_shard(worker: Worker) -> Iterator[Edge]:
    with Edge([worker], max_payload_size=100_000, max_header_bytes=4096) as edge:
        yield edge


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
        # 40,000 objects of two bytes would be 2.2 MB and more
        assert edge.rss_bytes() - before_bytes < 1_800_000
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


@pytest.mark.parametrize("target", ["http://a/generate", "/generate"], ids=["unusual", "plain"])
def test_too_many_headers(target: str, edge: Edge, worker: Worker) -> None:
    """As for too many bytes: 431, and nothing of it reaches a worker."""
    few = [f"h{number}: v" for number in range(126)]  # with Host and Content-Length there are 128
    assert edge.ask(post(b"{}", *few, target=target)).status == 200
    seen = len(worker.calls)
    with edge.client() as client:
        found = client.ask(post(b"{}", *few, "one: more", target=target))
        assert (found.status, found.code) == (431, "headers_too_large")
        assert client.has_ended()
    assert len(worker.calls) == seen


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
        wait_until(lambda: edge.word(S_CONNECTIONS) == 0, "the connection is gone")
        assert time.monotonic() - wait < 5.0, "at once, on a machine with other things to do"


def test_answers_that_are_complete_reach_a_client_that_half_closed(edge: Edge) -> None:
    with edge.client() as client:
        client.send(HEALTH * 3)
        client.half_close()
        assert [client.read_answer().body for _ in range(3)] == [b"OK"] * 3
        assert client.has_ended()


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
