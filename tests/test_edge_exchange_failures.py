"""sglfast.edge.exchange when the worker fails and there is no other attempt: error answers, resends, streams that break."""

import threading
import time
from collections.abc import Iterator

import orjson
import pytest
from edge_harness import Edge, settled, wait_until
from raw_client import WAIT_S, Answer, Client, chunk, post, request
from scripted_worker import SSE_HEAD, Call, Worker, answer, answer_head, echoes, says, then_closes

from sglfast import _counters as c
from sglfast.errors import REASON_INDEX

EVENT = b'data: {"n":%d}\n\n'


@pytest.fixture(scope="module")
def impatient_shard(workers: list[Worker]) -> Iterator[Edge]:
    # send_timeout_secs below the others: what is said at their end must still be sent
    with Edge(workers[:1], request_timeout_secs=0.5, stream_idle_timeout_secs=1.5, send_timeout_secs=0.3) as edge:
        yield edge


@pytest.fixture
def impatient(impatient_shard: Edge) -> Iterator[Edge]:
    with settled(impatient_shard):
        yield impatient_shard


def error_of(found: Answer) -> tuple[int, str]:
    """(status, code) of one of our errors, when all its places agree."""
    assert found.header("content-type") == [b"application/json"]
    error = orjson.loads(found.body)["error"]
    assert set(error) == {"message", "type", "code", "param"}
    assert error["param"] is None
    assert error["type"] == ("server_error" if found.status >= 500 else "invalid_request_error")
    assert error["code"] == found.code
    assert found.request_id
    return found.status, error["code"]


# ---- when the worker fails ----


def failure(edge: Edge, sent: bytes = b"") -> tuple[int, str]:
    """The error that a request gets; the connection goes on after it."""
    with edge.client() as client:
        found = error_of(client.ask(sent or post()))
        assert client.ask(request("GET", "/health")).status == 200
        return found


def test_worker_closes_a_fresh_connection(edge: Edge, worker: Worker) -> None:
    for script in (Call.close, Call.reset, then_closes(b"HTTP/1.1 2"), then_closes(b"HTTP/1.1 100 Continue\r\n\r\n")):
        worker.plan(script, echoes)
        before = edge.worker_word(0, c.W_ERRORS), edge.word(c.S_REASONS + REASON_INDEX["upstream_closed"])
        assert failure(edge) == (502, "upstream_closed")
        assert (edge.worker_word(0, c.W_ERRORS), edge.word(c.S_REASONS + REASON_INDEX["upstream_closed"])) == (before[0] + 1, before[1] + 1)
        assert len(worker.calls) == 1, "a request that a worker has taken is not sent twice"
        worker.reset()


@pytest.mark.parametrize("ending", ["close", "reset"])
def test_worker_closes_a_pooled_connection(ending: str, edge: Edge, worker: Worker) -> None:
    """Exactly one resend, on a fresh connection; the client notices nothing."""
    resends = edge.word(c.S_RESENDS)
    close = Call.close if ending == "close" else Call.reset
    worker.plan(echoes, close, echoes)
    with edge.client() as client:
        assert client.ask(post(b"1")).body == b"1"
        assert client.ask(post(b"2")).body == b"2"
    assert [(call.connection, call.body) for call in worker.calls] == [(1, b"1"), (1, b"2"), (2, b"2")]
    assert worker.calls[1].head == worker.calls[2].head
    assert edge.word(c.S_RESENDS) == resends + 1


def test_no_second_resend(edge: Edge, worker: Worker) -> None:
    resends = edge.word(c.S_RESENDS)
    worker.plan(echoes, Call.close, Call.close, echoes)
    with edge.client() as client:
        client.ask(post())
        assert error_of(client.ask(post())) == (502, "upstream_closed")
    assert len(worker.calls) == 3
    assert edge.word(c.S_RESENDS) == resends + 1


@pytest.mark.parametrize("spoken", [b"H", b"HTTP/1.1 200 OK\r\ncontent-le", b"HTTP/1.1 100 Continue\r\n\r\n"])
def test_no_resend_once_the_worker_has_spoken(spoken: bytes, edge: Edge, worker: Worker) -> None:
    resends = edge.word(c.S_RESENDS)
    worker.plan(echoes, then_closes(spoken), echoes)
    with edge.client() as client:
        client.ask(post())
        assert error_of(client.ask(post())) == (502, "upstream_closed")
    assert len(worker.calls) == 2
    assert edge.word(c.S_RESENDS) == resends


MALFORMED = {
    "no HTTP": b"hello\r\n\r\n",
    "bare LF": b"HTTP/1.1 200 OK\ncontent-length: 0\n\n",
    "two lengths": answer_head("content-length: 2", "content-length: 3") + b"abc",
    "length and chunked": answer_head("content-length: 2", "transfer-encoding: chunked") + b"0\r\n\r\n",
    "folded": answer_head("a: b", " c", "content-length: 0"),
    "HTTP/2": b"HTTP/2.0 200 OK\r\ncontent-length: 0\r\n\r\n",
    "switching protocols": answer_head(status="101 Switching Protocols"),
    "unknown coding": answer_head("transfer-encoding: gzip") + b"abc",
    "first chunk": answer_head("transfer-encoding: chunked") + b"xyz\r\n",
    "endless head": b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 20_000,
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_answer(name: str, edge: Edge, worker: Worker) -> None:
    worker.plan(says(MALFORMED[name]), echoes)
    assert failure(edge) == (502, "upstream_bad_response")
    assert len(worker.calls) == 1
    wait_until(lambda: worker.open_connections == 0, "a connection that has gone wrong is closed")


def test_worker_does_not_answer_in_time(impatient: Edge, worker: Worker) -> None:
    ended = threading.Event()

    def script(call: Call) -> None:
        if call.wait_for_end():
            ended.set()

    worker.plan(script)
    start = time.monotonic()
    assert failure(impatient) == (504, "upstream_timeout")
    assert 0.4 < time.monotonic() - start < WAIT_S / 2
    assert ended.wait(WAIT_S), "the worker is told by the end of its connection"


def test_a_head_that_trickles_does_not_extend_the_time(impatient: Edge, worker: Worker) -> None:
    def script(call: Call) -> None:
        call.send(b"HTTP/1.1 200 OK\r\n")
        while True:
            call.send(b"a: b\r\n")
            time.sleep(0.05)

    worker.plan(script)
    start = time.monotonic()
    assert failure(impatient) == (504, "upstream_timeout")
    assert time.monotonic() - start < WAIT_S / 2


def error_event(data: bytes, code: str) -> None:
    """`data` must be an SSE error event of this code."""
    lines = [line for line in data.split(b"\n") if line]
    assert len(lines) == 1
    assert data.endswith(b"\n\n")
    assert orjson.loads(lines[0].removeprefix(b"data: "))["error"]["code"] == code


def split_chunks(client: Client) -> Iterator[bytes]:
    """The chunks of an answer as they come, the empty one included."""
    while True:
        size = int(client.read_until(b"\r\n"), 16)
        yield client.read_exactly(size + 2)[:-2]
        if size == 0:
            return


@pytest.mark.parametrize("ending", ["close", "reset", "malformed"])
def test_stream_that_breaks_ends_with_an_error_event(ending: str, edge: Edge, worker: Worker) -> None:
    cut = edge.word(c.S_STREAMS_CUT)

    def script(call: Call) -> None:
        call.send(SSE_HEAD + chunk(EVENT % 1) + chunk(EVENT % 2))
        time.sleep(0.05)
        if ending == "malformed":
            call.send(chunk(b"")[:-2] + b"no trailer\r\n\r\n")
        elif ending == "close":
            call.close()
        else:
            call.reset()

    worker.plan(script)
    with edge.client() as client:
        client.send(post())
        assert client.read_head().status == 200
        if ending == "malformed":
            assert client.read_to_end().startswith(chunk(EVENT % 1) + chunk(EVENT % 2))
        else:
            *events, error, last = split_chunks(client)
            assert (events, last) == ([EVENT % 1, EVENT % 2], b"")
            error_event(error, "upstream_body_incomplete")
            assert client.has_ended()
    assert edge.word(c.S_STREAMS_CUT) == cut + 1


@pytest.mark.parametrize("rest", [b"\r\nZZ", b" more\r\n\r\n"], ids=["behind the chunk", "another size"])
def test_nothing_is_put_into_a_chunk(rest: bytes, edge: Edge, worker: Worker) -> None:
    """The stream breaks in a chunk of which the client has one half: the end of the connection is all that can be said."""

    def script(call: Call) -> None:
        call.send(SSE_HEAD + b"10\r\ndata: half")
        time.sleep(0.1)
        call.send(b" chunk"[:6] + rest)
        call.close()

    worker.plan(script)
    with edge.client() as client:
        client.send(post())
        client.read_head()
        assert b"error" not in client.read_to_end()


def test_stream_that_breaks_inside_a_chunk_is_cut(edge: Edge, worker: Worker) -> None:
    worker.plan(then_closes(SSE_HEAD + chunk(EVENT % 1) + b"20\r\ndata: ha"))
    with edge.client() as client:
        client.send(post())
        client.read_head()
        assert client.read_to_end() == chunk(EVENT % 1) + b"20\r\ndata: ha"


def test_stream_that_pauses_too_long_ends_with_an_error_event(impatient: Edge, worker: Worker) -> None:
    ended = threading.Event()

    def script(call: Call) -> None:
        call.send(SSE_HEAD)
        for number in range(10):  # longer than either limit, but never silent for so long
            call.send(chunk(EVENT % number))
            time.sleep(0.2)
        if call.wait_for_end():
            ended.set()

    worker.plan(script)
    with impatient.client() as client:
        client.send(post())
        client.read_head()
        *events, error, last = split_chunks(client)
        assert (events, last) == ([EVENT % number for number in range(10)], b"")
        error_event(error, "upstream_timeout")
        assert client.has_ended()
    assert ended.wait(WAIT_S)


def test_stream_of_an_http_1_0_client_that_breaks(edge: Edge, worker: Worker) -> None:
    worker.plan(then_closes(SSE_HEAD + chunk(EVENT % 1) + b'20\r\ndata: {"ha'))
    with edge.client() as client:
        client.send(post(version="1.0"))
        client.read_head()
        data = client.read_to_end()
    # The cut event is ended by an empty line first.
    assert data.startswith(EVENT % 1 + b'data: {"ha\n\n')
    error_event(data.removeprefix(EVENT % 1 + b'data: {"ha\n\n'), "upstream_body_incomplete")


def test_stream_of_a_known_length_that_breaks_is_only_cut(edge: Edge, worker: Worker) -> None:
    """An event of ours would be counted into the worker's length and could even complete it."""
    worker.plan(then_closes(answer_head("content-type: text/event-stream", "content-length: 30") + b"data: 123\n\n"))
    with edge.client() as client:
        client.send(post())
        client.read_head()
        assert client.read_to_end() == b"data: 123\n\n"


def test_answer_by_length_that_breaks_is_cut_short(edge: Edge, worker: Worker) -> None:
    for ending in (Call.close, Call.reset):

        def script(call: Call, ending: object = ending) -> None:
            call.send(answer(b"x" * 1000)[:-400])
            time.sleep(0.05)
            assert callable(ending)
            ending(call)

        worker.plan(script)
        with edge.client() as client:
            client.send(post())
            assert client.read_head().header("content-length") == [b"1000"]
            assert client.read_to_end() == b"x" * 600
        worker.reset()
