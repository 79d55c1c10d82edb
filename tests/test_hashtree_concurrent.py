"""The hash tree between processes: what readers see while another process writes at full speed, and after it was killed.

Every workload passes through states that a reader can tell from a mixture of two: a match that is not reported torn must
be one of them. A single call of at most CHUNK keys is one step; a longer one shows its readers every CHUNK keys.
"""

import array
import contextlib
import functools
import mmap
import os
import random
import struct
import time
from collections.abc import Callable, Iterator

import pytest
from model import HashTreeModel
from shared_memory import Child, Table, Words, forked, key_at_home, packed, shared_segment

from sglfast import shm
from sglfast._hashtree import TreeReader, TreeWriter

CHUNK = 32
SECONDS = 1.5
READERS = 2
WHOLE_MATCHES = 1000
# Sanitized code writes so slowly that its readers give up.
IS_SANITIZED = "ASAN_OPTIONS" in os.environ
Hits = dict[int, int]


def watch(fd: int, queries: list[tuple[bytes, Callable[[Hits], bool]]], states: int) -> dict[str, object]:
    """Match the queries in turn, on a busy machine until it has seen enough; counts, and the first match that no state explains."""
    reader = TreeReader(shm.attach(fd))
    start, matches, torn, wrong = time.monotonic(), 0, 0, None
    seen: set[object] = set()
    met: set[int] = set()
    while (passed_s := time.monotonic() - start) < SECONDS or (passed_s < 20 and (len(seen) < states or matches - torn <= WHOLE_MATCHES)):
        for position, (keys, is_legal) in enumerate(queries):
            best = reader.match(keys)
            matches += 1
            if reader.torn_total != torn:
                torn = reader.torn_total
                continue
            hits = dict(reader.hits())
            if (not is_legal(hits) or best != max(hits.values(), default=0)) and wrong is None:
                wrong = f"query {position}: longest {best}, hits {sorted(hits.items())}"
            met.update(hits)
            if any(reader.overlap(rank) != hits.get(rank, 0) for rank in met):
                wrong = f"query {position}: an overlap of another match is left over"
            seen.add((position, tuple(sorted(hits.items()))))
    return {"matches": matches, "torn": torn, "states": len(seen), "wrong": wrong}


@contextlib.contextmanager
def all_of(fd: int, write: Callable[[TreeWriter], None], read: Callable[[], object]) -> Iterator[list[Child]]:
    """A writer process that runs `write` for ever on a tree it has reset, and the readers."""

    def writer() -> None:
        tree = TreeWriter(shm.attach(fd))
        tree.reset()
        while True:
            write(tree)

    with forked(writer), contextlib.ExitStack() as stack:
        yield [stack.enter_context(forked(read)) for _ in range(READERS)]


def check(
    fd: int, write: Callable[[TreeWriter], None], queries: list[tuple[bytes, Callable[[Hits], bool]]], *, torn_share: float, states: int
) -> None:
    """Run writer and readers; every whole match was legal, torn ones were few, and the tree did move meanwhile."""
    with all_of(fd, write, lambda: watch(fd, queries, states)) as readers:
        for reader in readers:
            report = reader.result()
            assert report["wrong"] is None, report
            assert report["matches"] - report["torn"] > WHOLE_MATCHES, report
            assert report["torn"] <= report["matches"] * torn_share or IS_SANITIZED, report
            assert report["states"] >= states, report


def fillers(n_slots: int, around: int, count: int) -> list[int]:
    """Keys whose probe chains run through those of others: storing and removing them moves what lies behind."""
    return [key_at_home(around + number % 3, 10_000 + number, n_slots) for number in range(count)]


# At full speed a reader is torn when the writer loses its processor in the middle of a chunk: on a busy machine often, so
# that only the two tests about torn matches say how many there may be.
FULL_SPEED = 1.0


@pytest.mark.parametrize("max_ranks", [64, 1024])
def test_ranks_come_and_go_one_step_at_a_time(max_ranks: int) -> None:
    """Eight ranks take a chain of one chunk in turn and give it up in turn, one rank keeps it, and neighbours move its slots."""
    with shared_segment(max_ranks=max_ranks, capacity_blocks=300) as (fd, _):
        n_slots = Table(fd).n_slots
        chain = [key_at_home(-2 + number % 4, number + 1, n_slots) for number in range(CHUNK)]
        keys, others = packed(chain), [packed([key]) for key in fillers(n_slots, -3, 24)]
        ranks = [rank * (max_ranks // 8) for rank in range(8)]
        keeper, stranger = max_ranks - 1, max_ranks - 2

        def write(tree: TreeWriter) -> None:
            tree.store(keeper, 0, keys)
            for change, kind in ((tree.store, 0), (tree.remove, 7)):
                for step, rank in enumerate(ranks):
                    change(rank, kind, keys)
                    for other in others[step * 3 : step * 3 + 3]:
                        tree.store(stranger, 0, other)
                    for other in others[step * 3 : step * 3 + 3]:
                        tree.remove(stranger, 7, other)

        legal = [{keeper: CHUNK} | dict.fromkeys(part, CHUNK) for i in range(9) for part in (ranks[:i], ranks[i:])]
        # The keeper holds nothing only before the first store.
        check(fd, write, [(keys, lambda hits: hits in legal or not hits)], torn_share=FULL_SPEED, states=8)


def test_long_calls_show_whole_chunks() -> None:
    """Chains longer than a chunk grow from their root and shrink from their end, by chunks, for one rank after another."""
    with shared_segment(capacity_blocks=1000) as (fd, _):
        length = 200
        n_slots = Table(fd).n_slots
        chain = [key_at_home(number % 50, number + 1, n_slots) for number in range(length)]
        keys, backwards = packed(chain), packed(chain[::-1])

        def write(tree: TreeWriter) -> None:
            for rank in range(3):
                tree.store(rank, 0, keys)
            for rank in range(3):
                tree.remove(rank, 7, backwards)

        grown = [*range(0, length, CHUNK), length]
        shrunk = [length - step for step in grown]

        def is_legal(hits: Hits) -> bool:
            row = [hits.get(rank, 0) for rank in range(3)]
            return any(
                row == [*full * moving, size, *rest * (2 - moving)]
                for moving in range(3)
                for full, rest, sizes in (([length], [0], grown), ([0], [length], shrunk))
                for size in sizes
            )

        check(fd, write, [(keys, is_legal)], torn_share=FULL_SPEED, states=10)


def test_eviction_takes_roots_first() -> None:
    """A tree far too small for sixteen chains: a chain is whole on its own rank, or its root is gone."""
    with shared_segment(capacity_blocks=6 * CHUNK) as (fd, _):
        n_slots = Table(fd).n_slots
        chains = [
            packed([key_at_home(-5 + number * 7 % 64, 1 + chain * CHUNK + number, n_slots) for number in range(CHUNK)])
            for chain in range(16)
        ]

        def write(tree: TreeWriter) -> None:
            for rank, keys in enumerate(chains):
                tree.store(rank, 0, keys)

        def legal_for(rank: int) -> Callable[[Hits], bool]:
            return lambda hits: hits in ({}, {rank: CHUNK})

        check(fd, write, [(keys, legal_for(rank)) for rank, keys in enumerate(chains)], torn_share=FULL_SPEED, states=24)


def test_clearing_a_large_rank_does_not_shut_readers_out() -> None:
    """Stores and clears of 50,000 blocks, each one call: readers get their turn within it."""
    with shared_segment(capacity_blocks=60_000) as (fd, _):
        blocks = [number * 0x9E3779B97F4A7C15 % 2**64 for number in range(1, 50_001)]
        keys, last = packed(blocks), packed(blocks[-100:])

        def write(tree: TreeWriter) -> None:
            tree.store(0, 0, last)
            tree.store(1, 0, keys)
            tree.clear(1)

        def is_legal(hits: Hits) -> bool:
            # Rank 1 has the last 100 blocks chunk by chunk: the store's last chunks are 50,000 % 32 = 16 and whole ones.
            return not hits or (hits.get(0) == 100 and hits.get(1, 0) in (0, 20, 52, 84, 100) and not set(hits) - {0, 1})

        check(fd, write, [(last, is_legal)], torn_share=0.3, states=2)


def test_torn_matches_are_rare_at_the_pace_of_events() -> None:
    """200,000 blocks a second in events of 64: what a large pool publishes."""
    with shared_segment(capacity_blocks=20_000) as (fd, _):
        blocks = [number * 0x9E3779B97F4A7C15 % 2**64 for number in range(1, 10_001)]
        events = [packed(blocks[start : start + 64]) for start in range(0, 10_000, 64)]
        steady = packed(blocks[:10] + list(range(1, 119)))

        def write(tree: TreeWriter) -> None:
            tree.store(5, 0, steady)
            for change, kind in ((tree.store, 0), (tree.remove, 7)):
                for keys in events:
                    change(7, kind, keys)
                    time.sleep(64 / 200_000)

        def is_legal(hits: Hits) -> bool:
            return not hits or hits in ({5: 128}, {5: 128, 7: 10})

        check(fd, write, [(steady, is_legal)], torn_share=0.05, states=2)


# ---- the writer is killed ----


def test_killed_writers_leave_readers_alive_and_the_next_one_repairs(rng: random.Random) -> None:
    """kill -9 at forty random points: readers go on without a pause, a new writer's reset makes the tree right again."""
    kills = 40
    with shared_segment(capacity_blocks=2000, max_ranks=128) as (fd, segment), contextlib.ExitStack() as stack:
        table, reader, model = Table(fd), TreeReader(shm.attach(fd)), HashTreeModel(2000)
        words = Words(fd)
        version_at = words.header("tree_offset")
        chain = [key_at_home(-20 + number % 30, number + 1, table.n_slots) for number in range(500)]
        keys, backwards = packed(chain), packed(chain[::-1])
        more = array.array("Q", [rng.getrandbits(64) for _ in range(3000)]).tobytes()  # beyond the capacity
        progress = mmap.mmap(-1, 4096)

        def write() -> None:
            tree = TreeWriter(shm.attach(fd))
            tree.reset()
            while True:
                for rank in range(0, 128, 17):
                    tree.store(rank, rank % 3, keys)
                tree.store(1, 0, more)
                for rank in range(0, 128, 17):
                    tree.remove(rank, 7, backwards)
                tree.clear(1)

        def read(number: int) -> None:
            mine = TreeReader(shm.attach(fd))
            for count in range(1, 1 << 60):
                best = mine.match(keys)
                assert best <= 500
                assert all(rank < 128 and 0 < overlap <= best for rank, overlap in mine.hits())
                struct.pack_into("<Q", progress, number * 8, count)

        def counts() -> list[int]:
            return list(struct.unpack_from(f"<{READERS}Q", progress))

        def wait_for_progress() -> None:
            before, deadline = counts(), time.monotonic() + 20
            while any(now < then + 5 for now, then in zip(counts(), before, strict=True)):
                assert time.monotonic() < deadline, f"a reader hangs or has crashed: {before} -> {counts()}"
                time.sleep(0.001)

        for number in range(READERS):
            stack.enter_context(forked(functools.partial(read, number)))
        left_odd = left_filled = 0
        for _ in range(kills):
            with forked(write) as writer:
                generation, deadline = words.get(version_at), time.monotonic() + 20
                while words.get(version_at) < generation + 10:
                    assert time.monotonic() < deadline, "the writer does not write"
                    time.sleep(0.0005)
                time.sleep(rng.random() * 0.01)
                writer.kill()
            wait_for_progress()
            left_odd += words.get(version_at) & 1
            left_filled += any(key for key, _ in table.slots())
            torn = reader.torn_total
            reader.match(keys)
            assert reader.torn_total - torn == words.get(version_at) & 1, "torn is what a dead writer's half step is"
            if rng.random() < 0.3:
                tree = TreeWriter(segment)
                tree.reset()
                table.audit({})
                assert (reader.match(keys), tree.live_blocks) == (0, 0)
                tree.store(100, 1, keys)
                tree.store(3, 0, backwards[: 8 * 490])
                model.reset()
                model.store(100, 1, chain)
                model.store(3, 0, chain[:9:-1])
                table.audit(model.owners)
                assert reader.match(keys) == 500
                assert dict(reader.hits()) == {100: 500}
                assert reader.torn_total - torn <= 1
                del tree
        assert left_odd >= 1, "no kill hit the middle of a write: the test shows nothing"
        assert left_filled >= kills // 2
        assert os.fstat(fd).st_size == segment.total_bytes
