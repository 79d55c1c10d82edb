"""sglfast.edge.policy.cache_aware: every branch, with its thresholds at their edges."""

import pytest
from policy_bench import CHI_SQUARE_LIMIT, Pool, chi_square, prompt

from sglfast.edge.policy import CACHE_HIT, CACHE_MISS, IMBALANCED, UNKEYED, Hit, Prompt
from sglfast.edge.policy.cache_aware import CacheAware

POLICY = CacheAware(cache_threshold=0.5, balance_abs_threshold=32, balance_rel_threshold=1.1)


# ---- 1: balance ----


def test_imbalance_needs_more_than_the_absolute_threshold() -> None:
    pool = Pool(3)
    pool.load(0, 32)
    asked = prompt(10, p0=10)
    assert pool.picks(POLICY, prompt=asked) == {(0, CACHE_HIT): 400}, "a difference of exactly 32 is balanced"
    pool.load(0, 1)
    picks = pool.picks(POLICY, prompt=asked)
    assert set(picks) == {(1, IMBALANCED), (2, IMBALANCED)}, "33 is not: the owner is left aside"
    assert chi_square(picks, 2) < CHI_SQUARE_LIMIT[2]


def test_imbalance_needs_more_than_the_relative_threshold_too() -> None:
    pool = Pool(2)
    policy = CacheAware(cache_threshold=0.5, balance_abs_threshold=32, balance_rel_threshold=1.5)
    pool.load(1, 80)
    pool.load(0, 120)
    assert pool.picks(policy, prompt=prompt(10, p0=10)) == {(0, CACHE_HIT): 400}, "exactly one and a half times"
    pool.load(0, 1)
    assert pool.picks(policy, prompt=prompt(10, p0=10)) == {(1, IMBALANCED): 400}


def test_balance_counts_requests_of_all_shards() -> None:
    pool = Pool(2)
    pool.load(0, 17, shard=0)
    pool.load(0, 17, shard=1)
    assert pool.picks(POLICY, prompt=prompt(10, p0=10)) == {(1, IMBALANCED): 400}


def test_imbalance_also_decides_for_prompts_without_keys() -> None:
    pool = Pool(2)
    pool.load(0, 40)
    assert pool.picks(POLICY) == {(1, IMBALANCED): 400}


# ---- no keys ----


def test_unkeyed_prompts_go_to_the_fewest_requests() -> None:
    pool = Pool(4)
    pool.load(0, 2)
    pool.load(1, 1, tokens=10_000)
    pool.load(2, 1)
    pool.load(3, 3)
    picks = pool.picks(POLICY, 4000)
    assert set(picks) == {(1, UNKEYED), (2, UNKEYED)}
    assert chi_square(picks, 2) < CHI_SQUARE_LIMIT[2]


# ---- 2: a long overlap ----


@pytest.mark.parametrize(("blocks", "decision"), [(10, CACHE_MISS), (11, CACHE_HIT), (20, CACHE_HIT)])
def test_a_hit_is_more_than_the_threshold(blocks: int, decision: int) -> None:
    """Of 20 blocks, 10 are exactly one half."""
    pool = Pool(3)
    assert pool.picks(POLICY, prompt=prompt(20, p1=blocks)) == {(1, decision): 400}


@pytest.mark.parametrize(
    ("threshold", "blocks", "decision"), [(0.0, 1, CACHE_HIT), (1.0, 20, CACHE_MISS), (0.3, 6, CACHE_MISS), (0.3, 7, CACHE_HIT)]
)
def test_other_thresholds(threshold: float, blocks: int, decision: int) -> None:
    policy = CacheAware(cache_threshold=threshold, balance_abs_threshold=32, balance_rel_threshold=1.1)
    assert Pool(3).picks(policy, prompt=prompt(20, p1=blocks)) == {(1, decision): 400}


def test_the_longest_overlap_wins_over_load() -> None:
    pool = Pool(3)
    pool.load(2, 30, tokens=500_000)
    assert pool.picks(POLICY, prompt=prompt(20, p0=18, p2=19)) == {(2, CACHE_HIT): 400}


def test_among_equal_owners_the_least_loaded() -> None:
    pool = Pool(4)
    pool.load(0, 5)
    pool.load(1, 2, shard=1)
    pool.load(3, 4)
    assert pool.picks(POLICY, prompt=prompt(20, p0=15, p1=15, p2=14, p3=15)) == {(1, CACHE_HIT): 400}
    pool.load(1, 2)
    picks = pool.picks(POLICY, 4000, prompt(20, p0=15, p1=15, p2=14, p3=15))
    assert set(picks) == {(1, CACHE_HIT), (3, CACHE_HIT)}
    assert chi_square(picks, 2) < CHI_SQUARE_LIMIT[2]


def test_overlaps_in_blocks_of_different_sizes_are_compared_in_tokens() -> None:
    asked = Prompt(2000, 125, (Hit(0, 0, 70, 70 * 16), Hit(1, 1, 20, 20 * 64)), True)
    assert Pool(2).picks(POLICY, prompt=asked) == {(1, CACHE_HIT): 400}


# ---- 3: the least work ----


def test_without_an_owner_the_fewest_queued_tokens() -> None:
    pool = Pool(3)
    pool.load(0, 1, tokens=900)
    pool.load(1, 9, tokens=800)
    pool.load(2, 1, tokens=1000)
    assert pool.picks(POLICY, prompt=prompt(20)) == {(1, CACHE_MISS): 400}


def test_without_an_owner_and_load_everybody_alike() -> None:
    picks = Pool(8).picks(POLICY, 8000, prompt(20))
    assert set(picks) == {(position, CACHE_MISS) for position in range(8)}
    assert chi_square(picks, 8) < CHI_SQUARE_LIMIT[8]


@pytest.mark.parametrize(("queued_tokens", "expected"), [(319, {1}), (320, {0, 1, 2}), (321, {0, 2})])
def test_a_short_overlap_is_worth_its_tokens(queued_tokens: int, expected: set[int]) -> None:
    """Five blocks of 64 tokens: exactly 320 tokens of other work make up for them."""
    pool = Pool(3)
    pool.load(1, 1, tokens=queued_tokens)
    picks = pool.picks(POLICY, 3000, prompt(20, p1=5))
    assert set(picks) == {(position, CACHE_MISS) for position in expected}


def test_of_two_short_overlaps_the_less_work() -> None:
    pool = Pool(3)
    pool.load(0, 1, tokens=200)
    pool.load(2, 1, tokens=10_000)
    # work: 200 + 1280 - 512 = 968, 1280 - 256 = 1024, much
    assert pool.picks(POLICY, prompt=prompt(20, p0=8, p1=4)) == {(0, CACHE_MISS): 400}
    pool.load(0, 1, tokens=57)
    assert pool.picks(POLICY, prompt=prompt(20, p0=8, p1=4)) == {(1, CACHE_MISS): 400}


def test_equal_work_is_shared() -> None:
    pool = Pool(3)
    pool.load(0, 1, tokens=256)
    pool.load(2, 1, tokens=10_000)
    picks = pool.picks(POLICY, 4000, prompt(20, p0=8, p1=4))  # 256 + 1280 - 512 = 1280 - 256
    assert set(picks) == {(0, CACHE_MISS), (1, CACHE_MISS)}
    assert chi_square(picks, 2) < CHI_SQUARE_LIMIT[2]
    assert POLICY.score(3, 100) == 100


@pytest.mark.parametrize(("blocks_64", "blocks_16", "chosen"), [(6, 20, (0, CACHE_HIT)), (6, 26, (1, CACHE_HIT)), (5, 20, (2, CACHE_MISS))])
def test_the_threshold_is_the_same_for_workers_that_cut_otherwise(blocks_64: int, blocks_16: int, chosen: tuple[int, int]) -> None:
    """640 tokens are 10 blocks of one worker and 40 of another; half of either is half of the prompt."""
    pool = Pool(3)
    pool.load(0, 1, tokens=1000)
    pool.load(1, 1, tokens=1000)
    hits = (Hit(0, 0, blocks_64, 64 * blocks_64), Hit(1, 1, blocks_16, 16 * blocks_16))
    assert pool.picks(POLICY, prompt=Prompt(650, 40, hits, True)) == {chosen: 400}
