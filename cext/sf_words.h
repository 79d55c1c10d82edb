/* Words that were tokenized before: the bytes of a word -> its token ids, in bounded memory.
 *
 *   generation = slots [2^k] of {hash, place}  +  arena of entries {hash, n_bytes, n_ids, ids..., bytes...}, 4-byte aligned
 *
 * Two generations: entries go into the young one; when its arena or slots are full the old one is emptied and the two change places. A
 * word found in the old one is copied into the young one, so what is used stays, as in a cache that drops the least recently used. A word
 * enters on its second coming: the first only sets a bit, so that text full of numbers and names neither fills the memory nor costs
 * more than it did. All is allocated at once; nothing here ever fails later.
 *
 * A text is cut into stretches before each space that stands between two ASCII letters (prompt/pieces.py tells why there), and those
 * that are ASCII into words as the tokenizer's own pattern does it (sf_pretoken.h). Before all that, added tokens are taken out: the
 * first place where one stands, the longest of those that stand there.
 */
#ifndef SF_WORDS_H
#define SF_WORDS_H

#include "sf_pretoken.h"
#include "sf_xxh3.h"
#include <stdlib.h>

#define SF_WORDS_MAX_BYTES 32 /* longer words are rare, and not worth a place */
#define SF_WORDS_MAX_IDS 32
#define SF_WORDS_SEEN_BITS (1u << 17)

typedef struct {
    uint64_t hash;
    uint32_t n_bytes, n_ids;
    uint32_t data[]; /* ids, then the bytes */
} sf_word_t;

typedef struct {
    uint64_t hash;
    uint32_t place; /* in the arena, 1 + units of 4 bytes; 0 = free */
    uint32_t _unused;
} sf_word_slot_t;

typedef struct {
    sf_word_slot_t *slots;
    uint32_t *arena;
    uint32_t used, n_words;
} sf_word_generation_t;

typedef struct {
    sf_word_generation_t young, old;
    uint64_t *seen; /* bits of words that came once */
    uint64_t seed;
    uint32_t n_seen, n_slots, arena_units;
} sf_words_t;

typedef struct {
    const char *text;
    uint32_t n_bytes, id;
    uint32_t stop; /* behind the last token of this length */
} sf_token_t;

/* Added tokens, the longest first, those of a length in the order of memcmp; firsts: which bytes they begin with. */
typedef struct {
    const sf_token_t *tokens;
    size_t n_tokens;
    uint8_t firsts[256];
} sf_tokens_t;

/* The token of those with equal length, from `i` to `stop`, that is the text at `p`; NULL. Models have hundreds that begin alike. */
static inline const sf_token_t *_sf_token_at(const sf_tokens_t *t, size_t i, size_t stop, const char *p) {
    while (i < stop) {
        size_t middle = (i + stop) / 2;
        int order = memcmp(p, t->tokens[middle].text, t->tokens[middle].n_bytes);
        if (!order) return &t->tokens[middle];
        if (order < 0) stop = middle;
        else i = middle + 1;
    }
    return NULL;
}

/* The first place in the text where a token stands, `end` when there is none. found: the longest that stands there. */
static inline const char *sf_tokens_find(const sf_tokens_t *t, const char *p, const char *end, const sf_token_t **found) {
    for (; p < end; p++) {
        if (!t->firsts[(uint8_t)*p]) continue;
        for (size_t i = 0; i < t->n_tokens; i = t->tokens[i].stop) {
            if ((size_t)(end - p) >= t->tokens[i].n_bytes && (*found = _sf_token_at(t, i, t->tokens[i].stop, p))) return p;
        }
    }
    return end;
}

/* 0, or -1 without memory: then nothing is held. bytes: of everything together, at least 64 KiB. */
static inline int sf_words_init(sf_words_t *w, size_t bytes, uint64_t seed) {
    size_t each = (bytes - SF_WORDS_SEEN_BITS / 8) / 2;
    memset(w, 0, sizeof *w);
    w->seed = seed;
    w->n_slots = 64;
    while (2 * (size_t)w->n_slots * (sizeof(sf_word_slot_t) + 24) <= each && w->n_slots < 1u << 30) w->n_slots *= 2;
    w->arena_units = (uint32_t)((each - w->n_slots * sizeof(sf_word_slot_t)) / 4);
    w->seen = calloc(1, SF_WORDS_SEEN_BITS / 8);
    w->young.slots = calloc(w->n_slots, sizeof(sf_word_slot_t));
    w->old.slots = calloc(w->n_slots, sizeof(sf_word_slot_t));
    w->young.arena = malloc((size_t)w->arena_units * 4);
    w->old.arena = malloc((size_t)w->arena_units * 4);
    return w->seen && w->young.slots && w->old.slots && w->young.arena && w->old.arena ? 0 : -1;
}

static inline void sf_words_free(sf_words_t *w) {
    free(w->seen), free(w->young.slots), free(w->old.slots), free(w->young.arena), free(w->old.arena);
}

static inline uint64_t sf_words_hash(const sf_words_t *w, const char *word, size_t n) {
    return sf_xxh3(word, n, w->seed, sf_xxh3_secret); /* at most 240 bytes, where the secret of a seed is not read */
}

static inline const sf_word_t *_sf_word_in(const sf_words_t *w, const sf_word_generation_t *g, uint64_t hash, const char *word, size_t n) {
    for (uint32_t i = (uint32_t)hash & (w->n_slots - 1); g->slots[i].place; i = (i + 1) & (w->n_slots - 1)) {
        if (g->slots[i].hash != hash) continue;
        const sf_word_t *found = (const sf_word_t *)(g->arena + g->slots[i].place - 1);
        if (found->n_bytes == n && !memcmp(found->data + found->n_ids, word, n)) return found;
    }
    return NULL;
}

static inline void _sf_word_put(sf_words_t *w, uint64_t hash, const char *word, size_t n, const uint32_t *ids, uint32_t n_ids) {
    uint32_t units = (uint32_t)((sizeof(sf_word_t) + 4 * n_ids + n + 7) / 8 * 2);
    if (w->young.used + units > w->arena_units || 4 * (uint64_t)(w->young.n_words + 1) > 3 * (uint64_t)w->n_slots) {
        sf_word_generation_t emptied = w->old;
        memset(emptied.slots, 0, w->n_slots * sizeof(sf_word_slot_t));
        emptied.used = emptied.n_words = 0;
        w->old = w->young;
        w->young = emptied;
    }
    sf_word_generation_t *g = &w->young;
    sf_word_t *fresh = (sf_word_t *)(g->arena + g->used);
    uint32_t i = (uint32_t)hash & (w->n_slots - 1);
    while (g->slots[i].place) i = (i + 1) & (w->n_slots - 1);
    g->slots[i] = (sf_word_slot_t){hash, g->used + 1, 0};
    fresh->hash = hash;
    fresh->n_bytes = (uint32_t)n;
    fresh->n_ids = n_ids;
    if (n_ids) memcpy(fresh->data, ids, 4 * n_ids);
    memcpy(fresh->data + n_ids, word, n);
    g->used += units;
    g->n_words++;
}

/* A word's entry, valid until the next call of any function here; NULL when it has none. */
static inline const sf_word_t *sf_words_get(sf_words_t *w, uint64_t hash, const char *word, size_t n) {
    const sf_word_t *found = _sf_word_in(w, &w->young, hash, word, n);
    if (found) return found;
    found = _sf_word_in(w, &w->old, hash, word, n);
    if (!found) return NULL;
    uint32_t ids[SF_WORDS_MAX_IDS];
    memcpy(ids, found->data, 4 * found->n_ids); /* its generation may be the one that is emptied */
    _sf_word_put(w, hash, word, n, ids, found->n_ids);
    return _sf_word_in(w, &w->young, hash, word, n);
}

/* Whether a word without an entry may have one now: it came before. */
static inline int sf_words_came(sf_words_t *w, uint64_t hash) {
    uint32_t bit = (uint32_t)(hash >> 32) & (SF_WORDS_SEEN_BITS - 1);
    uint64_t mask = UINT64_C(1) << (bit & 63);
    if (w->seen[bit / 64] & mask) return 1;
    if (++w->n_seen > SF_WORDS_SEEN_BITS / 8) {
        memset(w->seen, 0, SF_WORDS_SEEN_BITS / 8);
        w->n_seen = 1;
    }
    w->seen[bit / 64] |= mask;
    return 0;
}

/* word: at most SF_WORDS_MAX_BYTES, ids: at most SF_WORDS_MAX_IDS; else it is not taken. */
static inline void sf_words_put(sf_words_t *w, const char *word, size_t n, const uint32_t *ids, size_t n_ids) {
    uint64_t hash;
    if (n > SF_WORDS_MAX_BYTES || n_ids > SF_WORDS_MAX_IDS) return;
    hash = sf_words_hash(w, word, n);
    if (!_sf_word_in(w, &w->young, hash, word, n)) _sf_word_put(w, hash, word, n, ids, (uint32_t)n_ids);
}

static inline int _sf_is_letter(char ch) { return (unsigned char)((ch | 0x20) - 'a') < 26; }

/* Where the stretch that begins at `p` ends. */
static inline const char *sf_stretch_end(const char *p, const char *end) {
    const char *space = p + 1;
    while (space < end && (space = memchr(space, ' ', (size_t)(end - space)))) {
        if (space + 1 < end && _sf_is_letter(space[-1]) && _sf_is_letter(space[1])) return space;
        space++;
    }
    return end;
}

static inline int sf_is_ascii(const char *p, const char *end) {
    uint64_t bits = 0;
    for (; end - p >= 8; p += 8) bits |= sf_read64(p);
    for (; p < end; p++) bits |= (uint8_t)*p;
    return !(bits & UINT64_C(0x8080808080808080));
}
#endif
