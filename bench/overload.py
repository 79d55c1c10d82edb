"""Goodput under overload: what a limited router still serves when ten times too much is asked of it, as a ratio in one run.

    .venv/bin/python bench/overload.py [--seconds 6] [--min-share 0.9]

Four simulated workers, two shards, `--max-concurrent-requests 16 --queue-size 16`. First the peak: as many clients as there are places,
each asking again when it was answered. Then requests at ten times that rate, whether or not anything is answered. What counts
is requests answered 200 a second, and how long those took.
"""

import argparse
import asyncio
import statistics
import sys
import time

import orjson

from sglfast.load.client import LoadClient
from sglfast.load.stack import SimSettings, Stack

PLACES = 16
FACTOR = 10


def main() -> int:
    parser = argparse.ArgumentParser(description="Goodput at ten times the capacity, as a share of the peak.")
    parser.add_argument("--seconds", type=float, default=6.0, help="length of each phase (default: 6)")
    parser.add_argument("--min-share", type=float, help="exit code 1 if goodput is below this share of the peak")
    options = parser.parse_args()
    flags = ["--shards", "2", "--max-concurrent-requests", str(PLACES), "--queue-size", str(PLACES)]
    sim = SimSettings(prefill_tokens_per_s=50_000.0, decode_tokens_per_s=160.0)
    with Stack(sim, policy="round_robin", serve_flags=flags) as stack:
        share = asyncio.run(measure(stack.url, options.seconds))
    return int(options.min_share is not None and share < options.min_share)


def request(host: str, number: int) -> bytes:
    body = orjson.dumps(
        {"model": "demo-model", "prompt": f"{number} words of a prompt", "max_tokens": 8, "ignore_eos": True, "stream": True}
    )
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def measure(url: str, seconds: float) -> float:
    """Goodput under overload as a share of the peak; prints both."""
    client = LoadClient(url)
    times: list[float] = []
    statuses: dict[int, int] = {}

    async def one(number: int) -> None:
        begun_s = time.monotonic()
        answer = await client.send(request(client.host, number), timeout_s=30.0)
        statuses[answer.status] = statuses.get(answer.status, 0) + 1
        if answer.status == 200:
            times.append(time.monotonic() - begun_s)

    async def again(until_s: float, number: int) -> None:
        while time.monotonic() < until_s:
            await one(number)

    def report(name: str, took_s: float) -> float:
        good = len(times) / took_s
        median_ms, p99_ms = (round(1e3 * value, 1) for value in (statistics.median(times), statistics.quantiles(times, n=100)[98]))
        print(f"{name:10}{good:10.0f} good/s   p50 {median_ms} ms   p99 {p99_ms} ms   answers {statuses}")
        times.clear()
        statuses.clear()
        return good

    await asyncio.gather(*(again(time.monotonic() + 1.0, i) for i in range(PLACES)))
    times.clear()
    statuses.clear()
    begun_s = time.monotonic()
    await asyncio.gather(*(again(begun_s + seconds, i) for i in range(PLACES)))
    peak = report("peak", time.monotonic() - begun_s)
    pause_s = 1 / (FACTOR * peak)
    tasks: list[asyncio.Task[None]] = []
    begun_s = time.monotonic()
    while (now_s := time.monotonic() - begun_s) < seconds:
        tasks += [asyncio.create_task(one(number)) for number in range(len(tasks), int(now_s / pause_s))]
        await asyncio.sleep(0.002)
    asked_s = time.monotonic() - begun_s
    await asyncio.gather(*tasks)
    overload = report(f"x {FACTOR}", asked_s)
    await client.close()
    print(f"asked {len(tasks) / asked_s:.0f}/s; goodput is {overload / peak:.2f} of the peak")
    return overload / peak


if __name__ == "__main__":
    sys.exit(main())
