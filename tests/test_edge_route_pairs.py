"""sglfast.edge.route with prefill and decode workers: pools by role, pairs, refusals."""

from array import array
from typing import Any, cast

import orjson
import pytest
from edge_harness import Memory, run, shard_in_loop, stub_client
from raw_client import request
from test_edge_route import ENGINES, FixedKeyer, choose, keyed, route_of, routed

from sglfast import _workers, errors
from sglfast._hashtree import TreeWriter
from sglfast.edge.pairs import NO_DECISION, Decodes
from sglfast.edge.policy import CACHE_HIT, ROUND_ROBIN
from sglfast.edge.pools import Pool, Route
from sglfast.edge.request import Facts
from sglfast.edge.route import Router
from sglfast.edge.shard import Shard
from sglfast.prompt.tokenizer import DEMO_TOKENIZER_PATH
from sglfast.shm import Role, Variant

KEYS = array("Q", range(1000, 1020)).tobytes()
NAMES = {"r": "regular", "p": "prefill", "d": "decode"}


def with_roles(roles: str, **settings: Any) -> Memory:
    """A worker for each letter: (r)egular, (p)refill, (d)ecode."""
    return Memory(ENGINES[: len(roles)], roles=[cast(Role, NAMES[role]) for role in roles], **settings)


def rows_of(router: Router, times: int = 40, body: bytes = b"{}") -> set[tuple[int, ...]]:
    return {route_of(router, body).rows for _ in range(times)}


def pool_of(router: Router, model: str | None = "demo") -> tuple[Pool, Decodes]:
    pool = router.pools[model]
    assert pool.decodes is not None
    return pool, pool.decodes


# ---- pools ----


def test_a_pair_is_chosen_for_every_request() -> None:
    def test(router: Router, shard: Shard) -> None:
        route = route_of(router)
        assert route.prefill is not None
        assert (route.prefill.upstream.worker_idx, route.upstream.worker_idx) == (0, 1)
        assert (route.decision, route.prefill.decision) == (NO_DECISION, ROUND_ROBIN)
        assert route.uncached_tokens == 0
        assert router.plain_routes is None, "a request has to be looked at"

    routed(with_roles("pd"), test)


def test_decode_workers_take_no_request_first_and_prefill_workers_none_alone() -> None:
    def test(router: Router, shard: Shard) -> None:
        assert rows_of(router) == {(0, 2), (0, 3), (1, 2), (1, 3)}

    routed(with_roles("ppdd"), test, decode_policy="random")


def test_regular_workers_beside_pairs() -> None:
    def test(router: Router, shard: Shard) -> None:
        assert rows_of(router) == {(0,), (1, 2)}
        assert route_of(router).pool is router.only

    routed(with_roles("rpd"), test)


def test_half_of_a_pair_is_no_candidate_beside_regular_workers() -> None:
    """And the short way of a pool without pairs stays."""
    for roles in ("rp", "rd", "r"):

        def test(router: Router, shard: Shard) -> None:
            assert rows_of(router) == {(0,)}
            assert router.plain_routes is not None
            assert router.pools["demo"].decodes is None

        routed(with_roles(roles), test)


def test_models_keep_to_themselves() -> None:
    def test(router: Router, shard: Shard) -> None:
        assert rows_of(router, body=b'{"model":"a"}') == {(0, 1)}
        assert rows_of(router, body=b'{"model":"b"}') == {(2, 3)}
        assert rows_of(router, body=b'{"model":"c"}') == {(4,)}

    routed(with_roles("pdpdr", models=["a", "a", "b", "b", "c"]), test)


def test_what_both_are_told_of_the_prefill_worker() -> None:
    memory = with_roles("pd")
    memory.put(0, url="http://[FD00::1]:30000", is_new=True)
    memory.put_record(0, bootstrap_port=None)

    def test(router: Router, shard: Shard) -> None:
        first = route_of(router).prefill
        assert first is not None
        assert first.upstream.bootstrap == (b'"fd00::1"', b"null")
        memory.put_record(0, bootstrap_port=8998)
        first = route_of(router).prefill
        assert first is not None
        assert first.upstream.bootstrap == (b'"fd00::1"', b"8998")

    routed(memory, test)


def test_the_policies_of_both_sides() -> None:
    def test(router: Router, shard: Shard) -> None:
        pool, decodes = pool_of_ready(router)
        assert (pool.policy.name, decodes.policy.name, decodes.is_affine) == ("random", "round_robin", False)
        before = decodes.policy
        shard.table.set_state(0, _workers.READY)  # another version of the table
        router.refresh()
        assert pool_of(router)[1].policy is before, "its turn goes on"

    routed(with_roles("ppdd"), test, policy="least_load", prefill_policy="random", decode_policy="round_robin")

    def regular(router: Router, shard: Shard) -> None:
        router.refresh()
        assert router.pools["demo"].policy.name == "least_load", "without prefill workers that is no matter"

    routed(with_roles("rr"), regular, policy="least_load", prefill_policy="random")


def pool_of_ready(router: Router) -> tuple[Pool, Decodes]:
    router.refresh()
    return pool_of(router)


# ---- refusals ----


@pytest.mark.parametrize(
    ("roles", "down", "reason", "ready"),
    [
        ("p", "", errors.NO_DECODE_WORKERS_AVAILABLE, 0),
        ("d", "", errors.NO_PREFILL_WORKERS_AVAILABLE, 0),
        ("pd", "0", errors.NO_PREFILL_WORKERS_AVAILABLE, 0),
        ("pd", "1", errors.NO_DECODE_WORKERS_AVAILABLE, 0),
        ("pd", "01", errors.NO_PREFILL_WORKERS_AVAILABLE, 0),
        ("rpd", "02", errors.NO_HEALTHY_WORKERS, 0),
        ("ppd", "0", None, 2),
        ("rpd", "2", None, 1),
        ("rpd", "", None, 3),
    ],
)
def test_an_empty_side(roles: str, down: str, reason: errors.Reason | None, ready: int) -> None:
    memory = with_roles(roles)

    def test(router: Router, shard: Shard) -> None:
        for row in down:
            memory.table.set_state(int(row), _workers.UNHEALTHY)
        found = choose(router)
        assert found is reason or (reason is None and isinstance(found, Route))
        assert router.ready_workers == ready

    routed(memory, test)


@pytest.mark.parametrize(("roles", "shut"), [("pd", "0"), ("pd", "1"), ("pd", "01"), ("ppd", "2"), ("rpd", "02")])
def test_open_breakers(roles: str, shut: str) -> None:
    """They are the reason when without them there would be a pair; and they take no readiness away."""

    def test(router: Router, shard: Shard) -> None:
        for row in shut:
            shard.breakers.table.failed(int(row), 1, False, shard.loop.time())
        assert choose(router) is errors.BREAKER_OPEN
        assert router.ready_workers == len(roles)

    routed(with_roles(roles), test, disable_circuit_breaker=False, cb_failure_threshold=1)


def test_an_open_breaker_beside_a_side_that_is_empty() -> None:
    memory = with_roles("pd")

    def test(router: Router, shard: Shard) -> None:
        shard.breakers.table.failed(0, 1, False, shard.loop.time())
        memory.table.set_state(1, _workers.UNHEALTHY)
        assert choose(router) is errors.NO_DECODE_WORKERS_AVAILABLE

    routed(memory, test, disable_circuit_breaker=False, cb_failure_threshold=1)


def test_refusals_by_model() -> None:
    def test(router: Router, shard: Shard) -> None:
        assert choose(router, b'{"model":"a"}') is errors.NO_DECODE_WORKERS_AVAILABLE
        assert choose(router, b'{"model":"b"}') is errors.NO_PREFILL_WORKERS_AVAILABLE
        assert route_of(router, b'{"model":"c"}').rows == (2,)
        assert choose(router, b'{"model":"d"}') is errors.MODEL_NOT_FOUND

    routed(with_roles("pdr", models=["a", "b", "c"]), test)


def test_readyz() -> None:
    memory = with_roles("pd")

    async def inside() -> None:
        shard = shard_in_loop(memory)
        client, transport = stub_client(shard)

        def asked() -> tuple[int, Any]:
            client.data_received(request("GET", "/readyz"))
            head, _, body = transport.take().partition(b"\r\n\r\n")
            return int(head[9:12]), orjson.loads(body)

        assert asked() == (200, {"status": "ready", "healthy_workers": 2, "total_workers": 2})
        memory.table.set_state(1, _workers.UNHEALTHY)
        assert asked()[0] == 503
        memory.table.set_state(1, _workers.READY)
        memory.table.set_state(0, _workers.UNHEALTHY)
        assert asked()[0] == 503

    run(inside())


# ---- the choice by what caches hold ----

FACTS = Facts(1300, {Variant(64): KEYS})


def test_regular_and_prefill_workers_are_compared_as_equals() -> None:
    for owner, rows in ((0, (0,)), (1, (1, 2))):
        memory = with_roles("rpd", block_size=64)
        TreeWriter(memory.segment).store(owner, 0, KEYS)
        TreeWriter(memory.segment).store(2, 0, KEYS)  # what a decode worker holds is no matter

        def test(router: Router, shard: Shard, owner: int = owner, rows: tuple[int, ...] = rows) -> None:
            route = route_of(router)
            assert route.rows == rows
            first = route.prefill or route
            assert first.decision == CACHE_HIT
            assert (first.overlap_blocks, first.prompt_blocks, first.uncached_tokens) == (20, 20, 20)
            assert (first.rank, first.predicted_tokens) == (owner, 1280)
            if route.prefill is not None:
                assert (route.uncached_tokens, route.predicted_tokens, route.prompt_blocks) == (0, -1, 0)
                assert router.describe(first).startswith(f"worker={ENGINES[1]}; rank=0; overlap_blocks=20; prompt_blocks=20".encode())

        keyed(memory, FACTS, test)


def test_the_rank_of_the_prefix() -> None:
    memory = with_roles("pd", block_size=64)
    memory.put(0, dp_size=4, rank_base=10)
    TreeWriter(memory.segment).store(13, 0, KEYS)

    def test(router: Router, shard: Shard) -> None:
        first = route_of(router).prefill
        assert first is not None
        assert (first.rank, first.dp_rank, first.upstream.dp_size) == (13, 3, 4)

    keyed(memory, FACTS, test)


@pytest.mark.parametrize("policy", ["round_robin", "cache_aware"])
def test_a_decode_side_that_goes_by_caches(policy: str) -> None:
    memory = with_roles("ppddd", block_size=64)
    TreeWriter(memory.segment).store(3, 0, KEYS)
    TreeWriter(memory.segment).store(1, 0, KEYS)

    def test(router: Router, shard: Shard) -> None:
        assert {rows[1] for rows in rows_of(router)} == {3}
        assert {rows[0] for rows in rows_of(router)} == ({1} if policy == "cache_aware" else {0, 1})

    routed(memory, test, FixedKeyer(FACTS), policy=policy, decode_policy="cache_aware", tokenizer_path=DEMO_TOKENIZER_PATH)


def test_a_decode_side_without_events_goes_by_what_it_was_sent() -> None:
    body = orjson.dumps({"prompt": "x" * 4000})

    def test(router: Router, shard: Shard) -> None:
        def sent() -> tuple[int, ...]:
            route = route_of(router, body)
            assert route.prefill is not None
            router.note(route)
            router.note(route.prefill)
            return route.rows

        rows = {sent() for _ in range(20)}
        assert len(rows) == 1, "the same pair for the same prompt"
        ((first, second),) = rows
        assert first in (0, 1)
        assert second in (2, 3)

    routed(with_roles("ppdd", prediction_blocks=1 << 12), test, policy="cache_aware", decode_policy="cache_aware")


# ---- what would be chosen ----
