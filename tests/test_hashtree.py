"""sglfast._hashtree against its model: every call, collisions and wrap-around, eviction, compaction, bad input."""

import array
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from model import HashTreeModel
from shared_memory import Table, forked, home, key_at_home, packed, shared_segment

from sglfast import shm
from sglfast._hashtree import ANY_TIER, DEVICE, DISK, HOST, TreeReader, TreeWriter

# ---- probe chains ----


@pytest.mark.parametrize("first", [-1, -3, 0, 17])
def test_removals_shift_probe_chains_back(first: int) -> None:
    """Five keys of three homes, stored and removed in every order: the table is right after each removal, at its end too."""
    with shared_segment(capacity_blocks=10) as (fd, segment):
        writer, reader, table = TreeWriter(segment), TreeReader(shm.attach(fd)), Table(fd)
        keys = [key_at_home(first + offset, number, table.n_slots) for number, offset in enumerate((0, 0, 1, 0, 2), 1)]
        assert [home(key, table.n_slots) for key in keys] == [(first + offset) % table.n_slots for offset in (0, 0, 1, 0, 2)]
        orders = list(itertools.permutations(range(5)))
        for turn, stored in enumerate(orders):
            model = HashTreeModel(10)
            for position in stored:
                writer.store(position, position % 3, packed([keys[position]]))
                model.store(position, position % 3, [keys[position]])
            table.audit(model.owners)
            for position in orders[turn * 77 % len(orders)]:
                assert writer.remove(position, ANY_TIER, packed([keys[position]])) == 1
                model.remove(position, 7, [keys[position]])
                table.audit(model.owners)
                assert [reader.match(packed([key])) for key in keys] == [int(key in model.owners) for key in keys]
        assert writer.live_blocks == 0


def test_a_table_as_full_as_it_gets_with_one_chain() -> None:
    """All keys at one home: one chain of `capacity` slots around the table's end, and eviction from its front."""
    with shared_segment(capacity_blocks=200) as (fd, segment):
        writer, reader, table, model = TreeWriter(segment), TreeReader(shm.attach(fd)), Table(fd), HashTreeModel(200)
        keys = [key_at_home(-100, number, table.n_slots) for number in range(500)]
        for start in range(0, 500, 50):
            assert writer.store(9, 0, packed(keys[start : start + 50])) == model.store(9, 0, keys[start : start + 50])
            table.audit(model.owners)
        assert reader.match(packed(keys[300:])) == 200
        assert reader.match(packed(keys[299:])) == 0


def test_key_zero_is_a_key() -> None:
    with shared_segment() as (fd, segment):
        writer, reader = TreeWriter(segment), TreeReader(shm.attach(fd))
        assert reader.match(packed([0])) == 0
        assert writer.store(5, 0, packed([0, 1])) == 2
        assert reader.match(packed([0, 1])) == 2
        assert writer.store(5, 1, packed([0])) == 0
        assert writer.remove(5, ANY_TIER, packed([0])) == 1
        assert (writer.live_blocks, reader.match(packed([0, 1])), reader.match(packed([1]))) == (1, 0, 1)


# ---- tiers, overlap, totals ----


def test_a_block_is_owned_while_any_tier_holds_it() -> None:
    with shared_segment() as (fd, segment):
        writer, reader = TreeWriter(segment), TreeReader(shm.attach(fd))
        keys = packed([1, 2, 3])
        assert [writer.store(4, tier, keys) for tier in range(3)] == [3, 0, 0]
        assert [reader.match(keys, tiers) for tiers in range(8)] == [0, 3, 3, 3, 3, 3, 3, 3]
        assert writer.remove(4, DEVICE | DISK, keys) == 0
        assert [reader.match(keys, tiers) for tiers in range(8)] == [0, 0, 3, 3, 0, 0, 3, 3]
        assert writer.remove(4, DEVICE | DISK, keys) == 0
        assert writer.owned_blocks(4) == 3
        assert writer.remove(4, HOST, keys[:16]) == 2
        assert (writer.owned_blocks(4), writer.live_blocks) == (1, 1)
        assert reader.stats()["stored_total"] == 3
        assert reader.stats()["removed_total"] == 2


def test_overlap_ends_at_the_first_hole() -> None:
    with shared_segment(max_ranks=128) as (fd, segment):
        writer, reader = TreeWriter(segment), TreeReader(shm.attach(fd))
        prompt = list(range(1, 101))
        for rank, held in ((0, prompt), (1, prompt[:7]), (64, prompt[:50] + prompt[51:]), (127, prompt[1:]), (2, prompt[:1])):
            writer.store(rank, 0, packed(held))
        assert reader.match(packed(prompt)) == 100
        assert sorted(reader.hits()) == [(0, 100), (1, 7), (2, 1), (64, 50)]
        assert (reader.overlap(64), reader.overlap(127), reader.overlap(3)) == (50, 0, 0)
        assert reader.match(packed(prompt[1:])) == 99
        assert sorted(reader.hits()) == [(0, 99), (1, 6), (64, 49), (127, 99)]
        assert reader.match(b"") == 0
        assert reader.hits() == []


@pytest.mark.parametrize("n_keys", [0, 1, 31, 32, 33, 63, 64, 65, 96, 1000])
def test_calls_of_any_length(n_keys: int) -> None:
    """The writer opens the tree to readers within a call: every length around its chunks comes out whole."""
    with shared_segment() as (fd, segment):
        writer, reader, keys = TreeWriter(segment), TreeReader(shm.attach(fd)), packed(list(range(1, n_keys + 1)))
        assert writer.store(3, 0, keys) == n_keys
        assert (reader.match(keys), writer.live_blocks, writer.owned_blocks(3)) == (n_keys, n_keys, n_keys)
        assert writer.remove(3, 7, keys) == n_keys
        assert (reader.match(keys), writer.live_blocks, writer.owned_blocks(3)) == (0, 0, 0)
        assert reader.torn_total == 0


def test_repeats_within_a_call_count_once() -> None:
    with shared_segment() as (fd, segment):
        writer, reader = TreeWriter(segment), TreeReader(shm.attach(fd))
        assert writer.store(0, 0, packed([8, 9, 8, 8, 9])) == 2
        assert reader.match(packed([8, 8, 9, 9, 8])) == 5
        assert writer.remove(0, 7, packed([9, 9, 8, 9])) == 2
        assert writer.live_blocks == 0


# ---- eviction and compaction ----


def test_the_oldest_life_is_evicted_first() -> None:
    with shared_segment(capacity_blocks=3) as (fd, segment):
        writer, reader = TreeWriter(segment), TreeReader(shm.attach(fd))

        def there() -> list[int]:
            return [key for key in range(1, 7) if reader.match(packed([key]))]

        writer.store(0, 0, packed([1, 2, 3]))
        writer.store(1, 0, packed([1]))  # another owner does not make it younger ...
        writer.store(0, 0, packed([4]))
        assert there() == [2, 3, 4]
        writer.remove(0, 7, packed([2]))
        writer.store(0, 0, packed([2]))  # ... another life does
        writer.store(0, 0, packed([5]))
        assert there() == [2, 4, 5]
        writer.store(0, 0, packed([6]))
        assert there() == [2, 5, 6]
        assert [writer.owned_blocks(rank) for rank in (0, 1)] == [3, 0]
        assert reader.stats()["evicted_total"] == 3


def grown_bytes(setup: str, cycle: str) -> int:
    """Growth of a fresh process's private memory over a million cycles, after the first hundred thousand."""
    code = f"""
import array, mmap, re
from sglfast._segment import Segment, segment_bytes
from sglfast._hashtree import TreeWriter
SIZES = dict(max_workers=1, max_ranks=64, max_shards=1, capacity_blocks=1000)
segment = Segment.format(mmap.mmap(-1, segment_bytes(**SIZES)), **SIZES)
writer = TreeWriter(segment)
def private():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
def packed(*keys):
    return array.array("Q", keys).tobytes()
store, remove = writer.store, writer.remove
{setup}
def cycles(first, last):
    for turn in range(first, last):
        {cycle}
cycles(1, 100_000)
before = private()
cycles(100_000, 1_100_000)
print(private() - before)
"""
    root = Path(shm.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif("ASAN_OPTIONS" in os.environ, reason="AddressSanitizer keeps freed memory")
@pytest.mark.parametrize(
    ("setup", "cycle"),
    [
        ("key = packed(5); store(0, 0, packed(*range(10, 500)))", "store(1, 0, key); remove(1, 7, key)"),
        ("key = packed(5); store(0, 0, key)", "store(1, 0, key); remove(1, 7, key)"),  # only the rank's log grows
        ("keys = [packed(n) for n in range(1, 5000)]", "store(turn & 1, 0, keys[turn % 4999])"),  # full: eviction
        ("keys = [packed(n) for n in range(1, 3000)]", "key = keys[turn % 2999]; store(0, 0, key); remove(0, 7, key)"),
        (
            "keys = [packed(n) for n in range(1, 301)]; store(0, 0, packed(*range(1, 301)))",
            "key = keys[turn % 300]; remove(0, 7, key); store(0, 0, key)",
        ),
    ],
    ids=["same key", "shared key", "eviction", "changing keys", "held keys"],
)
def test_the_writer_s_memory_is_bounded(setup: str, cycle: str) -> None:
    """A log that only grew would take 8 MB."""
    assert grown_bytes(setup, cycle) < 1 << 20


# ---- reset ----


def test_reset_empties_what_any_writer_left() -> None:
    with shared_segment() as (fd, segment):
        reader, table, keys = TreeReader(shm.attach(fd)), Table(fd), packed([1, 2, 3])
        for generation in range(1, 4):
            writer = TreeWriter(segment)
            if generation == 1:
                writer.store(1, 0, keys)  # before any reset: a writer that forgot it
            writer.reset()
            table.audit({})
            assert (reader.match(keys), writer.live_blocks, writer.owned_blocks(1)) == (0, 0, 0)
            assert reader.stats()["generation"] == generation
            assert writer.store(1, 0, keys) == 3
            assert reader.match(keys) == 3


def test_reset_forgets_the_writer_s_own_notes() -> None:
    with shared_segment(capacity_blocks=3) as (fd, segment):
        writer, reader = TreeWriter(segment), TreeReader(shm.attach(fd))
        writer.store(1, 0, packed([1, 2, 3]))
        writer.reset()
        assert writer.clear(1) == 0
        writer.store(2, 0, packed([3, 2, 1]))
        writer.store(2, 0, packed([4]))
        assert reader.match(packed([3])) == 0, "the order begins anew"
        assert [writer.owned_blocks(rank) for rank in (1, 2)] == [0, 3]


# ---- bad input ----


def test_bad_input_raises_and_changes_nothing() -> None:
    with shared_segment() as (fd, segment):
        writer, reader, table = TreeWriter(segment), TreeReader(shm.attach(fd)), Table(fd)
        keys = packed([1, 2])
        writer.store(63, 2, keys)
        before = table.slots()
        wrong: list[tuple[Any, type[Exception], str]] = [
            (lambda: writer.store(64, 0, keys), ValueError, r"^rank 64 is outside 0\.\.63$"),
            (lambda: writer.remove(64, 7, keys), ValueError, r"^rank 64 is outside 0\.\.63$"),
            (lambda: writer.clear(1 << 31), ValueError, r"is outside 0\.\.63$"),
            (lambda: writer.owned_blocks(64), ValueError, r"^rank 64 is outside 0\.\.63$"),
            (lambda: writer.store(-1, 0, keys), OverflowError, "negative"),
            (lambda: writer.store(0, 3, keys), ValueError, r"^tier 3 is outside 0\.\.2$"),
            (lambda: writer.store(0, 0, keys[:-1]), ValueError, "^keys must be whole 8-byte words, not 15 bytes$"),
            (lambda: writer.remove(63, 7, keys + b"x"), ValueError, "^keys must be whole 8-byte words, not 17 bytes$"),
            (lambda: reader.match(keys[:1]), ValueError, "^keys must be whole 8-byte words, not 1 bytes$"),
            (lambda: writer.store(0, 0, [1, 2]), TypeError, "bytes-like"),
            (lambda: reader.match("x"), TypeError, "bytes-like"),
            (lambda: reader.match(memoryview(keys)[::2]), BufferError, "contiguous"),
        ]
        for call, kind, text in wrong:
            with pytest.raises(kind, match=text):
                call()
        assert table.slots() == before
        assert reader.match(keys) == 2
        assert (reader.overlap(64), reader.overlap(2**31)) == (0, 0)


def test_keys_may_begin_at_any_address() -> None:
    with shared_segment() as (fd, segment):
        writer, reader = TreeWriter(segment), TreeReader(shm.attach(fd))
        keys = packed(list(range(1, 101)))
        for shift in range(8):
            shifted = memoryview(bytes(shift) + keys)[shift:]
            assert writer.store(0, 0, shifted) == 100
            assert reader.match(shifted) == reader.match(keys) == 100
            assert writer.remove(0, 7, shifted) == 100


def test_keys_may_be_any_flat_buffer() -> None:
    with shared_segment() as (fd, segment):
        writer, reader = TreeWriter(segment), TreeReader(shm.attach(fd))
        writer.store(0, 0, array.array("Q", [1, 2]))
        assert reader.match(bytearray(packed([1, 2]))) == 2


def test_a_forked_child_must_not_write() -> None:
    with shared_segment() as (fd, segment):
        writer, keys = TreeWriter(segment), packed([1, 2])
        writer.store(0, 0, keys)

        def child() -> list[str]:
            refusals = []
            for call in (
                lambda: writer.store(1, 0, keys),
                lambda: writer.remove(0, 7, keys),
                lambda: writer.clear(0),
                lambda: writer.reset(),
            ):
                try:
                    call()
                except RuntimeError as error:
                    refusals.append(str(error))
            return refusals

        with forked(child) as process:
            assert process.result() == ["a TreeWriter belongs to the process that made it: the tree has one writer"] * 4
        reader = TreeReader(shm.attach(fd))
        assert reader.match(keys) == 2
        assert reader.hits() == [(0, 2)]
        assert writer.store(1, 0, keys) == 2
