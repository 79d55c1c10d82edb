"""sglfast.edge.retry: errors of workers that are too long to be held back."""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from edge_harness import Edge, settled, wait_until
from raw_client import chunked, post
from scripted_worker import Call, Script, Worker, answer_head, says
from test_edge_retry import QUICK, SENT, fails_at_first

from sglfast import _counters as c
from sglfast import _workers

LONG = bytes(range(256)) * 8000  # 2 MB
_LONG_HEAD = {"content-length": answer_head(f"content-length: {len(LONG)}", status="500 Internal Server Error"),
              "chunks": answer_head("transfer-encoding: chunked", status="502 Bad Gateway"),
              "the end": answer_head(status="503 Service Unavailable")}  # fmt: skip


def long_error(framing: str, ended: list[bool]) -> Script:
    """An error of LONG without its last byte; adds to `ended` whether the router has closed the connection."""

    def script(call: Call) -> None:
        data = chunked(LONG, *[60_000] * 34) if framing == "chunks" else LONG
        with suppress(OSError):
            call.send(_LONG_HEAD[framing] + data[:-1])
        ended.append(call.wait_for_end())

    return script


@pytest.fixture(scope="module")
def shard_of_two(workers: list[Worker]) -> Iterator[Edge]:
    with Edge(workers[:2], **QUICK) as edge:  # type: ignore[arg-type]
        yield edge


@pytest.fixture
def edge(shard_of_two: Edge) -> Iterator[Edge]:
    with settled(shard_of_two):
        yield shard_of_two


@pytest.mark.parametrize("framing", _LONG_HEAD)
def test_an_error_too_long_to_be_kept_is_dropped_for_the_next_attempt(framing: str, edge: Edge, workers: list[Worker]) -> None:
    ended: list[bool] = []
    fails_at_first(workers, long_error(framing, ended))
    left = [edge.worker_word(n, word) for n in range(2) for word in (c.W_ERRORS, c.W_BUSY)]
    with edge.client() as client:
        found = client.ask(post(SENT))
        assert (found.status, found.body) == (200, SENT)
        assert client.ask(post(b"next")).body == b"next"
    wait_until(lambda: ended == [True], "the worker is left in the middle")
    now = [edge.worker_word(n, word) for n in range(2) for word in (c.W_ERRORS, c.W_BUSY)]
    assert sum(now) == sum(left) + 1, "it is held against the worker, or is none, by its status"
    assert now[1::2] != left[1::2] if framing == "the end" else now[0::2] != left[0::2]


def test_the_last_attempt_s_error_is_passed_on_however_long(workers: list[Worker]) -> None:
    with Edge(workers[:1], **QUICK, retry_max_retries=3) as edge, settled(edge):  # type: ignore[arg-type]
        ended: list[bool] = []
        workers[0].plan(long_error("content-length", ended), long_error("content-length", ended), says(_LONG_HEAD["content-length"], LONG))
        found = edge.ask(post(SENT))
        assert (found.status, found.body) == (500, LONG)
        assert len(workers[0].calls) == 3
        wait_until(lambda: ended == [True, True], "the others are left")


@pytest.mark.parametrize(
    "settings",
    [
        {"disable_circuit_breaker": False, "cb_failure_threshold": 1},
        {"request_timeout_secs": 1.0, "retry_initial_backoff_ms": 5000, "retry_max_backoff_ms": 5000},
    ],
    ids=["it shuts the only worker", "no time is left for another attempt"],
)
def test_a_long_error_is_not_dropped_for_an_attempt_that_cannot_be_made(workers: list[Worker], settings: dict[str, Any]) -> None:
    with Edge(workers[:1], **QUICK | settings) as edge, settled(edge):
        edge.allowed_log = ("circuit is open",)
        workers[0].plan(says(_LONG_HEAD["content-length"], LONG))
        found = edge.ask(post(SENT))
        assert (found.status, found.body) == (500, LONG)
        assert len(workers[0].calls) == 1


@pytest.mark.parametrize("disable_retries", [False, True])
def test_an_error_too_long_to_be_kept_is_the_answer_where_nobody_else_is(workers: list[Worker], disable_retries: bool) -> None:
    """The only worker is taken out of the pool while its answer comes."""
    settings = QUICK | {"disable_retries": disable_retries}
    with Edge(workers[:1], **settings) as edge, settled(edge):  # type: ignore[arg-type]

        def script(call: Call) -> None:
            call.send(_LONG_HEAD["content-length"] + LONG[:1000])
            edge.table.set_state(0, _workers.DRAINING)
            wait_until(lambda: edge.segment.workers_seen(1) == edge.table.version(), "the shard has seen it")
            call.send(LONG[1000:])

        workers[0].plan(script)
        found = edge.ask(post(SENT))
        assert (found.status, found.body) == (500, LONG)
        assert len(workers[0].calls) == 1
