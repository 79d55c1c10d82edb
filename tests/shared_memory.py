"""What the tests of the shared-memory room share: segments, their raw words and tree slots, and forked processes that use them."""

import array
import contextlib
import json
import mmap
import os
import signal
import struct
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from descriptors import is_readable

from sglfast import shm
from sglfast._segment import Segment
from sglfast.boot import die_with_parent

# Byte offsets in sf_header_t, written down here once more: a test must not ask the code what it should say.
HEADER = {
    "magic": 0, "layout_major": 8, "layout_minor": 12, "total_bytes": 16, "max_workers": 24, "max_ranks": 32, "max_shards": 40,
    "tree_slots": 48, "tree_stride": 56, "tree_capacity_blocks": 64, "process_offset": 72, "workers_offset": 80,
    "ranks_offset": 88, "columns_offset": 96, "column_stride": 104, "tree_offset": 112, "slots_offset": 120,
    "prediction_blocks": 128, "prediction_sets": 136, "prediction_set_bytes": 144, "predictions_offset": 152, "rings_offset": 160,
    "ring_stride": 168, "sets_offset": 176, "state": 192,
}  # fmt: skip


@contextlib.contextmanager
def shared_segment(
    *, max_workers: int = 4, max_ranks: int = 64, max_shards: int = 2, capacity_blocks: int = 1000, prediction_blocks: int = 0
) -> Iterator[tuple[int, Segment]]:
    """A new segment and its file descriptor, which is closed at the end."""
    fd, segment = shm.create(
        max_workers=max_workers,
        max_ranks=max_ranks,
        max_shards=max_shards,
        capacity_blocks=capacity_blocks,
        prediction_blocks=prediction_blocks,
    )
    try:
        yield fd, segment
    finally:
        os.close(fd)


class Words:
    """The segment of a descriptor as raw memory: single words by byte offset, header words by name."""

    def __init__(self, fd: int) -> None:
        self.memory = mmap.mmap(fd, os.fstat(fd).st_size)

    def get(self, offset: int) -> int:
        return int(struct.unpack_from("<Q", self.memory, offset)[0])

    def put(self, offset: int, value: int) -> None:
        struct.pack_into("<Q", self.memory, offset, value)

    def header(self, name: str) -> int:
        return self.get(HEADER[name])


@dataclass
class Child:
    """A forked process; `result` waits for what its function returned."""

    pid: int
    answer: int
    is_gone: bool = False

    def result(self, timeout_s: float = 30.0) -> Any:
        deadline, text = time.monotonic() + timeout_s, b""
        while True:
            if not is_readable(self.answer, max(0.0, deadline - time.monotonic())):
                raise TimeoutError(f"process {self.pid} gave no answer within {timeout_s} s")
            piece = os.read(self.answer, 1 << 16)
            if not piece:
                break
            text += piece
        assert text, f"process {self.pid} died without an answer; its traceback, if any, is on standard error"
        return json.loads(text)

    def kill(self) -> int:
        """Kill -9 at once; returns the wait status."""
        os.kill(self.pid, signal.SIGKILL)
        self.is_gone = True  # from here on the number may be another process's
        return os.waitpid(self.pid, 0)[1]


@contextlib.contextmanager
def forked(work: Callable[[], Any]) -> Iterator[Child]:
    """Run `work` in a forked process, killed at the end of the block if it still lives; its JSON-able result comes back by pipe."""
    parent = os.getpid()
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        # Python 3.12 warns when another thread lives: the child runs our function only, and leaves by _exit.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(reading)
            die_with_parent(parent)
            os.write(writing, json.dumps(work()).encode())
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writing)
    child = Child(pid, reading)
    try:
        yield child
    finally:
        os.close(reading)
        if not child.is_gone:
            child.kill()


# ---- the hash tree's slots ----

U64 = 2**64
# The multiplier of sf_home, undone: keys made with it fall into any slot one wants.
UNHASH = pow(0xD6E8FEB86659FD93, -1, U64)
KEY_ZERO = 0x9E3779B97F4A7C15  # what a key 0 is stored as


def packed(keys: list[int]) -> bytes:
    return array.array("Q", keys).tobytes()


def key_at_home(slot: int, number: int, n_slots: int) -> int:
    """The `number`-th key whose probe chain begins at `slot`; a negative slot counts from the table's end."""
    hashed = -(-(slot % n_slots * U64) // n_slots) + number
    return hashed * UNHASH % U64


def home(key: int, n_slots: int) -> int:
    return key * 0xD6E8FEB86659FD93 % U64 * n_slots // U64


class Table:
    """The slots as they lie in memory."""

    def __init__(self, fd: int) -> None:
        self.words = Words(fd)
        self.n_slots = self.words.header("tree_slots")
        self.stride = self.words.header("tree_stride")
        self.offset = self.words.header("slots_offset")
        self.max_ranks = self.words.header("max_ranks")

    def slots(self) -> list[tuple[int, tuple[int, int, int]]]:
        """(key, one owner bitset per tier) of each slot; a key of 0 means empty."""
        n_words, bits = self.stride // 8, self.max_ranks // 64
        words = array.array("Q", self.words.memory[self.offset : self.offset + self.n_slots * self.stride])
        rows = []
        for start in range(0, len(words), n_words):
            sets = [words[start + 1 + tier * bits : start + 1 + (tier + 1) * bits] for tier in range(3)]
            device, host, disk = (int.from_bytes(words_of_tier.tobytes(), "little") for words_of_tier in sets)
            rows.append((words[start], (device, host, disk)))
        return rows

    def audit(self, owners: dict[int, set[tuple[int, int]]]) -> None:
        """The table holds exactly `owners`, each key where a probe finds it, and nothing else: no tombstones, no litter."""
        rows = self.slots()
        found = {}
        for slot, (key, sets) in enumerate(rows):
            if key == 0:
                assert sets == (0, 0, 0), f"slot {slot} is empty and has owners"
                continue
            assert key not in found, f"key {key} is there twice"
            found[key] = {(rank, tier) for tier in range(3) for rank in range(self.max_ranks) if sets[tier] >> rank & 1}
            probe = home(key, self.n_slots)
            while probe != slot:
                assert rows[probe][0], f"key {key} in slot {slot} is behind the hole {probe}"
                probe = (probe + 1) % self.n_slots
        assert found == owners
