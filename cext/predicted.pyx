"""Predictions in shared memory: which rank was routed the beginning of a prompt. `Predictions` for shards, `PredictionWriter` for index.

Runs in: shards (text_keys, Predictions, on the request path) and the index process (one PredictionWriter, the only writer).
Contract: keys are n native uint64 in one bytes-like object, from `text_keys`, which is also where they are told (cext/sf_prompttext.h).
    The law of the table, the rings and the doorbell is in cext/sf_predicted.h. Times are milliseconds of sf_coarse_ms, the machine's
    monotonic clock; a `now_ms` of 0 means now. A segment made without predictions has none of this: ValueError.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free, malloc, qsort
from libc.string cimport memcpy
from posix.unistd cimport usleep

import os

cimport cython
from sf_shm cimport *


cdef extern from "sf_predicted.h" nogil:
    enum:
        SF_TEXT_KEYS_MAX
        SF_RECORD_WORDS
        SF_RECENT_MS
        SF_RECENT_SETS
        SF_FLIGHT
        SF_KEPT
        SF_OP_SENT
        SF_OP_KEEP
        SF_OP_SETTLED

    ctypedef struct sf_text_t:
        const char *prompt
        uint64_t prompt_bytes
        uint64_t context

    ctypedef struct sf_predicted_t:
        char *sets
        uint64_t n_sets
        uint64_t set_bytes
        uint64_t words
        uint64_t kept_ms
        uint64_t flight_ms

    void sf_text_find(sf_text_t *text, const char *body, uint64_t n) noexcept
    uint32_t sf_text_keys(const sf_text_t *text, uint64_t *keys) noexcept
    uint64_t sf_text_cut(uint32_t i) noexcept
    void sf_predicted_init(sf_predicted_t *table, void *base) noexcept
    uint64_t sf_coarse_ms() noexcept
    uint64_t *sf_pbits(const sf_predicted_t *table, uint64_t *set, int way, int kind) noexcept
    void sf_powners(const sf_predicted_t *table, uint64_t key, uint64_t now_ms, uint64_t *owners, uint64_t *in_flight) noexcept
    uint32_t sf_pmatch(const sf_predicted_t *shared, const sf_predicted_t *recent, const void *keys, uint32_t n_keys,
                       uint64_t now_ms, uint32_t *counts, uint32_t *touched, uint32_t *n_touched) noexcept
    int sf_padd(const sf_predicted_t *table, uint64_t key, uint32_t rank, int kind, uint64_t now_ms) noexcept
    void sf_pdrop(const sf_predicted_t *table, uint64_t key, uint32_t rank, int kind) noexcept
    void sf_pdrop_way(const sf_predicted_t *table, uint64_t *set, int way, uint32_t rank, int kind) noexcept
    void sf_psettle(const sf_predicted_t *table, uint64_t key, uint32_t rank) noexcept
    int sf_ring_push(sf_ring_t *ring, int op, uint32_t rank, uint64_t generation, const void *keys, uint32_t n_keys) noexcept
    int sf_ring_pop(sf_ring_t *ring, uint64_t *record) noexcept
    void sf_ring_popped(sf_ring_t *ring, uint64_t n_words) noexcept
    void sf_ring_doorbell(sf_predictions_t *shared) noexcept
    void sf_await_doorbell(sf_predictions_t *shared, uint64_t timeout_ms, int (*has_work)(void *) noexcept nogil, void *of) noexcept


SENT, KEEP, SETTLED = SF_OP_SENT, SF_OP_KEEP, SF_OP_SETTLED
KEYS_MAX = SF_TEXT_KEYS_MAX
# Of a rank with events: how long what was computed is believed without them. They leave the engine before the answer's first byte.
GRACE_MS = 100

cdef enum:
    c_GRACE_MS = 100
    # Settled prompts that wait for the end of that time; beyond it they are forgotten at once.
    c_SETTLED_MAX = 1 << 14
    # Records of one ring before the next has its turn.
    c_RECORDS_A_TURN = 256


def text_keys(bytes body not None):
    """(keys of the prompt in a raw JSON body, bytes of the prompt's raw value); (b"", 0) when it has no prompt."""
    cdef sf_text_t text
    cdef uint64_t keys[SF_TEXT_KEYS_MAX]
    cdef uint32_t n = 0
    sf_text_find(&text, PyBytes_AS_STRING(body), PyBytes_GET_SIZE(body))
    if text.prompt != NULL:
        n = sf_text_keys(&text, keys)
    return PyBytes_FromStringAndSize(<char *>keys, n * sizeof(uint64_t)), text.prompt_bytes


def text_cut(unsigned int n_keys):
    """Bytes of a prompt that `n_keys` keys stand for. Raises ValueError above KEYS_MAX."""
    if n_keys > SF_TEXT_KEYS_MAX:
        raise ValueError(f"a prompt has at most {KEYS_MAX} keys, not {n_keys}")
    return sf_text_cut(n_keys)


cdef int open_keys(object keys, Py_buffer *view) except -1:
    PyObject_GetBuffer(keys, view, PyBUF_SIMPLE)
    if view.len & 7 or view.len > SF_TEXT_KEYS_MAX * 8:
        n_bytes = view.len
        PyBuffer_Release(view)
        raise ValueError(f"keys must be at most {KEYS_MAX} whole 8-byte words, not {n_bytes} bytes")
    return 0


cdef void *open_segment(object segment) except NULL:
    if not segment.prediction_blocks:
        raise ValueError("the segment was made without predictions")
    return <void *><uintptr_t>segment.address


@cython.final
cdef class Predictions:
    cdef sf_predicted_t shared
    cdef sf_predicted_t recent  # this shard's last records, which index may not have read yet
    cdef sf_ring_t *ring
    cdef sf_predictions_t *header
    cdef object segment
    cdef char *recent_sets
    cdef uint32_t *counts
    cdef uint32_t *touched
    cdef uint32_t n_touched
    cdef uint64_t max_ranks
    cdef uint64_t keys[SF_TEXT_KEYS_MAX]  # of the last match
    cdef uint64_t matched_ms

    def __cinit__(self, segment, int shard):
        cdef void *base = open_segment(segment)
        if not 0 <= shard < segment.max_shards:
            raise ValueError(f"shard {shard} is outside 0..{segment.max_shards - 1}")
        self.segment = segment
        self.ring = sf_ring(base, shard)
        self.header = sf_predictions(base)
        self.max_ranks = sf_header(base).max_ranks
        sf_predicted_init(&self.shared, base)
        self.recent = self.shared
        self.recent.n_sets = SF_RECENT_SETS
        self.recent.kept_ms = self.recent.flight_ms = SF_RECENT_MS
        self.recent_sets = <char *>calloc(SF_RECENT_SETS, self.recent.set_bytes)
        self.recent.sets = self.recent_sets
        self.counts = <uint32_t *>calloc(self.max_ranks, sizeof(uint32_t))
        self.touched = <uint32_t *>calloc(self.max_ranks, sizeof(uint32_t))
        if self.recent_sets == NULL or self.counts == NULL or self.touched == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.recent_sets)
        free(self.counts)
        free(self.touched)

    def match(self, keys, uint64_t now_ms=0):
        """Walk the prompt's keys; return the most leading ones that some rank was routed. `hits` then tells it per rank."""
        cdef Py_buffer view
        cdef uint32_t i
        open_keys(keys, &view)
        for i in range(self.n_touched):
            self.counts[self.touched[i]] = 0
        self.matched_ms = now_ms or sf_coarse_ms()
        memcpy(self.keys, view.buf, view.len)
        cdef uint32_t best = sf_pmatch(&self.shared, &self.recent, self.keys, <uint32_t>(view.len >> 3), self.matched_ms,
                                       self.counts, self.touched, &self.n_touched)
        PyBuffer_Release(&view)
        return best

    def hits(self):
        """Ranks of the last match as a list of (rank, leading keys that it was routed), in no order."""
        cdef uint32_t i
        return [(self.touched[i], self.counts[self.touched[i]]) for i in range(self.n_touched)]

    def is_in_flight(self, unsigned int rank):
        """Whether the end of the rank's part, in the last match, still waits for its first token."""
        cdef uint64_t owners[16]  # SF_RANKS_MAX bits
        cdef uint64_t flying[16]
        cdef uint64_t w, key
        if rank >= self.max_ranks or not self.counts[rank]:
            return False
        for w in range(self.shared.words):
            owners[w] = flying[w] = 0
        key = self.keys[self.counts[rank] - 1]
        sf_powners(&self.shared, key, self.matched_ms, owners, flying)
        sf_powners(&self.recent, key, self.matched_ms, owners, flying)
        return flying[rank >> 6] >> (rank & 63) & 1 != 0

    def put(self, int op, unsigned int rank, uint64_t generation, keys, uint64_t now_ms=0):
        """Tell index, and remember for a moment, what became of a prompt: SENT to a rank, KEEP there, or SETTLED.

        generation: of the rank's worker. Returns False, and index will not know, when the ring is full. Raises ValueError.
        """
        cdef Py_buffer view
        cdef uint32_t i, n
        cdef uint64_t key
        cdef int code
        if rank >= self.max_ranks:
            raise ValueError(f"rank {rank} is outside 0..{self.max_ranks - 1}")
        if not SF_OP_SENT <= op <= SF_OP_SETTLED:
            raise ValueError(f"op must be SENT, KEEP or SETTLED, not {op}")
        open_keys(keys, &view)
        n = <uint32_t>(view.len >> 3)
        if now_ms == 0:
            now_ms = sf_coarse_ms()
        for i in range(n):
            memcpy(&key, <char *>view.buf + 8 * i, 8)  # a caller's buffer may begin at any address
            if op == SF_OP_SETTLED:
                sf_pdrop(&self.recent, key, rank, SF_FLIGHT)
            else:
                sf_padd(&self.recent, key, rank, SF_FLIGHT if op == SF_OP_SENT else SF_KEPT, now_ms)
        code = sf_ring_push(self.ring, op, rank, generation, view.buf, n)
        PyBuffer_Release(&view)
        sf_ring_doorbell(self.header)
        return code == 0

    @property
    def dropped_total(self):
        """Records of this shard that found no room in its ring."""
        return sf_load(&self.ring.dropped_total)


def dropped_total(segment):
    """Records of all shards that found no room; 0 without predictions."""
    cdef void *base = <void *><uintptr_t>segment.address
    if not segment.prediction_blocks:
        return 0
    return sum([sf_load(&sf_ring(base, shard).dropped_total) for shard in range(<int>segment.max_shards)])


def totals(segment):
    """records, refused, evicted, trimmed: totals that index has counted; all 0 without predictions."""
    if not segment.prediction_blocks:
        return {"records": 0, "refused": 0, "evicted": 0, "trimmed": 0}
    cdef sf_predictions_t *header = sf_predictions(<void *><uintptr_t>segment.address)
    return {
        "records": sf_load(&header.records_total), "refused": sf_load(&header.refused_total),
        "evicted": sf_load(&header.evicted_total), "trimmed": sf_load(&header.trimmed_total),
    }


include "predictedwriter.pxi"


cdef int has_records(void *base) noexcept nogil:
    cdef uint64_t shard
    for shard in range(sf_header(base).max_shards):
        if sf_load(&sf_ring(base, shard).head) != _sf_load(&sf_ring(base, shard).tail):
            return 1
    return 0


cdef extern from *:
    int __builtin_ctzll(unsigned long long) noexcept nogil
