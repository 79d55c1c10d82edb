"""sglfast.edge.mishap: an error of our own costs its request, is answered, given back everywhere, and logged without its text."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
from edge_harness import Memory, StubTransport, run, shard_in_loop, stub_client, stub_upstream

from sglfast import _counters as c
from sglfast.edge.mishap import report
from sglfast.edge.policy import Policy
from sglfast.edge.policy.approximate import ApproximateCacheAware
from sglfast.edge.policy.power_of_two import PowerOfTwo
from sglfast.edge.policy.random import Random
from sglfast.edge.server import ClientConnection
from sglfast.edge.shard import Shard
from sglfast.errors import REASON_INDEX

SECRET = "what the prompt said"
POST = b'POST /v1/chat/completions HTTP/1.1\r\nhost: r\r\ncontent-length: 14\r\n\r\n{"model": "m"}'
LIFE = b"GET /health HTTP/1.1\r\nhost: r\r\n\r\n"


def breaks(*_: object, **__: object) -> Any:
    raise RuntimeError(SECRET)


def broken(
    test: Callable[[Shard, Memory, ClientConnection, StubTransport], None], caplog: pytest.LogCaptureFixture, **settings: Any
) -> None:
    """Run `test`, then look at what must hold after every mishap."""
    memory = Memory(["http://127.0.0.1:9"])

    async def inside() -> None:
        shard = shard_in_loop(memory, **settings)
        test(shard, memory, *stub_client(shard))
        assert shard.loads.requests(0) == 0
        assert shard.loads.tokens(0) == 0
        client, transport = stub_client(shard)
        client.data_received(LIFE)
        assert transport.take().startswith(b"HTTP/1.1 200 "), "others are served"
        client.connection_lost(None)

    run(inside())
    assert memory.word(c.S_REASONS + REASON_INDEX["internal_error"]) == 1
    told = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(told) == 1
    assert told[0].fields["error"] == "RuntimeError"  # type: ignore[attr-defined]
    assert "test_edge_mishap.py:" in told[0].fields["at"]  # type: ignore[attr-defined]
    assert SECRET not in str(told[0].__dict__)


def is_internal_error(answer: bytes) -> bool:
    return answer.startswith(b"HTTP/1.1 500 ") and b"x-router-error-code: internal_error" in answer and SECRET.encode() not in answer


@pytest.mark.parametrize("kind", [Random, PowerOfTwo, ApproximateCacheAware])
def test_the_choice_fails(kind: type[Policy], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kind, "choose", breaks)

    def test(shard: Shard, memory: Memory, client: ClientConnection, transport: StubTransport) -> None:
        client.data_received(POST)
        assert is_internal_error(transport.take())
        assert transport.has_eof or transport.is_closed

    broken(test, caplog, policy={Random: "random", PowerOfTwo: "power_of_two", ApproximateCacheAware: "cache_aware"}[kind])


def test_reading_a_request_fails(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def test(shard: Shard, memory: Memory, client: ClientConnection, transport: StubTransport) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(ClientConnection, "dispatch", breaks)
            client.data_received(LIFE)
        assert is_internal_error(transport.take())

    broken(test, caplog)


def test_an_answers_head_fails(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def test(shard: Shard, memory: Memory, client: ClientConnection, transport: StubTransport) -> None:
        worker, to_worker = stub_upstream(shard)
        client.data_received(POST)
        assert shard.loads.requests(0) == 1
        assert client.exchange is not None
        monkeypatch.setattr(type(client.exchange), "holds", breaks)
        worker.data_received(b"HTTP/1.1 500 no\r\ncontent-length: 0\r\n\r\n")
        assert is_internal_error(transport.take())
        assert to_worker.is_aborted
        worker.connection_lost(None)

    broken(test, caplog)


def test_an_answer_that_has_begun_is_cut(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def test(shard: Shard, memory: Memory, client: ClientConnection, transport: StubTransport) -> None:
        worker, to_worker = stub_upstream(shard)
        client.data_received(POST)
        assert client.exchange is not None
        worker.data_received(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        assert transport.take().startswith(b"HTTP/1.1 200 OK")
        write = StubTransport.write

        def breaks_once(self: StubTransport, data: bytes) -> None:
            monkeypatch.setattr(StubTransport, "write", write)
            breaks()

        monkeypatch.setattr(StubTransport, "write", breaks_once)
        worker.data_received(b"3\r\nabc\r\n")
        assert to_worker.is_aborted
        cut = transport.take()
        assert b'"code":"internal_error"' in cut
        assert cut.endswith(b"0\r\n\r\n")
        assert transport.is_closed
        worker.connection_lost(None)

    broken(test, caplog)


def test_a_clients_tick_fails(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def test(shard: Shard, memory: Memory, client: ClientConnection, transport: StubTransport) -> None:
        _, _ = stub_upstream(shard)
        client.data_received(POST)
        assert client.exchange is not None
        monkeypatch.setattr(type(client.exchange), "tick", breaks)
        for turn in range(5):
            shard.clients.sweep(turn, shard.loop.time())
        assert is_internal_error(transport.take())

    broken(test, caplog)


def test_places_are_told_innermost_first(caplog: pytest.LogCaptureFixture) -> None:
    def outer() -> None:
        breaks()

    try:
        outer()
    except RuntimeError as error:
        report(logging.getLogger("test"), error)
    [told] = caplog.records
    places = told.fields["at"].split(" < ")  # type: ignore[attr-defined]
    assert [place.split()[-1] for place in places] == ["breaks", "outer", "test_places_are_told_innermost_first"]
