"""sglfast.edge.policy.least_load"""

from edge_harness import indexes
from policy_bench import CHI_SQUARE_LIMIT, Pool, chi_square

from sglfast.edge.policy import LEAST_LOAD, PoolView, Prompt
from sglfast.edge.policy.least_load import LeastLoad


def test_the_minimum_of_the_sums_over_all_shards() -> None:
    pool = Pool(4)
    for shard, loads in enumerate(((5, 0, 3, 2), (0, 6, 1, 3))):  # sums 5, 6, 4, 5
        for worker_idx, requests in enumerate(loads):
            pool.load(worker_idx, requests, shard=shard)
    assert pool.picks(LeastLoad()) == {(2, LEAST_LOAD): 400}


def test_requests_count_not_tokens() -> None:
    pool = Pool(2)
    pool.load(0, 1, tokens=1_000_000)
    pool.load(1, 2, tokens=0)
    assert pool.picks(LeastLoad()) == {(0, LEAST_LOAD): 400}
    assert LeastLoad().score(3, 100) == 3


def test_ties_break_evenly() -> None:
    pool = Pool(5)
    pool.load(1, 1)
    pool.load(3, 2)
    picks = pool.picks(LeastLoad(), 6000)
    assert set(picks) == {(position, LEAST_LOAD) for position in (0, 2, 4)}
    assert chi_square(picks, 3) < CHI_SQUARE_LIMIT[3]


def test_positions_are_those_of_the_pool() -> None:
    pool = Pool(10)
    pool.load(9, 1)
    view = PoolView(indexes(9, 4))
    assert LeastLoad().choose(view, pool.loads, Prompt()) == (1, LEAST_LOAD)
