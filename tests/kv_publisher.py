"""A rank's event publisher for tests: the sockets of an engine, the numbers it gives, its replay buffer and its blocks.

No thread: `serve` answers replay requests for a while, and every wait of a test goes through it. The live socket is an XPUB, so
that a test knows when the subscription has arrived and loses messages only when it means to.
"""

import random
import socket
import time
from collections.abc import Callable, Iterable
from typing import Any, Literal

import zmq

from sglfast._blockhash import page_keys
from sglfast.wire import kv_events
from sglfast.wire.kv_events import EventOut

BLOCK_SIZE = 4
WAIT_S = 20.0


def tokens_of(conversation: int, n_blocks: int) -> list[int]:
    """The prompt of a conversation: `n_blocks` full blocks that no other conversation has."""
    return [1000 * conversation + i for i in range(n_blocks * BLOCK_SIZE)]


def keys_of(conversation: int, n_blocks: int) -> bytes:
    return page_keys(tokens_of(conversation, n_blocks), BLOCK_SIZE)


def hashes(keys: bytes) -> list[int]:
    return [int.from_bytes(keys[at : at + 8], "little") for at in range(0, len(keys), 8)]


def stored(conversation: int, n_blocks: int) -> EventOut:
    """The engine has prefilled this conversation."""
    tokens = tokens_of(conversation, n_blocks)
    keys = hashes(page_keys(tokens, BLOCK_SIZE))
    return kv_events.stored(block_hashes=keys, parent_block_hash=None, token_ids=tokens, block_size=BLOCK_SIZE)


def removed(conversation: int, n_blocks: int) -> EventOut:
    return kv_events.removed(block_hashes=hashes(keys_of(conversation, n_blocks)))


class Publisher:
    """One rank of an engine. `has_replay`: it binds a ROUTER; `shape`: of replayed messages."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        *,
        has_replay: bool,
        shape: Literal["new", "old"] = "new",
        topic: bytes = b"",
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        self.context = context
        self.has_replay = has_replay
        self.shape: Literal["new", "old"] = shape
        self.topic = topic
        self.host = host
        self.port, self.replay_port = port, 0
        self.is_mute = False
        self.hidden: list[set[int]] = []  # numbers left out of the answers to come, one set an answer
        self.requests: list[int] = []
        self.n_subscriptions = 0
        self._start()

    def _start(self) -> None:
        self.seq = 0
        self.buffer: list[tuple[int, bytes]] = []
        self.live = self._bind(zmq.XPUB, self.port)
        self.port = self._port(self.live)
        self.router: zmq.Socket[bytes] | None = None
        if self.has_replay:
            self.router = self._bind(zmq.ROUTER, self.replay_port)
            self.replay_port = self._port(self.router)

    def _bind(self, kind: int, port: int) -> zmq.Socket[bytes]:
        bound = self.context.socket(kind)
        bound.setsockopt(zmq.LINGER, 0)
        bound.setsockopt(zmq.SNDHWM, 0)
        bound.setsockopt(zmq.IPV6, int(":" in self.host))
        deadline_s = time.monotonic() + WAIT_S
        while True:
            try:
                bound.bind(f"tcp://{self.host}:{port or '*'}")
            except zmq.ZMQError as error:
                # A socket that was closed a moment ago gives its port back in ZMQ's own time.
                if error.errno != zmq.EADDRINUSE or time.monotonic() > deadline_s:
                    bound.close()
                    raise
                time.sleep(0.01)
            else:
                return bound

    def _port(self, bound: zmq.Socket[bytes]) -> int:
        endpoint = bound.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(endpoint, bytes)
        return int(endpoint.rstrip(b"\0").rpartition(b":")[2])

    @property
    def endpoint(self) -> str:
        return f"tcp://{self.host}:{self.port}"

    @property
    def replay_endpoint(self) -> str | None:
        return f"tcp://{self.host}:{self.replay_port}" if self.has_replay else None

    def close(self) -> None:
        self.live.close(linger=0)
        if self.router is not None:
            self.router.close(linger=0)

    def restart(self) -> None:
        """Another process of the engine at the same ports: numbers from 0, no subscriber yet."""
        self.close()
        self.n_subscriptions = 0
        self._start()
        self.publish(kv_events.cleared())

    def publish(self, *events: EventOut, is_lost: bool = False) -> int:
        """Publish a batch; returns its number. `is_lost`: spend the number and fill the buffer, but send nothing."""
        return self.publish_raw(kv_events.encode_batch(time.time(), events, 0), is_lost=is_lost)

    def publish_raw(self, payload: bytes, *, is_lost: bool = False) -> int:
        seq, self.seq = self.seq, self.seq + 1
        self.buffer.append((seq, payload))
        if not is_lost:
            self.live.send_multipart(kv_events.live_frames(self.topic, seq, payload))
        return seq

    def send(self, frames: Iterable[bytes]) -> None:
        """Put frames of any kind on the live socket."""
        self.live.send_multipart(list(frames))

    def serve(self) -> None:
        """Take in subscriptions and answer replay requests that have arrived."""
        while self.live.poll(0):
            self.n_subscriptions += 1 if self.live.recv()[0] else -1
        while self.router is not None and self.router.poll(0):
            identity, *request = self.router.recv_multipart()
            start = kv_events.parse_replay_request(request)
            assert start is not None
            self.requests.append(start)
            if self.is_mute:
                continue
            hidden = self.hidden.pop(0) if self.hidden else set()
            for seq, payload in self.buffer:
                if seq >= start and seq not in hidden:
                    self.router.send_multipart([identity, *kv_events.replay_data(self.topic, seq, payload, shape=self.shape)])
            self.router.send_multipart([identity, *kv_events.replay_end(self.shape)])


def two_in_a_row(context: zmq.Context[zmq.Socket[bytes]]) -> tuple[Publisher, Publisher]:
    """Ranks 0 and 1 of an engine without replay: their ports are neighbours."""
    for _ in range(100):
        try:
            first = Publisher(context, has_replay=False, port=random.randrange(12_000, 30_000))  # no outgoing connection is there
        except zmq.ZMQError:
            continue
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", first.port + 1))
            except (OSError, OverflowError):
                first.close()
                continue
        return first, Publisher(context, has_replay=False, port=first.port + 1)
    raise AssertionError("no two free ports in a row")


def wait_until(condition: Callable[[], Any], *publishers: Publisher, what: str = "the condition") -> None:
    """Serve the publishers until `condition()` holds; fails after WAIT_S."""
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, f"{what} did not come true in {WAIT_S} s"
        for publisher in publishers:
            publisher.serve()
        time.sleep(0.002)
