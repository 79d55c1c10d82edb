"""Shard.apply: new settings in the midst of requests, with nothing lost, leaked or left behind."""

import asyncio
import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
from edge_harness import Memory, StubTransport, run, shard_in_loop, stub_client, stub_upstream
from raw_client import post, request

from sglfast import _counters as c
from sglfast.edge.server import ClientConnection
from sglfast.edge.shard import Shard

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


class House:
    """A shard in a loop, with one worker whose network the test plays."""

    def __init__(self, **settings: Any) -> None:
        self.memory = Memory(["http://127.0.0.1:1"])
        self.shard: Shard = shard_in_loop(self.memory, **settings)

    def apply(self, **settings: Any) -> None:
        self.shard.apply(dataclasses.replace(self.shard.config, **settings))

    def begins(self, *headers: str) -> tuple[ClientConnection, StubTransport]:
        """A client whose request has been sent."""
        client, transport = stub_client(self.shard)
        client.data_received(post(b"{}", *headers))
        return client, transport

    def serves(self, *headers: str) -> bytes:
        """The answer to a request; the worker's is at once there when it is asked."""
        connection, _ = stub_upstream(self.shard)
        client, transport = self.begins(*headers)
        if connection.exchange is not None:
            connection.data_received(OK)
        else:
            connection.upstream.idle.remove(connection)
            connection.connection_lost(None)
        written = transport.take()
        client.connection_lost(None)
        return written

    @property
    def permits(self) -> int:
        return self.memory.word(c.S_PERMITS)

    @property
    def waiting(self) -> int:
        return self.memory.word(c.S_WAITING)


def with_house(test: Any, **settings: Any) -> None:
    async def inside() -> None:
        there = House(**settings)
        await test(there)
        for client in list(there.shard.clients):
            client.connection_lost(None)
        await asyncio.sleep(0.01)
        assert (there.permits, there.waiting, there.memory.word(c.S_WAITING_HEAD)) == (0, 0, 0)

    run(inside())


async def until(is_true: Any) -> None:
    while not is_true():  # noqa: ASYNC110 - within the bound of `run`
        await asyncio.sleep(0.001)


def test_a_limit_counts_what_began_before_it() -> None:
    async def test(there: House) -> None:
        connection, _ = stub_upstream(there.shard)
        there.begins()
        assert there.permits == 0
        there.apply(max_concurrent_requests=1)
        assert there.permits == 1
        _, second = there.begins()
        assert (there.waiting, second.take()) == (1, b"")
        connection.data_received(OK)
        await until(lambda: there.waiting == 0)
        assert there.permits == 1, "the second took the place"

    with_house(test)


def test_without_limits_those_who_wait_go_on_and_nothing_leaks() -> None:
    async def test(there: House) -> None:
        connections = [stub_upstream(there.shard)[0] for _ in range(3)]
        transports = [there.begins()[1] for _ in range(3)]
        assert (there.permits, there.waiting) == (1, 2)
        there.apply(max_concurrent_requests=-1)
        await until(lambda: there.waiting == 0)
        assert not there.shard.is_gated
        for connection in connections:
            connection.data_received(OK)
        assert all(b"200 OK" in transport.take() for transport in transports)
        assert there.permits == 0
        there.serves()
        there.apply(max_concurrent_requests=1)
        assert there.permits == 0

    with_house(test, max_concurrent_requests=1)


def test_a_larger_limit_lets_more_in_and_a_smaller_one_waits_for_its_turn() -> None:
    async def test(there: House) -> None:
        connections = [stub_upstream(there.shard)[0] for _ in range(4)]
        for _ in range(4):
            there.begins()
        assert (there.permits, there.waiting) == (1, 3)
        there.apply(max_concurrent_requests=3)
        await until(lambda: there.waiting == 1)
        assert there.permits == 3
        there.apply(max_concurrent_requests=1)
        for connection in [connection for connection in connections if connection.exchange is not None][:2]:
            connection.data_received(OK)
        await asyncio.sleep(0.01)
        assert (there.permits, there.waiting) == (1, 1), "the limit is reached still"
        next(connection for connection in connections if connection.exchange is not None).data_received(OK)
        await until(lambda: there.waiting == 0)
        assert there.permits == 1

    with_house(test, max_concurrent_requests=1)


def test_a_shorter_patience_holds_for_those_who_wait() -> None:
    async def test(there: House) -> None:
        stub_upstream(there.shard)
        there.begins()
        _, second = there.begins()
        there.apply(queue_timeout_secs=0.01)
        await until(lambda: second.written)
        assert b"x-router-error-code: queue_timeout" in second.take()

    with_house(test, max_concurrent_requests=1)


def test_keys_that_come_and_go() -> None:
    async def test(there: House) -> None:
        assert b"200 OK" in there.serves()
        there.apply(api_key="a")
        assert b" 401 " in there.serves()
        assert b" 401 " in there.serves("authorization: Bearer b")
        assert b"200 OK" in there.serves("authorization: Bearer a")
        there.apply(api_key=None, api_keys=("ann:b",))
        assert b" 401 " in there.serves("authorization: Bearer a")
        connection, network = stub_upstream(there.shard)
        there.begins("authorization: Bearer b")
        assert b"authorization" not in network.take(), "the worker sees no client's key"
        connection.data_received(OK)
        there.apply(api_keys=())
        assert b"200 OK" in there.serves()

    with_house(test)


def test_origins_ids_and_sizes() -> None:
    async def test(there: House) -> None:
        assert b"access-control" not in there.serves("origin: http://page")
        there.apply(cors_allowed_origins=("http://page",), request_id_headers=("my-id",), max_url_bytes=64)
        assert b"access-control-allow-origin: http://page\r\n" in there.serves("origin: http://page")
        assert b"x-request-id: 7\r\n" in there.serves("my-id: 7", "x-request-id: 8")
        client, transport = stub_client(there.shard)
        client.data_received(request("GET", "/" + "a" * 64))
        assert transport.take().startswith(b"HTTP/1.1 414 ")
        client, transport = stub_client(there.shard)
        client.data_received(request("POST", "/v1/other", body=b"{}"))
        assert transport.take().startswith(b"HTTP/1.1 404 ")
        there.apply(passthrough=True, max_connections=1)
        connection, _ = stub_upstream(there.shard)
        client.data_received(request("POST", "/v1/other", body=b"{}"))
        connection.data_received(OK)
        assert transport.take().startswith(b"HTTP/1.1 200 ")
        _, refused = stub_client(there.shard)
        assert b"too_many_connections" in refused.take()

    with_house(test)


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_the_request_log_opens_closes_and_narrows(log_format: str, tmp_path: Path) -> None:
    path = tmp_path / "log"
    fd = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)

    async def test(there: House) -> None:
        there.shard._log_fd = fd
        there.serves("x-request-id: before")
        there.apply(request_log="all")
        there.serves("x-request-id: good-one")
        there.apply(request_log="errors")
        there.serves("x-request-id: unseen")
        there.memory.put(0, state=3, is_new=False)
        _, refused = there.begins("x-request-id: bad-one")
        assert b" 503 " in refused.take()
        there.apply(request_log="off")
        await until(lambda: "bad-one" in path.read_text())
        assert there.shard.request_log is None

    with_house(test, log_format=log_format)
    os.close(fd)
    ids = [name for name in ("before", "good-one", "unseen", "bad-one") if name in path.read_text()]
    assert ids == ["good-one", "bad-one"]
    assert "worker=http://127.0.0.1:1 " in path.read_text() or '"worker":"http://127.0.0.1:1"' in path.read_text()
