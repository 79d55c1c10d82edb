"""Limits that hold over all shards without a lock: requests in flight, requests that wait, requests a second.

Runs in: shards. Theory: a shard announces first and counts then. It adds to its own word, a full fence, and sums the words of all
    shards; when the sum is above the limit it takes its own back. Of two shards that announce at once each sees the other, so the
    limit is never exceeded; both may step back where one could have stayed, so who is refused asks again soon. A dead shard's
    words vanish when control folds its column. The rate is one word, the time at which the bucket is full again (generic cell
    rate algorithm, ITU-T I.371), moved by compare-and-swap: the only word that all shards write. Its value is a time, so a shard that
    dies leaves nothing behind.
"""

from libc.math cimport ceil
from libc.stdint cimport int64_t, uint64_t, uintptr_t
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

cimport cython
from sf_shm cimport _sf_load, _sf_store, sf_column, sf_column_worker, sf_header


cdef extern from * nogil:
    """
    #define sf_fence_full() __atomic_thread_fence(__ATOMIC_SEQ_CST)
    static inline int sf_swap(uint64_t *word, uint64_t expected, uint64_t wanted) {
        return __atomic_compare_exchange_n(word, &expected, wanted, 0, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
    }
    """
    void sf_fence_full() noexcept
    int sf_swap(uint64_t *word, uint64_t expected, uint64_t wanted) noexcept

cdef enum:
    # Words of sglfast._counters; test_admission.py holds them against it.
    c_S_PERMITS = 48
    c_S_WAITING = 49
    c_S_WAITING_HEAD = 50
    c_W_WAITING_HEAD = 19


cdef uint64_t now_us() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <uint64_t>now.tv_sec * 1000000 + <uint64_t>now.tv_nsec // 1000


@cython.final
cdef class Limits:
    """One shard's hand on the limits of all.

    max_in_flight, max_waiting: requests over all shards; 0 in flight = no limit. rate_per_s, burst: requests; rate 0 = no limit.
    """

    cdef void *base
    cdef object segment
    cdef uint64_t *own
    cdef uint64_t *first
    cdef uint64_t n_shards
    cdef uint64_t stride_words
    cdef int64_t max_in_flight
    cdef int64_t max_waiting
    cdef uint64_t step_us
    cdef uint64_t burst_us

    def __cinit__(self, segment, int shard, *, long long max_in_flight, long long max_waiting, double rate_per_s, double burst):
        if not 0 <= shard < segment.max_shards:
            raise ValueError(f"shard {shard} is outside 0..{segment.max_shards - 1}")
        if max_in_flight < 0 or max_waiting < 0 or not 0 <= rate_per_s <= 1e6 or not 0 <= burst <= 1e9:
            raise ValueError("limits are 0 or more, a rate is at most a million a second")
        self.segment = segment
        self.base = <void *><uintptr_t>segment.address
        self.first = sf_column(self.base, 0)
        self.own = sf_column(self.base, shard)
        self.n_shards = segment.max_shards
        self.stride_words = sf_header(self.base).column_stride // 8
        self.max_in_flight = max_in_flight
        self.max_waiting = max_waiting
        self.step_us = <uint64_t>ceil(1e6 / rate_per_s) if rate_per_s else 0  # rounded so that the rate is never exceeded
        self.burst_us = <uint64_t>(self.step_us * max(burst, 1.0))

    cdef int64_t sum_of(self, int word) noexcept nogil:
        cdef int64_t total = 0
        cdef uint64_t shard
        for shard in range(self.n_shards):
            total += <int64_t>_sf_load(self.first + shard * self.stride_words + word)
        return total

    cdef bint announce(self, int word, int64_t limit) noexcept nogil:
        cdef uint64_t *mine = self.own + word
        _sf_store(mine, _sf_load(mine) + 1)
        sf_fence_full()
        if self.sum_of(word) <= limit:
            return True
        _sf_store(mine, _sf_load(mine) - 1)
        return False

    def take(self):
        """Begin a request; whether it may. What was taken is given back once."""
        if not self.max_in_flight:
            self.hold()  # counted all the same: a limit may come while it runs
        elif not self.announce(c_S_PERMITS, self.max_in_flight):
            return False
        if self.step_us and not self.spend():
            self.give_back()
            return False
        return True

    def has_room(self):
        """Whether a request could begin now; takes nothing."""
        if self.max_in_flight and self.sum_of(c_S_PERMITS) >= self.max_in_flight:
            return False
        cdef uint64_t now = now_us()
        cdef uint64_t due = _sf_load(&sf_header(self.base).rate_due_us)
        return not self.step_us or (due if due > now else now) + self.step_us <= now + self.burst_us

    cdef bint spend(self) noexcept nogil:
        cdef uint64_t *word = &sf_header(self.base).rate_due_us
        cdef uint64_t now = now_us()
        cdef uint64_t due, after
        while True:
            due = _sf_load(word)
            after = (due if due > now else now) + self.step_us
            if after > now + self.burst_us:
                # A debt that a whole burst does not pay was run up under other settings.
                if due <= now + self.burst_us or not sf_swap(word, due, now + self.burst_us):
                    return False
                continue
            if sf_swap(word, due, after):
                return True

    cpdef hold(self):
        """Count a request that runs already, whatever the limit."""
        cdef uint64_t *mine = self.own + c_S_PERMITS
        _sf_store(mine, _sf_load(mine) + 1)

    cpdef give_back(self):
        """A request that was begun is over."""
        cdef uint64_t *mine = self.own + c_S_PERMITS
        if <int64_t>_sf_load(mine) > 0:
            _sf_store(mine, _sf_load(mine) - 1)

    def line_up(self):
        """Begin to wait; whether there is room."""
        return self.announce(c_S_WAITING, self.max_waiting)

    def step_out(self):
        """Wait no longer."""
        cdef uint64_t *mine = self.own + c_S_WAITING
        if <int64_t>_sf_load(mine) > 0:
            _sf_store(mine, _sf_load(mine) - 1)

    def show_head(self, uint64_t order):
        """Tell the other shards the order of who waits first here; 0 = nobody."""
        _sf_store(self.own + c_S_WAITING_HEAD, order)

    def first_order(self):
        """The lowest order that waits in any shard; 0 = nobody waits."""
        cdef uint64_t lowest = 0, order, shard
        for shard in range(self.n_shards):
            order = _sf_load(self.first + shard * self.stride_words + c_S_WAITING_HEAD)
            if order and (lowest == 0 or order < lowest):
                lowest = order
        return lowest

    def show_line_head(self, uint64_t worker_idx, uint64_t order):
        """Tell the other shards the order of who waits first here for a worker of the pool whose first one this is; 0 = nobody."""
        _sf_store(self.line_head(self.own, worker_idx), order)

    def first_in_line(self, uint64_t worker_idx):
        """The lowest order that waits for such a worker in any shard; 0 = nobody waits."""
        cdef uint64_t lowest = 0, order, shard
        for shard in range(self.n_shards):
            order = _sf_load(self.line_head(self.first + shard * self.stride_words, worker_idx))
            if order and (lowest == 0 or order < lowest):
                lowest = order
        return lowest

    cdef uint64_t *line_head(self, uint64_t *column, uint64_t worker_idx) except NULL:
        if worker_idx >= sf_header(self.base).max_workers:
            raise ValueError(f"worker {worker_idx} is outside 0..{sf_header(self.base).max_workers - 1}")
        return sf_column_worker(column, worker_idx) + c_W_WAITING_HEAD

    @property
    def in_flight(self):
        """Requests in flight under the limit, over all shards."""
        return self.sum_of(c_S_PERMITS)

    @property
    def waiting(self):
        """Requests that wait, over all shards."""
        return self.sum_of(c_S_WAITING)
