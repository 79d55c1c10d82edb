# What policies compare. Part of counters.pyx.

@cython.final
cdef class Loads:
    """What policies compare: in-flight requests and tokens of a worker, summed over all shards.

    A pool is a contiguous int32 array of worker indexes; ValueError when it is not or is empty, IndexError for an index outside
    the table. Cost of a pick: pool size x shards words; power_of_two reads two workers.
    Ties are broken at random (reservoir), never by index: equal workers must share the load.
    """

    cdef void *base
    cdef object segment
    cdef uint64_t n_shards
    cdef uint64_t max_workers
    cdef uint64_t stride_words
    cdef uint64_t *first
    cdef uint64_t random_state

    def __cinit__(self, segment):
        self.segment = segment
        self.base = <void *><uintptr_t>segment.address
        self.n_shards = segment.max_shards
        self.max_workers = segment.max_workers
        self.first = sf_column(self.base, 0)
        self.stride_words = sf_header(self.base).column_stride // 8
        self.random_state = int.from_bytes(os.urandom(8), "little") | 1

    cdef uint64_t c_random(self) noexcept nogil:
        # xorshift64*: Vigna, "An experimental exploration of Marsaglia's xorshift generators", 2016
        self.random_state ^= self.random_state >> 12
        self.random_state ^= self.random_state << 25
        self.random_state ^= self.random_state >> 27
        return self.random_state * <uint64_t>0x2545F4914F6CDD1D

    cdef uint64_t c_below(self, uint64_t n) noexcept nogil:
        return (self.c_random() >> 32) * n >> 32

    cdef int64_t c_load(self, uint64_t worker_idx, uint64_t word) noexcept nogil:
        # -1: no such worker (a negative index is one of these: it became huge).
        cdef uint64_t *words
        cdef int64_t total = 0
        cdef uint64_t shard
        if worker_idx >= self.max_workers:
            return -1
        words = self.first + SF_SHARD_WORDS + worker_idx * SF_WORKER_WORDS + word
        for shard in range(self.n_shards):
            total += <int64_t>_sf_load(words + shard * self.stride_words)
        return total if total > 0 else 0

    cdef int open_pool(self, pool, Py_buffer *view) except -1:
        PyObject_GetBuffer(pool, view, PyBUF_SIMPLE)
        if view.itemsize != sizeof(int32_t) or view.len == 0:
            kind = f"items of {view.itemsize} bytes" if view.len else "none"
            PyBuffer_Release(view)
            raise ValueError(f"a pool is int32 worker indexes, at least one; this one has {kind}")
        return 0

    def requests(self, unsigned int worker_idx):
        """In-flight requests of a worker over all shards."""
        if worker_idx >= self.max_workers:
            raise IndexError(f"worker {worker_idx} is outside 0..{self.max_workers - 1}")
        return self.c_load(worker_idx, c_W_INFLIGHT_REQUESTS)

    def tokens(self, unsigned int worker_idx):
        """Uncached prompt tokens that a worker was sent and has not yet answered, over all shards."""
        if worker_idx >= self.max_workers:
            raise IndexError(f"worker {worker_idx} is outside 0..{self.max_workers - 1}")
        return self.c_load(worker_idx, c_W_INFLIGHT_TOKENS)

    def random_below(self, unsigned long long n):
        """A random number 0..n-1. Raises ValueError unless 1 <= n < 2^32."""
        if n - 1 >= 0xffffffff:
            raise ValueError(f"n must be 1..2^32 - 1, not {n}")
        return self.c_below(n)

    def least(self, pool, unsigned int word=0):
        """(position in the pool, load) of the least loaded worker; ties at random. word: 0 requests, 1 tokens."""
        cdef Py_buffer view
        cdef const int32_t *workers
        cdef int64_t load = -1, best = -1
        cdef uint64_t i, n, ties = 0, choice = 0
        if word >= SF_WORKER_WORDS:
            raise IndexError(f"no worker word {word}")
        self.open_pool(pool, &view)
        workers = <const int32_t *>view.buf
        n = view.len // sizeof(int32_t)
        for i in range(n):
            load = self.c_load(<uint64_t>workers[i], word)
            if load < 0:
                break
            if best < 0 or load < best:
                best = load
                ties = 1
                choice = i
            elif load == best:
                ties += 1
                if self.c_below(ties) == 0:
                    choice = i
        PyBuffer_Release(&view)
        if load < 0:
            raise IndexError(f"the pool names a worker outside 0..{self.max_workers - 1}")
        return choice, best

    def span(self, pool, unsigned int word=0):
        """(smallest, largest) load in the pool."""
        cdef Py_buffer view
        cdef const int32_t *workers
        cdef int64_t load = -1, low = -1, high = -1
        cdef uint64_t i
        if word >= SF_WORKER_WORDS:
            raise IndexError(f"no worker word {word}")
        self.open_pool(pool, &view)
        workers = <const int32_t *>view.buf
        for i in range(view.len // sizeof(int32_t)):
            load = self.c_load(<uint64_t>workers[i], word)
            if load < 0:
                break
            if low < 0 or load < low:
                low = load
            if load > high:
                high = load
        PyBuffer_Release(&view)
        if load < 0:
            raise IndexError(f"the pool names a worker outside 0..{self.max_workers - 1}")
        return low, high

    def lighter_of_two(self, pool):
        """Position of the less loaded of two different workers drawn at random; a tie goes to the first drawn."""
        cdef Py_buffer view
        cdef const int32_t *workers
        cdef uint64_t n, a, b
        cdef int64_t load_a, load_b
        self.open_pool(pool, &view)
        workers = <const int32_t *>view.buf
        n = view.len // sizeof(int32_t)
        a = self.c_below(n)
        b = a
        if n > 1:
            b = self.c_below(n - 1)
            b += b >= a
        load_a = self.c_load(<uint64_t>workers[a], c_W_INFLIGHT_REQUESTS)
        load_b = self.c_load(<uint64_t>workers[b], c_W_INFLIGHT_REQUESTS)
        PyBuffer_Release(&view)
        if load_a < 0 or load_b < 0:
            raise IndexError(f"the pool names a worker outside 0..{self.max_workers - 1}")
        return b if load_b < load_a else a

    def count_below(self, pool, long long load):
        """How many workers of the pool have fewer than so many requests in flight."""
        cdef Py_buffer view
        cdef const int32_t *workers
        cdef int64_t found
        cdef uint64_t i, below = 0
        cdef bint is_outside = False
        self.open_pool(pool, &view)
        workers = <const int32_t *>view.buf
        for i in range(view.len // sizeof(int32_t)):
            found = self.c_load(<uint64_t>workers[i], c_W_INFLIGHT_REQUESTS)
            is_outside |= found < 0
            below += found < load
        PyBuffer_Release(&view)
        if is_outside:
            raise IndexError(f"the pool names a worker outside 0..{self.max_workers - 1}")
        return below
