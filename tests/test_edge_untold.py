"""A block that was cached and that no event had told: counted when later events have come and it has not, and for no other reason."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from edge_harness import Memory
from test_edge_route import ENGINES, KEYS

from sglfast import _counters as c
from sglfast._counters import Column, RankTable
from sglfast._hashtree import TreeReader, TreeWriter
from sglfast.edge.untold import MOST_TICKS, MOST_WAITING, TICKS_BEHIND_EVENTS, Untold

KEY = KEYS[5 * 8 : 6 * 8]


class House:
    """One worker whose rank 0 owns the first 5 blocks, and what is waited for there."""

    def __init__(self, dp_size: int = 1) -> None:
        self.dp_size = dp_size
        self.memory = Memory(ENGINES[:1], block_size=64)
        self.tree = TreeWriter(self.memory.segment)
        self.tree.store(0, 0, KEYS[: 5 * 8])
        self.ranks = RankTable(self.memory.segment)
        self.set(c.R_STATE, c.RANK_EXACT)
        self.set(c.R_OWNED_BLOCKS, 100)
        self.set(c.R_EVENTS, 7)
        self.untold = Untold(TreeReader(self.memory.segment), self.ranks, Column(self.memory.segment, 0))

    def set(self, word: int, value: int) -> None:
        self.ranks.set(0, word, value)

    def note(self, key: bytes = KEY) -> None:
        route: Any = SimpleNamespace(basis=(key, -1), rank=0, dp_rank=0, upstream=SimpleNamespace(worker_idx=0, dp_size=self.dp_size))
        self.untold.note(route)

    def look(self, times: int = TICKS_BEHIND_EVENTS) -> int:
        """So many ticks; answers that are counted by now."""
        for _ in range(times):
            self.untold.look()
        return self.memory.worker_word(0, c.W_PARITY_UNTOLD)


def test_what_later_events_do_not_bring_is_counted_once_and_not_before() -> None:
    house = House()
    house.note()
    assert house.look(10) == 0, "index may be behind"
    house.set(c.R_EVENTS, 8)
    assert house.look(TICKS_BEHIND_EVENTS - 1) == 0, "of one round only a part may have been seen"
    assert house.look(1) == 1
    assert house.look(10) == 1
    assert not house.untold.waiting


@pytest.mark.parametrize("ticks_before", [0, 2, 2 + TICKS_BEHIND_EVENTS - 1])
def test_what_comes_late_is_not_counted(ticks_before: int) -> None:
    house = House()
    house.note()
    house.look(min(ticks_before, 2))
    house.set(c.R_EVENTS, 8)
    house.look(max(ticks_before - 2, 0))
    house.tree.store(0, 0, KEY)
    assert house.look() == 0
    assert not house.untold.waiting


@pytest.mark.parametrize(("dp_size", "counted"), [(1, 1), (2, 0)])
def test_another_worker_that_has_it_is_no_excuse_but_another_rank_of_the_same(dp_size: int, counted: int) -> None:
    house = House(dp_size)
    house.tree.store(1, 0, KEY)
    house.note()
    house.set(c.R_EVENTS, 8)
    assert house.look() == counted


@pytest.mark.parametrize(
    "change",
    [
        lambda house: house.set(c.R_STATE, c.RANK_SYNCING),
        lambda house: house.set(c.R_STATE, c.RANK_DEGRADED),
        lambda house: house.set(c.R_GENERATION, 3),
        lambda house: house.set(c.R_STREAM, 3),
        lambda house: house.set(c.R_RESTARTS, 1),
        lambda house: house.set(c.R_EVENTS, 6),
        lambda house: house.set(c.R_BLOCKS_REMOVED, 26),
    ],
    ids=[
        "events are fetched again",
        "events are known to be lost",
        "another worker",
        "another process of it",
        "its engine was restarted",
        "another index",
        "a quarter of the cache went",
    ],
)
def test_what_explains_the_absence_ends_the_wait(change: Callable[[House], None]) -> None:
    house = House()
    house.note()
    house.set(c.R_EVENTS, 8)
    change(house)
    assert house.look() == 0
    assert not house.untold.waiting


def test_a_few_blocks_that_were_dropped_explain_nothing() -> None:
    house = House()
    house.note()
    house.set(c.R_EVENTS, 8)
    house.set(c.R_BLOCKS_REMOVED, 25)
    assert house.look() == 1


def test_without_later_events_the_wait_ends_some_time() -> None:
    house = House()
    house.note()
    house.look(MOST_TICKS - 1)
    assert len(house.untold.waiting) == 1
    assert house.look(1) == 0
    assert not house.untold.waiting


def test_who_waits_is_bounded() -> None:
    house = House()
    for _ in range(MOST_WAITING + 10):
        house.note()
    assert len(house.untold.waiting) == MOST_WAITING


def test_nothing_is_waited_for_where_nothing_could_come() -> None:
    house = House()
    house.note(b"")
    house.set(c.R_STATE, c.RANK_SYNCING)
    house.note()
    assert not house.untold.waiting
