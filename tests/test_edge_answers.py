"""sglfast.edge.answers: what the router says itself."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator

import orjson
import pytest
from edge_harness import Edge, Memory, run, settled, shard_in_loop, wait_until
from raw_client import request
from scripted_worker import Worker

from sglfast import _segment, _workers, errors
from sglfast.edge import answers

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


# ---- errors ----


def test_every_reason_has_an_answer() -> None:
    for reason in errors.REASONS:
        opening, body = answers.error_answer(reason)
        status_line, *lines = opening.decode().split("\r\n")
        assert status_line.startswith(f"HTTP/1.1 {reason.status} "), reason.code
        fields = dict(line.split(": ", 1) for line in lines[:-1])
        assert fields.pop("retry-after", None) == ("1" if reason.status in (429, 503) else None)
        assert fields.pop("www-authenticate", None) == ("Bearer" if reason.status == 401 else None)
        assert fields == {
            "content-type": "application/json", "content-length": str(len(body)), "x-router-error-code": reason.code,
        }  # fmt: skip
        assert orjson.loads(body) == {
            "error": {"message": reason.message, "type": reason.error_type, "param": None, "code": reason.code}
        }  # fmt: skip


def test_own_message_and_allow() -> None:
    opening, body = answers.error_answer(errors.METHOD_NOT_ALLOWED, "this path takes only POST")
    assert b"\r\nallow: POST\r\n" in opening
    assert orjson.loads(body)["error"]["message"] == "this path takes only POST"
    assert b"\r\nallow: GET, HEAD\r\n" in answers.error_answer(errors.METHOD_NOT_ALLOWED, "this path takes only GET")[0]
    both = answers.error_answer(errors.METHOD_NOT_ALLOWED, "this path takes only GET, PUT")[0]
    assert b"\r\nallow: GET, HEAD, PUT\r\n" in both
    assert b"content-length: %d\r\n" % len(body) in opening


def test_error_event_ends_what_was_begun() -> None:
    event = answers.error_event(errors.UPSTREAM_TIMEOUT)
    assert event.startswith(b"\n\ndata: {")
    assert event.endswith(b"}\n\n")
    assert orjson.loads(event.strip().removeprefix(b"data: "))["error"]["code"] == "upstream_timeout"


# ---- health, readiness, models ----


def test_readiness_follows_program_and_workers() -> None:
    memory = Memory([f"http://10.0.0.{number}:1" for number in (1, 2)])

    async def test() -> None:
        shard = shard_in_loop(memory)

        def seen() -> tuple[int, dict[str, object]]:
            status, content_type, body = answers.ready(shard)
            assert content_type == answers.JSON
            return status, orjson.loads(body)

        def unready(reason: str, healthy: int, total: int = 2) -> tuple[int, dict[str, object]]:
            return 503, {"status": "not ready", "reason": reason, "healthy_workers": healthy, "total_workers": total}

        assert seen() == (200, {"status": "ready", "healthy_workers": 2, "total_workers": 2})
        memory.table.set_state(0, _workers.UNHEALTHY)
        assert seen() == (200, {"status": "ready", "healthy_workers": 1, "total_workers": 2})
        for state, reason in ((_segment.STARTING, "starting"), (_segment.DRAINING, "draining"), (_segment.STOPPED, "draining")):
            memory.segment.state = state
            assert seen() == unready(reason, 1)
            assert answers.alive(shard) == (200, answers.TEXT, b"OK"), "the process lives whatever the program's state"
        memory.segment.state = _segment.SERVING
        memory.table.set_state(1, _workers.FREE)
        assert seen() == unready("insufficient healthy workers", 0, 1)

    run(test())


def test_models_also_of_workers_that_are_down() -> None:
    memory = Memory([f"http://10.0.0.{number}:1" for number in range(1, 5)], models=["b", "a", "b", None])

    async def test() -> None:
        shard = shard_in_loop(memory)
        memory.table.set_state(1, _workers.UNHEALTHY)
        status, content_type, body = answers.models(shard)
        assert (status, content_type) == (200, answers.JSON)
        found = orjson.loads(body)
        assert found["object"] == "list"
        assert [(row["id"], row["root"], row["object"]) for row in found["data"]] == [("a", "a", "model"), ("b", "b", "model")]
        assert all(abs(row["created"] - time.time()) < 60 for row in found["data"])

    run(test())


# ---- at a real shard ----


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.close()


def test_own_answers_at_a_real_shard(worker: Worker) -> None:
    with Edge([worker]) as edge, settled(edge), edge.client() as client:
        for path in ("/health", "/healthz", "/liveness"):
            found = client.ask(request("GET", path))
            assert (found.status, found.body, found.header("content-type")) == (200, b"OK", [b"text/plain; charset=utf-8"])
        for path in ("/readyz", "/readiness"):
            assert orjson.loads(client.ask(request("GET", path)).body) == {"status": "ready", "healthy_workers": 1, "total_workers": 1}
        assert [row["id"] for row in orjson.loads(client.ask(request("GET", "/v1/models")).body)["data"]] == ["demo"]
        edge.table.set_state(0, _workers.UNHEALTHY)
        found = client.ask(request("GET", "/readyz"))
        assert (found.status, found.code) == (503, None)
        assert client.ask(request("GET", "/health")).status == 200
        found = client.ask(request("POST", "/generate", body=b""))
        assert (found.status, found.code, found.header("retry-after")) == (503, "no_healthy_workers", [b"1"])
        edge.table.set_state(0, _workers.READY)
        assert wait_until(lambda: client.ask(request("POST", "/generate", body=b"x")).status == 200, "it is chosen again")
