"""sglfast.edge.predict in the router: siblings find each other, only events count as overlap, text is enough where there are none.

The index's half is played by the test, with the real writer.
"""

import random
from collections.abc import Callable
from typing import Any

import orjson
import pytest
from edge_harness import Memory, run, shard_in_loop, stub_client, stub_upstream
from test_edge_explain import explained

from sglfast import _counters as c
from sglfast import _workers
from sglfast._hashtree import TreeWriter
from sglfast._predicted import GRACE_MS, KEYS_MAX, PredictionWriter, text_cut, text_keys
from sglfast.edge.policy import CACHE_HIT, CACHE_MISS, UNKEYED, Hit, Prompt
from sglfast.edge.policy.approximate import ApproximateCacheAware
from sglfast.edge.policy.cache_aware import CacheAware
from sglfast.edge.pools import Route
from sglfast.edge.predict import Found, with_guesses
from sglfast.edge.request import ENDPOINTS, Facts
from sglfast.edge.route import Router
from sglfast.edge.shard import Shard
from sglfast.prompt.tokenizer import DEMO_TOKENIZER_PATH
from sglfast.shm import Variant

CHAT = ENDPOINTS[b"/v1/chat/completions"]
ENGINES = [f"http://10.0.0.{number}:30000" for number in range(1, 5)]
COLD = bytes(range(8))  # one key, which nobody owns: all that is made of a new prompt
EXACT = {"policy": "cache_aware", "tokenizer_path": DEMO_TOKENIZER_PATH}


class ColdKeyer:
    """Of every prompt: 4,000 tokens, and the first block's key."""

    def __init__(self, facts: Facts | None = None) -> None:
        self.facts = facts or Facts(4000, {Variant(64): COLD}, is_estimated=True)

    def key(self, kind: int, body: bytes, variants: object, then: Callable[[Facts], None], *, is_whole: bool = False) -> None:
        then(self.facts)


def body(common: str, own: str = "", model: str = "demo") -> bytes:
    return orjson.dumps({"model": model, "messages": [{"role": "user", "content": common + own}], "max_tokens": 7})


def words(seed: int, n_bytes: int) -> str:
    return "".join(random.Random(seed).choices("abcdefgh ", k=n_bytes))


def route_of(router: Router, data: bytes) -> Route:
    found: list[Any] = []
    router.choose(CHAT, data, found.append)
    assert isinstance(found[0], Route), found
    return found[0]


class Index:
    """The writer, for the workers of a memory, with a clock that only the test moves."""

    def __init__(self, memory: Memory) -> None:
        self.writer = PredictionWriter(memory.segment)
        for rank in range(len(memory.urls)):
            self.writer.own(rank, 1)

    def drain(self) -> int:
        return self.writer.drain()


def shards(memory: Memory, test: Callable[..., None], n: int = 1, keyer: Any = None, **settings: Any) -> None:
    """Run `test` with n shards and the index of this memory."""

    async def inside() -> None:
        test(*(shard_in_loop(memory, keyer, shard, **settings) for shard in range(n)), Index(memory))

    run(inside())


def memory_of(block_size: int = 64, n_shards: int = 1, n_workers: int = 4) -> Memory:
    return Memory(ENGINES[:n_workers], block_size=block_size, shards=n_shards, prediction_blocks=4000)


def sent(shard: Shard, route: Route) -> None:
    """The request is on its way, as the exchange would count it."""
    shard.column.begin(route.upstream.worker_idx, route.uncached_tokens, route.decision, 0)


# ---- workers with events ----


def test_siblings_in_one_shard_land_together_before_index_knows() -> None:
    """The first alone has 4,000 tokens on its worker: by load each would go elsewhere."""

    def test(shard: Shard, index: Index) -> None:
        common = words(1, 16_000)
        routes = []
        for n in range(8):
            routes.append(route_of(shard.router, body(common, words(50 + n, 400))))
            sent(shard, routes[-1])
        assert routes[0].decision == CACHE_MISS
        assert {route.upstream.worker_idx for route in routes[1:]} == {routes[0].upstream.worker_idx}
        assert {route.decision for route in routes[1:]} == {CACHE_HIT}
        assert shard.column.get(c.S_PREDICTED) == 7
        assert all(route.uncached_tokens < 400 for route in routes[1:]), "what is on its way is not counted as work again"

    shards(memory_of(), test, keyer=ColdKeyer(), **EXACT)


def test_less_than_a_block_in_common_is_no_hit() -> None:
    def test(shard: Shard, index: Index) -> None:
        common = words(1, 150)
        routes = [route_of(shard.router, body(common, words(n, 200_000))) for n in range(8)]
        assert shard.column.get(c.S_PREDICTED) > 0, "it is seen, and only too little"
        assert {route.decision for route in routes} == {CACHE_MISS}

    shards(memory_of(), test, keyer=ColdKeyer(Facts(50_000, {Variant(64): COLD}, is_estimated=True)), **EXACT)


def test_siblings_in_two_shards_land_together_as_soon_as_index_has_read() -> None:
    def test(one: Shard, other: Shard, index: Index) -> None:
        common = words(1, 16_000)
        first = route_of(one.router, body(common, "A" * 300))
        sent(one, first)
        assert route_of(other.router, body(common, "B" * 300)).decision == CACHE_MISS, "nothing is known there yet"
        fresh = words(2, 16_000)
        first = route_of(one.router, body(fresh, "A" * 300))
        sent(one, first)
        assert index.drain() == 3
        sibling = route_of(other.router, body(fresh, "B" * 300))
        assert (sibling.upstream.worker_idx, sibling.decision) == (first.upstream.worker_idx, CACHE_HIT)
        assert route_of(other.router, body(words(3, 16_000))).decision == CACHE_MISS, "a stranger"

    shards(memory_of(n_shards=2), test, 2, ColdKeyer(), **EXACT)


def test_only_what_events_say_counts_as_overlap() -> None:
    def test(shard: Shard, index: Index) -> None:
        common = words(1, 16_000)
        first = route_of(shard.router, body(common, "A" * 300))
        assert (first.overlap_blocks, first.predicted_tokens) == (0, 0), "nobody owns it and nobody was sent it"
        sibling = route_of(shard.router, body(common, "B" * 300))
        assert (sibling.overlap_blocks, sibling.prompt_blocks) == (0, 62)
        assert sibling.predicted_tokens == -1, "no sample for the parity loop: whether the cache has it in time is not known"
        header = shard.router.describe(sibling)
        assert b"overlap_blocks=0; prompt_blocks=62; state=BLIND" in header

    shards(memory_of(), test, keyer=ColdKeyer(), **EXACT)


def test_the_first_token_ends_a_prediction() -> None:
    """From then on the events tell; for a moment the worker is still the better choice, but its report counts again."""

    def test(shard: Shard, index: Index) -> None:
        common = words(1, 16_000)
        first = route_of(shard.router, body(common, "A" * 300))
        sent(shard, first)
        shard.router.settle(first)
        index.drain()
        sibling = route_of(shard.router, body(common, "B" * 300))
        assert sibling.upstream is first.upstream
        assert sibling.predicted_tokens == 0
        shard.router.settle(sibling)
        index.drain()
        index.writer.wait(2 * GRACE_MS)
        index.writer.wait(2 * GRACE_MS)
        index.drain()
        late = shard.router.compare(shard.router.pools["demo"], ColdKeyer().facts, body(common, "C" * 300))[0]
        assert late.hits == (), "no event came: it was not kept"

    shards(memory_of(), test, keyer=ColdKeyer(), **EXACT)


def test_events_and_predictions_add_up_per_worker() -> None:
    """Worker 0 owns a tenth of the prompt, worker 1 was sent most of it, worker 2 owns more than it was sent."""
    memory = memory_of()
    keys = bytes(range(200))
    writer = TreeWriter(memory.segment)
    writer.store(0, 0, keys[: 8 * 6])
    writer.store(2, 0, keys[: 8 * 25])

    def test(shard: Shard, index: Index) -> None:
        router = shard.router
        router.refresh()
        pool = router.pools["demo"]
        data = body(words(1, 16_000))
        text, n_bytes = text_keys(data)
        half = 40
        assert router._predictor is not None
        router._predictor.sent(pool.workers[1], 1, text, is_kept=False)
        router._predictor.sent(pool.workers[2], 2, text[: 8 * half], is_kept=False)
        index.drain()
        prompt, found = router.compare(pool, ColdKeyer(Facts(4000, {Variant(64): keys})).facts, data)
        share = text_cut(len(text) // 8) / n_bytes
        assert found.shares == {1: (1, share), 2: (2, text_cut(half) / n_bytes)}
        hits = {hit.position: hit for hit in prompt.hits}
        assert hits[0] == Hit(0, 0, 6, 384)
        tokens = int(share * 4000)
        assert hits[1] == Hit(1, 1, 62 * tokens // 4000, tokens, tokens)
        assert hits[2] == Hit(2, 2, 25, 1600), "a guess below what is known says nothing"

    shards(memory, test, keyer=ColdKeyer(Facts(4000, {Variant(64): keys})), **EXACT)


def test_a_conversation_that_is_in_a_cache_costs_nothing() -> None:
    """With less than an eighth left to compute nothing is looked up and nothing noted."""
    memory = memory_of()
    keys = b"".join(n.to_bytes(8, "little") for n in range(1, 63))
    TreeWriter(memory.segment).store(2, 0, keys[: 8 * 55])

    def test(shard: Shard, index: Index) -> None:
        data = body(words(1, 16_000))
        route = route_of(shard.router, data)
        assert (route.overlap_blocks, route.prediction) == (55, None)
        assert index.drain() == 0
        TreeWriter(memory.segment).remove(2, 7, keys[8 * 54 :])
        route = route_of(shard.router, data)
        assert route.overlap_blocks == 54
        assert route.prediction is not None
        assert index.drain() == 1

    shards(memory, test, keyer=ColdKeyer(Facts(4000, {Variant(64): keys})), **EXACT)


def test_prompts_that_cannot_be_keyed_stay_so() -> None:
    def test(shard: Shard, index: Index) -> None:
        for _ in range(2):
            route = route_of(shard.router, body(words(1, 16_000)))
            assert (route.decision, route.prediction) == (UNKEYED, None)
        assert index.drain() == 0

    shards(memory_of(), test, keyer=ColdKeyer(Facts(0, {}, "media")), **EXACT)


def test_failover_takes_the_prediction_along() -> None:
    def test(shard: Shard, index: Index) -> None:
        common = words(1, 16_000)
        first = route_of(shard.router, body(common, "A" * 300))
        shard.router.settle(first)  # it left the worker that took no connection
        second = shard.router.next_choice(first, (first.upstream.worker_idx,))
        assert second is not None
        assert second.prediction is not None
        index.drain()
        assert second.prediction.rank == second.rank != first.rank
        index.writer.wait(2 * GRACE_MS)
        index.drain()
        sibling = route_of(shard.router, body(common, "B" * 300))
        assert sibling.upstream is second.upstream

    shards(memory_of(), test, keyer=ColdKeyer(), **EXACT)


def test_an_exchange_settles_at_its_first_byte_or_at_its_end() -> None:
    memory = memory_of(n_workers=1)
    request = body(words(1, 16_000))
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(request)

    def settled(shard: Shard, index: Index) -> bool:
        index.drain()
        shard.router.compare(shard.router.pools["demo"], ColdKeyer().facts, request)
        assert shard.router._predictor is not None
        return not shard.router._predictor.is_in_flight(shard.router.pools["demo"].workers[0])

    def test(shard: Shard, index: Index) -> None:
        client, _ = stub_client(shard)
        connection, _ = stub_upstream(shard)
        client.data_received(head + request)
        assert not settled(shard, index)
        connection.data_received(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n")
        assert not settled(shard, index), "a head is no token"
        connection.data_received(b"h")
        assert settled(shard, index)
        connection.data_received(b"ello")
        assert index.drain() == 0, "settled once"
        client.data_received(head + request)
        assert not settled(shard, index)
        client.connection_lost(None)
        assert settled(shard, index), "the client left before a byte came"

    shards(memory, test, keyer=ColdKeyer(), **EXACT)


def test_explain_shows_predictions_apart_and_makes_none() -> None:
    memory = memory_of()

    async def inside() -> None:
        shard, index = shard_in_loop(memory, ColdKeyer(), **EXACT), Index(memory)
        connection, transport = stub_client(shard)
        common = words(1, 16_000)
        first = route_of(shard.router, body(common, "A" * 300))
        index.drain()
        status, found = explained(connection, transport, body(common, "B" * 300))
        assert (status, found["is_approximate"], found["choice"]["decision"]) == (200, False, "cache_hit")
        rows = {row["worker"]: row for row in found["candidates"]}
        row = rows[first.upstream.url]
        assert (row["overlap_blocks"], row["overlap_blocks_by_tier"]) == (0, {"device": 0, "host": 0, "disk": 0, "predicted": 60})
        assert row["score"] < 400, "the score counts it"
        assert sum(row["overlap_blocks_by_tier"]["predicted"] for row in rows.values()) == 60
        assert index.drain() == 0

    run(inside())


# ---- workers without events ----

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


# ---- the arithmetic ----


def test_with_guesses() -> None:
    keyed = Prompt(1000, 15, (Hit(0, 5, 4, 256), Hit(1, 6, 10, 640)), True)
    assert with_guesses(keyed, Found(b"", 0, {})) is keyed
    found = with_guesses(keyed, Found(b"k", 9000, {0: (4, 0.5), 1: (6, 0.5), 2: (7, 1.0)}))
    assert found.hits == (Hit(0, 5, 7, 500, 244), Hit(1, 6, 10, 640), Hit(2, 7, 14, 999, 999))
    unkeyed = with_guesses(Prompt(), Found(b"k", 1024, {2: (7, 0.5)}))
    assert unkeyed == Prompt(256, 4, (Hit(2, 7, 2, 128, 128),), True, True)
    tiny = with_guesses(Prompt(), Found(b"k", 2, {0: (0, 1.0)}))
    assert tiny.hits == (), "one token is always computed"
    assert KEYS_MAX == 192


@pytest.mark.parametrize("data", [b"", b"{}", b'{"messages":[]}', b"no JSON", body("short")])
def test_bodies_without_keys_go_by_load(data: bytes) -> None:
    def test(shard: Shard, index: Index) -> None:
        route = route_of(shard.router, data)
        assert (route.decision, route.prediction) == (UNKEYED, None)
        assert index.drain() == 0

    shards(memory_of(block_size=0), test, **APPROXIMATE)
