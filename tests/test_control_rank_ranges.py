"""Ranges of ranks: contiguous, reused, without gaps that are too small for workers of one size."""

import random

from sglfast.control.rank_ranges import RankRanges


def test_rank_ranges_are_contiguous_and_reused() -> None:
    ranks = RankRanges(64)
    assert [ranks.take(3), ranks.take(60), ranks.take(1), ranks.take(1)] == [0, 3, 63, None]
    ranks.give_back(10, 4)
    assert ranks.free == 4
    assert ranks.take(5) is None
    assert [ranks.take(2), ranks.take(2)] == [10, 12]


def test_single_ranks_come_from_the_other_end() -> None:
    ranks = RankRanges(8)
    assert [ranks.take(1, is_last=True), ranks.take(1, is_last=True), ranks.take(4)] == [7, 6, 0]


def test_ranges_of_one_size_leave_no_gaps_whatever_goes_first(rng: random.Random) -> None:
    ranks = RankRanges(64)
    single = ranks.take(1)
    assert single == 0
    bases = [ranks.take(8) for _ in range(7)]
    assert bases == list(range(8, 64, 8)), "at multiples of their size, where these are free"
    assert ranks.take(7) == 1, "else wherever there is room"
    taken = [base for base in bases if base is not None]
    rng.shuffle(taken)
    for base in taken:
        ranks.give_back(base, 8)
    assert sorted(ranks.take(8) or 0 for _ in range(7)) == bases


def test_more_than_there_are() -> None:
    assert RankRanges(4).take(5) is None
