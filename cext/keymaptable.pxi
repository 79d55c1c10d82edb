# Part of keymap.pyx, which documents it: the table of pairs, and the law by which a killed writer leaves it.
#
# Every store is of one word and a release, which holds the compiler to the order written here: a key is there before its hash, and a
# hash is gone before its place gets another's key. So whatever moment a writer is killed at, each hash that stands in the table
# has its own key beside it. What a cut deletion can leave is one pair twice, or pairs behind a hole, where no probe finds them:
# memory_adopt looks for that.

# Hash 0 marks a free slot; a real hash 0 is kept as this one.
cdef uint64_t HASH_ZERO = 0x9e3779b97f4a7c15


cdef struct entry_t:
    uint64_t hash
    uint64_t key


cdef struct table_t:
    entry_t *slots
    uint64_t n_slots  # power of two
    uint64_t count


cdef inline uint64_t _word(const void *words, uint64_t i) noexcept nogil:
    cdef uint64_t value
    memcpy(&value, <const char *>words + 8 * i, 8)
    return value


cdef inline uint64_t _hash_at(const void *words, uint64_t i) noexcept nogil:
    cdef uint64_t value = _word(words, i)
    return value if value else HASH_ZERO


cdef inline uint64_t table_home(const table_t *table, uint64_t hash_) noexcept nogil:
    # Engine hashes are strong, but nothing obliges them to be.
    return hash_ * <uint64_t>0xd6e8feb86659fd93 >> 32 & table.n_slots - 1


cdef inline entry_t *table_find(const table_t *table, uint64_t hash_) noexcept nogil:
    """The entry of `hash_`, or the free one where it would go."""
    cdef uint64_t i = table_home(table, hash_)
    while table.slots[i].hash and table.slots[i].hash != hash_:
        i = i + 1 & table.n_slots - 1
    return &table.slots[i]


cdef inline void table_put(table_t *table, uint64_t hash_, uint64_t key) noexcept nogil:
    """`hash_` as `_hash_at` gives it; there must be room."""
    cdef entry_t *entry = table_find(table, hash_)
    sf_store(&entry.key, key)
    if not entry.hash:
        sf_store(&entry.hash, hash_)
        table.count += 1


cdef void table_delete(table_t *table, entry_t *entry) noexcept nogil:
    cdef uint64_t mask = table.n_slots - 1
    cdef uint64_t hole = entry - table.slots
    cdef uint64_t i = hole
    while True:
        i = i + 1 & mask
        if not table.slots[i].hash:
            break
        if (i - table_home(table, table.slots[i].hash) & mask) >= (i - hole & mask):
            sf_store(&table.slots[hole].hash, 0)
            sf_store(&table.slots[hole].key, table.slots[i].key)
            sf_store(&table.slots[hole].hash, table.slots[i].hash)
            hole = i
    sf_store(&table.slots[hole].hash, 0)
    table.count -= 1


cdef void table_clear(table_t *table) noexcept nogil:
    # No memset: it promises nothing about the order in which the bytes of a pair go.
    cdef uint64_t i
    for i in range(table.n_slots):
        sf_store(&table.slots[i].hash, 0)
    table.count = 0
