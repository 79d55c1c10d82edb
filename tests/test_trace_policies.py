"""The main promise on a real trace: cache_aware finds the KV cache, and what it predicts is what the workers report.

The first 2,000 requests of the Mooncake conversation trace, 10 times faster, on four simulated workers: 3,000,000 tokens of cache and
12,000 prefill tokens/s each (also times 10). One worker with an infinite cache would hit 28.9 % of the block references.
"""

from pathlib import Path

import pytest
from rich.console import Console

from sglfast.load.interrupts import Interrupts
from sglfast.load.replay import ReplaySettings, compare
from sglfast.load.report import Summary, summarize
from sglfast.load.stack import SimSettings
from sglfast.load.trace import infinite_cache_hit_ratio, read_trace

TRACE = Path(__file__).resolve().parents[2] / "shared" / "traces" / "mooncake_conversation.jsonl"
SPEED_UP = 10.0

pytestmark = [pytest.mark.alone, pytest.mark.slow, pytest.mark.trace, pytest.mark.skipif(not TRACE.exists(), reason=f"{TRACE} is not here")]


@pytest.fixture(scope="module")
def summaries() -> dict[str, Summary]:
    trace = read_trace(str(TRACE), 2000)
    assert round(infinite_cache_hit_ratio(trace), 3) == 0.289
    sim = SimSettings(cache_tokens=3_000_000, prefill_tokens_per_s=12_000 * SPEED_UP, decode_tokens_per_s=80 * SPEED_UP)
    # Only cache_aware predicts: to send 300 requests one by one takes the others a while and shows nothing.
    plan = [("round_robin", 0), ("least_load", 0), ("cache_aware", 300)]
    with Interrupts() as interrupts:
        runs = [
            run
            for policy, checks in plan
            for settings in [ReplaySettings(speed_up=SPEED_UP, settled_checks=checks)]
            for run in compare([policy], trace, "mooncake", settings, sim, [], Console(), interrupts)
        ]
    return {run.label: summarize(run) for run in runs}


@pytest.mark.timeout(600)
def test_every_request_is_answered(summaries: dict[str, Summary]) -> None:
    for summary in summaries.values():
        assert summary.requests == 2000
        assert summary.errors == {}
        assert summary.other_length == 0


@pytest.mark.timeout(600)
def test_cache_aware_gets_nine_tenths_of_an_infinite_cache(summaries: dict[str, Summary]) -> None:
    found = summaries["cache_aware"].hit_of_infinite
    assert found is not None
    assert found >= 0.90
    blind = summaries["round_robin"].hit_blocks
    assert blind is not None
    assert 0.08 <= blind <= 0.16  # a fourth of the conversation's turns come back by chance


@pytest.mark.timeout(600)
def test_settled_predictions_are_what_workers_report(summaries: dict[str, Summary]) -> None:
    settled = summaries["cache_aware"].settled
    assert settled.checked == 300
    assert settled.exact >= 0.99 * settled.checked


@pytest.mark.timeout(600)
def test_time_to_first_token_is_shorter(summaries: dict[str, Summary]) -> None:
    """A ratio of runs on one machine; on one that was too busy to say anything nothing is held against it."""
    warnings = [warning for summary in summaries.values() for warning in summary.warnings]
    if warnings:
        pytest.skip(f"the machine was too busy for times: {warnings[0]}")
    mean = {label: summary.ttft_ms.mean for label, summary in summaries.items()}
    assert mean["cache_aware"] is not None
    assert mean["round_robin"] is not None
    assert mean["least_load"] is not None
    assert mean["cache_aware"] <= 0.60 * mean["round_robin"]
    assert mean["cache_aware"] <= 0.90 * mean["least_load"]
