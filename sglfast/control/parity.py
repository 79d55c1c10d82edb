"""The parity loop, control's half: does the KV index predict what workers report? If not, say so and why.

Runs in: control, some times a second. Theory: a prediction and the engine's own `cached_tokens` differ for a moment when requests overtake
    events or wait while others change the cache (edge/route: is_overtaken), and always when the router's picture is wrong. So a worker
    is distrusted when most of its last samples differ, and trusted again when few do. Of one that keeps a part of its stores to itself
    only some do, since its conversations go where they are known: there a few blocks that were cached and that no event
    has told, not even afterwards (edge/untold), are enough. A fault of the router itself (a wrong template)
    shows at all of a model's workers at once: those with too few samples for a verdict of their own are judged together (`judge_pool`).
    Contract: `ParityJudge` and `judge_pool` are pure; a change of verdict
    is written into the worker table (shards say DEGRADED in `x-sglfast-kv`) and logged once, with its likeliest cause
    (control/parity_cause), which is also the reason in metrics and /workers (control/kv_state).
    Where blocks show that a worker keys single tokens although it speculates with EAGLE (hybrid models do), or the other way, its blocks
    are believed.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from sglfast import _counters as words
from sglfast._counters import RANK_DEGRADED, RankTable
from sglfast._hashtree import TreeReader
from sglfast._segment import Segment
from sglfast.control.kv_state import rank_states
from sglfast.control.parity_cause import Counts, Evidence, likely_cause
from sglfast.control.worker_totals import WorkerTotals
from sglfast.control.workers import Workers
from sglfast.shm import PARITY_HIGH, PARITY_LOW, PARITY_OK, REASON_PAIRS, REASON_SINGLES, WorkerView

WINDOW_SAMPLES = 50
WINDOW_LOOKS = 20  # at least, so that a moment of many requests is not all there is to judge by
LEAST_SAMPLES = 8  # of one worker
# Of several together, so that 50 requests are enough also over many workers; none counts for more than LEAST_SAMPLES.
LEAST_POOL_SAMPLES = 12
_LEAST_OWN_SAMPLES = 2  # before a worker is judged by its pool
_DISTRUST_SHARE, _TRUST_SHARE = 0.6, 0.2
# Blocks that no event has told are no matter of chance and of moments (edge/untold): of an honest worker there are none, whatever its load.
_LEAST_UNTOLD, _UNTOLD_SHARE, _TOLD_SHARE = 4, 0.1, 0.05
_NOTHING = Counts()
# So that a fault is named within some 50 requests also at 100 and more a second; many workers are looked at more seldom.
_LEAST_PERIOD_S, _PERIOD_A_WORKER_S, _MOST_PERIOD_S = 0.05, 0.002, 1.0


class Blocks(NamedTuple):
    """stored: blocks that a worker has published; overlap: those that its prompts were predicted to find."""

    stored: int = 0
    overlap: int = 0


_NO_BLOCKS = Blocks()


class ParityJudge:
    """One worker's verdict over about its last WINDOW_SAMPLES samples, or those of WINDOW_LOOKS looks if they are more.

    counts: sums of the window.
    """

    def __init__(self) -> None:
        self.verdict = PARITY_OK
        self.is_told = False  # that the worker reports nothing
        self.counts = Counts()
        self._seen = Counts()
        self._blocks = _NO_BLOCKS
        self._window: deque[tuple[Counts, Blocks]] = deque()  # samples of a look, and what was before it

    @property
    def before(self) -> Blocks:
        """The worker's blocks when the window began."""
        return self._window[0][1] if self._window else _NO_BLOCKS

    def feed(self, totals: Counts, blocks: Blocks = _NO_BLOCKS) -> int:
        """Take the counters and the worker's blocks as they are now; returns the verdict, one of shm.PARITY_*."""
        news, self._seen = totals.minus(self._seen), totals
        if news != _NOTHING:
            self._window.append((news, self._blocks))
            self.counts = self.counts.plus(news)
        self._blocks = blocks
        while len(self._window) > WINDOW_LOOKS and self.counts.samples - self._window[0][0].samples >= WINDOW_SAMPLES:
            self.counts = self.counts.minus(self._window.popleft()[0])
        if self.counts.samples >= LEAST_SAMPLES:
            self.verdict = _judged(self.counts, self.verdict)
        return self.verdict


def judge_pool(judges: Sequence[ParityJudge]) -> None:
    """Give those judges of one model's workers a verdict that have too few samples of their own, by what all of them have seen."""
    seen = Counts()
    for judge in judges:
        # What one worker has long shown says little of the others.
        seen = seen.plus(judge.counts, LEAST_SAMPLES / max(judge.counts.samples, LEAST_SAMPLES))
    if seen.samples < LEAST_POOL_SAMPLES:
        return
    for judge in judges:
        if not _LEAST_OWN_SAMPLES <= judge.counts.samples < LEAST_SAMPLES:
            continue
        verdict = _judged(seen, judge.verdict)
        # One that is right where the others are wrong is no case of theirs.
        judge.verdict = verdict if verdict == PARITY_OK else _judged(judge.counts, judge.verdict)


def _judged(counts: Counts, before: int) -> int:
    wrong = counts.high + counts.low
    if wrong >= _DISTRUST_SHARE * counts.samples:
        return PARITY_HIGH if counts.high > counts.low else PARITY_LOW
    if counts.untold >= max(_LEAST_UNTOLD, _UNTOLD_SHARE * counts.samples):
        return PARITY_LOW
    is_good = wrong <= _TRUST_SHARE * counts.samples and counts.untold <= _TOLD_SHARE * counts.samples
    return PARITY_OK if is_good else before


class ParityWatch:
    """Judges all workers. `run` until cancelled. is_steered: whether requests tell a worker which of its ranks they are for."""

    def __init__(
        self,
        segment: Segment,
        workers: Workers,
        log: logging.Logger,
        totals: WorkerTotals | None = None,
        is_steered: Callable[[WorkerView], bool] = lambda view: False,
    ) -> None:
        self._is_steered = is_steered
        self._totals = totals or WorkerTotals(segment)
        self._ranks = RankTable(segment)
        self._tree = TreeReader(segment)
        self._workers = workers
        self._log = log
        self._judges: dict[tuple[int, int], ParityJudge] = {}  # (slot, generation)

    async def run(self) -> None:
        """Look from time to time."""
        while True:
            await asyncio.sleep(min(max(_LEAST_PERIOD_S, _PERIOD_A_WORKER_S * len(self._judges)), _MOST_PERIOD_S))
            self.look()

    def look(self) -> None:
        """Judge every worker that publishes events, and tell what changed."""
        judges, self._judges = self._judges, {}
        pools: dict[str | None, list[tuple[WorkerView, ParityJudge]]] = {}
        for view in self._workers.views:
            key = (view.worker_idx, view.generation)
            judge = self._judges[key] = judges.get(key) or ParityJudge()
            if not view.block_size:
                continue
            self._look_at_pairs(view)
            totals = self._totals.of(view.worker_idx)
            self._tell_unreported(view, judge, totals)
            judge.feed(
                Counts(
                    # A block that has come since, under the key that shards make, shows as well as a right number that keys agree.
                    totals[words.W_PARITY_EXACT] + totals[words.W_PARITY_CAME],
                    totals[words.W_PARITY_HIGH],
                    totals[words.W_PARITY_LOW],
                    totals[words.W_PARITY_UNTOLD],
                    totals[words.W_PARITY_OVER],
                ),
                self._blocks_of(view, totals),
            )
            pools.setdefault(view.record.model, []).append((view, judge))
        for pool in pools.values():
            judge_pool([judge for _, judge in pool])
            for view, judge in pool:
                self._tell_verdict(view, judge)

    def _tell_verdict(self, view: WorkerView, judge: ParityJudge) -> None:
        """Write a verdict that has changed into the worker table and the log."""
        if judge.verdict == view.parity:
            return
        fields = {"worker": view.record.url}
        if judge.verdict == PARITY_OK:
            self._workers.set_parity(view.worker_idx, judge.verdict)
            self._log.info("KV predictions agree with the worker again", extra={"fields": fields})
            return
        cause = likely_cause(judge.verdict, self._evidence(view, judge))
        self._workers.set_parity(view.worker_idx, judge.verdict, cause)
        how = "more" if judge.verdict == PARITY_HIGH else "less"
        self._log.warning(
            f"KV predictions do not agree with the worker: {how} was predicted than it reports as cached",
            extra={"fields": fields | {"cause": cause}},
        )

    def _look_at_pairs(self, view: WorkerView) -> None:
        """Correct what the worker says of pairs of tokens by what index found in its blocks."""
        for rank in range(view.rank_base, view.rank_base + view.dp_size):
            reason = self._ranks.get(rank, words.R_REASON)
            if reason in (REASON_PAIRS, REASON_SINGLES) and self._ranks.get(rank, words.R_GENERATION) == view.generation:
                if self._workers.set_pairs(view.worker_idx, reason == REASON_PAIRS):
                    units = "pairs of tokens" if reason == REASON_PAIRS else "single tokens"
                    self._log.warning(
                        f"its blocks are keyed by {units}, other than it says: so they are looked up",
                        extra={"fields": {"worker": view.record.url}},
                    )
                return

    def _tell_unreported(self, view: WorkerView, judge: ParityJudge, totals: list[int]) -> None:
        """Say once of a worker whose blocks are hit that nobody can check it."""
        samples = totals[words.W_PARITY_EXACT] + totals[words.W_PARITY_HIGH] + totals[words.W_PARITY_LOW]
        if not judge.is_told and not samples and min(totals[words.W_OK], totals[words.W_OVERLAP_BLOCKS]) >= WINDOW_SAMPLES:
            judge.is_told = True
            self._log.info(
                "the worker's answers do not report cached tokens, KV predictions cannot be checked: "
                "SGLang reports with --enable-cache-report, a stream with stream_options.include_usage",
                extra={"fields": {"worker": view.record.url}},
            )

    def _evidence(self, view: WorkerView, judge: ParityJudge) -> Evidence:
        states = rank_states(self._ranks, view)
        reasons = tuple(dict.fromkeys(rank.reason for rank in states if rank.state == RANK_DEGRADED and rank.reason))
        blocks = self._blocks_of(view, self._totals.of(view.worker_idx))
        return Evidence(
            judge.counts,
            reasons,
            n_ranks=view.dp_size,
            has_stored=blocks.stored > judge.before.stored,
            has_overlap=blocks.overlap > judge.before.overlap,
            is_steered=self._is_steered(view),
            is_index_full=self._tree.stats()["evicted_total"] > 0,
            engine=view.record.engine,
        )

    def _blocks_of(self, view: WorkerView, totals: list[int]) -> Blocks:
        stored = sum(self._ranks.get(view.rank_base + rank, words.R_BLOCKS_STORED) for rank in range(view.dp_size))
        return Blocks(stored, totals[words.W_OVERLAP_BLOCKS])
