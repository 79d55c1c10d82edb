"""sglfast._segment: the layout of shared memory, what attach refuses, process slots and run-time state."""

import json
import mmap
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shared_memory import HEADER, Words, forked, shared_segment

from sglfast import _segment, shm
from sglfast._hashtree import TreeReader, TreeWriter
from sglfast._segment import Segment, layout, segment_bytes
from sglfast._workers import WorkerTable
from sglfast.errors import ShmLayoutError

SIZES = {"max_workers": 4, "max_ranks": 64, "max_shards": 2, "capacity_blocks": 1000}
LIMITS = {"max_workers": 65536, "max_ranks": 1024, "max_shards": 1024, "capacity_blocks": 1 << 31, "prediction_blocks": 1 << 28}


def round_up(value: int, unit: int = 4096) -> int:
    return -(-value // unit) * unit


def plan(max_workers: int, max_ranks: int, max_shards: int, capacity_blocks: int, prediction_blocks: int = 0) -> dict[str, int]:
    """The header of a segment of these sizes: the drawing at the top of cext/sf_shm.h as arithmetic."""
    header = dict.fromkeys(HEADER, 0)
    del header["state"], header["layout_minor"]
    stride = 8 + 3 * max_ranks // 8
    header |= {
        "magic": int.from_bytes(b"SGLFAST1", "little"),
        "layout_major": 5,
        "max_workers": max_workers,
        "max_ranks": max_ranks,
        "max_shards": max_shards,
        "tree_slots": capacity_blocks + capacity_blocks // 3 + 64,
        "tree_stride": stride if stride <= 32 else round_up(stride, 64),
        "tree_capacity_blocks": capacity_blocks,
        "process_offset": 4096,
    }
    header["workers_offset"] = 4096 + round_up((1 + max_shards) * 64)
    header["ranks_offset"] = header["workers_offset"] + max_workers * 4096
    header["columns_offset"] = header["ranks_offset"] + round_up(max_ranks * 256) + round_up(max_workers * 8)
    header["column_stride"] = round_up(4096 + max_workers * 256 + max_ranks * 16)
    header["tree_offset"] = header["columns_offset"] + (max_shards + 1) * header["column_stride"]
    header["slots_offset"] = header["tree_offset"] + 4096
    header["total_bytes"] = round_up(header["slots_offset"] + header["tree_slots"] * header["tree_stride"])
    if prediction_blocks:
        header["prediction_blocks"] = prediction_blocks
        header["prediction_sets"] = -(-prediction_blocks // 8)
        header["prediction_set_bytes"] = 8 * (8 + 8 + 2 * max_ranks // 8)
        header["predictions_offset"] = header["total_bytes"]
        header["rings_offset"] = header["total_bytes"] + 4096
        header["ring_stride"] = 4096 + 16384 * 8
        header["sets_offset"] = header["rings_offset"] + max_shards * header["ring_stride"]
        header["total_bytes"] = round_up(header["sets_offset"] + header["prediction_sets"] * header["prediction_set_bytes"])
    return header


def blank(n_bytes: int) -> mmap.mmap:
    return mmap.mmap(-1, n_bytes)


def formatted() -> mmap.mmap:
    memory = blank(segment_bytes(**SIZES))
    Segment.format(memory, **SIZES)
    return memory


# ---- layout ----


def test_layout_is_the_golden_one(golden: Path) -> None:
    """Whoever changes the layout changes the golden file too, and raises SF_LAYOUT_MAJOR."""
    assert layout() == json.loads((golden / "layout.json").read_text())
    assert layout()["major"] == _segment.LAYOUT_MAJOR


sizes = st.fixed_dictionaries(
    {
        "max_workers": st.integers(1, 65536),
        "max_ranks": st.integers(1, 16).map(lambda words: words * 64),
        "max_shards": st.integers(1, 1024),
        "capacity_blocks": st.integers(1, 1 << 31),
        "prediction_blocks": st.integers(0, 1 << 28),
    }
)


@given(sizes)
def test_size_is_the_drawing_s(wanted: dict[str, int]) -> None:
    assert segment_bytes(**wanted) == plan(**wanted)["total_bytes"]


@pytest.mark.parametrize(
    "wanted",
    [
        SIZES,
        {**SIZES, "max_ranks": 128},
        {"max_workers": 300, "max_ranks": 1024, "max_shards": 9, "capacity_blocks": 1},
        {**SIZES, "prediction_blocks": 1},
        {**SIZES, "max_ranks": 1024, "prediction_blocks": 4001},
    ],
)
def test_header_in_memory_is_the_drawing_s(wanted: dict[str, int]) -> None:
    with shared_segment(**wanted) as (fd, segment):
        words = Words(fd)
        assert words.memory[:8] == b"SGLFAST1"
        expected = plan(**wanted)
        assert {name: words.header(name) for name in expected} == expected
        assert not any(words.memory[192:]), "all beyond the header's constants begins as zero"
        assert (segment.max_workers, segment.max_ranks, segment.max_shards) == (
            wanted["max_workers"],
            wanted["max_ranks"],
            wanted["max_shards"],
        )
        assert segment.capacity_blocks == wanted["capacity_blocks"]
        assert segment.total_bytes == os.fstat(fd).st_size == expected["total_bytes"]


@pytest.mark.parametrize("name", list(LIMITS))
def test_sizes_have_limits(name: str) -> None:
    assert segment_bytes(**{**SIZES, name: LIMITS[name]}) > 0
    for wrong in (*([] if name == "prediction_blocks" else [0]), -1, LIMITS[name] + 1, *([65, 1088] if name == "max_ranks" else [])):
        with pytest.raises(ValueError, match=rf"^{name} must be .*, not {wrong}$"):
            segment_bytes(**{**SIZES, name: wrong})
        with pytest.raises(ValueError, match=rf"^{name} must be .*, not {wrong}$"):
            Segment.format(blank(4096), **{**SIZES, name: wrong})


def test_format_refuses_a_small_or_read_only_buffer() -> None:
    need = segment_bytes(**SIZES)
    small = blank(need - 1)
    with pytest.raises(ValueError, match=rf"^buffer of {need - 1} bytes is smaller than the {need} bytes of the layout$"):
        Segment.format(small, **SIZES)
    assert not any(small[:]), "nothing was written"
    attaches: list[Callable[[Any], Segment]] = [Segment, lambda memory: Segment.format(memory, **SIZES)]
    for attach in attaches:
        with pytest.raises(BufferError):
            attach(bytes(need))
        with pytest.raises(TypeError):
            attach(17)


# ---- what attach refuses ----

NO_SEGMENT = r"^this memory is no sglfast segment \(magic number not found\)$"
DAMAGED = r"^the segment's sizes contradict its length: it is truncated or damaged$"


def test_attach_refuses_what_is_no_segment() -> None:
    for memory in (bytearray(0), bytearray(4095), bytearray(4096), bytearray(os.urandom(8192)), bytearray(b"SGLFAST1" * 511)):
        with pytest.raises(ValueError, match=NO_SEGMENT):
            Segment(memory)


@pytest.mark.parametrize("major", [0, _segment.LAYOUT_MAJOR + 1, 0xFFFFFFFF])
def test_attach_refuses_another_layout_version(major: int) -> None:
    memory = formatted()
    memory[8:12] = major.to_bytes(4, "little")
    text = (
        f"the segment has layout version {major}, this build reads version {_segment.LAYOUT_MAJOR}: "
        "start all processes from one build of sglfast"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        Segment(memory)


def test_attach_takes_another_minor_version_and_run_time_state() -> None:
    memory = formatted()
    memory[12:16] = (7).to_bytes(4, "little")
    memory[192:256] = os.urandom(64)
    assert Segment(memory).max_workers == 4


def test_attach_refuses_a_shorter_mapping() -> None:
    memory = formatted()
    for n_bytes in (4096, len(memory) // 2, len(memory) - 1):
        with pytest.raises(ValueError, match=DAMAGED):
            Segment(bytearray(memory[:n_bytes]))
    assert Segment(bytearray(memory[:]) + bytearray(4096)).total_bytes == len(memory), "a longer one is fine"


@pytest.mark.parametrize("byte", [byte for byte in range(16, 128) if byte % 8 in (0, 1, 3, 7)])
def test_attach_refuses_a_header_that_contradicts_itself(byte: int) -> None:
    memory = formatted()
    for flip in (0x01, 0x40, 0xFF):
        memory[byte] ^= flip
        with pytest.raises(ValueError, match=DAMAGED):
            Segment(memory)
        memory[byte] ^= flip
    assert Segment(memory).total_bytes == len(memory)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_ranks": 1088},  # readers have room for 1024
        {"max_ranks": 1 << 40},
        {"max_ranks": 0},
        {"max_shards": 0},
        {"max_workers": 0},
        {"max_workers": 1 << 52},  # 2^64 bytes of workers
        {"max_shards": (1 << 64) - 1},
        {"capacity_blocks": 0},
        {"capacity_blocks": 1 << 62},
        {"prediction_blocks": 1 << 29},
    ],
)
def test_attach_refuses_sizes_beyond_the_limits_even_if_they_agree(wrong: dict[str, int]) -> None:
    memory = blank(1 << 20)
    words = {name: value % 2**64 for name, value in plan(**{**SIZES, **wrong}).items()}
    for name, value in words.items():
        width = 4 if name == "layout_major" else 8
        memory[HEADER[name] : HEADER[name] + width] = value.to_bytes(width, "little")
    with pytest.raises(ValueError, match=DAMAGED):
        Segment(memory)


def test_attach_by_descriptor_raises_our_error() -> None:
    with shared_segment() as (fd, segment):
        words = Words(fd)
        words.memory[8] = 99
        with pytest.raises(ShmLayoutError, match=f"layout version 99, this build reads version {_segment.LAYOUT_MAJOR}"):
            shm.attach(fd)
        words.memory[8] = _segment.LAYOUT_MAJOR
        words.memory[0] = 0
        with pytest.raises(ShmLayoutError, match=NO_SEGMENT):
            shm.attach(fd)
        words.memory[0] = ord("S")
        assert shm.attach(fd).address != segment.address
        copy = os.memfd_create("copy")
        try:
            for n_bytes in (5000, segment.total_bytes - 4096):
                os.ftruncate(copy, 0)
                os.pwrite(copy, words.memory[:n_bytes], 0)
                with pytest.raises(ShmLayoutError, match=DAMAGED):
                    shm.attach(copy)
        finally:
            os.close(copy)


# ---- lifetime and memory ----


def test_segment_keeps_its_mapping() -> None:
    memory = formatted()
    segment = Segment(memory)
    with pytest.raises(BufferError):
        memory.close()
    table = WorkerTable(segment)
    del segment
    with pytest.raises(BufferError):
        memory.close()
    assert table.version() == 0
    del table
    memory.close()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_memory_is_not_committed_before_use() -> None:
    """A segment of 2^26 blocks is 2.8 GB; formatted, attached and empty it holds a few pages."""
    before = resident_bytes()
    with shared_segment(capacity_blocks=1 << 26) as (fd, segment):
        assert segment.total_bytes > 2_800_000_000
        writer = TreeWriter(segment)
        writer.reset()
        reader = TreeReader(shm.attach(fd))
        assert reader.match(os.urandom(8 * 16)) == 0
        assert os.fstat(fd).st_blocks * 512 < 64 * 4096
        writer.store(0, 0, os.urandom(8 * 16))
        assert resident_bytes() - before < 16 << 20
        assert os.fstat(fd).st_blocks * 512 < 64 * 4096


# ---- state and process slots ----


def test_state_and_drain_deadline_are_seen_by_all() -> None:
    with shared_segment() as (fd, segment):
        other = shm.attach(fd)
        assert (other.state, other.drain_deadline_ms, other.workers_version) == (_segment.STARTING, 0, 0)
        for state in (_segment.SERVING, _segment.DRAINING, _segment.STOPPED):
            segment.state = state
            segment.drain_deadline_ms = 1_700_000_000_000 + state
            assert (other.state, other.drain_deadline_ms) == (state, 1_700_000_000_000 + state)


def test_process_slots() -> None:
    with shared_segment(max_shards=2) as (fd, segment):
        other = shm.attach(fd)
        for slot in range(3):
            assert other.process_info(slot) == (0, 0, 0, 0, False)
            segment.process_start(slot, 100 + slot, 1000)
            assert other.process_info(slot) == (100 + slot, 1000, 1000, 0, False)
            segment.process_ready(slot)
            segment.process_heartbeat(slot, 3_000_000_000_000)
            assert other.process_info(slot) == (100 + slot, 1000, 3_000_000_000_000, 0, True)
        segment.process_died(1)
        assert other.process_info(1) == (0, 1000, 3_000_000_000_000, 1, False)
        segment.process_start(1, 555, 2000)
        assert other.process_info(1) == (555, 2000, 2000, 1, False)
        segment.process_ready(1, False)
        assert [other.process_info(slot)[0] for slot in range(3)] == [100, 555, 102], "neighbours keep their own"


def test_what_a_process_has_seen_of_the_worker_table() -> None:
    with shared_segment(max_shards=2) as (fd, segment):
        control = shm.attach(fd)
        segment.process_start(1, 4711, 1000)
        assert [control.workers_seen(slot) for slot in range(3)] == [0, 0, 0]
        segment.process_saw(1, 1 << 40)
        assert [control.workers_seen(slot) for slot in range(3)] == [0, 1 << 40, 0]
        control.process_died(1)
        segment.process_start(1, 4712, 2000)
        assert control.workers_seen(1) == 0, "its successor has seen nothing yet"


@pytest.mark.parametrize("slot", [-1, 3, 1000])
def test_process_slots_outside_raise_and_write_nothing(slot: int) -> None:
    with shared_segment(max_shards=2) as (fd, segment):
        before = Words(fd).memory[:]
        for call in (
            lambda: segment.process_start(slot, 1, 1),
            lambda: segment.process_ready(slot),
            lambda: segment.process_heartbeat(slot, 1),
            lambda: segment.process_died(slot),
            lambda: segment.process_info(slot),
            lambda: segment.process_saw(slot, 1),
            lambda: segment.workers_seen(slot),
        ):
            with pytest.raises(IndexError, match=rf"^process slot {slot} of 3$"):
                call()
        assert Words(fd).memory[:] == before


def test_other_processes_see_the_segment() -> None:
    with shared_segment() as (fd, segment):

        def child() -> list[int]:
            mine = shm.attach(fd)
            mine.process_start(1, os.getpid(), 5)
            mine.process_ready(1)
            return [os.getpid(), mine.state]

        segment.state = _segment.SERVING
        with forked(child) as process:
            assert process.result() == [process.pid, _segment.SERVING]
        assert segment.process_info(1) == (process.pid, 5, 5, 0, True)
