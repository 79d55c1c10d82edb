"""A worker that refuses the data-parallel rank that it was told: it has come back with fewer ranks, and control has not heard of it yet.

Runs in: shards, event loop; only for requests that were told a rank, when they are answered with 400 or a stream. Theory: the rank is
    ours, so its refusal is none of the client's business. The request is sent to the same worker again without it, the worker is
    told no rank any more, and control is asked, by a counter, to find out what it is now (control/rank_watch.py). When it has, the
    worker's record says so (`ranks_asked`), and ranks are named again, those that there are. So they are when the record tells
    anything else of its ranks, or the worker was not to be steered in between: what was doubted is gone.
Contract: a client's own 400 may speak of ranks, too. What that costs is bounded: a worker in doubt is told no rank, so there is nothing to
    refuse; if nothing was wrong with its ranks, refusals are not heeded for a pause that doubles each time. No request is sent
    again twice for this.
Engines: SGLang and vLLM answer 400 and name the rank (`routed_dp_rank=5 out of range [0, 4)`, `data_parallel_rank 5 is out of range`).
    SGLang 0.5.18 and later refuses the rank of a streamed /generate, which is told in the body, by the first event of a stream with
    status 200. That request is lost: its head has gone to the client. The worker is in doubt all the same.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from sglfast import _counters

if TYPE_CHECKING:
    from sglfast.edge.pools import Route
    from sglfast.edge.shard import Shard
    from sglfast.shm import WorkerView

REFUSED = 400
# Not any rank: a tensor has one, and a model may be a reranker.
_RANK = re.compile(rb"(?:dp|parallel)[ _-]rank", re.IGNORECASE)
_ERROR_EVENT = b'data: {"error"'
_EVENT_PLACE_BYTES = 32  # the size of a chunk is in front
_FIRST_PAUSE_S, _LAST_PAUSE_S = 1.0, 60.0
# What stands for "no way" in the place of a worker's ways: it is one of those that are steered, and is told no rank.
_NONE = b""


class RankDoubt:
    """Whether a worker has the ranks that its record says, as one shard sees it."""

    __slots__ = ("_at", "_heeds_from_s", "_pause_s")

    def __init__(self) -> None:
        self._at: WorkerView | None = None  # as it was known when it refused one; None = it has not
        self._pause_s = 0.0
        self._heeds_from_s = 0.0

    def heeds(self, now_s: float) -> bool:
        """Whether a refusal would be believed. While it is in doubt, too: requests that had been told a rank are on their way still."""
        return self._at is not None or now_s >= self._heeds_from_s

    def begin(self, worker: WorkerView) -> None:
        """It has refused a rank. worker: what is known of it."""
        if self._at is None:
            self._at = worker

    def end(self) -> None:
        """It is told no rank anyway."""
        self._at = None

    def ways(self, worker: WorkerView, now_s: float) -> bytes:
        """How the worker is told ranks, by its record: not at all before that says something new."""
        if self._at is not None:
            record, known = worker.record, self._at.record
            is_same = worker.dp_size == self._at.dp_size and record.rank_ways == known.rank_ways
            if is_same and record.ranks_asked == known.ranks_asked:
                return _NONE
            self._at = None
            self._pause_s = min(_LAST_PAUSE_S, max(_FIRST_PAUSE_S, 2 * self._pause_s)) if is_same else 0.0
            self._heeds_from_s = now_s + self._pause_s
        return worker.record.rank_ways.encode()


def is_about_rank(body: bytes) -> bool:
    """Whether the body of a refusal speaks of data-parallel ranks. body: as it came, framing included."""
    return _RANK.search(body) is not None


def refuses_in_stream(piece: bytes) -> bool:
    """Whether a stream begins with an error that speaks of ranks. piece: the first of its body, framing included."""
    return _ERROR_EVENT in piece[:_EVENT_PLACE_BYTES] and is_about_rank(piece)


def doubt_rank(shard: Shard, route: Route, dp_rank: int) -> None:
    """The route's worker has refused this rank of its own."""
    upstream = route.upstream
    shard.column.add_worker(upstream.worker_idx, _counters.W_RANK_REFUSED)
    worker = next((view for view in route.pool.workers if view.worker_idx == upstream.worker_idx), None)
    if worker is None or upstream.is_removed or dp_rank >= upstream.dp_size:
        return  # what there is to know is known by now
    upstream.doubt.begin(worker)
    upstream.rank_ways = _NONE
