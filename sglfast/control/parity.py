"""The parity loop, control's half: does the KV index predict what workers report? If not, say so and why.

Runs in: control, once a second. Theory: a prediction and the engine's own `cached_tokens` differ for a moment when requests overtake
    events, and always when the router's picture is wrong. So a worker is distrusted when most of its last samples differ, and trusted
    again when few do. Contract: `ParityJudge` is pure; a change of verdict is written into the worker table (shards say DEGRADED in
    `x-sglfast-kv`) and logged once, with its likeliest cause. Where blocks show that a worker keys single tokens although it speculates
    with EAGLE (hybrid models do), or the other way, its blocks are believed.
"""

import asyncio
import logging
from collections import deque
from dataclasses import dataclass

from sglfast import _counters as words
from sglfast._counters import RankTable
from sglfast._segment import Segment
from sglfast.control.worker_totals import WorkerTotals
from sglfast.control.workers import Workers
from sglfast.shm import PARITY_HIGH, PARITY_LOW, PARITY_OK, REASON_PAIRS, REASON_SINGLES, WorkerView

WINDOW_SAMPLES = 50
LEAST_SAMPLES = 8  # so that 50 requests over a small pool are enough
_DISTRUST_SHARE, _TRUST_SHARE = 0.6, 0.2
_PERIOD_S = 1.0


@dataclass(slots=True)
class Counts:
    """Samples of a worker since its start: right, predicted too much, predicted too little."""

    exact: int = 0
    high: int = 0
    low: int = 0


class ParityJudge:
    """One worker's verdict over about its last WINDOW_SAMPLES samples."""

    def __init__(self) -> None:
        self.verdict = PARITY_OK
        self._seen = Counts()
        self._window: deque[Counts] = deque()

    def feed(self, totals: Counts) -> int:
        """Take the counters as they are now; returns the verdict, one of shm.PARITY_*."""
        delta = Counts(totals.exact - self._seen.exact, totals.high - self._seen.high, totals.low - self._seen.low)
        self._seen = Counts(totals.exact, totals.high, totals.low)
        if delta.exact + delta.high + delta.low > 0:
            self._window.append(delta)
        while len(self._window) > 1 and _size(self._window) - _size([self._window[0]]) >= WINDOW_SAMPLES:
            self._window.popleft()
        samples = _size(self._window)
        high = sum(counts.high for counts in self._window)
        low = sum(counts.low for counts in self._window)
        if samples < LEAST_SAMPLES:
            return self.verdict
        if high + low >= _DISTRUST_SHARE * samples:
            self.verdict = PARITY_HIGH if high > low else PARITY_LOW
        elif high + low <= _TRUST_SHARE * samples:
            self.verdict = PARITY_OK
        return self.verdict


def _size(window: "deque[Counts] | list[Counts]") -> int:
    return sum(counts.exact + counts.high + counts.low for counts in window)


def likely_cause(verdict: int, lost_events: int, dp_size: int = 1) -> str:
    """What an operator should look at. lost_events: gaps, give-ups and undecoded events of the worker's ranks; dp_size: how many ranks."""
    if verdict == PARITY_HIGH:
        if lost_events:
            return "KV events that removed blocks were lost"
        if dp_size > 1:
            return f"the worker spreads requests over its {dp_size} data-parallel ranks itself, also to ranks that do not hold the prompt"
        return "the worker dropped blocks without an event, or prompts with other salts or adapters are taken for the same"
    if lost_events:
        return "KV events that stored blocks were lost"
    return "the router's prompts differ from the worker's: compare --tokenizer-path and its chat template with the worker's model"


class ParityWatch:
    """Judges all workers. `run` until cancelled."""

    def __init__(self, segment: Segment, workers: Workers, log: logging.Logger, totals: WorkerTotals | None = None) -> None:
        self._totals = totals or WorkerTotals(segment)
        self._ranks = RankTable(segment)
        self._workers = workers
        self._log = log
        self._judges: dict[tuple[int, int], ParityJudge] = {}  # (slot, generation)

    async def run(self) -> None:
        """Look once a second."""
        while True:
            await asyncio.sleep(_PERIOD_S)
            self.look()

    def look(self) -> None:
        """Judge every worker that publishes events, and tell what changed."""
        judges, self._judges = self._judges, {}
        for view in self._workers.views:
            key = (view.worker_idx, view.generation)
            judge = self._judges[key] = judges.get(key) or ParityJudge()
            if not view.block_size:
                continue
            self._look_at_pairs(view)
            totals = self._totals.of(view.worker_idx)
            verdict = judge.feed(Counts(totals[words.W_PARITY_EXACT], totals[words.W_PARITY_HIGH], totals[words.W_PARITY_LOW]))
            if verdict == view.parity:
                continue
            self._workers.set_parity(view.worker_idx, verdict)
            fields = {"worker": view.record.url}
            if verdict == PARITY_OK:
                self._log.info("KV predictions agree with the worker again", extra={"fields": fields})
                continue
            rows = [self._ranks.row(view.rank_base + rank) for rank in range(view.dp_size)]
            lost = sum(row[words.R_GAPS] + row[words.R_GIVE_UPS] + row[words.R_UNDECODED] for row in rows)
            how = "more" if verdict == PARITY_HIGH else "less"
            self._log.warning(
                f"KV predictions do not agree with the worker: {how} was predicted than it reports as cached",
                extra={"fields": fields | {"cause": likely_cause(verdict, lost, view.dp_size)}},
            )

    def _look_at_pairs(self, view: WorkerView) -> None:
        """Correct what the worker says of pairs of tokens by what index found in its blocks."""
        for rank in range(view.rank_base, view.rank_base + view.dp_size):
            reason = self._ranks.get(rank, words.R_REASON)
            if reason in (REASON_PAIRS, REASON_SINGLES) and self._ranks.get(rank, words.R_GENERATION) == view.generation:
                if self._workers.set_pairs(view.worker_idx, reason == REASON_PAIRS):
                    units = "pairs of tokens" if reason == REASON_PAIRS else "single tokens"
                    self._log.info(
                        f"its blocks are keyed by {units}, other than it says: so they are looked up",
                        extra={"fields": {"worker": view.record.url}},
                    )
                return
