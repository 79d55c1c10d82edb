"""sglfast.edge.exchange when the client leaves or does not read: cancellation and back-pressure."""

import time

import pytest
from conftest import SeededRandom
from edge_harness import Edge, settled, wait_until
from raw_client import chunk, many, post, request
from scripted_worker import SSE_HEAD, Call, SilentPort, Worker, answer, answer_head, says

from sglfast import _counters as c

MB = 1 << 20
EVENT = b'data: {"n":%d}\n\n'


# ---- clients that leave ----


@pytest.mark.parametrize("how", ["close", "reset", "half-close"])
@pytest.mark.parametrize("moment", ["before the answer", "in the stream", "after a pipelined request"])
def test_client_leaves(how: str, moment: str, edge: Edge, worker: Worker) -> None:
    """The worker learns it by the end of its connection, and no counter is left."""
    left_s = [0.0]
    took_s: list[float] = []
    gone = edge.word(c.S_CLIENT_GONE), edge.worker_word(0, c.W_CANCELLED)

    def script(call: Call) -> None:
        if moment == "in the stream":
            call.send(SSE_HEAD + chunk(EVENT % 1))
        if call.wait_for_end():
            took_s.append(time.monotonic() - left_s[0])

    worker.plan(script)
    with edge.client() as client:
        client.send(post())
        worker.wait_calls(1)
        if moment == "in the stream":
            client.read_until(chunk(EVENT % 1))
        elif moment == "after a pipelined request":
            client.send(post(b"never sent to a worker"))
            time.sleep(0.02)
        left_s[0] = time.monotonic()
        if how == "half-close":
            client.half_close()
            assert client.has_ended()
        elif how == "reset":
            client.reset()
    wait_until(lambda: took_s, "the worker's connection is closed")
    assert took_s[0] < 5.0, "at once, on a machine with other things to do"
    wait_until(lambda: not edge.gauges(), "no counter is left")
    assert (edge.word(c.S_CLIENT_GONE), edge.worker_word(0, c.W_CANCELLED)) == (gone[0] + 1, gone[1] + 1)
    assert len(worker.calls) == 1


def test_client_leaves_while_its_worker_is_connected_to() -> None:
    silent = SilentPort()
    with Edge([silent], connect_timeout_secs=0.5) as edge, settled(edge):
        edge.allowed_log = ("worker cannot be reached",)
        with edge.client() as client:
            client.send(post())
            wait_until(lambda: edge.worker_word(0, c.W_INFLIGHT_REQUESTS) == 1, "the request is dispatched")
        wait_until(lambda: edge.worker_word(0, c.W_INFLIGHT_REQUESTS) == 0, "it is given back", 0.4)
        assert edge.worker_word(0, c.W_CANCELLED) == 1
    silent.close()


def test_streams_left_at_random_leave_nothing(edge: Edge, worker: Worker, rng: SeededRandom) -> None:
    def script(call: Call) -> None:
        call.send(SSE_HEAD)
        for number in range(20):
            call.send(chunk(EVENT % number))
            time.sleep(0.001)
        call.send(chunk(b""))

    worker.plan(script)
    for _ in range(5):
        with many(20, edge.port) as clients:
            for client in clients:
                client.send(post())
            for client in clients:
                client.read_exactly(rng.randrange(200))
                if rng.random() < 0.3:
                    client.reset()
    wait_until(lambda: not edge.gauges().keys() - {"W_CONNECTIONS of worker 0"}, lambda: f"all is given back: {edge.gauges()}")


# ---- back-pressure ----


def test_a_client_that_does_not_read_stops_the_reading_of_its_worker(edge: Edge, worker: Worker) -> None:
    """Of 60 MB the worker gets rid of a few, the shard keeps next to nothing, and afterwards every byte comes."""
    size = 60 * MB
    piece = bytes(range(256)) * 256

    def script(call: Call) -> None:
        call.send(answer_head(f"content-length: {size}"))
        for _ in range(size // len(piece)):
            call.send(piece)

    worker.plan(script)
    before_bytes = edge.rss_bytes()
    with edge.client(rcvbuf_bytes=16384) as client:
        client.send(post())
        [call] = worker.wait_calls(1)
        client.read_head()
        wait_until(lambda: call.sent_bytes > 0, "the worker has begun")
        sent = -1
        while sent != call.sent_bytes:  # stands still
            sent = call.sent_bytes
            time.sleep(0.3)
        assert 0 < sent < 16 * MB
        assert edge.rss_bytes() - before_bytes < 8 * MB
        for _ in range(size // len(piece)):
            assert client.read_exactly(len(piece)) == piece
        assert client.ask(request("GET", "/health")).status == 200


def test_stream_is_paced_too(edge: Edge, worker: Worker) -> None:
    event = b"data: " + b"x" * 8000 + b"\n\n"

    def script(call: Call) -> None:
        call.send(SSE_HEAD)
        for _ in range(3000):
            call.send(chunk(event))
        call.send(chunk(b""))

    worker.plan(script)
    with edge.client(rcvbuf_bytes=16384) as client:
        client.send(post())
        [call] = worker.wait_calls(1)
        sent = -1
        while sent != call.sent_bytes:
            sent = call.sent_bytes
            time.sleep(0.2)
        assert sent < 16 * MB
        assert client.read_answer().body == event * 3000


def test_clock_of_the_worker_stops_while_the_client_does_not_read(workers: list[Worker], worker: Worker) -> None:
    """It is the client who is slow: no timeout of the worker's."""
    body = b"s" * (8 * MB)
    with Edge([worker], stream_idle_timeout_secs=1.0, request_timeout_secs=1.0) as edge, settled(edge):
        worker.plan(says(answer(body)))
        with edge.client(rcvbuf_bytes=4096) as client:
            client.send(post())
            time.sleep(3.0)
            assert client.read_answer().body == body
