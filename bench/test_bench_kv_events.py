"""Wall-clock time of a KV event batch -> typed events, by shape (array up to sglang 0.5.19, map later) and size."""

from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from sglfast.wire.kv_events import decode_batch

BATCHES = Path(__file__).parent.parent / "tests" / "golden" / "kv_events" / "sglang_batches"


@pytest.mark.parametrize("name", ["stored_child_multi_page", "large_64x256", "removed_gpu", "mixed"])
@pytest.mark.parametrize("version", ["0.5.18", "0.5.23"])
def test_bench_decode_batch(benchmark: BenchmarkFixture, version: str, name: str) -> None:
    payload = (BATCHES / version / f"{name}.msgpack").read_bytes()
    batch = benchmark(decode_batch, payload)
    assert batch.events
    assert not batch.undecoded
