# Part of hashtree.pyx, which documents it: clearing a rank in turns, between which others write.

cdef bint is_hidden(TreeWriter writer, uint64_t rank) noexcept nogil:
    return _sf_load(&writer.table.tree.hidden[rank >> 6]) >> (rank & 63) & 1


cdef void hide(TreeWriter writer, uint64_t rank, bint is_to_be) noexcept nogil:
    """Whether readers take the rank for no owner, whatever its bits say."""
    cdef sf_tree_t *tree = writer.table.tree
    cdef uint64_t *word = &tree.hidden[rank >> 6]
    cdef uint64_t bit = <uint64_t>1 << (rank & 63)
    if is_hidden(writer, rank) == is_to_be:
        return
    sf_write_begin(&tree.version)
    _sf_store(word, _sf_load(word) | bit if is_to_be else _sf_load(word) & ~bit)
    sf_write_end(&tree.version)


cdef long long clear_turn(TreeWriter writer, uint32_t rank, uint64_t n_keys) noexcept nogil:
    """Remove up to n_keys of the rank's blocks, the newest first; it is hidden as long as some are left. Returns how many it held."""
    cdef key_log_t *log = &writer.ranks[rank]
    cdef uint64_t n
    cdef long long gone = 0
    if n_keys < log_len(log):
        hide(writer, rank, True)
    while n_keys and log.count:
        n = min(n_keys, log.count - log.next)
        gone += writer.c_remove(rank, 7, log.keys + (log.count - n), n)
        log_shorten(log, n)
        n_keys -= n
    if writer.owned[rank] == 0:
        log_forget(log)  # what is left of it is stale
    if log.count == 0:
        hide(writer, rank, False)
    return gone


cdef void clear_hidden(TreeWriter writer) noexcept nogil:
    """End what a killed writer has begun."""
    cdef uint64_t rank
    for rank in range(writer.max_ranks):
        if is_hidden(writer, rank):
            clear_turn(writer, <uint32_t>rank, <uint64_t>-1)
