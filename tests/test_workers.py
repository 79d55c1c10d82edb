"""sglfast._workers: rows, limits, version and generation, and readers of other processes while control writes."""

import contextlib
import os
import time
from typing import Any

import pytest
from shared_memory import Words, forked, shared_segment

from sglfast import shm
from sglfast._workers import BLOB_BYTES, DRAINING, FLAG_BIGRAM, FREE, JOINING, READY, UNHEALTHY, WorkerTable

ROW: dict[str, Any] = {
    "state": READY, "rank_base": 3, "dp_size": 2, "block_size": 64, "flags": FLAG_BIGRAM, "blob": b"record", "is_new": True,
}  # fmt: skip


def test_the_numbers_are_frozen() -> None:
    """Other processes, metrics and tests know them by value."""
    assert (FREE, JOINING, READY, UNHEALTHY, DRAINING) == (0, 1, 2, 3, 4)
    assert (FLAG_BIGRAM, BLOB_BYTES) == (1, 4096 - 64)


def test_a_row_is_read_as_it_was_put() -> None:
    with shared_segment(max_workers=3) as (fd, segment):
        control, other = WorkerTable(segment), WorkerTable(shm.attach(fd))
        assert (other.max_workers, other.version()) == (3, 0)
        assert [other.read(idx) for idx in range(3)] == [None] * 3
        control.put(1, **ROW)
        assert other.read(1) == (1, READY, 3, 2, 64, FLAG_BIGRAM, b"record")
        assert [other.read(idx) for idx in (0, 2)] == [None, None], "neighbours keep their own"
        control.put(1, **{**ROW, "blob": b"", "is_new": False, "block_size": 0, "flags": 0})
        assert other.read(1) == (1, READY, 3, 2, 0, 0, b"")
        control.put(2, **{**ROW, "blob": bytes(range(252)) * 16, "rank_base": 0, "dp_size": 64})
        assert other.read(2) == (1, READY, 0, 64, 64, FLAG_BIGRAM, bytes(range(252)) * 16)


def test_every_change_moves_the_version_and_a_new_worker_the_generation() -> None:
    with shared_segment() as (fd, segment):
        control, other = WorkerTable(segment), WorkerTable(shm.attach(fd))
        versions, generations = [other.version()], []
        for step in range(8):
            if step % 4 == 3:
                control.set_state(0, UNHEALTHY)
            else:
                control.put(0, **{**ROW, "is_new": step % 4 == 0})
            versions.append(other.version())
            row = other.read(0)
            assert row is not None
            generations.append(row[0])
        assert versions == list(range(9))
        assert generations == [1, 1, 1, 1, 2, 2, 2, 2]
        assert segment.workers_version == other.version()


def test_states() -> None:
    with shared_segment() as (fd, segment):
        control, other = WorkerTable(segment), WorkerTable(shm.attach(fd))
        control.put(0, **ROW)
        for state in (JOINING, READY, UNHEALTHY, DRAINING):
            control.set_state(0, state)
            row = other.read(0)
            assert row is not None
            assert row == (1, state, 3, 2, 64, FLAG_BIGRAM, b"record")
            assert other.state(0) == state
        control.set_state(0, FREE)
        assert other.read(0) is None
        assert other.state(0) == FREE
        control.put(0, **ROW)
        assert other.read(0) == (2, READY, 3, 2, 64, FLAG_BIGRAM, b"record"), "the generation outlives the worker"


def test_a_removed_worker_leaves_its_generation_and_nothing_else() -> None:
    with shared_segment() as (fd, segment):
        control, other = WorkerTable(segment), WorkerTable(shm.attach(fd))
        with pytest.raises(ValueError, match="worker slot 1 was never written"):
            control.remove(1)
        control.put(1, **{**ROW, "blob": b"the key of the worker" * 50})
        control.put(1, **{**ROW, "blob": b"short", "is_new": False})
        assert b"the key" not in Words(fd).memory[:], "a longer record was written over"
        control.put(1, **{**ROW, "blob": b"the key of another", "is_new": False})
        version = other.version()
        control.remove(1)
        assert (other.read(1), other.state(1), other.version()) == (None, FREE, version + 1)
        assert b"the key" not in Words(fd).memory[:]
        assert other.generation(1) == 1
        control.put(1, **ROW)
        assert (other.generation(1), other.generation(0)) == (2, 0)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"blob": bytes(BLOB_BYTES + 1)}, r"^worker record of 4033 bytes is larger than 4032 bytes$"),
        ({"rank_base": -1}, r"^ranks -1\.\.0 are outside 0\.\.63$"),
        ({"rank_base": 63}, r"^ranks 63\.\.64 are outside 0\.\.63$"),
        ({"dp_size": 62}, r"^ranks 3\.\.64 are outside 0\.\.63$"),
        ({"dp_size": -1}, r"^ranks 3\.\.1 are outside 0\.\.63$"),
        ({"dp_size": 2**31 - 1}, r"are outside 0\.\.63$"),
        ({"state": 5}, r"^worker state must be 0\.\.4, not 5$"),
        ({"state": -1}, r"^worker state must be 0\.\.4, not -1$"),
        ({"block_size": -64}, r"^block_size -64 and flags 1 must not be negative$"),
        ({"flags": -1}, r"^block_size 64 and flags -1 must not be negative$"),
    ],
)
def test_values_out_of_range_raise_and_write_nothing(change: dict[str, Any], text: str) -> None:
    with shared_segment() as (fd, segment):
        control = WorkerTable(segment)
        control.put(1, **ROW)
        before = Words(fd).memory[:]
        with pytest.raises(ValueError, match=text):
            control.put(1, **{**ROW, **change})
        if "state" in change:
            with pytest.raises(ValueError, match=text):
                control.set_state(1, change["state"])
        assert Words(fd).memory[:] == before


def test_the_largest_record_fits() -> None:
    with shared_segment() as (fd, segment):
        control, blob = WorkerTable(segment), os.urandom(BLOB_BYTES)
        for idx in (0, 1):
            control.put(idx, **{**ROW, "blob": blob})
        row = WorkerTable(shm.attach(fd)).read(0)
        assert row is not None
        assert row[6] == blob


@pytest.mark.parametrize("worker_idx", [-1, 4, 10**6])
def test_slots_outside_raise_and_write_nothing(worker_idx: int) -> None:
    with shared_segment(max_workers=4) as (fd, segment):
        table = WorkerTable(segment)
        before = Words(fd).memory[:]
        for call in (
            lambda: table.put(worker_idx, **ROW),
            lambda: table.set_state(worker_idx, READY),
            lambda: table.state(worker_idx),
            lambda: table.remove(worker_idx),
            lambda: table.generation(worker_idx),
            lambda: table.read(worker_idx),
        ):
            with pytest.raises(IndexError, match=rf"^worker {worker_idx} is outside 0\.\.3$"):
                call()
        assert Words(fd).memory[:] == before


def test_a_slot_that_was_never_written_has_no_state_to_change() -> None:
    with shared_segment() as (_, segment):
        table = WorkerTable(segment)
        with pytest.raises(ValueError, match=r"^worker slot 2 was never written: put a worker there first$"):
            table.set_state(2, READY)
        assert (table.version(), table.read(2)) == (0, None)


# ---- between processes ----


def numbered_row(number: int) -> dict[str, Any]:
    """A row of which every value tells which it is."""
    return {
        "state": JOINING + number % 4,
        "rank_base": number % 50,
        "dp_size": number % 13,
        "block_size": number,
        "flags": number % 2,
        "blob": bytes([number % 251]) * (number * 37 % (BLOB_BYTES + 1)),
        "is_new": True,
    }


def test_readers_never_see_a_half_written_row() -> None:
    """One process rewrites a slot at full speed; what two others read is always one whole row, and newer each time."""
    with shared_segment() as (fd, segment):
        first = numbered_row(1)
        WorkerTable(segment).put(2, **first)

        def write() -> None:
            table = WorkerTable(shm.attach(fd))
            for number in range(2, 1 << 30):
                table.put(2, **numbered_row(number))

        def read() -> dict[str, object]:
            table, reads, last, last_version = WorkerTable(shm.attach(fd)), 0, 0, 0
            numbers: set[int] = set()
            start = time.monotonic()
            # On a busy machine: until it has seen enough.
            while (passed_s := time.monotonic() - start) < 1.5 or (len(numbers) < 20 and passed_s < 20):
                version = table.version()
                row = table.read(2)
                assert row is not None
                generation, state, rank_base, dp_size, block_size, flags, blob = row
                expected = numbered_row(block_size)
                assert (state, rank_base, dp_size, flags) == tuple(expected[name] for name in ("state", "rank_base", "dp_size", "flags")), (
                    row[:6]
                )
                assert blob == expected["blob"], f"row {block_size}: a mixture of two blobs"
                assert generation == block_size, "each row was a new worker"
                assert block_size >= last
                assert version >= last_version
                assert block_size >= version, "a row is at least as new as the version that was read before it"
                last, last_version, reads = block_size, version, reads + 1
                numbers.add(block_size)
            return {"reads": reads, "rows": len(numbers)}

        with forked(write), contextlib.ExitStack() as stack:
            for reader in [stack.enter_context(forked(read)) for _ in range(2)]:
                report = reader.result()
                assert report["rows"] >= 20, report


def test_a_reader_waits_for_a_writer_that_lost_its_processor() -> None:
    """An odd sequence word for 30 ms, as a preempted writer leaves it: the reader comes back with the row."""
    with shared_segment() as (fd, segment):
        control = WorkerTable(segment)
        control.put(0, **ROW)
        words = Words(fd)
        seq_at = words.header("workers_offset")
        words.put(seq_at, words.get(seq_at) + 1)

        def finish_later() -> None:
            mine = Words(fd)
            time.sleep(0.03)
            mine.put(seq_at, mine.get(seq_at) + 1)

        with forked(finish_later) as writer:
            assert control.read(0) == (1, READY, 3, 2, 64, FLAG_BIGRAM, b"record")
            writer.result()


def test_a_writer_that_died_inside_a_slot_is_reported_and_the_next_one_repairs() -> None:
    with shared_segment() as (fd, segment):
        control = WorkerTable(segment)
        for idx in (0, 1):
            control.put(idx, **ROW)
        words = Words(fd)
        seq_at = words.header("workers_offset")
        words.put(seq_at, words.get(seq_at) + 1)
        with pytest.raises(RuntimeError, match=r"^worker slot 0 is being written for ever: its writer died$"):
            control.read(0)
        assert control.read(1) is not None
        control.put(0, **{**ROW, "blob": b"again"})
        assert control.read(0) == (2, READY, 3, 2, 64, FLAG_BIGRAM, b"again")
        assert words.get(seq_at) % 2 == 0


def test_killed_writers_never_leave_a_row_that_lies() -> None:
    """kill -9 in the middle of rewriting: the row is whole, or it is reported; another process can write it again."""
    with shared_segment() as (fd, segment):
        table = WorkerTable(segment)

        def write() -> None:
            mine = WorkerTable(shm.attach(fd))
            for number in range(1, 1 << 30):
                mine.put(0, **numbered_row(number))

        for turn in range(12):
            before, deadline = table.version(), time.monotonic() + 20
            with forked(write) as writer:
                while table.version() < before + 20:
                    assert time.monotonic() < deadline, "the writer does not write"
                time.sleep(turn * 0.0007)
                writer.kill()
            with contextlib.suppress(RuntimeError):
                row = table.read(0)
                assert row is not None
                assert row[6] == numbered_row(row[4])["blob"]
            table.put(0, **{**ROW, "blob": bytes([turn])})
            row = table.read(0)
            assert row is not None
            assert row[1:] == (READY, 3, 2, 64, FLAG_BIGRAM, bytes([turn]))
