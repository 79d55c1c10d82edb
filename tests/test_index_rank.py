"""One rank's blocks in the tree: tiers, what cannot be read, and the check that shards will find the blocks."""

import logging
import mmap
import struct
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from conftest import GOLDEN

from sglfast._blockhash import page_keys
from sglfast._hashtree import TreeReader, TreeWriter
from sglfast._segment import Segment, segment_bytes
from sglfast.index import rank as rank_module
from sglfast.index.live import Run
from sglfast.index.rank import RankIndex, TreeLock
from sglfast.index.sink import Outcome
from sglfast.wire import kv_events
from sglfast.wire.kv_events import EventOut

SIZES = {"max_workers": 2, "max_ranks": 64, "max_shards": 1, "capacity_blocks": 4096}
TOKENS = list(range(100, 116))
P = 4


class House:
    """A tree of its own and one rank in it."""

    def __init__(self) -> None:
        self.segment = Segment.format(mmap.mmap(-1, segment_bytes(**SIZES)), **SIZES)
        self.tree = TreeLock(TreeWriter(self.segment))
        self.reader = TreeReader(self.segment)
        self.index = self.rank(3)

    def rank(self, rank: int, *, is_bigram: bool = False, block_size: int = P) -> RankIndex:
        log = logging.LoggerAdapter(logging.getLogger("test.rank"), {})
        return RankIndex(self.tree, rank, block_size=block_size, is_bigram=is_bigram, log=log)

    def overlap(self, keys: bytes, tiers: int = 7) -> int:
        self.reader.match(keys, tiers)
        return self.reader.overlap(3)


@pytest.fixture
def house() -> House:
    return House()


def u64s(keys: bytes) -> list[int]:
    return [int.from_bytes(keys[at : at + 8], "little") for at in range(0, len(keys), 8)]


def batch(*events: EventOut) -> bytes:
    return kv_events.encode_batch(1.0, events, 0)


def root(tokens: list[int] = TOKENS, *, medium: str | None = "GPU", cache_salt: str | None = None) -> EventOut:
    keys = page_keys(tokens, P, cache_salt=(cache_salt or "").encode())
    return kv_events.stored(
        block_hashes=u64s(keys), parent_block_hash=None, token_ids=tokens, block_size=P, medium=medium, cache_salt=cache_salt
    )


def removed(keys: bytes, medium: str | None) -> EventOut:
    return kv_events.removed(block_hashes=u64s(keys), medium=medium)


def test_store_and_remove(house: House) -> None:
    keys = page_keys(TOKENS, P)
    outcome = house.index.apply(batch(root()))
    assert (outcome.is_cleared, outcome.is_lossy) == (False, False)
    assert house.overlap(keys) == 4
    assert house.index.owned_blocks == 4
    house.index.apply(batch(removed(keys[16:24], "GPU")))
    assert house.overlap(keys) == 2
    counters = house.index.counters
    assert (counters.events, counters.blocks_stored, counters.blocks_removed, counters.undecoded) == (2, 4, 1, 0)
    assert house.index.last_event_ms > 1_600_000_000_000


def test_tiers_are_bits(house: House) -> None:
    """The steps of HiCache: on the device, copied to the host, gone from the device, gone from the host."""
    keys = page_keys(TOKENS, P)
    for event, device, host, any_tier in (
        (root(medium="GPU"), 4, 0, 4),
        (root(medium="CPU_PINNED"), 4, 4, 4),
        (removed(keys, "GPU"), 0, 4, 4),
        (root(medium="EXTERNAL"), 0, 4, 4),
        (removed(keys, "EXTERNAL"), 0, 4, 4),
        (removed(keys, "CPU_PINNED"), 0, 0, 0),
        (root(medium=None), 4, 0, 4),
        (root(medium="DISK"), 4, 0, 4),
        (removed(keys, None), 0, 0, 0),
        (root(medium="HOLOGRAM"), 0, 0, 0),
        (root(), 4, 0, 4),
        (removed(keys, "HOLOGRAM"), 0, 0, 0),
    ):
        house.index.apply(batch(event))
        assert (house.overlap(keys, 1), house.overlap(keys, 2), house.overlap(keys)) == (device, host, any_tier), event


def test_all_blocks_cleared_is_one_ranks_matter(house: House) -> None:
    other = house.rank(5)
    for index in (house.index, other):
        index.apply(batch(root()))
    outcome = house.index.apply(batch(kv_events.cleared(), root(TOKENS[:8])))
    assert outcome.is_cleared
    assert house.overlap(page_keys(TOKENS, P)) == 2
    assert house.reader.overlap(5) == 4


def test_unreadable_batch_is_counted(house: House, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        assert house.index.apply(b"\xc1 rubbish").is_lossy
    assert house.index.counters.undecoded == 3
    assert [record.levelname for record in caplog.records] == ["WARNING"]  # said once, counted thrice
    assert "undecodable" in caplog.text


def test_unreadable_event_is_counted_and_its_siblings_applied(house: House) -> None:
    good = msgspec.msgpack.decode(batch(root()))[1]
    payload = msgspec.msgpack.encode([1.0, [*good, ["BlockRemoved", 1]], 0])
    assert house.index.apply(payload).is_lossy
    assert house.index.counters.undecoded == 1
    assert house.overlap(page_keys(TOKENS, P)) == 4


def test_an_unknown_kind_of_event_is_passed_over(house: House, caplog: pytest.LogCaptureFixture) -> None:
    """What a newer engine tells besides is no loss: the rank stays as well known as it was."""
    good = msgspec.msgpack.decode(batch(root()))[1]
    for odd in (["BlockTeleported", 1], {"type": "BlockTeleported", "block_hashes": [1]}):
        payload = msgspec.msgpack.encode([1.0, [odd, *good], 0])
        assert house.index.apply(payload) == Outcome()
    assert house.index.counters.undecoded == 2
    assert house.overlap(page_keys(TOKENS, P)) == 4
    assert "1 of 2 events are of a kind that is not known here ('BlockTeleported')" in caplog.text


def test_retired_rank_touches_nothing(house: House) -> None:
    house.index.apply(batch(root()))
    house.index.retire()
    assert house.overlap(page_keys(TOKENS, P)) == 0, "found no more, though nothing is cleared yet"
    house.index.wipe()
    assert house.index.owned_blocks == 0
    successor = house.rank(3)
    successor.apply(batch(root()))
    house.index.apply(batch(removed(page_keys(TOKENS, P), None)))
    house.index.clear()
    house.index.retire()
    assert successor.owned_blocks == 4
    assert house.overlap(page_keys(TOKENS, P)) == 4


# ---- the check of root blocks ----


def test_agreeing_roots(house: House, caplog: pytest.LogCaptureFixture) -> None:
    house.index.apply(batch(root()))
    assert house.index.mismatch == ""
    salted = house.rank(4)
    salted.apply(batch(root(cache_salt="tenant")))
    assert salted.mismatch == ""
    golden = house.rank(6, is_bigram=True)
    golden.apply((GOLDEN / "kv_events/sglang_batches/0.5.23/stored_bigram.msgpack").read_bytes())
    assert golden.mismatch == ""
    assert not caplog.records


def bigram_root(tokens: list[int]) -> EventOut:
    keys = page_keys(tokens, P, bigram=True)
    n = len(keys) // 8 * P
    pairs = [[tokens[i], tokens[i + 1]] for i in range(n)]
    return kv_events.stored(block_hashes=u64s(keys), parent_block_hash=None, token_ids=pairs, block_size=P)


@pytest.mark.parametrize("n_tokens", [5, 9, 17, 18, 41])
def test_agreeing_bigram_roots_of_all_lengths(house: House, n_tokens: int, caplog: pytest.LogCaptureFixture) -> None:
    index = house.rank(7, is_bigram=True)
    index.apply(batch(bigram_root(list(range(n_tokens)))))
    assert index.mismatch == ""
    assert index.has_agreed
    assert not caplog.records


def test_mismatches_are_told(house: House, caplog: pytest.LogCaptureFixture) -> None:
    wrong = kv_events.stored(block_hashes=[1, 2, 3, 4], parent_block_hash=None, token_ids=TOKENS, block_size=P)
    text: Any = ["a"]
    text_tokens = kv_events.stored(block_hashes=[1], parent_block_hash=None, token_ids=text, block_size=P)
    for index, event, words in (
        (house.rank(8), wrong, "SHA-256"),
        (house.rank(9), bigram_root(TOKENS), "keyed by pairs"),
        (house.rank(11, block_size=64), root(), "hold 4 tokens, 64 are expected"),
        (house.rank(12), text_tokens, "neither"),
    ):
        caplog.clear()
        index.apply(batch(event))
        index.apply(batch(event))
        assert words in index.mismatch
        assert index.mismatch_reason > 0
        assert [record.levelname for record in caplog.records] == ["ERROR"]  # told once
        assert index.owned_blocks > 0  # and indexed all the same


def test_what_is_expected_of_pairs_can_change(house: House) -> None:
    index = house.rank(7, is_bigram=True)
    index.apply(batch(root()))
    assert "keyed by single tokens" in index.mismatch
    blocks = index.owned_blocks
    index.expect(is_bigram=False)
    assert (index.mismatch, index.mismatch_reason, index.has_agreed, index.owned_blocks) == ("", 0, False, blocks)
    index.apply(batch(root()))
    assert index.has_agreed
    index.expect(is_bigram=True)
    index.apply(batch(root()))
    assert "keyed by single tokens" in index.mismatch


def test_a_root_that_agrees_ends_the_mismatch(house: House, caplog: pytest.LogCaptureFixture) -> None:
    wrong = kv_events.stored(block_hashes=[1], parent_block_hash=None, token_ids=TOKENS[:4], block_size=P)
    for _ in range(20):
        house.index.apply(batch(wrong))
    assert house.index.mismatch
    for _ in range(16):
        house.index.apply(batch(root()))
    assert house.index.mismatch == ""
    assert [record.levelname for record in caplog.records] == ["ERROR"] or caplog.records[-1].levelname == "INFO"


def test_roots_that_cannot_tell(house: House) -> None:
    """LoRA keys are not recomputable, a store without tokens has nothing to compute from, a child needs its parent's digest."""
    tokens = TOKENS[:4]
    for event in (
        kv_events.stored(block_hashes=[1], parent_block_hash=None, token_ids=tokens, block_size=P, lora_name="ad"),
        kv_events.stored(block_hashes=[1], parent_block_hash=None, token_ids=tokens, block_size=P, lora_id=3),
        kv_events.stored(block_hashes=[1], parent_block_hash=None, token_ids=[], block_size=0, medium="CPU"),
        kv_events.stored(block_hashes=[1], parent_block_hash=7, token_ids=tokens, block_size=P),
    ):
        house.index.apply(batch(event))
        assert house.index.mismatch == ""
        assert not house.index.has_agreed


class CountingLock:
    """Counts how often it was taken."""

    def __init__(self) -> None:
        self.times = 0

    def __enter__(self) -> None:
        self.times += 1

    def __exit__(self, *_: object) -> None: ...

    def acquire(self) -> None:
        self.times += 1

    def release(self) -> None: ...


@pytest.mark.parametrize("is_live", [False, True])
def test_a_large_batch_is_written_in_turns_and_means_the_same(house: House, monkeypatch: pytest.MonkeyPatch, is_live: bool) -> None:
    """Other ranks' streams write between the turns."""

    def apply(payload: bytes) -> int:
        lock = CountingLock()
        monkeypatch.setattr(house.tree, "lock", lock)
        if is_live:
            assert house.index.apply_run(Run(0, payload, struct.pack("Q", len(payload))), 0)[0] == 1
        else:
            house.index.apply(payload)
        return lock.times

    house.index.apply(batch(root()))
    assert house.index.has_agreed
    tokens = list(range(1000, 1000 + 100 * P))
    keys = u64s(page_keys(tokens, P))
    events = [root(tokens), kv_events.removed(block_hashes=keys[90:]), kv_events.removed(block_hashes=[])]
    payload = batch(*events)
    monkeypatch.setattr(rank_module, "_TURN_KEYS", 8)
    monkeypatch.setattr(rank_module, "_TURN_BYTES", 300)
    assert len(payload) > 300
    assert apply(payload) == 110 // 8 + 2
    assert house.overlap(page_keys(tokens, P)) == 90
    small = [event for key in keys[70:90] for event in (kv_events.removed(block_hashes=[key]), root())]
    assert apply(batch(*small)) < len(small), "what is small goes together"
    assert house.overlap(page_keys(tokens, P)) == 70
    house.index.apply(batch(root(tokens), kv_events.cleared(), root()))
    assert house.index.owned_blocks == len(TOKENS) // P


LONG = list(range(2000, 2000 + 100 * P))


def pauses(monkeypatch: pytest.MonkeyPatch, between: Callable[[], None]) -> list[int]:
    """Turns of eight blocks; `between` is run behind each of them."""
    seen: list[int] = []

    def sleep(_: float) -> None:
        seen.append(1)
        between()

    monkeypatch.setattr(rank_module, "_TURN_KEYS", 8)
    monkeypatch.setattr(rank_module.time, "sleep", sleep)
    return seen


@pytest.mark.parametrize("way", ["usual", "event by event", "by the stream"])
def test_many_blocks_are_cleared_in_turns_and_found_by_nobody_meanwhile(house: House, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    other = house.rank(5)
    house.index.apply(batch(root(LONG)))
    assert house.overlap(page_keys(LONG, P)) == 100
    house.index.has_agreed = way == "usual"

    def between() -> None:
        assert not house.tree.lock.locked()
        assert house.overlap(page_keys(LONG, P)) == 0
        assert house.index.owned_blocks > 0
        tokens = [9000 + 100 * len(turns) + i for i in range(P)]
        other.apply(batch(root(tokens)))
        house.reader.match(page_keys(tokens, P))
        assert house.reader.overlap(5) == 1, "other ranks are written in between"

    turns = pauses(monkeypatch, between)
    if way == "by the stream":
        assert house.index.clear() == 100
        house.index.apply(batch(root()))
        assert house.index.counters.blocks_removed == 0, "by no event"
    else:
        assert house.index.apply(batch(kv_events.cleared(), root())).is_cleared
        assert house.index.counters.blocks_removed == 100
    assert len(turns) == 100 // 8
    assert house.overlap(page_keys(TOKENS, P)) == 4, "what came behind it has waited"
    assert (house.index.owned_blocks, other.owned_blocks) == (4, len(turns))


@pytest.mark.parametrize("is_usual", [True, False])
def test_a_rank_that_is_retired_while_it_is_cleared_takes_nothing_more(
    house: House, monkeypatch: pytest.MonkeyPatch, is_usual: bool
) -> None:
    house.index.apply(batch(root(LONG)))
    house.index.has_agreed = is_usual
    turns = pauses(monkeypatch, lambda: house.index.retire())
    house.index.apply(batch(kv_events.cleared(), root()))
    assert len(turns) == 1
    assert house.overlap(page_keys(LONG, P)) == house.overlap(page_keys(TOKENS, P)) == 0
    beats: list[int] = []
    house.index.wipe(lambda: beats.append(1))
    assert len(beats) == -(-92 // 8), "a sign of life behind each turn"
    assert house.tree.writer.live_blocks == 0
    house.rank(3).apply(batch(root()))
    assert house.overlap(page_keys(TOKENS, P)) == 4
