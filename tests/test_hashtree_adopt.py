"""A new TreeWriter takes over the tree of a dead one: whole, torn in every way that a kill can tear it, or damaged."""

import mmap
import os
import signal
import struct
import time
from array import array

import pytest
from conftest import SeededRandom
from model import HashTreeModel

from sglfast._hashtree import TreeReader, TreeWriter
from sglfast._segment import Segment, segment_bytes

SIZES = {"max_workers": 1, "max_ranks": 128, "max_shards": 1, "capacity_blocks": 300}
Op = tuple[str, int, int, list[int]]


def packed(keys: list[int]) -> bytes:
    return array("Q", keys).tobytes()


class Memory:
    """A segment in shared anonymous memory, with the places of its tree."""

    def __init__(self) -> None:
        self.map = mmap.mmap(-1, segment_bytes(**SIZES))
        self.segment = Segment.format(self.map, **SIZES)
        self.n_slots, self.stride = struct.unpack_from("<QQ", self.map, 48)
        self.tree, self.slots = struct.unpack_from("<QQ", self.map, 112)

    def slot(self, i: int) -> bytes:
        return self.map[self.slots + i * self.stride :][: self.stride]

    def put_slot(self, i: int, data: bytes) -> None:
        at = self.slots + i * self.stride
        self.map[at : at + len(data)] = data

    def tear(self) -> None:
        """Leave the version odd."""
        self.map[self.tree] |= 1

    @property
    def version(self) -> int:
        return int.from_bytes(self.map[self.tree : self.tree + 8], "little")


def random_op(rng: SeededRandom) -> Op:
    name = rng.choices(("store", "remove", "clear"), (6, 5, 0.1))[0]
    return name, rng.randrange(SIZES["max_ranks"]), rng.randrange(3), [rng.randrange(1, 250) for _ in range(rng.randrange(30))]


def apply(tree: TreeWriter | HashTreeModel, op: Op) -> None:
    name, rank, tier, numbers = op
    keys = numbers if isinstance(tree, HashTreeModel) else packed(numbers)
    if name == "store":
        tree.store(rank, tier, keys)
    elif name == "remove":
        tree.remove(rank, 1 << tier, keys)
    else:
        tree.clear(rank)


def check_equal(writer: TreeWriter, reader: TreeReader, model: HashTreeModel) -> None:
    assert writer.live_blocks == len(model.owners)
    for rank in range(SIZES["max_ranks"]):
        assert writer.owned_blocks(rank) == model.owned_blocks(rank)
    for key in range(1, 250):
        for tiers in (1, 2, 4):
            reader.match(packed([key]), tiers)
            assert dict(reader.hits()) == model.match([key], tiers), key


@pytest.mark.parametrize("is_torn", [False, True])
def test_tree_goes_on_under_a_new_writer(rng: SeededRandom, is_torn: bool) -> None:
    memory, model = Memory(), HashTreeModel(SIZES["capacity_blocks"])
    writer, reader = TreeWriter(memory.segment), TreeReader(memory.segment)
    writer.reset()
    for _ in range(12):
        for _ in range(40):
            op = random_op(rng)
            apply(writer, op)
            apply(model, op)
        if is_torn:
            memory.tear()
        writer = TreeWriter(memory.segment)
        assert writer.adopt() == len(model.owners)
        assert memory.version % 2 == 0
        check_equal(writer, reader, model)


def full_slots(memory: Memory) -> list[int]:
    return [i for i in range(memory.n_slots) if memory.slot(i)[:8] != bytes(8)]


def test_half_done_writes_are_undone(rng: SeededRandom) -> None:
    """A key without owner; bits behind a free slot; every stage of the copy that a deletion makes."""
    for _ in range(150):
        memory = Memory()
        writer, reader = TreeWriter(memory.segment), TreeReader(memory.segment)
        writer.reset()
        model = HashTreeModel(SIZES["capacity_blocks"])
        keys = list(range(1, 250))
        for rank in (1, 70):
            op = ("store", rank, rank % 3, rng.sample(keys, 180))
            apply(writer, op)
            apply(model, op)
        before = [memory.slot(i) for i in range(memory.n_slots)]
        victim = rng.choice(sorted(model.owners))
        for rank in (1, 70):
            op = ("remove", rank, rank % 3, [victim])
            apply(writer, op)
            apply(model, op)
        # The deletion changed slots in the order of their chain: take a part of it back, the last one half way.
        changed = [i for i in range(memory.n_slots) if memory.slot(i) != before[i]]
        start = next(i for i in changed if before[i][:8] == victim.to_bytes(8, "little"))
        changed.sort(key=lambda i: (i - start) % memory.n_slots)
        n_done = rng.randrange(len(changed))
        after = memory.slot(changed[n_done])
        n_words = rng.randrange(memory.stride // 8)
        for i in changed[n_done:]:
            memory.put_slot(i, before[i])
        memory.put_slot(changed[n_done], after[: 8 * n_words])
        if not n_done and not n_words:  # nothing was copied yet: the key has lost its owners, and no more
            memory.put_slot(start, before[start][:8] + bytes(memory.stride - 8))
        memory.tear()
        successor = TreeWriter(memory.segment)
        assert successor.adopt() == len(model.owners), rng
        check_equal(successor, reader, model)
        free = [i for i in range(memory.n_slots) if memory.slot(i)[:8] == bytes(8)]
        assert all(memory.slot(i) == bytes(memory.stride) for i in free)


def test_unreachable_keys_are_no_tree_of_ours() -> None:
    memory = Memory()
    writer = TreeWriter(memory.segment)
    writer.reset()
    writer.store(0, 0, packed([1, 2, 3]))
    taken = full_slots(memory)
    lonely = next(i for i in range(memory.n_slots) if not {i - 1, i, i + 1} & set(taken))
    memory.put_slot(lonely, memory.slot(taken[0]))
    memory.put_slot(taken[0], bytes(memory.stride))
    memory.tear()
    successor = TreeWriter(memory.segment)
    assert successor.adopt() == -1
    successor.reset()
    assert successor.live_blocks == 0


@pytest.mark.parametrize("round_", range(6))
def test_killed_writer(rng: SeededRandom, round_: int) -> None:
    """kill -9 at any moment: the successor applies again what was not noted as done, and has the model's tree."""
    memory, progress = Memory(), mmap.mmap(-1, 8)
    ops = [random_op(rng) for _ in range(3000)]
    pid = os.fork()
    if pid == 0:
        try:
            writer = TreeWriter(memory.segment)
            writer.reset()
            while True:
                for n, op in enumerate(ops):
                    apply(writer, op)
                    progress[:8] = (n + 1).to_bytes(8, "little")
                writer.reset()
                progress[:8] = bytes(8)
        finally:
            os._exit(1)
    try:
        while progress[:8] == bytes(8):
            time.sleep(0.001)
        time.sleep(rng.random() * 0.01)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    done = int.from_bytes(progress[:8], "little")
    model = HashTreeModel(SIZES["capacity_blocks"])
    writer, reader = TreeWriter(memory.segment), TreeReader(memory.segment)
    assert writer.adopt() >= 0
    if 0 < done < len(ops):
        for op in ops:
            apply(model, op)
        for op in ops[done:]:
            apply(writer, op)
        check_equal(writer, reader, model)
