"""Any order of what an engine, a lossy network and an index can do: at rest the tree is the engine's cache, on both key routes.

A hypothesis state machine: the engine publishes real batches, the network loses, doubles and forgets, replays have holes, the engine
restarts, the index process is killed. The tree and the map of engine hashes are the real ones. The law is looked at when all has come to
rest.
"""

import logging
import mmap
import os
import random
import struct
import time
from collections import deque
from itertools import accumulate
from typing import Any, ClassVar

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from sglfast import shm
from sglfast._blockhash import chain_seed, page_keys, token_keys, xxh3
from sglfast._counters import RANK_EXACT, RANK_SYNCING, RankTable
from sglfast._hashtree import TreeReader, TreeWriter
from sglfast._segment import Segment, segment_bytes
from sglfast.index.held import Limits
from sglfast.index.key_maps import KeyMaps
from sglfast.index.live import Run
from sglfast.index.rank import RankIndex, TreeLock
from sglfast.index.rank_note import RankNote, noted
from sglfast.index.sink import Outcome
from sglfast.index.stream import RankStream
from sglfast.shm import KeyRoute

P = 2
RANK = 9
IDENTITY = 77
SIZES = {"max_workers": 1, "max_ranks": 64, "max_shards": 1, "capacity_blocks": 4096}
LOG = logging.LoggerAdapter(logging.getLogger("test.machine"), {})
LOG.setLevel(logging.CRITICAL)

Prefix = tuple[int, ...]
World = tuple[str, Prefix]  # adapter, tokens from the root


class Engine:
    """A paged cache: what it holds, and the batches that it has published."""

    def __init__(self, route: KeyRoute, buffer_batches: int) -> None:
        self.route = route
        self.buffer: deque[tuple[int, bytes]] = deque(maxlen=buffer_batches)
        self.clock = 0.0
        self.start()

    def start(self) -> None:
        """A new process: other names for the same blocks, numbers from 0."""
        self.salt = random.Random(self.clock).getrandbits(64)
        self.seq = 0
        self.blocks: set[World] = set()
        self.buffer.clear()

    def name(self, block: World) -> int:
        adapter, tokens = block
        if self.route == "tokens" or adapter:
            return xxh3(repr(block).encode(), self.salt)
        return int.from_bytes(page_keys(tokens, P)[-8:], "little")

    def key(self, block: World) -> bytes:
        """What a shard asks for."""
        adapter, tokens = block
        if self.route == "sha256" and not adapter:
            return page_keys(tokens, P)[-8:]
        return token_keys(tokens, P, seed=chain_seed("m" if self.route == "tokens" else "", P, lora_name=adapter))[-8:]

    def stored(self, adapter: str, tokens: list[int], medium: str = "GPU") -> list[dict[str, Any]]:
        prefixes = [tuple(tokens[: end + P]) for end in range(0, len(tokens) - P + 1, P)]
        new = [prefix for prefix in prefixes if (adapter, prefix) not in self.blocks]
        self.blocks.update((adapter, prefix) for prefix in new)
        if not new:
            return []
        parent = new[0][:-P]
        event = {
            "type": "BlockStored",
            "block_hashes": [self.name((adapter, prefix)) for prefix in new],
            "parent_block_hash": self.name((adapter, parent)) if parent else None,
            "token_ids": list(new[-1][len(parent) :]),
            "block_size": P,
            "lora_id": None,
            "medium": medium,
            "lora_name": adapter or None,
        }
        return [event]

    def removed(self, rng: random.Random) -> list[dict[str, Any]]:
        """Some leaves go."""
        parents = {(adapter, prefix[:-P]) for adapter, prefix in self.blocks}
        leaves = sorted(block for block in self.blocks if block not in parents)
        gone = rng.sample(leaves, rng.randint(0, len(leaves)))
        self.blocks.difference_update(gone)
        return [{"type": "BlockRemoved", "block_hashes": [self.name(block) for block in gone], "medium": "GPU"}] if gone else []

    def cleared(self) -> list[dict[str, Any]]:
        self.blocks.clear()
        return [{"type": "AllBlocksCleared"}]

    def publish(self, events: list[dict[str, Any]]) -> tuple[int, bytes]:
        self.clock += 1.0
        message = self.seq, msgspec.msgpack.encode([self.clock, events, 0])
        self.buffer.append(message)
        self.seq += 1
        return message


class Machine(RuleBasedStateMachine):
    """The index is a stream and a rank over a real tree; `self` is the stream's sink and the network."""

    route: ClassVar[KeyRoute]

    @initialize(has_replay=st.booleans(), buffer_batches=st.sampled_from([10_000, 5]), history=st.integers(0, 3), is_old=st.booleans())
    def begin(self, has_replay: bool, buffer_batches: int, history: int, is_old: bool) -> None:
        self.rng = random.Random(history)
        self.has_replay, self.is_small = has_replay, buffer_batches < 100
        self.has_given_up = False  # an index that was killed had, and replay cannot tell all that the engine ever did
        self.engine = Engine(self.route, buffer_batches)
        self.segment = Segment.format(mmap.mmap(-1, segment_bytes(**SIZES)), **SIZES)
        self.reader = TreeReader(self.segment)
        self.ranks = RankTable(self.segment)
        self.maps_fd = shm.create_maps(max_ranks=SIZES["max_ranks"], capacity_blocks=SIZES["capacity_blocks"])
        self.live: deque[tuple[int, bytes]] = deque()
        self.answer: deque[tuple[int, bytes] | None] = deque()
        self.is_reliable = False
        self.is_mute = False  # nobody answers at the replay socket
        self.now_s = 0.0
        self.seen: set[World] = set()
        self.is_old = is_old
        if is_old:
            self.engine.seq = 100  # its number alone tells that it has not just started
            self.engine.publish(self.engine.cleared())
        for number in range(history):
            self.engine.publish(self.engine.stored("", [number, 0, 0, 0]))
        self.start_index()

    def start_index(self) -> None:
        """As index.main: a rank goes on where its note says, with its map, or begins empty."""
        writer = TreeWriter(self.segment)
        if self.reader.stats()["generation"]:
            assert writer.adopt() >= 0
        else:
            writer.reset()
        note = noted(self.ranks.row(RANK), IDENTITY)
        maps = KeyMaps(self.maps_fd, self.segment, LOG.logger)
        key_map, is_left = maps.take(RANK, IDENTITY, is_left=note is not None and note.mapped_blocks > 0)
        assert note is None or is_left == (note.mapped_blocks > 0), "whoever is killed leaves a map that is whole"
        self.ranks.clear(RANK)
        if note is None:
            writer.clear(RANK)
        self.rank = RankIndex(
            TreeLock(writer), RANK, block_size=P, is_bigram=False, log=LOG, key_route=self.route, model="m", key_map=key_map
        )
        limits = Limits(replay_timeout_s=1.0, max_tries=3, max_held_batches=20)
        self.stream = RankStream(self, has_replay=self.has_replay, limits=limits, resume=None if note is None else note.resume)
        self.note = RankNote(self.ranks, self.rank, IDENTITY)
        self.save()
        self.stream.on_connected(self.now_s)

    def save(self) -> None:
        self.note.save(self.stream.resume)

    # ---- the sink ----

    def apply(self, payload: bytes) -> Outcome:
        return self.rank.apply(payload)

    def clear(self, why: str) -> None:
        self.note.unsave()
        self.rank.clear()

    def ask_replay(self, start_seq: int) -> None:
        items: list[tuple[int, bytes] | None] = [item for item in self.engine.buffer if item[0] >= start_seq]
        if self.is_mute and not self.is_reliable:
            self.answer.clear()
            return
        if not self.is_reliable:
            kept = 0 if start_seq else 1
            items = items[:kept] + [item for item in items[kept:] if self.rng.random() > 0.2]
        if self.is_reliable or self.rng.random() > 0.3:
            items.append(None)
        self.answer = deque(items)

    # ---- what can happen ----

    def publish(self, *events: dict[str, Any], is_lost: bool = False, is_twice: bool = False) -> None:
        self.seen |= self.engine.blocks
        if events:
            message = self.engine.publish(list(events))
            self.live.extend([message] * ((not is_lost) + is_twice))

    seldom = st.sampled_from([False, False, False, False, True])
    words = st.lists(st.integers(0, 2), min_size=P, max_size=10)

    @rule(prompts=st.lists(st.tuples(st.sampled_from(["", "", "ad"]), words), min_size=1, max_size=3), is_lost=st.booleans())
    def prefill(self, prompts: list[tuple[str, list[int]]], is_lost: bool) -> None:
        events = [event for adapter, tokens in prompts for event in self.engine.stored(adapter, tokens)]
        self.publish(*events, is_lost=is_lost and self.rng.random() < 0.3)

    @rule(seed=st.integers(0, 99), is_twice=st.booleans())
    def evict(self, seed: int, is_twice: bool) -> None:
        self.publish(*self.engine.removed(random.Random(seed)), is_twice=is_twice)

    @rule(tokens=words, seed=st.integers(0, 99))
    def churn(self, tokens: list[int], seed: int) -> None:
        """Stored, removed and stored again in one batch."""
        rng = random.Random(seed)
        self.publish(*self.engine.stored("", tokens), *self.engine.removed(rng), *self.engine.stored("", tokens[:6]))

    @rule(is_lost=st.booleans(), is_now=seldom)
    def flush(self, is_lost: bool, is_now: bool) -> None:
        if is_now:
            self.publish(*self.engine.cleared(), is_lost=is_lost)

    @rule(n=st.integers(1, 5))
    def deliver_live(self, n: int) -> None:
        for _ in range(min(n, len(self.live))):
            self.stream.on_live(*self.live.popleft(), self.now_s)
        self.save()

    @rule(n=st.integers(2, 9))
    def deliver_run(self, n: int) -> None:
        """Those that are next in line, as one, as far as they are usual."""
        first = self.stream.steady_seq
        if not self.live or self.live[0][0] != first:
            return
        payloads: list[bytes] = []
        while self.live and len(payloads) < n and self.live[0][0] == first + len(payloads):
            payloads.append(self.live.popleft()[1])
        run = Run(first, b"".join(payloads), struct.pack(f"{len(payloads)}Q", *accumulate(map(len, payloads))))
        at = 0
        while at < len(run):
            n_batches, outcome = self.rank.apply_run(run, at)
            if n_batches:
                at += n_batches
                self.stream.on_applied(n_batches, run.payload(at - 1), outcome)
            else:
                self.stream.on_live(first + at, run.payload(at), self.now_s)
                at += 1
        self.save()

    @rule(n=st.integers(1, 5))
    def deliver_answer(self, n: int) -> None:
        for _ in range(n):
            if self.answer:
                item = self.answer.popleft()
                if item is None:
                    self.stream.on_replay_end(self.now_s)
                else:
                    self.stream.on_replay(*item, self.now_s)
            elif self.stream.deadline_s is not None:
                self.now_s = max(self.now_s, self.stream.deadline_s)
                self.stream.on_time(self.now_s)
        self.save()

    @rule(n_missed=st.integers(0, 3), is_now=seldom)
    def lose_connection(self, n_missed: int, is_now: bool) -> None:
        if is_now:
            self.reconnect(n_missed)

    def reconnect(self, n_missed: int) -> None:
        while self.live:
            self.deliver_live(1)
        self.stream.on_disconnected()
        for number in range(n_missed):
            self.publish(*self.engine.stored("", [2, 2, number, number]), is_lost=True)
        self.stream.on_connected(self.now_s)

    @rule(is_now=seldom)
    def turn_replay_on_and_off(self, is_now: bool) -> None:
        if is_now:
            self.is_mute = not self.is_mute

    @rule(is_now=seldom)
    def restart_engine(self, is_now: bool) -> None:
        if is_now:
            self.has_given_up = self.is_old = False
            self.engine.start()
            self.engine.publish(self.engine.cleared())
            self.reconnect(0)

    @rule(is_now=st.booleans(), n_unsaved=st.integers(0, 4), has_note=st.sampled_from([True, True, True, False]))
    def kill_index(self, is_now: bool, n_unsaved: int, has_note: bool) -> None:
        """In the middle of a round: the blocks are ahead of the note. What was on its way to the process is lost."""
        if not is_now:
            return
        for number in range(n_unsaved):
            self.publish(*self.engine.stored("", [2, 1, number % 2, 1, 2, 2]))
            self.publish(*self.engine.removed(random.Random(number)), *self.engine.removed(random.Random(number)))
        while self.live and self.rng.random() < 0.9:
            self.stream.on_live(*self.live.popleft(), self.now_s)
        if not has_note:
            self.note.unsave()
        self.has_given_up |= self.is_old and self.stream.counters.give_ups > 0
        self.live.clear()
        self.answer.clear()
        self.start_index()

    @rule(is_now=st.booleans(), n_missed=st.sampled_from([0, 0, 1]))
    def kill_index_at_rest(self, is_now: bool, n_missed: int) -> None:
        """Without replay the next number tells whether something was missed."""
        if not is_now or self.has_replay or self.engine.seq < 64:
            return
        while self.live:
            self.deliver_live(1)
        was_exact, n_blocks = self.stream.status() == (RANK_EXACT, 0), self.rank.owned_blocks
        is_whole = was_exact and self.stream.next_seq == self.engine.seq and not n_missed  # nothing was lost that nobody noticed yet
        for number in range(n_missed):
            self.publish(*self.engine.cleared(), *self.engine.stored("", [2, 2, number, 1]))
        self.live.clear()
        self.start_index()
        assert self.rank.owned_blocks == n_blocks
        assert not was_exact or self.stream.status()[0] == RANK_SYNCING
        self.publish(*self.engine.removed(random.Random(1)), *self.engine.stored("", [0, 1, 2, 2]), *self.engine.stored("ad", [1, 1]))
        if not self.live:
            return
        self.deliver_live(1)
        assert (self.stream.status()[0] == RANK_EXACT) == is_whole
        self.check()

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.is_reliable = True
        for number in range(3):
            self.publish(*self.engine.stored("", [1, number, 2, 2]))
        end_s = time.monotonic() + 20
        while self.live or self.answer or self.stream.deadline_s is not None:
            assert time.monotonic() < end_s, "the stream does not come to rest"
            self.deliver_live(1)
            self.deliver_answer(1)
        try:
            self.check()
        finally:
            os.close(self.maps_fd)

    def check(self) -> None:
        cached = {self.engine.key(block) for block in self.engine.blocks}
        known = {self.engine.key(block) for block in self.seen | self.engine.blocks}
        owned = {key for key in known if self.reader.match(key) and self.reader.overlap(RANK)}
        assert owned <= cached, "the index believes in blocks that are gone"
        assert self.rank.owned_blocks == len(owned), "the index owns what nobody ever stored"
        mapped = self.rank.mapped_blocks
        by_tokens = [block for block in self.engine.blocks if self.route == "tokens" or block[0]]
        assert mapped == sum(self.engine.key(block) in owned for block in by_tokens)
        state, _ = self.stream.status()
        if state == RANK_EXACT:
            assert owned == cached, "EXACT is not equal"
        if self.has_replay and not self.is_small and self.stream.counters.give_ups == 0 and not self.has_given_up:
            assert state == RANK_EXACT


class ShaMachine(Machine):
    route = "sha256"


class TokenMachine(Machine):
    route = "tokens"


TestShaRoute = ShaMachine.TestCase
TestTokenRoute = TokenMachine.TestCase
TestShaRoute.settings = TestTokenRoute.settings = settings(max_examples=250, stateful_step_count=40, deadline=None, database=None)


@pytest.mark.parametrize("machine", [ShaMachine, TokenMachine])
def test_what_a_mute_socket_left_open_is_not_lost_for_the_next_index(machine: type[Machine]) -> None:
    """An index takes over, cannot ask, and is killed; the next one can: nothing was lost, although replay does not reach back to 0."""
    run = machine()
    run.begin(has_replay=True, buffer_batches=10_000, history=0, is_old=True)
    run.deliver_answer(n=1)
    run.turn_replay_on_and_off(is_now=True)
    run.kill_index(is_now=True, n_unsaved=0, has_note=True)
    for _ in range(3):
        run.deliver_answer(n=1)
    assert run.stream.counters.give_ups == 1
    run.kill_index(is_now=True, n_unsaved=0, has_note=True)
    run.teardown()
    assert run.stream.status() == (RANK_EXACT, 0)
