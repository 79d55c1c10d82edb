"""The shared-memory segment as a whole: sizes, format, check, run-time state and process slots.

Runs in: control (formats, writes state), index and shards (attach, own process slot). Never on the request path except
    `state` and `workers_version`, one atomic load each.
Contract: see cext/sf_shm.h, which is the layout. A `Segment` keeps the mapping's buffer alive; the other compiled modules
    take a Segment and read its `address`, so that the layout is checked in one place only.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport uint64_t, uintptr_t
from libc.string cimport memcpy, memset

cimport cython
from sf_shm cimport *

LAYOUT_MAJOR = SF_LAYOUT_MAJOR
STARTING, SERVING, DRAINING, STOPPED = range(4)


def segment_bytes(*, int max_workers, int max_ranks, int max_shards, long long capacity_blocks, long long prediction_blocks=0):
    """Size of a segment in bytes. Raises ValueError on a size that no segment can have."""
    cdef sf_header_t plan
    _check_sizes(max_workers, max_ranks, max_shards, capacity_blocks, prediction_blocks)
    return sf_plan(&plan, max_workers, max_ranks, max_shards, capacity_blocks, prediction_blocks)


def _check_sizes(max_workers, max_ranks, max_shards, capacity_blocks, prediction_blocks):
    if not 1 <= max_workers <= SF_WORKERS_MAX:
        raise ValueError(f"max_workers must be 1..{SF_WORKERS_MAX}, not {max_workers}")
    if max_ranks % 64 or not 64 <= max_ranks <= SF_RANKS_MAX:
        raise ValueError(f"max_ranks must be a multiple of 64 from 64 to {SF_RANKS_MAX}, not {max_ranks}")
    if not 1 <= max_shards <= SF_SHARDS_MAX:
        raise ValueError(f"max_shards must be 1..{SF_SHARDS_MAX}, not {max_shards}")
    if not 1 <= capacity_blocks <= SF_CAPACITY_MAX:
        raise ValueError(f"capacity_blocks must be 1..2^31, not {capacity_blocks}")
    if not 0 <= prediction_blocks <= SF_PREDICTIONS_MAX:
        raise ValueError(f"prediction_blocks must be 0..2^28, not {prediction_blocks}")


@cython.final
cdef class Segment:
    cdef Py_buffer buffer
    cdef bint has_buffer
    cdef void *base

    def __cinit__(self, buffer):
        self.has_buffer = False
        PyObject_GetBuffer(buffer, &self.buffer, PyBUF_SIMPLE | PyBUF_WRITABLE)
        self.has_buffer = True
        self.base = self.buffer.buf
        cdef int code = sf_check(self.base, self.buffer.len)
        if code == SF_OK:
            return
        if code == SF_NOT_SGLFAST:
            raise ValueError("this memory is no sglfast segment (magic number not found)")
        if code == SF_OTHER_LAYOUT:
            raise ValueError(
                f"the segment has layout version {sf_header(self.base).layout_major}, this build reads version "
                f"{SF_LAYOUT_MAJOR}: start all processes from one build of sglfast"
            )
        raise ValueError("the segment's sizes contradict its length: it is truncated or damaged")

    def __dealloc__(self):
        if self.has_buffer:
            PyBuffer_Release(&self.buffer)

    @staticmethod
    def format(buffer, *, int max_workers, int max_ranks, int max_shards, long long capacity_blocks,
               long long prediction_blocks=0):
        """Write an empty segment into zeroed memory and attach to it."""
        cdef Py_buffer view
        cdef sf_header_t plan
        _check_sizes(max_workers, max_ranks, max_shards, capacity_blocks, prediction_blocks)
        sf_plan(&plan, max_workers, max_ranks, max_shards, capacity_blocks, prediction_blocks)
        PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE | PyBUF_WRITABLE)
        try:
            if <uint64_t>view.len < plan.total_bytes:
                raise ValueError(f"buffer of {view.len} bytes is smaller than the {plan.total_bytes} bytes of the layout")
            memcpy(view.buf, &plan, sizeof(plan))
        finally:
            PyBuffer_Release(&view)
        return Segment(buffer)

    @property
    def address(self):
        return <uintptr_t>self.base

    @property
    def max_workers(self):
        return sf_header(self.base).max_workers

    @property
    def max_ranks(self):
        return sf_header(self.base).max_ranks

    @property
    def max_shards(self):
        return sf_header(self.base).max_shards

    @property
    def capacity_blocks(self):
        return sf_header(self.base).tree_capacity_blocks

    @property
    def prediction_blocks(self):
        return sf_header(self.base).prediction_blocks

    @property
    def total_bytes(self):
        return sf_header(self.base).total_bytes

    @property
    def workers_version(self):
        return sf_load(&sf_header(self.base).workers_version)

    @property
    def state(self):
        return sf_load(&sf_header(self.base).state)

    @state.setter
    def state(self, int value):
        sf_store(&sf_header(self.base).state, value)

    @property
    def drain_deadline_ms(self):
        return sf_load(&sf_header(self.base).drain_deadline_ms)

    @drain_deadline_ms.setter
    def drain_deadline_ms(self, long long value):
        sf_store(&sf_header(self.base).drain_deadline_ms, value)

    def _process(self, int slot):
        if not 0 <= slot <= <int>sf_header(self.base).max_shards:
            raise IndexError(f"process slot {slot} of {sf_header(self.base).max_shards + 1}")
        return <uintptr_t>sf_process(self.base, slot)

    def process_start(self, int slot, int pid, long long now_ms):
        """Take a process slot (0 = index, 1 + s = shard s) for `pid`; it is not ready yet."""
        cdef sf_process_t *process = <sf_process_t *><uintptr_t>self._process(slot)
        sf_store(&process.is_ready, 0)
        sf_store(&process.started_ms, now_ms)
        sf_store(&process.heartbeat_ms, now_ms)
        sf_store(&process.workers_seen, 0)
        sf_store(&process.pid, pid)

    def process_ready(self, int slot, bint is_ready=True):
        cdef sf_process_t *process = <sf_process_t *><uintptr_t>self._process(slot)
        sf_store(&process.is_ready, is_ready)

    def process_heartbeat(self, int slot, long long now_ms):
        cdef sf_process_t *process = <sf_process_t *><uintptr_t>self._process(slot)
        sf_store(&process.heartbeat_ms, now_ms)

    def process_saw(self, int slot, unsigned long long workers_version):
        """The process's word that it acts by this version of the worker table, and by no older one."""
        cdef sf_process_t *process = <sf_process_t *><uintptr_t>self._process(slot)
        sf_store(&process.workers_seen, workers_version)

    def workers_seen(self, int slot):
        """Version of the worker table that the owner of the slot acts by."""
        cdef sf_process_t *process = <sf_process_t *><uintptr_t>self._process(slot)
        return sf_load(&process.workers_seen)

    def process_died(self, int slot):
        """Control's note that the owner of the slot is gone: pid 0, one restart more."""
        cdef sf_process_t *process = <sf_process_t *><uintptr_t>self._process(slot)
        sf_store(&process.is_ready, 0)
        sf_store(&process.pid, 0)
        _sf_add(&process.restarts, 1)

    def process_info(self, int slot):
        """(pid, started_ms, heartbeat_ms, restarts, is_ready) of a process slot."""
        cdef sf_process_t *process = <sf_process_t *><uintptr_t>self._process(slot)
        return (
            sf_load(&process.pid), sf_load(&process.started_ms), sf_load(&process.heartbeat_ms),
            sf_load(&process.restarts), bool(sf_load(&process.is_ready)),
        )


def layout():
    """Sizes and offsets of the layout as a dict, for the test that keeps a change from being silent."""
    cdef sf_header_t header
    cdef sf_worker_t worker
    cdef sf_tree_t tree
    cdef sf_ring_t ring
    memset(&header, 0, sizeof(header))
    total = sf_plan(&header, 256, 64, 8, 1 << 20, 1 << 18)
    return {
        "major": SF_LAYOUT_MAJOR,
        "minor": SF_LAYOUT_MINOR,
        "sizeof": {
            "header": sizeof(sf_header_t), "process": sizeof(sf_process_t), "worker": sizeof(sf_worker_t),
            "rank": sizeof(sf_rank_t), "tree": sizeof(sf_tree_t),
            "predictions": sizeof(sf_predictions_t), "ring": sizeof(sf_ring_t),
        },
        "words": {
            "shard": SF_SHARD_WORDS, "worker": SF_WORKER_WORDS, "rank": SF_RANK_WORDS, "tiers": SF_TIERS, "ways": SF_WAYS,
            "ring": SF_RING_WORDS, "load": SF_LOAD_WORDS,
        },
        "offsetof": {
            "header.state": <uintptr_t>&header.state - <uintptr_t>&header,
            "header.workers_version": <uintptr_t>&header.workers_version - <uintptr_t>&header,
            "worker.blob": <uintptr_t>&worker.blob - <uintptr_t>&worker,
            "tree.live_blocks": <uintptr_t>&tree.live_blocks - <uintptr_t>&tree,
            "ring.tail": <uintptr_t>&ring.tail - <uintptr_t>&ring,
        },
        "plan(256, 64, 8, 2^20, 2^18)": {
            "process": header.process_offset, "workers": header.workers_offset, "ranks": header.ranks_offset,
            "columns": header.columns_offset, "column_stride": header.column_stride, "tree": header.tree_offset,
            "slots": header.slots_offset, "tree_slots": header.tree_slots, "tree_stride": header.tree_stride,
            "predictions": header.predictions_offset, "rings": header.rings_offset, "ring_stride": header.ring_stride,
            "sets": header.sets_offset, "prediction_sets": header.prediction_sets,
            "prediction_set_bytes": header.prediction_set_bytes,
            "total": total,
        },
    }
