"""Overload, end to end: two shards, limits over both, far more clients than places."""

import threading
from collections import Counter
from collections.abc import Iterator

import orjson
import pytest
from e2e import Prompts, get, metric, send_all, small_stack

from sglfast.load.stack import Stack

PLACES, QUEUE, WORKERS = 8, 4, 4


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    flags = ["--max-concurrent-requests", str(PLACES), "--queue-size", str(QUEUE)]
    with small_stack("round_robin", flags, decode_tokens_per_s=400.0) as running:
        yield running


def busiest(stack: Stack, until: threading.Event) -> int:
    """The most requests that all workers had at once, by their own count."""
    most = 0
    while not until.wait(0.002):
        stats = [orjson.loads(get(f"{url}/sim/stats")) for url in stack.worker_urls]
        most = max(most, sum(row["running"] + row["waiting"] for row in stats))
    return most


def goodput(stack: Stack, prompts: Prompts, connections: int, seeds: range) -> tuple[Counter[int], int]:
    """(answers by status, most requests at the workers at once) of so many clients that ask as fast as they can."""
    done, seen = threading.Event(), []
    watch = threading.Thread(target=lambda: seen.append(busiest(stack, done)))
    watch.start()
    try:
        answers = send_all(stack.url, [prompts.text(seed, 100) for seed in seeds], connections=connections, max_tokens=8)
    finally:
        done.set()
        watch.join(30)
    return Counter(answer.status for answer in answers), seen[0]


def test_the_limit_holds_over_both_shards_and_the_rest_is_shed(stack: Stack) -> None:
    prompts = Prompts()
    statuses, most = goodput(stack, prompts, 2, range(1, 21))
    assert statuses == {200: 20}
    statuses, most = goodput(stack, prompts, PLACES, range(100, 180))
    assert statuses == {200: 80}, "nobody is refused who finds a place"
    # The workers are asked one after the other: a request may end at one and the next begin at another in between.
    assert 2 <= most <= PLACES + WORKERS
    statuses, most = goodput(stack, prompts, 80, range(1000, 1600))
    assert set(statuses) == {200, 429}
    assert statuses[200] >= PLACES + QUEUE
    assert most <= PLACES + WORKERS
    assert metric(stack, "sglfast_queued_requests_total") > 0
    assert metric(stack, "sglfast_admitted_requests") == metric(stack, "sglfast_waiting_requests") == 0
    statuses, _ = goodput(stack, prompts, 2, range(2000, 2010))
    assert statuses == {200: 10}, "afterwards all is as before"
