"""sglfast._predicted: the table of predictions against its model, in whole and word by word, and every kind of mistake."""

import random
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from model import PredictedModel
from shared_memory import Words, packed, shared_segment

from sglfast import shm
from sglfast._predicted import GRACE_MS, KEEP, KEYS_MAX, SENT, SETTLED, Predictions, PredictionWriter, dropped_total, totals

FLIGHT_MS, RECENT_MS, RECENT_SETS = 60_000, 100, 64
N_KEYS = 60
START_MS = 1_000_000


def key_pool(kind: str, n_sets: int) -> list[int]:
    """Distinct keys: all over the table, or all in two of its sets and of a shard's own 64."""
    rng = random.Random(5)
    if kind == "scattered":
        return [rng.getrandbits(64) for _ in range(N_KEYS)]
    sets = (0, n_sets - 1)
    return [(-(-(sets[i % 2] << 64) // n_sets) + i + 1) % 2**64 for i in range(N_KEYS)]


positions = st.integers(0, N_KEYS - 1)
runs = st.tuples(positions, positions).map(lambda ends: list(range(min(ends), max(ends) + 1)))
key_lists = st.one_of(runs, runs, st.lists(positions, max_size=8))
ranks = st.sampled_from([0, 1, 63, -64, -1])


class PredictedMachine(RuleBasedStateMachine):
    """Two shards and the index with a clock of their own: what each shard sees is what the model says, and so is every word."""

    MAX_RANKS = 64

    @initialize(blocks=st.sampled_from([1, 16, 40, 1000]), kind=st.sampled_from(["scattered", "two sets"]))
    def start(self, blocks: int, kind: str) -> None:
        self.scope = shared_segment(max_ranks=self.MAX_RANKS, prediction_blocks=blocks)
        self.fd, segment = self.scope.__enter__()
        self.words = Words(self.fd)
        self.shards = [Predictions(shm.attach(self.fd), shard) for shard in range(2)]
        self.writer = PredictionWriter(segment)
        self.segment = segment
        n_sets = -(-blocks // 8)
        self.table = PredictedModel(n_sets)
        self.recent = [PredictedModel(RECENT_SETS) for _ in range(2)]
        self.rings: list[list[tuple[int, int, int, list[int]]]] = [[], []]
        self.generations = [0] * self.MAX_RANKS
        self.settled: list[tuple[int, int, int, list[int]]] = []
        self.pool = key_pool(kind, n_sets)
        self.now_ms = START_MS
        self.records = self.refused = 0
        for rank in (0, 63 % self.MAX_RANKS, self.MAX_RANKS - 1):
            self.own(rank, 1)

    def teardown(self) -> None:
        if hasattr(self, "scope"):
            del self.shards, self.writer, self.segment
            self.scope.__exit__(None, None, None)

    @rule(rank=ranks, generation=st.integers(0, 2))
    def own(self, rank: int, generation: int) -> None:
        rank %= self.MAX_RANKS
        self.writer.own(rank, generation)
        self.generations[rank] = generation

    @rule(ms=st.sampled_from([1, 30, 60, 100, 30_000, 59_900]))
    def later(self, ms: int) -> None:
        self.now_ms += ms

    @rule(
        shard=st.integers(0, 1), op=st.sampled_from([SENT, SENT, KEEP, SETTLED]), rank=ranks, chosen=key_lists, generation=st.integers(1, 2)
    )
    def put(self, shard: int, op: int, rank: int, chosen: list[int], generation: int) -> None:
        rank %= self.MAX_RANKS
        keys = [self.pool[position] for position in chosen]
        assert self.shards[shard].put(op, rank, generation, packed(keys), self.now_ms)
        self.rings[shard].append((op, rank, generation, keys))
        for key in keys:
            if op == SETTLED:
                self.recent[shard].drop(key, rank, 2)
            else:
                self.recent[shard].add(key, rank, 2 if op == SENT else 3, self.now_ms)

    @rule()
    def drain(self) -> None:
        records = [record for ring in self.rings for record in ring]
        assert self.writer.drain(self.now_ms) == len(records)
        self.rings = [[], []]
        for op, rank, generation, keys in records:
            if self.generations[rank] != generation:
                self.refused += 1
                continue
            self.records += 1
            if op == SETTLED:
                for key in keys:
                    self.table.settle(key, rank)
                self.settled.append((self.now_ms + GRACE_MS, rank, generation, keys))
            else:
                for key in reversed(keys):
                    self.table.add(key, rank, 2 if op == SENT else 3, self.now_ms)
        due = [entry for entry in self.settled if entry[0] <= self.now_ms]
        self.settled = [entry for entry in self.settled if entry[0] > self.now_ms]
        for _, rank, generation, keys in due:
            if self.generations[rank] == generation:
                for key in keys:
                    self.table.drop(key, rank, 3)

    @rule(chosen=st.lists(ranks, max_size=3))
    def clear(self, chosen: list[int]) -> None:
        cleared = [rank % self.MAX_RANKS for rank in chosen]
        self.writer.clear(cleared)
        self.table.clear(cleared)

    @rule()
    def restart_index(self) -> None:
        """A new writer goes on with the table; what had been settled is now kept until it is cleared."""
        self.writer = PredictionWriter(self.segment)
        self.settled = []
        for rank, generation in enumerate(self.generations):
            self.writer.own(rank, generation)

    @rule(shard=st.integers(0, 1), chosen=key_lists)
    def match(self, shard: int, chosen: list[int]) -> None:
        keys = [self.pool[position] for position in chosen]
        expected: dict[int, int] = {}
        flying: dict[int, bool] = {}
        alive = set(range(self.MAX_RANKS))
        for depth, key in enumerate(keys, 1):
            shared, in_shared = self.table.owners(key, self.now_ms, FLIGHT_MS, float("inf"))
            own, in_own = self.recent[shard].owners(key, self.now_ms, RECENT_MS, RECENT_MS)
            alive &= shared | own
            expected |= dict.fromkeys(alive, depth)
            flying |= {rank: rank in in_shared | in_own for rank in alive}
        found = self.shards[shard]
        assert found.match(packed(keys), self.now_ms) == max(expected.values(), default=0)
        hits = found.hits()
        assert len(hits) == len(expected)
        assert dict(hits) == expected
        for rank in (*expected, 5):
            assert found.is_in_flight(rank) == flying.get(rank, False)

    @invariant()
    def words_agree(self) -> None:
        offset, size = self.words.header("sets_offset"), self.words.header("prediction_set_bytes")
        bits = self.MAX_RANKS // 64
        for i, places in enumerate(self.table.sets):
            base = offset + i * size

            def owners(way: int, kind: int, base: int = base) -> set[int]:
                start = base + 128 + (2 * way + kind) * bits * 8
                value = int.from_bytes(self.words.memory[start : start + bits * 8], "little")
                return {rank for rank in range(self.MAX_RANKS) if value >> rank & 1}

            for way, held in enumerate(places):
                found: Any = [self.words.get(base + 8 * way), self.words.get(base + 64 + 8 * way), owners(way, 0), owners(way, 1)]
                assert found == held if held is not None else (found[0] == 0 and not found[2] and not found[3])

    @invariant()
    def totals_agree(self) -> None:
        found = totals(self.segment)
        assert found == {"records": self.records, "refused": self.refused, "evicted": self.table.evicted, "trimmed": 0}
        kept = self.writer.kept_blocks()
        assert [kept[rank] for rank in (0, self.MAX_RANKS - 1)] == [self.table.kept_blocks(rank) for rank in (0, self.MAX_RANKS - 1)]


class PredictedMachine1024(PredictedMachine):
    MAX_RANKS = 1024


PredictedMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40)
PredictedMachine1024.TestCase.settings = settings(max_examples=20, stateful_step_count=25)
TestPredicted64 = PredictedMachine.TestCase
TestPredicted1024 = PredictedMachine1024.TestCase


def test_trim_drops_the_oldest_of_a_rank_that_keeps_too_many(rng: random.Random) -> None:
    with shared_segment(prediction_blocks=2000) as (_, segment):
        shard, writer = Predictions(segment, 0), PredictionWriter(segment)
        for rank in (1, 2):
            writer.own(rank, 1)
        prompts = [packed([rng.getrandbits(64) for _ in range(10)]) for _ in range(30)]
        for n, keys in enumerate(prompts):
            shard.put(KEEP, 1, 1, keys, START_MS + n)
            if n % 3 == 0:
                shard.put(KEEP, 2, 1, keys, START_MS + n)
        writer.drain(START_MS)
        for n, keys in enumerate(prompts):  # prompt 0 is the oldest; it is asked for once more
            if n == 0:
                shard.put(KEEP, 1, 1, keys, START_MS + 100)
                writer.drain(START_MS + 100)
        assert writer.kept_blocks()[1:3] == [300, 100]
        assert writer.trim(300) == 0
        assert writer.trim(125) == 175
        assert writer.kept_blocks()[1:3] == [125, 100]
        assert totals(segment)["trimmed"] == 175
        assert shard.match(prompts[0], START_MS + 10_000) == 10, "the newest stays"
        assert dict(shard.hits())[1] == 10
        assert all(dict([*shard.hits()] if shard.match(keys, START_MS + 10_000) else []).get(2) == 10 for keys in prompts[::3])
        assert writer.trim(0) == 225
        assert not any(writer.kept_blocks())
        assert shard.match(prompts[0], START_MS + 10_000) == 0


def test_mistakes_are_named() -> None:
    with shared_segment() as (_, segment):
        for make in (lambda: Predictions(segment, 0), lambda: PredictionWriter(segment)):
            with pytest.raises(ValueError, match="made without predictions"):
                make()
        assert dropped_total(segment) == 0
        assert set(totals(segment).values()) == {0}
    with shared_segment(prediction_blocks=100) as (_, segment):
        for wrong in (-1, 2):
            with pytest.raises(ValueError, match=rf"shard {wrong} is outside 0\.\.1"):
                Predictions(segment, wrong)
        shard, writer = Predictions(segment, 1), PredictionWriter(segment)
        for keys in (b"1234567", bytes(8 * KEYS_MAX + 8)):
            for call in (lambda keys=keys: shard.match(keys), lambda keys=keys: shard.put(SENT, 0, 1, keys)):
                with pytest.raises(ValueError, match="at most 192 whole 8-byte words"):
                    call()
        with pytest.raises(ValueError, match=r"rank 64 is outside 0\.\.63"):
            shard.put(SENT, 64, 1, b"")
        for op in (0, 4):
            with pytest.raises(ValueError, match="SENT, KEEP or SETTLED"):
                shard.put(op, 0, 1, b"")
        with pytest.raises(ValueError, match=r"rank 64 is outside 0\.\.63"):
            writer.own(64, 1)
        with pytest.raises(ValueError, match=r"rank 64 is outside 0\.\.63"):
            writer.clear([1, 64])
        assert not shard.is_in_flight(1 << 20)
        assert shard.match(b"") == 0
        assert writer.drain() == 0
