"""sglfast.edge.admission: who may begin, who waits, who is refused."""

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from edge_harness import Edge, settled, wait_until
from raw_client import Client, post
from scripted_worker import Call, Script, Worker, answer, echoes

from sglfast import _counters as c
from sglfast import _workers
from sglfast._admission import Limits


@pytest.fixture(scope="module")
def workers() -> Iterator[list[Worker]]:
    workers = [Worker("first"), Worker("second")]
    yield workers
    for worker in workers:
        worker.close()


class Gate:
    """A worker's script that answers when the test says so; `seen` are the bodies in the order of their arrival."""

    def __init__(self) -> None:
        self.seen: list[bytes] = []
        self._open = threading.Semaphore(0)

    def script(self) -> Script:
        def wait(call: Call) -> None:
            self.seen.append(call.body)
            assert self._open.acquire(timeout=8), "nobody opened the gate"
            echoes(call)

        return wait

    def let(self, count: int = 1) -> None:
        for _ in range(count):
            self._open.release()


@pytest.fixture
def gate(workers: list[Worker]) -> Iterator[Gate]:
    gate = Gate()
    for worker in workers:
        worker.plan(gate.script())
    yield gate
    gate.let(1000)


def asks(clients: ExitStack, edge: Edge, body: bytes, *headers: str) -> Client:
    client = clients.enter_context(edge.client())
    client.send(post(body, *headers))
    return client


def waiting(edge: Edge, count: int) -> None:
    wait_until(lambda: edge.word(c.S_WAITING) == count, lambda: f"{count} wait, not {edge.word(c.S_WAITING)}")


# ---- the limit and its queue ----


@pytest.fixture(scope="module")
def limited(workers: list[Worker]) -> Iterator[Edge]:
    with Edge(
        workers, max_concurrent_requests=2, queue_size=3, queue_timeout_secs=5.0, priority_header="X-Priority", tenant_fairness=True
    ) as edge:
        yield edge


@pytest.fixture
def edge(limited: Edge) -> Iterator[Edge]:
    with settled(limited):
        yield limited


def test_requests_above_the_limit_wait_then_go_in_order(edge: Edge, gate: Gate) -> None:
    with ExitStack() as clients:
        first = [asks(clients, edge, body) for body in (b"1", b"2")]
        wait_until(lambda: len(gate.seen) == 2, "both are at a worker")
        later = []
        for number, body in enumerate((b"3", b"4", b"5"), 1):
            later.append(asks(clients, edge, body))
            waiting(edge, number)
        assert edge.word(c.S_PERMITS) == 2
        refused = edge.ask(post(b"6"))
        assert (refused.status, refused.code, refused.header("retry-after")) == (429, "queue_full", [b"1"])
        assert b'"type":"rate_limit_error"' in refused.body
        for expected in (b"3", b"4", b"5"):
            gate.let()
            wait_until(lambda body=expected: gate.seen[-1] == body, f"{expected!r} is next, not {gate.seen[-1]!r}")  # type: ignore[misc]
        gate.let(2)
        assert sorted(client.read_answer().body for client in first + later) == [b"1", b"2", b"3", b"4", b"5"]
    assert edge.word(c.S_QUEUED) >= 3


def test_a_stream_holds_its_place_to_its_end(edge: Edge, gate: Gate) -> None:
    with ExitStack() as clients:
        for body in (b"1", b"2"):
            asks(clients, edge, body)
        wait_until(lambda: len(gate.seen) == 2, "both are at a worker")
        third = asks(clients, edge, b"3")
        waiting(edge, 1)
        assert third.is_silent(0.1)
        gate.let(3)
        assert third.read_answer().body == b"3"


def test_who_leaves_the_queue_makes_room(edge: Edge, gate: Gate) -> None:
    with ExitStack() as clients:
        for body in (b"1", b"2"):
            asks(clients, edge, body)
        wait_until(lambda: len(gate.seen) == 2, "both are at a worker")
        waiters = []
        for number in range(3):
            waiters.append(asks(clients, edge, b"w%d" % number))
            waiting(edge, number + 1)
        waiters[0].sock.close()
        waiting(edge, 2)
        last = asks(clients, edge, b"last")
        waiting(edge, 3)
        gate.let(5)
        assert last.read_answer().body == b"last"
        assert b"w0" not in gate.seen


def test_who_leaves_a_worker_makes_room(edge: Edge, gate: Gate) -> None:
    with ExitStack() as clients:
        gone = asks(clients, edge, b"1")
        asks(clients, edge, b"2")
        wait_until(lambda: len(gate.seen) == 2, "both are at a worker")
        asks(clients, edge, b"3")
        waiting(edge, 1)
        gone.reset()
        wait_until(lambda: b"3" in gate.seen, "the third takes its place")


def test_priorities(edge: Edge, gate: Gate) -> None:
    with ExitStack() as clients:
        for body in (b"1", b"2"):
            asks(clients, edge, body)
        wait_until(lambda: len(gate.seen) == 2, "both are at a worker")
        for number, (body, priority) in enumerate([(b"low", "-1"), (b"plain", "no number"), (b"high", "9")], 1):
            asks(clients, edge, body, f"x-priority: {priority}")
            waiting(edge, number)
        for expected in (b"high", b"plain", b"low"):
            gate.let()
            wait_until(lambda body=expected: gate.seen[-1] == body, f"{expected!r} is next, not {gate.seen[-1]!r}")  # type: ignore[misc]
        gate.let(2)


def test_tenants_take_turns(edge: Edge, gate: Gate) -> None:
    with ExitStack() as clients:
        for body in (b"1", b"2"):
            asks(clients, edge, body)
        wait_until(lambda: len(gate.seen) == 2, "both are at a worker")
        for number, (body, key) in enumerate([(b"a1", "a"), (b"a2", "a"), (b"b1", "b")], 1):
            asks(clients, edge, body, f"authorization: Bearer {key}")
            waiting(edge, number)
        for expected in (b"a1", b"b1", b"a2"):
            gate.let()
            wait_until(lambda body=expected: gate.seen[-1] == body, f"{expected!r} is next, not {gate.seen[-1]!r}")  # type: ignore[misc]
        gate.let(2)


@pytest.mark.parametrize("limit", ["max_concurrent_requests", "worker_max_in_flight"])
def test_a_free_place_is_left_to_another_shard_that_is_first(workers: list[Worker], limit: str) -> None:
    times_s: list[float] = []

    def slow(call: Call) -> None:
        times_s.append(time.monotonic())
        if len(times_s) == 1:
            time.sleep(0.3)  # for far longer than a place is left to a shard that hangs
        times_s.append(time.monotonic())
        echoes(call)

    workers[0].plan(slow)
    with Edge(workers[:1], shards=2, **{limit: 1}) as edge, settled(edge), ExitStack() as clients:
        other = Limits(edge.segment, 1, max_in_flight=1, max_waiting=1, rate_per_s=0, burst=0)
        asks(clients, edge, b"1")
        wait_until(lambda: len(times_s) == 1, "it is at the worker")
        # It shows that somebody waits there, and then does not take its turn.
        other.show_head(limit == "max_concurrent_requests")
        other.show_line_head(0, limit == "worker_max_in_flight")
        try:
            assert asks(clients, edge, b"2").read_answer().body == b"2"
        finally:
            other.show_head(0)
            other.show_line_head(0, 0)
    assert times_s[2] - times_s[1] > 0.015


def test_paths_of_the_router_itself_are_not_limited(edge: Edge, gate: Gate) -> None:
    with ExitStack() as clients:
        for body in (b"1", b"2"):
            asks(clients, edge, body)
        wait_until(lambda: len(gate.seen) == 2, "both are at a worker")
        with edge.client() as client:
            assert client.ask(b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n").status == 200
        gate.let(2)


# ---- other limits ----


def test_a_wait_that_is_too_long(workers: list[Worker], gate: Gate) -> None:
    with Edge(workers, max_concurrent_requests=1, queue_timeout_secs=0.2) as edge, settled(edge), ExitStack() as clients:
        asks(clients, edge, b"1")
        wait_until(lambda: len(gate.seen) == 1, "it is at a worker")
        begun = time.monotonic()
        answer = edge.ask(post(b"2"))
        assert (answer.status, answer.code) == (408, "queue_timeout")
        assert time.monotonic() - begun >= 0.2
        assert not answer.closes
        gate.let(1)


def test_without_a_queue_the_answer_comes_at_once(workers: list[Worker], gate: Gate) -> None:
    with Edge(workers, max_concurrent_requests=1, queue_size=0) as edge, settled(edge), ExitStack() as clients:
        first = asks(clients, edge, b"1")
        wait_until(lambda: len(gate.seen) == 1, "it is at a worker")
        assert edge.ask(post(b"2")).code == "queue_full"
        gate.let(2)
        assert first.read_answer().body == b"1"
        assert edge.ask(post(b"3")).body == b"3"


def test_a_worker_gets_no_more_than_its_limit(workers: list[Worker], gate: Gate) -> None:
    with Edge(workers, worker_max_in_flight=1) as edge, settled(edge), ExitStack() as clients:
        for body in (b"1", b"2"):
            asks(clients, edge, body)
        wait_until(lambda: len(gate.seen) == 2, "one at each worker")
        assert [edge.worker_word(i, c.W_INFLIGHT_REQUESTS) for i in (0, 1)] == [1, 1]
        third = asks(clients, edge, b"3")
        waiting(edge, 1)
        assert third.is_silent(0.1)
        gate.let(3)
        assert third.read_answer().body == b"3"


def test_a_wait_for_a_full_worker_ends_in_time(workers: list[Worker], gate: Gate) -> None:
    with Edge(workers[:1], worker_max_in_flight=1, queue_timeout_secs=0.3) as edge, settled(edge), ExitStack() as clients:
        asks(clients, edge, b"1")
        wait_until(lambda: len(gate.seen) == 1, "it is at the worker")
        answer = edge.ask(post(b"2"))
        assert (answer.status, answer.code) == (408, "queue_timeout")
        gate.let(1)


def test_those_who_wait_for_a_full_worker_keep_their_order(workers: list[Worker], gate: Gate) -> None:
    with Edge(workers[:1], worker_max_in_flight=1) as edge, settled(edge), ExitStack() as clients:
        for number in range(6):
            asks(clients, edge, b"%d" % number)
            wait_until(lambda number=number: edge.word(c.S_WAITING) == number, "it waits")  # type: ignore[misc]
        for number in range(6):
            gate.let(1)
            wait_until(lambda number=number: len(gate.seen) == min(6, number + 2), "the next one")  # type: ignore[misc]
        assert gate.seen == [b"%d" % number for number in range(6)]
        assert edge.word(c.S_QUEUED) == 5, "each waited once"


def test_a_full_model_does_not_hold_up_another(workers: list[Worker], gate: Gate) -> None:
    workers[1].plan(echoes)
    with Edge(workers, models=["a", "b"], worker_max_in_flight=1) as edge, settled(edge), ExitStack() as clients:
        asks(clients, edge, b'{"model":"a"}')
        wait_until(lambda: len(gate.seen) == 1, "it is at the worker")
        asks(clients, edge, b'{"model":"a","n":2}')
        waiting(edge, 1)
        assert edge.ask(post(b'{"model":"b"}')).status == 200
        gate.let(2)


def busy_once(call: Call) -> None:
    """A worker that refuses its first request."""
    if len(call.worker.calls) > 1:
        echoes(call)
    else:
        call.send(answer(b"busy", status="503 Service Unavailable"))


RETRIES = {"disable_retries": False, "retry_initial_backoff_ms": 1, "worker_max_in_flight": 1}


def test_a_further_attempt_waits_for_a_full_worker_and_lets_others_pass(workers: list[Worker], gate: Gate) -> None:
    workers[0].plan(busy_once)
    with Edge(workers, **RETRIES) as edge, settled(edge), ExitStack() as clients:  # type: ignore[arg-type]
        second = next_at(edge, workers[1], clients, gate)
        failed = asks(clients, edge, b"fails")  # only the first worker has room
        workers[0].wait_calls(1)
        waiting(edge, 1)
        assert edge.worker_word(1, c.W_INFLIGHT_REQUESTS) == 1, "no request too many"
        assert edge.ask(post(b"passes")).body == b"passes"
        assert failed.is_silent(0.05)
        gate.let(2)
        assert second.read_answer().status == 200
        assert failed.read_answer().body == b"fails"
        assert gate.seen[-1] == b"fails", "the second worker had it"
        assert [call.body for call in workers[0].calls] == [b"fails", b"passes"]


def test_a_further_attempt_that_waits_too_long_ends_with_what_a_worker_said(workers: list[Worker], gate: Gate) -> None:
    workers[0].plan(busy_once)
    with Edge(workers, **RETRIES, queue_timeout_secs=0.2) as edge, settled(edge), ExitStack() as clients:  # type: ignore[arg-type]
        next_at(edge, workers[1], clients, gate)
        found = edge.ask(post(b"fails"))
        assert (found.status, found.body, found.code) == (503, b"busy", None)
        gate.let()


def test_a_further_attempt_without_a_queue_ends_with_what_a_worker_said(workers: list[Worker], gate: Gate) -> None:
    workers[0].plan(busy_once)
    with Edge(workers, **RETRIES, queue_size=0) as edge, settled(edge), ExitStack() as clients:  # type: ignore[arg-type]
        next_at(edge, workers[1], clients, gate)
        found = edge.ask(post(b"fails"))
        assert (found.status, found.body) == (503, b"busy")
        assert edge.worker_word(1, c.W_INFLIGHT_REQUESTS) == 1
        gate.let()


def next_at(edge: Edge, worker: Worker, clients: ExitStack, gate: Gate) -> Client:
    """A request that a worker behind the gate has now. The other worker is closed meanwhile."""
    other = 1 - edge.workers.index(worker)
    edge.table.set_state(other, _workers.UNHEALTHY)
    client = asks(clients, edge, b"holds")
    wait_until(lambda: gate.seen == [b"holds"], "it is at the worker")
    edge.table.set_state(other, _workers.READY)
    return client


def test_a_rate(workers: list[Worker]) -> None:
    for worker in workers:
        worker.plan(echoes)
    with Edge(workers, rate_limit_tokens_per_second=20, queue_size=0) as edge, settled(edge), edge.client() as client:
        begun = time.monotonic()
        codes = [client.ask(post()).status for _ in range(60)]
        passed = codes.count(200)
        assert 20 <= passed <= 21 + 20 * (time.monotonic() - begun)
        assert set(codes) == {200, 429}


def test_a_rate_with_a_queue_delays(workers: list[Worker]) -> None:
    for worker in workers:
        worker.plan(echoes)
    with Edge(workers, rate_limit_tokens_per_second=50, queue_size=100) as edge, settled(edge), edge.client() as client:
        begun = time.monotonic()
        assert [client.ask(post()).status for _ in range(70)] == [200] * 70
        assert time.monotonic() - begun >= (70 - 51) / 50


@pytest.mark.parametrize("full", ["prefill", "decode"])
def test_a_pair_waits_until_both_of_its_workers_have_room(full: str, workers: list[Worker]) -> None:
    prefill, decode = workers
    gate = Gate()
    (prefill if full == "prefill" else decode).plan(gate.script())
    (decode if full == "prefill" else prefill).plan(echoes)
    with Edge(workers, roles=["prefill", "decode"], worker_max_in_flight=1) as edge, settled(edge), ExitStack() as clients:
        first = asks(clients, edge, b"1")
        wait_until(lambda: gate.seen == [b"1"], "it is there")
        if full == "prefill":
            assert first.read_answer().body == b"1", "the decode worker has room again, the prefill worker has not"
        second = asks(clients, edge, b"2")
        waiting(edge, 1)
        gate.let()
        if full == "decode":
            assert first.read_answer().body == b"1"
        wait_until(lambda: gate.seen == [b"1", b"2"], "it is its turn")
        gate.let()
        assert second.read_answer().body == b"2"
        wait_until(lambda: not edge.inflight(), "all is given back")
