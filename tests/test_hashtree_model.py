"""sglfast._hashtree against its model: random calls on a writer and on a reader of a second mapping, audited slot by slot."""

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from model import HashTreeModel
from shared_memory import KEY_ZERO, Table, key_at_home, packed, shared_segment

from sglfast import shm
from sglfast._hashtree import TreeReader, TreeWriter

N_KEYS = 160
N_SLOTS_MAX = 300


def key_pool(kind: str, n_slots: int) -> list[int]:
    """Distinct keys; 0 is one of them, and KEY_ZERO is none."""
    if kind == "scattered":
        pool = [random.Random(7).getrandbits(64) for _ in range(N_KEYS - 1)]
    elif kind == "small":
        pool = list(range(1, N_KEYS))
    elif kind == "one home":
        pool = [key_at_home(n_slots // 2, number, n_slots) for number in range(1, N_KEYS)]
    else:  # homes in the last three slots and the first two: chains run over the table's end
        pool = [key_at_home(-3 + number % 5, number, n_slots) for number in range(1, N_KEYS)]
    return [0, *pool]


positions = st.integers(0, N_KEYS - 1)
# Runs of neighbours make deep overlaps and fill the logs; loose lists make holes and repeats.
runs = st.tuples(positions, positions).map(lambda ends: list(range(min(ends), max(ends) + 1)))
key_lists = st.one_of(runs, runs, st.lists(positions, max_size=12))
ranks = st.sampled_from([0, 1, 31, 62, 63, -64, -63, -2, -1])  # negative ones count from the last rank


class TreeMachine(RuleBasedStateMachine):
    """The same calls on writer and model give the same answers, totals and contents; a reader of a second mapping agrees."""

    MAX_RANKS = 64

    @initialize(capacity=st.sampled_from([1, 2, 5, 30, 100, 1000]), kind=st.sampled_from(["scattered", "small", "one home", "wrap"]))
    def start(self, capacity: int, kind: str) -> None:
        self.scope = shared_segment(max_ranks=self.MAX_RANKS, capacity_blocks=capacity)
        fd, segment = self.scope.__enter__()
        self.writer = TreeWriter(segment)
        self.reader = TreeReader(shm.attach(fd))
        self.table = Table(fd)
        self.model = HashTreeModel(capacity)
        self.pool = key_pool(kind, self.table.n_slots)
        self.writer.reset()
        self.model.reset()

    def teardown(self) -> None:
        if hasattr(self, "scope"):
            del self.writer, self.reader
            self.scope.__exit__(None, None, None)

    def keys(self, chosen: list[int]) -> tuple[bytes, list[int]]:
        """The keys for the module, and as the model knows them."""
        keys = [self.pool[position] for position in chosen]
        return packed(keys), [key or KEY_ZERO for key in keys]

    @rule(rank=ranks, tier=st.integers(0, 2), chosen=key_lists)
    def store(self, rank: int, tier: int, chosen: list[int]) -> None:
        raw, keys = self.keys(chosen)
        rank %= self.MAX_RANKS
        assert self.writer.store(rank, tier, raw) == self.model.store(rank, tier, keys)

    @rule(rank=ranks, tiers=st.integers(0, 7), chosen=key_lists)
    def remove(self, rank: int, tiers: int, chosen: list[int]) -> None:
        raw, keys = self.keys(chosen)
        rank %= self.MAX_RANKS
        assert self.writer.remove(rank, tiers, raw) == self.model.remove(rank, tiers, keys)

    @rule(rank=ranks)
    def clear(self, rank: int) -> None:
        rank %= self.MAX_RANKS
        assert self.writer.clear(rank) == self.model.clear(rank)

    @rule(rank=ranks, other=ranks, turn_keys=st.integers(1, 20), chosen=key_lists, is_hidden=st.booleans())
    def clear_in_turns(self, rank: int, other: int, turn_keys: int, chosen: list[int], is_hidden: bool) -> None:
        """For a reader it is over at once; another rank is written and removed from between the turns."""
        raw, keys = self.keys(chosen)
        rank, other = rank % self.MAX_RANKS, other % self.MAX_RANKS
        if is_hidden:
            self.writer.hide(rank)
        expected, gone, is_done = self.model.clear(rank), 0, False
        while not is_done:
            n, is_done = self.writer.clear_some(rank, turn_keys)
            gone += n
            self.match(chosen, 7)
            if other != rank:
                assert self.writer.remove(other, 1, raw) == self.model.remove(other, 1, keys)
                self.match(chosen, 7)
        assert gone == expected

    @precondition(lambda self: self.model.stored_total > 200)
    @rule()
    def reset(self) -> None:
        self.writer.reset()
        self.model.reset()

    @rule(chosen=key_lists, tiers=st.integers(0, 7))
    def match(self, chosen: list[int], tiers: int) -> None:
        raw, keys = self.keys(chosen)
        expected = self.model.match(keys, tiers)
        assert self.reader.match(raw, tiers) == max(expected.values(), default=0)
        hits = self.reader.hits()
        assert len(hits) == len(expected), "each rank once"
        assert dict(hits) == expected
        assert [self.reader.overlap(rank) for rank in range(self.MAX_RANKS)] == [expected.get(rank, 0) for rank in range(self.MAX_RANKS)]

    @invariant()
    def counts_agree(self) -> None:
        model = self.model
        assert self.reader.stats() == {
            "live_blocks": len(model.owners),
            "capacity_blocks": model.capacity_blocks,
            "stored_total": model.stored_total,
            "removed_total": model.removed_total,
            "evicted_total": model.evicted_total,
            "generation": model.generation,
        }
        assert self.writer.live_blocks == len(model.owners)
        assert self.reader.torn_total == 0

    @invariant()
    def table_agrees(self) -> None:
        if self.table.n_slots < N_SLOTS_MAX:  # the large table's turn is test_churn
            self.table.audit(self.model.owners)

    @invariant()
    def owned_agrees(self) -> None:
        for rank in {owner for owners in self.model.owners.values() for owner, _ in owners} | {0}:
            assert self.writer.owned_blocks(rank) == self.model.owned_blocks(rank)


class TreeMachine128(TreeMachine):
    MAX_RANKS = 128


class TreeMachine1024(TreeMachine):
    MAX_RANKS = 1024


TreeMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30)
TreeMachine128.TestCase.settings = settings(max_examples=25, stateful_step_count=30)
TreeMachine1024.TestCase.settings = settings(max_examples=25, stateful_step_count=30)
TestTree64 = TreeMachine.TestCase
TestTree128 = TreeMachine128.TestCase
TestTree1024 = TreeMachine1024.TestCase


@pytest.mark.parametrize("capacity", [1, 7, 300])
def test_churn(capacity: int, rng: random.Random) -> None:
    """Thousands of stores, removals and clears: both logs are compacted many times, and who is oldest is never forgotten."""
    with shared_segment(capacity_blocks=capacity) as (fd, segment):
        writer, table, model = TreeWriter(segment), Table(fd), HashTreeModel(capacity)
        pool = [rng.getrandbits(64) for _ in range(capacity * 2)]
        for turn in range(1500):
            rank, keys = rng.randrange(3), rng.choices(pool, k=rng.randrange(1, 40))
            if rng.random() < 0.6:
                assert writer.store(rank, 0, packed(keys)) == model.store(rank, 0, keys)
            elif rng.random() < 0.97:
                assert writer.remove(rank, 7, packed(keys)) == model.remove(rank, 7, keys)
            else:
                assert writer.clear(rank) == model.clear(rank)
            if turn % 50 == 0:
                table.audit(model.owners)
        table.audit(model.owners)
        assert model.evicted_total > 500
        assert [writer.owned_blocks(rank) for rank in range(3)] == [model.owned_blocks(rank) for rank in range(3)]
