"""sglfast.edge.abort: requests get a rid for engines that take one, and engines are told when nobody waits any more."""

import threading
import time
from collections.abc import Iterator

import orjson
import pytest
from edge_harness import Edge, settled, wait_until
from raw_client import chunk, post
from scripted_worker import SSE_HEAD, Call, Script, Worker, answer, echoes, says

from sglfast import _counters as c
from sglfast import _workers

SENT = b'{"model":"demo","messages":[{"role":"user","content":"hello"}]}'
ABORT = b"POST /abort_request HTTP/1.1"


@pytest.fixture(scope="module")
def workers() -> Iterator[list[Worker]]:
    workers = [Worker("first"), Worker("second")]
    yield workers
    for worker in workers:
        worker.close()


@pytest.fixture(scope="module")
def shard_of_one(workers: list[Worker]) -> Iterator[Edge]:
    with Edge(workers[:1], takes_rid=True, stream_idle_timeout_secs=0.7) as edge:
        yield edge


@pytest.fixture
def edge(shard_of_one: Edge) -> Iterator[Edge]:
    with settled(shard_of_one):
        yield shard_of_one


def rid_of(call: Call) -> str | None:
    found = orjson.loads(call.body).get("rid")
    return found if found is None else str(found)


def waits(ended: list[float]) -> Script:
    """A script for a request that is never answered: notes when its connection ends; aborts are answered."""

    def script(call: Call) -> None:
        if call.request_line == ABORT:
            call.send(answer(b""))
        else:
            call.send(SSE_HEAD + chunk(b"data: 1\n\n"))
            call.wait_for_end()
            ended.append(time.monotonic())

    return script


# ---- the rid ----


@pytest.mark.parametrize("target", ["/v1/chat/completions", "/v1/completions", "/generate"])
def test_a_request_gets_a_rid_and_is_otherwise_the_same(target: str, edge: Edge, workers: list[Worker]) -> None:
    body = b' { "prompt" : "\xc3\xa4", "n": 1.0,\n "text":"x" }'
    found = edge.ask(post(body, target=target))
    (call,) = workers[0].calls
    assert call.body == b'{"rid":"%b", "prompt" : "\xc3\xa4", "n": 1.0,\n "text":"x" }' % found.request_id
    assert call.header("x-request-id") == [found.request_id], "one name for both, when the router gives it"
    assert call.header("content-length") == [b"%d" % len(call.body)]


def test_the_client_s_request_id_is_not_the_rid(edge: Edge, workers: list[Worker]) -> None:
    """It may be used again, and an engine refuses a rid that it has."""
    for _ in range(2):
        assert edge.ask(post(SENT, "x-request-id: mine")).request_id == b"mine"
    rids = [rid_of(call) for call in workers[0].calls]
    assert [call.header("x-request-id") for call in workers[0].calls] == [[b"mine"]] * 2
    assert None not in rids
    assert len({*rids, "mine"}) == 3


@pytest.mark.parametrize("body", [b'{"rid":"own","model":"m"}', b'{"model":"m","rid":null}', b"{}", b"[1]", b"no json", b""])
def test_bodies_that_cannot_have_one_stay_as_they_are(body: bytes, edge: Edge, workers: list[Worker]) -> None:
    edge.ask(post(body))
    assert workers[0].calls[0].body == body


def test_embeddings_have_none(edge: Edge, workers: list[Worker]) -> None:
    edge.ask(post(b'{"input":["a","b"]}', target="/v1/embeddings"))
    assert workers[0].calls[0].body == b'{"input":["a","b"]}'


@pytest.mark.parametrize("size", [16_300, 16_400, 2_000_000])
def test_large_bodies(size: int, edge: Edge, workers: list[Worker]) -> None:
    body = b'{"prompt":"' + b"x" * size + b'"}'
    edge.ask(post(body))
    (call,) = workers[0].calls
    assert rid_of(call)
    assert call.body.partition(b",")[2] == body[1:]


@pytest.mark.parametrize("settings", [{"takes_rid": False}, {"takes_rid": True, "disable_abort_on_disconnect": True}], ids=["other", "off"])
def test_other_workers_get_untouched_bodies(settings: dict[str, bool], workers: list[Worker]) -> None:
    ended: list[float] = []
    workers[0].plan(waits(ended))
    with Edge(workers[:1], **settings) as edge, settled(edge):
        with edge.client() as client:
            client.send(post(SENT))
            client.read_head()
        wait_until(lambda: len(ended) == 1, "the connection is closed all the same")
        assert [call.body for call in workers[0].calls] == [SENT]
        assert edge.word(c.S_ABORTS) == 0


def test_each_attempt_has_a_rid_of_its_own(workers: list[Worker]) -> None:
    """The worker may still have the last one, although its answer said otherwise."""
    workers[0].plan(says(answer(b"", status="500 No")), echoes, Call.close, echoes)
    with Edge(workers[:1], takes_rid=True, disable_retries=False, retry_initial_backoff_ms=5) as edge, settled(edge):
        with edge.client() as client:
            found = client.ask(post(SENT))
            assert client.ask(post(SENT)).status == 200  # its pooled connection is closed: sent once more
        rids = [rid_of(call) for call in workers[0].calls]
        assert len(set(rids)) == 4
        assert rids[0] == found.request_id.decode()


# ---- the client leaves ----


def test_a_client_that_leaves_ends_its_request(edge: Edge, workers: list[Worker]) -> None:
    """The connection is closed at once, and the engine is told the rid, with what the client showed to the worker."""
    ended: list[float] = []
    workers[0].plan(waits(ended))
    aborts = edge.word(c.S_ABORTS)
    late_by = []
    for _ in range(5):
        with edge.client() as client:
            client.send(post(SENT, "authorization: Bearer sk-1"))
            client.read_head()
            left_s = time.monotonic()
        wait_until(lambda: ended, "the connection is closed")
        late_by.append(ended.pop() - left_s)
    wait_until(lambda: len(workers[0].calls) == 10, "each is told")
    assert min(late_by) < 0.05, f"closed after {late_by} s"
    asked = [call for call in workers[0].calls if call.request_line != ABORT]
    told = [call for call in workers[0].calls if call.request_line == ABORT]
    assert {call.body for call in told} == {b'{"rid":"%s"}' % str(rid_of(call)).encode() for call in asked}
    assert all(call.header("authorization") == [b"Bearer sk-1"] for call in told)
    assert all(call.header("content-type") == [b"application/json"] for call in told)
    assert edge.word(c.S_ABORTS) == aborts + 5


def test_a_worker_that_is_given_up_is_told_too(edge: Edge, workers: list[Worker]) -> None:
    ended: list[float] = []
    workers[0].plan(waits(ended))
    with edge.client() as client:
        client.send(post(SENT))
        client.read_head()
        assert b"upstream_timeout" in client.read_to_end()
    calls = workers[0].wait_calls(2)
    assert calls[1].request_line == ABORT


def test_a_request_whose_own_rid_is_unknown_is_only_cut(edge: Edge, workers: list[Worker]) -> None:
    ended: list[float] = []
    workers[0].plan(waits(ended))
    aborts = edge.word(c.S_ABORTS)
    with edge.client() as client:
        client.send(post(b'{"rid":"own"}'))
        client.read_head()
    wait_until(lambda: ended, "the connection is closed")
    assert (len(workers[0].calls), edge.word(c.S_ABORTS)) == (1, aborts)


def test_a_request_that_was_answered_is_not_aborted(edge: Edge, workers: list[Worker]) -> None:
    aborts = edge.word(c.S_ABORTS)
    with edge.client() as client:
        client.ask(post(SENT))
    wait_until(lambda: not edge.gauges(), "the client is gone")
    assert edge.word(c.S_ABORTS) == aborts


def test_a_worker_that_does_not_answer_aborts_holds_nothing_up(workers: list[Worker]) -> None:
    """They are bounded in number and time; here the worker leaves first."""
    gate = threading.Event()

    def script(call: Call) -> None:
        if call.request_line != ABORT:
            call.send(SSE_HEAD + chunk(b"data: 1\n\n"))
            call.wait_for_end()
        else:
            gate.wait(5)

    workers[0].plan(script)
    with Edge(workers[:1], takes_rid=True) as edge:
        clients = [edge.client() for _ in range(100)]
        for client in clients:
            client.send(post(SENT))
        for client in clients:
            client.read_head()
        for client in clients:
            client.sock.close()
        wait_until(lambda: edge.word(c.S_CLIENT_GONE) == 100, "all have left")
        wait_until(lambda: len(workers[0].calls) == 164, "64 at once, no more")
        assert edge.word(c.S_ABORTS) == 64
        gate.set()
        edge.settle()
        workers[0].plan(echoes)
        assert edge.ask(post(SENT)).status == 200
    workers[0].reset()


def test_a_worker_that_is_gone_is_not_told(edge: Edge, workers: list[Worker]) -> None:
    ended: list[float] = []
    workers[0].plan(waits(ended))
    aborts = edge.word(c.S_ABORTS)
    with edge.client() as client:
        client.send(post(SENT))
        client.read_head()
        edge.put(0, _workers.READY, is_new=True)  # the slot belongs to another worker now
        edge.ask(post(b"no json"))
    wait_until(lambda: ended, "the connection is closed")
    assert edge.word(c.S_ABORTS) == aborts
