"""sim/publisher.py over real sockets: frames, sequences, losses on purpose, replay, and ports that come back."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import zmq
import zmq.asyncio

from sglfast._blockhash import page_keys
from sglfast.errors import ConfigError
from sglfast.sim import publisher as publisher_module
from sglfast.sim.events import EventLog
from sglfast.sim.publisher import REPLAY_SLICE, KvPublisher, RankPublisher
from sglfast.sim.settings import SimSettings
from sglfast.wire.frames import parse_live, parse_replay, replay_request
from sglfast.wire.kv_events import AllBlocksCleared, BlockStored, decode_batch

WAIT_S = 20
TOKENS = list(range(8))


@asynccontextmanager
async def opened(live_port: int = 0, **changes: Any) -> AsyncIterator[KvPublisher]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    publisher = KvPublisher(context, SimSettings(**changes), live_port)
    try:
        await publisher.open()
        yield publisher
    finally:
        publisher.close()
        context.destroy(linger=0)


@asynccontextmanager
async def client(kind: int, port: int, rank: int = 0) -> AsyncIterator[Any]:
    context = zmq.asyncio.Context()
    socket = context.socket(kind)
    socket.setsockopt(zmq.RCVHWM, 0)
    if kind == zmq.SUB:
        socket.subscribe(b"")
    socket.connect(f"tcp://127.0.0.1:{port + rank}")
    try:
        yield socket
    finally:
        socket.close(linger=0)
        context.destroy(linger=0)


async def receive(socket: Any) -> list[bytes]:
    frames: list[bytes] = await asyncio.wait_for(socket.recv_multipart(), WAIT_S)
    return frames


async def heard(rank: RankPublisher, socket: Any) -> int:
    """Publish until the subscriber, who joins a moment later than it says, gets a message; its sequence."""
    for _ in range(int(WAIT_S / 0.02)):
        publish(rank)
        if await socket.poll(20):
            frames = await receive(socket)
            while await socket.poll(0):
                frames = await receive(socket)
            return parse_live(frames)[0]
    raise AssertionError("nothing was received")


def publish(rank: RankPublisher) -> None:
    log = EventLog(4)
    log.store(page_keys(TOKENS, 4), 0, 2, TOKENS, "")
    rank.publish(log.take())


async def replayed(socket: Any, start: int) -> list[tuple[int, bytes]]:
    await socket.send_multipart(replay_request(start))
    batches = []
    while (batch := parse_replay(await receive(socket))) is not None:
        batches.append(batch)
    return batches


@pytest.mark.parametrize("shape", ["map", "array"])
def test_live_frames_count_up(shape: str) -> None:
    async def run() -> None:
        async with opened(event_shape=shape) as publisher, client(zmq.SUB, publisher.live_port) as sub:
            (rank,) = publisher.ranks
            sequence = await heard(rank, sub)
            publish(rank)
            topic, _, payload = frames = await receive(sub)
            assert topic == b""
            assert parse_live(frames)[0] == sequence + 1 == rank.next_sequence - 1
            assert (b"type" in payload) is (shape == "map")
            batch = decode_batch(payload)
            assert batch.rank == 0
            assert [type(event) for event in batch.events] == [BlockStored]

    asyncio.run(run())


def test_dropped_batches_have_numbers_and_can_be_replayed() -> None:
    async def run() -> None:
        async with opened() as publisher, client(zmq.SUB, publisher.live_port) as sub:
            assert publisher.replay_port is not None
            (rank,) = publisher.ranks
            sequence = await heard(rank, sub)
            rank.to_drop = 2
            for _ in range(3):
                publish(rank)
            assert parse_live(await receive(sub))[0] == sequence + 3
            assert (rank.dropped, rank.to_drop) == (2, 0)
            async with client(zmq.DEALER, publisher.replay_port) as dealer:
                batches = await replayed(dealer, sequence + 1)
                assert [number for number, _ in batches] == [sequence + 1, sequence + 2, sequence + 3]

    asyncio.run(run())


def test_replay_begins_where_asked_and_with_the_start_of_the_engine() -> None:
    async def run() -> None:
        async with opened() as publisher:
            assert publisher.replay_port is not None
            (rank,) = publisher.ranks
            for _ in range(2 * REPLAY_SLICE):
                publish(rank)
            async with client(zmq.DEALER, publisher.replay_port) as dealer:
                await dealer.send_multipart([b"not a request"])
                batches = await replayed(dealer, 0)
                assert [number for number, _ in batches] == list(range(2 * REPLAY_SLICE + 1))
                first = decode_batch(batches[0][1]).events
                assert [type(event) for event in first] == [AllBlocksCleared]
                assert await replayed(dealer, 2**64 - 1) == []
                # Two requests at once are both answered, one after the other.
                await dealer.send_multipart(replay_request(2 * REPLAY_SLICE))
                assert [number for number, _ in await replayed(dealer, 2 * REPLAY_SLICE)] == [2 * REPLAY_SLICE]
                assert parse_replay(await receive(dealer)) is not None
                assert parse_replay(await receive(dealer)) is None

    asyncio.run(run())


@pytest.mark.parametrize(("name", "limit"), [("BUFFER_STEPS", 5), ("BUFFER_BYTES", 450)])
def test_the_replay_buffer_forgets_the_oldest(monkeypatch: pytest.MonkeyPatch, name: str, limit: int) -> None:
    monkeypatch.setattr(publisher_module, name, limit)

    async def run() -> None:
        async with opened() as publisher:
            assert publisher.replay_port is not None
            for _ in range(20):
                publish(publisher.ranks[0])
            async with client(zmq.DEALER, publisher.replay_port) as dealer:
                batches = await replayed(dealer, 0)
            n = len(batches)
            assert [number for number, _ in batches] == list(range(21 - n, 21))
            assert n == 5 if name == "BUFFER_STEPS" else sum(len(payload) for _, payload in batches) <= 450
            assert n >= 2

    asyncio.run(run())


def test_each_rank_has_its_own_ports_and_sequence() -> None:
    async def run() -> None:
        async with opened(dp_size=3) as publisher, client(zmq.SUB, publisher.live_port, rank=2) as sub:
            assert publisher.replay_port is not None
            await heard(publisher.ranks[2], sub)
            publish(publisher.ranks[2])
            assert decode_batch((await receive(sub))[2]).rank == 2
            assert [rank.next_sequence for rank in publisher.ranks[:2]] == [1, 1]
            async with client(zmq.DEALER, publisher.replay_port, rank=1) as dealer:
                ((number, payload),) = await replayed(dealer, 0)
                assert (number, decode_batch(payload).rank) == (0, 1)

    asyncio.run(run())


def test_open_again_uses_the_same_ports_and_counts_from_zero() -> None:
    async def run() -> None:
        async with opened() as publisher, client(zmq.SUB, publisher.live_port) as sub:
            ports = publisher.live_port, publisher.replay_port
            await heard(publisher.ranks[0], sub)
            before = publisher.ranks[0].next_sequence
            for round_ in range(1, 4):
                publisher.close()
                await publisher.open()
                assert (publisher.live_port, publisher.replay_port) == ports
                assert publisher.ranks[0].next_sequence == 1
                assert publisher.published_before == before + round_ - 1
            assert await heard(publisher.ranks[0], sub) < publisher.ranks[0].next_sequence

    asyncio.run(run())


def test_chosen_ports_and_a_port_that_is_taken() -> None:
    async def run() -> None:
        async with opened(dp_size=2, replay=False) as publisher:
            assert publisher.replay_port is None
            with pytest.raises(ConfigError, match=f"ports {publisher.live_port}.*--kv-base-port"):
                async with opened(publisher.live_port, dp_size=2):
                    raise AssertionError("both bound the same port")
        async with opened(publisher.live_port) as other:
            assert (other.live_port, other.replay_port) == (publisher.live_port, publisher.live_port + 1)

    asyncio.run(run())
