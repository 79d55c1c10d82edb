"""sglfast.edge.predict in the router: siblings find each other, only events count as overlap, text is enough where there are none.

The index's half is played by the test, with the real writer.
"""

from edge_harness import run, shard_in_loop, stub_client, stub_upstream
from predict_bench import COLD, EXACT, ColdKeyer, Index, body, memory_of, route_of, sent, shards, words
from test_edge_explain import explained

from sglfast import _counters as c
from sglfast._hashtree import TreeWriter
from sglfast._predicted import GRACE_MS, KEYS_MAX, text_cut, text_keys
from sglfast.edge.policy import CACHE_HIT, CACHE_MISS, UNKEYED, Hit, Prompt
from sglfast.edge.predict import Found, predicted, with_guesses
from sglfast.edge.request import Facts
from sglfast.edge.shard import Shard
from sglfast.shm import Variant

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
        router._predictor.note(predicted(pool.workers[1], 1, text, is_kept=False))
        router._predictor.note(predicted(pool.workers[2], 2, text[: 8 * half], is_kept=False))
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
        assert index.drain() == 2, "a choice alone notes nothing"
        shard.router.note(second)
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


def test_an_attempt_that_is_never_made_notes_nothing() -> None:
    """The first worker fails; the client leaves in the pause before the second is asked."""
    memory = memory_of(n_workers=2)
    request = body(words(1, 16_000))
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(request)

    async def inside() -> None:
        settings = {"disable_retries": False, "retry_initial_backoff_ms": 60_000, "retry_max_backoff_ms": 60_000}
        shard, index = shard_in_loop(memory, ColdKeyer(), **EXACT | settings), Index(memory)
        client, _ = stub_client(shard)
        wires = [stub_upstream(shard, worker_idx) for worker_idx in range(2)]
        client.data_received(head + request)
        failed = client.exchange.route
        assert index.drain() == 1
        wires[failed.upstream.worker_idx][0].data_received(b"HTTP/1.1 500 No\r\ncontent-length: 2\r\n\r\nno")
        assert not client.exchange.is_over, "another attempt is to come"
        assert client.exchange.attempts().has_other(failed, failed.upstream)
        assert index.drain() == 1, "settled"
        client.connection_lost(None)
        assert index.drain() == 0

    run(inside())


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
