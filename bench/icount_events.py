"""The cases of icount_cases.py that are about KV events: from the bytes of a batch, or of a run of them, to blocks in the tree."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglfast.shm import KeyRoute

Call = Callable[[], object]

GOLDEN = Path(__file__).parent.parent / "tests" / "golden"


def decode_batch_of_a_child_store() -> Call:
    """The common batch: one BlockStored of a few pages, map shape."""
    from sglfast.wire.kv_events import decode_batch

    folder = GOLDEN / "kv_events" / "sglang_batches" / "0.5.23"
    return partial(decode_batch, (folder / "stored_child_multi_page.msgpack").read_bytes())


def decode_batch_of_64_stores_by_256_tokens() -> Call:
    """A large batch, map shape: the token ids must not be decoded."""
    from sglfast.wire.kv_events import decode_batch

    folder = GOLDEN / "kv_events" / "sglang_batches" / "0.5.23"
    return partial(decode_batch, (folder / "large_64x256.msgpack").read_bytes())


def apply_a_batch_of_64_blocks_by_hash() -> Call:
    """A batch of 64 one-block events into the tree, SHA route; they are stored already after the first call."""
    return apply_batch("sha256")


def apply_a_batch_of_64_blocks_by_tokens() -> Call:
    """The same on the token route: decode, hash 16 tokens a block, map, store."""
    return apply_batch("tokens")


def apply_a_run_of_64_batches_of_a_block_by_hash() -> Call:
    """The same blocks as 64 messages of an engine that sends one for each, read at once."""
    return apply_batch("sha256", n_batches=64)


def apply_a_run_of_64_batches_of_a_block_by_tokens() -> Call:
    """The same on the token route."""
    return apply_batch("tokens", n_batches=64)


def apply_batch(route: "KeyRoute", n_batches: int = 1) -> Call:
    import logging
    import struct
    from itertools import accumulate

    from sglfast._blockhash import page_keys
    from sglfast._hashtree import TreeWriter
    from sglfast.index.live import Run
    from sglfast.index.rank import RankIndex, TreeLock
    from sglfast.shm import create
    from sglfast.wire import kv_events

    _, segment = create(max_workers=64, max_ranks=64, max_shards=1, capacity_blocks=1 << 16, prediction_blocks=1 << 14)
    tokens = [i * 31 % 128_000 for i in range(64 * 16)]
    keys = page_keys(tokens, 16)
    hashes = [int.from_bytes(keys[at : at + 8], "little") for at in range(0, len(keys), 8)]
    events = [
        kv_events.stored(
            block_hashes=[hashes[i]],
            parent_block_hash=hashes[i - 1] if i else None,
            token_ids=tokens[16 * i : 16 * i + 16],
            block_size=16,
        )
        for i in range(64)
    ]
    payload = kv_events.encode_batch(1.0, events, 0)
    log = logging.LoggerAdapter(logging.getLogger("icount"), {})
    index = RankIndex(TreeLock(TreeWriter(segment)), 0, block_size=16, is_bigram=False, log=log, key_route=route)
    index.apply(payload)
    assert index.owned_blocks == 64

    def apply() -> None:
        index.apply(payload)
        index.settle()

    if n_batches == 1:
        return apply
    per_batch = len(events) // n_batches
    payloads = [kv_events.encode_batch(1.0, events[at : at + per_batch], 0) for at in range(0, len(events), per_batch)]
    run = Run(0, b"".join(payloads), struct.pack(f"{n_batches}Q", *accumulate(map(len, payloads))))

    def apply_run() -> None:
        assert index.apply_run(run, 0)[0] == n_batches
        index.settle()

    return apply_run


EVENT_CASES: tuple[Callable[[], Call], ...] = (
    decode_batch_of_a_child_store,
    decode_batch_of_64_stores_by_256_tokens,
    apply_a_batch_of_64_blocks_by_hash,
    apply_a_batch_of_64_blocks_by_tokens,
    apply_a_run_of_64_batches_of_a_block_by_hash,
    apply_a_run_of_64_batches_of_a_block_by_tokens,
)
