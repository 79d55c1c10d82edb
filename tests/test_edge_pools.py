"""sglfast.edge.pools: what a policy's name stands for, when a pool is full, why a model cannot be served."""

from typing import cast

import pytest
from edge_harness import Memory
from test_edge_route import ENGINES, routed

from sglfast import _counters as c
from sglfast import errors
from sglfast._counters import Column
from sglfast.config import ServeConfig
from sglfast.edge.policy.approximate import ApproximateCacheAware
from sglfast.edge.policy.cache_aware import CacheAware
from sglfast.edge.policy.least_load import LeastLoad
from sglfast.edge.policy.power_of_two import PowerOfTwo
from sglfast.edge.policy.random import Random
from sglfast.edge.policy.round_robin import RoundRobin
from sglfast.edge.pools import make_policy, policy_for, why_unserved
from sglfast.edge.route import Router
from sglfast.edge.shard import Shard
from sglfast.shm import Role


@pytest.mark.parametrize(
    ("name", "kind"),
    [("round_robin", RoundRobin), ("random", Random), ("power_of_two", PowerOfTwo), ("least_load", LeastLoad)],
)
def test_policy_of_a_flag(name: str, kind: type) -> None:
    memory = Memory(ENGINES[:1])
    made = make_policy(name, ServeConfig(), c.Loads(memory.segment), has_events=False)
    assert type(made) is kind
    assert made.name == name


@pytest.mark.parametrize("prediction_blocks", [0, 1000])
@pytest.mark.parametrize("has_events", [False, True])
@pytest.mark.parametrize("tokenizer_path", [None, "x"])
def test_policy_of_cache_aware(tokenizer_path: str | None, has_events: bool, prediction_blocks: int) -> None:
    config = ServeConfig(tokenizer_path=tokenizer_path, prediction_blocks=prediction_blocks)
    made = make_policy("cache_aware", config, c.Loads(Memory(ENGINES[:1]).segment), has_events=has_events)
    is_exact = (tokenizer_path is not None and has_events) or not prediction_blocks
    assert type(made) is (CacheAware if is_exact else ApproximateCacheAware)
    assert made.name == "cache_aware"


@pytest.mark.parametrize(
    ("tokenizer_path", "has_events", "kind"), [("x", True, CacheAware), ("x", False, LeastLoad), (None, True, LeastLoad)]
)
def test_policy_of_auto(tokenizer_path: str | None, has_events: bool, kind: type) -> None:
    loads = c.Loads(Memory(ENGINES[:1]).segment)
    assert type(make_policy("auto", ServeConfig(tokenizer_path=tokenizer_path), loads, has_events=has_events)) is kind


def test_a_policy_of_the_same_kind_is_kept() -> None:
    loads = c.Loads(Memory(ENGINES[:1]).segment)
    kept = RoundRobin(loads)
    assert policy_for("round_robin", [], kept, ServeConfig(), loads) is kept
    assert type(policy_for("random", [], kept, ServeConfig(), loads)) is Random
    assert policy_for("round_robin", [], None, ServeConfig(), loads) is not kept


@pytest.mark.parametrize(
    ("roles", "busy", "is_full"),
    [
        ("rr", (0,), False),
        ("rr", (0, 1), True),
        ("pd", (), False),
        ("pd", (0,), True),
        ("pd", (1,), True),
        ("ppdd", (0, 2), False),
        ("ppdd", (0, 1), True),
        ("ppdd", (2, 3), True),
        ("rpd", (2,), False),
        ("rpd", (0, 2), True),
        ("rpd", (0, 1), True),
        ("rpd", (1, 2), False),
    ],
)
def test_a_pool_is_full_when_somebody_would_get_too_many(roles: str, busy: tuple[int, ...], is_full: bool) -> None:
    names = {"r": "regular", "p": "prefill", "d": "decode"}
    memory = Memory(ENGINES[: len(roles)], roles=[cast(Role, names[role]) for role in roles])
    column = Column(memory.segment, 0)
    for row in busy:
        for _ in range(2):
            column.begin(row, 0, 0, 0)

    def test(router: Router, shard: Shard) -> None:
        router.refresh()
        assert router.pools["demo"].is_full(shard.loads, 2) == is_full
        assert not router.pools["demo"].is_full(shard.loads, 3)

    routed(memory, test)


@pytest.mark.parametrize(
    ("roles", "reason"),
    [
        ({"regular": 1}, None),
        ({"regular": 1, "prefill": 1}, None),
        ({"prefill": 1, "decode": 2}, None),
        ({"regular": 0, "prefill": 1, "decode": 1}, None),
        ({"regular": 0}, errors.NO_HEALTHY_WORKERS),
        ({"regular": 0, "prefill": 1}, errors.NO_HEALTHY_WORKERS),
        ({"prefill": 1}, errors.NO_DECODE_WORKERS_AVAILABLE),
        ({"prefill": 1, "decode": 0}, errors.NO_DECODE_WORKERS_AVAILABLE),
        ({"decode": 1}, errors.NO_PREFILL_WORKERS_AVAILABLE),
        ({"prefill": 0, "decode": 1}, errors.NO_PREFILL_WORKERS_AVAILABLE),
        ({"prefill": 0, "decode": 0}, errors.NO_PREFILL_WORKERS_AVAILABLE),
    ],
)
def test_why_a_model_cannot_be_served(roles: dict[str, int], reason: errors.Reason | None) -> None:
    assert why_unserved(roles) is reason
