"""Wall-clock time of token ids -> block keys, by prompt length and kind of input."""

from array import array

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from sglfast._blockhash import kernel, page_keys, token_keys

PAGE_TOKENS = 64


@pytest.mark.parametrize("kind", ["list", "uint32"])
@pytest.mark.parametrize("tokens", [512, 8192, 131_072])
def test_bench_page_keys(benchmark: BenchmarkFixture, tokens: int, kind: str) -> None:
    prompt = list(range(tokens)) if kind == "list" else array("I", range(tokens))
    benchmark.extra_info["kernel"] = kernel()
    keys = benchmark(page_keys, prompt, PAGE_TOKENS)
    assert len(keys) == 8 * (tokens // PAGE_TOKENS)


@pytest.mark.parametrize("kind", ["list", "uint32"])
@pytest.mark.parametrize("tokens", [512, 8192, 131_072])
def test_bench_token_keys(benchmark: BenchmarkFixture, tokens: int, kind: str) -> None:
    prompt = list(range(tokens)) if kind == "list" else array("I", range(tokens))
    keys = benchmark(token_keys, prompt, PAGE_TOKENS, seed=1)
    assert len(keys) == 8 * (tokens // PAGE_TOKENS)
