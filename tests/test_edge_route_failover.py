"""sglfast.edge.route: the next choice, after a worker has failed a request."""

from collections import Counter

from edge_harness import Memory
from test_edge_route import ENGINES, route_of, routed

from sglfast import _workers
from sglfast._counters import Column
from sglfast.edge.policy import FAILOVER
from sglfast.edge.route import Router
from sglfast.edge.shard import Shard


def test_next_choice_is_the_least_loaded_that_was_not_tried() -> None:
    memory = Memory(ENGINES[:4])
    column = Column(memory.segment, 0)

    def test(router: Router, shard: Shard) -> None:
        failed = route_of(router)
        for worker_idx, requests in enumerate((0, 3, 2, 2)):
            for _ in range(requests):
                column.begin(worker_idx, 0, 0, 0)
        picks: Counter[int] = Counter()
        for _ in range(60):
            following = router.next_choice(failed, (0,))
            assert following is not None
            assert following.decision == FAILOVER
            picks[following.upstream.worker_idx] += 1
        assert set(picks) == {2, 3}, "the least loaded, and ties at random"
        last = router.next_choice(failed, (0, 2, 3))
        assert last is not None
        assert last.upstream.worker_idx == 1
        again = {following.upstream.worker_idx for _ in range(60) if (following := router.next_choice(failed, (2, 3, 1, 0)))}
        assert again == {2, 3}, "all were tried: the least loaded of those that have not just failed"

    routed(memory, test)


def test_next_choice_follows_the_table() -> None:
    memory = Memory(ENGINES[:3], models=["a", "a", "b"])

    def test(router: Router, shard: Shard) -> None:
        failed = route_of(router, b'{"model":"a"}')
        first = failed.upstream.worker_idx
        following = router.next_choice(failed, (first,))
        assert following is not None
        assert following.upstream.worker_idx == 1 - first, "never another model's worker"
        memory.table.set_state(1 - first, _workers.UNHEALTHY)
        alone = router.next_choice(failed, (first,))
        assert alone is not None
        assert alone.upstream.worker_idx == first, "nobody else is left"
        memory.table.set_state(first, _workers.UNHEALTHY)
        assert router.next_choice(failed, (first,)) is None, "the pool is gone"

    routed(memory, test)
