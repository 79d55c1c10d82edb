"""A rank that is cleared in turns: hidden from the first on, whole again for its next blocks, and ended by a successor."""

import mmap
from array import array

import pytest

from sglfast._hashtree import TreeReader, TreeWriter
from sglfast._segment import Segment, segment_bytes

SIZES = {"max_workers": 1, "max_ranks": 128, "max_shards": 1, "capacity_blocks": 4096}
RANK, OTHER, THIRD = 70, 3, 71
ALL = array("Q", range(1, 1001)).tobytes()
HALF = ALL[: 8 * 500]


class Tree:
    """RANK owns a thousand blocks, OTHER the first half of them."""

    def __init__(self) -> None:
        self.segment = Segment.format(mmap.mmap(-1, segment_bytes(**SIZES)), **SIZES)
        self.writer, self.reader = TreeWriter(self.segment), TreeReader(self.segment)
        self.writer.store(RANK, 0, ALL)
        self.writer.store(OTHER, 1, HALF)

    def overlaps(self, keys: bytes = ALL) -> dict[int, int]:
        self.reader.match(keys)
        return dict(self.reader.hits())


@pytest.fixture
def tree() -> Tree:
    return Tree()


def test_it_is_no_owner_from_the_first_turn_on(tree: Tree) -> None:
    assert tree.overlaps() == {RANK: 1000, OTHER: 500}
    left = 1000
    while True:
        gone, is_done = tree.writer.clear_some(RANK, 300)
        left -= gone
        assert tree.overlaps() == {OTHER: 500}
        assert tree.writer.owned_blocks(RANK) == left
        assert is_done == (left == 0)
        if is_done:
            break
        assert tree.writer.store(THIRD, 0, ALL[: 8 * left]) >= 0
        assert tree.overlaps() == {OTHER: 500, THIRD: left}, "others are written and found meanwhile"
        tree.writer.clear(THIRD)
    assert tree.reader.stats()["live_blocks"] == 500
    assert tree.writer.clear_some(RANK, 300) == (0, True)
    tree.writer.store(RANK, 2, ALL[: 8 * 7])
    assert tree.overlaps() == {RANK: 7, OTHER: 500}


def test_what_one_turn_clears_is_never_hidden(tree: Tree) -> None:
    assert tree.writer.clear_some(RANK, 1000) == (1000, True)
    tree.writer.store(RANK, 0, HALF)
    assert tree.overlaps() == {RANK: 500, OTHER: 500}
    assert tree.writer.clear(RANK) == 500


def test_hidden_at_once_and_cleared_later(tree: Tree) -> None:
    tree.writer.hide(RANK)
    assert tree.overlaps() == {OTHER: 500}
    assert tree.writer.owned_blocks(RANK) == 1000
    tree.writer.hide(RANK)
    assert tree.writer.clear(RANK) == 1000
    tree.writer.store(RANK, 0, HALF)
    assert tree.overlaps() == {RANK: 500, OTHER: 500}
    tree.writer.hide(THIRD)
    assert tree.writer.clear_some(THIRD, 1) == (0, True), "a rank that has nothing"
    tree.writer.store(THIRD, 0, HALF)
    assert tree.overlaps()[THIRD] == 500


def test_blocks_that_are_gone_already_are_not_waited_for(tree: Tree) -> None:
    tree.writer.remove(RANK, 7, ALL[8 * 10 :])
    assert tree.writer.clear_some(RANK, 995) == (5, False)
    assert tree.writer.clear_some(RANK, 995) == (5, True)
    tree.writer.store(RANK, 0, HALF)
    tree.writer.remove(RANK, 7, HALF)
    assert tree.writer.clear_some(RANK, 10) == (0, True)


def test_eviction_between_the_turns(tree: Tree) -> None:
    """What makes room may be of the rank that is being cleared; what it has left behind in the order of ages is passed by."""
    tree.writer.clear_some(RANK, 300)
    fresh = array("Q", range(10_000, 14_096)).tobytes()
    tree.writer.store(THIRD, 0, fresh)
    assert tree.overlaps(fresh) == {THIRD: 4096}
    assert tree.writer.owned_blocks(RANK) == tree.writer.owned_blocks(OTHER) == 0
    assert tree.writer.clear_some(RANK, 300)[0] == 0
    tree.writer.clear(RANK)
    tree.writer.store(RANK, 0, ALL)
    assert tree.overlaps() == {RANK: 1000}
    assert tree.reader.stats()["live_blocks"] == 4096


def test_a_successor_ends_what_was_begun(tree: Tree) -> None:
    tree.writer.clear_some(RANK, 300)
    successor = TreeWriter(tree.segment)
    assert successor.adopt() == 500
    assert successor.owned_blocks(RANK) == 0
    successor.store(RANK, 0, HALF)
    assert tree.overlaps() == {RANK: 500, OTHER: 500}
    successor.hide(RANK)
    successor.reset()
    successor.store(RANK, 0, HALF)
    assert tree.overlaps() == {RANK: 500}
