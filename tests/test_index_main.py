"""The index process: it follows the worker table, clears what goes, says what it lost, and ends when it should."""

import ctypes
import logging
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
from kv_publisher import BLOCK_SIZE, Publisher, keys_of, stored, tokens_of, two_in_a_row, wait_until

from sglfast import _counters as words
from sglfast import shm
from sglfast._blockhash import chain_seed, token_keys
from sglfast._counters import RANK_BLIND, RANK_DEGRADED, RANK_EXACT, RankTable
from sglfast._hashtree import TreeReader
from sglfast._segment import Segment, segment_bytes
from sglfast._workers import FREE, READY, UNHEALTHY, WorkerTable
from sglfast.index.main import Index
from sglfast.shm import RANK_REASONS, WorkerRecord, WorkerView

ROOT = Path(__file__).parent.parent
SIZES = {"max_workers": 4, "max_ranks": 64, "max_shards": 1, "capacity_blocks": 4096}
BLIND = (RANK_BLIND, RANK_REASONS.index("publishes no KV events"))
EXACT = (RANK_EXACT, 0)


class Control:
    """Control's side: the segment, the worker table, and a look at what index makes of them."""

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self.table = WorkerTable(segment)
        self.ranks = RankTable(segment)
        self.reader = TreeReader(segment)
        self.key_route: shm.KeyRoute = "sha256"  # of the workers that are asked about

    def segment_bytes(self) -> bytes:
        """The whole segment as it is now."""
        return ctypes.string_at(self.segment.address, self.segment.total_bytes)

    def write_bytes(self, memory: bytes) -> None:
        ctypes.memmove(self.segment.address, memory, len(memory))

    def put(
        self,
        worker_idx: int,
        publisher: Publisher | None,
        *,
        rank_base: int,
        dp_size: int = 1,
        state: int = READY,
        startup_time: float = 1.0,
        is_new: bool = True,
        key_route: shm.KeyRoute = "sha256",
        bigram: bool = False,
    ) -> None:
        record = WorkerRecord(url=f"http://worker-{worker_idx}:1", startup_time=startup_time)
        if publisher is not None:
            record = WorkerRecord(
                url=record.url,
                startup_time=startup_time,
                kv_host="127.0.0.1",
                kv_port_base=publisher.port,
                kv_replay_port_base=publisher.replay_port or None,
            )
        size = BLOCK_SIZE if publisher else 0
        view = WorkerView(worker_idx, 0, state, rank_base, dp_size, size, bigram, record, key_route=key_route)
        shm.put_worker(self.table, view, is_new=is_new)

    def state(self, rank: int) -> tuple[int, int]:
        return self.ranks.get(rank, words.R_STATE), self.ranks.get(rank, words.R_REASON)

    def overlap(self, rank: int, conversation: int) -> int:
        keys = keys_of(conversation, 4)
        if self.key_route == "tokens":
            keys = token_keys(tokens_of(conversation, 4), BLOCK_SIZE, seed=chain_seed("", BLOCK_SIZE))
        self.reader.match(keys)
        return self.reader.overlap(rank)


class House:
    """Control, an index in this process, and engines."""

    def __init__(self) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.control = Control(Segment.format(mmap.mmap(-1, segment_bytes(**SIZES)), **SIZES))
        self.maps_fd = shm.create_maps(max_ranks=SIZES["max_ranks"], capacity_blocks=SIZES["capacity_blocks"])
        self.start_index()
        self.publishers: list[Publisher] = []

    def start_index(self) -> None:
        self.index = Index(self.control.segment, logging.getLogger("test.index"), maps_fd=self.maps_fd)

    def publisher(self, *, has_replay: bool = True) -> Publisher:
        self.publishers.append(Publisher(self.context, has_replay=has_replay))
        return self.publishers[-1]

    def wait_exact(self, rank: int, conversation: int, *publishers: Publisher) -> None:
        control = self.control
        wait_until(lambda: control.state(rank) == EXACT and control.overlap(rank, conversation) == 4, *publishers)

    def close(self) -> None:
        self.index.close()
        os.close(self.maps_fd)
        for publisher in self.publishers:
            publisher.close()
        self.context.term()


@pytest.fixture
def house() -> Iterator[House]:
    house = House()
    yield house
    house.close()


def test_follows_workers_as_they_come_and_go(house: House) -> None:
    control, index = house.control, house.index
    assert index.sync()
    assert not index.sync()
    one, two = house.publisher(), house.publisher()
    one.publish(stored(1, 4))
    two.publish(stored(2, 4))
    control.put(0, one, rank_base=0)
    control.put(2, two, rank_base=7)
    assert index.sync()
    house.wait_exact(0, 1, one, two)
    house.wait_exact(7, 2, one, two)
    assert (control.overlap(0, 2), control.overlap(7, 1)) == (0, 0)
    assert control.ranks.get(7, words.R_GENERATION) == 1

    control.table.set_state(0, FREE)
    assert index.sync()
    assert (control.overlap(0, 1), control.overlap(7, 2)) == (0, 4)
    assert control.ranks.row(0) == [0] * 32
    house.wait_exact(7, 2, two)


def test_state_of_a_worker_does_not_touch_its_stream(house: House) -> None:
    control, index = house.control, house.index
    engine = house.publisher()
    engine.publish(stored(1, 4))
    control.put(0, engine, rank_base=0)
    index.sync()
    house.wait_exact(0, 1, engine)
    control.put(0, engine, rank_base=0, state=UNHEALTHY, is_new=False)
    assert index.sync()
    assert control.overlap(0, 1) == 4
    assert engine.requests == [0]


def test_blocks_stay_when_they_turn_out_to_be_keyed_by_single_tokens(house: House) -> None:
    control, index = house.control, house.index
    engine = house.publisher()
    engine.publish(stored(1, 4))
    control.put(0, engine, rank_base=0, bigram=True)
    index.sync()
    wait_until(lambda: control.state(0) == (RANK_DEGRADED, shm.REASON_SINGLES), engine)
    control.put(0, engine, rank_base=0, is_new=False)
    assert index.sync()
    house.wait_exact(0, 1, engine)  # without another event
    engine.publish(stored(2, 4))
    house.wait_exact(0, 2, engine)
    assert control.overlap(0, 1) == 4
    assert engine.requests == [0]


@pytest.mark.parametrize("change", ["generation", "startup_time", "endpoint", "ranks"])
def test_changed_worker_is_followed_anew(house: House, change: str) -> None:
    control, index = house.control, house.index
    old, new = house.publisher(), house.publisher()
    old.publish(stored(1, 4))
    new.publish(stored(2, 4))
    control.put(0, old, rank_base=0)
    index.sync()
    house.wait_exact(0, 1, old)
    engine, rank = (new, 0) if change == "endpoint" else (old, 9 if change == "ranks" else 0)
    if engine is old:  # what it had is gone, so that the old index would be wrong
        old.buffer.clear()
        old.seq = 0
        old.publish(stored(2, 4))
    control.put(0, engine, rank_base=rank, startup_time=2.0 if change == "startup_time" else 1.0, is_new=change == "generation")
    assert index.sync()
    assert control.overlap(0, 1) == 0
    house.wait_exact(rank, 2, old, new)
    assert control.overlap(0, 1) == 0
    assert control.reader.stats()["live_blocks"] == 4


def test_ranks_may_change_hands_in_one_step(house: House) -> None:
    """Two workers swap their ranks between two looks at the table: nothing of the one is left with the other."""
    control, index = house.control, house.index
    one, two = house.publisher(), house.publisher()
    one.publish(stored(1, 4))
    two.publish(stored(2, 4))
    control.put(0, one, rank_base=0)
    control.put(1, two, rank_base=1)
    index.sync()
    house.wait_exact(0, 1, one, two)
    house.wait_exact(1, 2, one, two)
    control.put(0, one, rank_base=1)
    control.put(1, two, rank_base=0)
    index.sync()
    house.wait_exact(1, 1, one, two)
    house.wait_exact(0, 2, one, two)
    assert (control.overlap(0, 1), control.overlap(1, 2)) == (0, 0)


def test_each_rank_has_its_own_port(house: House) -> None:
    control, index = house.control, house.index
    pair = two_in_a_row(house.context)
    house.publishers += pair
    control.put(0, pair[0], rank_base=4, dp_size=2)
    index.sync()
    for number, engine in enumerate(pair):
        wait_until(lambda engine=engine: engine.n_subscriptions == 1, *pair)  # type: ignore[misc]
        engine.publish(stored(number, 4))
    house.wait_exact(4, 0, *pair)
    house.wait_exact(5, 1, *pair)
    assert (control.overlap(4, 1), control.overlap(5, 0)) == (0, 0)


def test_workers_that_cannot_be_followed_are_blind(house: House, caplog: pytest.LogCaptureFixture) -> None:
    control, index = house.control, house.index
    edge = house.publisher()
    control.put(0, None, rank_base=0, dp_size=2)
    edge.port, port = 65535, edge.port
    control.put(1, edge, rank_base=2, dp_size=2)
    edge.port = port
    index.sync()
    assert [control.state(rank) for rank in (0, 1, 3)] == [BLIND] * 3
    assert control.state(2) != BLIND
    assert "65536" in caplog.text


def test_sizes_follow_eviction(house: House) -> None:
    control, index = house.control, house.index
    engine = house.publisher()
    engine.publish(stored(1, 4))
    control.put(0, engine, rank_base=0)
    index.sync()
    house.wait_exact(0, 1, engine)
    control.ranks.set(0, words.R_OWNED_BLOCKS, 99)
    index.publish_sizes()
    assert control.ranks.get(0, words.R_OWNED_BLOCKS) == 4


def test_index_says_by_which_version_it_acts(house: House) -> None:
    control = house.control
    engine = house.publisher()
    engine.publish(stored(1, 4))
    control.put(0, engine, rank_base=0)
    house.index.sync()
    house.wait_exact(0, 1, engine)
    assert control.segment.workers_seen(0) == control.table.version()
    control.table.remove(0)
    assert control.segment.workers_seen(0) == control.table.version() - 1
    house.index.sync()
    assert control.segment.workers_seen(0) == control.table.version()
    assert control.reader.stats()["live_blocks"] == 0, "what it says it has seen it has done"


def test_close_leaves_nothing_in_the_tree(house: House) -> None:
    engine = house.publisher()
    engine.publish(stored(1, 4))
    house.control.put(0, engine, rank_base=0)
    house.index.sync()
    house.wait_exact(0, 1, engine)
    house.index.close()
    assert house.control.reader.stats()["live_blocks"] == 0
