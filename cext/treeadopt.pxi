# Part of hashtree.pyx, which documents it: how a new writer takes over the tree of one that was killed.
#
# The dead writer may have left the version odd, inside one chunk of keys. What it can have left then, since a word is written whole and
# words in program order: a key without an owner (about to get one, or about to be deleted); a free slot with bits behind it (the
# end of a deletion); one key twice (the middle of a deletion, which copies a later slot over an earlier one): the later is the
# true one, the earlier a copy, perhaps half done. All else is as the law of sf_tree.h says. A chain that breaks this law was not
# left by a writer: then the tree is not taken over.


cdef int repair_slots(TreeWriter writer) noexcept nogil:
    """Make every slot either free and zero, or one reachable key with an owner. -1: this is no tree of ours."""
    cdef sf_table_t *table = &writer.table
    cdef uint64_t n_bits = SF_TIERS * table.words
    cdef uint64_t i = 0, w
    cdef uint64_t *slot
    cdef uint64_t *first
    while i < table.n_slots:
        slot = sf_slot(table, i)
        if _sf_load(slot) == 0:
            if not slot_is_ownerless(slot, table.words):
                for w in range(n_bits):
                    _sf_store(slot + 1 + w, 0)
            i += 1
            continue
        first = sf_find(table, _sf_load(slot))
        if first == NULL or _sf_load(first) == 0:
            return -1
        if first != slot:
            for w in range(n_bits):
                _sf_store(first + 1 + w, _sf_load(slot + 1 + w))
        elif not slot_is_ownerless(slot, table.words):
            i += 1
            continue
        writer.c_delete(i)  # and look at what came into this slot
    return 0


cdef int rebuild_logs(TreeWriter writer) noexcept nogil:
    """Fill the private logs from the table; the order in which blocks came is lost. -1: no memory."""
    cdef sf_table_t *table = &writer.table
    cdef uint64_t i, w, owners, tier, rank, live = 0
    cdef uint64_t *slot
    writer.c_forget()
    for i in range(table.n_slots):
        slot = sf_slot(table, i)
        if _sf_load(slot) == 0:
            continue
        live += 1
        ages_add(writer.ages, table.n_slots, i)
        for w in range(table.words):
            owners = 0
            for tier in range(SF_TIERS):
                owners |= _sf_load(slot + 1 + tier * table.words + w)
            while owners:
                rank = w * 64 + <uint64_t>__builtin_ctzll(owners)
                owners &= owners - 1
                if log_is_full(&writer.ranks[rank]) and log_grow(&writer.ranks[rank]):
                    return -1
                log_push(&writer.ranks[rank], _sf_load(slot))
                writer.owned[rank] += 1
    _sf_store(&table.tree.live_blocks, live)
    return 0
