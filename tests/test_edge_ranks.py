"""sglfast.edge.ranks: the worker by the policy, then its rank; on real shared memory, without a network."""

from typing import Any

import pytest
from edge_harness import Memory
from test_edge_route import CHAT, ENGINES, KEYS, FixedKeyer, keyed, route_of, routed, stored

from sglfast import _counters as c
from sglfast import _workers
from sglfast._counters import Column
from sglfast.edge.overlap import look_up
from sglfast.edge.policy import CACHE_HIT, CACHE_MISS, FAILOVER, LEAST_LOAD, UNKEYED
from sglfast.edge.pools import Route
from sglfast.edge.request import Facts
from sglfast.edge.route import Router
from sglfast.edge.shard import Shard
from sglfast.prompt.tokenizer import DEMO_TOKENIZER_PATH
from sglfast.shm import Variant

RANKS = 4
FACTS = Facts(1300, {Variant(64): KEYS})


def memory_of(workers: int = 2, **fields: Any) -> Memory:
    """Workers with ranks 0..3, 4..7, ... that publish events and can be told a rank."""
    return Memory(ENGINES[:workers], **{"block_size": 64, "dp_size": RANKS, "rank_ways": "hhr"} | fields)


def places(router: Router, count: int = 60) -> set[tuple[int, int]]:
    """(worker, rank of it) of that many choices."""
    routes = [route_of(router) for _ in range(count)]
    assert all(route.rank == route.upstream.worker_idx * RANKS + route.dp_rank for route in routes)
    return {(route.upstream.worker_idx, route.dp_rank) for route in routes}


def next_of(router: Router, failed: Route, *tried: int) -> Route:
    following = router.next_choice(failed, tried)
    assert following is not None
    return following


# ---- a prompt that is known ----


def test_the_rank_that_holds_most() -> None:
    memory = memory_of()
    stored(memory, r1=12, r5=15, r6=18)

    def test(router: Router, shard: Shard) -> None:
        assert places(router) == {(1, 2)}
        route = route_of(router)
        assert (route.decision, route.overlap_blocks, route.uncached_tokens) == (CACHE_HIT, 18, 1300 - 18 * 64)
        assert route.predicted_tokens == 18 * 64
        assert b"rank=2; overlap_blocks=18; prompt_blocks=20" in router.describe(route)

    keyed(memory, FACTS, test)


def test_of_equal_ranks_the_one_with_fewer_requests() -> None:
    memory = memory_of(1)
    stored(memory, r0=18, r2=18, r3=18)

    def test(router: Router, shard: Shard) -> None:
        assert places(router) == {(0, 0), (0, 2), (0, 3)}
        shard.column.begin_rank(0, 0)
        Column(memory.segment, 0).begin_rank(2, 0)
        assert places(router) == {(0, 3)}

    keyed(memory, FACTS, test)


def test_an_overloaded_rank_is_left_to_its_requests() -> None:
    memory = memory_of(1)
    stored(memory, r1=18, r2=12)

    def test(router: Router, shard: Shard) -> None:
        for _ in range(5):
            shard.column.begin_rank(1, 0)
        assert places(router) == {(0, 2)}, "not the next best by chance, but whoever has the least to compute"
        route = route_of(router)
        assert (route.overlap_blocks, route.predicted_tokens, route.uncached_tokens) == (12, 12 * 64, 1300 - 12 * 64)
        for rank in (0, 2, 3):
            shard.column.begin_rank(rank, 0)
        assert places(router) == {(0, 1)}

    keyed(memory, FACTS, test, balance_abs_threshold=4)


def test_a_short_overlap_gives_way_to_an_idle_rank() -> None:
    memory = memory_of(1)
    stored(memory, r1=5)

    def test(router: Router, shard: Shard) -> None:
        assert places(router) == {(0, 1)}
        shard.column.begin_rank(1, 321)
        assert places(router) == {(0, 0), (0, 2), (0, 3)}
        route = route_of(router)
        assert (route.decision, route.overlap_blocks, route.predicted_tokens, route.uncached_tokens) == (CACHE_MISS, 0, 0, 1300)

    keyed(memory, FACTS, test)


def test_nobody_holds_anything() -> None:
    memory = memory_of(1)
    stored(memory, r60=3)

    def test(router: Router, shard: Shard) -> None:
        assert places(router) == {(0, rank) for rank in range(RANKS)}
        for rank in (0, 1, 2):
            shard.column.begin_rank(rank, 100)
        assert places(router) == {(0, 3)}
        shard.column.begin_rank(3, 101)
        assert places(router) == {(0, 0), (0, 1), (0, 2)}

    keyed(memory, FACTS, test)


def test_a_prompt_without_keys() -> None:
    def test(router: Router, shard: Shard) -> None:
        for rank in (0, 1, 3):
            shard.column.begin_rank(rank, 0)
        assert places(router) == {(0, 2)}
        assert route_of(router).decision == UNKEYED

    keyed(memory_of(1), Facts(0, {}, "no prompt"), test)


# ---- only where it is wanted, and only what it needs ----


def test_hits_of_single_ranks_are_kept_for_steered_workers_only() -> None:
    memory = memory_of(3)
    memory.put(1, is_new=False, dp_size=1, rank_base=4)
    memory.put_record(2, rank_ways="")
    stored(memory, r0=2, r3=12, r4=12, r9=5, r10=6)

    def test(router: Router, shard: Shard) -> None:
        router.refresh()
        pool = router.pools["demo"]
        assert pool.ranks is not None
        assert (pool.ranks.positions, pool.ranks.owned) == ({0}, {0, 1, 2, 3})
        prompt = look_up(shard.tree, pool, FACTS)
        assert {(hit.position, hit.rank, hit.overlap_blocks) for hit in prompt.hits} == {(0, 3, 12), (1, 4, 12), (2, 10, 6)}
        assert {rank: hit.overlap_blocks for rank, hit in (prompt.by_rank or {}).items()} == {0: 2, 3: 12}
        assert [upstream.rank_ways for upstream in pool.upstreams] == [b"hhr", None, None]

    keyed(memory, FACTS, test)


@pytest.mark.parametrize(
    ("fields", "settings", "is_steered"),
    [
        ({}, {}, True),
        ({}, {"disable_dp_steering": True}, False),
        ({}, {"policy": "auto"}, True),
        ({"dp_size": 1}, {"dp_aware": True}, False),
        ({"rank_ways": ""}, {"dp_aware": True}, False),
        ({"block_size": 0}, {}, False),
        ({"block_size": 0}, {"dp_aware": True}, True),
        ({}, {"policy": "least_load"}, False),
        *(
            ({"block_size": 0}, {"dp_aware": True, "policy": policy}, True)
            for policy in ("round_robin", "random", "power_of_two", "least_load")
        ),
        ({}, {"tokenizer_path": None}, True),  # prompts of token ids need none
        ({}, {"tokenizer_path": None, "policy": "auto"}, False),
        ({"roles": ("regular", "prefill", "decode")}, {}, True),
        ({"roles": ("decode", "prefill", "decode")}, {"dp_aware": True}, False),
    ],
)
def test_who_is_steered(fields: dict[str, Any], settings: dict[str, Any], is_steered: bool) -> None:
    memory = memory_of(3, **fields)

    def test(router: Router, shard: Shard) -> None:
        router.refresh()
        pool = router.pools["demo"]
        assert (pool.ranks is not None) is is_steered
        regular = [upstream.rank_ways for place, upstream in enumerate(pool.upstreams) if not pool.is_prefill(place)]
        assert regular == [b"hhr" if is_steered else None] * len(regular)
        others = pool.decodes.upstreams if pool.decodes is not None else []
        assert not any(upstream.rank_ways for upstream in others)

    keyed(memory, FACTS, test, **settings)


def test_a_change_of_settings_or_table_is_followed() -> None:
    memory = memory_of(1)
    stored(memory, r2=18)

    def test(router: Router, shard: Shard) -> None:
        assert places(router) == {(0, 2)}
        memory.put_record(0, rank_ways="")
        upstream = route_of(router).upstream
        assert upstream.rank_ways is None
        memory.put_record(0, rank_ways="hh")
        assert route_of(router).upstream.rank_ways == b"hh"

    keyed(memory, FACTS, test)


def test_a_role_that_changes_in_place_is_followed() -> None:
    memory = memory_of(2, roles=("regular", "prefill"))

    def test(router: Router, shard: Shard) -> None:
        assert places(router) >= {(0, 0)}
        memory.put_record(0, role="decode")
        pair = route_of(router)
        assert pair.prefill is not None
        assert (pair.upstream.worker_idx, pair.upstream.rank_ways) == (0, None)

    keyed(memory, FACTS, test, dp_aware=True)


# ---- policies that know of no cache ----


@pytest.mark.parametrize("policy", ["round_robin", "random", "power_of_two", "least_load"])
def test_dp_aware_takes_the_idlest_rank(policy: str) -> None:
    memory = memory_of(2, block_size=0)

    def test(router: Router, shard: Shard) -> None:
        assert places(router, 400) == {(worker, rank) for worker in range(2) for rank in range(RANKS)}
        for rank in (0, 1, 3, 4, 5, 6):
            shard.column.begin_rank(rank, 0)
        assert places(router) == {(0, 2), (1, 3)}

    routed(memory, test, dp_aware=True, policy=policy)


def test_approximate_knowledge_is_of_ranks_too() -> None:
    """Without events a conversation goes back to the rank that it was sent to."""
    memory = memory_of(2, block_size=0, prediction_blocks=4096)
    body = b'{"model":"demo","prompt":"' + b"word " * 400 + b'"}'

    def test(router: Router, shard: Shard) -> None:
        first = route_of(router, body)
        router.note(first)
        for _ in range(20):
            again = route_of(router, body[:-2] + b' and more"}')
            assert (again.upstream.worker_idx, again.rank) == (first.upstream.worker_idx, first.rank)

    routed(memory, test, dp_aware=True, policy="cache_aware")


# ---- what was sent and no event has confirmed ----


def test_siblings_go_to_the_rank_of_the_first() -> None:
    memory = memory_of(2, prediction_blocks=4096)
    body = b'{"model":"demo","prompt":"' + b"word " * 2000 + b'"}'

    def test(router: Router, shard: Shard) -> None:
        first = route_of(router, body)
        router.note(first)
        shard.column.begin_rank(first.rank, 100)
        for _ in range(20):
            again = route_of(router, body)
            assert again.rank == first.rank
            assert (again.overlap_blocks, again.predicted_tokens) == (0, -1), "nobody knows whether it will be there in time"

    keyed(memory, Facts(2000, {Variant(64): KEYS}), test)


# ---- further attempts ----


def test_a_further_attempt_chooses_worker_and_rank_anew() -> None:
    memory = memory_of(3)
    stored(memory, r2=20, r5=12, r7=18)

    def test(router: Router, shard: Shard) -> None:
        first = route_of(router)
        assert (first.upstream.worker_idx, first.dp_rank) == (0, 2)
        second = next_of(router, first, 0)
        assert (second.upstream.worker_idx, second.dp_rank, second.decision) == (1, 3, FAILOVER)
        assert (second.overlap_blocks, second.uncached_tokens, second.predicted_tokens) == (18, 1300 - 18 * 64, -1)
        memory.table.set_state(0, _workers.UNHEALTHY)  # positions move, ranks stay
        again = next_of(router, second, 0)
        assert (again.upstream.worker_idx, again.rank) == (1, 7)
        third = {next_of(router, second, 0, 1).rank for _ in range(60)}
        assert third == {8, 9, 10, 11}

    keyed(memory, FACTS, test)


def test_regular_workers_beside_pairs_are_steered_and_pairs_are_not() -> None:
    memory = memory_of(3, roles=("regular", "prefill", "decode"))
    stored(memory, r3=18)

    def test(router: Router, shard: Shard) -> None:
        route = route_of(router)
        assert (route.upstream.worker_idx, route.dp_rank, route.prefill) == (0, 3, None)
        memory.table.set_state(0, _workers.UNHEALTHY)
        pair = route_of(router)
        assert pair.prefill is not None
        assert (pair.upstream.rank_ways, pair.prefill.upstream.rank_ways) == (None, None)

    keyed(memory, FACTS, test)


def test_explain_shows_every_rank() -> None:
    from sglfast.edge.explain import explain

    memory = memory_of(2)
    stored(memory, r1=12, r2=5, r6=3)

    def test(router: Router, shard: Shard) -> None:
        shard.column.begin_rank(2, 70)
        found: list[Any] = []
        explain(shard, CHAT, b"{}", found.append)
        (answer,) = found
        assert answer["choice"] == {"worker": ENGINES[0], "rank": 1, "decision": "cache_hit"}
        first, second = answer["candidates"]
        assert (first["rank"], first["overlap_blocks"], second["rank"], second["overlap_blocks"]) == (1, 12, 2, 3)
        assert [rank["overlap_blocks"] for rank in first["ranks"]] == [0, 12, 5, 0]
        assert [rank["load"] for rank in first["ranks"]] == [{"requests": int(n == 2), "tokens": 70 * (n == 2)} for n in range(RANKS)]
        assert first["ranks"][1]["why"].startswith("holds the longest part")
        assert second["ranks"][2]["why"] == "has the least work before the first token"
        assert {rank["why"] for rank in first["ranks"][2:]} == {"was not better than the choice"}

    class Whole(FixedKeyer):
        def key(self, *arguments: Any, is_whole: bool = False) -> None:
            super().key(*arguments)

    routed(memory, test, Whole(FACTS), policy="cache_aware", tokenizer_path=DEMO_TOKENIZER_PATH)


def test_without_events_nothing_changes_for_workers_of_one_rank() -> None:
    def test(router: Router, shard: Shard) -> None:
        assert route_of(router).decision == LEAST_LOAD
        assert (router.plain_routes is None, router.plain_rank) == (False, None), "the compiled way, and no look at ranks"
        assert shard.column.get(c.S_PROMPTS_UNKEYED) == 0

    routed(Memory(ENGINES[:2], rank_ways="hhr"), test, dp_aware=True, policy="least_load")
