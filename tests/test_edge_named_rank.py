"""sglfast.edge.named_rank: a rank that the client asks for itself counts the load and the prediction, as far as it is one."""

import pytest
from edge_harness import Memory, run, shard_in_loop, stub_client, stub_upstream
from predict_bench import EXACT, ColdKeyer, Index, words
from raw_client import post
from test_edge_ranks import FACTS
from test_edge_route import ENGINES, keyed, route_of, stored

from sglfast.edge.named_rank import at_rank, named_rank
from sglfast.edge.route import Router
from sglfast.edge.shard import Shard

RANKS = 4
CHAT, GENERATE = 0, 2
PROMPT = b'{"model":"demo","prompt":"' + words(1, 16_000).encode() + b'"%b}'


@pytest.mark.parametrize(
    ("ways", "kind", "header", "body", "rank"),
    [
        (b"hhr-h", CHAT, b"x-data-parallel-rank: 3", b"{}", 3),
        (b"hhr-h", CHAT, b"X-Data-Parallel-Rank:3", b'{"routed_dp_rank":1}', 3),
        (b"hhr-h", CHAT, b"x-override-routed-dp-rank: 2\r\nx-data-parallel-rank: 3", b"{}", 2),
        (b"hhr-h", CHAT, b"a: b", b'{"data_parallel_rank":1}', 1),
        (b"hhr-h", CHAT, b"a: b", b'{"data_parallel_rank":1,"routed_dp_rank":2}', 2),
        (b"hhr-h", CHAT, b"a: b", b'{"x":{"routed_dp_rank":1}}', None),
        (b"hhr-h", CHAT, b"a: b", b'{"routed_dp_rank":"1"}', None),
        (b"hhr-h", CHAT, b"a: b", b'{"routed_dp_rank":1', None),
        (b"hhr-h", CHAT, b"a: b", b'{"routed_dp_rank":1,"x":"%b"}' % (b"x" * 600_000), None),
        (b"hhr-h", CHAT, b"x-data-parallel-rank: one", b'{"routed_dp_rank":1}', None),
        (b"hhr-h", CHAT, b"x-data-parallel-rank: %b" % (b"9" * 5000), b"{}", None),
        (b"hhr-h", GENERATE, b"x-data-parallel-rank: 3", b'{"routed_dp_rank":1}', 1),
        (b"ddd", CHAT, b"x-data-parallel-rank: 3", b'{"data_parallel_rank":1,"routed_dp_rank":2}', 1),
        (b"hh", CHAT, b"x-data-parallel-rank: 3", b"{}", 3),
        (b"hh", CHAT, b"a: b", b'{"routed_dp_rank":1}', None),
    ],
)
def test_the_rank_is_read_where_the_engine_reads_it(ways: bytes, kind: int, header: bytes, body: bytes, rank: int | None) -> None:
    assert named_rank(header + b"\r\n", body, ways, kind) == rank


@pytest.mark.parametrize(
    ("header", "field"), [("X-Data-Parallel-Rank: 2", b""), ("a: b", b',"routed_dp_rank":2'), ("a: b", b',"data_parallel_rank" : 2')]
)
def test_load_and_prediction_are_at_the_client_s_rank(header: str, field: bytes) -> None:
    memory = Memory(ENGINES[:1], block_size=64, dp_size=RANKS, rank_ways="hhr", prediction_blocks=4096)
    stored(memory, r0=1)

    async def inside() -> None:
        shard = shard_in_loop(memory, ColdKeyer(), **EXACT)
        index = Index(memory)
        index.writer.own(1, 1)
        index.writer.own(2, 1)
        index.writer.own(3, 1)
        client, _ = stub_client(shard)
        connection, wire = stub_upstream(shard)
        shard.column.begin_rank(2, 1_000_000)  # of all ranks the one that would not be chosen
        body = PROMPT % field
        client.data_received(post(body, header))
        sent = wire.take()
        assert sent.endswith(body)
        assert sent.lower().count(b"x-data-parallel-rank") == (header[0] == "X")
        assert memory.totals.rank(2) == [2, 1_000_000 + client.exchange.tokens]
        assert client.exchange.tokens > 0
        assert (client.exchange.rank, client.exchange.dp_rank, client.exchange.route.dp_rank) == (2, 2, 2)
        sibling = route_of(shard.router, PROMPT % b"")
        assert sibling.prompt.by_rank is not None
        assert [hit.rank for hit in sibling.prompt.by_rank.values() if hit.guessed_tokens] == [2]
        index.drain()
        connection.data_received(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
        assert memory.totals.rank(2) == [1, 1_000_000]
        assert index.drain() == 1, "settled where it was noted"

    run(inside())


@pytest.mark.parametrize("header", ["X-Data-Parallel-Rank: 4", "X-Data-Parallel-Rank: -1"])
def test_a_rank_that_the_worker_has_not_counts_nothing(header: str) -> None:
    memory = Memory(ENGINES[:1], block_size=64, dp_size=RANKS, rank_ways="hhr", prediction_blocks=4096)

    async def inside() -> None:
        shard, index = shard_in_loop(memory, ColdKeyer(), **EXACT), Index(memory)
        client, _ = stub_client(shard)
        stub_upstream(shard)
        client.data_received(post(PROMPT % b"", header))
        assert client.exchange.rank == client.exchange.dp_rank == -1
        assert index.drain() == 0
        assert not any("rank" in name for name in memory.inflight())
        client.connection_lost(None)

    run(inside())


def test_the_route_to_another_rank() -> None:
    memory = Memory(ENGINES[:2], block_size=64, dp_size=RANKS, rank_ways="hhr")
    stored(memory, r5=18, r7=6)

    def test(router: Router, shard: Shard) -> None:
        route = route_of(router)
        assert (route.rank, route.dp_rank, route.overlap_blocks) == (5, 1, 18)
        moved = at_rank(route, 3)
        assert moved is not None
        assert (moved.rank, moved.dp_rank, moved.overlap_blocks, moved.uncached_tokens) == (7, 3, 6, 1300 - 6 * 64)
        assert moved.predicted_tokens == -1, "it was not looked at closely enough to be a sample"
        empty = at_rank(route, 0)
        assert empty is not None
        assert (empty.rank, empty.overlap_blocks, empty.uncached_tokens) == (4, 0, 1300)
        assert at_rank(route, 1) is route
        assert at_rank(route, RANKS) is None
        assert at_rank(route, -1) is None

    keyed(memory, FACTS, test)
