"""A fleet of 1,000 seeds x 8 ranks with its heartbeats and 100 listings a second: every answer whole, memory flat.

The driver is bench/modelexpress.py, which also tells the times; here no wall clock decides.
"""

import asyncio
from pathlib import Path

import pytest
from mx_harness import NO_REDIS, REDIS, redis_server

from bench.modelexpress import Fleet, Load, Result, Service, percentile

GROWTH_BYTES_MAX = 12 << 20


def run(fleet: Fleet, storage: str, log: Path) -> Result:
    said: list[str] = []
    with Service(storage, log) as service:
        result = asyncio.run(Load(fleet, service, said.append).run())
    assert "Traceback" not in log.read_text()
    assert "STALE" not in log.read_text()
    return result


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_thousand_seeds_of_eight_ranks(tmp_path: Path) -> None:
    fleet = Fleet(duration_s=15.0)
    assert (fleet.records, fleet.listed) == (8000, 800)
    result = run(fleet, str(tmp_path / "db"), tmp_path / "log")
    assert result.failures == []
    assert len(result.list_ms) >= 0.9 * fleet.duration_s * fleet.lists_per_s
    assert len(result.update_ms) >= 0.9 * fleet.duration_s * fleet.records / fleet.interval_s
    assert max(result.resident_bytes) - result.resident_bytes[0] < GROWTH_BYTES_MAX


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_smaller_fleet_on_redis(tmp_path: Path) -> None:
    if REDIS is None:
        pytest.skip(NO_REDIS)
    fleet = Fleet(seeds=200, models=2, interval_s=6.0, duration_s=8.0)
    with redis_server(tmp_path / "redis") as redis:
        result = run(fleet, redis.url, tmp_path / "log")
    assert result.failures == []
    assert max(result.resident_bytes) - result.resident_bytes[0] < GROWTH_BYTES_MAX


def test_percentiles() -> None:
    assert [percentile([3.0, 1.0, 2.0, 4.0], share) for share in (0.0, 0.5, 0.99)] == [1.0, 3.0, 4.0]
