"""KV event batches in one pass: msgpack -> runs of block keys, and token ids -> uint32. The fast road beside wire.kv_events.

Runs in: index, once a batch or a run of batches. Contract: what is not entirely usual is refused, and the caller takes the general
    decoder; what is accepted means exactly what wire.kv_events makes of it (tests compare on recorded and damaged bytes).
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset


cdef extern from "sf_kvdecode.h" nogil:
    enum:
        SF_KV_OK
        SF_KV_NO_MEMORY
        SF_KV_STORE
        SF_KV_REMOVE
        SF_KV_CLEAR

    ctypedef struct sf_kv_run_t:
        uint32_t kind
        uint32_t tiers
        uint64_t start
        uint64_t count

    ctypedef struct sf_kv_t:
        const uint8_t *p
        const uint8_t *end
        uint64_t *keys
        sf_kv_run_t *runs
        uint64_t n_runs
        uint64_t n_events

    ctypedef struct sf_kv_mark_t:
        pass

    int sf_kv_batch(sf_kv_t *kv) noexcept
    sf_kv_mark_t sf_kv_mark(const sf_kv_t *kv) noexcept
    void sf_kv_undo(sf_kv_t *kv, const sf_kv_mark_t *mark) noexcept
    void sf_kv_free(sf_kv_t *kv) noexcept
    int64_t sf_kv_array(sf_kv_t *kv) noexcept
    int sf_kv_int(sf_kv_t *kv, uint64_t *out) noexcept

STORE, REMOVE, CLEAR = SF_KV_STORE, SF_KV_REMOVE, SF_KV_CLEAR


include "kvbatches.pxi"


cdef list _packed_runs(const sf_kv_t *kv):
    cdef uint64_t i
    return [
        (kv.runs[i].kind, kv.runs[i].tiers, PyBytes_FromStringAndSize(<char *>(kv.keys + kv.runs[i].start), 8 * kv.runs[i].count))
        for i in range(kv.n_runs)
    ]


def runs(payload):
    cdef Py_buffer view
    cdef sf_kv_t kv
    cdef int code
    memset(&kv, 0, sizeof(kv))
    PyObject_GetBuffer(payload, &view, PyBUF_SIMPLE)
    try:
        kv.p = <const uint8_t *>view.buf
        kv.end = kv.p + view.len
        with nogil:
            code = sf_kv_batch(&kv)
        if code == SF_KV_NO_MEMORY:
            raise MemoryError
        return (kv.n_events, _packed_runs(&kv)) if code == SF_KV_OK else None
    finally:
        PyBuffer_Release(&view)
        sf_kv_free(&kv)


cdef int batches_decode(sf_kv_t *kv, const batches_t *batches, uint64_t *n_done) noexcept nogil:
    """All that are usual, from the first one on."""
    cdef sf_kv_mark_t mark
    cdef uint64_t i
    cdef int code
    for i in range(batches.first, batches.count):
        mark = sf_kv_mark(kv)
        kv.p = batches_start(batches, i)
        kv.end = batches_start(batches, i + 1)
        code = sf_kv_batch(kv)
        if code == SF_KV_NO_MEMORY:
            return code
        if code != SF_KV_OK:
            sf_kv_undo(kv, &mark)
            break
        n_done[0] += 1
    return SF_KV_OK


def runs_of_batches(payloads, ends, uint64_t first=0):
    cdef batches_t batches
    cdef sf_kv_t kv
    cdef uint64_t n_done = 0
    cdef int code
    memset(&kv, 0, sizeof(kv))
    batches_open(&batches, payloads, ends, first)
    try:
        with nogil:
            code = batches_decode(&kv, &batches, &n_done)
        if code == SF_KV_NO_MEMORY:
            raise MemoryError
        return n_done, kv.n_events, _packed_runs(&kv)
    finally:
        batches_close(&batches)
        sf_kv_free(&kv)


def token_ids(raw):
    cdef Py_buffer view
    cdef sf_kv_t kv
    cdef int64_t count, i
    cdef uint64_t value = 0
    cdef uint32_t id32
    cdef char *out
    memset(&kv, 0, sizeof(kv))
    PyObject_GetBuffer(raw, &view, PyBUF_SIMPLE)
    try:
        kv.p = <const uint8_t *>view.buf
        kv.end = kv.p + view.len
        count = sf_kv_array(&kv)
        if count < 0 or count > kv.end - kv.p:
            return None
        ids = PyBytes_FromStringAndSize(NULL, 4 * count)
        out = PyBytes_AS_STRING(ids)
        for i in range(count):
            if sf_kv_int(&kv, &value) or value >> 32:
                return None
            id32 = <uint32_t>value
            memcpy(out + 4 * i, &id32, 4)
        return ids if kv.p == kv.end else None
    finally:
        PyBuffer_Release(&view)
