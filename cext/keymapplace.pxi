# Part of keymap.pyx, which documents it: the token route in one pass, from the bytes of a batch, or of a run of them, to runs of keys.


cdef extern from "sf_xxh3.h" nogil:
    int SF_XXH3_SECRET_BYTES
    void sf_xxh3_make_secret(uint8_t *secret, uint64_t seed) noexcept
    uint64_t sf_xxh3_keyed(
        uint64_t key, const void *data, size_t n, uint64_t seed, const uint8_t *secret, uint8_t *scratch
    ) noexcept

cdef extern from "sf_kvdecode.h" nogil:
    enum:
        SF_KV_OK
        SF_KV_UNUSUAL
        SF_KV_NO_MEMORY
        SF_KV_STORE
        SF_KV_REMOVE
        SF_KV_CLEAR
        SF_KV_SPEC_UNTOLD
        SF_KV_SPEC_OTHER
        SF_KV_DEVICE

    ctypedef struct sf_kv_run_t:
        uint32_t kind
        uint32_t tiers
        uint64_t start
        uint64_t count

    ctypedef struct sf_kv_event_t:
        uint32_t kind
        uint32_t tiers
        uint64_t start
        uint64_t count
        uint64_t parent
        uint64_t first_token
        uint64_t n_tokens
        int64_t group
        uint32_t block_size
        uint8_t has_parent
        uint8_t spec

    ctypedef struct sf_kv_t:
        const uint8_t *p
        const uint8_t *end
        uint64_t *keys
        uint64_t n_keys
        sf_kv_run_t *runs
        uint64_t n_runs
        uint64_t n_events
        int wants_tokens
        uint32_t *tokens
        sf_kv_event_t *events

    ctypedef struct sf_kv_mark_t:
        uint64_t n_events

    int sf_kv_batch(sf_kv_t *kv) noexcept
    sf_kv_mark_t sf_kv_mark(const sf_kv_t *kv) noexcept
    void sf_kv_undo(sf_kv_t *kv, const sf_kv_mark_t *mark) noexcept
    int sf_kv_run(sf_kv_t *kv, uint32_t kind, uint32_t tiers, uint64_t n_keys, uint64_t n_end) noexcept
    void sf_kv_free(sf_kv_t *kv) noexcept


cdef enum:
    c_UNTOLD_GROUP = -1


# What `place` makes of a batch or several, besides the runs of keys in its sf_kv_t.
cdef struct placed_t:
    uint64_t seed
    uint64_t block_size
    int64_t main_group       # c_UNTOLD_GROUP: 0 as long as no event tells another
    uint8_t *page            # room for a key and a page of token ids
    uint8_t secret[192]
    uint64_t n_keys          # keys made so far; they take the room of the hashes, of which there are never fewer
    uint64_t *removed        # known hashes that removals named
    uint64_t n_removed
    uint64_t max_removed
    uint64_t n_orphans
    uint64_t n_orphans_live  # since the last clear
    bint is_cleared


cdef inline bint is_main(const sf_kv_event_t *event, placed_t *placed) noexcept nogil:
    if event.group < 0:
        return True
    if event.kind == SF_KV_STORE and event.spec != SF_KV_SPEC_UNTOLD:
        if event.spec == SF_KV_SPEC_OTHER:
            if event.group == placed.main_group:
                placed.main_group = c_UNTOLD_GROUP
            return False
        if placed.main_group == c_UNTOLD_GROUP:
            placed.main_group = event.group
    return event.group == (0 if placed.main_group == c_UNTOLD_GROUP else placed.main_group)


cdef uint64_t chain_store(table_t *table, sf_kv_t *kv, const sf_kv_event_t *event, placed_t *placed) noexcept nogil:
    """Keys of a store's blocks from their tokens, chained to the parent's; returns how many, 0 for orphans."""
    cdef uint64_t i, hash_, key = 0
    cdef uint64_t n_bytes = 4 * placed.block_size
    cdef entry_t *parent
    if event.has_parent:
        parent = table_find(table, event.parent if event.parent else HASH_ZERO)
        if not parent.hash:
            return 0
        key = parent.key
    if event.n_tokens != event.count * placed.block_size:
        return 0
    for i in range(event.count):
        key = sf_xxh3_keyed(
            key, kv.tokens + event.first_token + i * placed.block_size, n_bytes, placed.seed, placed.secret, placed.page
        )
        hash_ = _hash_at(kv.keys, event.start + i)
        table_put(table, hash_, key)
        kv.keys[placed.n_keys + i] = key
    return event.count


cdef uint64_t resolve_names(table_t *table, sf_kv_t *kv, const sf_kv_event_t *event, placed_t *placed) noexcept nogil:
    """Keys of blocks that are known by their hashes; returns how many. Those of a removal are noted."""
    cdef uint64_t i, hash_, n_found = 0
    cdef entry_t *entry
    for i in range(event.count):
        hash_ = _word(kv.keys, event.start + i)
        entry = table_find(table, hash_ if hash_ else HASH_ZERO)
        if not entry.hash:
            continue
        kv.keys[placed.n_keys + n_found] = entry.key
        n_found += 1
        if event.kind == SF_KV_REMOVE:
            placed.removed[placed.n_removed] = hash_
            placed.n_removed += 1
    return n_found


cdef bint is_known_copy(table_t *table, const sf_kv_t *kv, const sf_kv_event_t *event) noexcept nogil:
    """Does a store outside the device name a known block? Then its names tell the keys, as in TokenRoute.place."""
    cdef uint64_t i, hash_
    for i in range(event.count):
        hash_ = _word(kv.keys, event.start + i)
        if table_find(table, hash_ if hash_ else HASH_ZERO).hash:
            return True
    return False


cdef int place_events(table_t *table, sf_kv_t *kv, placed_t *placed) noexcept nogil:
    """All events in order. Cannot fail but for memory: the batch was checked, and the map has room."""
    cdef uint64_t i, n_found
    cdef sf_kv_event_t *event
    for i in range(kv.n_events):
        event = &kv.events[i]
        n_found = 0
        if event.kind == SF_KV_CLEAR:
            table_clear(table)
            placed.n_orphans_live = 0
            placed.is_cleared = True
        elif not event.tiers or not is_main(event, placed):
            continue
        elif event.kind == SF_KV_STORE:
            if not event.n_tokens or (event.tiers != SF_KV_DEVICE and is_known_copy(table, kv, event)):
                n_found = resolve_names(table, kv, event, placed)
            else:
                n_found = chain_store(table, kv, event, placed)
            placed.n_orphans += event.count - n_found
            placed.n_orphans_live += event.count - n_found
        else:
            n_found = resolve_names(table, kv, event, placed)
        placed.n_keys += n_found
        if (n_found or event.kind == SF_KV_CLEAR) and sf_kv_run(kv, event.kind, event.tiers, n_found, placed.n_keys):
            return SF_KV_NO_MEMORY
    return SF_KV_OK


cdef int check_events(const sf_kv_t *kv, uint64_t first, placed_t *placed) noexcept nogil:
    """Look whether all events from `first` on are of the route's block size, and count what will be needed; 1 when one is not."""
    cdef uint64_t i
    for i in range(first, kv.n_events):
        if kv.events[i].kind == SF_KV_STORE and kv.events[i].n_tokens and kv.events[i].block_size != placed.block_size:
            return 1
    for i in range(first, kv.n_events):
        if kv.events[i].kind == SF_KV_REMOVE:
            placed.max_removed += kv.events[i].count
    return 0


cdef int decode_events(sf_kv_t *kv, placed_t *placed, const uint8_t *start, const uint8_t *end) noexcept nogil:
    """Add a batch's events, if all is usual; else nothing has changed."""
    cdef sf_kv_mark_t mark = sf_kv_mark(kv)
    cdef int code
    kv.p = start
    kv.end = end
    code = sf_kv_batch(kv)
    if code == SF_KV_OK and check_events(kv, mark.n_events, placed):
        code = SF_KV_UNUSUAL
    if code != SF_KV_OK:
        sf_kv_undo(kv, &mark)
    return code


cdef int decode_batches(sf_kv_t *kv, placed_t *placed, const batches_t *batches, uint64_t *n_done) noexcept nogil:
    """All that are usual, from the first one on; their events are one list then, as of one batch."""
    cdef uint64_t i
    cdef int code
    for i in range(batches.first, batches.count):
        code = decode_events(kv, placed, batches_start(batches, i), batches_start(batches, i + 1))
        if code == SF_KV_NO_MEMORY:
            return code
        if code != SF_KV_OK:
            break
        n_done[0] += 1
    return SF_KV_OK
