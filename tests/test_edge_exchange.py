"""sglfast.edge.exchange: one request's way to a worker and back. What goes wrong there: test_edge_exchange_*.py."""

import re
import threading
import time

import pytest
from conftest import SeededRandom
from edge_harness import Edge, settled, wait_until
from raw_client import chunk, chunked, many, post, request
from scripted_worker import SSE_HEAD, Call, Worker, answer, answer_head, late, says, then_closes

from sglfast import _counters as c

MB = 1 << 20
EVENT = b'data: {"n":%d}\n\n'


# ---- bytes ----


@pytest.mark.parametrize("size", [0, 1, 16_383, 16_384, MB, 5 * MB], ids=lambda size: f"{size}B")
@pytest.mark.parametrize("is_chunked", [False, True], ids=["length", "chunked"])
def test_bodies_are_relayed_byte_for_byte_both_ways(size: int, is_chunked: bool, edge: Edge, worker: Worker, rng: SeededRandom) -> None:
    there, back = rng.randbytes(size), rng.randbytes(size)
    sizes = [rng.choice((1, 10, 1000, 70_000, 300_000)) for _ in range(30)]
    framed = chunked(back, *sizes)
    worker.plan(says(answer_head("transfer-encoding: chunked") + framed) if is_chunked else says(answer(back)))
    with edge.client() as client:
        if is_chunked:
            head = request("POST", "/v1/chat/completions", "transfer-encoding: chunked")
            threading.Thread(target=client.send, args=(head + chunked(there, *reversed(sizes)),)).start()
        else:
            threading.Thread(target=client.send, args=(post(there),)).start()
        found = client.read_answer()
    [call] = worker.calls
    assert call.body == there
    assert call.header("transfer-encoding") == []
    assert found.body == back
    if is_chunked:
        assert found.raw_body == framed, "the worker's own chunks are handed on"


def test_chunk_extensions_and_trailers_of_an_answer_are_handed_on(edge: Edge, worker: Worker) -> None:
    framed = b"5;a=b\r\nhello\r\n0\r\nX-Sum: 1\r\n\r\n"
    worker.plan(says(answer_head("transfer-encoding: chunked", "trailer: x-sum"), framed))
    found = edge.ask(post())
    assert (found.raw_body, found.header("trailer")) == (framed, [b"x-sum"])


def test_headers_of_an_answer(edge: Edge, worker: Worker) -> None:
    """End-to-end ones keep their bytes and order, those of one hop are dropped, ours come last."""
    kept = ["Content-Type:  a/b ", "X-Mixed: 1", "set-cookie: a", "Set-Cookie: b", "x-obs: \xe9\xff", "Date: x", "Server: y", "X-Empty:"]
    dropped = ["Keep-Alive: timeout=5", "connection: keep-alive, x-hop", "X-Hop: 1", "Upgrade: h2c", "TE: x", "Proxy-Authenticate: z"]
    worker.plan(says(answer(b"ok", *kept[:4], *dropped, *kept[4:], status="207 Multi  Status")))
    found = edge.ask(post(b"", "x-request-id: abc"))
    lines = ["HTTP/1.1 207 Multi  Status", *kept, "content-length: 2", "x-request-id: abc", "", ""]
    assert found.raw_head == "\r\n".join(lines).encode("latin-1")


def test_a_worker_of_http_1_0_answers_as_1_1(edge: Edge, worker: Worker) -> None:
    worker.plan(says(answer(b"old", "connection: keep-alive", version="1.0")), then_closes(answer(b"older", version="1.0")))
    with edge.client() as client:
        for body in (b"old", b"older"):
            found = client.ask(post())
            assert (found.raw_head[:15], found.body, found.closes) == (b"HTTP/1.1 200 OK", body, False)
    assert [call.connection for call in worker.calls] == [1, 1]


@pytest.mark.parametrize("status", ["400 Bad Request", "404 Not Found", "429 Too Many", "500 Oops", "503 Busy"])
def test_errors_of_the_worker_pass_as_they_are(status: str, edge: Edge, worker: Worker) -> None:
    worker.plan(says(answer(b'{"detail":"x"}', "retry-after: 7", status=status)))
    found = edge.ask(post())
    assert (found.status, found.reason, found.body) == (int(status[:3]), status[4:].encode(), b'{"detail":"x"}')
    assert found.header("retry-after") == [b"7"]
    assert found.code is None, "the error is not the router's"
    assert len(worker.calls) == 1


# ---- request ids ----


def test_request_id_is_kept_or_made(edge: Edge, worker: Worker) -> None:
    with edge.client() as client:
        assert client.ask(post(b"", "X-Request-ID: mine-7")).request_id == b"mine-7"
        made = [client.ask(post()).request_id for _ in range(3)]
        made += [client.ask(request("GET", path)).request_id for path in ("/health", "/nothing")]
        assert client.ask(request("GET", "/health", "x-request-id: own")).request_id == b"own"
        assert client.ask(request("GET", "/nothing", "x-request-id: own")).request_id == b"own"
        empty = client.ask(post(b"", "x-request-id: ")).request_id
        hop = client.ask(post(b"", "connection: x-request-id", "x-request-id: hop")).request_id
    assert all(re.fullmatch(rb"[0-9a-f]{32}", request_id) for request_id in [*made, empty, hop])
    assert len({*made, empty, hop}) == 7
    seen = [call.header("x-request-id") for call in worker.calls]
    assert seen == [[b"mine-7"], *([request_id] for request_id in [*made[:3], empty, hop])]
    assert worker.calls[0].head.count(b"X-Request-ID: mine-7\r\n") == 1


def test_a_worker_may_set_its_own_request_id(edge: Edge, worker: Worker) -> None:
    worker.plan(says(answer(b"", "X-Request-Id: theirs")))
    assert edge.ask(post(b"", "x-request-id: mine")).request_id == b"theirs"


def test_kv_header_only_when_asked_for(edge: Edge, worker: Worker) -> None:
    for lines in ((), ("x-sglfast-kv: 0",), ("x-sglfast-kv: no",)):
        assert edge.ask(post(b"", *lines)).header("x-sglfast-kv") == []
    [value] = edge.ask(post(b"", "x-sglfast-kv: 1")).header("x-sglfast-kv")
    assert value.decode() == f"worker={worker.url}; rank=0; overlap_blocks=0; prompt_blocks=0; state=BLIND"
    assert all(call.header("x-sglfast-kv") == [] for call in worker.calls)


# ---- event streams ----


def test_an_event_arrives_before_the_worker_sends_the_next(edge: Edge, worker: Worker) -> None:
    may_go_on = threading.Semaphore(0)

    def script(call: Call) -> None:
        call.send(SSE_HEAD)
        for number in range(5):
            assert may_go_on.acquire(timeout=5), "the client did not get the event before"
            call.send(chunk(EVENT % number))
        call.send(chunk(b""))

    worker.plan(script)
    with edge.client() as client:
        client.send(post())
        head = client.read_head()
        assert head.header("content-type") == [b"text/event-stream"]
        for number in range(5):
            may_go_on.release()
            assert client.read_exactly(len(chunk(EVENT % number))) == chunk(EVENT % number)
        assert client.read_until(b"0\r\n\r\n") == b"0\r\n\r\n"
        assert client.ask(request("GET", "/health")).status == 200


def test_streams_do_not_mix(edge: Edge, worker: Worker, rng: SeededRandom) -> None:
    """30 streams at once whose events are cut at any byte."""

    def script(call: Call) -> None:
        data = SSE_HEAD + b"".join(chunk(b"data: " + call.body + b" %d\n\n" % number) for number in range(40)) + chunk(b"")
        at = 0
        while at < len(data):
            step = (len(call.body) * 7 + at * 13) % 90 + 1
            call.send(data[at : at + step])
            at += step

    worker.plan(script)
    with many(30, edge.port) as clients:
        names = [b"n%d" % number * (number % 5 + 1) for number in range(30)]
        for client, name in zip(clients, names, strict=True):
            client.send(post(name))
        for client, name in zip(clients, names, strict=True):
            assert client.read_answer().body == b"".join(b"data: " + name + b" %d\n\n" % number for number in range(40))
    wait_until(lambda: not edge.word(c.S_INFLIGHT), "all are given back")


def test_http_1_0_client_gets_a_stream_without_chunks(edge: Edge, worker: Worker) -> None:
    pieces = [SSE_HEAD + b"b", b"\r\nhello ", b"world\r", b"\n5;x=y\r\nagain\r\n0\r\nx-t: 1\r\n", b"\r\n"]

    def script(call: Call) -> None:
        for piece in pieces:
            call.send(piece)
            time.sleep(0.02)

    for connection in ((), ("connection: keep-alive",)):
        worker.plan(script)
        found = edge.ask(post(b"", *connection, version="1.0"))
        assert (found.raw_body, found.closes, found.header("transfer-encoding")) == (b"hello worldagain", True, [])
        assert found.header("content-type") == [b"text/event-stream"]
    assert worker.connections == 1, "the worker's connection was still good"


# ---- counters ----


def test_outcomes_are_counted(workers: list[Worker], worker: Worker) -> None:
    with Edge([worker]) as edge, settled(edge), edge.client() as client:
        statuses = ["200 OK", "201 x", "302 x", "400 x", "404 x", "429 x", "503 x", "500 x", "502 x"]
        worker.plan(*(says(answer(b"12345", status=status)) for status in statuses))
        for status in statuses:
            assert client.ask(post(b"abc")).status == int(status[:3])
        wait_until(lambda: not edge.word(c.S_INFLIGHT), "the last one is counted")
        row = edge.totals.worker(0)
        assert (row[c.W_REQUESTS], row[c.W_OK], row[c.W_CLIENT_ERRORS], row[c.W_BUSY], row[c.W_ERRORS]) == (9, 3, 2, 2, 2)
        assert row[c.W_BYTES_OUT] == 5 * 9
        words = [c.S_RESPONSES_2XX, c.S_RESPONSES_3XX, c.S_RESPONSES_4XX, c.S_RESPONSES_5XX]
        assert [edge.word(word) for word in words] == [2, 1, 3, 3]
        assert edge.word(c.S_UPSTREAM_CONNECTS) == 1
        count, sum_us = c.HISTOGRAM_BUCKETS, c.HISTOGRAM_BUCKETS + 1
        assert edge.word(c.S_TTFT + count) == edge.word(c.S_DURATION + count) == 3, "good answers are timed"
        assert 0 < edge.word(c.S_TTFT + sum_us) <= edge.word(c.S_DURATION + sum_us)


def test_load_is_counted_from_the_choice_on(edge: Edge, worker: Worker) -> None:
    worker.plan(late(0.3, answer(b"")))
    with many(3, edge.port) as clients:
        for client in clients:
            client.send(post())
        wait_until(lambda: edge.worker_word(0, c.W_INFLIGHT_REQUESTS) == 3, "three are in flight", 0.3)
        assert edge.word(c.S_INFLIGHT) == 3
        for client in clients:
            client.read_answer()
        wait_until(lambda: edge.word(c.S_INFLIGHT) == 0, "all are given back")
