"""sglfast.edge.policy.random"""

from itertools import pairwise

from policy_bench import CHI_SQUARE_LIMIT, Pool, chi_square

from sglfast.edge.policy import RANDOM, Prompt
from sglfast.edge.policy.random import Random


def test_every_worker_alike_whatever_its_load() -> None:
    pool = Pool(8)
    pool.load(3, 100)
    picks = pool.picks(Random(), 8000)
    assert set(picks) == {(position, RANDOM) for position in range(8)}
    assert chi_square(picks, 8) < CHI_SQUARE_LIMIT[8]


def test_no_turn_follows_from_the_one_before() -> None:
    pool = Pool(2)
    policy = Random()
    turns = [policy.choose(pool.view, pool.loads, Prompt())[0] for _ in range(4000)]
    changes = sum(a != b for a, b in pairwise(turns))
    assert 1800 < changes < 2200  # six standard deviations
    assert policy.score(3, 100) is None


def test_a_pool_of_one() -> None:
    assert Pool(1).picks(Random(), 5) == {(0, RANDOM): 5}
