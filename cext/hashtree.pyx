"""The KV index in shared memory: which rank owns which block. `TreeReader` for shards, `TreeWriter` for the index process.

Runs in: index (one TreeWriter, the only writer) and shards (TreeReader, on the request path). One call a request or event.
Contract: keys are n little-endian uint64 in one bytes-like object, leading block first. Ranks are 0..max_ranks-1, tiers are bits
    (device 1, host 2, disk 4). A block is owned while any tier bit is set. The law of readers and writer is in cext/sf_tree.h.
    A large rank is cleared in turns (`clear_some`); from the first on readers take it for no owner.
    The writer keeps privately, per rank, the keys it owns (so that clearing a rank does not scan the table), and the order in
    which blocks came (so that the oldest go first when the table is full). No call does more for these than a multiple of the
    keys that it is given: whoever waits for the writer waits for one turn of another's.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memset

import os

cimport cython
from sf_shm cimport *

DEVICE, HOST, DISK, ANY_TIER = 1, 2, 4, 7


cdef extern from "sf_tree.h" nogil:
    enum:
        SF_WRITE_KEYS

    ctypedef struct sf_table_t:
        char *slots
        sf_tree_t *tree
        uint64_t n_slots
        uint64_t stride
        uint64_t words

    void sf_table_init(sf_table_t *table, void *base) noexcept
    uint64_t sf_key_at(const void *keys, uint64_t i) noexcept
    uint64_t sf_home(const sf_table_t *table, uint64_t key) noexcept
    uint64_t *sf_slot(const sf_table_t *table, uint64_t i) noexcept
    uint64_t sf_next(const sf_table_t *table, uint64_t i) noexcept
    uint64_t *sf_find(const sf_table_t *table, uint64_t key) noexcept
    uint64_t sf_home(const sf_table_t *table, uint64_t key) noexcept
    void sf_prefetch(const sf_table_t *table, uint64_t key) noexcept
    void sf_write_gap(uint64_t *version) noexcept
    uint32_t sf_match(const sf_table_t *table, const void *keys, uint32_t n_keys, uint64_t tiers, uint32_t *overlaps,
                      uint32_t *touched, uint32_t *n_touched, int *is_torn) noexcept


cdef inline bint slot_has(const uint64_t *slot, uint64_t words, uint32_t rank, uint64_t tiers) noexcept nogil:
    cdef uint32_t tier
    for tier in range(SF_TIERS):
        if tiers >> tier & 1 and _sf_load(slot + 1 + tier * words + (rank >> 6)) >> (rank & 63) & 1:
            return True
    return False


cdef inline bint slot_is_ownerless(const uint64_t *slot, uint64_t words) noexcept nogil:
    cdef uint64_t i
    for i in range(SF_TIERS * words):
        if _sf_load(slot + 1 + i):
            return False
    return True


include "treereader.pxi"
include "treelogs.pxi"


@cython.final
cdef class TreeWriter:
    cdef sf_table_t table
    cdef object segment
    cdef key_log_t *ranks    # per rank: its keys, possibly stale or twice, see treelogs.pxi
    cdef uint64_t *owned     # per rank: keys with any tier bit
    cdef age_t *ages         # per slot, and one more: in which order the blocks came, see treelogs.pxi
    cdef uint32_t last_mark
    cdef uint32_t compacted  # the rank whose log is being compacted, if it has a mark
    cdef uint64_t capacity
    cdef uint64_t max_ranks
    cdef int pid

    def __cinit__(self, segment):
        self.segment = segment
        cdef void *base = <void *><uintptr_t>segment.address
        sf_table_init(&self.table, base)
        self.capacity = sf_header(base).tree_capacity_blocks
        self.max_ranks = sf_header(base).max_ranks
        self.pid = os.getpid()
        self.ranks = <key_log_t *>calloc(self.max_ranks, sizeof(key_log_t))
        self.owned = <uint64_t *>calloc(self.max_ranks, sizeof(uint64_t))
        self.ages = <age_t *>calloc(self.table.n_slots + 1, sizeof(age_t))
        if self.ranks == NULL or self.owned == NULL or self.ages == NULL:
            raise MemoryError
        ages_forget(self.ages, self.table.n_slots)

    def __dealloc__(self):
        cdef uint64_t rank
        if self.ranks != NULL:
            for rank in range(self.max_ranks):
                free(self.ranks[rank].keys)
        free(self.ranks)
        free(self.owned)
        free(self.ages)

    # ---- nogil layer: no Python object below, codes instead of exceptions ----

    cdef uint64_t c_index(self, const uint64_t *slot) noexcept nogil:
        return <uint64_t>(<const char *>slot - self.table.slots) // self.table.stride

    cdef void c_copy_slot(self, uint64_t target, uint64_t source) noexcept nogil:
        cdef uint64_t i
        cdef uint64_t *to_slot = sf_slot(&self.table, target)
        cdef uint64_t *from_slot = sf_slot(&self.table, source)
        for i in range(1 + SF_TIERS * self.table.words):
            _sf_store(to_slot + i, _sf_load(from_slot + i))
        ages_move(self.ages, target, source)

    cdef void c_prefetch(self, uint64_t key) noexcept nogil:
        sf_prefetch(&self.table, key)
        ages_prefetch(self.ages + sf_home(&self.table, key))

    cdef void c_delete(self, uint64_t hole) noexcept nogil:
        # Backward shift: pull every later key of the chain whose home lies at or before the hole into it.
        cdef uint64_t i = hole
        cdef uint64_t home
        cdef uint64_t n = self.table.n_slots
        cdef uint64_t word
        cdef uint64_t *slot
        ages_drop(self.ages, hole)
        while True:
            i = sf_next(&self.table, i)
            slot = sf_slot(&self.table, i)
            if _sf_load(slot) == 0:
                break
            home = sf_home(&self.table, _sf_load(slot))
            if (i + n - home) % n >= (i + n - hole) % n:
                self.c_copy_slot(hole, i)
                hole = i
        slot = sf_slot(&self.table, hole)
        for word in range(1 + SF_TIERS * self.table.words):
            _sf_store(slot + word, 0)
        _sf_store(&self.table.tree.live_blocks, _sf_load(&self.table.tree.live_blocks) - 1)

    cdef void c_evict_oldest(self) noexcept nogil:
        cdef uint64_t oldest = self.ages[self.table.n_slots].newer
        cdef uint64_t *slot = sf_slot(&self.table, oldest)
        cdef uint64_t word, owners, w
        cdef uint64_t words = self.table.words
        if oldest == self.table.n_slots:
            return
        for w in range(words):
            owners = 0
            for word in range(SF_TIERS):
                owners |= _sf_load(slot + 1 + word * words + w)
            while owners:
                self.owned[w * 64 + <uint64_t>__builtin_ctzll(owners)] -= 1
                owners &= owners - 1
        self.c_delete(oldest)
        _sf_add(&self.table.tree.evicted_total, 1)

    cdef long long c_store(self, uint32_t rank, uint32_t tier, const void *keys, uint64_t n_keys) noexcept nogil:
        cdef uint64_t i, key
        cdef uint64_t words = self.table.words
        cdef uint64_t *slot
        cdef uint64_t *word
        cdef long long added = 0
        cdef key_log_t *log = &self.ranks[rank]
        cdef sf_tree_t *tree = self.table.tree
        for i in range(n_keys):
            if i % SF_WRITE_KEYS == 0:
                if i:
                    sf_write_gap(&tree.version)
                # While the version is even: a chunk that has begun must not fail.
                if log_is_to_see_to(log) and log_see_to(self, rank):
                    _sf_add(&tree.stored_total, added)
                    return -1
                sf_write_begin(&tree.version)
            if i + 4 < n_keys:
                self.c_prefetch(sf_key_at(keys, i + 4))
            key = sf_key_at(keys, i)
            slot = sf_find(&self.table, key)
            if _sf_load(slot) == 0:
                if _sf_load(&tree.live_blocks) >= self.capacity:
                    self.c_evict_oldest()
                    slot = sf_find(&self.table, key)
                _sf_store(slot, key)
                _sf_add(&tree.live_blocks, 1)
                ages_add(self.ages, self.table.n_slots, self.c_index(slot))
            word = slot + 1 + tier * words + (rank >> 6)
            if _sf_load(word) >> (rank & 63) & 1:
                continue
            if not slot_has(slot, words, rank, 7):
                self.owned[rank] += 1
                log_push(log, key)
                added += 1
            _sf_store(word, _sf_load(word) | <uint64_t>1 << (rank & 63))
        if n_keys:
            sf_write_end(&tree.version)
        _sf_add(&tree.stored_total, added)
        return added

    cdef long long c_remove(self, uint32_t rank, uint32_t tiers, const void *keys, uint64_t n_keys) noexcept nogil:
        cdef uint64_t i, w
        cdef uint64_t words = self.table.words
        cdef uint64_t *slot
        cdef uint64_t *word
        cdef long long gone = 0
        cdef sf_tree_t *tree = self.table.tree
        for i in range(n_keys):
            if i % SF_WRITE_KEYS == 0:
                if i:
                    sf_write_gap(&tree.version)
                sf_write_begin(&tree.version)
            if i + 4 < n_keys:
                self.c_prefetch(sf_key_at(keys, i + 4))
            slot = sf_find(&self.table, sf_key_at(keys, i))
            if slot == NULL or _sf_load(slot) == 0 or not slot_has(slot, words, rank, 7):
                continue
            for w in range(SF_TIERS):
                if tiers >> w & 1:
                    word = slot + 1 + w * words + (rank >> 6)
                    _sf_store(word, _sf_load(word) & ~(<uint64_t>1 << (rank & 63)))
            if slot_has(slot, words, rank, 7):
                continue
            gone += 1
            self.owned[rank] -= 1
            if slot_is_ownerless(slot, words):
                self.c_delete(self.c_index(slot))
        if n_keys:
            sf_write_end(&tree.version)
        _sf_add(&tree.removed_total, gone)
        return gone

    cdef void c_forget(self) noexcept nogil:
        cdef uint64_t rank
        for rank in range(self.max_ranks):
            log_forget(&self.ranks[rank])
            self.owned[rank] = 0
        ages_forget(self.ages, self.table.n_slots)

    # ---- Python layer ----

    def _check(self, unsigned int rank):
        if rank >= self.max_ranks:
            raise ValueError(f"rank {rank} is outside 0..{self.max_ranks - 1}")
        if os.getpid() != self.pid:
            raise RuntimeError("a TreeWriter belongs to the process that made it: the tree has one writer")

    def reset(self):
        """Empty the whole tree: what a new index process does first, because it does not know what it missed."""
        self._check(0)
        # Nobody ever wrote at version 0, so all is zero: do not make the kernel back it with memory.
        cdef bint is_fresh = _sf_load(&self.table.tree.version) == 0
        sf_write_begin(&self.table.tree.version)
        if not is_fresh:
            memset(self.table.slots, 0, self.table.n_slots * self.table.stride)
        memset(self.table.tree.hidden, 0, sizeof(self.table.tree.hidden))
        _sf_store(&self.table.tree.live_blocks, 0)
        sf_write_end(&self.table.tree.version)
        _sf_add(&self.table.tree.generation, 1)
        self.c_forget()

    def adopt(self):
        """Take over what a killed writer left, repaired; returns the live blocks, or -1 when it is no sound tree (then `reset`).

        A rank that it was clearing is empty then. Cost: one pass over all slots. The blocks' age is lost: any go first when it is full.
        """
        cdef int code
        self._check(0)
        with nogil:
            code = 0
            # The version stays odd while slots are repaired, as the dead writer left it; an even one means that nothing is torn.
            if _sf_load(&self.table.tree.version) & 1:
                sf_write_begin(&self.table.tree.version)
                code = repair_slots(self)
                sf_write_end(&self.table.tree.version)
            if code == 0:
                code = -2 if rebuild_logs(self) else 0
            if code == 0:
                clear_hidden(self)
        if code == -2:
            raise MemoryError
        return -1 if code else self.live_blocks

    def store(self, unsigned int rank, unsigned int tier, keys):
        """`rank` now holds the blocks in `tier` (0 device, 1 host, 2 disk). Returns how many it did not own before."""
        cdef Py_buffer view
        self._check(rank)
        if tier >= SF_TIERS:
            raise ValueError(f"tier {tier} is outside 0..{SF_TIERS - 1}")
        PyObject_GetBuffer(keys, &view, PyBUF_SIMPLE)
        if view.len & 7:
            PyBuffer_Release(&view)
            raise ValueError(f"keys must be whole 8-byte words, not {view.len} bytes")
        cdef long long added = self.c_store(rank, tier, view.buf, view.len >> 3)
        PyBuffer_Release(&view)
        if added < 0:
            raise MemoryError
        return added

    def remove(self, unsigned int rank, unsigned int tiers, keys):
        """`rank` dropped the blocks from the tiers of the bit mask. Returns how many it does not own any more."""
        cdef Py_buffer view
        self._check(rank)
        PyObject_GetBuffer(keys, &view, PyBUF_SIMPLE)
        if view.len & 7:
            PyBuffer_Release(&view)
            raise ValueError(f"keys must be whole 8-byte words, not {view.len} bytes")
        cdef long long gone = self.c_remove(rank, tiers, view.buf, view.len >> 3)
        PyBuffer_Release(&view)
        return gone

    def clear(self, unsigned int rank):
        """`rank` holds nothing any more. Cost: its own blocks. Returns how many they were."""
        self._check(rank)
        return clear_turn(self, rank, <uint64_t>-1)

    def hide(self, unsigned int rank):
        """From now on `rank` is no owner for readers, until it has been cleared. Nothing may be stored there before."""
        self._check(rank)
        hide(self, rank, True)

    def clear_some(self, unsigned int rank, unsigned long long n_keys):
        """A turn of clearing a rank, 0.3 us a key: (blocks that it held, whether it holds nothing now). It is hidden until the last."""
        self._check(rank)
        gone = clear_turn(self, rank, n_keys)
        return gone, self.ranks[rank].count == 0

    def owns(self, unsigned int rank, keys):
        """One byte a key: 1 where `rank` owns the block in any tier, else 0."""
        cdef Py_buffer view
        cdef uint64_t i
        cdef uint64_t *slot
        cdef unsigned char *marks
        self._check(rank)
        PyObject_GetBuffer(keys, &view, PyBUF_SIMPLE)
        try:
            if view.len & 7:
                raise ValueError(f"keys must be whole 8-byte words, not {view.len} bytes")
            owned = bytearray(view.len >> 3)
            marks = owned
            for i in range(<uint64_t>view.len >> 3):
                slot = sf_find(&self.table, sf_key_at(view.buf, i))
                marks[i] = slot != NULL and _sf_load(slot) != 0 and slot_has(slot, self.table.words, rank, 7)
            return bytes(owned)
        finally:
            PyBuffer_Release(&view)

    def owned_blocks(self, unsigned int rank):
        """Blocks that `rank` owns in any tier."""
        self._check(rank)
        return self.owned[rank]

    @property
    def live_blocks(self):
        return _sf_load(&self.table.tree.live_blocks)


include "treeadopt.pxi"
include "treeclear.pxi"


cdef extern from *:
    int __builtin_ctzll(unsigned long long) noexcept nogil
