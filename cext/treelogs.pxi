# Part of hashtree.pyx, which documents it: what the writer keeps of the blocks beside the table, in memory of its own.
#
# Age. The blocks are a ring in the order in which they came, linked from slot to slot; the place behind the last slot stands between
# the newest and the oldest. So the oldest one is known without a look at those that are gone, however many went at once.
#
# A rank's log. Its keys in the order in which it got them. What the rank loses stays in it, and is there twice when it comes back; when
# that is more than half, the log is compacted, c_COMPACT_KEYS places behind each chunk of SF_WRITE_KEYS keys that are stored. On
# the way it is two pieces, [0, kept) and [next, count); the places between them hold nothing. A key that was met already has the
# compaction's mark at its slot, so there is one compaction at a time: whoever waits for his own helps it on. A number is a mark again
# after 2**32 compactions, of which each one of this rank's would have given the slot another.

cdef enum:
    c_COMPACT_KEYS = 256  # 8 a key that is stored: over when a log has grown by a seventh


# Small and together: mostly one line of the processor's cache a block.
cdef struct age_t:
    uint32_t older
    uint32_t newer
    uint32_t mark  # of the compaction that met the block's key last


cdef struct key_log_t:
    uint64_t *keys
    uint64_t count
    uint64_t room
    uint64_t kept
    uint64_t next  # like `kept` 0 when nobody compacts
    uint32_t mark  # 0 when nobody compacts


cdef extern from *:
    void ages_prefetch "__builtin_prefetch"(const age_t *age) noexcept nogil


cdef inline void ages_forget(age_t *ages, uint64_t n_slots) noexcept nogil:
    ages[n_slots].older = ages[n_slots].newer = <uint32_t>n_slots


cdef inline void ages_add(age_t *ages, uint64_t n_slots, uint64_t i) noexcept nogil:
    """The block in slot i is the newest."""
    cdef uint32_t newest = ages[n_slots].older
    ages[i].older = newest
    ages[i].newer = <uint32_t>n_slots
    ages[i].mark = 0
    ages[newest].newer = <uint32_t>i
    ages[n_slots].older = <uint32_t>i


cdef inline void ages_drop(age_t *ages, uint64_t i) noexcept nogil:
    ages[ages[i].older].newer = ages[i].newer
    ages[ages[i].newer].older = ages[i].older


cdef inline void ages_move(age_t *ages, uint64_t target, uint64_t source) noexcept nogil:
    ages[target] = ages[source]
    ages[ages[target].older].newer = <uint32_t>target
    ages[ages[target].newer].older = <uint32_t>target


cdef inline bint log_is_full(const key_log_t *log) noexcept nogil:
    return log.count + SF_WRITE_KEYS > log.room


cdef inline bint log_is_to_see_to(const key_log_t *log) noexcept nogil:
    return log.count * 2 >= log.room or log.mark


cdef inline uint64_t log_len(const key_log_t *log) noexcept nogil:
    return log.count - (log.next - log.kept)


cdef inline void log_push(key_log_t *log, uint64_t key) noexcept nogil:
    log.keys[log.count] = key
    log.count += 1


cdef int log_grow(key_log_t *log) noexcept nogil:
    cdef uint64_t room = log.room * 2 if log.room else 256
    cdef uint64_t *keys = <uint64_t *>realloc(log.keys, room * sizeof(uint64_t))
    if keys == NULL:
        return -1
    log.keys = keys
    log.room = room
    return 0


cdef void log_forget(key_log_t *log) noexcept nogil:
    log.count = log.kept = log.next = 0
    log.mark = 0


cdef void log_shorten(key_log_t *log, uint64_t n) noexcept nogil:
    """The newest n keys are gone, at most those behind `next`."""
    log.count -= n
    if log.count == log.next:
        log.count = log.kept
        log.kept = log.next = 0
        log.mark = 0


cdef void log_compact(TreeWriter writer, uint32_t rank) noexcept nogil:
    """A turn of it."""
    cdef key_log_t *log = &writer.ranks[rank]
    cdef uint64_t end = min(log.count, log.next + c_COMPACT_KEYS)
    cdef uint64_t i, at
    cdef uint64_t *slot
    for i in range(log.next, end):
        if i + 8 < end:
            sf_prefetch(&writer.table, log.keys[i + 8])
        slot = sf_find(&writer.table, log.keys[i])
        if slot == NULL or _sf_load(slot) == 0 or not slot_has(slot, writer.table.words, rank, 7):
            continue
        at = writer.c_index(slot)
        if writer.ages[at].mark == log.mark:
            continue
        writer.ages[at].mark = log.mark
        log.keys[log.kept] = log.keys[i]
        log.kept += 1
    log.next = end
    log_shorten(log, 0)


cdef int log_see_to(TreeWriter writer, uint32_t rank) noexcept nogil:
    """Make room for one chunk in the rank's log, and compact a little where that is worth it. -1: no memory."""
    cdef key_log_t *log = &writer.ranks[rank]
    if writer.owned[rank] == 0:
        log_forget(log)
    elif log.count > 2 * writer.owned[rank] and writer.ranks[writer.compacted].mark == 0:
        writer.last_mark += 1
        writer.last_mark += writer.last_mark == 0
        writer.compacted = rank
        log.mark = writer.last_mark
    if writer.ranks[writer.compacted].mark:
        log_compact(writer, writer.compacted)
    return log_grow(log) if log_is_full(log) else 0
