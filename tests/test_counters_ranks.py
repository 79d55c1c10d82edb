"""sglfast._counters: load of data-parallel ranks in each shard's column, and the choice of one, against a plain model."""

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from model import rank_choices
from policy_bench import CHI_SQUARE_LIMIT
from shared_memory import shared_segment

from sglfast import _counters as c
from sglfast import shm
from sglfast._counters import Column, Loads, RankLoads, Totals
from sglfast._segment import Segment

WHY = {c.RANK_HIT: "hit", c.RANK_LEAST: "least", c.RANK_OVERLOADED: "overloaded"}


def rank_loads(segment: Segment) -> RankLoads:
    return RankLoads(segment, Loads(segment))


# ---- load ----


def test_a_steered_request_s_life() -> None:
    with shared_segment() as (fd, segment):
        columns = [Column(segment, 0), Column(segment, 1)]
        loads, totals = rank_loads(shm.attach(fd)), Totals(segment)
        columns[0].begin_rank(63, 500)
        columns[1].begin_rank(63, 40)
        columns[1].begin_rank(0, 7)
        assert [loads.of(rank) for rank in (63, 62, 0, 1)] == [(2, 540), (0, 0), (1, 7), (0, 0)]
        assert totals.rank(63) == [2, 540]
        columns[0].prefilled_rank(63, 500)
        assert loads.of(63) == (2, 40)
        columns[0].end_rank(63, 0)
        columns[1].end_rank(63, 40)
        columns[1].end_rank(0, 7)
        assert not any(any(loads.of(rank)) for rank in range(64))


def test_ranks_and_workers_have_words_of_their_own() -> None:
    """The last worker's words end where the first rank's begin, and the last rank's lie in the column."""
    with shared_segment(max_workers=4, max_ranks=64, max_shards=2) as (_, segment):
        for shard in range(2):
            column = Column(segment, shard)
            for rank in range(64):
                column.begin_rank(rank, 1000 + rank)
            for worker_idx in range(4):
                column.begin(worker_idx, 5, 0, 0)
        totals = Totals(segment)
        assert [totals.rank(rank) for rank in range(64)] == [[2, 2000 + 2 * rank] for rank in range(64)]
        assert [totals.worker(worker_idx)[:2] for worker_idx in range(4)] == [[2, 10]] * 4
        assert totals.shard()[c.S_INFLIGHT] == 8


def test_the_load_of_a_dead_shard_vanishes() -> None:
    with shared_segment() as (_, segment):
        totals, loads = Totals(segment), rank_loads(segment)
        for shard in range(2):
            Column(segment, shard).begin_rank(5, 100)
        totals.retire(0)
        assert (totals.rank(5), loads.of(5)) == ([1, 100], (1, 100))
        totals.retire(1)
        assert (totals.rank(5), loads.of(5)) == ([0, 0], (0, 0))


def test_a_sum_below_zero_counts_as_none() -> None:
    with shared_segment() as (_, segment):
        Column(segment, 0).end_rank(3, 10)
        assert rank_loads(segment).of(3) == (0, 0)
        assert Totals(segment).rank(3) == [-1, -10]


@pytest.mark.parametrize("rank", [64, 65, 1 << 31])
def test_ranks_outside(rank: int) -> None:
    with shared_segment() as (_, segment):
        column, totals, loads = Column(segment, 0), Totals(segment), rank_loads(segment)
        for call in (
            lambda: column.begin_rank(rank, 0), lambda: column.prefilled_rank(rank, 0), lambda: column.end_rank(rank, 0),
            lambda: totals.rank(rank), lambda: loads.of(rank), lambda: loads.pick(rank, 1, (), 0, 0.0, 0, 1.0),
        ):  # fmt: skip
            with pytest.raises(IndexError, match=r"outside 0\.\.63"):
                call()


@pytest.mark.parametrize(("first", "count"), [(60, 5), (0, 0), (0, 65), (63, 1 << 31)])
def test_ranges_outside(first: int, count: int) -> None:
    with shared_segment() as (_, segment), pytest.raises(IndexError, match=r"outside 0\.\.63"):
        rank_loads(segment).pick(first, count, (), 0, 0.0, 0, 1.0)


@pytest.mark.parametrize("rank", [3, 8, -1, 1 << 40])
def test_overlaps_of_other_workers_ranks(rank: int) -> None:
    with shared_segment() as (_, segment), pytest.raises(IndexError, match=f"rank {rank} is outside 4..7"):
        rank_loads(segment).pick(4, 4, [(rank, 64)], 100, 0.0, 0, 1.0)


# ---- the choice ----

FIRST = 10  # of the worker's ranks in the tree


def test_the_longest_overlap_unless_it_is_overloaded() -> None:
    with shared_segment() as (_, segment):
        column, loads = Column(segment, 0), rank_loads(segment)

        def pick() -> tuple[int, int]:
            return loads.pick(FIRST, 4, [(11, 600), (13, 700)], 1000, 500.0, 2, 1.5)

        assert pick() == (13, c.RANK_HIT)
        column.begin_rank(13, 10_000)
        column.begin_rank(13, 0)
        assert pick() == (13, c.RANK_HIT), "two requests more than the idlest, whatever is queued"
        column.begin_rank(13, 0)
        assert pick() == (11, c.RANK_OVERLOADED), "whoever holds the next most has the least to compute"
        for rank in (10, 11, 12):
            column.begin_rank(rank, 0)
            column.begin_rank(rank, 0)
        assert pick() == (13, c.RANK_HIT), "all have something to do"


def test_a_short_overlap_is_worth_its_tokens() -> None:
    with shared_segment() as (_, segment):
        column, loads = Column(segment, 1), rank_loads(segment)
        column.begin_rank(12, 299)
        assert loads.pick(FIRST, 4, [(12, 300)], 1000, 500.0, 32, 1.1) == (12, c.RANK_LEAST)
        column.begin_rank(12, 2)
        assert {loads.pick(FIRST, 4, [(12, 300)], 1000, 500.0, 32, 1.1)[0] for _ in range(60)} == {10, 11, 13}


@pytest.mark.parametrize(("overlaps", "cells"), [((), (10, 11, 12, 13)), (((11, 900), (13, 900)), (11, 13))])
def test_ties_are_shared(overlaps: tuple[tuple[int, int], ...], cells: tuple[int, ...]) -> None:
    with shared_segment() as (_, segment):
        loads = rank_loads(segment)
        found = Counter(loads.pick(FIRST, 4, overlaps, 1000, 500.0, 32, 1.1)[0] for _ in range(4000))
        assert set(found) == set(cells)
        expected = 4000 / len(cells)
        assert sum((count - expected) ** 2 / expected for count in found.values()) < CHI_SQUARE_LIMIT[len(cells)]


RANK_STATES = st.lists(st.tuples(st.integers(0, 6), st.sampled_from([0, 64, 100, 900])), min_size=1, max_size=6)


@given(
    RANK_STATES,
    st.dictionaries(st.integers(0, 5), st.sampled_from([64, 128, 640, 960]), max_size=6),
    st.sampled_from([0, 500, 1000]),
    st.sampled_from([0.0, 500.0]),
    st.sampled_from([(32, 1.1), (1, 1.0), (0, 1.0), (2, 1.5)]),
)
def test_as_the_model(
    states: list[tuple[int, int]], overlaps: dict[int, int], prompt_tokens: int, enough_tokens: float, balance: tuple[int, float]
) -> None:
    """Loads spread over two shards; every rank that may be chosen is, and no other."""
    overlaps = {rank: tokens for rank, tokens in overlaps.items() if rank < len(states)}
    with shared_segment() as (_, segment):
        turns = itertools.cycle([Column(segment, 0), Column(segment, 1)])
        for rank, (requests, tokens) in enumerate(states):
            for number in range(requests):
                next(turns).begin_rank(FIRST + rank, 0 if number else tokens)
        loads = rank_loads(segment)
        known = [(requests, tokens if requests else 0) for requests, tokens in states]
        may, why = rank_choices(known, overlaps, prompt_tokens, enough_tokens, *balance)
        pairs = [(FIRST + rank, tokens) for rank, tokens in overlaps.items()]
        found = {loads.pick(FIRST, len(states), pairs, prompt_tokens, enough_tokens, *balance) for _ in range(200)}
        assert {rank - FIRST for rank, _ in found} == may
        assert {WHY[reason] for _, reason in found} == {why}
