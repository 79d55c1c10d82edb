"""How fast KV events become visible: real ZMQ sockets, a publisher in a process of its own, the index's own thread and tree on one core.

    .venv/bin/python bench/index_events.py

For each key route and each way to publish (all blocks of a prompt in one event; an event a block, many to a batch; a message for each
block, the hardest) the table shows blocks a second: `a core` is blocks over the CPU time of this process, libzmq's thread included,
`wall` is over the time that passed. Visible means: a reader of the tree finds them. The wall clock needs a second idle core.
Everything is there to be read from the beginning on: this is what a core can do. At a tenth of that rate libzmq's thread wakes up for
every few messages, each time for 10 to 25 us, and a block takes more.
"""

import argparse
import contextlib
import logging
import multiprocessing
import os
import sys
import threading
import time
from multiprocessing.connection import Connection

import zmq
from compare import machine
from drawing import Bars, add_plot, draw_bars

from sglfast import shm
from sglfast._blockhash import page_keys
from sglfast._counters import RankTable
from sglfast._hashtree import TreeReader, TreeWriter
from sglfast.index.rank import RankIndex, TreeLock
from sglfast.index.subscriber import Endpoints, Subscriber
from sglfast.shm import KeyRoute
from sglfast.wire import kv_events
from sglfast.wire.frames import live_frames

BLOCK_TOKENS = {"sha256": 64, "tokens": 16}  # the defaults of SGLang's larger models and of vLLM
PROMPT_BLOCKS = 128
EVENTS_A_BATCH = 64
WANTED_BLOCKS_PER_S = 300_000
TIMEOUT_S = 120.0
SPAWN = multiprocessing.get_context("spawn")
WAYS: dict[str, tuple[int, int]] = {  # blocks an event, blocks a batch
    "a prompt an event": (PROMPT_BLOCKS, PROMPT_BLOCKS),
    "a block an event": (1, EVENTS_A_BATCH),
    "a block a message": (1, 1),
}


def payloads(route: KeyRoute, way: str, n_blocks: int) -> list[bytes]:
    """Batches that store `n_blocks` blocks of prompts which have nothing in common, in the shape of today's engines."""
    step, per_batch = WAYS[way]
    size = BLOCK_TOKENS[route]
    batches: list[bytes] = []
    for number in range(n_blocks // PROMPT_BLOCKS):
        tokens = [(number * 7919 + i * 31) % 128_000 for i in range(size * PROMPT_BLOCKS)]
        keys = page_keys(tokens, size)
        hashes = [int.from_bytes(keys[at : at + 8], "little") for at in range(0, len(keys), 8)]
        events = [
            kv_events.stored(
                block_hashes=hashes[i : i + step],
                parent_block_hash=hashes[i - 1] if i else None,
                token_ids=tokens[i * size : (i + step) * size],
                block_size=size,
            )
            for i in range(0, PROMPT_BLOCKS, step)
        ]
        events_a_batch = per_batch // step
        batches += [kv_events.encode_batch(1.0, events[i : i + events_a_batch], 0) for i in range(0, len(events), events_a_batch)]
    return batches


def publish(route: KeyRoute, way: str, n_blocks: int, cores: list[int], owner: "Connection[int, None]") -> None:
    """The other process: a PUB socket, whose port it tells, that sends everything at once when it is told to, until its owner hangs up.

    Messages are made before and wait in libzmq, whose own proxy sends them: a loop in Python could not send as fast as is read.
    A pipe and no queue or event: those are semaphores with names, which a run that is stopped leaves behind.
    """
    os.sched_setaffinity(0, cores)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    live, waiting, feed = context.socket(zmq.XPUB), context.socket(zmq.PULL), context.socket(zmq.PUSH)
    for made in (live, waiting, feed):
        made.setsockopt(zmq.LINGER, 0)
        made.set_hwm(0)
    waiting.bind("inproc://waiting")
    feed.connect("inproc://waiting")
    for seq, payload in enumerate(payloads(route, way, n_blocks)):
        feed.send_multipart(live_frames(b"", seq, payload))
    owner.send(live.bind_to_random_port("tcp://127.0.0.1"))
    live.recv()  # the subscription
    owner.poll(TIMEOUT_S)
    with contextlib.suppress(EOFError):
        owner.recv()
    sender = threading.Thread(target=forward, args=(waiting, live))
    sender.start()
    owner.poll(TIMEOUT_S)
    feed.close()
    context.term()  # ends the proxy
    sender.join()


def forward(source: zmq.Socket[bytes], target: zmq.Socket[bytes]) -> None:
    """Send on what comes, until the context ends; closes both."""
    with source, target, contextlib.suppress(zmq.ContextTerminated):
        zmq.proxy(source, target)


def measure(route: KeyRoute, way: str, n_blocks: int, other_cores: list[int]) -> tuple[float, float]:
    """Blocks a second of this process's CPU time, and of the wall clock."""
    fd, segment = shm.create(max_workers=1, max_ranks=64, max_shards=1, capacity_blocks=2 * n_blocks)
    os.close(fd)
    tree, reader = TreeLock(TreeWriter(segment)), TreeReader(segment)
    tree.writer.reset()
    owner, other_end = SPAWN.Pipe()
    publisher = SPAWN.Process(target=publish, args=(route, way, n_blocks, other_cores, other_end), daemon=True)
    publisher.start()
    other_end.close()
    log = logging.LoggerAdapter(logging.getLogger("bench"), {})
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    index = RankIndex(tree, 0, block_size=BLOCK_TOKENS[route], is_bigram=False, log=log, key_route=route)
    subscriber = Subscriber(
        context, Endpoints(f"tcp://127.0.0.1:{owner.recv()}", None, b""), index, RankTable(segment), generation=1, log=log
    )
    subscriber.start()
    try:
        time.sleep(0.3)  # the subscription arrives
        wall_s, cpu_s = time.monotonic(), time.process_time()
        owner.send(None)
        while reader.stats()["live_blocks"] < n_blocks:
            time.sleep(0.002)
            if time.monotonic() - wall_s > TIMEOUT_S:
                raise SystemExit(f"index_events: only {reader.stats()['live_blocks']} of {n_blocks} blocks arrived ({route}, {way})")
        return n_blocks / (time.process_time() - cpu_s), n_blocks / (time.monotonic() - wall_s)
    finally:
        owner.close()
        subscriber.stop()
        subscriber.join(5.0)
        context.term()
        publisher.join(5.0)


def main() -> int:
    parser = argparse.ArgumentParser(description="KV events from ZMQ frames to visible blocks, on one core.")
    parser.add_argument("--blocks", type=int, default=512_000, help="blocks of each run")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each row; the best one counts")
    add_plot(parser)
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    own_core, other_cores = cores[0], cores[1:] or cores
    os.sched_setaffinity(0, {own_core})
    print(f"{machine()}; {time.strftime('%Y-%m-%d')}; CPU {own_core} reads, {other_cores} publish")
    print(f"{'KV events to visible blocks':44}{'a core, blocks/s':>18}{'wall, blocks/s':>18}{'goal':>12}")
    reached: dict[str, float] = {}
    for route in ("sha256", "tokens"):
        for way in WAYS:
            n_blocks = options.blocks // PROMPT_BLOCKS * PROMPT_BLOCKS
            a_core, wall = map(max, zip(*(measure(route, way, n_blocks, other_cores) for _ in range(options.rounds)), strict=True))
            name = f"{route}, {BLOCK_TOKENS[route]} tokens a block, {way}"
            reached[name] = a_core
            print(f"{name:44}{a_core:18,.0f}{wall:18,.0f}{WANTED_BLOCKS_PER_S:12,}", flush=True)
    if options.plot:
        bars = Bars("blocks/s of one core", reached, goal=("at least", WANTED_BLOCKS_PER_S))
        draw_bars(options.plot, "KV events, from a TCP socket to visible blocks", [bars])
    return 0


if __name__ == "__main__":
    sys.exit(main())
