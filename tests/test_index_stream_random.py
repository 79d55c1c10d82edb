"""The sequence rules of one rank at random: an engine that restarts, a network that loses, a replay with holes.

The law that must hold at rest: every block that the index believes in is there, and EXACT means equal.
"""

import struct
from collections import deque
from collections.abc import Sequence

import pytest
from conftest import SeededRandom

from sglfast._counters import RANK_EXACT
from sglfast.index.held import Limits
from sglfast.index.sink import Outcome
from sglfast.index.stream import RankStream


class Engine:
    """What a rank's publisher does: numbers, a replay buffer, a set of blocks. A payload is (time, operation, block)."""

    STORE, REMOVE, CLEAR = range(3)

    def __init__(self, rng: SeededRandom, buffer_batches: int) -> None:
        self.rng = rng
        self.clock = 0.0
        self.buffer: deque[tuple[int, bytes]] = deque(maxlen=buffer_batches)
        self.restart()

    def restart(self) -> None:
        self.seq = 0
        self.blocks: set[int] = set()
        self.buffer.clear()

    def publish(self) -> tuple[int, bytes]:
        self.clock += 1.0
        block = self.rng.randrange(40)
        operation = self.CLEAR if self.seq == 0 or self.rng.random() < 0.01 else self.rng.choice((self.STORE, self.REMOVE))
        message = self.seq, struct.pack(">dii", self.clock, operation, block)
        self.change(self.blocks, message[1])
        self.buffer.append(message)
        self.seq += 1
        return message

    @classmethod
    def change(cls, blocks: set[int], payload: bytes) -> bool:
        """Apply a payload to a set; True when it emptied it."""
        _, operation, block = struct.unpack(">dii", payload)
        if operation == cls.STORE:
            blocks.add(block)
        elif operation == cls.REMOVE:
            blocks.discard(block)
        else:
            blocks.clear()
        return bool(operation == cls.CLEAR)


class World:
    """An engine, a network that loses, a subscriber's loop and the set of blocks that it keeps."""

    def __init__(self, rng: SeededRandom, *, has_replay: bool, buffer_batches: int) -> None:
        self.rng = rng
        self.engine = Engine(rng, buffer_batches)
        self.blocks: set[int] = set()
        self.now_s = 0.0
        self.live: deque[tuple[int, bytes]] = deque()
        self.answer: deque[tuple[int, bytes] | None] = deque()
        self.is_reliable = False
        self.is_mute = False
        limits = Limits(replay_timeout_s=1.0, max_tries=3, max_held_batches=20)
        self.stream = RankStream(self, has_replay=has_replay, limits=limits)

    # the sink
    def apply(self, payload: bytes) -> Outcome:
        return Outcome(is_cleared=Engine.change(self.blocks, payload))

    def clear(self, why: str) -> None:
        self.blocks.clear()

    def ask_replay(self, start_seq: int) -> None:
        items: list[tuple[int, bytes] | None] = [item for item in self.engine.buffer if item[0] >= start_seq]
        if not self.is_reliable:
            # A history may begin late only when the engine has forgotten, not because its send queue was full.
            kept = 0 if start_seq else 1
            items = items[:kept] + [item for item in items[kept:] if self.rng.random() > 0.2]
        if self.is_reliable or self.rng.random() > 0.3:
            items.append(None)
        if not self.is_reliable and (self.is_mute or self.rng.random() < 0.1):
            items = []
        self.answer = deque(items)

    # the loop
    def deliver_live(self) -> None:
        if self.live and self.live[0][0] == self.stream.steady_seq and self.rng.random() < 0.5:
            self.deliver_run()
        elif self.live:
            self.stream.on_live(*self.live.popleft(), self.now_s)

    def deliver_run(self) -> None:
        """Up to five that are next in line, as one."""
        last = self.live.popleft()
        is_cleared = self.apply(last[1]).is_cleared
        n_batches = 1
        while n_batches < 5 and self.live and self.live[0][0] == last[0] + 1:
            last = self.live.popleft()
            is_cleared |= self.apply(last[1]).is_cleared
            n_batches += 1
        self.stream.on_applied(n_batches, last[1], Outcome(is_cleared=is_cleared))

    def deliver_answer(self) -> None:
        if self.answer:
            item = self.answer.popleft()
            if item is None:
                self.stream.on_replay_end(self.now_s)
            else:
                self.stream.on_replay(*item, self.now_s)
        elif self.stream.deadline_s is not None:
            self.now_s = max(self.now_s, self.stream.deadline_s)
            self.stream.on_time(self.now_s)

    def publish(self) -> None:
        message = self.engine.publish()
        if self.is_reliable or self.rng.random() > 0.03:
            self.live.append(message)

    def reconnect(self) -> None:
        """As the subscriber does: what was received is read, then the notices are told."""
        while self.live:
            self.deliver_live()
        self.stream.on_disconnected()
        for _ in range(self.rng.randrange(4)):
            self.engine.publish()
        self.stream.on_connected(self.now_s)

    def restart(self) -> None:
        self.engine.restart()
        self.reconnect()

    def turn_mute(self) -> None:
        self.is_mute = not self.is_mute

    def settle(self) -> None:
        self.is_reliable = True
        for _ in range(3):
            self.publish()
        for _ in range(2000):
            self.deliver_live()
            self.deliver_answer()
            if not self.live and not self.answer and self.stream.deadline_s is None:
                return
        raise AssertionError("the stream does not come to rest")


def steps(world: World, n: int, weights: Sequence[int]) -> None:
    actions = [world.publish, world.deliver_live, world.deliver_answer, world.reconnect, world.restart, world.turn_mute]
    for action in world.rng.choices(actions, weights, k=n):
        action()


@pytest.mark.parametrize("round_", range(60))
@pytest.mark.parametrize(("has_replay", "buffer_batches"), [(True, 10_000), (True, 15), (False, 0)])
def test_never_a_stale_owner_at_rest(rng: SeededRandom, has_replay: bool, buffer_batches: int, round_: int) -> None:
    """Whatever was lost, at rest every block that the index believes in is there; and EXACT means equal."""
    world = World(rng, has_replay=has_replay, buffer_batches=buffer_batches)
    for _ in range(rng.randrange(4)):
        world.engine.publish()
    world.stream.on_connected(0.0)
    steps(world, rng.randrange(400), (10, 10, 10, rng.choice((0, 1)), rng.choice((0, 1)), rng.choice((0, 1))))
    world.settle()
    state, _ = world.stream.status()
    assert world.blocks <= world.engine.blocks, rng
    if state == RANK_EXACT:
        assert world.blocks == world.engine.blocks, rng
    if buffer_batches > 1000 and world.stream.counters.give_ups == 0:
        assert state == RANK_EXACT, rng
