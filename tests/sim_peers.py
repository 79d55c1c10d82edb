"""Peers of a simulated worker for tests: an embedded one with a client, and a subscriber that keeps its blocks from events."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import uvloop
import zmq
import zmq.asyncio

from sglfast.sim.events import all_cleared
from sglfast.sim.settings import SimSettings
from sglfast.sim.simulator import Simulator
from sglfast.sim.worker import SimWorker
from sglfast.wire.frames import parse_live, parse_replay, replay_request
from sglfast.wire.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, decode_batch

WAIT_S = 20
FAST: dict[str, Any] = {"prefill_tokens_per_s": 1e7, "decode_tokens_per_s_per_request": 1e5}
SLOW: dict[str, Any] = {"prefill_tokens_per_s": 1e7, "decode_tokens_per_s_per_request": 20.0}
INFERENCE = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hello there, how is the weather"}]},
    "/v1/completions": {"prompt": "hello there, how is the weather"},
    "/generate": {"text": "hello there, how is the weather"},
    "/v1/embeddings": {"input": "hello there, how is the weather"},
}


def run(coroutine: Coroutine[Any, Any, None], factory: Callable[[], Any] = uvloop.new_event_loop) -> None:
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(coroutine)


class Worker:
    """A worker as a client sees it, and the object behind it."""

    def __init__(self, worker: SimWorker, session: aiohttp.ClientSession) -> None:
        self.worker = worker
        self.session = session

    def post(self, path: str, body: Any, **more: Any) -> Any:
        return self.session.post(self.worker.url + path, json=body, **more)

    async def ask(self, path: str, body: Any, status: int = 200, **more: Any) -> Any:
        async with self.post(path, body, **more) as response:
            assert response.status == status, await response.text()
            return await response.json()

    async def get(self, path: str) -> Any:
        async with self.session.get(self.worker.url + path) as response:
            assert response.status == 200
            return await response.json()

    async def stats(self) -> Any:
        return await self.get("/sim/stats?keys=1")

    async def until(self, condition: Callable[[Any], bool]) -> Any:
        """Return the first stats for which the condition holds."""
        deadline = time.monotonic() + WAIT_S
        while not condition(stats := await self.stats()):
            assert time.monotonic() < deadline, stats
            await asyncio.sleep(0.005)
        return stats

    async def generate(self, token_ids: list[int], new_tokens: int = 1, **more: Any) -> Any:
        body = {"input_ids": token_ids, "sampling_params": {"max_new_tokens": new_tokens, "ignore_eos": True}}
        return await self.ask("/generate", body, **more)


@asynccontextmanager
async def running(**changes: Any) -> AsyncIterator[Worker]:
    settings: dict[str, Any] = {"workers": 1, "base_port": 0, "page_size": 4, "cache_tokens": 4000, **FAST, **changes}
    timeout = aiohttp.ClientTimeout(total=WAIT_S)
    async with Simulator(SimSettings(**settings)) as simulator, aiohttp.ClientSession(timeout=timeout) as session:
        yield Worker(simulator.workers[0], session)


class Follower:
    """A subscriber that keeps the set of blocks of one rank from events alone."""

    def __init__(self, worker: SimWorker, rank: int) -> None:
        self.worker = worker
        self.rank = rank
        self.blocks: set[int] = set()
        self.sequences: list[int] = []
        self.context = zmq.asyncio.Context()
        self.socket = self.context.socket(zmq.SUB)
        self.socket.setsockopt(zmq.RCVHWM, 0)
        self.socket.subscribe(b"")
        self.socket.connect(f"tcp://127.0.0.1:{worker.publisher.live_port + rank}")

    async def receive(self) -> None:
        sequence, payload = parse_live(await asyncio.wait_for(self.socket.recv_multipart(), WAIT_S))
        self.sequences.append(sequence)
        self.apply(payload)

    def apply(self, payload: bytes) -> None:
        batch = decode_batch(payload)
        assert (batch.rank, batch.undecoded) == (self.rank, 0)
        for event in batch.events:
            match event:
                case BlockStored():
                    self.blocks |= set(event.block_hashes)
                case BlockRemoved():
                    self.blocks -= set(event.block_hashes)
                case AllBlocksCleared():
                    self.blocks.clear()

    async def settle(self) -> None:
        """Read up to the last batch that was published."""
        while not self.sequences or self.sequences[-1] < self.worker.publisher.ranks[self.rank].next_sequence - 1:
            await self.receive()


@asynccontextmanager
async def following(worker: SimWorker, rank: int = 0) -> AsyncIterator[Follower]:
    follower = Follower(worker, rank)
    try:
        while not await follower.socket.poll(20):  # the subscription takes a moment to arrive
            worker.publisher.ranks[rank].publish(all_cleared())
        await follower.settle()
        yield follower
    finally:
        follower.socket.close(linger=0)
        follower.context.destroy(linger=0)


async def replayed(worker: SimWorker, start: int) -> list[tuple[int, bytes]]:
    context = zmq.asyncio.Context()
    dealer = context.socket(zmq.DEALER)
    try:
        dealer.connect(f"tcp://127.0.0.1:{worker.publisher.replay_port}")
        await dealer.send_multipart(replay_request(start))
        batches = []
        while (batch := parse_replay(await asyncio.wait_for(dealer.recv_multipart(), WAIT_S))) is not None:
            batches.append(batch)
        return batches
    finally:
        dealer.close(linger=0)
        context.destroy(linger=0)
