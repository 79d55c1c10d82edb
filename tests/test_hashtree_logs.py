"""What the writer keeps beside the table: logs that are compacted bit by bit lose nothing, and no call pays for what others left behind."""

import mmap
import time
from array import array
from collections.abc import Iterable

import pytest
from conftest import SeededRandom

from sglfast._hashtree import TreeReader, TreeWriter
from sglfast._segment import Segment, segment_bytes

RANKS = range(4)
TURN_KEYS = 1024


def tree(capacity_blocks: int) -> tuple[TreeWriter, TreeReader]:
    sizes = {"max_workers": 1, "max_ranks": 64, "max_shards": 1, "capacity_blocks": capacity_blocks}
    segment = Segment.format(mmap.mmap(-1, segment_bytes(**sizes)), **sizes)
    return TreeWriter(segment), TreeReader(segment)


def packed(keys: Iterable[int]) -> bytes:
    """Keys 1, 2, 3 ... spread over the table."""
    return array("Q", [key * 0x9E3779B97F4A7C15 & 2**64 - 1 for key in keys]).tobytes()


class Model:
    """A tree and what its ranks own; keys are numbers, the oldest first in `ages`."""

    def __init__(self, capacity_blocks: int) -> None:
        self.capacity_blocks = capacity_blocks
        self.writer, self.reader = tree(capacity_blocks)
        self.owned: list[set[int]] = [set() for _ in RANKS]
        self.ages: dict[int, None] = {}

    def store(self, rank: int, keys: list[int]) -> None:
        for key in keys:
            if key not in self.ages:
                if len(self.ages) == self.capacity_blocks:
                    oldest = next(iter(self.ages))
                    del self.ages[oldest]
                    for owned in self.owned:
                        owned.discard(oldest)
                self.ages[key] = None
            self.owned[rank].add(key)
        self.writer.store(rank, 0, packed(keys))

    def remove(self, rank: int, keys: Iterable[int]) -> None:
        self.writer.remove(rank, 7, packed(keys))
        self.forget(rank, keys)

    def clear(self, rank: int, turn_keys: int) -> None:
        n_blocks, is_done = 0, False
        while not is_done:
            gone, is_done = self.writer.clear_some(rank, turn_keys)
            n_blocks += gone
        assert n_blocks == len(self.owned[rank])
        self.forget(rank, list(self.owned[rank]))

    def forget(self, rank: int, keys: Iterable[int]) -> None:
        self.owned[rank].difference_update(keys)
        for key in keys:
            if not any(key in owned for owned in self.owned):
                self.ages.pop(key, None)

    def check(self) -> None:
        assert self.reader.stats()["live_blocks"] == len(self.ages)
        everything = sorted(set(self.ages).union(*self.owned))
        for rank in RANKS:
            assert self.writer.owned_blocks(rank) == len(self.owned[rank])
            assert list(self.writer.owns(rank, packed(everything))) == [key in self.owned[rank] for key in everything]


@pytest.mark.parametrize("capacity_blocks", [20_000, 2500])
@pytest.mark.parametrize("round_", range(6))
def test_no_block_is_lost_to_the_log_of_its_rank(rng: SeededRandom, capacity_blocks: int, round_: int) -> None:
    """Ranks share blocks, lose them and get them back, while their logs are being compacted; then each is cleared of all that it owns."""
    model = Model(capacity_blocks)
    for _ in range(400):
        rank, start = rng.choice(RANKS), rng.randrange(1, 6001)  # the table keeps key 0 as SF_KEY_ZERO, which is what key 1 becomes here
        keys = list(range(start, start + rng.randrange(1, 400)))
        match rng.choices(("store", "remove", "clear", "lose most"), (10, 8, 0.1, 0.4))[0]:
            case "store":
                model.store(rank, keys)
            case "remove":
                model.remove(rank, keys)
            case "clear":
                model.clear(rank, rng.choice((100, 1000, 100_000)))
            case _:
                model.remove(rank, rng.sample(sorted(model.owned[rank]), len(model.owned[rank]) * 9 // 10))
    model.check()
    for rank in RANKS:
        model.clear(rank, rng.choice((100, 1000, 100_000)))
        model.check()


def costs_ms(everything: "memoryview[int]") -> list[float]:
    """CPU time of each turn, of a writer that has to get rid of what two large ranks left behind. everything: keys, three halves."""
    half = len(everything) // 3
    writer, _ = tree(2 * half)
    costs: list[float] = []

    def turns(rank: int, start: int, n_keys: int, *, is_churn: bool = False) -> None:
        for at in range(start, start + n_keys, TURN_KEYS):
            keys = everything[at : at + TURN_KEYS]
            began_s = time.thread_time()
            if is_churn:
                writer.remove(rank, 7, keys)
            writer.store(rank, 0, keys)
            costs.append((time.thread_time() - began_s) * 1000)

    turns(0, 0, half)
    turns(1, half, half)
    costs.clear()  # the kernel's work for memory that was never touched
    is_done = False
    while not is_done:
        _, is_done = writer.clear_some(0, TURN_KEYS)
    turns(2, 2 * half, half)
    turns(3, 0, half)  # the oldest have to go, and in front of them are as many that went already
    for _ in range(4):
        turns(2, 2 * half, half, is_churn=True)
    return sorted(costs)


@pytest.mark.alone
def test_no_turn_pays_for_what_others_left_behind() -> None:
    """Passing by all the entries that are nobody's any more at once would cost as much as two hundred turns."""
    everything = memoryview(array("Q", packed(range(1, 1 + 3 * 128 * TURN_KEYS))))
    ratios = []
    while len(ratios) < 3:
        costs = costs_ms(everything)
        ratios.append(costs[-1] / costs[len(costs) // 2])
        if ratios[-1] < 25:
            return
    raise AssertionError(f"one turn costs as much as {min(ratios):.0f} others")
