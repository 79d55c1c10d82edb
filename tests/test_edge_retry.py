"""sglfast.edge.retry: which failures are followed by another attempt, at whom, after which pause, and what the client gets at last."""

import time
from collections.abc import Iterator
from itertools import pairwise

import orjson
import pytest
from edge_harness import Edge, settled, wait_until
from raw_client import chunk, chunked, post
from scripted_worker import SSE_HEAD, Call, RefusingPort, Script, SilentPort, Worker, answer, answer_head, echoes, late, says, then_closes

from sglfast import _counters as c
from sglfast import _workers
from sglfast.config import ServeConfig
from sglfast.edge.retry import RetryPolicy

QUICK = {"disable_retries": False, "retry_initial_backoff_ms": 5, "retry_max_backoff_ms": 20}
SENT = b'{"model":"demo"}'


def status(line: str, body: bytes = b'{"error":"the worker\'s"}', *headers: str) -> Script:
    return says(answer(body, *headers, status=line))


@pytest.fixture(scope="module")
def shard_of_two(workers: list[Worker]) -> Iterator[Edge]:
    with Edge(workers[:2], **QUICK) as edge:  # type: ignore[arg-type]
        yield edge


@pytest.fixture
def edge(shard_of_two: Edge) -> Iterator[Edge]:
    with settled(shard_of_two):
        yield shard_of_two


@pytest.fixture(scope="module")
def shard_of_one(workers: list[Worker]) -> Iterator[Edge]:
    with Edge(workers[:1], **QUICK, retry_max_retries=3, request_timeout_secs=2.0) as edge:  # type: ignore[arg-type]
        yield edge


@pytest.fixture
def alone(shard_of_one: Edge) -> Iterator[Edge]:
    with settled(shard_of_one):
        yield shard_of_one


def fails_at_first(workers: list[Worker], script: Script) -> None:
    """Whichever of the first two workers is asked first fails so, and both answer well afterwards."""
    taken: list[Worker] = []

    def once(call: Call) -> None:
        taken.append(call.worker)
        script(call) if len(taken) == 1 else echoes(call)

    for worker in workers[:2]:
        worker.plan(once)


FAILURES: dict[str, Script] = {
    **{line: status(line) for line in (
        "408 Request Timeout", "429 Too Many Requests", "500 Internal Server Error", "502 Bad Gateway", "503 Service Unavailable",
        "504 Gateway Timeout",
    )},
    "closes": Call.close,
    "resets": Call.reset,
    "cuts the status line": then_closes(b"HTTP/1.1 2"),
    "cuts the head": then_closes(b"HTTP/1.1 200 OK\r\ncontent-le"),
    "speaks no HTTP": says(b"hello\r\n\r\n"),
    "cuts the body of an error": then_closes(answer(b"x" * 100, status="500 Internal Server Error")[:-40]),
    "an error in chunks": says(answer_head("transfer-encoding: chunked", status="500 Internal Server Error"), chunk(b"no"), chunk(b"")),
    "an error until the end": then_closes(answer_head(status="500 Internal Server Error") + b"no"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAILURES)
def test_the_other_worker_is_asked(name: str, edge: Edge, workers: list[Worker]) -> None:
    fails_at_first(workers, FAILURES[name])
    retries, exhausted = edge.word(c.S_RETRIES), edge.word(c.S_RETRIES_EXHAUSTED)
    with edge.client() as client:
        found = client.ask(post(SENT))
        assert (found.status, found.body, found.code) == (200, SENT, None)
        assert client.ask(post(b"next")).body == b"next", "the connection goes on"
    (first,), (second, *_) = sorted((worker.calls for worker in workers[:2]), key=len)
    assert first.body == second.body == SENT
    assert first.header("x-request-id") == second.header("x-request-id") == [found.request_id]
    assert (edge.word(c.S_RETRIES), edge.word(c.S_RETRIES_EXHAUSTED)) == (retries + 1, exhausted)


@pytest.mark.parametrize(
    "line",
    ["400 Bad Request", "401 Unauthorized", "404 Not Found", "409 Conflict", "413 Content Too Large", "422 Unprocessable Content",
     "501 Not Implemented", "505 HTTP Version Not Supported"],
)  # fmt: skip
def test_other_errors_are_the_client_s_at_once(line: str, edge: Edge, workers: list[Worker]) -> None:
    for worker in workers[:2]:
        worker.plan(status(line, b'{"error":"yours"}', "x-why: because"))
    found = edge.ask(post(SENT))
    assert (found.status, found.body, found.header("x-why"), found.code) == (int(line[:3]), b'{"error":"yours"}', [b"because"], None)
    assert sum(len(worker.calls) for worker in workers[:2]) == 1


def test_when_all_attempts_fail_the_last_answer_is_passed_on(alone: Edge, workers: list[Worker]) -> None:
    exhausted = alone.word(c.S_RETRIES_EXHAUSTED)
    scripts = [status(f"50{n} No", b"%d" % n, f"retry-after: {n}", "content-type: text/plain") for n in (0, 2, 3)]
    workers[0].plan(*scripts)
    with alone.client() as client:
        found = client.ask(post(SENT))
        assert (found.status, found.body, found.header("retry-after"), found.code) == (503, b"3", [b"3"], None)
        workers[0].plan(echoes)
        assert client.ask(post(SENT)).body == SENT
    assert len(workers[0].calls) == 4
    assert alone.word(c.S_RETRIES_EXHAUSTED) == exhausted + 1
    assert (alone.worker_word(0, c.W_BUSY), alone.worker_word(0, c.W_ERRORS)) >= (1, 2)


def test_chunks_are_passed_on_as_chunks(alone: Edge, workers: list[Worker]) -> None:
    body = b'{"error":"busy"}'
    workers[0].plan(says(answer_head("transfer-encoding: chunked", status="503 Busy"), chunked(body, 3, 5)))
    found = alone.ask(post(SENT))
    assert (found.status, found.body) == (503, body)
    assert found.raw_body == chunked(body, 3, 5)
    with alone.client() as client:  # to a client that knows no chunks
        client.send(post(SENT, version="1.0"))
        assert client.read_head().status == 503
        assert client.read_to_end() == body
    assert len(workers[0].calls) == 6


def test_an_answer_that_a_worker_gave_is_better_than_none(workers: list[Worker]) -> None:
    """One worker is busy, the others cannot be reached: the client is told to come again, not that all is broken."""
    refusing = [RefusingPort(), RefusingPort()]
    with Edge([workers[0], *refusing], **QUICK, retry_max_retries=3) as edge, settled(edge):  # type: ignore[arg-type]
        edge.allowed_log = ("worker cannot be reached",)
        workers[0].plan(status("429 Too Many Requests", b"later", "retry-after: 7"))
        for _ in range(3):
            found = edge.ask(post(SENT))
            assert (found.status, found.body, found.header("retry-after")) == (429, b"later", [b"7"])
    for port in refusing:
        port.close()


def test_nothing_is_sent_again_once_a_byte_of_an_answer_went_out(edge: Edge, workers: list[Worker]) -> None:
    for data in (answer(b"x" * 100)[:-40], SSE_HEAD + chunk(b"data: 1\n\n"), SSE_HEAD):
        for worker in workers[:2]:
            worker.plan(then_closes(data))
        with edge.client() as client:
            client.send(post(SENT))
            assert client.read_head().status == 200
            client.read_to_end()
        assert sum(len(worker.calls) for worker in workers[:2]) == 1
        for worker in workers[:2]:
            worker.reset()


def test_each_worker_is_tried_before_one_is_asked_again(workers: list[Worker]) -> None:
    order: list[str] = []

    def fails(call: Call) -> None:
        order.append(call.worker.name)
        status("500 Internal Server Error")(call)

    for worker in workers:
        worker.plan(fails)
    with Edge(workers, **QUICK, retry_max_retries=7) as edge, settled(edge):  # type: ignore[arg-type]
        assert edge.ask(post(SENT)).status == 500
        assert len(order) == 7
        assert set(order[:3]) == {"first", "second", "third"}
        assert all(a != b for a, b in pairwise(order)), "never the one that has just failed while there is another"


def test_pauses_grow(workers: list[Worker]) -> None:
    """Not how long they are on a busy machine, but how short they may not be."""
    times: list[float] = []

    def fails(call: Call) -> None:
        times.append(time.monotonic())
        status("500 Internal Server Error")(call)

    workers[0].plan(fails)
    settings = {"disable_retries": False, "retry_initial_backoff_ms": 100, "retry_backoff_multiplier": 2.0, "retry_jitter_factor": 0.0}
    with Edge(workers[:1], **settings, retry_max_retries=4) as edge, settled(edge):  # type: ignore[arg-type]
        edge.ask(post(SENT))
    pauses = [b - a for a, b in pairwise(times)]
    assert len(pauses) == 3
    assert all(pause_s > least_s - 0.02 for pause_s, least_s in zip(pauses, (0.1, 0.2, 0.4), strict=True))


def test_who_refuses_is_left_at_once(workers: list[Worker]) -> None:
    """The pause would be 30 s: the next worker is asked without one, and so is the third."""
    refusing = [RefusingPort(), RefusingPort()]
    with Edge([*refusing, workers[0]], disable_retries=False, retry_initial_backoff_ms=30_000) as edge, settled(edge):
        edge.allowed_log = ("worker cannot be reached",)
        for number in range(6):
            assert edge.ask(post(b"%d" % number)).body == b"%d" % number
        wait_until(lambda: not edge.word(c.S_INFLIGHT), "the last one is counted")
        refused = edge.worker_word(0, c.W_CONNECT_ERRORS) + edge.worker_word(1, c.W_CONNECT_ERRORS)
        assert refused == edge.word(c.S_RETRIES) >= 4
        assert [edge.worker_word(n, c.W_ERRORS) for n in (0, 1)] == [edge.worker_word(n, c.W_CONNECT_ERRORS) for n in (0, 1)]
        assert edge.log().count("worker cannot be reached") == 1, "one line in a while, not one a request"
    for port in refusing:
        port.close()


def test_all_refuse() -> None:
    ports = [RefusingPort() for _ in range(4)]
    with Edge(ports, **QUICK, retry_max_retries=6) as edge, settled(edge):  # type: ignore[arg-type]
        edge.allowed_log = ("worker cannot be reached",)
        found = edge.ask(post(SENT))
        assert (found.status, found.code) == (502, "upstream_unreachable")
        tried = [edge.worker_word(worker_idx, c.W_CONNECT_ERRORS) for worker_idx in range(4)]
        assert (sum(tried), min(tried)) == (6, 1)
    for port in ports:
        port.close()


def test_who_takes_no_connection_is_left(workers: list[Worker]) -> None:
    silent = SilentPort()
    with Edge([silent], connect_timeout_secs=0.3) as edge, settled(edge):
        edge.allowed_log = ("worker cannot be reached",)
        assert edge.ask(post(SENT)).code == "upstream_timeout"
    with Edge([silent, workers[0]], connect_timeout_secs=0.3, **QUICK) as edge, settled(edge):  # type: ignore[arg-type]
        edge.allowed_log = ("worker cannot be reached",)
        assert [edge.ask(post(body)).body for body in (b"1", b"2")] == [b"1", b"2"]
    silent.close()


def test_all_attempts_together_have_the_request_s_time(alone: Edge, workers: list[Worker]) -> None:
    """A worker that is silent leaves no time for a second attempt; one that fails late leaves none for a third."""
    workers[0].plan(Call.wait_for_end)
    found = alone.ask(post(SENT))
    assert (found.status, found.code, len(workers[0].calls)) == (504, "upstream_timeout", 1)
    workers[0].reset()
    workers[0].plan(late(1.2, answer(b"slow", status="500 Slow")), Call.wait_for_end)
    start = time.monotonic()
    found = alone.ask(post(SENT))
    assert (found.status, found.body, len(workers[0].calls)) == (500, b"slow", 2)
    assert time.monotonic() - start < 6.0


def test_without_retries_there_is_one_attempt(workers: list[Worker]) -> None:
    with Edge(workers[:2], disable_retries=True) as edge, settled(edge):
        for worker in workers[:2]:
            worker.plan(status("503 Service Unavailable", b"busy"))
        found = edge.ask(post(SENT))
        assert (found.status, found.body) == (503, b"busy")
        assert sum(len(worker.calls) for worker in workers[:2]) == 1
        assert edge.word(c.S_RETRIES) == 0


def test_a_client_that_leaves_in_the_pause_is_the_end(workers: list[Worker]) -> None:
    with Edge(workers[:1], disable_retries=False, retry_initial_backoff_ms=2000, retry_jitter_factor=0) as edge, settled(edge):
        workers[0].plan(status("500 Internal Server Error"), echoes)
        with edge.client() as client:
            client.send(post(SENT))
            workers[0].wait_calls(1)
            wait_until(lambda: edge.worker_word(0, c.W_ERRORS) == 1, "the answer has come")
            assert edge.gauges().get("S_INFLIGHT") is None, "a request in its pause is nobody's load"
        wait_until(lambda: edge.word(c.S_CLIENT_GONE) == 1, "the client's end is seen")
        time.sleep(2.5)  # longer than the pause
        assert len(workers[0].calls) == 1


def test_a_pipeline_goes_on_behind_a_retry(edge: Edge, workers: list[Worker]) -> None:
    fails_at_first(workers, status("500 Internal Server Error"))
    with edge.client() as client:
        client.send(b"".join(post(b"%d" % number) for number in range(4)))
        assert [client.read_answer().body for _ in range(4)] == [b"0", b"1", b"2", b"3"]


# ---- a worker that hangs is found out by its health checks ----


def asked(workers: list[Worker]) -> tuple[int, Worker]:
    """Position of the worker that has the request, and the worker."""
    wait_until(lambda: workers[0].calls or workers[1].calls, "a worker is asked")
    return next((n, worker) for n, worker in enumerate(workers) if worker.calls)


def test_a_request_that_waits_at_an_unhealthy_worker_goes_to_another(edge: Edge, workers: list[Worker]) -> None:
    ended: list[bool] = []
    fails_at_first(workers, lambda call: ended.append(call.wait_for_end()))
    with edge.client() as client:
        client.send(post(SENT))
        position, worker = asked(workers[:2])
        edge.table.set_state(position, _workers.UNHEALTHY)
        assert client.read_answer().body == SENT
        wait_until(lambda: ended == [True], "the worker that hangs is told by the end of its connection")
    edge.table.set_state(position, _workers.READY)
    assert len(worker.calls) == 1


def test_a_request_that_has_its_answer_stays(edge: Edge, workers: list[Worker]) -> None:
    def script(call: Call) -> None:
        call.send(SSE_HEAD + chunk(b"data: 1\n\n"))
        time.sleep(1.5)  # three sweeps
        call.send(chunk(b"data: 2\n\n") + chunk(b""))

    for worker in workers[:2]:
        worker.plan(script)
    with edge.client() as client:
        client.send(post(SENT))
        position, _ = asked(workers[:2])
        edge.table.set_state(position, _workers.UNHEALTHY)
        assert client.read_answer().body == b"data: 1\n\ndata: 2\n\n"
    edge.table.set_state(position, _workers.READY)


def test_a_request_that_nobody_else_could_have_waits(alone: Edge, workers: list[Worker]) -> None:
    workers[0].plan(late(1.2, answer(b"at last")))
    with alone.client() as client:
        client.send(post(SENT))
        workers[0].wait_calls(1)
        alone.table.set_state(0, _workers.UNHEALTHY)
        assert client.read_answer().body == b"at last"
    alone.table.set_state(0, _workers.READY)


# ---- requests that last too long ----


def test_stale_requests_are_expired(workers: list[Worker]) -> None:
    with Edge(workers[:1], stale_request_timeout_secs=1.0, **QUICK) as edge, settled(edge):  # type: ignore[arg-type]
        workers[0].plan(Call.wait_for_end)
        found = edge.ask(post(SENT))
        assert (found.status, found.code) == (504, "stale_request_expired")
        workers[0].reset()

        def talks(call: Call) -> None:
            call.send(SSE_HEAD)
            while True:
                call.send(chunk(b"data: 1\n\n"))
                time.sleep(0.1)

        workers[0].plan(talks)
        errors = edge.worker_word(0, c.W_ERRORS)
        with edge.client() as client:
            client.send(post(SENT))
            client.read_head()
            event, last = client.read_to_end().rsplit(chunk(b"data: 1\n\n"), 1)[1].split(b"\r\n", 1)[1].rsplit(b"\r\n0\r\n\r\n", 1)
        assert orjson.loads(event.strip().removeprefix(b"data: "))["error"]["code"] == "stale_request_expired"
        assert last == b""
        assert edge.word(c.S_STALE) == 2
        assert edge.worker_word(0, c.W_ERRORS) == errors, "a worker that was answering has not failed"


# ---- the policy's arithmetic ----


def test_pauses_by_number() -> None:
    policy = RetryPolicy(ServeConfig(retry_jitter_factor=0.0))
    assert policy.max_attempts == 5
    assert [round(policy.pause_s(n), 4) for n in (1, 2, 3, 4)] == [0.05, 0.075, 0.1125, 0.1688]
    assert policy.pause_s(1000) == 30.0
    assert RetryPolicy(ServeConfig(retry_backoff_multiplier=1e300, retry_jitter_factor=0.0)).pause_s(10) == 30.0
    assert RetryPolicy(ServeConfig(disable_retries=True)).max_attempts == 1
    spread = [RetryPolicy(ServeConfig()).pause_s(1) for _ in range(500)]
    assert 0.04 <= min(spread) < 0.043 < 0.057 < max(spread) <= 0.06
