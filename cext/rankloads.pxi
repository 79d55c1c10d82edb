# Load of data-parallel ranks, and the choice among those of one worker. Part of counters.pyx.
#
# Only requests that were steered count: nobody knows which rank gets the others. `rank` is one of the tree's.

L_INFLIGHT_REQUESTS = 0
L_INFLIGHT_TOKENS = 1  # uncached prompt tokens steered there and not yet answered by a first byte
# Why a rank was chosen.
RANK_HIT, RANK_LEAST, RANK_OVERLOADED = range(3)

cdef enum:
    c_RANK_HIT = 0
    c_RANK_LEAST = 1
    c_RANK_OVERLOADED = 2


@cython.final
cdef class RankLoads:
    """In-flight requests and tokens of ranks, summed over all shards, and the choice of one. IndexError for ranks outside the tree."""

    cdef void *base
    cdef object segment
    cdef uint64_t n_shards
    cdef uint64_t max_ranks
    cdef uint64_t stride_words
    cdef uint64_t *first
    cdef Loads loads

    def __cinit__(self, segment, Loads loads not None):
        self.segment = segment
        self.base = <void *><uintptr_t>segment.address
        self.n_shards = segment.max_shards
        self.max_ranks = segment.max_ranks
        self.first = sf_column_rank(sf_column(self.base, 0), segment.max_workers, 0)
        self.stride_words = sf_header(self.base).column_stride // 8
        self.loads = loads

    cdef int check(self, uint64_t rank, uint64_t count) except -1:
        if count == 0 or rank >= self.max_ranks or count > self.max_ranks - rank:
            raise IndexError(f"ranks {rank}..{rank + count - 1} are outside 0..{self.max_ranks - 1}")
        return 0

    cdef int64_t sum_of(self, uint64_t rank, uint64_t word) noexcept nogil:
        cdef uint64_t *words = self.first + rank * SF_LOAD_WORDS + word
        cdef int64_t total = 0
        cdef uint64_t shard
        for shard in range(self.n_shards):
            total += <int64_t>_sf_load(words + shard * self.stride_words)
        return total if total > 0 else 0

    def of(self, unsigned int rank):
        """(requests in flight, uncached prompt tokens in flight) of a rank."""
        self.check(rank, 1)
        return self.sum_of(rank, c_L_INFLIGHT_REQUESTS), self.sum_of(rank, c_L_INFLIGHT_TOKENS)

    def pick(self, unsigned int first, unsigned int count, overlaps, long long prompt_tokens, double enough_tokens,
             long long abs_threshold, double rel_threshold):
        """(rank, RANK_*) for a prompt, of the ranks first .. first + count - 1. overlaps: (rank, tokens) of those that hold some of it.

        A rank is overloaded when it has more than abs_threshold requests above, and more than rel_threshold times, the idlest's.
        Of those that are not: the longest overlap, if it is more than enough_tokens (RANK_HIT; among equals the fewest requests), else
        the least work before the first token, queued and own, then the fewest requests (RANK_LEAST). RANK_OVERLOADED: by the
        least work, too, because all that hold most, and enough of it, are overloaded. Ties at random.
        """
        cdef int64_t requests[SF_RANKS_MAX]
        cdef int64_t overlap[SF_RANKS_MAX]
        cdef int64_t low = -1, longest = 0
        cdef uint64_t i, choice
        cdef int why = c_RANK_LEAST
        self.check(first, count)
        for i in range(count):
            requests[i] = self.sum_of(first + i, c_L_INFLIGHT_REQUESTS)
            overlap[i] = 0
            if low < 0 or requests[i] < low:
                low = requests[i]
        for rank, tokens in overlaps:
            i = <uint64_t>(<long long>rank - <long long>first)
            if i >= count:
                raise IndexError(f"rank {rank} is outside {first}..{first + count - 1}")
            overlap[i] = tokens
            if overlap[i] > longest:
                longest = overlap[i]
        for i in range(count):
            if requests[i] - low > abs_threshold and requests[i] > low * rel_threshold:
                requests[i] = -1
        if longest > enough_tokens:
            choice = self.fewest_requests(requests, overlap, longest, count)
            if choice < count:
                return first + choice, c_RANK_HIT
            why = c_RANK_OVERLOADED
        return first + self.least_work(requests, overlap, first, count, prompt_tokens), why

    cdef uint64_t fewest_requests(self, int64_t *requests, int64_t *overlap, int64_t longest, uint64_t count) noexcept nogil:
        # Of those with the longest overlap; `count` when they are all overloaded (requests below 0).
        cdef uint64_t i, ties = 0, choice = count
        cdef int64_t fewest = -1
        for i in range(count):
            if overlap[i] != longest or requests[i] < 0:
                continue
            if fewest < 0 or requests[i] < fewest:
                fewest = requests[i]
                choice = i
                ties = 1
            elif requests[i] == fewest:
                ties += 1
                if self.loads.c_below(ties) == 0:
                    choice = i
        return choice

    cdef uint64_t least_work(self, int64_t *requests, int64_t *overlap, uint64_t first, uint64_t count,
                             int64_t prompt_tokens) noexcept nogil:
        # The idlest rank is never overloaded: there is one.
        cdef uint64_t i, ties = 0, choice = 0
        cdef int64_t work, least = -1, fewest = -1
        for i in range(count):
            if requests[i] < 0:
                continue
            work = self.sum_of(first + i, c_L_INFLIGHT_TOKENS)
            if prompt_tokens > overlap[i]:
                work += prompt_tokens - overlap[i]
            if least < 0 or work < least or (work == least and requests[i] < fewest):
                least = work
                fewest = requests[i]
                choice = i
                ties = 1
            elif work == least and requests[i] == fewest:
                ties += 1
                if self.loads.c_below(ties) == 0:
                    choice = i
        return choice
