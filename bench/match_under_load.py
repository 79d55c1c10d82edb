"""What a shard's question to the hash tree takes while the index writes; what the index can write; what a block takes of memory.

    .venv/bin/python bench/match_under_load.py

A writer process stores and removes 200,000 blocks a second in batches of 64, among half a million others, in turn for each of 64 ranks.
Meanwhile this process matches prompts of 128 blocks that all ranks own to different depths, each call timed from Python. `torn` counts
answers that never saw the tree still (they may be stale by one batch). Times above some milliseconds are another process's turn
on this core: on a machine with other work the percentiles say more than the maximum.
Then one process alone: blocks a second into an empty tree, and bytes of shared memory a block.
"""

import argparse
import multiprocessing
import os
import random
import statistics
import sys
import time
from multiprocessing.synchronize import Event as Flag

from compare import machine
from drawing import add_plot, draw_times

from sglfast import shm
from sglfast._hashtree import TreeReader, TreeWriter

RANKS, PROMPT_BLOCKS, PROMPTS, BATCH_BLOCKS = 64, 128, 64, 64
OTHERS = 500_000
CAPACITY = 1 << 20
GOAL_P50_US, GOAL_P99_US, GOAL_BLOCKS_PER_S, GOAL_BYTES = 2.0, 20.0, 2_000_000, 64
FORK = multiprocessing.get_context("fork")


def prompts() -> list[bytes]:
    """Keys of the prompts that are asked for, the same in both processes."""
    rng = random.Random(1)
    return [rng.randbytes(8 * PROMPT_BLOCKS) for _ in range(PROMPTS)]


def write(fd: int, core: int, blocks_per_s: int, ready: Flag, done: Flag, applied: "multiprocessing.SimpleQueue[float]") -> None:
    """The index's part, on a core of its own, at an even pace."""
    os.sched_setaffinity(0, {core})
    writer = TreeWriter(shm.attach(fd))
    for keys in prompts():
        for rank in range(RANKS):
            writer.store(rank, 0, keys[: 8 * (2 * rank + 2)])
    writer.store(0, 0, os.urandom(8 * OTHERS))
    live = [os.urandom(8 * BATCH_BLOCKS) for _ in range(1000)]
    ready.set()
    n_batches, start_s = 0, time.monotonic()
    while not done.is_set():
        for _ in range(20):
            place = n_batches % len(live)
            if n_batches // len(live) % 2:
                writer.remove(place % RANKS, 7, live[place])
            else:
                writer.store(place % RANKS, 0, live[place])
            n_batches += 1
        ahead_s = n_batches * BATCH_BLOCKS / blocks_per_s - (time.monotonic() - start_s)
        if ahead_s > 0:
            time.sleep(ahead_s)
    applied.put(n_batches * BATCH_BLOCKS / (time.monotonic() - start_s))


def matches_us(reader: TreeReader, seconds: float) -> list[float]:
    """Times of single matches, from Python."""
    asked = prompts()
    for keys in asked:
        if reader.match(keys) != PROMPT_BLOCKS:
            raise SystemExit("match_under_load: the tree does not hold what was stored")
    times: list[float] = []
    clock = time.perf_counter_ns
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        for keys in asked:
            start = clock()
            reader.match(keys)
            times.append((clock() - start) / 1000)
    return times


def apply_blocks_per_s(rounds: int) -> float:
    """Blocks a second that one process stores into an empty tree, in batches of 128; the best round."""
    fd, segment = shm.create(max_workers=1, max_ranks=RANKS, max_shards=1, capacity_blocks=CAPACITY)
    os.close(fd)
    writer = TreeWriter(segment)
    batches = [os.urandom(8 * 128) for _ in range(4000)]
    best = 0.0
    for _ in range(rounds):
        writer.reset()
        start_s = time.process_time()
        for number, keys in enumerate(batches):
            writer.store(number % RANKS, 0, keys)
        best = max(best, 128 * len(batches) / (time.process_time() - start_s))
    return best


def bytes_a_block() -> float:
    """Shared memory of the tree for each block that it can hold, at 64 ranks."""
    small = shm.create(max_workers=1, max_ranks=RANKS, max_shards=1, capacity_blocks=1024)
    large = shm.create(max_workers=1, max_ranks=RANKS, max_shards=1, capacity_blocks=CAPACITY)
    for fd, _ in (small, large):
        os.close(fd)
    return (large[1].total_bytes - small[1].total_bytes) / (CAPACITY - 1024)


def main() -> int:
    parser = argparse.ArgumentParser(description="Matching under load, applying, and memory, of the hash tree.")
    parser.add_argument("--seconds", type=float, default=5.0, help="time of matching, with and without the writer")
    parser.add_argument("--blocks-per-s", type=int, default=200_000, help="what the writer applies")
    add_plot(parser)
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    fd, segment = shm.create(max_workers=1, max_ranks=RANKS, max_shards=1, capacity_blocks=CAPACITY)
    ready, done = FORK.Event(), FORK.Event()
    applied: multiprocessing.SimpleQueue[float] = FORK.SimpleQueue()
    writer = FORK.Process(target=write, args=(fd, cores[-1], options.blocks_per_s, ready, done, applied), daemon=True)
    writer.start()
    os.sched_setaffinity(0, {cores[0]})
    try:
        if not ready.wait(60.0):
            raise SystemExit("match_under_load: the writer did not begin")
        reader = TreeReader(segment)
        loaded = matches_us(reader, options.seconds)
        torn = reader.torn_total
        done.set()
        pace = applied.get()
        writer.join(10.0)
        idle = matches_us(reader, options.seconds)
    finally:
        writer.kill()
        os.close(fd)
    print(f"{machine()}; {time.strftime('%Y-%m-%d')}")
    head = f"match of {PROMPT_BLOCKS} blocks over {RANKS} ranks, us a call from Python"
    print(f"{head:64}{'p50':>8}{'p99':>8}{'p99.9':>8}{'max':>10}{'torn':>8}")
    loads = ((f"while {pace:,.0f} blocks/s are applied", loaded, torn), ("while nothing is", idle, 0))
    for name, times, n_torn in loads:
        cuts = statistics.quantiles(times, n=1000)
        print(f"  {name:62}{cuts[499]:8.2f}{cuts[989]:8.2f}{cuts[998]:8.2f}{max(times):10.0f}{n_torn / len(times):8.2%}")
    print(f"  {'goal, while 200,000 blocks/s are applied':62}{GOAL_P50_US:8.2f}{GOAL_P99_US:8.2f}")
    print(f"applying stored blocks, one core: {apply_blocks_per_s(5):,.0f} blocks/s  goal {GOAL_BLOCKS_PER_S:,}")
    print(f"shared memory a block at {RANKS} ranks: {bytes_a_block():.1f} bytes  goal {GOAL_BYTES} at most")
    if options.plot:
        title = f"match of {PROMPT_BLOCKS} blocks over {RANKS} ranks, a call from Python"
        draw_times(options.plot, title, {name: times for name, times, _ in loads}, {"p50": GOAL_P50_US, "p99": GOAL_P99_US})
    return 0


if __name__ == "__main__":
    sys.exit(main())
