"""The oracle: event streams of real radix caches, decoded, applied and asked through two mappings of one shared memory."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from sglfast import shm
from sglfast._blockhash import chain_seed, page_keys, token_keys
from sglfast._counters import RANK_EXACT
from sglfast._hashtree import TreeReader, TreeWriter
from sglfast.index.rank import RankIndex, TreeLock
from sglfast.index.sink import Outcome
from sglfast.index.stream import RankStream
from sglfast.shm import KeyRoute
from sglfast.wire.frames import parse_live

STREAMS = sorted((Path(__file__).parent / "golden" / "kv_events" / "sglang_streams").glob("*.jsonl"))
# Far apart, and in two words of the bitset.
RANKS = (0, 63, 70)


class Feed:
    """A sink that writes into the tree."""

    def __init__(self, index: RankIndex) -> None:
        self.index = index

    def apply(self, payload: bytes) -> Outcome:
        return self.index.apply(payload)

    def clear(self, why: str) -> None:
        raise AssertionError(why)

    def ask_replay(self, start_seq: int) -> None:
        raise AssertionError(start_seq)


def test_all_streams_are_here() -> None:
    assert len(STREAMS) == 3


@pytest.mark.parametrize("route", ["sha256", "tokens"])
@pytest.mark.parametrize("path", STREAMS, ids=lambda path: path.stem)
def test_every_query_is_answered_exactly(path: Path, route: KeyRoute) -> None:
    lines: list[dict[str, Any]] = [json.loads(line) for line in path.read_text().splitlines()]
    meta = lines[0]
    page_size, is_bigram, n_workers = meta["page_size"], meta["is_bigram"], meta["workers"]
    fd, writing = shm.create(max_workers=8, max_ranks=128, max_shards=1, capacity_blocks=20_000)
    try:
        reader = TreeReader(shm.attach(fd))
    finally:
        os.close(fd)
    tree = TreeLock(TreeWriter(writing))
    log = logging.LoggerAdapter(logging.getLogger("test"), {})
    indexes = [
        RankIndex(tree, rank, block_size=page_size, is_bigram=is_bigram, log=log, key_route=route, model="m") for rank in RANKS[:n_workers]
    ]
    seed = chain_seed("m", page_size, bigram=is_bigram)
    streams = [RankStream(Feed(index), has_replay=False) for index in indexes]
    n_batches = n_queries = n_hits = 0
    for number, line in enumerate(lines[1:], start=2):
        if line["op"] == "batch":
            seq, payload = parse_live([bytes.fromhex(frame) for frame in line["frames"]])
            streams[line["worker"]].on_live(seq, payload, 0.0)
            n_batches += 1
            continue
        if route == "sha256":
            keys = page_keys(line["token_ids"], page_size, bigram=is_bigram)
        else:
            keys = token_keys(line["token_ids"], page_size, bigram=is_bigram, seed=seed)
        longest = reader.match(keys)
        overlaps = dict(reader.hits())
        found = [overlaps.pop(index.rank, 0) for index in indexes]
        assert found == line["expected_matched_pages"], f"{path.name}:{number}"
        assert not overlaps
        assert longest == max(found)
        n_queries += 1
        n_hits += any(found)
    assert (n_batches, n_queries, n_hits) == tuple(meta["stats"][name] for name in ("batches", "queries", "hits"))
    assert sum(index.counters.undecoded + index.counters.orphans for index in indexes) == 0
    for index in indexes:
        index.settle()
    assert [index.mapped_blocks for index in indexes] == [index.owned_blocks * (route == "tokens") for index in indexes]
    assert all(stream.status() == (RANK_EXACT, 0) for stream in streams)
    assert all(index.mismatch == "" for index in indexes)
    for index in indexes:
        index.retire()
        index.wipe()
    assert tree.writer.live_blocks == 0
