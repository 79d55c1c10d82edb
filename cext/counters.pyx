"""Counters in shared memory: a column per shard (single writer), their sums, the loads that policies compare, rank states.

Runs in: shards (`Column` writes, `Loads` and `RankLoads` read on the request path), control (`Totals` reads, `retire` folds a dead
    shard's column away), index (`RankTable` writes).
Contract: a word is written by the one process that owns its column; totals are sums over all columns, so a reader may see a
    request in the middle of its begin, never a lost one. Gauges are the words listed in GAUGES_*, and all of ranks: they
    vanish with their shard, all other words move into the retired column. Loads counts a sum below zero as 0; Totals shows it as it is.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport int32_t, int64_t, uint64_t, uintptr_t

import os

cimport cython
from sf_breaker cimport SF_BREAKER_TROUBLE
from sf_shm cimport *

# Words of a worker in a shard's column.
W_INFLIGHT_REQUESTS = 0
W_INFLIGHT_TOKENS = 1     # uncached prompt tokens sent and not yet answered by a first byte
W_CONNECTIONS = 2
W_REQUESTS = 3
W_OK = 4
W_CLIENT_ERRORS = 5
W_BUSY = 6
W_ERRORS = 7
W_CANCELLED = 8
W_BYTES_OUT = 9
W_PROMPT_BLOCKS = 10
W_OVERLAP_BLOCKS = 11
W_CONNECT_ERRORS = 12
W_PARITY_EXACT = 13       # answers whose cached tokens were predicted, ...
W_PARITY_HIGH = 14        # ... were fewer than predicted, ...
W_PARITY_LOW = 15         # ... were more
W_BREAKER_OPENED = 16     # transitions of its breaker, by who made them
W_BREAKER_HALF_OPENED = 17
W_BREAKER_CLOSED = 18
W_WAITING_HEAD = 19       # order of who waits first in this shard for a worker of the pool whose first one this is; 0 = nobody
# Answers to requests that the worker's cache has overtaken: what was missing has come since the choice, what was there may have gone
W_PARITY_CAME = 20
W_PARITY_WENT = 21
W_RANK_REFUSED = 22       # answers that refuse a rank, to requests that were told one; control asks the worker what it is
# Of W_PARITY_LOW: the block that was missing has not come either, though later events have; ...
W_PARITY_UNTOLD = 23
# ... more is reported than any cache can have of the prompt, though its blocks are those that shards look up
W_PARITY_OVER = 24
# Words of the shard itself.
S_CONNECTIONS = 0
S_INFLIGHT = 1
S_CONNECTIONS_TOTAL = 2
S_REQUESTS = 3
S_BYTES_IN = 4
S_BYTES_OUT = 5
S_UPSTREAM_CONNECTS = 6
S_RESENDS = 8
S_CLIENT_GONE = 9
S_STREAMS_CUT = 10
S_RESPONSES_2XX = 11
S_RESPONSES_3XX = 12
S_RESPONSES_4XX = 13
S_RESPONSES_5XX = 14
S_UNUSUAL_HEADS = 15
S_PROMPTS_KEYED = 16
S_PROMPTS_UNKEYED = 17
S_PROMPT_TOKENS = 18
S_PREDICTED = 28          # choices of a worker that was believed to hold more than its events say
S_RETRIES = 19            # attempts beyond the first
S_RETRIES_EXHAUSTED = 20  # requests whose last attempt failed, of those that had more than one
S_STALE = 21
S_ABORTS = 22             # engines told to end a request
S_DECISIONS = 32          # 16 words, one per decision of the policies
# Of admission (cext/admission.pyx writes the first three)
S_PERMITS = 48            # requests that this shard has in flight under the limit
S_WAITING = 49            # requests that wait in this shard
S_WAITING_HEAD = 50       # order of the first of them; 0 = nobody waits
S_QUEUED = 51
S_QUEUE_WAIT_US = 52
S_LOG_LINES_LOST = 53     # request lines that nobody will read
# Why a decode worker was chosen for a prefill worker: it is on the same host, or that one's breaker or load was in the way
S_AFFINITY_SAME_HOST = 54
S_AFFINITY_BREAKER = 55
S_AFFINITY_LOAD = 56
S_BODY_BYTES = 57         # of request bodies that this shard holds
S_REASONS = 64            # 64 words, one per row of errors.REASONS
S_TTFT = 128              # histogram: buckets, then count and sum in microseconds
S_DURATION = 160
# Upper bounds in microseconds; the last bucket is unbounded. Aligned with SGLang's own TTFT buckets from 100 ms up.
BUCKETS_US = (
    1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 200_000, 400_000, 600_000, 800_000, 1_000_000, 2_000_000, 4_000_000,
    6_000_000, 8_000_000, 10_000_000, 20_000_000, 40_000_000, 60_000_000, 80_000_000, 100_000_000, 200_000_000, 400_000_000,
)
HISTOGRAM_BUCKETS = 25    # 24 bounds and the rest
GAUGES_WORKER = (W_INFLIGHT_REQUESTS, W_INFLIGHT_TOKENS, W_CONNECTIONS, W_WAITING_HEAD)
GAUGES_SHARD = (S_CONNECTIONS, S_INFLIGHT, S_PERMITS, S_WAITING, S_WAITING_HEAD, S_BODY_BYTES)

cdef enum:
    c_W_INFLIGHT_REQUESTS = 0
    c_W_INFLIGHT_TOKENS = 1
    c_W_REQUESTS = 3
    c_W_ERRORS = 7
    c_W_BYTES_OUT = 9
    c_L_INFLIGHT_REQUESTS = 0
    c_L_INFLIGHT_TOKENS = 1
    c_S_INFLIGHT = 1
    c_S_REQUESTS = 3
    c_S_BYTES_IN = 4
    c_S_BYTES_OUT = 5
    c_S_RESPONSES_2XX = 11
    c_S_DECISIONS = 32
    c_S_BODY_BYTES = 57
    c_S_TTFT = 128
    c_S_DURATION = 160
    c_BUCKETS = 24

cdef uint64_t c_bounds_us[24]
for _i, _bound in enumerate(BUCKETS_US):
    c_bounds_us[_i] = _bound


@cython.final
cdef class Column:
    """The counters of one shard, written by that shard alone."""

    def __cinit__(self, segment, int shard):
        if not 0 <= shard < segment.max_shards:
            raise ValueError(f"shard {shard} is outside 0..{segment.max_shards - 1}")
        self.segment = segment
        self.words = sf_column(<void *><uintptr_t>segment.address, shard)
        self.breakers = sf_breaker(<void *><uintptr_t>segment.address, 0)
        self.max_workers = segment.max_workers
        self.max_ranks = segment.max_ranks

    cdef uint64_t *worker(self, uint64_t worker_idx) except NULL:
        if worker_idx >= self.max_workers:
            raise IndexError(f"worker {worker_idx} is outside 0..{self.max_workers - 1}")
        return sf_column_worker(self.words, worker_idx)

    cpdef begin(self, unsigned int worker_idx, unsigned long long tokens, unsigned int decision, unsigned long long bytes_in=0):
        """A request of `bytes_in` body bytes was given to the worker with `tokens` uncached prompt tokens (0 = unknown)."""
        cdef uint64_t *words = self.worker(worker_idx)
        _sf_add(words + c_W_INFLIGHT_REQUESTS, 1)
        _sf_add(words + c_W_INFLIGHT_TOKENS, tokens)
        _sf_add(words + c_W_REQUESTS, 1)
        _sf_add(self.words + c_S_INFLIGHT, 1)
        _sf_add(self.words + c_S_REQUESTS, 1)
        _sf_add(self.words + c_S_BYTES_IN, bytes_in)
        if decision < 16:
            _sf_add(self.words + c_S_DECISIONS + decision, 1)

    cpdef answered(self, unsigned int status_class):
        """An answer's head goes to the client. status_class: first digit of the status."""
        if 2 <= status_class <= 5:
            _sf_add(self.words + c_S_RESPONSES_2XX - 2 + status_class, 1)

    cpdef prefilled(self, unsigned int worker_idx, unsigned long long tokens):
        """The first byte came: these prompt tokens are no load any more."""
        _sf_add(self.worker(worker_idx) + c_W_INFLIGHT_TOKENS, -tokens)

    cpdef bint end(self, unsigned int worker_idx, unsigned long long tokens, unsigned int outcome_word,
                   unsigned long long bytes_out) except -1:
        """The request left the worker; `tokens` are what `prefilled` did not take back.

        Returns whether the worker's breaker has to hear of it: the request failed, or the breaker is not closed and untroubled.
        """
        cdef uint64_t *words = self.worker(worker_idx)
        if outcome_word >= SF_WORKER_WORDS:
            raise IndexError(f"no outcome word {outcome_word}")
        _sf_add(words + c_W_INFLIGHT_REQUESTS, <uint64_t>-1)
        _sf_add(words + c_W_INFLIGHT_TOKENS, -tokens)
        _sf_add(words + outcome_word, 1)
        _sf_add(words + c_W_BYTES_OUT, bytes_out)
        _sf_add(self.words + c_S_INFLIGHT, <uint64_t>-1)
        _sf_add(self.words + c_S_BYTES_OUT, bytes_out)
        return outcome_word == c_W_ERRORS or (_sf_load(self.breakers + worker_idx) & SF_BREAKER_TROUBLE) != 0

    cdef uint64_t *rank(self, uint64_t rank) except NULL:
        if rank >= self.max_ranks:
            raise IndexError(f"rank {rank} is outside 0..{self.max_ranks - 1}")
        return sf_column_rank(self.words, self.max_workers, rank)

    cpdef begin_rank(self, unsigned int rank, unsigned long long tokens):
        """A request was steered to a rank of the tree, with `tokens` uncached prompt tokens (0 = unknown)."""
        cdef uint64_t *words = self.rank(rank)
        _sf_add(words + c_L_INFLIGHT_REQUESTS, 1)
        _sf_add(words + c_L_INFLIGHT_TOKENS, tokens)

    cpdef prefilled_rank(self, unsigned int rank, unsigned long long tokens):
        """The first byte came: these prompt tokens are no load of the rank any more."""
        _sf_add(self.rank(rank) + c_L_INFLIGHT_TOKENS, -tokens)

    cpdef end_rank(self, unsigned int rank, unsigned long long tokens):
        """A steered request left its rank; `tokens` are what `prefilled_rank` did not take back."""
        cdef uint64_t *words = self.rank(rank)
        _sf_add(words + c_L_INFLIGHT_REQUESTS, <uint64_t>-1)
        _sf_add(words + c_L_INFLIGHT_TOKENS, -tokens)

    cpdef long long hold_body(self, long long n_bytes):
        """So many bytes of request bodies are held more; negative: fewer. Returns how many are held now."""
        _sf_add(self.words + c_S_BODY_BYTES, <uint64_t>n_bytes)
        return <int64_t>_sf_load(self.words + c_S_BODY_BYTES)

    cpdef add(self, unsigned int word, long long n=1):
        """Add to a word of the shard (negative only for gauges)."""
        if word >= SF_SHARD_WORDS:
            raise IndexError(f"no shard word {word}")
        _sf_add(self.words + word, <uint64_t>n)

    cpdef add_worker(self, unsigned int worker_idx, unsigned int word, long long n=1):
        """Add to a word of a worker in this shard's column."""
        if word >= SF_WORKER_WORDS:
            raise IndexError(f"no worker word {word}")
        _sf_add(self.worker(worker_idx) + word, <uint64_t>n)

    cdef void count_in(self, uint64_t *words, uint64_t value_us) noexcept nogil:
        cdef int i = 0
        while i < c_BUCKETS and value_us > c_bounds_us[i]:
            i += 1
        _sf_add(words + i, 1)
        _sf_add(words + c_BUCKETS + 1, 1)
        _sf_add(words + c_BUCKETS + 2, value_us)

    cpdef observe(self, unsigned long long ttft_us, unsigned long long duration_us):
        """Count a good answer in the histograms of time to first body byte and of its whole time, in microseconds."""
        self.count_in(self.words + c_S_TTFT, ttft_us)
        self.count_in(self.words + c_S_DURATION, duration_us)

    def get(self, unsigned int word):
        """A word of this shard, for its own use."""
        if word >= SF_SHARD_WORDS:
            raise IndexError(f"no shard word {word}")
        return <int64_t>_sf_load(self.words + word)


include "loads.pxi"
include "rankloads.pxi"


@cython.final
cdef class Totals:
    """Sums over all columns, and the folding away of a dead shard. For control: nothing here is for the request path."""

    cdef void *base
    cdef object segment

    def __cinit__(self, segment):
        self.segment = segment
        self.base = <void *><uintptr_t>segment.address

    cdef list sums(self, uint64_t *words, uint64_t count):
        # Of so many words over all columns. words: where they begin in the first column; in the others they lie at the same place.
        cdef uint64_t columns = sf_header(self.base).max_shards + 1
        cdef uint64_t column, word, place = words - sf_column(self.base, 0)
        made = []
        for word in range(place, place + count):
            total = 0
            for column in range(columns):
                total += <int64_t>_sf_load(sf_column(self.base, column) + word)
            made.append(total)
        return made

    def shard(self):
        """The shard words, summed: a list of SF_SHARD_WORDS integers."""
        return self.sums(sf_column(self.base, 0), SF_SHARD_WORDS)

    def worker(self, unsigned int worker_idx):
        """The words of one worker, summed: a list of SF_WORKER_WORDS integers."""
        if worker_idx >= self.segment.max_workers:
            raise IndexError(f"worker {worker_idx} is outside 0..{self.segment.max_workers - 1}")
        return self.sums(sf_column_worker(sf_column(self.base, 0), worker_idx), SF_WORKER_WORDS)

    def rank(self, unsigned int rank):
        """[requests, tokens] in flight of a rank of the tree, as far as they were steered, summed."""
        if rank >= self.segment.max_ranks:
            raise IndexError(f"rank {rank} is outside 0..{self.segment.max_ranks - 1}")
        return self.sums(sf_column_rank(sf_column(self.base, 0), self.segment.max_workers, rank), SF_LOAD_WORDS)

    def retire(self, unsigned int shard):
        """Fold the column of a shard that is dead: its gauges vanish, its totals stay. Only while no process has the slot."""
        cdef uint64_t *words
        cdef uint64_t *retired
        cdef uint64_t worker_idx, word
        if shard >= self.segment.max_shards:
            raise IndexError(f"shard {shard} is outside 0..{self.segment.max_shards - 1}")
        words = sf_column(self.base, shard)
        retired = sf_column(self.base, self.segment.max_shards)
        for word in range(SF_SHARD_WORDS):
            if word not in GAUGES_SHARD:
                _sf_add(retired + word, _sf_load(words + word))
            _sf_store(words + word, 0)
        for worker_idx in range(self.segment.max_workers):
            words = sf_column_worker(sf_column(self.base, shard), worker_idx)
            retired = sf_column_worker(sf_column(self.base, self.segment.max_shards), worker_idx)
            for word in range(SF_WORKER_WORDS):
                if word not in GAUGES_WORKER:
                    _sf_add(retired + word, _sf_load(words + word))
                _sf_store(words + word, 0)
        words = sf_column_rank(sf_column(self.base, shard), self.segment.max_workers, 0)
        for word in range(self.segment.max_ranks * SF_LOAD_WORDS):  # gauges, all of them
            _sf_store(words + word, 0)


include "ranktable.pxi"
