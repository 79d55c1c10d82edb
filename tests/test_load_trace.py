"""Traces: the format, made-up conversations, and what an infinite cache gets."""

import itertools
from pathlib import Path

import pytest

from sglfast.errors import ConfigError
from sglfast.load.trace import (
    BLOCK_TOKENS,
    SyntheticShape,
    TraceRequest,
    infinite_cache_hit_ratio,
    infinite_cache_token_ratio,
    read_trace,
    synthetic_trace,
)

MOONCAKE = Path(__file__).parent.parent.parent / "shared" / "traces" / "mooncake_conversation.jsonl"


def line(timestamp: int = 0, input_length: int = 600, hash_ids: str = "[0, 1]") -> str:
    return f'{{"timestamp": {timestamp}, "input_length": {input_length}, "output_length": 5, "hash_ids": {hash_ids}}}\n'


def test_read_in_order_of_time(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text(line(30) + "\n" + line(10) + line(20, 512, "[7]"))
    assert [request.timestamp for request in read_trace(str(file))] == [10, 20, 30]
    assert read_trace(str(file), 1) == [TraceRequest(30, 600, 5, [0, 1])]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (line() + "{nonsense\n", "line 2"),
        (line() + '{"timestamp": 1}\n', r"line 2.*input_length"),
        (line(input_length=1025), r"line 1: input_length 1025 is 3 blocks of 512 tokens, but hash_ids has 2"),
        (line(hash_ids="[0, -1]"), r"line 1.*hash_ids"),
        (line(input_length=0, hash_ids="[]"), r"line 1.*input_length"),
        ("\n", "holds no request"),
    ],
)
def test_broken_trace(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_trace(str(file))


def test_missing_trace() -> None:
    with pytest.raises(ConfigError, match=r"/no/such: cannot be read: No such file"):
        read_trace("/no/such")


def test_synthetic_trace_keeps_the_format() -> None:
    trace = synthetic_trace(SyntheticShape(users=50), seed=3)
    prefixes: dict[int, tuple[int, ...]] = {}
    for request in trace:
        assert len(request.hash_ids) == -(-request.input_length // BLOCK_TOKENS)
        assert request.output_length >= 1
        for count, block in enumerate(request.hash_ids, 1):
            prefix = (*request.hash_ids[:count], request.input_length if count * BLOCK_TOKENS > request.input_length else 0)
            assert prefixes.setdefault(block, prefix) == prefix, "equal ids mean equal content up to and including the block"
    times = [request.timestamp for request in trace]
    assert times == sorted(times)


def test_synthetic_trace_is_seeded() -> None:
    shape = SyntheticShape(users=20)
    assert synthetic_trace(shape, 1) == synthetic_trace(shape, 1)
    assert synthetic_trace(shape, 1) != synthetic_trace(shape, 2)


def test_synthetic_conversations_grow_on_shared_system_prompts() -> None:
    shape = SyntheticShape(users=300, turns=4.0, system_prompts=3, system_prompt_blocks=2, arrivals_per_s=5.0)
    trace = synthetic_trace(shape, 1)
    assert {tuple(request.hash_ids[:2]) for request in trace} == {(0, 1), (2, 3), (4, 5)}
    assert 3.0 < len(trace) / 300 < 5.0
    starts = synthetic_trace(SyntheticShape(users=300, turns=1, arrivals_per_s=5.0), 1)
    assert 3.5 < 300 / (starts[-1].timestamp / 1000) < 6.5
    # Turns after the first find their history: nearly all but the message's own blocks.
    assert infinite_cache_hit_ratio(trace) > 0.6


def test_infinite_cache() -> None:
    trace = [TraceRequest(0, 1024, 1, [1, 2]), TraceRequest(1, 1500, 1, [1, 2, 3]), TraceRequest(2, 1500, 1, [1, 2, 3])]
    assert infinite_cache_hit_ratio(trace) == (0 + 2 + 3) / 8
    assert infinite_cache_hit_ratio(trace, warmup=1) == 5 / 6
    # The third request finds all 1500 tokens, of which an engine uses 1499 cut to a page.
    assert infinite_cache_token_ratio(trace, 64) == (1024 + 1472) / 4024
    assert infinite_cache_token_ratio(trace, 1, warmup=2) == 1499 / 1500
    assert infinite_cache_hit_ratio([]) == 0.0


def test_infinite_cache_agrees_with_a_plain_model() -> None:
    trace = synthetic_trace(SyntheticShape(users=40), 9)
    references = list(itertools.chain.from_iterable(request.hash_ids for request in trace))
    assert infinite_cache_hit_ratio(trace) == pytest.approx(1 - len(set(references)) / len(references))


@pytest.mark.trace
@pytest.mark.skipif(not MOONCAKE.exists(), reason="needs ../shared/traces")
def test_mooncake_trace() -> None:
    trace = read_trace(str(MOONCAKE))
    assert len(trace) == 12_031
    assert round(infinite_cache_hit_ratio(trace), 3) == 0.366
    first = read_trace(str(MOONCAKE), 2000)
    assert round(infinite_cache_hit_ratio(first), 4) == 0.2891
    assert sum(request.input_length for request in first) == 27_441_774
