"""How soon the KV index is whole again after `kill -9` of its process, with a million blocks in it.

    .venv/bin/python bench/index_killed.py                  streams that offer replay, then streams that do not
    .venv/bin/python bench/index_killed.py --blocks 4000000

A whole router; four simulated workers are given prompts until they hold the blocks, then the index process is killed, a few times. What is
printed of each kill: seconds until /workers, asked every 10 ms, calls all workers EXACT again, and how many of some prompts are
predicted as before by /explain, which counts what shards find. Goal: 2 s. Without replay only the next event of a stream shows that none
was missed; until then the blocks are used as they are, and called SYNCING: there each worker gets a prompt 1.5 s after the kill.
"""

import argparse
import contextlib
import http.client
import os
import random
import re
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import orjson
from compare import machine, progress
from processes import BenchError, tree

from sglfast.load.stack import SimSettings, Stack

WORKERS, PAGE_TOKENS, PROMPT_TOKENS = 4, 4, 16_384
PROMPT_BLOCKS = PROMPT_TOKENS // PAGE_TOKENS
SILENT_S = 1.5  # more than a new index process needs to subscribe, also on a busy machine
KILLS, CHECKED_PROMPTS = 3, 16
GOAL_S, TIMEOUT_S = 2.0, 60.0
JSON = {"content-type": "application/json"}


def main() -> int:
    parser = argparse.ArgumentParser(description="Time until the KV index is EXACT again after kill -9 of its process.")
    parser.add_argument("--blocks", type=int, default=1_000_000, help="blocks that the workers hold together (default: 1000000)")
    parser.add_argument("--max-seconds", type=float, help="exit code 1 if one kill takes longer than this")
    options = parser.parse_args()
    print(f"{machine()}; {time.strftime('%Y-%m-%d')}")
    print(f"{'KV index after kill -9':32}{'blocks':>12}{'EXACT again after, s':>24}{'predicted as before':>22}{'goal, s':>9}")
    longest_s = 0.0
    try:
        for has_replay in (True, False):
            longest_s = max(longest_s, measure(has_replay, options.blocks))
    except BenchError as error:
        print(f"index_killed: {error}", file=sys.stderr)
        return 2
    return int(options.max_seconds is not None and longest_s > options.max_seconds)


def measure(has_replay: bool, blocks: int) -> float:
    """One row of the table; returns the seconds of the longest way back. Raises BenchError."""
    prompts = [prompt(number) for number in range(-(-blocks // PROMPT_BLOCKS))]
    sim = SimSettings(
        workers=WORKERS,
        page_tokens=PAGE_TOKENS,
        cache_tokens=2 * blocks * PAGE_TOKENS // WORKERS,
        prefill_tokens_per_s=1e9,
        decode_tokens_per_s=1e6,
        replay=has_replay,
    )
    name = "streams that offer replay" if has_replay else "streams without replay"
    with Stack(sim, policy="cache_aware", serve_flags=["--kv-index-blocks", str(2 * blocks)]) as stack:
        progress(f"{name}: {WORKERS} workers are given {len(prompts)} prompts")
        with contextlib.closing(connection(stack.url)) as router:
            # Without replay only a cleared cache is known from its beginning.
            ask(router, "POST", "/flush_cache")
            wait_exact(router, 0)
            fill(stack.worker_urls, prompts)
            before = wait_exact(router, len(prompts) * PROMPT_BLOCKS)
            checked = random.Random(1).sample(prompts, CHECKED_PROMPTS)
            predicted = [overlaps(router, body) for body in checked]
            took_s, same = [], 0
            for number in range(KILLS):
                more = [] if has_replay else [prompt(len(prompts) + WORKERS * number + place) for place in range(WORKERS)]
                took_s.append(kill(stack, router, more))
                same += sum(overlaps(router, body) == found for body, found in zip(checked, predicted, strict=True))
                progress(f"{name}: kill {number + 1} of {KILLS}: {took_s[-1]:.2f} s")
    times = " ".join(f"{value:.2f}" for value in took_s)
    print(f"{name:32}{before:12,}{times:>24}{f'{same} of {KILLS * CHECKED_PROMPTS}':>22}{GOAL_S:9.1f}", flush=True)
    return max(took_s)


def kill(stack: Stack, router: http.client.HTTPConnection, more: list[bytes]) -> float:
    """Kill the index process; returns the seconds until all is EXACT again. more: prompts for the workers meanwhile. Raises BenchError."""
    router_pid = stack.children[-1].pid
    known = wait_exact(router, 0)
    victim = index_pid(router_pid)
    began_s = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    while index_pid(router_pid) in (0, victim):
        if time.monotonic() - began_s > TIMEOUT_S:
            raise BenchError("the router does not start another index process")
        time.sleep(0.001)
    if more:
        time.sleep(SILENT_S)
        fill(stack.worker_urls, more)
    wait_exact(router, known + PROMPT_BLOCKS * len(more))
    return time.monotonic() - began_s


def prompt(number: int) -> bytes:
    """Body of a completion whose prompt is token ids; no two have a block in common."""
    rng = random.Random(number)
    ids = [rng.randrange(1000, 30_000) for _ in range(PROMPT_TOKENS)]
    return orjson.dumps({"model": "demo-model", "prompt": ids, "max_tokens": 1, "ignore_eos": True})


def connection(url: str) -> http.client.HTTPConnection:
    parts = urlsplit(url)
    return http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=TIMEOUT_S)


def ask(peer: http.client.HTTPConnection, method: str, path: str, body: bytes | None = None) -> bytes:
    """Body of an answer that is 200. Raises BenchError."""
    peer.request(method, path, body, JSON)
    answer = peer.getresponse()
    data = answer.read()
    if answer.status != 200:
        raise BenchError(f"{method} {path} is answered {answer.status}: {data[:300]!r}")
    return data


def fill(urls: list[str], prompts: list[bytes]) -> None:
    """Give the prompts to the workers themselves, each its share."""

    def give(number: int) -> None:
        with contextlib.closing(connection(urls[number])) as worker:
            for body in prompts[number :: len(urls)]:
                ask(worker, "POST", "/v1/completions", body)

    with ThreadPoolExecutor(len(urls)) as threads:
        list(threads.map(give, range(len(urls))))


def wait_exact(router: http.client.HTTPConnection, blocks: int) -> int:
    """Wait until every worker is EXACT and so many blocks are known; returns how many are. Raises BenchError."""
    end_s = time.monotonic() + TIMEOUT_S
    while time.monotonic() < end_s:
        seen = [worker["kv"] for worker in orjson.loads(ask(router, "GET", "/workers"))["workers"]]
        known: int = sum(rank["blocks"] for kv in seen for rank in kv["ranks"])
        if known >= blocks and all(kv["state"] == "EXACT" for kv in seen):
            return known
        time.sleep(0.01)
    raise BenchError(f"the workers are not EXACT with {blocks} blocks within {TIMEOUT_S:.0f} s: {seen}")


def overlaps(router: http.client.HTTPConnection, body: bytes) -> list[tuple[str, int]]:
    """What the router would find of a prompt, worker by worker."""
    told = orjson.loads(ask(router, "POST", "/explain/v1/completions", body))
    return sorted((candidate["worker"], candidate["overlap_blocks"]) for candidate in told["candidates"])


def index_pid(router_pid: int) -> int:
    """Pid of the index process of a router, 0 while there is none."""
    for pid in tree(router_pid):
        with contextlib.suppress(OSError):
            if re.search(rb"sglfast\.index\.main", Path(f"/proc/{pid}/cmdline").read_bytes()):
                return pid
    return 0


if __name__ == "__main__":
    sys.exit(main())
