"""What a worker had in its cache and no event had told: does the event come after all?

Runs in: shards; `note` at the end of an answer that reports more than was predicted, `look` at each tick while something waits.
Theory: a block that an answer found in the cache was stored, and its event published, before that request began. Events come in
    order; so when later ones of the rank have been applied and the block is still nobody's under the key that we make, it was either
    never told or has another key. At the end of the answer that is not known yet: index may be behind, for as long as a busy machine
    keeps it. Contract: what waits is bounded in number and time; whatever else could explain the absence (the rank is not
    EXACT, its worker has changed, much of its cache was dropped meanwhile) ends the wait without a count. Judged in control/parity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sglfast import _counters as words

if TYPE_CHECKING:
    from sglfast._counters import Column, RankTable
    from sglfast._hashtree import TreeReader
    from sglfast.edge.pools import Route

MOST_WAITING = 64
# Ticks of a tenth of a second: what one round of events brings is applied within far less.
TICKS_BEHIND_EVENTS = 3
MOST_TICKS = 100
_DROPPED_SHARE = 4  # one in so many blocks


@dataclass(slots=True)
class _Missing:
    """key: of the block; ranks: all of its worker's; process, events, removed_blocks: words of its rank's row at the answer.

    process: what tells one engine process's events from another's.
    """

    key: bytes
    rank: int
    ranks: range
    worker_idx: int
    process: tuple[int, int, int]
    events: int
    removed_blocks: int
    ticks_left: int = TICKS_BEHIND_EVENTS
    age_ticks: int = 0


class Untold:
    """The blocks of one shard's answers that are waited for."""

    def __init__(self, tree: TreeReader, ranks: RankTable, column: Column) -> None:
        self._tree = tree
        self._ranks = ranks
        self._column = column
        self.waiting: list[_Missing] = []

    def note(self, route: Route) -> None:
        """An answer found more in the cache than was predicted, and the first block behind the predicted ones is still missing."""
        key = route.basis[0]
        row = self._ranks.row(route.rank)
        if not key or row[words.R_STATE] != words.RANK_EXACT or len(self.waiting) >= MOST_WAITING:
            return
        self.waiting.append(
            _Missing(
                key,
                route.rank,
                range(route.rank - route.dp_rank, route.rank - route.dp_rank + max(route.upstream.dp_size, 1)),
                route.upstream.worker_idx,
                _process_of(row),
                row[words.R_EVENTS],
                row[words.R_BLOCKS_REMOVED],
            )
        )

    def look(self) -> None:
        """Count what has not come by now and will not, forget what has."""
        self.waiting = [missing for missing in self.waiting if self._is_waited_for(missing)]

    def _is_waited_for(self, missing: _Missing) -> bool:
        row = self._ranks.row(missing.rank)
        # Fewer events: another index process counts them anew.
        if row[words.R_STATE] != words.RANK_EXACT or _process_of(row) != missing.process or row[words.R_EVENTS] < missing.events:
            return False
        # An engine that takes no notice of the rank that it is told finds other ranks' blocks.
        if self._tree.match(missing.key) and any(rank in missing.ranks for rank, _ in self._tree.hits()):
            return False
        if row[words.R_EVENTS] == missing.events:
            missing.age_ticks += 1
            return missing.age_ticks < MOST_TICKS
        missing.ticks_left -= 1
        if missing.ticks_left:
            return True
        removed_blocks = row[words.R_BLOCKS_REMOVED] - missing.removed_blocks
        if removed_blocks * _DROPPED_SHARE <= row[words.R_OWNED_BLOCKS]:
            self._column.add_worker(missing.worker_idx, words.W_PARITY_UNTOLD)
        return False


def _process_of(row: list[int]) -> tuple[int, int, int]:
    return row[words.R_GENERATION], row[words.R_STREAM], row[words.R_RESTARTS]
