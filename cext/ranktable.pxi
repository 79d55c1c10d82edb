# State and counters of the ranks' event streams. Part of counters.pyx.

R_STATE = 0
R_LAST_SEQ = 1           # last applied sequence number + 1; 0 = none yet
R_BATCHES = 2
R_EVENTS = 3
R_BLOCKS_STORED = 4
R_BLOCKS_REMOVED = 5
R_GAPS = 6
R_DUPLICATES = 7
R_RESTARTS = 8
R_UNDECODED = 9
R_REPLAYS = 10
R_GIVE_UPS = 11
R_OWNED_BLOCKS = 12
R_LAST_EVENT_MS = 13     # wall clock
R_REASON = 14            # why the state is DEGRADED or BLIND: index into sglfast.shm.RANK_REASONS
R_GENERATION = 15        # generation of the worker that the row speaks of
R_ORPHANS = 16           # blocks of the token route left out because their place in the prompt is unknown
# What the next index process needs to go on with this rank's blocks (index/rank_note):
R_STREAM = 17            # hash of what makes the stream the one that was followed; 0 = the blocks belong to no stream
R_NEXT_SEQ = 18          # number of the batch that comes next, + 1; 0 = unknown
R_LAST_PRINT = 19        # hash of the batch before it
R_LOSS = 20              # 0 = every batch since the rank was empty has been applied, else as R_REASON
R_MAPPED_BLOCKS = 21     # blocks that only who has the map of their engine's hashes (cext/keymap) can remove
R_MAIN_GROUP = 22        # number of the main attention among a hybrid model's caches
R_MISSING = 23           # batches that are known to have been published and are not applied yet
RANK_BLIND, RANK_SYNCING, RANK_EXACT, RANK_DEGRADED = range(4)


@cython.final
cdef class RankTable:
    """State and counters of every rank's event stream; written by index alone."""

    cdef void *base
    cdef object segment
    cdef uint64_t max_ranks

    def __cinit__(self, segment):
        self.segment = segment
        self.base = <void *><uintptr_t>segment.address
        self.max_ranks = segment.max_ranks

    cdef uint64_t *row_of(self, uint64_t rank) except NULL:
        if rank >= self.max_ranks:
            raise IndexError(f"rank {rank} is outside 0..{self.max_ranks - 1}")
        return sf_rank(self.base, rank).words

    def set(self, unsigned int rank, unsigned int word, unsigned long long value):
        if word >= SF_RANK_WORDS:
            raise IndexError(f"no rank word {word}")
        sf_store(self.row_of(rank) + word, value)

    def get(self, unsigned int rank, unsigned int word):
        if word >= SF_RANK_WORDS:
            raise IndexError(f"no rank word {word}")
        return sf_load(self.row_of(rank) + word)

    def row(self, unsigned int rank):
        """All words of a rank as a list, in the order of the R_* constants."""
        cdef uint64_t *words = self.row_of(rank)
        return [sf_load(words + i) for i in range(SF_RANK_WORDS)]

    def clear(self, unsigned int rank):
        """All words to 0: the rank belongs to nobody."""
        cdef uint64_t *words = self.row_of(rank)
        for i in range(SF_RANK_WORDS):
            sf_store(words + <int>i, 0)
