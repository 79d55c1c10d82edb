"""The token route in one pass over a batch is the token route event by event: random, recorded and damaged batches."""

import logging
import mmap
import struct
from itertools import accumulate
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglfast._hashtree import TreeReader, TreeWriter
from sglfast._keymap import KeyMap
from sglfast._kvdecode import CLEAR
from sglfast._segment import Segment, segment_bytes
from sglfast.index.rank import RankIndex, TreeLock
from sglfast.index.sink import Outcome
from sglfast.shm import KeyRoute

GOLDEN = Path(__file__).parent / "golden" / "kv_events"
RECORDED = [path.read_bytes() for path in sorted(GOLDEN.glob("*_batches/*/*.msgpack"))]
SMALL = [payload for payload in RECORDED if len(payload) < 600]
P = 2
LOG = logging.LoggerAdapter(logging.getLogger("test.usual"), {})
LOG.setLevel(logging.CRITICAL)
SIZES = {"max_workers": 1, "max_ranks": 64, "max_shards": 1, "capacity_blocks": 4096}


class Counting(RankIndex):
    """Counts the batches that were usual; with `is_general` there are none."""

    is_general = False
    n_usual = 0

    def _apply_usual(self, payload: bytes) -> Outcome | None:
        outcome = None if self.is_general else super()._apply_usual(payload)
        self.n_usual += outcome is not None
        return outcome


class Pair:
    """Two indexes of the same stream, one of which takes every batch event by event."""

    def __init__(self, key_route: KeyRoute = "tokens", block_size: int = P) -> None:
        self.ranks: list[Counting] = []
        self.readers: list[TreeReader] = []
        for is_general in (False, True):
            segment = Segment.format(mmap.mmap(-1, segment_bytes(**SIZES)), **SIZES)
            tree = TreeLock(TreeWriter(segment))
            index = Counting(tree, 3, block_size=block_size, is_bigram=False, log=LOG, key_route=key_route, model="m")
            index.is_general, index.has_agreed = is_general, True
            self.ranks.append(index)
            self.readers.append(TreeReader(segment))

    def apply(self, payload: bytes) -> None:
        outcomes = []
        for index in self.ranks:
            outcomes.append(index.apply(payload))
            index.settle()
            index.has_agreed = True
        assert outcomes[0] == outcomes[1], msgspec.msgpack.decode(payload)
        self.check()

    def check(self) -> None:
        maps, owned = [], []
        for index in self.ranks:
            hashes, keys = index._by_tokens._map.items()
            found = dict(zip(words(hashes), words(keys), strict=True))
            maps.append(found)
            writer = index._tree.writer
            owned.append({key for key in found.values() if any(writer.owns(3, key.to_bytes(8, "little")))})
        assert maps[0] == maps[1]
        assert owned[0] == owned[1]
        assert self.ranks[0].owned_blocks == self.ranks[1].owned_blocks
        assert self.ranks[0].counters == self.ranks[1].counters
        for tier in (1, 2, 4):
            for key in maps[0].values():
                packed = key.to_bytes(8, "little")
                assert [reader.match(packed, tier) for reader in self.readers] in ([0, 0], [1, 1])


def words(packed: bytes) -> list[int]:
    return [int.from_bytes(packed[at : at + 8], "little") for at in range(0, len(packed), 8)]


hashes_ = st.integers(0, 6) | st.sampled_from([2**63, 2**64 - 1, -1, -(2**63), b"\0" * 24 + b"\0" * 7 + b"\3", b"x" * 200, b"short"])
tokens_ = st.integers(0, 3) | st.sampled_from([127, 128, 65535, 65536, 2**32 - 1])
KINDS = [None, "full_attention", "mla_attention", "sliding_window", "sliding_window_mla", "mamba"]
odd = st.integers(0, 19).map(lambda n: n == 0)
group = st.sampled_from([None, None, None, 0, 0, 1, 2])


@st.composite
def stored(draw: st.DrawFn) -> dict[str, Any]:
    names = draw(st.lists(hashes_, min_size=1, max_size=4))
    n_tokens = 0 if draw(odd) else P * len(names) + draw(odd)
    event: dict[str, Any] = {
        "type": "BlockStored",
        "block_hashes": names,
        "parent_block_hash": draw(st.none() | hashes_),
        "token_ids": draw(st.lists(tokens_, min_size=n_tokens, max_size=n_tokens)),
        "block_size": P if n_tokens and not draw(odd) else draw(st.sampled_from([0, 1, P])),
        "lora_id": 7 if draw(odd) else None,
        "medium": draw(st.sampled_from(["GPU", "GPU", "CPU", "STORAGE", "EXTERNAL", None] + ["TAPE"] * draw(odd))),
        "lora_name": "ad" if draw(odd) else None,
    }
    if draw(st.booleans()):
        event["extra_keys"] = draw(
            st.sampled_from([None, [None] * len(names), [None] * len(names), [], [["salt"]] + [None] * (len(names) - 1)])
        )
        event["group_idx"] = draw(group)
        event["kv_cache_spec_kind"] = draw(st.sampled_from(KINDS))
    if draw(odd):
        event["token_ids"] = draw(st.sampled_from([["a"], [[1, 2], [2, 3]], [2**32, 1], [-1, 1], None]))
    if draw(odd):
        event["cache_salt"] = draw(st.sampled_from(["", "tenant"]))
    return event


@st.composite
def removed(draw: st.DrawFn) -> dict[str, Any]:
    event: dict[str, Any] = {"type": "BlockRemoved", "block_hashes": draw(st.lists(hashes_, max_size=4))}
    event["medium"] = draw(st.sampled_from(["GPU", "GPU", "CPU", "EXTERNAL", None]))
    if draw(st.booleans()):
        event["group_idx"] = draw(group)
    return event


def as_array(event: dict[str, Any]) -> list[Any]:
    """The shape of vLLM before 0.24; what has no place there is left out."""
    return [value for name, value in event.items() if name not in ("kv_cache_spec_kind", "cache_salt")]


event_ = st.one_of(stored(), stored(), stored(), removed(), removed(), st.integers(0, 9).map(lambda _: {"type": "AllBlocksCleared"}))


@settings(max_examples=1500, deadline=None)
@given(st.lists(st.lists(event_, max_size=6), max_size=6), st.booleans(), st.sampled_from(["tokens", "sha256"]))
def test_random_batches(batches: list[list[dict[str, Any]]], are_arrays: bool, key_route: KeyRoute) -> None:
    pair = Pair(key_route)
    for events in batches:
        pair.apply(msgspec.msgpack.encode([1.0, [as_array(event) for event in events] if are_arrays else events, 0]))


@settings(max_examples=400, deadline=None)
@given(st.lists(st.lists(event_, max_size=4), max_size=8), st.integers(0, 3))
def test_batches_as_one_are_the_batches(batches: list[list[dict[str, Any]]], first: int) -> None:
    """The same runs of keys and the same memory, up to the first batch that is not usual."""
    payloads = [msgspec.msgpack.encode([1.0, events, 0]) for events in batches]
    first = min(first, len(payloads))
    ends = struct.pack(f"{len(payloads)}Q", *accumulate(map(len, payloads)))
    one, many = KeyMap(), KeyMap()
    n_batches, placed = many.place_batches(b"".join(payloads), ends, first, seed=5, block_size=P, main_group=1)
    n_events = n_orphans = n_live = 0
    main_group, runs, removed = 1, [], b""
    for payload in payloads[first : first + n_batches]:
        found = one.place(payload, seed=5, block_size=P, main_group=main_group)
        assert found is not None
        n_events, n_orphans, main_group = n_events + found[0], n_orphans + found[1], found[3]
        n_live = found[2] if any(kind == CLEAR for kind, _, _ in found[4]) else n_live + found[2]
        runs += found[4]
        removed += found[5]
    assert sorted(one.items()) == sorted(many.items())
    if first + n_batches < len(payloads):
        assert one.place(payloads[first + n_batches], seed=5, block_size=P, main_group=main_group) is None
    if not n_batches:
        assert placed is None
        return
    assert placed is not None
    assert placed[:4] == (n_events, n_orphans, n_live, main_group)
    assert merged(placed[4]) == merged(runs)
    assert placed[5] == removed


def merged(runs: list[tuple[int, int, bytes]]) -> list[tuple[int, int, bytes]]:
    """Without a seam between batches."""
    out: list[tuple[int, int, bytes]] = []
    for kind, tiers, keys in runs:
        if out and out[-1][:2] == (kind, tiers) and kind != CLEAR:
            out[-1] = (kind, tiers, out[-1][2] + keys)
        else:
            out.append((kind, tiers, keys))
    return out


def test_what_vllm_sends_is_usual() -> None:
    """Nothing but salts, images and adapters takes the slow road."""
    slow = set()
    for path in sorted(GOLDEN.glob("vllm_batches/*/*.msgpack")):
        pair = Pair(block_size=16)
        pair.apply(path.read_bytes())
        if not pair.ranks[0].n_usual:
            slow.add(path.stem)
    assert slow == {"stored_lora", "stored_extra", "stored_extra_mm"}


@settings(max_examples=1500, deadline=None)
@given(st.data())
def test_damaged_batches(data: st.DataObject) -> None:
    payload = bytearray(data.draw(st.sampled_from(SMALL)))
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(payload)))
        payload[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    pair = Pair(block_size=16)
    pair.apply(bytes(payload))


@pytest.mark.parametrize("key_route", ["tokens", "sha256"])
def test_memory_follows_a_clear(key_route: KeyRoute) -> None:
    pair = Pair(key_route)
    for start in range(0, 2000, 100):
        pair.apply(
            msgspec.msgpack.encode(
                [1.0, [{
                    "type": "BlockStored", "block_hashes": list(range(start, start + 100)), "parent_block_hash": None,
                    "token_ids": list(range(start, start + 100 * P)), "block_size": P, "lora_id": None, "medium": "GPU",
                    "lora_name": None if key_route == "tokens" else "ad",
                }], 0]
            )
        )  # fmt: skip
    assert pair.ranks[0].mapped_blocks == pair.ranks[0].owned_blocks == 2000
    pair.apply(msgspec.msgpack.encode([1.0, [{"type": "AllBlocksCleared"}], 0]))
    assert pair.ranks[0].mapped_blocks == pair.ranks[0].owned_blocks == 0
