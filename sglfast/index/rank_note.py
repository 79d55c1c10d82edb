"""What a rank's row in shared memory tells the next index process: whose its blocks are, and how far they are.

Runs in: index; a note is written by the rank's thread, and read by `main` when it has taken over the tree of a process that was killed.
Contract: the number of the next batch is the last word written and the first one taken back, so a note that is there is whole. It is
    written behind the blocks: a process that dies in between leaves a tree that is ahead, and applying batches again, in order,
    does no harm. For that the token route's map must still have what those batches removed: hence `RankIndex.settle` behind
    each note, and not before.
"""

from dataclasses import dataclass

from sglfast import _counters as words
from sglfast._counters import RankTable
from sglfast.index.rank import RankIndex
from sglfast.index.sink import Resume
from sglfast.index.token_route import UNTOLD_GROUP


@dataclass(frozen=True, slots=True)
class Noted:
    """A note that was found. resume: for the stream; mapped_blocks, main_group: as RankIndex has them."""

    resume: Resume
    mapped_blocks: int
    main_group: int


def noted(row: list[int], identity: int) -> Noted | None:
    """The note in a row of the rank table; None when there is none, or one of another stream."""
    if row[words.R_STREAM] != identity or not row[words.R_NEXT_SEQ]:
        return None
    resume = Resume(row[words.R_NEXT_SEQ] - 1, row[words.R_LAST_PRINT], row[words.R_LOSS])
    # 0 is what was told, or nothing was; the blocks that are there are of that one in any case.
    main_group = row[words.R_MAIN_GROUP] if row[words.R_MAIN_GROUP] or row[words.R_MAPPED_BLOCKS] else UNTOLD_GROUP
    return Noted(resume, row[words.R_MAPPED_BLOCKS], main_group)


class RankNote:
    """The note of a rank. identity: what makes its stream the one that it is, 64 bits; 0 = nobody may go on with it."""

    def __init__(self, ranks: RankTable, index: RankIndex, identity: int) -> None:
        self._ranks = ranks
        self._index = index
        self._saved: Resume | None = None
        ranks.set(index.rank, words.R_STREAM, identity)

    def save(self, resume: Resume | None) -> None:
        """The blocks are as the stream says; None = nothing is known of it. Cheap when nothing has changed."""
        if resume == self._saved:
            return
        ranks, index, rank = self._ranks, self._index, self._index.rank
        self.unsave()
        if resume is not None:
            ranks.set(rank, words.R_MAPPED_BLOCKS, index.mapped_blocks)
            ranks.set(rank, words.R_MAIN_GROUP, max(index.main_group, 0))
            ranks.set(rank, words.R_LAST_PRINT, resume.last_print)
            ranks.set(rank, words.R_LOSS, resume.loss)
            ranks.set(rank, words.R_NEXT_SEQ, resume.next_seq + 1)
        self._saved = resume
        index.settle()

    def unsave(self) -> None:
        """What is done next cannot be gone on from."""
        self._ranks.set(self._index.rank, words.R_NEXT_SEQ, 0)
        self._saved = None
