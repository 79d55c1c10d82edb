# sf_chunks.h

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint32_t, uint64_t


cdef extern from "sf_chunks.h" nogil:
    enum:
        SF_CH_SIZE
        SF_CH_DONE

    ctypedef struct sf_chunks_t:
        uint64_t left
        uint32_t state

    ctypedef int (*sf_emit_t)(void *, const char *, size_t) noexcept nogil
    int64_t sf_chunks_feed(sf_chunks_t *chunks, const char *base, size_t length, sf_emit_t emit, void *sink) noexcept
