"""sglfast._counters: columns and their sums, dead shards, histograms, rank rows, bad indexes."""

import collections
import itertools
import math
import random
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shared_memory import Words, forked, shared_segment
from test_counters_loads import pool

from sglfast import _counters as c
from sglfast import shm
from sglfast._breaker import Breakers
from sglfast._counters import Column, Loads, RankTable, Totals

# Position = word in shared memory: metrics and other processes know it by value.
FROZEN = {
    "W_INFLIGHT_REQUESTS": 0, "W_INFLIGHT_TOKENS": 1, "W_CONNECTIONS": 2, "W_REQUESTS": 3, "W_OK": 4, "W_CLIENT_ERRORS": 5,
    "W_BUSY": 6, "W_ERRORS": 7, "W_CANCELLED": 8, "W_BYTES_OUT": 9, "W_PROMPT_BLOCKS": 10, "W_OVERLAP_BLOCKS": 11,
    "W_CONNECT_ERRORS": 12, "W_PARITY_EXACT": 13, "W_PARITY_HIGH": 14, "W_PARITY_LOW": 15,
    "W_BREAKER_OPENED": 16, "W_BREAKER_HALF_OPENED": 17, "W_BREAKER_CLOSED": 18, "W_WAITING_HEAD": 19,
    "W_PARITY_CAME": 20, "W_PARITY_WENT": 21, "W_RANK_REFUSED": 22,
    "W_PARITY_UNTOLD": 23, "W_PARITY_OVER": 24,
    "S_CONNECTIONS": 0, "S_INFLIGHT": 1, "S_CONNECTIONS_TOTAL": 2, "S_REQUESTS": 3, "S_BYTES_IN": 4, "S_BYTES_OUT": 5,
    "S_UPSTREAM_CONNECTS": 6, "S_RESENDS": 8, "S_CLIENT_GONE": 9, "S_STREAMS_CUT": 10, "S_RESPONSES_2XX": 11,
    "S_RESPONSES_3XX": 12, "S_RESPONSES_4XX": 13, "S_RESPONSES_5XX": 14, "S_UNUSUAL_HEADS": 15, "S_PROMPTS_KEYED": 16,
    "S_PROMPTS_UNKEYED": 17, "S_PROMPT_TOKENS": 18, "S_RETRIES": 19, "S_RETRIES_EXHAUSTED": 20,
    "S_STALE": 21, "S_ABORTS": 22, "S_PREDICTED": 28, "S_DECISIONS": 32,
    "S_PERMITS": 48, "S_WAITING": 49, "S_WAITING_HEAD": 50,
    "S_QUEUED": 51, "S_QUEUE_WAIT_US": 52, "S_LOG_LINES_LOST": 53, "S_AFFINITY_SAME_HOST": 54,
    "S_AFFINITY_BREAKER": 55, "S_AFFINITY_LOAD": 56, "S_BODY_BYTES": 57, "S_REASONS": 64, "S_TTFT": 128, "S_DURATION": 160,
    "R_STATE": 0, "R_LAST_SEQ": 1, "R_BATCHES": 2, "R_EVENTS": 3, "R_BLOCKS_STORED": 4, "R_BLOCKS_REMOVED": 5, "R_GAPS": 6,
    "R_DUPLICATES": 7, "R_RESTARTS": 8, "R_UNDECODED": 9, "R_REPLAYS": 10, "R_GIVE_UPS": 11, "R_OWNED_BLOCKS": 12,
    "R_LAST_EVENT_MS": 13, "R_REASON": 14, "R_GENERATION": 15, "R_ORPHANS": 16,
    "R_STREAM": 17, "R_NEXT_SEQ": 18, "R_LAST_PRINT": 19, "R_LOSS": 20, "R_MAPPED_BLOCKS": 21, "R_MAIN_GROUP": 22, "R_MISSING": 23,
    "L_INFLIGHT_REQUESTS": 0, "L_INFLIGHT_TOKENS": 1, "RANK_HIT": 0, "RANK_LEAST": 1, "RANK_OVERLOADED": 2,
    "RANK_BLIND": 0, "RANK_SYNCING": 1, "RANK_EXACT": 2, "RANK_DEGRADED": 3,
}  # fmt: skip
SHARD_WORDS, WORKER_WORDS, RANK_WORDS = 512, 32, 32


def test_the_words_are_frozen() -> None:
    assert {name: getattr(c, name) for name in FROZEN} == FROZEN
    numbers = {name: value for name, value in vars(c).items() if name[:2] in ("W_", "S_", "R_", "L_") or name.startswith("RANK_")}
    assert set(numbers) == set(FROZEN), "a new word is added to this list too"
    of_workers = [value for name, value in numbers.items() if name.startswith("W_")]
    assert len(of_workers) == len(set(of_workers)) <= max(of_workers) + 1 <= WORKER_WORDS
    # Nothing overlaps: 16 decisions, 64 reasons, 25 buckets and 2 words of each histogram.
    spans = [(c.S_DECISIONS, 16), (c.S_REASONS, 64), (c.S_TTFT, 27), (c.S_DURATION, 27)]
    singles = [value for name, value in numbers.items() if name.startswith("S_") and value < c.S_DECISIONS]
    used = [word for start, size in spans for word in range(start, start + size)] + singles
    assert len(used) == len(set(used)) <= max(used) < SHARD_WORDS


# ---- requests of a shard ----


def test_a_request_s_life() -> None:
    with shared_segment() as (fd, segment):
        column, totals, loads = Column(segment, 1), Totals(shm.attach(fd)), Loads(segment)
        column.begin(2, 500, 3)
        column.begin(2, 40, 3)
        column.begin(0, 7, 16)  # no such decision: the request counts, the decision does not
        assert (loads.requests(2), loads.tokens(2), loads.requests(0), loads.tokens(0)) == (2, 540, 1, 7)
        shard = totals.shard()
        assert (shard[c.S_INFLIGHT], shard[c.S_REQUESTS]) == (3, 3)
        assert shard[c.S_DECISIONS : c.S_DECISIONS + 16] == [0, 0, 0, 2] + [0] * 12
        assert shard[c.S_DECISIONS + 16 : c.S_REASONS] == [0] * 16
        column.prefilled(2, 500)
        assert (loads.requests(2), loads.tokens(2)) == (2, 40)
        column.end(2, 0, c.W_OK, 1234)
        column.end(2, 40, c.W_CANCELLED, 6)
        column.end(0, 7, c.W_BUSY, 0)
        assert (loads.requests(2), loads.tokens(2), loads.requests(0), loads.tokens(0)) == (0, 0, 0, 0)
        shard, worker = totals.shard(), totals.worker(2)
        assert (shard[c.S_INFLIGHT], shard[c.S_REQUESTS], shard[c.S_BYTES_OUT]) == (0, 3, 1240)
        done = {c.W_REQUESTS: 2, c.W_OK: 1, c.W_CANCELLED: 1, c.W_BYTES_OUT: 1240}
        assert {word: value for word, value in enumerate(worker) if value} == done
        assert (len(shard), len(worker)) == (SHARD_WORDS, WORKER_WORDS)


def test_the_end_tells_whether_the_breaker_has_to_hear_of_it() -> None:
    with shared_segment(max_workers=4) as (_, segment):
        column, breakers = Column(segment, 0), Breakers(segment, 0)

        def ends(worker_idx: int, outcome: int) -> bool:
            column.begin(worker_idx, 0, 0)
            return column.end(worker_idx, 0, outcome, 0)

        assert [ends(1, outcome) for outcome in (c.W_OK, c.W_BUSY, c.W_CLIENT_ERRORS, c.W_CANCELLED)] == [False] * 4
        assert ends(1, c.W_ERRORS)
        breakers.failed(1, 0, False, 1.0)
        assert ends(1, c.W_OK), "it may end a row of failures"
        assert not ends(2, c.W_OK)


def test_answers_are_counted_by_their_class() -> None:
    with shared_segment() as (_, segment):
        column = Column(segment, 0)
        before = Totals(segment).shard()
        for status_class in (0, 1, 6, 200, 2, 2, 3, 4, 4, 4, 5):
            column.answered(status_class)
        change = {word: now - then for word, (now, then) in enumerate(zip(Totals(segment).shard(), before, strict=True)) if now != then}
        assert change == {c.S_RESPONSES_2XX: 2, c.S_RESPONSES_3XX: 1, c.S_RESPONSES_4XX: 3, c.S_RESPONSES_5XX: 1}


def histogram(words: list[int], start: int) -> tuple[list[int], int, int]:
    """(buckets, count, sum in microseconds)"""
    return words[start : start + c.HISTOGRAM_BUCKETS], words[start + c.HISTOGRAM_BUCKETS], words[start + c.HISTOGRAM_BUCKETS + 1]


@given(st.lists(st.tuples(st.integers(0, 2**40), st.sampled_from([0, *c.BUCKETS_US]), st.integers(-1, 1)), max_size=30))
def test_histograms(observations: list[tuple[int, int, int]]) -> None:
    """Times at, just below and just above each bound; a bound belongs to its own bucket, as Prometheus's `le` says."""
    assert list(c.BUCKETS_US) == sorted(set(c.BUCKETS_US))
    assert len(c.BUCKETS_US) + 1 == c.HISTOGRAM_BUCKETS
    with shared_segment() as (_, segment):
        columns = [Column(segment, shard) for shard in range(2)]
        times = [(free, max(0, bound + shift)) for free, bound, shift in observations]
        for turn, (ttft_us, duration_us) in enumerate(times):
            columns[turn % 2].observe(ttft_us, duration_us)
        words = Totals(segment).shard()
        for start, values in ((c.S_TTFT, [ttft for ttft, _ in times]), (c.S_DURATION, [duration for _, duration in times])):
            buckets, count, total = histogram(words, start)
            edges = [-1, *c.BUCKETS_US, math.inf]
            assert buckets == [sum(low < value <= high for value in values) for low, high in itertools.pairwise(edges)]
            assert (count, total) == (len(values), sum(values))
        assert sum(words[: c.S_TTFT]) == 0, "nothing else was touched"


class Ledger:
    """Columns as dicts: (place, word) -> value, place None is the shard itself. The retired column is one of them."""

    def __init__(self) -> None:
        self.columns: dict[int, collections.Counter[tuple[int | None, int]]] = collections.defaultdict(collections.Counter)

    def retire(self, shard: int) -> None:
        for (place, word), value in self.columns.pop(shard, collections.Counter()).items():
            if word not in (c.GAUGES_SHARD if place is None else c.GAUGES_WORKER):
                self.columns[-1][place, word] += value

    def total(self, place: int | None) -> list[int]:
        n_words = SHARD_WORDS if place is None else WORKER_WORDS
        return [sum(column[place, word] for column in self.columns.values()) for word in range(n_words)]


adds = st.tuples(st.just("add"), st.integers(0, 2), st.none() | st.integers(0, 3), st.integers(0, WORKER_WORDS - 1), st.integers(0, 2**50))
begins = st.tuples(st.just("begin"), st.integers(0, 2), st.integers(0, 3), st.integers(0, 10**6), st.integers(0, 15))
retires = st.tuples(st.just("retire"), st.integers(0, 2), st.none(), st.just(0), st.just(0))


@given(st.lists(st.one_of(adds, begins, retires), max_size=40))
def test_columns_sum_and_dead_shards_fold_away(steps: list[tuple[str, int, int | None, int, int]]) -> None:
    """Three shards count; one dies now and then: what it had in flight vanishes, what it had done stays."""
    with shared_segment(max_shards=3, max_workers=4) as (fd, segment):
        columns, totals, loads, ledger = [Column(segment, shard) for shard in range(3)], Totals(shm.attach(fd)), Loads(segment), Ledger()
        for kind, shard, place, a, b in steps:
            if kind == "add" and place is None:
                columns[shard].add(a * 16, b)
                ledger.columns[shard][None, a * 16] += b
            elif kind == "add":
                assert place is not None
                columns[shard].add_worker(place, a, b)
                ledger.columns[shard][place, a] += b
            elif kind == "begin":
                assert place is not None
                columns[shard].begin(place, a, b)
                for key, n in {
                    (place, c.W_INFLIGHT_REQUESTS): 1, (place, c.W_INFLIGHT_TOKENS): a, (place, c.W_REQUESTS): 1,
                    (None, c.S_INFLIGHT): 1, (None, c.S_REQUESTS): 1, (None, c.S_DECISIONS + b): 1,
                }.items():  # fmt: skip
                    ledger.columns[shard][key] += n
            else:
                totals.retire(shard)
                ledger.retire(shard)
        assert totals.shard() == ledger.total(None)
        for worker_idx in range(4):
            sums = totals.worker(worker_idx)
            assert sums == ledger.total(worker_idx)
            assert loads.requests(worker_idx) == sums[c.W_INFLIGHT_REQUESTS]
            assert loads.tokens(worker_idx) == sums[c.W_INFLIGHT_TOKENS]
        for shard, column in enumerate(columns):
            assert [column.get(word) for word in range(SHARD_WORDS)] == [ledger.columns[shard][None, word] for word in range(SHARD_WORDS)]


def test_a_killed_shard_leaves_nothing_in_flight() -> None:
    """A process that dies in the middle of requests: its share of the load is folded out, its totals stay."""
    with shared_segment(max_shards=2) as (fd, segment):
        mine, loads, totals = Column(segment, 1), Loads(segment), Totals(segment)
        mine.begin(0, 10, 0)

        def shard() -> None:
            column = Column(shm.attach(fd), 0)
            column.add(c.S_CONNECTIONS, 5)
            while True:
                column.begin(0, 100, 1)
                column.begin(3, 100, 1)
                column.end(3, 100, c.W_OK, 10)

        with forked(shard) as process:
            deadline = time.monotonic() + 20
            while totals.shard()[c.S_REQUESTS] < 1000:
                assert time.monotonic() < deadline
                time.sleep(0.001)
            process.kill()
        before = totals.shard(), totals.worker(0), totals.worker(3)
        assert loads.requests(0) > 500
        totals.retire(0)
        after = totals.shard(), totals.worker(0), totals.worker(3)
        assert (loads.requests(0), loads.tokens(0), loads.requests(3)) == (1, 10, 0)
        assert (after[0][c.S_INFLIGHT], after[0][c.S_CONNECTIONS]) == (1, 0)
        for then, now, gauges in zip(before, after, (c.GAUGES_SHARD, c.GAUGES_WORKER, c.GAUGES_WORKER), strict=True):
            assert {word for word, (was, is_now) in enumerate(zip(then, now, strict=True)) if was != is_now} <= set(gauges)
        totals.retire(0)
        assert (totals.shard(), totals.worker(0), totals.worker(3)) == after, "a retired column is empty"


def test_shards_count_at_the_same_time() -> None:
    """Each process writes its own column: no count is lost, and sums that are read meanwhile never go back or beyond."""
    each = 200_000
    with shared_segment(max_shards=3) as (fd, segment):

        def shard(number: int) -> int:
            column = Column(shm.attach(fd), number)
            for _ in range(each):
                column.begin(1, 3, 2)
                column.end(1, 3, c.W_OK, 2)
            return column.get(c.S_REQUESTS)

        totals, loads, last = Totals(segment), Loads(segment), 0
        with forked(lambda: shard(0)) as a, forked(lambda: shard(1)) as b, forked(lambda: shard(2)) as third:
            deadline = time.monotonic() + 30
            while last < 3 * each:
                assert time.monotonic() < deadline
                now = totals.shard()[c.S_REQUESTS]
                assert last <= now <= 3 * each
                assert 0 <= loads.requests(1) <= 3
                last = now
            assert [process.result() for process in (a, b, third)] == [each] * 3
        worker = totals.worker(1)
        assert (worker[c.W_REQUESTS], worker[c.W_OK], worker[c.W_BYTES_OUT]) == (3 * each, 3 * each, 6 * each)
        assert (worker[c.W_INFLIGHT_REQUESTS], worker[c.W_INFLIGHT_TOKENS]) == (0, 0)


# ---- bad indexes ----


def test_bad_indexes_raise_and_corrupt_nothing() -> None:
    with shared_segment(max_workers=4, max_shards=2, max_ranks=64) as (fd, segment):
        column, loads, totals, ranks = Column(segment, 1), Loads(segment), Totals(segment), RankTable(segment)
        column.begin(3, 9, 1)
        before = Words(fd).memory[:]
        of_workers: tuple[tuple[Callable[..., Any], tuple[int, ...]], ...] = (
            (column.begin, (1, 0)), (column.prefilled, (1,)), (column.end, (1, c.W_OK, 1)), (column.add_worker, (0,)),
            (loads.requests, ()), (loads.tokens, ()), (totals.worker, ()),
        )  # fmt: skip
        for worker_idx in (4, 1 << 31):
            for method, args in of_workers:
                with pytest.raises(IndexError, match=rf"^worker {worker_idx} is outside 0\.\.3$"):
                    method(worker_idx, *args)
        wrong: list[tuple[Callable[[], Any], str]] = [
            (lambda: column.end(3, 9, 32, 1), "^no outcome word 32$"),
            (lambda: column.add(512), "^no shard word 512$"),
            (lambda: column.get(512), "^no shard word 512$"),
            (lambda: column.add_worker(0, 32), "^no worker word 32$"),
            (lambda: loads.least(pool(0), 32), "^no worker word 32$"),
            (lambda: loads.least(pool(0), 4_000_000_000), "^no worker word 4000000000$"),
            (lambda: loads.span(pool(0), 32), "^no worker word 32$"),
            (lambda: totals.retire(2), r"^shard 2 is outside 0\.\.1$"),
            (lambda: ranks.set(64, 0, 1), r"^rank 64 is outside 0\.\.63$"),
            (lambda: ranks.set(0, 32, 1), "^no rank word 32$"),
            (lambda: ranks.get(64, 0), r"^rank 64 is outside 0\.\.63$"),
            (lambda: ranks.get(0, 32), "^no rank word 32$"),
            (lambda: ranks.row(64), r"^rank 64 is outside 0\.\.63$"),
            (lambda: ranks.clear(64), r"^rank 64 is outside 0\.\.63$"),
        ]
        for refused, text in wrong:
            with pytest.raises(IndexError, match=text):
                refused()
        negatives: tuple[tuple[Callable[..., Any], tuple[int, ...]], ...] = (
            (column.begin, (-1, 0, 0)), (column.begin, (0, -1, 0)), (loads.requests, (-1,)), (totals.retire, (-1,)), (ranks.clear, (-1,)),
        )  # fmt: skip
        for method, args in negatives:
            with pytest.raises(OverflowError):
                method(*args)
        for shard in (-1, 2, 1000):
            with pytest.raises(ValueError, match=rf"^shard {shard} is outside 0\.\.1$"):
                Column(segment, shard)
        assert Words(fd).memory[:] == before


# ---- rank rows ----


def test_rank_rows() -> None:
    with shared_segment(max_ranks=128) as (fd, segment):
        index, shard = RankTable(segment), RankTable(shm.attach(fd))
        rng = random.Random(3)
        rows = {rank: [rng.getrandbits(64) for _ in range(RANK_WORDS)] for rank in (0, 1, 64, 127)}
        for rank, row in rows.items():
            for word, value in enumerate(row):
                index.set(rank, word, value)
        for rank, row in rows.items():
            assert shard.row(rank) == row
            assert [shard.get(rank, word) for word in range(RANK_WORDS)] == row
        index.clear(1)
        assert shard.row(1) == [0] * RANK_WORDS
        assert [shard.row(rank) for rank in (0, 64, 127)] == [rows[rank] for rank in (0, 64, 127)]
        assert shard.row(2) == [0] * RANK_WORDS
