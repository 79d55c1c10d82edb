"""What /health takes while prompts of 1 MB are being tokenized: whether long work ever holds a shard's loop.

    .venv/bin/python bench/long_prompts.py [--max-p99-ms 20]

One shard, one simulated worker. Some clients send 1 MB of text each, one after the other, and no two texts are the same: alternately to
/v1/tokenize, and as a prompt that the worker holds to the end, so that the router has to tokenize all of it. Meanwhile one more
client asks for /health on a connection of its own, every 5 ms. Goal: p99 under 20 ms. On a machine with fewer idle cores than there are
busy processes (router, tokenizer threads, worker, clients) a part of what is measured is waiting for a core.
"""

import argparse
import asyncio
import statistics
import sys
import time

import orjson
from compare import machine
from processes import BenchError

from sglfast.load.client import LoadClient
from sglfast.load.stack import SimSettings, Stack

WORDS = "every one of these words is owned by the only worker "
TEXT_BYTES = 1_000_000
PAUSE_S = 0.005
GOAL_P99_MS = 20.0


def main() -> int:
    parser = argparse.ArgumentParser(description="Latency of /health while 1 MB prompts are being tokenized.")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of each phase (default: 10)")
    parser.add_argument("--clients", type=int, default=2, help="clients that send long prompts (default: 2)")
    parser.add_argument("--max-p99-ms", type=float, help="exit code 1 if p99 is above this")
    options = parser.parse_args()
    sim = SimSettings(workers=1, cache_tokens=4_000_000, prefill_tokens_per_s=1e9, decode_tokens_per_s=1e6)
    print(f"{machine()}; {time.strftime('%Y-%m-%d')}")
    print(f"{'/health':40}{'p50, ms':>10}{'p99, ms':>10}{'max, ms':>10}{'asked':>8}{'MB tokenized/s':>16}")
    try:
        with Stack(sim, policy="cache_aware", serve_flags=["--shards", "1"]) as stack:
            p99_ms = asyncio.run(measure(stack.url, options))
    except BenchError as error:
        print(f"long_prompts: {error}", file=sys.stderr)
        return 2
    return int(options.max_p99_ms is not None and p99_ms > options.max_p99_ms)


def request(host: str, path: str, number: int) -> bytes:
    """A text that nobody sent before, at the end of a beginning that the worker holds."""
    prompt = (WORDS * (TEXT_BYTES // len(WORDS) + 1))[:TEXT_BYTES] + str(number)
    options = {"max_tokens": 1, "ignore_eos": True} if path == "/v1/completions" else {}
    body = orjson.dumps({"model": "demo-model", "prompt": prompt, **options})
    head = f"POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def measure(url: str, options: argparse.Namespace) -> float:
    """p99 under load in milliseconds; prints it and that of an idle router. Raises BenchError."""
    client = LoadClient(url)
    health = f"GET /health HTTP/1.1\r\nhost: {client.host}\r\n\r\n".encode()
    sent = 0

    async def ask(data: bytes) -> float:
        answer = await client.send(data, timeout_s=60.0, is_stream=False)
        if answer.status != 200:
            raise BenchError(f"an answer is {answer.status} {answer.error}: {answer.body[:300]!r}")
        return answer.latency_s

    async def long_prompts(until_s: float, place: int) -> None:
        nonlocal sent
        while time.monotonic() < until_s:
            sent += 1
            await ask(request(client.host, ("/v1/completions", "/v1/tokenize")[(sent + place) % 2], sent))

    async def healths(name: str, until_s: float) -> float:
        began_s, times_ms = time.monotonic(), list[float]()
        sent_before = sent
        while time.monotonic() < until_s:
            times_ms.append(1e3 * await ask(health))
            await asyncio.sleep(PAUSE_S)
        cuts = statistics.quantiles(times_ms, n=100)
        rate = (sent - sent_before) * TEXT_BYTES / 1e6 / (time.monotonic() - began_s)
        print(f"{name:40}{cuts[49]:10.2f}{cuts[98]:10.2f}{max(times_ms):10.2f}{len(times_ms):8,}{rate:16.1f}", flush=True)
        return cuts[98]

    try:
        await ask(request(client.host, "/v1/completions", 0))
        await healths("of an idle router", time.monotonic() + options.seconds)
        until_s = time.monotonic() + options.seconds
        name = f"while {options.clients} clients send {TEXT_BYTES / 1e6:g} MB prompts"
        asked = asyncio.create_task(healths(name, until_s))
        await asyncio.gather(asked, *(long_prompts(until_s, place) for place in range(options.clients)))
    finally:
        await client.close()
    print(f"{'goal':40}{'':10}{GOAL_P99_MS:10.2f}")
    return asked.result()


if __name__ == "__main__":
    sys.exit(main())
