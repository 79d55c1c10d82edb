"""sglfast.edge.route: the next choice, after a worker has failed a request."""

from collections import Counter

from edge_harness import Memory
from test_edge_route import ENGINES, KEYS, keyed, route_of, routed, stored

from sglfast import _counters as c
from sglfast import _workers
from sglfast._counters import Column
from sglfast.edge.policy import CACHE_HIT, FAILOVER
from sglfast.edge.request import Facts
from sglfast.edge.route import Router
from sglfast.edge.shard import Shard
from sglfast.shm import Variant


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


def test_next_choice_has_room_if_anyone_has() -> None:
    memory = Memory(ENGINES[:4])
    column = Column(memory.segment, 0)

    def test(router: Router, shard: Shard) -> None:
        failed = route_of(router)
        for worker_idx, requests in enumerate((0, 2, 2, 1)):
            for _ in range(requests):
                column.begin(worker_idx, 0, 0, 0)

        def picks(*tried: int) -> set[int]:
            return {following.upstream.worker_idx for _ in range(60) if (following := router.next_choice(failed, tried))}

        assert picks(0) == {3}, "the others are full"
        assert picks(0, 3) == {1, 2}, "full, but not tried: worth a wait"
        assert picks(1, 2, 3, 0) == {3}, "all were tried: one with room that has not just failed"
        assert picks(0, 1, 2, 3) == {0}
        column.begin(0, 0, 0, 0)
        column.begin(0, 0, 0, 0)
        assert picks(0, 1, 2, 3) == {3}, "one with room that has just failed rather than one without"

    routed(memory, test, worker_max_in_flight=2)


def test_next_choice_knows_who_holds_the_prompt() -> None:
    memory = Memory(ENGINES[:4], block_size=64)
    stored(memory, r0=20, r1=18, r2=3)

    def test(router: Router, shard: Shard) -> None:
        first = route_of(router)
        assert (first.upstream.worker_idx, first.decision) == (0, CACHE_HIT)
        column = Column(memory.segment, 0)
        column.begin(1, 0, 0, 0)
        second = router.next_choice(first, (0,))
        assert second is not None
        assert (second.upstream.worker_idx, second.decision) == (1, FAILOVER), "not the least loaded"
        assert (second.overlap_blocks, second.prompt_blocks, second.uncached_tokens) == (18, 20, 1300 - 18 * 64)
        assert second.predicted_tokens == -1, "no sample for the parity loop"
        memory.table.set_state(0, _workers.UNHEALTHY)  # positions move, ranks stay
        third = router.next_choice(second, (0,))
        assert third is not None
        assert third.upstream.worker_idx == 1
        fourth = router.next_choice(third, (0, 1, 2))
        assert fourth is not None
        assert (fourth.upstream.worker_idx, fourth.overlap_blocks, fourth.uncached_tokens) == (3, 0, 1300)
        assert memory.worker_word(1, c.W_PROMPT_BLOCKS) == 0, "blocks are counted at the first choice"

    keyed(memory, Facts(1300, {Variant(64): KEYS}), test)


def test_next_choice_minds_the_balance() -> None:
    memory = Memory(ENGINES[:3], block_size=64)
    stored(memory, r0=20, r1=18)

    def test(router: Router, shard: Shard) -> None:
        first = route_of(router)
        column = Column(memory.segment, 0)
        for _ in range(40):
            column.begin(1, 0, 0, 0)
        second = router.next_choice(first, (0,))
        assert second is not None
        assert second.upstream.worker_idx == 2

    keyed(memory, Facts(1300, {Variant(64): KEYS}), test)
