"""The worker table in shared memory: control writes it, index and shards follow it.

Runs in: control (`put`, `set_state`; `remove` gives a slot back), index and shards (`version`, `read`). On the request path only
    `version`: one atomic load; a reader builds its own structures again when the version has moved.
Contract: what choosing needs at once stands in fixed words, all else (URL, model, event endpoint) in a blob of msgpack that
    sglfast.shm encodes. Seqlock per worker: `read` retries while control writes and returns None for a free slot. A blob may hold
    a worker's key: nothing of it is left in the slot once it was written over or removed.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint64_t, uintptr_t
from libc.string cimport memcpy, memset
from posix.unistd cimport usleep

cimport cython
from sf_breaker cimport sf_breaker_announce, sf_breaker_reset, sf_breaker_wake
from sf_shm cimport *

FREE, JOINING, READY, UNHEALTHY, DRAINING = range(5)
FLAG_BIGRAM = 1
FLAG_TOKENS = 2  # block keys are made of tokens, not of the engine's hashes
FLAG_PARITY_SHIFT = 8  # two bits: shm.PARITY_*
BLOB_BYTES = SF_WORKER_BLOB_BYTES

cdef enum:
    # A write takes less than a microsecond, unless control is preempted in its middle: then spinning does not help it on.
    c_SPINS = 1000
    c_NAPS = 1000
    c_NAP_US = 1000
    c_W_BREAKER_HALF_OPENED = 17  # of sglfast._counters


@cython.final
cdef class WorkerTable:
    cdef void *base
    cdef object segment
    cdef readonly int max_workers

    def __cinit__(self, segment):
        self.segment = segment
        self.base = <void *><uintptr_t>segment.address
        self.max_workers = sf_header(self.base).max_workers

    def version(self):
        """Counts changes of the table; equal versions mean an equal table."""
        return sf_load(&sf_header(self.base).workers_version)

    def _slot(self, int worker_idx):
        if not 0 <= worker_idx < self.max_workers:
            raise IndexError(f"worker {worker_idx} is outside 0..{self.max_workers - 1}")
        return <uintptr_t>sf_worker(self.base, worker_idx)

    def put(self, int worker_idx, *, int state, int rank_base, int dp_size, int block_size, int flags, bytes blob,
            bint is_new):
        """Write a whole worker. `is_new`: the slot now means another worker, its generation grows.

        Raises ValueError, and nothing is written, when a value is out of its range or the blob is larger than BLOB_BYTES.
        """
        cdef sf_worker_t *worker = <sf_worker_t *><uintptr_t>self._slot(worker_idx)
        if len(blob) > <int>SF_WORKER_BLOB_BYTES:
            raise ValueError(f"worker record of {len(blob)} bytes is larger than {SF_WORKER_BLOB_BYTES} bytes")
        if not 0 <= rank_base <= rank_base + dp_size <= <int>sf_header(self.base).max_ranks:
            raise ValueError(f"ranks {rank_base}..{rank_base + dp_size - 1} are outside 0..{self.segment.max_ranks - 1}")
        if not FREE <= state <= DRAINING:
            raise ValueError(f"worker state must be {FREE}..{DRAINING}, not {state}")
        if block_size < 0 or flags < 0:
            raise ValueError(f"block_size {block_size} and flags {flags} must not be negative")
        sf_write_begin(&worker.seq)
        if is_new:
            _sf_add(&worker.generation, 1)
            sf_breaker_reset(sf_breaker(self.base, worker_idx), _sf_load(&worker.generation))  # it knows nothing of this worker
        _sf_store(&worker.state, state)
        _sf_store(&worker.rank_base, rank_base)
        _sf_store(&worker.dp_size, dp_size)
        _sf_store(&worker.block_size, block_size)
        _sf_store(&worker.flags, flags)
        _sf_store(&worker.blob_bytes, len(blob))
        memcpy(worker.blob, PyBytes_AS_STRING(blob), len(blob))
        memset(worker.blob + len(blob), 0, SF_WORKER_BLOB_BYTES - len(blob))
        sf_write_end(&worker.seq)
        sf_store(&sf_header(self.base).workers_version, _sf_load(&sf_header(self.base).workers_version) + 1)

    cdef void _give_chance(self, uint64_t worker_idx) noexcept nogil:
        # Health checks have taken it in again: its breaker, if open, need not wait for its time. Counted in control's own column.
        cdef uint64_t *retired = sf_column_worker(sf_column(self.base, sf_header(self.base).max_shards), worker_idx)
        if sf_breaker_wake(sf_breaker(self.base, worker_idx), 0, 0):
            _sf_add(retired + c_W_BREAKER_HALF_OPENED, 1)
            sf_breaker_announce(self.base)

    def set_state(self, int worker_idx, int state):
        """Change only the state; every reader sees the table's version move. Raises ValueError for a slot never put.

        A worker that becomes READY has its breaker half-open if it was open.
        """
        cdef sf_worker_t *worker = <sf_worker_t *><uintptr_t>self._slot(worker_idx)
        if not FREE <= state <= DRAINING:
            raise ValueError(f"worker state must be {FREE}..{DRAINING}, not {state}")
        if not _sf_load(&worker.generation):
            raise ValueError(f"worker slot {worker_idx} was never written: put a worker there first")
        if state == READY and _sf_load(&worker.state) != <uint64_t>state:
            self._give_chance(worker_idx)
        sf_write_begin(&worker.seq)
        _sf_store(&worker.state, state)
        sf_write_end(&worker.seq)
        sf_store(&sf_header(self.base).workers_version, _sf_load(&sf_header(self.base).workers_version) + 1)

    def remove(self, int worker_idx):
        """Free the slot and wipe it, but for its generation. Raises ValueError for a slot never put."""
        cdef sf_worker_t *worker = <sf_worker_t *><uintptr_t>self._slot(worker_idx)
        if not _sf_load(&worker.generation):
            raise ValueError(f"worker slot {worker_idx} was never written: put a worker there first")
        sf_write_begin(&worker.seq)
        _sf_store(&worker.state, FREE)
        _sf_store(&worker.rank_base, 0)
        _sf_store(&worker.dp_size, 0)
        _sf_store(&worker.block_size, 0)
        _sf_store(&worker.flags, 0)
        _sf_store(&worker.blob_bytes, 0)
        memset(worker.blob, 0, SF_WORKER_BLOB_BYTES)
        sf_write_end(&worker.seq)
        sf_store(&sf_header(self.base).workers_version, _sf_load(&sf_header(self.base).workers_version) + 1)

    def generation(self, int worker_idx):
        """How many workers the slot has had."""
        cdef sf_worker_t *worker = <sf_worker_t *><uintptr_t>self._slot(worker_idx)
        return _sf_load(&worker.generation)

    def state(self, int worker_idx):
        cdef sf_worker_t *worker = <sf_worker_t *><uintptr_t>self._slot(worker_idx)
        return sf_load(&worker.state)

    def read(self, int worker_idx):
        """(generation, state, rank_base, dp_size, block_size, flags, blob), or None for a free slot.

        Raises RuntimeError when the writer died inside the slot: control, once back, writes it again.
        """
        cdef sf_worker_t *worker = <sf_worker_t *><uintptr_t>self._slot(worker_idx)
        cdef uint64_t before, blob_bytes
        cdef int attempt
        for attempt in range(c_SPINS + c_NAPS):
            if attempt >= c_SPINS:
                with nogil:
                    usleep(c_NAP_US)
            before = sf_load(&worker.seq)
            if before & 1:
                sf_pause()
                continue
            state = _sf_load(&worker.state)
            blob_bytes = _sf_load(&worker.blob_bytes)
            if blob_bytes > SF_WORKER_BLOB_BYTES:
                continue
            row = (
                _sf_load(&worker.generation), state, _sf_load(&worker.rank_base), _sf_load(&worker.dp_size),
                _sf_load(&worker.block_size), _sf_load(&worker.flags),
                PyBytes_FromStringAndSize(<char *>worker.blob, blob_bytes),
            )
            sf_fence_acquire()
            if _sf_load(&worker.seq) == before:
                return row if state else None
        raise RuntimeError(f"worker slot {worker_idx} is being written for ever: its writer died")
