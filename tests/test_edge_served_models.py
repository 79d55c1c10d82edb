"""sglfast.edge.served: which workers a request's model leads to, as they come, go and change."""

import orjson
import pytest
from edge_harness import Memory
from test_edge_route import ENGINES, FixedKeyer, choose, chosen, route_of, routed

from sglfast import _workers, errors
from sglfast.edge import answers
from sglfast.edge.policy import CACHE_MISS, LEAST_LOAD
from sglfast.edge.pools import Route
from sglfast.edge.request import Facts
from sglfast.edge.route import Router
from sglfast.edge.shard import Shard
from sglfast.prompt.tokenizer import DEMO_TOKENIZER_PATH
from sglfast.shm import Variant


def test_one_model_takes_any_name() -> None:
    def test(router: Router, shard: Shard) -> None:
        for body in (b'{"model":"demo"}', b'{"model":"other"}', b"", b"no JSON"):
            assert isinstance(choose(router, body), Route)
        assert router.models == ["demo"]

    routed(Memory(ENGINES[:2]), test)


def test_several_models() -> None:
    def test(router: Router, shard: Shard) -> None:
        for _ in range(5):
            assert chosen(router, b'{"model":"a"}') in (0, 2)
            assert chosen(router, b'{"model":"b"}') in (1, 3)
        assert {chosen(router, b'{"model":"a"}') for _ in range(4)} == {0, 2}
        assert {chosen(router, b'{"model":"b:adapter"}') for _ in range(4)} == {1, 3}
        for body in (b'{"model":"c"}', b'{"model":"c:a"}'):
            assert choose(router, body) is errors.MODEL_NOT_FOUND
        for body in (b'{"model":null}', b'{"model":""}', b"{}", b"", b"[", b'{"model":"\xff"}', b'{"x":' * 100_000):
            assert choose(router, body) is errors.MISSING_MODEL
        assert router.models == ["a", "b"]

    routed(Memory(ENGINES[:4], models=["a", "b", "a", "b"]), test)


def test_adapters_that_are_models_of_their_own() -> None:
    memory = Memory(ENGINES[:4], models=["a", "b", "b", None])
    memory.put_record(0, adapter_models=("ad", "b"))
    memory.put_record(2, adapter_models=("x:y",))

    def test(router: Router, shard: Shard) -> None:
        assert chosen(router, b'{"model":"ad"}') == 0
        assert {chosen(router, b'{"model":"x:y"}') for _ in range(4)} == {1, 2}
        assert {chosen(router, b'{"model":"b"}') for _ in range(4)} == {1, 2}, "a model's own name comes first"
        assert chosen(router, b'{"model":"z"}') == 3
        for worker_idx in (0, 3):
            memory.table.set_state(worker_idx, _workers.UNHEALTHY)
        assert choose(router, b'{"model":"ad"}') is errors.NO_HEALTHY_WORKERS
        assert choose(router, b'{"model":"z"}') is errors.MODEL_NOT_FOUND
        rows = orjson.loads(answers.models(shard)[2])["data"]
        assert [(row["id"], row.get("parent")) for row in rows] == [("a", None), ("b", None), ("ad", "a"), ("x:y", "b")]
        found = answers.one_model(shard, b"/v1/models/x%3Ay")
        assert found is not None
        assert orjson.loads(found[2])["parent"] == "b"
        memory.put_record(0, adapter_models=())
        assert choose(router, b'{"model":"ad"}') is errors.MODEL_NOT_FOUND

    routed(memory, test)


def test_workers_without_a_model_take_what_nobody_else_does() -> None:
    def test(router: Router, shard: Shard) -> None:
        assert chosen(router, b'{"model":"a"}') == 0
        assert chosen(router, b'{"model":"z"}') == 1
        assert chosen(router, b"{}") == 1
        assert router.models == ["a"]

    routed(Memory(ENGINES[:2], models=["a", None]), test)


@pytest.mark.parametrize("state", [_workers.UNHEALTHY, _workers.JOINING, _workers.DRAINING, _workers.FREE])
def test_only_ready_workers_are_chosen(state: int) -> None:
    memory = Memory(ENGINES[:3])

    def test(router: Router, shard: Shard) -> None:
        assert {chosen(router) for _ in range(6)} == {0, 1, 2}
        memory.table.set_state(1, state)
        assert {chosen(router) for _ in range(6)} == {0, 2}
        memory.table.set_state(0, state)
        memory.table.set_state(2, state)
        assert choose(router) is errors.NO_HEALTHY_WORKERS
        memory.put(1)
        assert {chosen(router) for _ in range(6)} == {1}

    routed(memory, test)


def test_a_shard_says_by_which_version_it_acts() -> None:
    memory = Memory(ENGINES[:3])

    def test(router: Router, shard: Shard) -> None:
        choose(router)
        assert memory.segment.workers_seen(shard.process_slot) == memory.table.version()
        memory.table.set_state(1, _workers.DRAINING)
        assert memory.segment.workers_seen(shard.process_slot) == memory.table.version() - 1
        choose(router)
        assert memory.segment.workers_seen(shard.process_slot) == memory.table.version()
        memory.table.remove(1)
        shard.tick()  # without a request
        assert memory.segment.workers_seen(shard.process_slot) == memory.table.version()

    routed(memory, test)


def test_a_model_whose_workers_are_down_is_not_served_by_another_models() -> None:
    memory = Memory(ENGINES[:2], models=["a", "b"])

    def test(router: Router, shard: Shard) -> None:
        memory.table.set_state(1, _workers.UNHEALTHY)
        assert chosen(router, b'{"model":"a"}') == 0
        assert choose(router, b'{"model":"b"}') is errors.NO_HEALTHY_WORKERS
        assert choose(router, b'{"model":"c"}') is errors.MODEL_NOT_FOUND
        assert router.models == ["a", "b"]
        memory.table.set_state(0, _workers.UNHEALTHY)
        assert choose(router, b'{"model":"c"}') is errors.NO_HEALTHY_WORKERS
        memory.table.set_state(1, _workers.FREE)
        memory.table.set_state(0, _workers.READY)
        assert chosen(router, b'{"model":"c"}') == 0, "one model is left, its name is not asked for"

    routed(memory, test)


def test_nothing_is_rebuilt_while_the_table_stands_still() -> None:
    memory = Memory(ENGINES[:2])

    def test(router: Router, shard: Shard) -> None:
        router.refresh()
        pool, policy = router.only, router.pools["demo"].policy
        upstreams = list(router.pools["demo"].upstreams)
        for _ in range(3):
            choose(router)
        assert router.only is pool
        memory.put(0, is_new=False)
        choose(router)
        assert router.only is not pool
        assert router.pools["demo"].policy is policy, "a turn of round_robin outlives a change of the table"
        assert router.pools["demo"].upstreams == upstreams, "so do the connections"
        memory.put(0)
        router.refresh()
        assert router.pools["demo"].upstreams[0] is not upstreams[0], "another worker in the slot"
        assert upstreams[0].is_removed
        assert router.pools["demo"].upstreams[1] is upstreams[1]

    routed(memory, test)


def test_auto_becomes_cache_aware_when_a_worker_publishes_events() -> None:
    memory = Memory(ENGINES[:2])

    def test(router: Router, shard: Shard) -> None:
        assert route_of(router).decision == LEAST_LOAD
        memory.put(1, is_new=False, block_size=64)
        assert route_of(router).decision == CACHE_MISS

    routed(memory, test, FixedKeyer(Facts(10, {Variant(64): b""})), policy="auto", tokenizer_path=DEMO_TOKENIZER_PATH)
