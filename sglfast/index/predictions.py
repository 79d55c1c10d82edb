"""Predictions, the index's half: drains the shards' rings into the table that all shards read.

Runs in: index, one thread of its own. It sleeps until a shard rings; while requests come it looks once in a millisecond, so that a
    burst costs a few wakings and not one a request. Contract: a record counts only for the worker that has the rank now, so rings are
    not read before `ready`, when all ranks have their workers; a rank that is given up is forgotten before its number is used
    again. Ranks without events keep what they were sent until it is the oldest of more than `worker_blocks`, or the table needs
    the place; what index finds in the table when it starts goes on for those.
"""

import logging
import threading
import time
from collections.abc import Collection

from sglfast._predicted import PredictionWriter
from sglfast._segment import Segment

_IDLE_MS = 1000
_NAP_US = 1000
_TRIM_S = 10.0


class PredictionKeeper:
    """The process's only PredictionWriter and its thread. keeps_all: no rank's prompts are looked up by events."""

    def __init__(self, segment: Segment, worker_blocks: int, log: logging.Logger, *, keeps_all: bool = False) -> None:
        self._writer = PredictionWriter(segment)
        self._worker_blocks = worker_blocks
        self._keeps_all = keeps_all
        self._log = log
        self._lock = threading.Lock()  # of the writer
        self._n_ranks = segment.max_ranks
        self._inherited: set[int] = set()
        self._keeping: set[int] = set()  # ranks of which nothing else is known
        self._is_ready = False
        self._is_stopped = False
        self._thread = threading.Thread(target=self._run, name="predictions", daemon=True)

    def own(self, rank_base: int, n_ranks: int, generation: int, *, has_events: bool, was_there: bool) -> None:
        """Ranks belong to this generation of a worker. was_there: they did so before this process began."""
        ranks = range(rank_base, rank_base + n_ranks)
        with self._lock:
            for rank in ranks:
                self._writer.own(rank, generation)
        if self._keeps_all or not has_events:
            self._keeping.update(ranks)
            if was_there:
                self._inherited.update(ranks)

    def ready(self) -> None:
        """All workers of the first look are owned: begin to drain. Whatever the process before this one knew of others is forgotten."""
        if not self._is_ready:
            self._is_ready = True
            self._writer.clear(set(range(self._n_ranks)) - self._inherited)
            self._thread.start()

    def disown(self, ranks: Collection[int]) -> None:
        """Ranks belong to nobody, and nothing is known of them."""
        self._keeping.difference_update(ranks)
        with self._lock:
            for rank in ranks:
                self._writer.own(rank, 0)
            self._writer.clear(ranks)

    def close(self, timeout_s: float) -> bool:
        """End the thread; whether it did in time."""
        self._is_stopped = True
        if self._is_ready:
            self._writer.wake()
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        nap_us, trim_at_s = 0, time.monotonic() + _TRIM_S
        while not self._is_stopped:
            self._writer.wait(_IDLE_MS, nap_us)
            try:
                with self._lock:
                    nap_us = _NAP_US if self._writer.drain() else 0
                    if time.monotonic() >= trim_at_s:
                        trim_at_s = time.monotonic() + _TRIM_S
                        if self._keeping:
                            self._writer.trim(self._worker_blocks)
            except MemoryError:
                self._log.error("there is no memory to trim what workers without KV events were sent")
