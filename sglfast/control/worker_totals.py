"""A worker's counters, counted from when it got its slot.

Runs in: control. Theory: a word of a shard's column is written by that shard alone, so the counters of a slot are never set back; what
    they held when the slot was given to its present worker is subtracted instead. Gauges begin at 0 by themselves: a slot is given
    out again only when no shard has a request or a connection there (membership).
"""

from sglfast._counters import GAUGES_WORKER, Totals
from sglfast._segment import Segment


class WorkerTotals:
    """Reads like `Totals.worker`. `begin` when a worker gets its slot."""

    def __init__(self, segment: Segment) -> None:
        self._totals = Totals(segment)
        self._base: dict[int, list[int]] = {}

    def begin(self, worker_idx: int) -> None:
        """Count this slot from now on."""
        now = self._totals.worker(worker_idx)
        self._base[worker_idx] = [0 if word in GAUGES_WORKER else value for word, value in enumerate(now)]

    def of(self, worker_idx: int) -> list[int]:
        """The words of a worker, summed over all shards: a list of SF_WORKER_WORDS integers."""
        now = self._totals.worker(worker_idx)
        base = self._base.get(worker_idx)
        return now if base is None else [value - before for value, before in zip(now, base, strict=True)]
