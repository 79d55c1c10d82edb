"""sglfast.edge.predict for workers without events: what they were sent is all that is known of them.

The index's half is played by the test, with the real writer.
"""

import pytest
from edge_harness import Memory, run, shard_in_loop, stub_client
from predict_bench import ENGINES, EXACT, ColdKeyer, Index, body, memory_of, route_of, sent, shards, words
from test_edge_explain import explained

from sglfast import _workers
from sglfast._predicted import GRACE_MS
from sglfast.edge.policy import CACHE_HIT, CACHE_MISS, UNKEYED
from sglfast.edge.policy.approximate import ApproximateCacheAware
from sglfast.edge.policy.cache_aware import CacheAware
from sglfast.edge.request import Facts
from sglfast.edge.shard import Shard

APPROXIMATE = {"policy": "cache_aware", "cache_threshold": 0.3, "balance_abs_threshold": 64, "balance_rel_threshold": 1.5}


def test_without_events_the_text_is_the_index() -> None:
    """Conversations stay on their worker over any time and any number of shards, with neither tokenizer nor events."""

    def test(one: Shard, other: Shard, index: Index) -> None:
        places: dict[int, int] = {}
        texts = {user: words(user, 3000) for user in range(12)}
        for turn in range(4):
            for user in texts:
                shard = (one, other)[(user + turn) % 2]
                route = route_of(shard.router, body(texts[user]))
                sent(shard, route)
                assert type(route.pool.policy) is ApproximateCacheAware
                assert route.is_approximate
                assert route.predicted_tokens == -1, "no parity: it is no exact prediction"
                if turn:
                    assert (route.upstream.worker_idx, route.decision) == (places[user], CACHE_HIT)
                else:
                    assert route.decision == CACHE_MISS
                places[user] = route.upstream.worker_idx
                shard.router.settle(route)
                texts[user] += words(user + 100 * turn, 500)
                index.drain()
        assert len(set(places.values())) == 4, "by load at first"
        route = route_of(one.router, body(texts[0]))
        assert route.prompt_blocks == len(texts[0] + '[{"role":"user","content":""}]') // 256
        assert 0.8 * route.prompt_blocks < route.overlap_blocks < route.prompt_blocks
        assert one.router.describe(route).endswith(b"state=APPROXIMATE")

    shards(memory_of(block_size=0, n_shards=2), test, 2, **APPROXIMATE)


def test_without_a_tokenizer_events_are_of_no_use_and_the_text_is() -> None:
    def test(shard: Shard, index: Index) -> None:
        data = body(words(1, 3000))
        first = route_of(shard.router, data)
        shard.router.settle(first)
        index.drain()
        again = route_of(shard.router, data)
        assert (again.upstream, again.decision, again.is_approximate) == (first.upstream, CACHE_HIT, True)
        assert shard.router.describe(again).endswith(b"state=APPROXIMATE")

    shards(memory_of(block_size=64), test, **APPROXIMATE)


def test_models_do_not_find_each_other_s_prompts() -> None:
    memory = Memory(ENGINES, models=["a", "a", "b", "b"], prediction_blocks=4000)

    def test(shard: Shard, index: Index) -> None:
        text = words(1, 3000)
        first = route_of(shard.router, body(text, model="a"))
        index.drain()
        assert route_of(shard.router, body(text, model="b")).decision == CACHE_MISS
        assert route_of(shard.router, body(text, model="a")).upstream is first.upstream

    shards(memory, test, **APPROXIMATE)


def test_a_worker_that_goes_is_forgotten() -> None:
    memory = memory_of(block_size=0)

    def test(shard: Shard, index: Index) -> None:
        data = body(words(1, 3000))
        first = route_of(shard.router, data)
        idx = first.upstream.worker_idx
        index.drain()
        memory.table.set_state(idx, _workers.UNHEALTHY)
        elsewhere = route_of(shard.router, data)
        assert (elsewhere.upstream.worker_idx != idx, elsewhere.decision) == (True, CACHE_MISS)
        index.drain()
        memory.put(idx)  # another worker in its slot and its rank
        index.writer.own(idx, 0)
        index.writer.clear([idx])
        index.writer.own(idx, 2)
        hits = shard.router.compare(shard.router.pools["demo"], Facts(0, {}), data)[0].hits
        assert [hit.position for hit in hits] == [shard.router.pools["demo"].positions[elsewhere.rank]]

    shards(memory, test, **APPROXIMATE)


def test_a_pool_of_both_kinds() -> None:
    """Of worker 3 no events come: what it was sent stays; of the others it ends with the first token."""
    memory = memory_of()
    memory.put(3, is_new=False, block_size=0)

    def test(shard: Shard, index: Index) -> None:
        shard.router.refresh()
        pool = shard.router.pools["demo"]
        assert type(pool.policy) is CacheAware
        for idx in (0, 1, 2):
            shard.column.begin(idx, 9000, 0, 0)
        data = body(words(1, 16_000))
        first = route_of(shard.router, data)
        assert (first.upstream.worker_idx, first.is_approximate) == (3, True)
        shard.router.settle(first)
        index.drain()
        index.writer.wait(2 * GRACE_MS)
        index.drain()
        again = route_of(shard.router, data)
        assert (again.upstream.worker_idx, again.decision) == (3, CACHE_HIT)
        assert again.prompt_blocks == 62
        assert 62 * 15 // 16 <= again.overlap_blocks < 62

    shards(memory, test, keyer=ColdKeyer(), **EXACT)


def test_explain_of_an_approximate_pool() -> None:
    memory = memory_of(block_size=0)

    async def inside() -> None:
        shard, index = shard_in_loop(memory, None, **APPROXIMATE), Index(memory)
        connection, transport = stub_client(shard)
        data = body(words(1, 3000))
        found = explained(connection, transport, data)[1]
        assert "no worker was sent more than --cache-threshold" in str(found["candidates"])
        first = route_of(shard.router, data)
        index.drain()
        found = explained(connection, transport, data)[1]
        assert (found["is_approximate"], found["unkeyed_because"], found["prompt_blocks"]) == (True, None, 11)
        row = next(row for row in found["candidates"] if row["worker"] == first.upstream.url)
        assert "was sent the longest part of the prompt" in row["why"]
        assert row["overlap_blocks"] == row["overlap_blocks_by_tier"]["predicted"] == 11
        found = explained(connection, transport, b'{"messages":[]}')[1]
        assert found["unkeyed_because"] == "no tokenizer is loaded"

    run(inside())


def test_a_short_prompt_is_found_as_a_whole() -> None:
    """Too short for a cut: only the same again finds it, and nothing is made of the beginning that others share with it."""
    short, other = b'{"model":"demo","prompt":"repeated prompt for cache"}', b'{"model":"demo","prompt":"repeated prompt for cakes"}'

    def test(shard: Shard, index: Index) -> None:
        first = route_of(shard.router, short)
        sent(shard, first)
        assert first.decision == CACHE_MISS
        for _ in range(11):
            index.drain()
            again = route_of(shard.router, short)
            assert (again.upstream, again.decision) == (first.upstream, CACHE_HIT)
            sent(shard, again)
            shard.router.settle(again)
        assert route_of(shard.router, other).decision == CACHE_MISS

    shards(memory_of(block_size=0), test, **APPROXIMATE)


def test_a_short_prompt_is_no_prediction_where_events_tell() -> None:
    def test(shard: Shard, index: Index) -> None:
        route = route_of(shard.router, body("a short prompt that comes often"))
        assert route.prediction is None
        assert index.drain() == 0

    shards(memory_of(), test, keyer=ColdKeyer(), **EXACT)


@pytest.mark.parametrize("data", [b"", b"{}", b'{"messages":[]}', b"no JSON", b'{"model":"demo","prompt":"two words"}'])
def test_bodies_without_keys_go_by_load(data: bytes) -> None:
    def test(shard: Shard, index: Index) -> None:
        route = route_of(shard.router, data)
        assert (route.decision, route.prediction) == (UNKEYED, None)
        assert index.drain() == 0

    shards(memory_of(block_size=0), test, **APPROXIMATE)
