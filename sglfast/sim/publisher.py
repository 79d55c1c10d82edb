"""The KV event sockets of one simulated worker: a PUB socket a rank, and a ROUTER socket a rank that replays.

Runs in: sim, on the event loop; nothing here blocks. Contract: frames and counting are those of spec/kv_events.md 1.2 and 1.6
    (the shape of 0.5.22 and later). A rank's sequence starts at 0 with AllBlocksCleared. A batch that is dropped on purpose
    has its number and stays in the replay buffer, as one that ZMQ dropped would; stores that are kept back (sim/silence.py) have
    none. Ports stay the same over `close` and `open`, and so does what is kept back.

Why no send limit on the replay socket: SGLang's loses batches there (limit 1000, spec 1.6), which would make every test of a
    recovery a matter of luck.
"""

import asyncio
import contextlib
import random
import time
from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Literal

import zmq

from sglfast.errors import ConfigError
from sglfast.sim.events import all_cleared
from sglfast.sim.settings import SimSettings
from sglfast.sim.silence import StoreFilter
from sglfast.wire.frames import live_frames, parse_replay_request, replay_data, replay_end
from sglfast.wire.kv_events import EventOut, encode_batch

BUFFER_STEPS = 10_000
# SGLang bounds its buffer by batches only; with many ranks of long prompts in one process that would be gigabytes.
BUFFER_BYTES = 64 << 20
LIVE_HWM = 100_000
# Answers sent before the loop gets its turn again.
REPLAY_SLICE = 500
FREE_PORT_TRIES = 64
SEARCHED_PORTS = (12_000, 30_000)
REBIND_TRIES = 500
REBIND_PAUSE_S = 0.01


class RankPublisher:
    """Events of one rank.

    next_sequence: batches published so far, dropped ones included; dropped: those; to_drop: how many of the next will be.
    stores: which of its stores it publishes.
    """

    def __init__(
        self,
        rank: int,
        live: zmq.Socket[bytes],
        replay: zmq.Socket[bytes] | None,
        shape: Literal["map", "array"],
        stores: StoreFilter,
    ) -> None:
        self._rank = rank
        self._stores = stores
        self._live = live
        self._replay = replay
        self._shape = shape
        self._buffer: deque[tuple[int, bytes]] = deque()
        self._buffered_bytes = 0
        self._answers: deque[Iterator[list[bytes]]] = deque()
        self._answering: asyncio.Handle | None = None
        self._loop = asyncio.get_running_loop()
        self.next_sequence = 0
        self.dropped = 0
        self.to_drop = 0
        if replay is not None:
            self._loop.add_reader(replay.FD, self._on_request)
        self.publish(all_cleared())

    def publish(self, events: list[EventOut]) -> None:
        """Send one batch, unless all of it is kept back."""
        events = self._stores.published(events)
        if not events:
            return
        payload = encode_batch(time.time(), events, self._rank, shape=self._shape)
        sequence, self.next_sequence = self.next_sequence, self.next_sequence + 1
        if self._replay is not None:
            self._remember(sequence, payload)
        if self.to_drop:
            self.to_drop -= 1
            self.dropped += 1
            return
        self._live.send_multipart(live_frames(b"", sequence, payload), flags=zmq.NOBLOCK)

    def _remember(self, sequence: int, payload: bytes) -> None:
        self._buffer.append((sequence, payload))
        self._buffered_bytes += len(payload)
        while len(self._buffer) > BUFFER_STEPS or (self._buffered_bytes > BUFFER_BYTES and len(self._buffer) > 1):
            self._buffered_bytes -= len(self._buffer.popleft()[1])

    def close(self) -> None:
        """Close both sockets; queued batches are lost, as with a killed engine."""
        if self._answering is not None:
            self._answering.cancel()
        if self._replay is not None:
            self._loop.remove_reader(self._replay.FD)
            self._replay.close(linger=0)
        self._live.close(linger=0)

    def _on_request(self) -> None:
        # ZMQ's descriptor tells of changes only, so everything there is must be read.
        assert self._replay is not None
        with contextlib.suppress(zmq.Again):
            while True:
                identity, *frames = self._replay.recv_multipart(flags=zmq.NOBLOCK)
                start = parse_replay_request(frames)
                if start is not None:
                    self._answers.append(_answers(identity, [item for item in self._buffer if item[0] >= start]))
        if self._answers and self._answering is None:
            self._answering = self._loop.call_soon(self._send_slice)

    def _send_slice(self) -> None:
        assert self._replay is not None
        self._answering = None
        sent = 0
        for message in islice(self._answers[0], REPLAY_SLICE):
            self._replay.send_multipart(message, flags=zmq.NOBLOCK)
            sent += 1
        if sent < REPLAY_SLICE:
            self._answers.popleft()
        # Sending may have used up the descriptor's news of another request.
        self._on_request()


def _answers(identity: bytes, batches: list[tuple[int, bytes]]) -> Iterator[list[bytes]]:
    for sequence, payload in batches:
        yield [identity, *replay_data(b"", sequence, payload)]
    yield [identity, *replay_end()]


class KvPublisher:
    """The publishers of one worker. n_ranks: as many as the next `open` makes; live_port, replay_port: of rank 0, rank r is r higher;
    0 until `open`, None = no replay."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], settings: SimSettings, live_port: int) -> None:
        self._context = context
        self._host = settings.host
        self.n_ranks = settings.dp_size
        self._shape: Literal["map", "array"] = settings.event_shape
        self.stores = [StoreFilter(settings.seed + rank) for rank in range(settings.dp_size)]
        self._is_open_again = False
        self.published_before = 0  # batches of the sequences that `close` ended
        self.dropped_before = 0
        self.live_port = live_port
        self.replay_port: int | None = None
        if settings.replay:
            self.replay_port = live_port and live_port + settings.dp_size
        self.ranks: list[RankPublisher] = []

    async def open(self) -> None:
        """Bind every socket and publish AllBlocksCleared as sequence 0. Raises ConfigError when a port is taken."""
        # ZMQ closes in another thread: a port that was ours a moment ago may need time.
        tries = REBIND_TRIES if self._is_open_again else 1
        live = await self._bind(zmq.PUB, self.live_port, tries)
        try:
            replay = [None] * self.n_ranks if self.replay_port is None else await self._bind(zmq.ROUTER, self.replay_port, tries)
        except ConfigError:
            _close(live)
            raise
        self._is_open_again = True
        self.live_port = _port_of(live[0])
        if replay[0] is not None:
            self.replay_port = _port_of(replay[0])
        self.ranks = [RankPublisher(rank, live[rank], replay[rank], self._shape, self.stores[rank]) for rank in range(self.n_ranks)]

    def close(self) -> None:
        """Close every socket; `open` binds the same ports again, with sequences from 0."""
        for rank in self.ranks:
            self.published_before += rank.next_sequence
            self.dropped_before += rank.dropped
            rank.close()
        self.ranks = []

    async def _bind(self, kind: int, port: int, tries: int) -> list[zmq.Socket[bytes]]:
        """Return one bound socket a rank, on neighbouring ports from `port` on (0 = wherever there are free ones)."""
        for _ in range(tries if port else FREE_PORT_TRIES):
            sockets: list[zmq.Socket[bytes]] = []
            # Neighbours of a port that the kernel picks are often taken by outgoing connections: look below that range.
            first = port or (random.randrange(*SEARCHED_PORTS) if self.n_ranks > 1 else 0)
            try:
                for rank in range(self.n_ranks):
                    sockets.append(self._context.socket(kind))
                    sockets[rank].setsockopt(zmq.SNDHWM, LIVE_HWM if kind == zmq.PUB else 0)
                    sockets[rank].setsockopt(zmq.IPV6, ":" in self._host)
                    sockets[rank].bind(_endpoint(self._host, first and first + rank))
                return sockets
            except zmq.ZMQError as error:
                _close(sockets)
                reason = error
            await asyncio.sleep(REBIND_PAUSE_S)
        where = f"ports {port}..{port + self.n_ranks - 1}" if port else f"{self.n_ranks} free neighbouring ports"
        raise ConfigError(f"KV events: cannot bind {where} on {self._host}: {reason}; choose another --kv-base-port")


def _close(sockets: list[zmq.Socket[bytes]]) -> None:
    for socket in sockets:
        socket.close(linger=0)


def _endpoint(host: str, port: int) -> str:
    return f"tcp://[{host}]:{port or '*'}" if ":" in host else f"tcp://{host}:{port or '*'}"


def _port_of(socket: zmq.Socket[bytes]) -> int:
    return int(socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])
