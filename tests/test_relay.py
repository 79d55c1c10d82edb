"""sglfast._relay, the compiled half of the request path: what is left to test where sglfast.edge does not lead."""

import re
from pathlib import Path

import pytest
from edge_harness import Memory, run, shard_in_loop, stub_client, stub_upstream
from raw_client import post

from sglfast import _counters, _relay

SOURCE = (Path(__file__).parent.parent / "cext" / "relay.pyx").read_text()


def test_words_are_those_of_the_counters() -> None:
    words = re.findall(r"^    c_(W_\w+) = (\d+)$", SOURCE, re.MULTILINE)
    assert len(words) >= 4
    assert {name: int(value) for name, value in words} == {name: getattr(_counters, name) for name, _ in words}


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (_relay.ClientBase, (None,)),
        (_relay.ClientBase, (object(),)),
        (_relay.WorkerConnectionBase, (None,)),
        (_relay.ExchangeBase, (None, None, None, b"")),
    ],
)
def test_objects_of_another_kind_are_refused(make: type, arguments: tuple[object, ...]) -> None:
    with pytest.raises(TypeError):
        make(*arguments)


def test_request_ids_are_unique_and_32_hex_digits() -> None:
    async def inside() -> None:
        shard = shard_in_loop(Memory(["http://127.0.0.1:1"]))
        made = [shard.new_request_id() for _ in range(1000)]
        assert len(set(made)) == 1000
        assert all(re.fullmatch(rb"[0-9a-f]{32}", one) for one in made)
        assert shard_in_loop(Memory(["http://127.0.0.1:1"])).new_request_id() not in made

    run(inside())


@pytest.mark.parametrize("size", [0, 1, 9, 10, 16383, 16384, 16385, 1 << 20])
def test_a_body_of_any_size_is_announced_and_sent_whole(size: int) -> None:
    async def inside() -> None:
        shard = shard_in_loop(Memory(["http://127.0.0.1:1"]))
        connection, transport = stub_upstream(shard)
        stub = stub_client(shard)[0]
        stub.data_received(post(b"x" * size))
        head, _, body = transport.take().partition(b"\r\n\r\n")
        assert body == b"x" * size
        assert [line for line in head.split(b"\r\n") if line.startswith(b"content-length")] == [b"content-length: %d" % size]
        assert connection.exchange is stub.exchange

    run(inside())


def test_an_exchange_ends_once() -> None:
    async def inside() -> None:
        shard = shard_in_loop(Memory(["http://127.0.0.1:1"]))
        client, transport = stub_client(shard)
        connection, _ = stub_upstream(shard)
        client.data_received(post())
        exchange = client.exchange
        assert exchange is not None
        connection.data_received(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
        assert transport.take().endswith(b"\r\n\r\nok")
        assert exchange.is_over
        with pytest.raises(RuntimeError, match="ends once"):
            exchange.finish()

    run(inside())
