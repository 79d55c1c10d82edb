"""Engines that connect out: what the wire allows to tell apart is told apart, the rest is refused by name."""

import logging
import mmap
import socket
import time
from collections.abc import Iterator

import pytest
import zmq
from kv_publisher import BLOCK_SIZE, keys_of, stored, wait_until

from sglfast import _counters as words
from sglfast import shm
from sglfast._counters import RANK_BLIND, RANK_EXACT, RankTable
from sglfast._hashtree import TreeReader
from sglfast._segment import Segment, segment_bytes
from sglfast._workers import FREE, READY, WorkerTable
from sglfast.errors import ConfigError
from sglfast.index.listener import listen_endpoint
from sglfast.index.main import Index
from sglfast.shm import RANK_REASONS, WorkerRecord, WorkerView
from sglfast.wire import kv_events

SIZES = {"max_workers": 4, "max_ranks": 64, "max_shards": 1, "capacity_blocks": 4096}


def two_free_ports() -> int:
    """The first of two neighbouring ports that nobody has."""
    for _ in range(100):
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            try:
                second.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return port
    raise AssertionError("no two free ports in a row")


class Engine:
    """One rank of an engine that dials the router."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], port: int, topic: bytes) -> None:
        self.topic, self.seq = topic, 0
        self.socket = context.socket(zmq.XPUB)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(f"tcp://127.0.0.1:{port}")
        assert self.socket.poll(10_000), "the subscription did not come"
        self.socket.recv()

    def publish(self, *events: kv_events.EventOut) -> None:
        self.socket.send_multipart(kv_events.live_frames(self.topic, self.seq, kv_events.encode_batch(time.time(), events, 0)))
        self.seq += 1


class House:
    def __init__(self) -> None:
        self.segment = Segment.format(mmap.mmap(-1, segment_bytes(**SIZES)), **SIZES)
        self.table, self.ranks, self.reader = WorkerTable(self.segment), RankTable(self.segment), TreeReader(self.segment)
        self.port = two_free_ports()
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.index = Index(self.segment, logging.getLogger("test.index"), kv_listen=f"tcp://127.0.0.1:{self.port}")
        self.engines: list[Engine] = []

    def put(self, worker_idx: int, topic: str, *, rank_base: int, dp_size: int = 1) -> None:
        record = WorkerRecord(
            url=f"http://127.0.0.1:{worker_idx + 1}", kv_host="router", kv_port_base=5557, kv_topic=topic, kv_connects_out=True
        )
        shm.put_worker(self.table, WorkerView(worker_idx, 0, READY, rank_base, dp_size, BLOCK_SIZE, False, record), is_new=True)

    def engine(self, topic: str, rank: int = 0) -> Engine:
        self.engines.append(Engine(self.context, self.port + rank, topic.encode()))
        return self.engines[-1]

    def overlaps(self, conversation: int) -> dict[int, int]:
        self.reader.match(keys_of(conversation, 4))
        return dict(self.reader.hits())

    def state(self, rank: int) -> tuple[int, int]:
        return self.ranks.get(rank, words.R_STATE), self.ranks.get(rank, words.R_REASON)

    def close(self) -> None:
        self.index.close()
        for engine in self.engines:
            engine.socket.close()
        self.context.term()


@pytest.fixture
def house() -> Iterator[House]:
    house = House()
    yield house
    house.close()


def test_workers_are_told_apart_by_topic_and_ranks_by_port(house: House) -> None:
    house.put(0, "kv", rank_base=0, dp_size=2)
    house.put(1, "kv2", rank_base=2)  # a prefix is not enough
    house.index.sync()
    engines = {0: house.engine("kv"), 1: house.engine("kv", rank=1), 2: house.engine("kv2"), None: house.engine("other")}
    for number, (rank, engine) in enumerate(engines.items()):
        engine.publish(kv_events.cleared(), stored(number, 4))
        if rank is not None:
            wait_until(lambda number=number, rank=rank: house.overlaps(number) == {rank: 4})  # type: ignore[misc]
            wait_until(lambda rank=rank: house.state(rank) == (RANK_EXACT, 0))  # type: ignore[misc]
    engines[2].publish(stored(9, 4))
    wait_until(lambda: house.overlaps(9) == {2: 4})
    assert house.overlaps(3) == {}  # nobody's topic
    engines[0].seq = 0  # restarted
    engines[0].publish(kv_events.cleared(), stored(7, 4))
    wait_until(lambda: house.overlaps(7) == {0: 4})
    assert house.overlaps(0) == {}
    house.table.set_state(1, FREE)
    house.index.sync()
    assert house.overlaps(9) == {}


def test_workers_that_cannot_be_told_apart_are_refused(house: House, caplog: pytest.LogCaptureFixture) -> None:
    house.put(0, "kv", rank_base=0)
    house.put(1, "kv", rank_base=1)
    house.index.sync()
    assert RANK_REASONS[house.state(1)[1]].startswith("connects out with the topic of another worker")
    assert house.state(0)[0] != RANK_BLIND
    assert "both connect out with topic 'kv'" in caplog.text


def test_router_that_does_not_listen_says_so(house: House, caplog: pytest.LogCaptureFixture) -> None:
    deaf = Index(house.segment, logging.getLogger("test.index"))
    house.put(0, "kv", rank_base=0)
    deaf.sync()
    assert house.state(0) == (RANK_BLIND, next(i for i, why in enumerate(RANK_REASONS) if "--kv-listen" in why))
    assert "connects its KV events out to" in caplog.text
    deaf.close()


def test_taken_port_costs_only_these_workers(house: House, caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as squatter:
        squatter.bind(("127.0.0.1", house.port))
        squatter.listen()
        house.put(0, "kv", rank_base=0)
        house.index.sync()
    assert house.state(0)[0] == RANK_BLIND
    assert "Address already in use" in caplog.text


def test_listen_endpoint() -> None:
    assert listen_endpoint("tcp://0.0.0.0:5557", 3) == "tcp://0.0.0.0:5560"
    assert listen_endpoint("tcp://[::]:5557", 0) == "tcp://[::]:5557"
    for bad in ("0.0.0.0:5557", "tcp://host", "udp://h:1", "tcp://h:65535x", ""):
        with pytest.raises(ConfigError, match="--kv-listen"):
            listen_endpoint(bad, 0)
    with pytest.raises(ConfigError, match="rank 1"):
        listen_endpoint("tcp://h:65535", 1)
