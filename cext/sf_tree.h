/* The hash tree: open addressing over the slots of shared memory (sf_shm.h). key -> one owner bitset per tier.
 *
 * A block key chains everything before it, so the prefix tree flattens into one table, and overlap of a rank = number of leading
 * keys that it owns without a hole. One writer (index); readers (shards) take no lock: the whole tree has one seqlock, the writer
 * holds it odd for at most SF_WRITE_KEYS keys at a time and then leaves a gap in which a walk fits (without it a store of
 * thousands of keys would shut readers out to its end), a reader that saw it move walks again. After SF_READ_TRIES walks it keeps
 * what it has: a stale hint, never a crash, because every index below is computed from the key and bounded by the slot count.
 * Deletion shifts the rest of the probe chain back (Knuth 6.4 R), so there are no tombstones and no litter.
 * A rank whose blocks are being cleared is hidden first: a walk takes it for no owner from then on, while its bits go in turns.
 * Key 0 marks an empty slot; a real key 0 is stored as SF_KEY_ZERO.
 */
#ifndef SF_TREE_H
#define SF_TREE_H

#include "sf_shm.h"

#define SF_KEY_ZERO UINT64_C(0x9e3779b97f4a7c15)
#define SF_WRITE_KEYS 32
#define SF_GAP_PAUSES 64 /* about 1 us on the machines of 2024; a walk of 128 keys takes 0.5 us */
#define SF_READ_TRIES 64
#define SF_ODD_SPINS 256

typedef struct {
    char *slots;
    sf_tree_t *tree;
    uint64_t n_slots;
    uint64_t stride;
    uint64_t words; /* 64-bit words a bitset */
} sf_table_t;

static inline void sf_table_init(sf_table_t *table, void *base) {
    table->slots = sf_slots(base);
    table->tree = sf_tree(base);
    table->n_slots = sf_header(base)->tree_slots;
    table->stride = sf_header(base)->tree_stride;
    table->words = sf_header(base)->max_ranks / 64;
}

/* Key i of a caller's buffer, which may begin at any address. */
static inline uint64_t sf_key_at(const void *keys, uint64_t i) {
    uint64_t key;
    memcpy(&key, (const char *)keys + i * sizeof key, sizeof key);
    return key ? key : SF_KEY_ZERO;
}
/* Keys are hashes already; the multiplication only spreads keys that a test or a weak engine hash makes alike. */
static inline uint64_t sf_home(const sf_table_t *table, uint64_t key) {
    return (uint64_t)(((unsigned __int128)(key * UINT64_C(0xd6e8feb86659fd93)) * table->n_slots) >> 64);
}
static inline uint64_t *sf_slot(const sf_table_t *table, uint64_t i) { return (uint64_t *)(table->slots + i * table->stride); }
static inline uint64_t sf_next(const sf_table_t *table, uint64_t i) { return ++i == table->n_slots ? 0 : i; }
static inline void sf_prefetch(const sf_table_t *table, uint64_t key) {
    __builtin_prefetch(sf_slot(table, sf_home(table, key)));
}

/* Slot of `key`, or the empty slot where it would go (slot[0] == 0 tells); `key` comes from sf_key_at. The scan is bounded,
 * so that a reader of a torn state comes back. */
static inline uint64_t *sf_find(const sf_table_t *table, uint64_t key) {
    uint64_t i = sf_home(table, key);
    for (uint64_t probes = 0; probes < table->n_slots; probes++, i = sf_next(table, i)) {
        uint64_t *slot = sf_slot(table, i);
        uint64_t seen = _sf_load(slot);
        if (seen == key || seen == 0) return slot;
    }
    return NULL;
}

/* One walk without looking at the seqlock. overlaps[rank] = leading keys owned in any tier of `tiers`; only ranks listed in
 * touched[0..*n_touched) are written, which the caller zeroes before the next walk. Returns the longest overlap. */
static inline uint32_t _sf_walk(const sf_table_t *table, const void *keys, uint32_t n_keys, uint64_t tiers,
                                uint32_t *overlaps, uint32_t *touched, uint32_t *n_touched) {
    uint64_t alive[SF_RANKS_MAX / 64];
    const uint64_t words = table->words;
    uint32_t depth = 0;
    *n_touched = 0;
    for (uint64_t w = 0; w < words; w++) alive[w] = ~_sf_load(&table->tree->hidden[w]);
    for (uint32_t i = 0; i < n_keys && i < 4; i++) sf_prefetch(table, sf_key_at(keys, i));
    for (; depth < n_keys; depth++) {
        if (depth + 4 < n_keys) sf_prefetch(table, sf_key_at(keys, depth + 4));
        const uint64_t *slot = sf_find(table, sf_key_at(keys, depth));
        if (!slot || _sf_load(slot) == 0) break;
        uint64_t any = 0;
        for (uint64_t w = 0; w < words; w++) {
            uint64_t owners = 0;
            for (uint32_t tier = 0; tier < SF_TIERS; tier++)
                if (tiers >> tier & 1) owners |= _sf_load(slot + 1 + tier * words + w);
            uint64_t was = alive[w];
            uint64_t now = was & owners;
            if (depth)
                for (uint64_t gone = was & ~now; gone; gone &= gone - 1) {
                    uint32_t rank = (uint32_t)(w * 64 + (uint64_t)__builtin_ctzll(gone));
                    overlaps[rank] = depth;
                    touched[(*n_touched)++] = rank;
                }
            alive[w] = now;
            any |= now;
        }
        if (!any) return depth;
    }
    if (depth)
        for (uint64_t w = 0; w < words; w++)
            for (uint64_t left = alive[w]; left; left &= left - 1) {
                uint32_t rank = (uint32_t)(w * 64 + (uint64_t)__builtin_ctzll(left));
                overlaps[rank] = depth;
                touched[(*n_touched)++] = rank;
            }
    return depth;
}

/* Writer, between two chunks of one call. */
static inline void sf_write_gap(uint64_t *version) {
    sf_write_end(version);
    for (int i = 0; i < SF_GAP_PAUSES; i++) sf_pause();
}

/* Consistent walk; *is_torn is set when the writer never held still long enough. */
static inline uint32_t sf_match(const sf_table_t *table, const void *keys, uint32_t n_keys, uint64_t tiers,
                                uint32_t *overlaps, uint32_t *touched, uint32_t *n_touched, int *is_torn) {
    uint32_t best = 0;
    for (int attempt = 0; attempt < SF_READ_TRIES; attempt++) {
        uint64_t before = sf_load(&table->tree->version);
        for (int spin = 0; before & 1 && spin < SF_ODD_SPINS; spin++) {
            sf_pause();
            before = sf_load(&table->tree->version);
        }
        for (uint32_t i = 0; attempt && i < *n_touched; i++) overlaps[touched[i]] = 0;
        best = _sf_walk(table, keys, n_keys, tiers, overlaps, touched, n_touched);
        sf_fence_acquire();
        if (!(before & 1) && _sf_load(&table->tree->version) == before) {
            *is_torn = 0;
            return best;
        }
        /* An odd version that does not move belongs to a writer that was killed or preempted: do not burn its core. */
        if (before & 1 && attempt >= 2 && _sf_load(&table->tree->version) == before) break;
    }
    *is_torn = 1;
    return best;
}
#endif
