"""Workers that refuse a data-parallel rank which they should have are asked at once what they are.

Runs in: control, ten times a second, for workers that can be told a rank. Why: an engine that is started again with fewer ranks fails no
    health check on the way, if it is quick, and without KV events nobody notices. Shards do, by its answers (edge/rank_refusal.py), and
    count them; here the count is looked at.
Contract: a worker is asked no more than once in PAUSE_S, however many requests it refuses; shards tell it no rank until it has answered.
"""

import asyncio
import logging
from collections.abc import Callable

from sglfast import _counters as words
from sglfast._counters import Totals
from sglfast._segment import Segment
from sglfast.control.workers import Workers

_PERIOD_S = 0.1
PAUSE_S = 1.0


class RankWatch:
    """`run` until cancelled. ask_again: asks the worker in this slot (PoolWatch.ask_again)."""

    def __init__(self, segment: Segment, workers: Workers, ask_again: Callable[[int], None], log: logging.Logger) -> None:
        self._totals = Totals(segment)
        self._workers = workers
        self._ask_again = ask_again
        self._log = log
        self._seen: dict[tuple[int, int], int] = {}  # (slot, generation) -> refusals that it was asked for
        self._not_before_s: dict[tuple[int, int], float] = {}

    async def run(self) -> None:
        """Look, again and again."""
        loop = asyncio.get_running_loop()
        while True:
            self.look(loop.time())
            await asyncio.sleep(_PERIOD_S)

    def look(self, now_s: float) -> None:
        """Ask those workers that have refused a rank since they were asked last. now_s: monotonic."""
        seen, self._seen = self._seen, {}
        not_before_s, self._not_before_s = self._not_before_s, {}
        for view in self._workers.views:
            key = view.worker_idx, view.generation
            if not view.record.rank_ways and key not in seen:
                continue  # a worker that has only one rank for a while is still asked: shards wait for that
            refusals = self._totals.worker(view.worker_idx)[words.W_RANK_REFUSED]
            asked_for = seen.get(key, refusals)  # what a slot has counted before is its former worker's
            if refusals != asked_for and now_s >= not_before_s.get(key, 0.0):
                self._not_before_s[key] = now_s + PAUSE_S
                asked_for = refusals
                self._log.warning(
                    "worker refuses a data-parallel rank: it is asked what it is", extra={"fields": {"worker": view.record.url}}
                )
                self._ask_again(view.worker_idx)
            elif key in not_before_s:
                self._not_before_s[key] = not_before_s[key]
            self._seen[key] = asked_for
