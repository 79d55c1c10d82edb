"""sglfast.edge.route with prefill and decode workers: the pair that is tried when one has failed."""

from typing import Any

from test_edge_route import routed
from test_edge_route_pairs import pool_of_ready, with_roles

from sglfast import _workers
from sglfast._counters import Column
from sglfast.edge.pairs import NO_DECISION
from sglfast.edge.policy import FAILOVER
from sglfast.edge.pools import Route
from sglfast.edge.route import Router
from sglfast.edge.shard import Shard


def following(router: Router, failed: Route, *tried: int) -> set[tuple[int, ...]]:
    """Rows of the next choices, and what must hold of each."""
    rows = set()
    for _ in range(60):
        found = router.next_choice(failed, tried)
        assert found is not None
        first = found.prefill or found
        assert first.decision == FAILOVER
        assert first.predicted_tokens == -1
        rows.add(found.rows)
    return rows


def pair_of(router: Router, first: int, second: int, **fields: Any) -> Route:
    pool, decodes = pool_of_ready(router)
    prefill = Route(pool, pool.upstreams[first], 0, 100, **fields)
    return Route(pool, decodes.upstreams[second], NO_DECISION, prefill=prefill)


def test_a_prefill_worker_that_failed_is_left_out() -> None:
    def test(router: Router, shard: Shard) -> None:
        assert following(router, pair_of(router, 0, 0), 0) == {(1, 2), (1, 3)}

    routed(with_roles("ppdd"), test)


def test_a_prefill_worker_whose_other_half_failed_stays() -> None:
    def test(router: Router, shard: Shard) -> None:
        failed = pair_of(router, 0, 0, overlap_blocks=7, rank=5, predicted_tokens=448)
        assert following(router, failed, 2) == {(0, 3)}
        found = router.next_choice(failed, (2,))
        assert found is not None
        assert found.prefill is not None
        assert (found.prefill.overlap_blocks, found.prefill.rank, found.prefill.uncached_tokens) == (7, 5, 100)

    routed(with_roles("ppdd"), test)


def test_when_all_were_tried() -> None:
    def test(router: Router, shard: Shard) -> None:
        failed = pair_of(router, 0, 0)
        assert following(router, failed, 0, 2) == {(1, 3)}
        assert following(router, failed, 0, 1) == {(0, 2), (0, 3)}, "not the one that has just failed"
        assert {rows[1] for rows in following(router, failed, 2, 3)} == {2}

    routed(with_roles("ppdd"), test)

    def alone(router: Router, shard: Shard) -> None:
        assert following(router, pair_of(router, 0, 0), 0) == {(0, 1)}
        assert following(router, pair_of(router, 0, 0), 1) == {(0, 1)}

    routed(with_roles("pd"), alone)


def test_who_needs_no_decode_worker_goes_first_when_they_have_all_failed() -> None:
    memory = with_roles("prd")
    Column(memory.segment, 0).begin(1, 0, 0, 0)

    def test(router: Router, shard: Shard) -> None:
        failed = pair_of(router, 0, 0)
        assert following(router, failed, 2) == {(1,)}, "although it has more to do"
        assert following(router, failed, 0) == {(1,)}
        assert following(router, failed, 2, 1) == {(0, 2)}

    routed(memory, test)


def test_the_next_pair_follows_the_table() -> None:
    memory = with_roles("ppdd")

    def test(router: Router, shard: Shard) -> None:
        failed = pair_of(router, 0, 0)
        memory.table.set_state(1, _workers.UNHEALTHY)
        assert {rows[0] for rows in following(router, failed, 0)} == {0}
        memory.table.set_state(3, _workers.UNHEALTHY)
        assert following(router, failed, 2) == {(0, 2)}
        memory.table.set_state(2, _workers.UNHEALTHY)
        assert router.next_choice(failed, (2,)) is None

    routed(memory, test)
