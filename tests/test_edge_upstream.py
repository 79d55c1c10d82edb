"""sglfast.edge.upstream: the pool of connections to a worker, and the framing of answers."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from edge_harness import Edge, Memory, run, settled, shard_in_loop, stub_client, stub_upstream, wait_until
from raw_client import WAIT_S, chunk, many, post, request
from scripted_worker import SSE_HEAD, Call, Worker, answer, answer_head, echoes, says, then_closes

from sglfast import _counters as c
from sglfast.edge.upstream import UpstreamConnection

HEALTH = request("GET", "/health")


@pytest.fixture(scope="module")
def workers() -> Iterator[list[Worker]]:
    workers = [Worker("first"), Worker("second")]
    yield workers
    for worker in workers:
        worker.close()


@pytest.fixture(scope="module")
def shard(workers: list[Worker]) -> Iterator[Edge]:
    with Edge(workers[:1], upstream_keepalive_secs=0.6) as edge:
        yield edge


@pytest.fixture
def edge(shard: Edge) -> Iterator[Edge]:
    with settled(shard):
        yield shard


# ---- the pool ----


def test_connections_are_shared_by_clients_one_after_the_other(edge: Edge, worker: Worker) -> None:
    for number in range(10):
        assert edge.ask(post(b"%d" % number)).body == b"%d" % number
    assert [call.connection for call in worker.calls] == [1] * 10
    assert edge.worker_word(0, c.W_CONNECTIONS) == 1


def test_as_many_connections_as_requests_at_once(edge: Edge, worker: Worker) -> None:
    gate = threading.Barrier(8, timeout=5)

    def script(call: Call) -> None:
        gate.wait()  # all eight must be at the worker at once
        echoes(call)

    worker.plan(script)
    with many(8, edge.port) as clients:
        for client in clients:
            client.send(post())
        for client in clients:
            client.read_answer()
        assert worker.connections == 8
        worker.plan(echoes)
        for client in clients:  # one after the other: the last used is used again
            client.ask(post())
        assert len({call.connection for call in worker.calls[8:]}) == 1
    assert edge.worker_word(0, c.W_CONNECTIONS) == 8


def test_idle_connections_are_closed_in_time(edge: Edge, worker: Worker) -> None:
    with edge.client() as client:
        client.ask(post())
        assert worker.open_connections == 1
        start = time.monotonic()
        wait_until(lambda: worker.open_connections == 0, "the idle connection is closed")
        assert time.monotonic() - start > 0.5
        wait_until(lambda: edge.worker_word(0, c.W_CONNECTIONS) == 0, "and not counted")
        assert client.ask(post(b"again")).body == b"again"
    assert [call.connection for call in worker.calls] == [1, 2]


def test_a_busy_connection_is_not_idle(edge: Edge, worker: Worker) -> None:
    def script(call: Call) -> None:
        call.send(SSE_HEAD)
        for _ in range(4):
            time.sleep(0.3)
            call.send(chunk(b"data: x\n\n"))
        call.send(chunk(b""))

    worker.plan(script)
    assert edge.ask(post()).body == b"data: x\n\n" * 4


@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_connection_that_the_worker_closed_while_idle_is_not_used(how: str, edge: Edge, worker: Worker) -> None:
    def script(call: Call) -> None:
        echoes(call)
        time.sleep(0.05)
        call.close() if how == "close" else call.reset()

    resends = edge.word(c.S_RESENDS)
    worker.plan(script)
    with edge.client() as client:
        for number in range(3):
            assert client.ask(post(b"%d" % number)).body == b"%d" % number
            wait_until(lambda: edge.worker_word(0, c.W_CONNECTIONS) == 0, "the shard has seen the end")
    assert [call.connection for call in worker.calls] == [1, 2, 3]
    assert edge.word(c.S_RESENDS) == resends, "nothing was sent into a closed connection"


def test_a_connection_of_an_abandoned_request_is_kept_and_may_fail_like_an_idle_one(workers: list[Worker], worker: Worker) -> None:
    """The client left while the worker was connected to: whoever gets that connection later must be resent when it is dead."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=0)
    listener.settimeout(WAIT_S)
    fill = [socket.socket() for _ in range(2)]
    for sock in fill:  # the queue is full: the shard's first SYN is dropped and repeated a second later
        sock.setblocking(False)
        sock.connect_ex(listener.getsockname())

    class Slow:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"

    with Edge([Slow()], upstream_keepalive_secs=10.0) as edge:
        with edge.client() as client:
            client.send(post())
            wait_until(lambda: edge.worker_word(0, c.W_INFLIGHT_REQUESTS) == 1, "the shard connects")
        wait_until(lambda: edge.worker_word(0, c.W_CANCELLED) == 1, "the client left")
        accepted = [listener.accept()[0] for _ in fill]
        wait_until(lambda: edge.worker_word(0, c.W_CONNECTIONS) == 1, "the connection was made all the same")
        first, _ = listener.accept()
        with edge.client() as client:
            client.send(post(b"again"))
            assert b"again" in first.recv(65536)
            first.close()
            second, _ = listener.accept()
            assert b"again" in second.recv(65536)
            second.sendall(answer(b"ok"))
            assert client.read_answer().body == b"ok"
        assert edge.word(c.S_RESENDS) == 1
        for sock in [second, listener, *fill, *accepted]:
            sock.close()
        edge.settle()


def test_a_connection_that_is_made_when_its_time_is_just_over_is_not_counted_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[UpstreamConnection] = []

    def late(connection: UpstreamConnection, transport: asyncio.BaseTransport) -> None:
        connection_made(connection, transport)
        made.append(connection)
        time.sleep(0.3)  # the loop finds the time over before it resumes who waits for the connection

    connection_made = UpstreamConnection.connection_made
    monkeypatch.setattr(UpstreamConnection, "connection_made", late)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        memory = Memory([f"http://127.0.0.1:{listener.getsockname()[1]}"])

        async def test() -> None:
            shard = shard_in_loop(memory, connect_timeout_secs=0.2)
            shard.router.refresh()
            client, side = stub_client(shard)
            client.data_received(post())
            while not (answer := side.take()):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            assert b"upstream_timeout" in answer
            assert len(made) == 1

        run(test())
    assert memory.worker_word(0, c.W_CONNECTIONS) == 0


class InLoop:
    """A shard with one worker, its client and its pool of connections; the test plays both networks."""

    def __init__(self, test: Callable[["InLoop"], None]) -> None:
        self.memory = Memory(["http://10.0.0.1:30000"])

        async def inside() -> None:
            self.shard = shard_in_loop(self.memory)
            self.client, self.client_side = stub_client(self.shard)
            self.connection, self.worker_side = stub_upstream(self.shard)
            test(self)

        run(inside())


def test_a_connection_that_was_paused_for_one_client_is_read_for_the_next() -> None:
    def test(it: InLoop) -> None:
        it.client.data_received(post(b"1"))
        assert it.worker_side.take().endswith(b"1")
        it.client.pause_writing()
        assert it.worker_side.is_paused
        it.connection.data_received(answer(b"last bytes"))
        assert not it.worker_side.is_paused
        assert it.connection.upstream.idle == [it.connection]
        other, other_side = stub_client(it.shard)
        other.data_received(post(b"2"))
        assert it.worker_side.take().endswith(b"2")
        it.client.resume_writing()  # that client has nothing to do with it any more
        it.client.pause_writing()
        assert not it.worker_side.is_paused
        it.connection.data_received(answer(b"quick"))
        assert other_side.take().endswith(b"quick")

    InLoop(test)


def test_a_client_that_is_paused_already_pauses_its_next_answer() -> None:
    def test(it: InLoop) -> None:
        it.client.pause_writing()
        it.client.data_received(post(b"1"))
        assert it.worker_side.is_paused
        it.client.resume_writing()
        assert not it.worker_side.is_paused

    InLoop(test)


def test_connections_that_are_closing_are_not_taken() -> None:
    def test(it: InLoop) -> None:
        newer, newer_side = stub_upstream(it.shard)
        upstream = newer.upstream
        assert upstream.idle == [it.connection, newer]
        newer_side.abort()  # the shard's side is told of the end a turn later
        assert upstream.take_idle() is it.connection
        assert upstream.take_idle() is None

    InLoop(test)


def test_the_sweep_closes_the_oldest_only() -> None:
    def test(it: InLoop) -> None:
        it.shard.now_s += 10
        newer, newer_side = stub_upstream(it.shard)
        it.shard.router.sweep(it.shard.now_s - 5)
        assert it.worker_side.is_aborted
        assert not newer_side.is_closed
        assert newer.upstream.idle == [newer]
        it.connection.connection_lost(None)
        assert it.memory.worker_word(0, c.W_CONNECTIONS) == 1

    InLoop(test)


# ---- framing of answers ----


def test_framings_of_an_answer_and_whether_the_connection_is_used_again(edge: Edge, worker: Worker) -> None:
    """(the worker's bytes, status, body, does the client's connection go on, does the worker's)"""
    no_length = answer_head()
    table = [
        (answer(b"abc"), 200, b"abc", True, True),
        (answer(b"abc", "Connection: close"), 200, b"abc", True, False),
        (answer(b"", "connection: close"), 200, b"", True, False),
        (answer(b"abc", version="1.0"), 200, b"abc", True, False),
        (answer(b"abc", "connection: keep-alive", version="1.0"), 200, b"abc", True, True),
        (answer_head("transfer-encoding: chunked") + chunk(b"abc") + chunk(b""), 200, b"abc", True, True),
        (answer_head("Transfer-Encoding: Chunked", "connection: close") + chunk(b""), 200, b"", True, False),
        (answer_head(status="204 No Content"), 204, b"", True, True),
        (answer_head(status="304 Not Modified"), 304, b"", True, True),
        (answer_head("content-length: 500", "etag: x", status="304 Not Modified"), 304, b"", True, True),
        (answer_head("content-length: 0", status="204 No Content"), 204, b"", True, True),
        (answer_head(status="100 Continue") + answer(b"abc"), 200, b"abc", True, True),
        (answer_head("link: </x>", status="103 Early Hints") * 3 + answer(b"abc"), 200, b"abc", True, True),
        (no_length + b"abc", 200, b"abc", False, False),
        (no_length, 200, b"", False, False),
        (answer_head(status="500 Oops") + b"no length", 500, b"no length", False, False),
    ]
    for data, status, body, client_goes_on, worker_goes_on in table:
        ends_by_close = data.endswith((no_length, no_length + b"abc", b"no length"))
        worker.plan(then_closes(data) if ends_by_close else says(data), echoes)
        with edge.client() as client:
            found = client.ask(post())
            assert (found.status, found.body, found.interim) == (status, body, []), data
            assert found.closes == (not client_goes_on), data
            if client_goes_on:
                assert client.ask(post(b"next")).body == b"next"
                assert [call.connection for call in worker.calls] == ([1, 1] if worker_goes_on else [1, 2]), data
            else:
                assert client.has_ended()
        worker.reset()


def test_every_cut_of_an_answer(edge: Edge, worker: Worker) -> None:
    """Head, chunks and what lies behind arrive in two pieces, cut at every byte."""
    data = answer_head("x-a: b", "transfer-encoding: chunked") + b"3;x\r\nabc\r\nA\r\n0123456789\r\n0\r\nt: 1\r\n\r\n"
    data = answer_head(status="103 Early Hints") + data

    def script(call: Call) -> None:
        at = int(call.body)
        call.send(data[:at])
        time.sleep(0.002)
        call.send(data[at:])

    worker.plan(script)
    with edge.client() as client:
        for at in range(len(data)):
            found = client.ask(post(b"%d" % at))
            assert (found.header("x-a"), found.body) == ([b"b"], b"abc0123456789")
    assert worker.connections == 1


def test_many_interim_answers_are_no_recursion(edge: Edge, worker: Worker) -> None:
    worker.plan(says(answer_head(status="100 Continue") * 5000 + answer(b"at last")))
    assert edge.ask(post()).body == b"at last"


@pytest.mark.parametrize("surplus", [b"x", answer(b"smuggled"), b"\r\n"], ids=["byte", "answer", "empty line"])
@pytest.mark.parametrize("is_together", [True, False])
def test_bytes_behind_an_answer_never_reach_the_next_request(surplus: bytes, is_together: bool, edge: Edge, worker: Worker) -> None:
    for data in (answer(b"abc"), answer_head("transfer-encoding: chunked") + chunk(b"abc") + chunk(b""), answer_head(status="204 x")):

        def script(call: Call, data: bytes = data) -> None:
            if is_together:
                call.send(data + surplus)
            else:
                call.send(data)
                time.sleep(0.05)
                call.send(surplus)

        worker.plan(script, echoes)
        with edge.client() as client:
            assert client.ask(post()).body in (b"abc", b"")
            if not is_together:
                wait_until(lambda: worker.open_connections == 0, "the shard closes a connection that says more")
            assert client.ask(post(b"next")).body == b"next"
        assert [call.connection for call in worker.calls] == [1, 2]
        worker.reset()


def test_surplus_in_the_piece_that_ends_a_body(edge: Edge, worker: Worker) -> None:
    def script(call: Call) -> None:
        call.send(answer(b"x" * 100)[:-50])
        time.sleep(0.05)
        call.send(b"x" * 50 + answer(b"smuggled"))

    worker.plan(script, echoes)
    with edge.client() as client:
        assert client.ask(post()).body == b"x" * 100
        assert client.ask(post(b"next")).body == b"next"
    assert [call.connection for call in worker.calls] == [1, 2]


def test_an_answer_before_the_whole_request_was_read(edge: Edge, worker: Worker) -> None:
    """The answer is handed on at once; the connection, on which the rest of the body would follow, is not used again."""
    worker.reads_body = False
    ended = threading.Event()

    def script(call: Call) -> None:
        call.send(answer(b"too much", status="413 Too Large"))
        worker.wait_calls(2)  # reads no more before: else the rest could leave the shard while it handles the answer
        if call.wait_for_end():
            ended.set()

    worker.plan(script, echoes)
    with edge.client() as client:
        found = client.ask(post(b"x" * 20_000_000))
        assert (found.status, found.body, found.code) == (413, b"too much", None)
        assert client.ask(post(b"next")).body == b"next"
        assert [call.connection for call in worker.calls] == [1, 2]
        assert ended.wait(5.0), "it is closed"


def test_a_large_request_is_sent_while_its_answer_comes(edge: Edge, worker: Worker) -> None:
    """A worker that echoes as it reads must not lead to a dead lock."""
    worker.reads_body = False
    size = 8_000_000

    def script(call: Call) -> None:
        call.send(answer_head(f"content-length: {size}") + call.body)
        left = size - len(call.body)
        while left:
            data = call.sock.recv(65536)
            call.send(data)
            left -= len(data)

    worker.plan(script)
    body = bytes(range(250)) * (size // 250)
    with edge.client() as client:
        sender = threading.Thread(target=client.send, args=(post(body),))
        sender.start()
        assert client.read_answer().body == body
        sender.join()
