"""Circuit breakers of the workers: one word each in shared memory, one state for all shards.

Runs in: shards (`version` on the request path; all else when a request fails, is a probe, or in the sweep), control (`state`,
    `release_shard`). States, transitions, the word and why several processes write it: cext/sf_breaker.h.
Contract: nothing here waits. Whatever lets a worker in or out of the selection moves `version`. A report that names another
    generation than the slot's changes nothing. Times are seconds of CLOCK_MONOTONIC, which all processes of a machine share.
"""

from libc.stdint cimport uint64_t, uintptr_t

cimport cython
from sf_breaker cimport *
from sf_shm cimport *

CLOSED, OPEN, HALF_OPEN = range(3)
SAME = SF_BREAKER_SAME
BUSY, CLAIMED, NEEDLESS = range(3)


cdef uint64_t ticks_of(double secs) noexcept nogil:
    return <uint64_t>(secs * SF_BREAKER_TICKS_PER_S) & SF_BREAKER_TICKS_MASK


cdef uint64_t span_of(double secs) noexcept nogil:
    cdef double ticks = secs * SF_BREAKER_TICKS_PER_S
    return SF_BREAKER_SPAN_MAX if ticks >= SF_BREAKER_SPAN_MAX else <uint64_t>ticks


@cython.final
cdef class Breakers:
    """shard: whose probes these are, -1 in control, which has none. Spans above 31 days count as 31 days."""

    cdef void *base
    cdef object segment
    cdef uint64_t max_workers
    cdef uint64_t prober
    cdef uint64_t failure_threshold
    cdef uint64_t success_threshold
    cdef uint64_t open_ticks
    cdef uint64_t window_ticks

    def __cinit__(self, segment, int shard=-1, *, unsigned long long failure_threshold=10, unsigned long long success_threshold=3,
                  double open_secs=60.0, double window_secs=120.0):
        if not -1 <= shard < segment.max_shards:
            raise ValueError(f"shard {shard} is outside -1..{segment.max_shards - 1}")
        if failure_threshold < 1 or success_threshold < 1 or not (open_secs >= 0.0 and window_secs >= 0.0):
            raise ValueError("thresholds must be at least 1, times at least 0")
        self.segment = segment
        self.base = <void *><uintptr_t>segment.address
        self.max_workers = segment.max_workers
        self.prober = shard + 1
        self.failure_threshold = failure_threshold
        # More good probes than can be counted would never close it.
        self.success_threshold = min(success_threshold, SF_BREAKER_COUNT_MAX)
        self.open_ticks = span_of(open_secs)
        self.window_ticks = span_of(window_secs)

    cdef uint64_t *word(self, uint64_t worker_idx) except NULL:
        if worker_idx >= self.max_workers:
            raise IndexError(f"worker {worker_idx} is outside 0..{self.max_workers - 1}")
        return sf_breaker(self.base, worker_idx)

    def version(self):
        """Moves whenever the worker table changes or a breaker lets a worker in or out."""
        # Both only grow, so their sum moves when one of them does.
        return sf_load(&sf_header(self.base).workers_version) + sf_load(&sf_header(self.base).breaker_epoch)

    def state(self, unsigned int worker_idx):
        """CLOSED, OPEN or HALF_OPEN."""
        return sf_breaker_unpack(sf_load(self.word(worker_idx))).state

    def is_selectable(self, unsigned int worker_idx):
        """May the worker be chosen: closed, or half-open while no probe is out."""
        return bool(sf_breaker_is_selectable(sf_load(self.word(worker_idx))))

    def claim(self, unsigned int worker_idx, unsigned long long generation):
        """Ask to be the half-open worker's probe: CLAIMED, BUSY (choose another worker), NEEDLESS (it is closed by now)."""
        cdef int answer = sf_breaker_claim(self.word(worker_idx), generation, self.prober)
        if answer == SF_BREAKER_CLAIMED:
            sf_breaker_announce(self.base)
        return answer

    def failed(self, unsigned int worker_idx, unsigned long long generation, bint is_probe, double now_s):
        """A request failed. is_probe: it is or was the probe. Returns OPEN when this opened the breaker, else SAME."""
        cdef int change = sf_breaker_failed(
            self.word(worker_idx), generation, is_probe, self.failure_threshold, self.window_ticks, ticks_of(now_s)
        )
        if change != SF_BREAKER_SAME:
            sf_breaker_announce(self.base)
        return change

    def succeeded(self, unsigned int worker_idx, unsigned long long generation, bint is_probe, double now_s):
        """A request succeeded. Returns CLOSED when this closed the breaker, HALF_OPEN when the next probe may go, else SAME."""
        cdef int change = sf_breaker_succeeded(
            self.word(worker_idx), generation, self.prober if is_probe else 0, self.success_threshold, ticks_of(now_s)
        )
        if change != SF_BREAKER_SAME:
            sf_breaker_announce(self.base)
        return change

    def release(self, unsigned int worker_idx):
        """This shard's probe ended without a verdict. Returns whether it had one."""
        if not sf_breaker_release(self.word(worker_idx), self.prober):
            return False
        sf_breaker_announce(self.base)
        return True

    def wake(self, unsigned int worker_idx, double now_s):
        """Half-open when its time is over. Returns whether this did it."""
        if not sf_breaker_wake(self.word(worker_idx), self.open_ticks, ticks_of(now_s)):
            return False
        sf_breaker_announce(self.base)
        return True

    def release_shard(self, int shard):
        """The shard is dead: give its probes back. Only while no process has the slot."""
        cdef uint64_t worker_idx
        if not 0 <= shard < self.segment.max_shards:
            raise IndexError(f"shard {shard} is outside 0..{self.segment.max_shards - 1}")
        for worker_idx in range(self.max_workers):
            sf_breaker_release(sf_breaker(self.base, worker_idx), shard + 1)
        # In any case: it may have died between a transition and its announcement.
        sf_breaker_announce(self.base)
