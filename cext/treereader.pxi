# Part of hashtree.pyx, which documents it: the readers of the tree, in shards.


@cython.final
cdef class TreeReader:
    cdef sf_table_t table
    cdef object segment
    cdef uint32_t *overlaps
    cdef uint32_t *touched
    cdef uint32_t n_touched
    cdef uint64_t max_ranks
    cdef readonly unsigned long long torn_total

    def __cinit__(self, segment):
        self.segment = segment
        cdef void *base = <void *><uintptr_t>segment.address
        sf_table_init(&self.table, base)
        self.max_ranks = sf_header(base).max_ranks
        self.overlaps = <uint32_t *>calloc(self.max_ranks, sizeof(uint32_t))
        self.touched = <uint32_t *>calloc(self.max_ranks, sizeof(uint32_t))
        if self.overlaps == NULL or self.touched == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.overlaps)
        free(self.touched)

    def match(self, keys, unsigned int tiers=7):
        """Walk the prompt's keys; return the longest overlap in blocks. `hits` and `overlap` then tell it per rank."""
        cdef Py_buffer view
        cdef uint32_t i
        cdef int is_torn = 0
        PyObject_GetBuffer(keys, &view, PyBUF_SIMPLE)
        if view.len & 7 or view.len >> 3 > 0x7fffffff:
            PyBuffer_Release(&view)
            raise ValueError(f"keys must be whole 8-byte words, not {view.len} bytes")
        for i in range(self.n_touched):
            self.overlaps[self.touched[i]] = 0
        self.n_touched = 0
        cdef uint32_t best = sf_match(&self.table, view.buf, <uint32_t>(view.len >> 3), tiers,
                                      self.overlaps, self.touched, &self.n_touched, &is_torn)
        PyBuffer_Release(&view)
        self.torn_total += is_torn
        return best

    def hits(self):
        """Ranks with any overlap in the last match, as a list of (rank, overlap_blocks), in no order."""
        cdef uint32_t i
        return [(self.touched[i], self.overlaps[self.touched[i]]) for i in range(self.n_touched)]

    def overlap(self, unsigned int rank):
        """Overlap of one rank in the last match, in blocks."""
        return self.overlaps[rank] if rank < self.max_ranks else 0

    def stats(self):
        """live_blocks, capacity_blocks, stored, removed, evicted (totals) and generation of the tree."""
        cdef sf_tree_t *tree = self.table.tree
        return {
            "live_blocks": sf_load(&tree.live_blocks),
            "capacity_blocks": self.segment.capacity_blocks,
            "stored_total": sf_load(&tree.stored_total),
            "removed_total": sf_load(&tree.removed_total),
            "evicted_total": sf_load(&tree.evicted_total),
            "generation": sf_load(&tree.generation),
        }
