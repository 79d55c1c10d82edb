"""sglfast._counters: the loads that policies compare, ties and random draws, what is no pool."""

import array
import collections
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shared_memory import shared_segment

from sglfast import _counters as c
from sglfast._counters import Column, Loads, Totals
from sglfast._segment import Segment

Z = 6.0  # standard deviations that a random count may be off: one run in a billion


def loaded(segment: Segment, requests: list[int], tokens: int = 10) -> Loads:
    """Worker i has requests[i] in flight, spread over the shards, with `tokens` tokens each."""
    columns = [Column(segment, shard) for shard in range(segment.max_shards)]
    for worker_idx, n in enumerate(requests):
        for turn in range(n):
            columns[turn % len(columns)].begin(worker_idx, tokens, 0)
    return Loads(segment)


def pool(*worker_idxs: int) -> "array.array[int]":
    return array.array("i", worker_idxs)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=8), st.data())
def test_least_and_span(requests: list[int], data: st.DataObject) -> None:
    with shared_segment(max_workers=8, max_shards=3) as (_, segment):
        loads = loaded(segment, requests)
        chosen = data.draw(st.lists(st.integers(0, len(requests) - 1), min_size=1, max_size=8))
        of_pool = [requests[idx] for idx in chosen]
        for word, unit in ((c.W_INFLIGHT_REQUESTS, 1), (c.W_INFLIGHT_TOKENS, 10)):
            position, load = loads.least(pool(*chosen), word)
            assert load == min(of_pool) * unit == requests[chosen[position]] * unit
            assert loads.span(pool(*chosen), word) == (min(of_pool) * unit, max(of_pool) * unit)
        position = loads.lighter_of_two(pool(*chosen))
        assert len(chosen) == 1 or of_pool.count(max(of_pool)) > 1 or of_pool[position] < max(of_pool), "the heaviest alone never wins"
        assert [loads.requests(idx) for idx in range(len(requests))] == requests
        assert [loads.tokens(idx) for idx in range(len(requests))] == [n * 10 for n in requests]


def assert_even(counts: collections.Counter[int], of: list[int], draws: int) -> None:
    assert set(counts) <= set(of)
    share = 1 / len(of)
    margin = Z * math.sqrt(draws * share * (1 - share))
    assert all(abs(counts[position] - draws * share) <= margin for position in of), counts


@pytest.mark.parametrize("n", [2, 3, 7])
def test_ties_are_broken_evenly(n: int) -> None:
    draws = 20_000
    with shared_segment(max_workers=16) as (_, segment):
        loads = loaded(segment, [5] + [2] * n + [3])
        workers = pool(*range(n + 2))
        assert_even(collections.Counter(loads.least(workers)[0] for _ in range(draws)), list(range(1, n + 1)), draws)
        equal = pool(*range(1, n + 1))
        assert_even(collections.Counter(loads.lighter_of_two(equal) for _ in range(draws)), list(range(n)), draws)
        assert_even(collections.Counter(loads.random_below(n) for _ in range(draws)), list(range(n)), draws)


def test_lighter_of_two_draws_all_pairs() -> None:
    """With loads 0, 1, 2, 3 the position of load i wins when the other drawn is heavier: 3, 2, 1, 0 of 6 pairs."""
    draws = 20_000
    with shared_segment() as (_, segment):
        loads = loaded(segment, [2, 0, 3, 1])
        counts = collections.Counter(loads.lighter_of_two(pool(0, 1, 2, 3)) for _ in range(draws))
        for position, wins in ((1, 3), (3, 2), (0, 1), (2, 0)):
            share = wins / 6
            assert abs(counts[position] - draws * share) <= Z * math.sqrt(draws * share * (1 - share))


def test_processes_draw_different_numbers() -> None:
    with shared_segment() as (_, segment):
        draws = {tuple(Loads(segment).random_below(1 << 31) for _ in range(4)) for _ in range(20)}
        assert len(draws) == 20


def test_random_below_has_the_range_it_says() -> None:
    with shared_segment() as (_, segment):
        loads = Loads(segment)
        assert {loads.random_below(1) for _ in range(100)} == {0}
        top = 2**32 - 1
        highest = max(loads.random_below(top) for _ in range(1000))
        assert top * 0.9 < highest < top
        for n in (0, 2**32, 2**63):
            with pytest.raises(ValueError, match=rf"^n must be 1\.\.2\^32 - 1, not {n}$"):
                loads.random_below(n)


def test_a_sum_below_zero_is_no_load() -> None:
    with shared_segment() as (_, segment):
        column = Column(segment, 0)
        column.add_worker(1, c.W_INFLIGHT_TOKENS, -5)
        assert Loads(segment).tokens(1) == 0
        assert Totals(segment).worker(1)[c.W_INFLIGHT_TOKENS] == -5


@pytest.mark.parametrize("wrong", [pool(), array.array("q", [0, 1]), array.array("h", [0]), b"\0\0\0\0", bytearray(8)])
def test_what_is_no_pool_is_refused(wrong: Any) -> None:
    with shared_segment() as (_, segment):
        loads = Loads(segment)
        for pick in (loads.least, loads.span, loads.lighter_of_two):
            with pytest.raises(ValueError, match=r"^a pool is int32 worker indexes, at least one; this one has "):
                pick(wrong)


@pytest.mark.parametrize("wrong", [pool(-1, -2), pool(4, 5), pool(2**31 - 1, 2**31 - 1)])
def test_a_pool_with_unknown_workers_is_refused(wrong: Any) -> None:
    with shared_segment(max_workers=4) as (_, segment):
        loads = Loads(segment)
        for pick in (loads.least, loads.span, loads.lighter_of_two):
            with pytest.raises(IndexError, match=r"^the pool names a worker outside 0\.\.3$"):
                pick(wrong)
        for pick in (loads.least, loads.span):
            with pytest.raises(IndexError, match=r"^the pool names a worker outside 0\.\.3$"):
                pick(pool(0, 1) + wrong)
