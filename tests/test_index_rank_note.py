"""The note in a rank's row: what is written comes back, and what was not told is not taken for told."""

import logging
import mmap

import pytest

from sglfast import _counters as words
from sglfast._counters import RankTable
from sglfast._hashtree import TreeWriter
from sglfast._segment import Segment, segment_bytes
from sglfast.index.rank import RankIndex, TreeLock
from sglfast.index.rank_note import Noted, RankNote, noted
from sglfast.index.sink import Resume
from sglfast.index.token_route import UNTOLD_GROUP

RANK, IDENTITY = 5, 0xABC
SIZES = {"max_workers": 1, "max_ranks": 64, "max_shards": 1, "capacity_blocks": 1024}


@pytest.mark.parametrize("n_blocks", [0, 3])
@pytest.mark.parametrize("main_group", [UNTOLD_GROUP, 0, 2])
def test_what_is_noted_is_found_by_the_same_stream_only(main_group: int, n_blocks: int) -> None:
    segment = Segment.format(mmap.mmap(-1, segment_bytes(**SIZES)), **SIZES)
    ranks, tree = RankTable(segment), TreeLock(TreeWriter(segment))
    index = RankIndex(
        tree, RANK, block_size=4, is_bigram=False, log=logging.LoggerAdapter(logging.getLogger("test.note"), {}), main_group=main_group
    )
    note = RankNote(ranks, index, IDENTITY)
    assert noted(ranks.row(RANK), IDENTITY) is None
    note.save(Resume(7, 99, 4))
    ranks.set(RANK, words.R_MAPPED_BLOCKS, n_blocks)
    # Nobody has counted a block of group 0 where there is none: it may be another one yet.
    expected = UNTOLD_GROUP if main_group < 1 and not n_blocks else max(main_group, 0)
    assert noted(ranks.row(RANK), IDENTITY) == Noted(Resume(7, 99, 4), n_blocks, expected)
    assert noted(ranks.row(RANK), IDENTITY + 1) is None
    note.unsave()
    assert noted(ranks.row(RANK), IDENTITY) is None
