"""Live events applied as runs are live events applied one by one: blocks, counters, state and note, on both key routes.

Everything is real but the thread: two subscribers with a tree of their own each; one reads its socket, the other is handed the same
messages one at a time, as parse_live has them.
"""

import logging
import mmap
import os
import struct
from itertools import accumulate
from typing import Any

import msgspec
import pytest
import zmq
from hypothesis import example, given, settings
from hypothesis import strategies as st
from model import HashTreeModel

from sglfast._counters import RANK_EXACT, RankTable
from sglfast._hashtree import TreeReader, TreeWriter
from sglfast._kvsocket import LiveSocket
from sglfast._segment import Segment, segment_bytes
from sglfast.errors import KvEventError
from sglfast.index import subscriber as subscriber_module
from sglfast.index.held import Limits
from sglfast.index.live import Run
from sglfast.index.rank import RankIndex, TreeLock
from sglfast.index.sink import Outcome
from sglfast.index.stream_state import LOST
from sglfast.index.subscriber import Endpoints, Subscriber
from sglfast.shm import KeyRoute
from sglfast.wire.frames import live_frames, parse_live
from sglfast.wire.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, decode_batch, tier_mask

P = 2
RANK = 5
TOPIC = b"kv@a"
SIZES = {"max_workers": 1, "max_ranks": 64, "max_shards": 1, "capacity_blocks": 4096}
LOG = logging.LoggerAdapter(logging.getLogger("test.live"), {})
LOG.setLevel(logging.CRITICAL)

Message = list[bytes]


class Side:
    """A subscriber whose thread is the test's."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], route: KeyRoute, *, has_replay: bool) -> None:
        self.segment = Segment.format(mmap.mmap(-1, segment_bytes(**SIZES)), **SIZES)
        self.reader = TreeReader(self.segment)
        self.ranks = RankTable(self.segment)
        tree = TreeLock(TreeWriter(self.segment))
        self.index = RankIndex(tree, RANK, block_size=P, is_bigram=False, log=LOG, key_route=route, model="m")
        self.index.has_agreed = True
        endpoints = Endpoints("inproc://live", "inproc://nobody" if has_replay else None, b"kv", is_shared=True)
        limits = Limits(replay_timeout_s=1000.0, max_tries=1)
        self.subscriber = Subscriber(context, endpoints, self.index, self.ranks, generation=1, log=LOG, limits=limits, identity=7)
        self.stream = self.subscriber._stream

    def settle(self) -> None:
        """As the thread does behind a round."""
        self.index.has_agreed = True
        self.subscriber._save()
        self.subscriber.publish()

    def seen(self) -> dict[str, Any]:
        """All that a round leaves behind but the time."""
        row = self.ranks.row(RANK)
        return {
            "row": [value for word, value in enumerate(row) if word != subscriber_module.words.R_LAST_EVENT_MS],
            "blocks": {key: self.reader.match(key) for key in self.keys()},
            "hashes": sorted(self.index._by_tokens._map.items()),
            "stream": (self.stream.steady_seq, self.stream.status(), self.stream.resume, self.stream.counters, self.stream.held_batches),
        }

    def keys(self) -> list[bytes]:
        packed = self.index._by_tokens._map.items()[1] + struct.pack("<40Q", *range(40))
        return [packed[at : at + 8] for at in range(0, len(packed), 8)]


class Both:
    """The two, and the publisher of the one that reads."""

    def __init__(self, route: KeyRoute, *, has_replay: bool = False) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.live, self.source = self.context.socket(zmq.XPUB), self.context.socket(zmq.SUB)
        for made in (self.live, self.source):
            made.set_hwm(0)
        self.live.bind("inproc://live")
        self.source.setsockopt(zmq.SUBSCRIBE, b"kv")
        self.source.connect("inproc://live")
        assert self.live.poll(20_000)
        self.live.recv()
        self.fast, self.plain = (Side(self.context, route, has_replay=has_replay) for _ in range(2))

    def deliver(self, messages: list[Message]) -> None:
        """A round of each."""
        for frames in messages:
            self.live.send_multipart(frames)
        reader = LiveSocket(self.source, b"kv")
        while not self.fast.subscriber._read_live(reader):
            pass
        for frames in messages:
            if frames[0] != b"kv":
                continue
            try:
                item = parse_live(frames)
            except KvEventError as error:
                self.plain.index.note_undecoded(str(error))
            else:
                self.plain.stream.on_live(*item, 0.0)
        for side in (self.fast, self.plain):
            side.settle()
        assert self.fast.seen() == self.plain.seen()

    def close(self) -> None:
        for side in (self.fast, self.plain):
            side.subscriber._close_dealer()
            side.index.retire()
            os.close(side.subscriber._wake_fd)
        self.source.close()
        self.live.close(linger=0)
        self.context.term()


hashes = st.lists(st.integers(1, 9), min_size=1, max_size=3)


@st.composite
def stored(draw: st.DrawFn) -> dict[str, Any]:
    names = draw(hashes)
    return {
        "type": "BlockStored",
        "block_hashes": names,
        "parent_block_hash": draw(st.none() | st.integers(1, 9)),
        "token_ids": draw(st.lists(st.integers(0, 3), min_size=P * len(names), max_size=P * len(names))),
        "block_size": P,
        "lora_id": None,
        "medium": draw(st.sampled_from(["GPU", "GPU", "GPU", "CPU", "EXTERNAL"])),
        "lora_name": draw(st.sampled_from([None] * 9 + ["ad"])),
    }


removed = st.fixed_dictionaries({"type": st.just("BlockRemoved"), "block_hashes": hashes, "medium": st.sampled_from(["GPU", "CPU"])})
cleared = st.just({"type": "AllBlocksCleared"})
rare = st.sampled_from([{"type": "Unknown"}, {"type": "BlockRemoved"}, {"type": "BlockRemoved", "block_hashes": [3], "medium": "TAPE"}])
events = st.lists(st.one_of(stored(), stored(), stored(), removed, removed, st.one_of(stored(), cleared, rare)), max_size=3)
batches = events.map(lambda made: msgspec.msgpack.encode([1.0, made, 0]))
# What comes on the wire: mostly the next number; now and then a hole, a copy, a restart, an engine's garbage, a foreigner's message.
steps = st.lists(
    st.tuples(
        st.sampled_from(["next"] * 30 + ["gap", "copy", "back", "restart", "garbage", "frames", "sequence", "negative", "foreign"]), batches
    ),
    max_size=30,
)


def messages_of(made: list[tuple[str, bytes]]) -> list[Message]:
    seq, out = 0, []
    for step, payload in made:
        match step:
            case "foreign":
                out.append(live_frames(b"kv2", seq, payload))
                continue
            case "frames":
                out.append([b"kv", *[b"x"] * (len(payload) % 5)])
                continue
            case "sequence":
                out.append([b"kv", bytes(len(payload) % 7), payload])
                continue
            case "negative":
                out.append([b"kv", b"\xff" * 8, payload])
                continue
            case "copy" if out:
                out.append(out[-1])
                continue
            case "gap":
                seq += 2
            case "back":
                seq = max(0, seq - 3)
            case "restart":
                seq = 0
        out.append(live_frames(b"kv", seq, payload[: len(payload) // 2] if step == "garbage" else payload))
        seq += 1
    return out


@settings(max_examples=250, deadline=None)
@given(st.sampled_from(["sha256", "tokens"]), st.booleans(), st.lists(steps, max_size=3))
def test_runs_are_the_batches_one_by_one(route: KeyRoute, has_replay: bool, rounds: list[list[tuple[str, bytes]]]) -> None:
    both = Both(route, has_replay=has_replay)
    try:
        ends = list(accumulate(map(len, rounds)))
        messages = messages_of([step for made in rounds for step in made])
        for start, end in zip([0, *ends], ends, strict=False):
            both.deliver(messages[start:end])
    finally:
        both.close()


@settings(max_examples=150, deadline=None)
@given(st.lists(batches, max_size=30))
@example([msgspec.msgpack.encode([1.0, [{"type": "AllBlocksCleared"}], 0])])
def test_runs_give_the_model_tree(payloads: list[bytes]) -> None:
    """The SHA route, where an engine's hash is the key: as a dict of owners has it."""
    both, model = Both("sha256"), HashTreeModel(SIZES["capacity_blocks"])
    try:
        for payload in payloads:
            for event in decode_batch(payload).events:
                match event:
                    case BlockStored(lora_name=None):
                        if tiers := tier_mask(event.medium):
                            model.store(RANK, tiers.bit_length() - 1, words(event.keys))
                    case BlockRemoved():
                        model.remove(RANK, tier_mask(event.medium, is_removal=True), words(event.keys))
                    case AllBlocksCleared():
                        model.clear(RANK)
        both.deliver([live_frames(b"kv", seq, payload) for seq, payload in enumerate(payloads)])
        reader = both.fast.reader
        for key in range(1, 10):
            for tiers in (1, 2, 4):
                reader.match(key.to_bytes(8, "little"), tiers)
                assert reader.overlap(RANK) == model.match([key], tiers).get(RANK, 0)
    finally:
        both.close()


def words(packed: bytes) -> list[int]:
    return [int.from_bytes(packed[at : at + 8], "little") for at in range(0, len(packed), 8)]


def store(*names: int, parent: int | None = None, **more: Any) -> bytes:
    event = {"type": "BlockStored", "block_hashes": list(names), "parent_block_hash": parent, "token_ids": list(range(P * len(names)))}
    return msgspec.msgpack.encode([1.0, [event | {"block_size": P, "lora_id": None, "medium": "GPU"} | more], 0])


def run_of(first_seq: int, payloads: list[bytes]) -> Run:
    return Run(first_seq, b"".join(payloads), struct.pack(f"{len(payloads)}Q", *accumulate(map(len, payloads))))


def test_a_run_knows_its_payloads() -> None:
    run = run_of(7, [b"one", b"", b"three"])
    assert [run.payload(at) for at in range(len(run))] == [b"one", b"", b"three"]
    with pytest.raises(IndexError):
        run.payload(3)


@pytest.mark.parametrize(("route", "n_blocks"), [("sha256", 105), ("tokens", 101)])  # the last roots have the tokens of the first
def test_many_batches_are_one_call(route: KeyRoute, n_blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    both = Both(route)
    calls: list[int] = []
    apply_run = both.fast.index.apply_run

    def counted(run: Run, first: int) -> tuple[int, Outcome]:
        done = apply_run(run, first)
        calls.append(done[0])
        return done

    monkeypatch.setattr(both.fast.index, "apply_run", counted)
    try:
        both.deliver([live_frames(b"kv", seq, store(seq + 1, parent=seq or None)) for seq in range(100)])
        # The first one of all tells what the stream is.
        assert calls == [99]
        unusual = store(500, lora_name="ad")
        payloads = [store(200), unusual, store(201), store(202), unusual, unusual, store(203)]
        both.deliver([live_frames(b"kv", 100 + at, payload) for at, payload in enumerate(payloads)])
        assert calls[1:] == [1, 0, 2, 0, 0, 1]
        assert both.fast.stream.status() == (RANK_EXACT, 0)
        assert both.fast.index.owned_blocks == n_blocks
    finally:
        both.close()


def test_what_a_run_does_to_the_certainty() -> None:
    """An orphan takes it; a clear behind it, be it in the same run, gives it back."""
    clear = msgspec.msgpack.encode([1.0, [{"type": "AllBlocksCleared"}], 0])
    orphan = store(9, parent=77)
    for payloads, loss in (
        ([orphan, store(1)], LOST),
        ([orphan, clear, store(1)], 0),
        ([clear, orphan], LOST),
        ([orphan, clear, orphan, store(1)], LOST),
    ):
        both = Both("tokens")
        try:
            both.deliver([live_frames(b"kv", 0, store(1))])
            both.deliver([live_frames(b"kv", 1 + at, payload) for at, payload in enumerate(payloads)])
            assert both.fast.stream.status()[1] == loss
        finally:
            both.close()


def test_no_run_before_the_keys_agree() -> None:
    both = Both("sha256")
    try:
        both.fast.index.has_agreed = False
        assert both.fast.index.apply_run(run_of(0, [store(1)]), 0) == (0, Outcome())
        assert both.fast.index.owned_blocks == 0
    finally:
        both.close()


@pytest.mark.parametrize("route", ["sha256", "tokens"])
def test_nothing_is_written_when_the_rank_is_retired(route: KeyRoute) -> None:
    both = Both(route)
    try:
        both.deliver([live_frames(b"kv", 0, store(1))])
        both.fast.index.retire()
        both.fast.index.apply_run(run_of(1, [store(2), store(3)]), 0)
        both.fast.index.wipe()
        assert both.fast.index.owned_blocks == 0
        assert both.fast.reader.stats()["live_blocks"] == 0
    finally:
        both.close()


def test_memory_that_is_short_for_a_run_may_do_for_its_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    both = Both("tokens")

    def refuse(*_: object) -> None:
        raise MemoryError

    try:
        monkeypatch.setattr(both.fast.index._by_tokens, "place_batches", refuse)
        both.deliver([live_frames(b"kv", seq, store(seq + 1, parent=seq or None)) for seq in range(9)])
        assert both.fast.index.owned_blocks == 9
    finally:
        both.close()


def test_a_stop_ends_a_round() -> None:
    both = Both("sha256")
    try:
        for seq in range(1000):
            both.live.send_multipart(live_frames(b"kv", seq, store(seq + 1)))
        both.fast.subscriber._is_stopping.set()
        reader = LiveSocket(both.source, b"kv")
        assert not both.fast.subscriber._read_live(reader)
        both.fast.subscriber._apply_run(run_of(0, [store(1)]))
        assert both.fast.index.owned_blocks == 0
    finally:
        both.close()


def test_only_who_comes_with_many_is_kept_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """By half a millisecond; an event that comes alone is seen at once."""
    both, now_s = Both("sha256"), 100.0
    slept: list[float] = []
    monkeypatch.setattr(subscriber_module.time, "sleep", slept.append)
    monkeypatch.setattr(subscriber_module.time, "monotonic", lambda: now_s)
    try:
        rest = both.fast.subscriber._rest
        rest(0)
        rest(1)
        now_s += 0.001
        rest(1)
        assert slept == []
        rest(1)  # 0 s behind the one before
        rest(2)
        assert slept == [0.0005] * 2
        now_s += 0.001
        rest(0)
        rest(1)
        assert len(slept) == 2
    finally:
        monkeypatch.undo()
        both.close()
