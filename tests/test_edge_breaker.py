"""sglfast.edge.breaker: a worker that fails leaves the selection of all shards, one probe tries it, and it comes back."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import orjson
import pytest
from edge_harness import Edge, Memory, run, settled, shard_in_loop, stub_client, stub_upstream, wait_until
from raw_client import chunk, post, request
from scripted_worker import SSE_HEAD, Call, RefusingPort, Worker, answer, echoes, says, then_closes

from sglfast import _counters as c
from sglfast import _workers, errors
from sglfast._breaker import CLAIMED, CLOSED, HALF_OPEN, OPEN, Breakers
from sglfast._httphead import RequestHead, scan_request
from sglfast.edge.exchange import Exchange
from sglfast.edge.request import ENDPOINTS

SENT = b'{"model":"demo"}'
FAILS = says(answer(b"no", status="500 Internal Server Error"))
# Three failures open it, for long; a test that wants a probe wakes it.
ON: dict[str, Any] = {"disable_circuit_breaker": False, "cb_failure_threshold": 3, "cb_success_threshold": 2}
LOGS = ("circuit is",)


@pytest.fixture(scope="module")
def workers() -> Iterator[list[Worker]]:
    workers = [Worker("first"), Worker("second")]
    yield workers
    for worker in workers:
        worker.close()


@pytest.fixture
def edge(workers: list[Worker]) -> Iterator[Edge]:
    with Edge(workers[:1], **ON) as edge, settled(edge):
        edge.allowed_log = LOGS
        yield edge


def generation(edge: Memory, worker_idx: int = 0) -> int:
    row = edge.table.read(worker_idx)
    assert row is not None
    return row[0]


def other_shard(edge: Memory, **settings: Any) -> Breakers:
    """The breakers as another shard has them; its number is that of no process here."""
    return Breakers(edge.segment, 0, **settings)


def transitions(edge: Memory, worker_idx: int = 0) -> tuple[int, int, int]:
    """(opened, half-opened, closed)"""
    words = (c.W_BREAKER_OPENED, c.W_BREAKER_HALF_OPENED, c.W_BREAKER_CLOSED)
    opened, half, closed = (edge.worker_word(worker_idx, word) for word in words)
    return opened, half, closed


def opened(edge: Edge, worker: Worker) -> Breakers:
    """Fail until the circuit is open."""
    breakers = other_shard(edge)
    worker.plan(FAILS)
    for _ in range(3):
        assert edge.ask(post(SENT)).status == 500
    wait_until(lambda: breakers.state(0) == OPEN, "the circuit opens")
    worker.plan(echoes)
    return breakers


def test_failures_in_a_row_open_it_and_nothing_is_sent(edge: Edge, workers: list[Worker]) -> None:
    opened(edge, workers[0])
    for _ in range(3):
        found = edge.ask(post(SENT))
        assert (found.status, found.code, found.header("retry-after")) == (503, "breaker_open", [b"1"])
    assert len(workers[0].calls) == 3
    assert transitions(edge) == (1, 0, 0)
    assert edge.log().count("circuit is open") == 1
    ready = edge.ask(request("GET", "/readyz"))
    assert (ready.status, orjson.loads(ready.body)["healthy_workers"]) == (200, 1), "an open circuit is no reason to flap"
    why = orjson.loads(edge.ask(request("GET", "/v1/models")).body)
    assert [model["id"] for model in why["data"]] == ["demo"]


def test_a_success_between_them_does_not_let_it_open(edge: Edge, workers: list[Worker]) -> None:
    workers[0].plan(FAILS, FAILS, echoes, FAILS, FAILS, echoes)
    assert [edge.ask(post(SENT)).status for _ in range(6)] == [500, 500, 200] * 2
    assert transitions(edge) == (0, 0, 0)


@pytest.mark.parametrize("line", ["400 Bad Request", "404 Not Found", "408 Timeout", "429 Too Many Requests", "501 No", "503 Busy"])
def test_what_says_nothing_of_the_worker_never_opens_it(line: str, edge: Edge, workers: list[Worker]) -> None:
    workers[0].plan(says(answer(b"no", status=line)))
    assert {edge.ask(post(SENT)).status for _ in range(8)} == {int(line[:3])}
    assert transitions(edge) == (0, 0, 0)
    assert other_shard(edge).state(0) == CLOSED


ENDINGS = {"dies in a stream": then_closes(SSE_HEAD + chunk(b"data: 1\n\n")), "closes": Call.close, "speaks no HTTP": says(b"hm\r\n\r\n")}


@pytest.mark.parametrize("name", ENDINGS)
def test_all_kinds_of_failures_count(name: str, edge: Edge, workers: list[Worker]) -> None:
    workers[0].plan(ENDINGS[name])
    for _ in range(3):
        with edge.client() as client:
            client.send(post(SENT))
            client.read_head()
            if name == "dies in a stream":
                client.read_to_end()
    wait_until(lambda: transitions(edge) == (1, 0, 0), "it opens")


def test_refused_connections_count(workers: list[Worker]) -> None:
    refusing = RefusingPort()
    with Edge([refusing], **ON) as edge, settled(edge):
        edge.allowed_log = (*LOGS, "worker cannot be reached")
        assert [edge.ask(post(SENT)).code for _ in range(4)] == ["upstream_unreachable"] * 3 + ["breaker_open"]
    refusing.close()


def test_an_open_worker_is_left_out_while_others_serve(workers: list[Worker]) -> None:
    workers[0].plan(FAILS)
    with Edge(workers, **ON, disable_retries=False, retry_initial_backoff_ms=1) as edge, settled(edge):
        edge.allowed_log = LOGS
        assert [edge.ask(post(SENT)).status for _ in range(20)] == [200] * 20, "retried until it opens, then not even tried"
        assert (len(workers[0].calls), len(workers[1].calls)) == (3, 20)
        found = orjson.loads(edge.ask(post(SENT, target="/explain/v1/chat/completions")).body)
        why = {row["worker"]: (row["eligible"], row["why"]) for row in found["candidates"]}
        assert why[workers[0].url] == (False, "its circuit is open: its requests have failed")
        assert why[workers[1].url][0]


def test_one_request_charges_a_worker_once(workers: list[Worker]) -> None:
    """However often it is tried there: it may be the request that is at fault."""
    with Edge(workers[:1], **ON, disable_retries=False, retry_initial_backoff_ms=1) as edge, settled(edge):
        edge.allowed_log = LOGS
        workers[0].plan(FAILS)
        for requests in (1, 2):
            assert edge.ask(post(SENT)).status == 500
            assert (len(workers[0].calls), transitions(edge)) == (5 * requests, (0, 0, 0))
        edge.ask(post(SENT))
        wait_until(lambda: transitions(edge) == (1, 0, 0), "the third opens it")
        assert len(workers[0].calls) == 11


def test_models_are_told_apart(workers: list[Worker]) -> None:
    with Edge(workers, models=["a", "b"], **ON) as edge, settled(edge):
        edge.allowed_log = LOGS
        workers[0].plan(FAILS)
        for _ in range(3):
            edge.ask(post(b'{"model":"a"}'))
        assert edge.ask(post(b'{"model":"a"}')).code == "breaker_open"
        assert edge.ask(post(b'{"model":"b"}')).status == 200
        assert edge.ask(post(b'{"model":"c"}')).code == "model_not_found"


# ---- half-open ----


def test_one_probe_at_a_time_until_it_closes(edge: Edge, workers: list[Worker]) -> None:
    breakers = opened(edge, workers[0])
    gate = threading.Event()

    def waits(call: Call) -> None:
        gate.wait(5)
        echoes(call)

    workers[0].plan(*[echoes] * 3, waits, echoes)
    assert other_shard(edge, open_secs=0.0).wake(0, time.monotonic())
    with edge.client() as prober:
        prober.send(post(b"probe"))
        workers[0].wait_calls(4)
        assert edge.ask(post(SENT)).code == "breaker_open", "its probe is out"
        gate.set()
        assert prober.read_answer().body == b"probe"
    assert breakers.state(0) == HALF_OPEN
    assert edge.ask(post(SENT)).status == 200
    wait_until(lambda: breakers.state(0) == CLOSED, "two good probes close it")
    assert transitions(edge) == (1, 0, 1)
    assert edge.log().count("circuit is closed") == 1


def test_the_sweep_wakes_it(workers: list[Worker]) -> None:
    with Edge(workers[:1], **ON, cb_timeout_duration_secs=0.3) as edge, settled(edge):
        edge.allowed_log = LOGS
        breakers = opened(edge, workers[0])
        wait_until(lambda: breakers.state(0) == HALF_OPEN, "it wakes by itself")
        assert transitions(edge) == (1, 1, 0)
        workers[0].plan(FAILS)
        assert edge.ask(post(SENT)).status == 500
        wait_until(lambda: transitions(edge) == (2, 2, 0), "a probe that fails opens it, and it wakes again")
        workers[0].plan(echoes)
        assert [edge.ask(post(SENT)).status for _ in range(3)] == [200] * 3
        wait_until(lambda: transitions(edge)[2] == 1, "it is closed")


def test_a_probe_whose_client_leaves_gives_its_slot_back(edge: Edge, workers: list[Worker]) -> None:
    breakers = opened(edge, workers[0])
    workers[0].plan(*[echoes] * 3, Call.wait_for_end, echoes)
    other_shard(edge, open_secs=0.0).wake(0, time.monotonic())
    with edge.client() as prober:
        prober.send(post(SENT))
        workers[0].wait_calls(4)
        assert not breakers.is_selectable(0)
    wait_until(lambda: breakers.is_selectable(0), "the slot is free")
    assert [edge.ask(post(SENT)).status for _ in range(2)] == [200, 200]
    wait_until(lambda: breakers.state(0) == CLOSED, "it is closed")


@pytest.mark.parametrize("line", ["400 Bad Request", "429 Too Many Requests", "503 Busy"])
def test_a_probe_without_a_verdict_gives_its_slot_back(line: str, edge: Edge, workers: list[Worker]) -> None:
    breakers = opened(edge, workers[0])
    other_shard(edge, open_secs=0.0).wake(0, time.monotonic())
    workers[0].plan(says(answer(b"no", status=line)))
    assert [edge.ask(post(SENT)).status for _ in range(3)] == [int(line[:3])] * 3
    wait_until(lambda: (breakers.state(0), breakers.is_selectable(0)) == (HALF_OPEN, True), "no verdict")


def test_a_long_stream_is_a_verdict_when_it_begins(edge: Edge, workers: list[Worker]) -> None:
    breakers = opened(edge, workers[0])
    other_shard(edge, open_secs=0.0).wake(0, time.monotonic())
    gate = threading.Event()

    def streams(call: Call) -> None:
        call.send(SSE_HEAD + chunk(b"data: 1\n\n"))
        gate.wait(5)
        call.close()

    workers[0].plan(*[echoes] * 3, streams, echoes)
    with edge.client() as prober:
        prober.send(post(SENT))
        prober.read_head()
        wait_until(lambda: breakers.is_selectable(0), "the next probe may go")
        assert breakers.state(0) == HALF_OPEN
        gate.set()
        assert b"upstream_body_incomplete" in prober.read_to_end()
    wait_until(lambda: breakers.state(0) == OPEN, "a probe that breaks later opens it again")


# ---- one state for all shards ----


def test_failures_of_other_shards_count(edge: Edge, workers: list[Worker]) -> None:
    breakers, number = other_shard(edge, failure_threshold=3), generation(edge)
    for _ in range(2):
        breakers.failed(0, number, False, time.monotonic())
    workers[0].plan(FAILS)
    edge.ask(post(SENT))
    wait_until(lambda: breakers.state(0) == OPEN, "two failures there and one here")
    assert edge.ask(post(SENT)).code == "breaker_open"


def test_what_another_shard_opens_is_left_out_here(workers: list[Worker]) -> None:
    memory = Memory([worker.url for worker in workers], shards=2)

    async def test() -> None:
        shard = shard_in_loop(memory, **ON)
        there = Breakers(memory.segment, 1, failure_threshold=1, open_secs=0.0)
        shard.router.refresh()
        assert shard.router.only is not None
        assert len(shard.router.only.view) == 2
        there.failed(0, generation(memory), False, time.monotonic())
        shard.router.refresh()
        assert list(shard.router.only.view.worker_idxs) == [1]
        there.wake(0, time.monotonic())
        shard.router.refresh()
        assert len(shard.router.only.view) == 2
        assert there.claim(0, generation(memory)) == CLAIMED
        shard.router.refresh()
        assert list(shard.router.only.view.worker_idxs) == [1], "its probe is out, over there"
        there.release_shard(1)
        shard.router.refresh()
        assert len(shard.router.only.view) == 2, "that shard has died"

    run(test())


def test_a_probe_lost_to_another_shard_goes_elsewhere(workers: list[Worker]) -> None:
    """Both shards have chosen the half-open worker in the same moment."""
    memory = Memory(["http://127.0.0.1:9", "http://127.0.0.1:10"], shards=2)

    async def test() -> None:
        shard = shard_in_loop(memory, **ON)
        there = Breakers(memory.segment, 1, failure_threshold=1, open_secs=0.0)
        there.failed(0, generation(memory), False, time.monotonic())
        there.wake(0, time.monotonic())
        shard.router.refresh()
        pool = shard.router.only
        assert pool is not None
        route = pool.plain_routes[0]
        assert route.upstream.needs_probe
        assert there.claim(0, generation(memory)) == CLAIMED

        client, transport = stub_client(shard)
        _, upstream = stub_upstream(shard)  # to the other worker: the only one left
        head = scan_request(post(SENT), 65536)
        assert isinstance(head, RequestHead)
        exchange = Exchange(client, ENDPOINTS[b"/v1/chat/completions"], head, SENT)
        client.exchange = exchange
        exchange.dispatch(route)
        assert upstream.take().endswith(SENT)
        assert memory.worker_word(1, c.W_INFLIGHT_REQUESTS) == 1
        assert memory.worker_word(0, c.W_INFLIGHT_REQUESTS) == 0
        exchange.cancel()
        # And when there is no other worker:
        memory.table.set_state(1, _workers.UNHEALTHY)
        again = Exchange(client, ENDPOINTS[b"/v1/chat/completions"], head, SENT)
        client.exchange = again
        again.dispatch(route)
        assert again.is_over
        assert errors.BREAKER_OPEN.code.encode() in transport.take()

    run(test())


def test_a_worker_that_is_replaced_begins_closed(edge: Edge, workers: list[Worker]) -> None:
    breakers = opened(edge, workers[0])
    edge.put(0, is_new=True)
    assert edge.ask(post(SENT)).status == 200
    assert breakers.state(0) == CLOSED


def test_it_can_be_turned_off(workers: list[Worker]) -> None:
    with Edge(workers[:1], disable_circuit_breaker=True, cb_failure_threshold=1) as edge, settled(edge):
        workers[0].plan(FAILS)
        assert {edge.ask(post(SENT)).status for _ in range(15)} == {500}
        assert other_shard(edge).state(0) == CLOSED
