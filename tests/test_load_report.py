"""The numbers of a run, against values worked out by hand and the statistics module."""

import io
import json
import random
import statistics

import pytest
from rich.console import Console
from test_load_run import a_run

from sglfast.load.report import Predictions, Summary, check_predictions, hit_blocks, percentile, summarize, table, times
from sglfast.load.run import Run, Sample


def sample(cached: int, prompt: int = 1500, *, ttft: float = 10.0, worker: str = "http://a", **values: object) -> Sample:
    defaults: dict[str, object] = {"lag_ms": 0.5, "input_tokens": prompt, "prompt_blocks": 23, "latency_ms": 2 * ttft}
    return Sample(
        due_ms=0.0, blocks=-(-prompt // 512), ttft_ms=ttft, prompt_tokens=prompt, cached_tokens=cached, worker=worker, **(defaults | values)
    )  # type: ignore[arg-type]


def test_percentiles_agree_with_the_statistics_module() -> None:
    rng = random.Random(4)
    values = [rng.random() for _ in range(137)]
    expected = statistics.quantiles(values, n=100, method="inclusive")
    found = times(values)
    assert found.mean == pytest.approx(statistics.fmean(values))
    assert (found.p50, found.p90, found.p99) == pytest.approx((expected[49], expected[89], expected[98]))
    assert percentile([5.0], 0.99) == 5.0
    assert times([]).p50 is None


@pytest.mark.parametrize(
    ("cached", "prompt", "expected"),
    [
        (0, 1500, 0), (511, 1500, 0), (512, 1500, 1), (1024, 1500, 2),
        (1088, 1500, 3),  # a page of the third, partly filled block was cached, so it was this very block
        (960, 1500, 1),  # evicted inside the second block
        (960, 1024, 2),  # a repeated prompt of two whole blocks: engines recompute the last page
        (64, 100, 1), (0, 100, 0),
    ],
)  # fmt: skip
def test_block_hits(cached: int, prompt: int, expected: int) -> None:
    assert hit_blocks(sample(cached, prompt)) == expected


def test_predictions() -> None:
    samples = [
        sample(640, overlap_blocks=10),
        sample(640, overlap_blocks=11),
        sample(640, overlap_blocks=9),
        sample(640, overlap_blocks=10),
        sample(640),  # no header
        sample(-1, overlap_blocks=10),  # no usage
        sample(640, overlap_blocks=3, error="cut"),
        sample(640, overlap_blocks=0, prompt_blocks=0),  # a policy that does not look prompts up
    ]
    assert check_predictions(samples, 64) == Predictions(checked=4, exact=2, too_high=1, too_low=1)
    assert check_predictions(samples, 64).exact_ratio == 0.5
    assert check_predictions(samples, 0) == Predictions(0, 0, 0, 0)
    assert check_predictions([], 64).exact_ratio is None


def test_summary() -> None:
    samples = [
        sample(1024, ttft=10.0),
        sample(0, ttft=30.0, worker="http://b"),
        sample(512, 512, ttft=20.0),
        Sample(0, 4.0, 700, 2, latency_ms=9.0, error="timeout", worker="http://b"),
    ]
    found = summarize(a_run(samples, settled=[sample(640, overlap_blocks=10)]))
    assert found.requests == 4
    assert found.errors == {"timeout": 1}
    assert found.hit_tokens == (1024 + 512) / (1500 + 1500 + 512)
    assert found.hit_blocks == (2 + 0 + 1) / (3 + 3 + 1)
    assert found.hit_of_infinite == pytest.approx(found.hit_blocks / 0.4)
    assert (found.ttft_ms.mean, found.ttft_ms.p50) == (20.0, 20.0)
    assert found.latency_ms.mean == 40.0
    assert found.requests_per_worker == {"http://a": 2, "http://b": 2}
    assert found.settled == Predictions(1, 1, 0, 0)
    assert found.lag_p99_ms == pytest.approx(4.0 - 3.5 * 0.03)
    assert found.warnings == ["1 x timeout"]
    assert json.loads(json.dumps(found.to_json()))["ttft_ms"]["mean"] == 20.0


def test_run_without_a_good_answer() -> None:
    found = summarize(a_run([Sample(0, 0.0, 700, 2, error="connect")], error_texts={"connect": "refused"}))
    assert (found.hit_blocks, found.hit_tokens, found.ttft_ms.mean, found.latency_ms.p99) == (None, None, None, None)
    assert found.warnings == ["1 x connect, such as: refused"]
    assert cells(text_of([found]), "errors") == ["1"]


def test_late_client_is_named() -> None:
    in_time = [sample(0, lag_ms=1.0) for _ in range(98)]
    assert summarize(a_run([*in_time, sample(0, lag_ms=1.0)])).warnings == []
    (warning,) = summarize(a_run([*in_time, *(sample(0, lag_ms=900.0) for _ in range(5))])).warnings
    assert warning.startswith("not trustworthy: requests left up to 900 ms late")


def test_a_lag_that_is_small_beside_the_times_is_no_matter() -> None:
    assert summarize(a_run([sample(0, ttft=8000.0, lag_ms=300.0)])).warnings == []


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (a_run([sample(0)], machine_busy=0.97), "not trustworthy: the CPUs of this machine were 97.0 % busy"),
        (a_run([sample(0)], delayed=3), "3 requests waited for room"),
        (a_run([sample(0, input_tokens=1499)]), "1 prompts were not as long"),
        (a_run([sample(-1)]), "1 answers report no cached_tokens"),
    ],
)
def test_warnings(run: Run, words: str) -> None:
    (warning,) = summarize(run).warnings
    assert warning.startswith(words)


def test_chat_prompts_may_be_longer() -> None:
    assert summarize(a_run([sample(0, input_tokens=1490)], endpoint="chat")).other_length == 0


def text_of(summaries: list[Summary]) -> str:
    output = io.StringIO()
    Console(file=output, width=120).print(table(summaries))
    return output.getvalue()


def cells(text: str, name: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.strip().startswith(name)]
    return [part.strip() for part in line.replace("┃", "│").split("│")][1:]


def test_table_compares_with_the_first_run() -> None:
    slow = summarize(a_run([sample(1024, ttft=200.0), sample(0, ttft=200.0, worker="http://b")]))
    fast = summarize(a_run([sample(1024, ttft=50.0), sample(1024, ttft=50.0)], label="cache_aware"))
    text = text_of([slow, fast])
    assert cells(text, "TTFT mean") == ["200 ms", "50.0 ms (-75 %)"]
    assert cells(text, "prefix hits, of block references") == ["33.3 %", "66.7 %"]
    assert cells(text, "of what an infinite cache gets") == ["83.3 %", "166.7 %"]
    assert cells(text, "requests per worker") == ["1 / 1", "2"]
    assert "predicted overlap" not in text, "no run has a prediction"


def test_table_shows_what_only_one_run_has() -> None:
    with_header = summarize(a_run([sample(640, overlap_blocks=10)], settled=[sample(640, overlap_blocks=9)]))
    text = text_of([with_header, summarize(a_run([sample(0)]))])
    assert cells(text, "predicted overlap exact") == ["100.0 %", "-"]
    assert cells(text, "too high / too low") == ["0 / 0", "-"]
    assert cells(text, "exact once events settled") == ["0.0 % of 1", "-"]
