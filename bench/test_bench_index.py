"""Wall-clock time from ZMQ frames to blocks that shards see, by the engine's way to publish; and of taking over a tree.

`extra_info` holds blocks per second of one core. Frames are in memory: the kernel's and libzmq's part is not here.
"""

import logging
import os
from collections.abc import Callable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from sglfast import shm
from sglfast._blockhash import page_keys
from sglfast._hashtree import TreeReader, TreeWriter
from sglfast._segment import Segment
from sglfast.index.rank import RankIndex, TreeLock
from sglfast.index.sink import Outcome
from sglfast.index.stream import RankStream
from sglfast.shm import KeyRoute
from sglfast.wire import kv_events
from sglfast.wire.frames import live_frames, parse_live

P = 64
BLOCKS = 128
BATCHES = 200


class Feed:
    """A stream's sink that writes into the tree."""

    def __init__(self, index: RankIndex) -> None:
        self.index = index

    def apply(self, payload: bytes) -> Outcome:
        return self.index.apply(payload)

    def clear(self, why: str) -> None:
        raise AssertionError(why)

    def ask_replay(self, start_seq: int) -> None:
        raise AssertionError(start_seq)


def segment(capacity_blocks: int) -> Segment:
    fd, made = shm.create(max_workers=1, max_ranks=64, max_shards=1, capacity_blocks=capacity_blocks)
    os.close(fd)
    return made


def prompt(number: int) -> list[int]:
    return [(number * 7919 + i * 31) % 128_000 for i in range(P * BLOCKS)]


def batch(number: int, way: str) -> bytes:
    """One prefilled prompt of 8,192 tokens: as one merged event, or an event a block (sglang <= 0.5.14)."""
    tokens = prompt(number)
    keys = page_keys(tokens, P)
    hashes = [int.from_bytes(keys[at : at + 8], "little") for at in range(0, len(keys), 8)]
    step = BLOCKS if way == "merged" else 1
    events = [
        kv_events.stored(
            block_hashes=hashes[i : i + step],
            parent_block_hash=hashes[i - 1] if i else None,
            token_ids=tokens[i * P : (i + step) * P],
            block_size=P,
        )
        for i in range(0, BLOCKS, step)
    ]
    return kv_events.encode_batch(1.0, events, 0)


@pytest.mark.parametrize("route", ["sha256", "tokens"])
@pytest.mark.parametrize("way", ["merged", "one_block_events", "one_block_batches"])
def test_bench_frames_to_visible(benchmark: BenchmarkFixture, way: str, route: KeyRoute) -> None:
    if way == "one_block_batches":  # the hardest: a message for each block
        blocks = [kv_events.decode_batch(batch(number, "one_block_events")) for number in range(20)]
        payloads = [
            kv_events.encode_batch(
                1.0,
                [
                    kv_events.stored(
                        block_hashes=event.block_hashes,
                        parent_block_hash=event.parent_block_hash,
                        token_ids=kv_events.decode_token_ids(event.token_ids),
                        block_size=P,
                    )
                ],
                0,
            )
            for made in blocks
            for event in made.events
            if isinstance(event, kv_events.BlockStored)
        ]
        n_blocks = len(payloads)
    else:
        payloads = [batch(number, way) for number in range(BATCHES)]
        n_blocks = BATCHES * BLOCKS
    frames = [live_frames(b"", seq, payload) for seq, payload in enumerate(payloads)]
    log = logging.LoggerAdapter(logging.getLogger("bench"), {})
    made_segment = segment(1 << 16)

    def fresh() -> tuple[tuple[RankStream], dict[str, object]]:
        tree = TreeLock(TreeWriter(made_segment))
        tree.writer.reset()
        return (RankStream(Feed(RankIndex(tree, 0, block_size=P, is_bigram=False, log=log, key_route=route)), has_replay=False),), {}

    def follow(stream: RankStream) -> None:
        on_live: Callable[[int, bytes, float], None] = stream.on_live
        for item in frames:
            seq, payload = parse_live(item)
            on_live(seq, payload, 0.0)

    benchmark.pedantic(follow, setup=fresh, rounds=5)  # type: ignore[no-untyped-call]
    if benchmark.stats is not None:  # None when benchmarks are switched off
        benchmark.extra_info["blocks_per_s"] = round(n_blocks / benchmark.stats["min"])
    assert TreeReader(made_segment).stats()["live_blocks"] == n_blocks


def test_bench_adopt_a_million_blocks(benchmark: BenchmarkFixture) -> None:
    made = segment(1 << 21)
    writer = TreeWriter(made)
    writer.reset()
    for rank in range(8):
        writer.store(rank, 0, os.urandom(8 * 125_000))
    n_blocks = benchmark.pedantic(lambda heir: heir.adopt(), setup=lambda: ((TreeWriter(made),), {}), rounds=5)  # type: ignore[no-untyped-call]
    assert n_blocks == 1_000_000
