"""sglfast.edge.server: clients that take their time. Where thousands of them do is in tests/test_e2e_connections.py."""

import sys
import time
from collections.abc import Iterator

import pytest
from edge_harness import Edge, StubTransport, in_process, settled, wait_until
from raw_client import WAIT_S, Client, chunk, many, post, request
from scripted_worker import Worker, answer, says

from sglfast._counters import S_CONNECTIONS
from sglfast.edge.server import ClientConnection
from sglfast.edge.shard import Shard

HEALTH = request("GET", "/health")


@pytest.fixture
def edge(worker: Worker) -> Iterator[Edge]:
    with Edge([worker]) as edge, settled(edge):
        yield edge


@pytest.fixture(scope="module")
def impatient_shard(worker: Worker) -> Iterator[Edge]:
    with Edge([worker], header_timeout_secs=0.4, body_timeout_secs=0.4, idle_timeout_secs=2.0, send_timeout_secs=1.0) as edge:
        yield edge


@pytest.fixture
def impatient(impatient_shard: Edge) -> Iterator[Edge]:
    with settled(impatient_shard):
        yield impatient_shard


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
                assert time.monotonic() - start < WAIT_S / 2, "a slow head was never cut"
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
    """Send bodies of three kinds, a piece for each 0.1 s that has passed, as long as the router takes them."""
    chunks = b"".join(chunk(body[at : at + piece_bytes]) for at in range(0, len(body), piece_bytes)) + chunk(b"")
    opening = b"POST /generate HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n"
    sent = [post(body, target="/generate"), opening + chunks, post(body, target="http://a/generate")]
    for client, data in zip(clients, sent, strict=True):
        client.send(data[: data.index(b"\r\n\r\n") + 4])
    bodies = [data[data.index(b"\r\n\r\n") + 4 :] for data in sent]
    start, sent_bytes = time.monotonic(), 0
    while sent_bytes < max(map(len, bodies)):
        time.sleep(0.1)
        due_bytes = int((time.monotonic() - start) / 0.1) * piece_bytes  # whoever wakes up late sends what is missing
        for client, data in zip(clients, bodies, strict=True):
            client.send_what_fits(data[sent_bytes:due_bytes])
        sent_bytes = due_bytes


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
        assert 1.0 < time.monotonic() - start < WAIT_S / 2


def test_requests_keep_a_connection_alive_past_the_idle_limit(impatient: Edge) -> None:
    with impatient.client() as client:
        start = time.monotonic()
        while time.monotonic() - start < 3.0:
            assert client.ask(HEALTH).status == 200
            time.sleep(0.3)


def test_a_refused_client_that_stays_is_cut(edge: Edge) -> None:
    """What it still sends is read for a while, not until send_timeout_secs."""
    with edge.client() as client:
        assert client.ask(b"BAD\r\n\r\n").status == 400
        assert client.has_ended()
        client.send(b"more")
        wait_until(lambda: edge.word(S_CONNECTIONS) == 0, "the shard does not wait for the client's end for ever")


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
        wait_until(lambda: impatient.word(S_CONNECTIONS) == 0, "the client is cut")
