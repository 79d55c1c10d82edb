"""sglfast.edge.policy.round_robin"""

from policy_bench import CHI_SQUARE_LIMIT, Pool, chi_square

from sglfast.edge.policy import ROUND_ROBIN, Prompt
from sglfast.edge.policy.round_robin import RoundRobin


def test_turns_through_the_pool_in_order() -> None:
    pool = Pool(5)
    policy = RoundRobin(pool.loads)
    turns = [policy.choose(pool.view, pool.loads, Prompt()) for _ in range(15)]
    first = turns[0][0]
    assert turns == [((first + turn) % 5, ROUND_ROBIN) for turn in range(15)]


def test_does_not_look_at_loads() -> None:
    pool = Pool(3)
    pool.load(1, 50)
    assert set(pool.picks(RoundRobin(pool.loads), 300).values()) == {100}


def test_shards_start_at_different_places() -> None:
    pool = Pool(4)
    starts = sum((pool.picks(RoundRobin(pool.loads), 1) for _ in range(2000)), start=pool.picks(RoundRobin(pool.loads), 0))
    assert chi_square(starts, 4) < CHI_SQUARE_LIMIT[4]


def test_a_smaller_pool() -> None:
    pool = Pool(5)
    policy = RoundRobin(pool.loads)
    for _ in range(7):
        policy.choose(pool.view, pool.loads, Prompt())
    alone = Pool(1)
    assert alone.picks(policy, 3) == {(0, ROUND_ROBIN): 3}
    assert policy.score(3, 100) is None
