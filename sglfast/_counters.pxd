# C view of sglfast._counters for other compiled modules (cext/relay.pyx): calls without Python objects.

from libc.stdint cimport uint64_t

cimport cython


@cython.final
cdef class Column:
    cdef uint64_t *words
    cdef uint64_t *breakers
    cdef object segment
    cdef uint64_t max_workers
    cdef uint64_t max_ranks

    cdef uint64_t *worker(self, uint64_t worker_idx) except NULL
    cdef void count_in(self, uint64_t *words, uint64_t value_us) noexcept nogil
    cpdef begin(self, unsigned int worker_idx, unsigned long long tokens, unsigned int decision, unsigned long long bytes_in=*)
    cpdef answered(self, unsigned int status_class)
    cpdef prefilled(self, unsigned int worker_idx, unsigned long long tokens)
    cpdef bint end(
        self, unsigned int worker_idx, unsigned long long tokens, unsigned int outcome_word, unsigned long long bytes_out
    ) except -1
    cdef uint64_t *rank(self, uint64_t rank) except NULL
    cpdef begin_rank(self, unsigned int rank, unsigned long long tokens)
    cpdef prefilled_rank(self, unsigned int rank, unsigned long long tokens)
    cpdef end_rank(self, unsigned int rank, unsigned long long tokens)
    cpdef long long hold_body(self, long long n_bytes)
    cpdef add(self, unsigned int word, long long n=*)
    cpdef add_worker(self, unsigned int worker_idx, unsigned int word, long long n=*)
    cpdef observe(self, unsigned long long ttft_us, unsigned long long duration_us)
