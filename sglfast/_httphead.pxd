# C view of sglfast._httphead for other compiled modules (cext/relay.pyx): fields and calls without Python objects.

from libc.stdint cimport int64_t

cimport cython
from sf_chunks cimport sf_chunks_t


@cython.final
cdef class RequestHead:
    cdef readonly bytes method
    cdef readonly bytes target
    cdef readonly bytes kept
    cdef readonly object request_id
    cdef readonly object origin
    cdef readonly bint has_request_id
    cdef readonly long long content_length
    cdef readonly unsigned int head_bytes
    cdef readonly unsigned int n_hosts
    cdef readonly bint is_chunked
    cdef readonly bint keeps_alive
    cdef readonly bint is_http10
    cdef readonly bint expects_continue
    cdef readonly bint expects_other
    cdef readonly bint wants_kv
    cdef readonly bint names_rank


@cython.final
cdef class ResponseHead:
    cdef readonly int status
    cdef readonly bytes kept
    cdef readonly long long content_length
    cdef readonly unsigned int head_bytes
    cdef readonly bint is_chunked
    cdef readonly bint keeps_alive
    cdef readonly bint has_request_id
    cdef readonly bint is_event_stream


@cython.final
cdef class Chunks:
    cdef sf_chunks_t chunks
    cpdef Py_ssize_t follow(self, bytes data, Py_ssize_t start=*) except -3


cpdef object scan_request(bytes data, Py_ssize_t limit)
cpdef object scan_response(bytes data, Py_ssize_t limit)
