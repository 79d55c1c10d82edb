/* Predictions: which rank was routed a prompt's beginning that no event has confirmed, or ever will. Keys are of sf_prompttext.h.
 *
 *   shard --ring--> index --> sets (shared) --> all shards        each shard also keeps its own last ones, until index has them
 *
 *   set = | key x 8 | touched_ms x 8 | flight, kept: a bitset of ranks each, x 8 |     no chains: a key is in its set or nowhere
 *
 *   flight   a request with this beginning is on its way to the rank's first token; not believed after SF_FLIGHT_MS without another
 *   kept     the rank has computed it. Of ranks without events for good, until it is the oldest; of others until their events are here
 *
 * One writer (index), readers take no lock: a way that changes its key shows 0 meanwhile, and a reader that finds its key looks again
 * behind the owners. At worst it loses a hint. A full set drops its oldest key, so nothing grows and nothing moves, and what a
 * killed writer leaves is a table as good as before.
 * A ring has one producer and one consumer. A record is | op, rank, number of keys | generation | keys |, visible when `head` moves: a
 * producer killed in its middle leaves nothing. One that finds no room is dropped and counted: a lost hint.
 */
#ifndef SF_PREDICTED_H
#define SF_PREDICTED_H

#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "sf_prompttext.h"
#include "sf_shm.h"

#define SF_FLIGHT_MS 60000u /* longer than almost any wait for a first token */
#define SF_RECENT_MS 100u   /* a shard's own: index has it long before */
#define SF_RECENT_SETS 64u  /* 512 keys: the last ten prompts */
#define SF_RECORD_WORDS (2u + SF_TEXT_KEYS_MAX)

enum { SF_FLIGHT = 0, SF_KEPT = 1 }; /* kinds: positions of the bitsets */
enum { SF_OP_SENT = 1, SF_OP_KEEP = 2, SF_OP_SETTLED = 3 };

typedef struct {
    char *sets;
    uint64_t n_sets;
    uint64_t set_bytes;
    uint64_t words;       /* 64-bit words a bitset */
    uint64_t kept_ms;     /* how long `kept` is believed; ~0 = for good */
    uint64_t flight_ms;
} sf_predicted_t;

static inline void sf_predicted_init(sf_predicted_t *table, void *base) {
    table->sets = (char *)base + sf_header(base)->sets_offset;
    table->n_sets = sf_header(base)->prediction_sets;
    table->set_bytes = sf_header(base)->prediction_set_bytes;
    table->words = sf_header(base)->max_ranks / 64;
    table->kept_ms = ~UINT64_C(0);
    table->flight_ms = SF_FLIGHT_MS;
}

/* The machine's clock since its start, one for all processes; resolution some milliseconds. */
static inline uint64_t sf_coarse_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
    return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

static inline uint64_t *sf_pset(const sf_predicted_t *table, uint64_t key) {
    return (uint64_t *)(table->sets + (uint64_t)(((unsigned __int128)key * table->n_sets) >> 64) * table->set_bytes);
}
static inline uint64_t *sf_pbits(const sf_predicted_t *table, uint64_t *set, int way, int kind) {
    return set + 2 * SF_WAYS + (uint64_t)(2 * way + kind) * table->words;
}
static inline int sf_pway(const uint64_t *set, uint64_t key) {
    for (int way = 0; way < (int)SF_WAYS; way++)
        if (sf_load(set + way) == key) return way;
    return -1;
}

/* OR the owners of a key into owners[words]; *in_flight likewise, when not NULL. */
static inline void sf_powners(const sf_predicted_t *table, uint64_t key, uint64_t now_ms, uint64_t *owners, uint64_t *in_flight) {
    uint64_t *set = sf_pset(table, key), found[SF_RANKS_MAX / 64], flying[SF_RANKS_MAX / 64];
    int way = sf_pway(set, key);
    if (way < 0) return;
    uint64_t touched_ms = _sf_load(set + SF_WAYS + way), age_ms = now_ms > touched_ms ? now_ms - touched_ms : 0;
    const uint64_t is_kept = -(uint64_t)(age_ms <= table->kept_ms), is_flying = -(uint64_t)(age_ms <= table->flight_ms);
    for (uint64_t w = 0; w < table->words; w++) {
        flying[w] = sf_load(sf_pbits(table, set, way, SF_FLIGHT) + w) & is_flying;
        found[w] = flying[w] | (sf_load(sf_pbits(table, set, way, SF_KEPT) + w) & is_kept);
    }
    if (_sf_load(set + way) != key) return; /* another key came in between: these may be its owners */
    for (uint64_t w = 0; w < table->words; w++) {
        owners[w] |= found[w];
        if (in_flight) in_flight[w] |= flying[w];
    }
}

/* As _sf_walk of sf_tree.h, over both tables: counts[rank] = leading keys that were routed to it. Returns the largest. */
static inline uint32_t sf_pmatch(const sf_predicted_t *shared, const sf_predicted_t *recent, const void *keys, uint32_t n_keys,
                                 uint64_t now_ms, uint32_t *counts, uint32_t *touched, uint32_t *n_touched) {
    uint64_t alive[SF_RANKS_MAX / 64], owners[SF_RANKS_MAX / 64];
    const uint64_t words = shared->words;
    uint32_t depth = 0;
    *n_touched = 0;
    for (;; depth++) {
        uint64_t any = 0;
        memset(owners, 0, words * 8);
        if (depth < n_keys) {
            uint64_t key;
            memcpy(&key, (const char *)keys + 8 * depth, 8);
            sf_powners(shared, key, now_ms, owners, NULL);
            sf_powners(recent, key, now_ms, owners, NULL);
        }
        for (uint64_t w = 0; w < words; w++) {
            uint64_t now = depth ? alive[w] & owners[w] : owners[w];
            if (depth)
                for (uint64_t gone = alive[w] & ~now; gone; gone &= gone - 1) {
                    uint32_t rank = (uint32_t)(w * 64 + (uint64_t)__builtin_ctzll(gone));
                    counts[rank] = depth;
                    touched[(*n_touched)++] = rank;
                }
            alive[w] = now;
            any |= now;
        }
        if (!any) return depth;
    }
}

/* ---- the writer of a table ---- */

static inline int sf_pis_free(const sf_predicted_t *table, uint64_t *set, int way) {
    uint64_t any = 0;
    for (uint64_t w = 0; w < 2 * table->words; w++) any |= _sf_load(sf_pbits(table, set, way, SF_FLIGHT) + w);
    return !any;
}

/* Note a rank as owner of a key. Returns 1 when another key had to go for it. */
static inline int sf_padd(const sf_predicted_t *table, uint64_t key, uint32_t rank, int kind, uint64_t now_ms) {
    uint64_t *set = sf_pset(table, key), *bits;
    int way = sf_pway(set, key), evicted = 0;
    if (way < 0) {
        way = 0;
        for (int i = 0; i < (int)SF_WAYS; i++) {
            if (!_sf_load(set + i)) {
                way = i;
                break;
            }
            if (_sf_load(set + SF_WAYS + i) < _sf_load(set + SF_WAYS + way)) way = i;
        }
        evicted = _sf_load(set + way) != 0;
        sf_store(set + way, 0);
        for (uint64_t w = 0; w < 2 * table->words; w++) sf_store(sf_pbits(table, set, way, SF_FLIGHT) + w, 0);
        _sf_store(set + SF_WAYS + way, now_ms);
        sf_store(set + way, key);
    } else _sf_store(set + SF_WAYS + way, now_ms);
    bits = sf_pbits(table, set, way, kind) + (rank >> 6);
    sf_store(bits, _sf_load(bits) | UINT64_C(1) << (rank & 63));
    return evicted;
}

/* The rank owns the key no more in this way. */
static inline void sf_pdrop_way(const sf_predicted_t *table, uint64_t *set, int way, uint32_t rank, int kind) {
    uint64_t *bits = sf_pbits(table, set, way, kind) + (rank >> 6), bit = UINT64_C(1) << (rank & 63);
    if (!(_sf_load(bits) & bit)) return;
    sf_store(bits, _sf_load(bits) & ~bit);
    if (sf_pis_free(table, set, way)) sf_store(set + way, 0);
}
static inline void sf_pdrop(const sf_predicted_t *table, uint64_t key, uint32_t rank, int kind) {
    uint64_t *set = sf_pset(table, key);
    int way = sf_pway(set, key);
    if (way >= 0) sf_pdrop_way(table, set, way, rank, kind);
}
/* The first token is there: what was in flight is computed. Keeps the key's time: no new request came. */
static inline void sf_psettle(const sf_predicted_t *table, uint64_t key, uint32_t rank) {
    uint64_t *set = sf_pset(table, key), *bits;
    int way = sf_pway(set, key);
    if (way < 0) return;
    bits = sf_pbits(table, set, way, SF_KEPT) + (rank >> 6);
    sf_store(bits, _sf_load(bits) | UINT64_C(1) << (rank & 63));
    sf_pdrop_way(table, set, way, rank, SF_FLIGHT);
}

/* ---- rings ---- */

static inline uint64_t *sf_ring_word(sf_ring_t *ring, uint64_t at) { return (uint64_t *)(ring + 1) + at % SF_RING_WORDS; }

/* 0, or -1 when there is no room: then the record is counted as dropped. */
static inline int sf_ring_push(sf_ring_t *ring, int op, uint32_t rank, uint64_t generation, const void *keys, uint32_t n_keys) {
    uint64_t head = _sf_load(&ring->head);
    if (head + 2 + n_keys - sf_load(&ring->tail) > SF_RING_WORDS) {
        _sf_add(&ring->dropped_total, 1);
        return -1;
    }
    _sf_store(sf_ring_word(ring, head), (uint64_t)op << 56 | (uint64_t)rank << 32 | n_keys);
    _sf_store(sf_ring_word(ring, head + 1), generation);
    for (uint32_t i = 0; i < n_keys; i++) {
        uint64_t key;
        memcpy(&key, (const char *)keys + 8 * i, 8);
        _sf_store(sf_ring_word(ring, head + 2 + i), key);
    }
    sf_store(&ring->head, head + 2 + n_keys);
    return 0;
}

/* Words of the next record, copied into record[SF_RECORD_WORDS], which the reader then owns: 0 = there is none, -1 = the ring holds
 * something that no producer writes, and is emptied. */
static inline int sf_ring_pop(sf_ring_t *ring, uint64_t *record) {
    uint64_t head = sf_load(&ring->head), tail = _sf_load(&ring->tail);
    if (head == tail) return 0;
    uint64_t n_words = 2 + (_sf_load(sf_ring_word(ring, tail)) & 0xffffffff);
    if (head - tail > SF_RING_WORDS || n_words > SF_RECORD_WORDS || n_words > head - tail) {
        sf_store(&ring->tail, head);
        return -1;
    }
    for (uint64_t i = 0; i < n_words; i++) record[i] = _sf_load(sf_ring_word(ring, tail + i));
    return (int)n_words;
}
static inline void sf_ring_popped(sf_ring_t *ring, uint64_t n_words) { sf_store(&ring->tail, _sf_load(&ring->tail) + n_words); }

/* ---- the doorbell: index sleeps on it, a shard that has put something into its ring rings ---- */

static inline void sf_ring_doorbell(sf_predictions_t *shared) {
    __atomic_thread_fence(__ATOMIC_SEQ_CST); /* either index sees the new head, or this sees that it sleeps */
    if (_sf_load(&shared->doorbell) && __atomic_exchange_n(&shared->doorbell, 0, __ATOMIC_SEQ_CST))
        syscall(SYS_futex, (uint32_t *)&shared->doorbell, FUTEX_WAKE, 1, NULL, NULL, 0);
}
/* Sleep until somebody rings, or for the time given. has_work: looked at once more, between saying that we sleep and doing so. */
static inline void sf_await_doorbell(sf_predictions_t *shared, uint64_t timeout_ms, int (*has_work)(void *), void *of) {
    struct timespec timeout = {(time_t)(timeout_ms / 1000), (long)(timeout_ms % 1000) * 1000000};
    __atomic_exchange_n(&shared->doorbell, 1, __ATOMIC_SEQ_CST);
    if (!has_work(of)) syscall(SYS_futex, (uint32_t *)&shared->doorbell, FUTEX_WAIT, 1, &timeout, NULL, 0);
    __atomic_exchange_n(&shared->doorbell, 0, __ATOMIC_SEQ_CST);
}
#endif
