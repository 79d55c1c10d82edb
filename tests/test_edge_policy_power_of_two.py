"""sglfast.edge.policy.power_of_two"""

from policy_bench import CHI_SQUARE_LIMIT, Pool, chi_square

from sglfast.edge.policy import POWER_OF_TWO, Prompt
from sglfast.edge.policy.power_of_two import PowerOfTwo


def test_of_two_the_lighter() -> None:
    pool = Pool(2)
    pool.load(0, 1)
    assert pool.picks(PowerOfTwo()) == {(1, POWER_OF_TWO): 400}


def test_loads_of_other_shards_count() -> None:
    pool = Pool(2)
    pool.load(0, 2, shard=0)
    pool.load(1, 3, shard=1)
    assert pool.picks(PowerOfTwo()) == {(0, POWER_OF_TWO): 400}


def test_never_the_heaviest_and_mostly_the_lightest() -> None:
    """Of n workers with different loads the k-th lightest wins (n - k) of the n (n - 1) / 2 pairs."""
    pool = Pool(4)
    for worker_idx in range(4):
        pool.load(worker_idx, worker_idx)
    picks = pool.picks(PowerOfTwo(), 6000)
    assert set(picks) == {(position, POWER_OF_TWO) for position in range(3)}
    for position, share in enumerate((3 / 6, 2 / 6, 1 / 6)):
        assert abs(picks[(position, POWER_OF_TWO)] / 6000 - share) < 0.04  # six standard deviations


def test_equal_workers_share_evenly() -> None:
    pool = Pool(4)
    for worker_idx in range(4):
        pool.load(worker_idx, 7)
    assert chi_square(pool.picks(PowerOfTwo(), 8000), 4) < CHI_SQUARE_LIMIT[4]


def test_a_pool_of_one() -> None:
    pool = Pool(1)
    pool.load(0, 9)
    assert PowerOfTwo().choose(pool.view, pool.loads, Prompt()) == (0, POWER_OF_TWO)
    assert PowerOfTwo().score(3, 100) == 3
