"""An index process killed at any moment, on both key routes: what it leaves, applied on from its note, is the engine's cache."""

import logging
import mmap
import os
import random
import signal
import struct
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from conftest import SeededRandom
from test_index_engine_machine import IDENTITY, RANK, SIZES, Engine, P

from sglfast import shm
from sglfast._counters import RANK_EXACT, RankTable
from sglfast._hashtree import TreeReader, TreeWriter
from sglfast._segment import Segment, segment_bytes
from sglfast.index.key_maps import KeyMaps
from sglfast.index.rank import RankIndex, TreeLock
from sglfast.index.rank_note import Noted, RankNote, noted
from sglfast.index.sink import Outcome, Resume
from sglfast.index.stream import RankStream
from sglfast.shm import KeyRoute

LOG = logging.getLogger("test.killed")
N_BATCHES = 4000
ROUND_BATCHES = 6  # at most, between two notes
LEFT_BATCHES = 400  # what the process to be killed leaves to the next one, should the kill be late
Message = tuple[int, bytes]


class Memory:
    """What outlives an index process."""

    def __init__(self) -> None:
        self.segment = Segment.format(mmap.mmap(-1, segment_bytes(**SIZES)), **SIZES)
        self.maps_fd = shm.create_maps(max_ranks=SIZES["max_ranks"], capacity_blocks=SIZES["capacity_blocks"])


class Process:
    """One rank of an index process, without its sockets. note: of the process before it."""

    def __init__(self, memory: Memory, writer: TreeWriter, route: KeyRoute, note: Noted | None) -> None:
        maps = KeyMaps(memory.maps_fd, memory.segment, LOG)
        key_map, self.is_left = maps.take(RANK, IDENTITY, is_left=note is not None and note.mapped_blocks > 0)
        log = logging.LoggerAdapter(LOG, {})
        self.rank = RankIndex(TreeLock(writer), RANK, block_size=P, is_bigram=False, log=log, key_route=route, model="m", key_map=key_map)
        resume: Resume | None = None if note is None else note.resume
        self.stream = RankStream(self, has_replay=False, resume=resume)
        self.note = RankNote(RankTable(memory.segment), self.rank, IDENTITY)
        self.note.save(resume)

    def follow(self, messages: list[Message], progress: mmap.mmap | None = None) -> None:
        """Rounds of some batches, with a note behind each."""
        rng = random.Random(len(messages))
        at = 0
        while at < len(messages):
            n = rng.randint(1, ROUND_BATCHES)
            for seq, payload in messages[at : at + n]:
                self.stream.on_live(seq, payload, 0.0)
            self.note.save(self.stream.resume)
            at = min(at + n, len(messages))
            if progress is not None:
                progress[:8] = at.to_bytes(8, "little")

    def apply(self, payload: bytes) -> Outcome:
        return self.rank.apply(payload)

    def clear(self, why: str) -> None:
        raise AssertionError(why)

    def ask_replay(self, start_seq: int) -> None:
        raise AssertionError("there is no replay")


def published(rng: SeededRandom, route: KeyRoute) -> list[tuple[Message, set[Any]]]:
    """Batches of an engine that evicts much, and what it holds after each."""
    engine = Engine(route, 1)
    engine.seq = 1000
    messages = []
    for number in range(N_BATCHES):
        events = engine.cleared() if not number or rng.random() < 0.002 else []
        for _ in range(rng.randint(1, 3)):
            tokens = [rng.randrange(3) for _ in range(rng.randrange(P, 16))]
            events += engine.stored(rng.choice(["", "", "ad"]), tokens)
            if rng.random() < 0.6:
                events += engine.removed(random.Random(rng.random()))
        messages.append((engine.publish(events), set(engine.blocks)))
    return messages


@pytest.fixture
def memory() -> Iterator[Memory]:
    memory = Memory()
    yield memory
    os.close(memory.maps_fd)


@pytest.mark.parametrize("round_", range(5))
@pytest.mark.parametrize("route", ["sha256", "tokens"])
def test_killed_index(memory: Memory, rng: SeededRandom, route: KeyRoute, round_: int) -> None:
    progress = mmap.mmap(-1, 8)
    messages = published(rng, route)
    pid = os.fork()
    if pid == 0:
        try:
            writer = TreeWriter(memory.segment)
            writer.reset()
            Process(memory, writer, route, None).follow([message for message, _ in messages[:-LEFT_BATCHES]], progress)
            time.sleep(60)
        finally:
            os._exit(1)
    try:
        end_s = time.monotonic() + 20
        while int.from_bytes(progress[:8], "little") < 100 + 500 * round_:
            assert time.monotonic() < end_s
            time.sleep(0.0005)
        time.sleep(rng.random() * 0.005)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    done = int.from_bytes(progress[:8], "little")
    assert 0 < done < N_BATCHES

    writer, reader = TreeWriter(memory.segment), TreeReader(memory.segment)
    assert writer.adopt() >= 0
    note = noted(RankTable(memory.segment).row(RANK), IDENTITY)
    if note is None:
        return  # in the middle of writing it
    first = note.resume.next_seq - 1000
    assert done <= first <= done + ROUND_BATCHES
    process = Process(memory, writer, route, note)
    assert process.is_left == (note.mapped_blocks > 0)
    left = removed_in([message for message, _ in messages[max(0, first - ROUND_BATCHES) : first]])
    check(process, reader, route, messages, first, min(first + rng.randint(8, 300), N_BATCHES), left)


@pytest.mark.parametrize("route", ["sha256", "tokens"])
def test_batches_behind_the_note_are_applied_again(memory: Memory, rng: SeededRandom, route: KeyRoute) -> None:
    """Killed between two batches, many times: the next process meets blocks that are ahead of the note, and finds all parents."""
    messages = published(rng, route)
    writer, reader = TreeWriter(memory.segment), TreeReader(memory.segment)
    writer.reset()
    process = Process(memory, writer, route, None)
    at = 0
    while at < 1500:
        end = at + rng.randint(1, 8)
        process.follow([message for message, _ in messages[at:end]])
        at = end
        for (seq, payload), _ in messages[at : at + rng.randint(0, 8)]:
            process.stream.on_live(seq, payload, 0.0)
        writer = TreeWriter(memory.segment)
        assert writer.adopt() >= 0
        note = noted(RankTable(memory.segment).row(RANK), IDENTITY)
        assert note is not None
        assert note.resume == Resume(messages[at][0][0], note.resume.last_print, 0)
        process = Process(memory, writer, route, note)
        check(process, reader, route, messages, at, at + 8, set())
        at += 8


def removed_in(messages: list[Message]) -> set[int]:
    """Engine hashes of blocks that were removed."""
    events = [event for _, payload in messages for event in msgspec.msgpack.decode(payload)[1]]
    return {name for event in events if event["type"] == "BlockRemoved" for name in event["block_hashes"]}


def check(
    process: Process, reader: TreeReader, route: KeyRoute, messages: list[tuple[Message, set[Any]]], start: int, end: int, left: set[int]
) -> None:
    """After these batches the rank's blocks are the engine's, and nothing was lost on the way.

    left: what the map may have beside the rank's blocks, because the last process died behind its note, before it dropped them.
    """
    process.follow([message for message, _ in messages[start:end]])
    blocks, engine = messages[end - 1][1], Engine(route, 1)
    assert all(reader.match(engine.key(block)) and reader.overlap(RANK) for block in blocks)
    assert process.rank.owned_blocks == len(blocks)
    assert process.stream.status() == (RANK_EXACT, 0)
    hashes, _ = process.rank._by_tokens._map.items()
    mapped = set(struct.unpack(f"<{len(hashes) // 8}Q", hashes))
    assert len(mapped) == process.rank.mapped_blocks
    by_tokens = {engine.name(block) for block in blocks if route == "tokens" or block[0]}
    assert by_tokens <= mapped <= by_tokens | left
