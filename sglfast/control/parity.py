"""The parity loop, control's half: does the KV index predict what workers report? If not, say so and why.

Runs in: control, some times a second. Theory: a prediction and the engine's own `cached_tokens` differ for a moment when requests overtake
    events or wait while others change the cache (edge/route: is_overtaken), and always when the router's picture is wrong. So a worker
    is distrusted when most of its last samples differ, and trusted again when few do. A fault of the router itself (a wrong template)
    shows at all of a model's workers at once: those with too few samples for a verdict of their own are judged together (`judge_pool`).
    Contract: `ParityJudge` and `judge_pool` are pure; a change of verdict
    is written into the worker table (shards say DEGRADED in `x-sglfast-kv`) and logged once, with its likeliest cause, which is also the
    reason in metrics and /workers (control/kv_state). Where index has a reason of its own for its doubts, that is the cause.
    Where blocks show that a worker keys single tokens although it speculates with EAGLE (hybrid models do), or the other way, its blocks
    are believed.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sglfast import _counters as words
from sglfast._counters import RANK_DEGRADED, RankTable
from sglfast._segment import Segment
from sglfast.control.kv_state import rank_states
from sglfast.control.worker_totals import WorkerTotals
from sglfast.control.workers import Workers
from sglfast.shm import PARITY_HIGH, PARITY_LOW, PARITY_OK, RANK_REASONS, REASON_PAIRS, REASON_SINGLES, WorkerView

WINDOW_SAMPLES = 50
WINDOW_LOOKS = 20  # at least, so that a moment of many requests is not all there is to judge by
LEAST_SAMPLES = 8  # of one worker
# Of several together, so that 50 requests are enough also over many workers; none counts for more than LEAST_SAMPLES.
LEAST_POOL_SAMPLES = 12
_LEAST_OWN_SAMPLES = 2  # before a worker is judged by its pool
_DISTRUST_SHARE, _TRUST_SHARE = 0.6, 0.2
# So that a fault is named within some 50 requests also at 100 and more a second; many workers are looked at more seldom.
_LEAST_PERIOD_S, _PERIOD_A_WORKER_S, _MOST_PERIOD_S = 0.05, 0.002, 1.0


@dataclass(slots=True)
class Counts:
    """Samples of a worker since its start: right, predicted too much, predicted too little."""

    exact: int = 0
    high: int = 0
    low: int = 0


class ParityJudge:
    """One worker's verdict over about its last WINDOW_SAMPLES samples, or those of WINDOW_LOOKS looks if they are more."""

    def __init__(self) -> None:
        self.verdict = PARITY_OK
        self.is_told = False  # that the worker reports nothing
        self._seen = Counts()
        self._stored = 0
        self._window: deque[tuple[Counts, int]] = deque()  # samples of a look, blocks published before it

    @property
    def stored_before(self) -> int:
        """Blocks that the worker had published when the window began."""
        return self._window[0][1] if self._window else 0

    @property
    def counts(self) -> Counts:
        """Sums of the window."""
        return Counts(*(sum(getattr(counts, name) for counts, _ in self._window) for name in ("exact", "high", "low")))

    def feed(self, totals: Counts, stored: int = 0) -> int:
        """Take the counters as they are now, and how many blocks the worker has published; returns the verdict, one of shm.PARITY_*."""
        delta = Counts(totals.exact - self._seen.exact, totals.high - self._seen.high, totals.low - self._seen.low)
        self._seen = Counts(totals.exact, totals.high, totals.low)
        if _size(delta) > 0:
            self._window.append((delta, self._stored))
        self._stored = stored
        samples = sum(_size(counts) for counts, _ in self._window)
        while len(self._window) > WINDOW_LOOKS and samples - _size(self._window[0][0]) >= WINDOW_SAMPLES:
            samples -= _size(self._window.popleft()[0])
        if samples >= LEAST_SAMPLES:
            counts = self.counts
            self.verdict = _judged(counts.high, counts.low, samples, self.verdict)
        return self.verdict


def judge_pool(judges: Sequence[ParityJudge]) -> None:
    """Give those judges of one model's workers a verdict that have too few samples of their own, by what all of them have seen."""
    windows = [judge.counts for judge in judges]
    samples = high = low = 0.0
    for counts in windows:
        # What one worker has long shown says little of the others.
        weight = LEAST_SAMPLES / max(_size(counts), LEAST_SAMPLES)
        samples += weight * _size(counts)
        high += weight * counts.high
        low += weight * counts.low
    if samples < LEAST_POOL_SAMPLES:
        return
    for judge, counts in zip(judges, windows, strict=True):
        if not _LEAST_OWN_SAMPLES <= _size(counts) < LEAST_SAMPLES:
            continue
        verdict = _judged(high, low, samples, judge.verdict)
        # One that is right where the others are wrong is no case of theirs.
        judge.verdict = verdict if verdict == PARITY_OK else _judged(counts.high, counts.low, _size(counts), judge.verdict)


def _judged(high: float, low: float, samples: float, before: int) -> int:
    if high + low >= _DISTRUST_SHARE * samples:
        return PARITY_HIGH if high > low else PARITY_LOW
    return PARITY_OK if high + low <= _TRUST_SHARE * samples else before


def _size(counts: Counts) -> int:
    return counts.exact + counts.high + counts.low


@dataclass(frozen=True, slots=True)
class Evidence:
    """What index knows of a worker. reasons: of its ranks that are DEGRADED; has_stored: it has published blocks since the window began;
    is_steered: requests tell it which of its ranks they are for."""

    reasons: tuple[str, ...] = ()
    n_ranks: int = 1
    has_stored: bool = True
    is_steered: bool = False


# Of the past: they explain for a while that too little is predicted, and stay until the rank is cleared.
_PASSING = RANK_REASONS[4], RANK_REASONS[5], RANK_REASONS[15]


def likely_cause(verdict: int, evidence: Evidence) -> str:
    """What an operator should look at."""
    told = "; ".join(evidence.reasons)  # index knows better than any guess
    if told and (verdict == PARITY_HIGH or not set(evidence.reasons).issubset(_PASSING)):
        return told
    if verdict == PARITY_HIGH and evidence.is_steered:
        return (
            "the engine ignores X-Data-Parallel-Rank (in /generate the body's rank): requests are computed on other ranks than those "
            "that hold the prompt; --disable-dp-steering leaves the choice to the worker"
        )
    if verdict == PARITY_HIGH and evidence.n_ranks > 1:
        ranks = f"{evidence.n_ranks} data-parallel ranks"
        return f"the worker spreads requests over its {ranks} itself, also to ranks that do not hold the prompt"
    if verdict == PARITY_HIGH:
        dropped = "the worker dropped blocks without an event, its prefix cache is off"
        return f"{dropped}, or prompts with other salts or adapters are taken for the same"
    prompts = "the router's prompts differ from the worker's: compare --tokenizer-path and its chat template with the worker's model"
    if told:
        return f"{told}; if that lasts, {prompts}"
    return (
        prompts
        if evidence.has_stored
        else f"the worker has published no stored blocks meanwhile: its KV events do not come; else {prompts}"
    )


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
                # A block that has come since, under the key that shards make, shows as well as a right number that keys agree.
                Counts(totals[words.W_PARITY_EXACT] + totals[words.W_PARITY_CAME], totals[words.W_PARITY_HIGH], totals[words.W_PARITY_LOW]),
                self._stored_by(view),
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
        return Evidence(reasons, view.dp_size, self._stored_by(view) > judge.stored_before, self._is_steered(view))

    def _stored_by(self, view: WorkerView) -> int:
        return sum(self._ranks.get(view.rank_base + rank, words.R_BLOCKS_STORED) for rank in range(view.dp_size))
