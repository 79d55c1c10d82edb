"""The numbers of a replay, and the table that shows one run or compares several.

Runs in: `sglfast replay`.
Contract: pure functions of Run. Ratios are 0..1, times are ms; a number that nobody reported is None and is shown as "-".
    Failed requests count as errors and in nothing else.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.table import Table

from sglfast.load.run import Run, Sample
from sglfast.load.trace import BLOCK_TOKENS

# A client that is later than this at its 99th percentile has changed the arrivals, not only measured them.
LAG_LIMIT_MS = 50.0
LAG_LIMIT_OF_TTFT = 0.1
# Above it programs wait for a CPU: times are then those of the scheduler. Hit ratios suffer less.
BUSY_LIMIT = 0.75


@dataclass(frozen=True, slots=True)
class Times:
    """Mean and percentiles in ms; None without a sample."""

    mean: float | None
    p50: float | None
    p90: float | None
    p99: float | None


@dataclass(frozen=True, slots=True)
class Predictions:
    """The router's predicted overlap against the cached tokens that the worker reported: how many were equal, too high, too low."""

    checked: int
    exact: int
    too_high: int
    too_low: int

    @property
    def exact_ratio(self) -> float | None:
        """Share (0..1) of exact predictions; None when none was checked."""
        return self.exact / self.checked if self.checked else None


@dataclass(frozen=True, slots=True)
class Summary:
    """The numbers of one run. hit_blocks: share of the trace's 512-token block references; hit_tokens: of prompt tokens.

    hit_of_infinite: hit_blocks as a share of what one worker with an infinite cache gets. other_length: answers whose prompt was not
    as long as the trace says, so the workers' tokenizer is another. warnings: what a reader must know before using the numbers.
    """

    label: str
    requests: int
    errors: dict[str, int]
    hit_blocks: float | None
    hit_tokens: float | None
    hit_of_infinite: float | None
    ttft_ms: Times
    latency_ms: Times
    requests_per_worker: dict[str, int]
    predictions: Predictions
    settled: Predictions
    other_length: int
    lag_p99_ms: float | None
    delayed: int
    machine_busy: float | None
    warnings: list[str]

    def to_json(self) -> dict[str, object]:
        """Plain values, for a JSON encoder."""
        return dataclasses.asdict(self)


def percentile(ordered: Sequence[float], share: float) -> float | None:
    """The value below which `share` (0..1) of an ascending list lies, interpolated linearly; None when the list is empty."""
    if not ordered:
        return None
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def times(values: Sequence[float]) -> Times:
    """Mean and percentiles of values in any order."""
    ordered = sorted(values)
    mean = sum(ordered) / len(ordered) if ordered else None
    return Times(mean, percentile(ordered, 0.5), percentile(ordered, 0.9), percentile(ordered, 0.99))


def hit_blocks(sample: Sample) -> int:
    """How many block references of the request the worker had cached; its last, partly filled block counts once a page of it was."""
    full = min(sample.cached_tokens // BLOCK_TOKENS, sample.blocks)
    if full == sample.blocks - 1 and sample.cached_tokens > full * BLOCK_TOKENS:
        return sample.blocks
    return full


def check_predictions(samples: Sequence[Sample], page_tokens: int) -> Predictions:
    """Compare predicted overlap (blocks of `page_tokens`) with the reported cached tokens, where both are known.

    A router that did not look the prompt up (its policy does not need to) says so by prompt_blocks=0.
    """
    differences = [
        sample.overlap_blocks * page_tokens - sample.cached_tokens
        for sample in samples
        if page_tokens and not sample.error and sample.prompt_blocks > 0 and sample.overlap_blocks >= 0 and sample.cached_tokens >= 0
    ]
    too_high = sum(difference > 0 for difference in differences)
    too_low = sum(difference < 0 for difference in differences)
    return Predictions(len(differences), len(differences) - too_high - too_low, too_high, too_low)


def summarize(run: Run) -> Summary:
    """The numbers of a run."""
    good = [sample for sample in run.samples if not sample.error]
    counted = [sample for sample in good if sample.cached_tokens >= 0 and sample.prompt_tokens > 0]
    blocks = sum(sample.blocks for sample in counted)
    block_ratio = sum(map(hit_blocks, counted)) / blocks if counted else None
    tokens = sum(sample.prompt_tokens for sample in counted)
    ttft_ms = times([sample.ttft_ms for sample in good if sample.ttft_ms >= 0])
    lag_p99_ms = percentile(sorted(sample.lag_ms for sample in run.samples), 0.99)
    other_length = 0
    if run.endpoint != "chat":  # there the template adds tokens
        other_length = sum(sample.prompt_tokens not in (-1, sample.input_tokens) for sample in good)
    summary = Summary(
        label=run.label,
        requests=len(run.samples),
        errors=dict(Counter(sample.error for sample in run.samples if sample.error).most_common()),
        hit_blocks=block_ratio,
        hit_tokens=sum(sample.cached_tokens for sample in counted) / tokens if counted else None,
        hit_of_infinite=block_ratio / run.infinite_blocks if block_ratio is not None and run.infinite_blocks else None,
        ttft_ms=ttft_ms,
        latency_ms=times([sample.latency_ms for sample in good]),
        requests_per_worker=dict(sorted(Counter(sample.worker for sample in run.samples if sample.worker).items())),
        predictions=check_predictions(run.samples, run.page_tokens),
        settled=check_predictions(run.settled, run.page_tokens),
        other_length=other_length,
        lag_p99_ms=lag_p99_ms,
        delayed=run.delayed,
        machine_busy=run.machine_busy if run.machine_busy >= 0 else None,
        warnings=[],
    )
    summary.warnings.extend(_warnings(summary, run, len(good), len(counted)))
    return summary


def _warnings(summary: Summary, run: Run, good: int, counted: int) -> list[str]:
    found = []
    limit_ms = max(LAG_LIMIT_MS, LAG_LIMIT_OF_TTFT * (summary.ttft_ms.mean or 0.0))
    if summary.lag_p99_ms is not None and summary.lag_p99_ms > limit_ms:
        found.append(
            f"not trustworthy: requests left up to {summary.lag_p99_ms:.0f} ms late (p99); client or machine was the bottleneck:"
            " use a smaller --speed-up or --max-output-tokens, or another machine for the client"
        )
    if run.machine_busy > BUSY_LIMIT:
        found.append(
            f"not trustworthy: the CPUs of this machine were {_percent(run.machine_busy)} busy, so programs waited for one another;"
            " times are too long"
        )
    if run.delayed:
        found.append(f"{run.delayed} requests waited for room: more were open than --max-open allows, so the loop was not open")
    if summary.other_length:
        found.append(
            f"{summary.other_length} prompts were not as long as the trace says: the workers use another tokenizer"
            " (--tokenizer-path) or add special tokens"
        )
    if good and counted < good:
        found.append(f"{good - counted} answers report no cached_tokens (SGLang: start it with --enable-cache-report)")
    found.extend(
        f"{count} x {kind}" + (f", such as: {run.error_texts[kind]}" if run.error_texts.get(kind) else "")
        for kind, count in summary.errors.items()
    )
    return found


# ---- the table ----

Row = tuple[str, Callable[[Summary], float | int | str | None], Callable[[float], str] | None]


def _percent(value: float) -> str:
    return f"{value * 100:.1f} %"


def _ms(value: float) -> str:
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.1f} ms"


# Rows whose name begins with TTFT or latency also show the change against the first run.
ROWS: tuple[Row, ...] = (
    ("requests", lambda s: s.requests, str),
    ("errors", lambda s: sum(s.errors.values()), str),
    ("prefix hits, of block references", lambda s: s.hit_blocks, _percent),
    ("  of what an infinite cache gets", lambda s: s.hit_of_infinite, _percent),
    ("prefix hits, of prompt tokens", lambda s: s.hit_tokens, _percent),
    ("TTFT mean", lambda s: s.ttft_ms.mean, _ms),
    ("TTFT p50", lambda s: s.ttft_ms.p50, _ms),
    ("TTFT p90", lambda s: s.ttft_ms.p90, _ms),
    ("TTFT p99", lambda s: s.ttft_ms.p99, _ms),
    ("latency mean", lambda s: s.latency_ms.mean, _ms),
    ("latency p50", lambda s: s.latency_ms.p50, _ms),
    ("latency p99", lambda s: s.latency_ms.p99, _ms),
    ("requests per worker", lambda s: " / ".join(map(str, s.requests_per_worker.values())) or None, None),
    ("predicted overlap exact", lambda s: s.predictions.exact_ratio, _percent),
    ("  too high / too low", lambda s: _sides(s.predictions), None),
    ("  exact once events settled", lambda s: _settled(s.settled), None),
    ("client late, p99", lambda s: s.lag_p99_ms, _ms),
    ("CPUs of this machine busy", lambda s: s.machine_busy, _percent),
)


def _sides(predictions: Predictions) -> str | None:
    return f"{predictions.too_high} / {predictions.too_low}" if predictions.checked else None


def _settled(predictions: Predictions) -> str | None:
    ratio = predictions.exact_ratio
    return None if ratio is None else f"{_percent(ratio)} of {predictions.checked}"


def table(summaries: Sequence[Summary]) -> Table:
    """A rich table with one column a run; rows that no run has a number for are left out."""
    drawn = Table(show_edge=False)
    drawn.add_column("")
    for summary in summaries:
        drawn.add_column(summary.label, justify="right", no_wrap=True)
    for name, value_of, to_text in ROWS:
        values = [value_of(summary) for summary in summaries]
        if any(value is not None for value in values):
            drawn.add_row(name, *(_cell(name, value, values[0], place, to_text) for place, value in enumerate(values)))
    return drawn


def _cell(name: str, value: float | str | None, first: float | str | None, place: int, to_text: Callable[[float], str] | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, str) or to_text is None:
        return str(value)
    text = to_text(value)
    if place and name.startswith(("TTFT", "latency")) and isinstance(first, float) and first > 0:
        text += f" ({(value / first - 1) * 100:+.0f} %)"
    return text
