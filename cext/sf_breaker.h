/* The circuit breaker of a worker: one word in shared memory, written by every shard and by control.
 *
 *   bits  0..1   state         closed, open, half-open
 *   bits  2..13  count         closed: failures in a row; half-open: good probes in a row
 *   bits 14..24  prober        half-open: 1 + the shard whose request is the probe; 0 = nobody's
 *   bits 25..34  generation    low bits of the worker slot's: a report on a worker that was removed changes nothing
 *   bits 35..63  since         ticks of 10 ms of CLOCK_MONOTONIC, modulo 62 days: closed: the first failure of the row; else the transition
 *
 * Why not one writer per word, as everything else: whether a failure opens the breaker depends on what the other shards have just
 * seen, and of all shards only one may send the probe. A process that gathered their words would answer a tick too late for both.
 * So each transition is one compare-and-swap of the whole word: no shard waits for another, and one that is killed leaves either
 * the old word or the new one. What it may leave behind is its probe: control takes that back (sf_breaker_release).
 *
 *   closed     -- failure_threshold failures in a row, all within the window -->  open
 *   open       -- after its time, or when health checks take the worker in -->    half-open
 *   half-open  -- success_threshold good probes, one at a time -->                closed
 *   half-open  -- a probe fails -->                                               open
 *
 * A worker may be chosen when it is closed, or half-open and nobody's probe is out. Whatever changes that moves `breaker_epoch` of
 * the header, so that shards see it with the one load by which they follow the worker table.
 */
#ifndef SF_BREAKER_H
#define SF_BREAKER_H

#include "sf_shm.h"

enum { SF_BREAKER_CLOSED = 0, SF_BREAKER_OPEN = 1, SF_BREAKER_HALF_OPEN = 2 };
enum { SF_BREAKER_SAME = -1 }; /* no transition, and nothing that the selection has to know */
enum { SF_BREAKER_BUSY = 0, SF_BREAKER_CLAIMED = 1, SF_BREAKER_NEEDLESS = 2 };

#define SF_BREAKER_COUNT_MAX UINT64_C(4095)
#define SF_BREAKER_PROBER_MAX UINT64_C(2047)
#define SF_BREAKER_GENERATION_MASK UINT64_C(1023)
#define SF_BREAKER_TICKS_MASK ((UINT64_C(1) << 29) - 1)
#define SF_BREAKER_TICKS_PER_S 100
/* Spans are half of the clock's circle at most. */
#define SF_BREAKER_SPAN_MAX (UINT64_C(1) << 28)
/* State and count: 0 = closed, and no failure is remembered. */
#define SF_BREAKER_TROUBLE UINT64_C(0x3fff)

_Static_assert(SF_SHARDS_MAX < SF_BREAKER_PROBER_MAX, "a shard's number fits the prober's bits");

typedef struct {
    uint64_t state, count, prober, generation, since;
} sf_breaker_t;

static inline sf_breaker_t sf_breaker_unpack(uint64_t word) {
    sf_breaker_t breaker = {word & 3, word >> 2 & SF_BREAKER_COUNT_MAX, word >> 14 & SF_BREAKER_PROBER_MAX,
                            word >> 25 & SF_BREAKER_GENERATION_MASK, word >> 35};
    return breaker;
}

static inline uint64_t sf_breaker_pack(sf_breaker_t breaker) {
    return breaker.state | breaker.count << 2 | breaker.prober << 14 | breaker.generation << 25 | breaker.since << 35;
}

static inline int _sf_breaker_swap(uint64_t *word, uint64_t *old, sf_breaker_t next) {
    return __atomic_compare_exchange_n(word, old, sf_breaker_pack(next), 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
}

static inline uint64_t _sf_breaker_elapsed(uint64_t since, uint64_t now) { return (now - since) & SF_BREAKER_TICKS_MASK; }

static inline int sf_breaker_is_selectable(uint64_t word) {
    sf_breaker_t breaker = sf_breaker_unpack(word);
    return breaker.state == SF_BREAKER_CLOSED || (breaker.state == SF_BREAKER_HALF_OPEN && !breaker.prober);
}

/* A new worker in the slot: closed. Control alone. */
static inline void sf_breaker_reset(uint64_t *word, uint64_t generation) {
    sf_breaker_t breaker = {0, 0, 0, generation & SF_BREAKER_GENERATION_MASK, 0};
    sf_store(word, sf_breaker_pack(breaker));
}

/* A request failed. is_probe: it is or was the half-open worker's probe. Returns SF_BREAKER_OPEN when this opened it. */
static inline int sf_breaker_failed(uint64_t *word, uint64_t generation, int is_probe, uint64_t threshold, uint64_t window,
                                    uint64_t now) {
    uint64_t old = sf_load(word);
    for (;;) {
        sf_breaker_t next = sf_breaker_unpack(old);
        if (next.generation != (generation & SF_BREAKER_GENERATION_MASK) || next.state == SF_BREAKER_OPEN) return SF_BREAKER_SAME;
        if (next.state == SF_BREAKER_HALF_OPEN) {
            if (!is_probe) return SF_BREAKER_SAME; /* it was sent before: no news */
            next.state = SF_BREAKER_OPEN;
        } else {
            if (!next.count || _sf_breaker_elapsed(next.since, now) > window) {
                next.count = 0;
                next.since = now;
            }
            next.count += next.count < SF_BREAKER_COUNT_MAX;
            if (next.count >= threshold) next.state = SF_BREAKER_OPEN;
        }
        if (next.state == SF_BREAKER_OPEN) {
            next.count = next.prober = 0;
            next.since = now;
        }
        if (_sf_breaker_swap(word, &old, next)) return next.state == SF_BREAKER_OPEN ? SF_BREAKER_OPEN : SF_BREAKER_SAME;
    }
}

/* A request succeeded. prober: 1 + shard when it is the probe, else 0. Returns SF_BREAKER_CLOSED when this closed it,
 * SF_BREAKER_HALF_OPEN when the next probe may go. */
static inline int sf_breaker_succeeded(uint64_t *word, uint64_t generation, uint64_t prober, uint64_t threshold, uint64_t now) {
    uint64_t old = sf_load(word);
    for (;;) {
        sf_breaker_t next = sf_breaker_unpack(old);
        int change = SF_BREAKER_SAME;
        if (next.generation != (generation & SF_BREAKER_GENERATION_MASK) || next.state == SF_BREAKER_OPEN) return SF_BREAKER_SAME;
        if (next.state == SF_BREAKER_CLOSED) {
            if (!next.count) return SF_BREAKER_SAME;
            next.count = 0;
        } else {
            if (!prober || next.prober != prober) return SF_BREAKER_SAME;
            next.prober = 0;
            next.count += next.count < SF_BREAKER_COUNT_MAX;
            change = SF_BREAKER_HALF_OPEN;
            if (next.count >= threshold) {
                next.state = change = SF_BREAKER_CLOSED;
                next.count = 0;
                next.since = now;
            }
        }
        if (_sf_breaker_swap(word, &old, next)) return change;
    }
}

/* Ask to be the probe: CLAIMED; BUSY when another is, or it is open again; NEEDLESS when it has closed meanwhile. */
static inline int sf_breaker_claim(uint64_t *word, uint64_t generation, uint64_t prober) {
    uint64_t old = sf_load(word);
    for (;;) {
        sf_breaker_t next = sf_breaker_unpack(old);
        if (next.generation != (generation & SF_BREAKER_GENERATION_MASK)) return SF_BREAKER_BUSY;
        if (next.state == SF_BREAKER_CLOSED) return SF_BREAKER_NEEDLESS;
        if (next.state == SF_BREAKER_OPEN || next.prober) return SF_BREAKER_BUSY;
        next.prober = prober;
        if (_sf_breaker_swap(word, &old, next)) return SF_BREAKER_CLAIMED;
    }
}

/* The probe ended without a verdict, or its shard is dead: another may go. Returns whether there was such a probe. */
static inline int sf_breaker_release(uint64_t *word, uint64_t prober) {
    uint64_t old = sf_load(word);
    for (;;) {
        sf_breaker_t next = sf_breaker_unpack(old);
        if (next.state != SF_BREAKER_HALF_OPEN || next.prober != prober) return 0;
        next.prober = 0;
        if (_sf_breaker_swap(word, &old, next)) return 1;
    }
}

/* Open for `span` ticks or longer: half-open. Returns whether this did it. */
static inline int sf_breaker_wake(uint64_t *word, uint64_t span, uint64_t now) {
    uint64_t old = sf_load(word);
    for (;;) {
        sf_breaker_t next = sf_breaker_unpack(old);
        if (next.state != SF_BREAKER_OPEN || _sf_breaker_elapsed(next.since, now) < span) return 0;
        next.state = SF_BREAKER_HALF_OPEN;
        next.count = next.prober = 0;
        next.since = now;
        if (_sf_breaker_swap(word, &old, next)) return 1;
    }
}

/* Tell every shard that the workers to choose from are others now. */
static inline void sf_breaker_announce(void *base) { __atomic_fetch_add(&sf_header(base)->breaker_epoch, 1, __ATOMIC_ACQ_REL); }
#endif
