/* Byte-pair encoding of one word: the merges of a model, in a table by the pair that they merge.
 *
 *   merges [2^k] of {pair, rank, id}: left and right token -> how early the merge comes, and the token that it makes
 *
 * Law: the ids of a word are what is left when, as long as two neighbours have a merge, those of the lowest rank are merged, the first of
 * them where there are several (Sennrich, Haddow and Birch, "Neural Machine Translation of Rare Words with Subword Units", 3.2). It begins
 * with one token for each byte. Tokenizers keep a heap of pairs, and so do we for long words, as scripts without spaces have them; for
 * words of few bytes a walk over all ranks is shorter.
 *
 * Memory: 16 bytes a place, at most three quarters of them taken; 280,000 merges, as the largest models of today have, take 8 MiB. 160 KiB
 * to work with for long words.
 */
#ifndef SF_BPE_H
#define SF_BPE_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define SF_BPE_SHORT_BYTES 32
#define SF_BPE_MAX_BYTES 4096
#define SF_BPE_NONE UINT32_MAX

typedef struct {
    uint64_t pair; /* left << 32 | right */
    uint32_t rank; /* SF_BPE_NONE: the place is free */
    uint32_t id;
} sf_merge_t;

typedef struct {
    sf_merge_t *merges; /* NULL: there are none */
    uint32_t mask;
    int shift;
    uint32_t letters[256]; /* the token of each byte; SF_BPE_NONE = there is none */
    struct sf_bpe_long *work;
} sf_bpe_t;

/* A long word while it is merged. A token is known by its first byte's place; what has become part of the one before it has no pair. */
struct sf_bpe_long {
    const sf_merge_t *pairs[SF_BPE_MAX_BYTES]; /* of the token and the one behind it; NULL: no merge */
    uint16_t before[SF_BPE_MAX_BYTES], behind[SF_BPE_MAX_BYTES];
    uint64_t heap[3 * SF_BPE_MAX_BYTES]; /* rank << 32 | place, of pairs that were there once */
    uint32_t n_heap;
};

/* The place of a pair, or the free one where it would stand. */
static inline sf_merge_t *_sf_bpe_place(const sf_bpe_t *b, uint32_t left, uint32_t right) {
    uint64_t pair = (uint64_t)left << 32 | right;
    uint32_t i = (uint32_t)((pair ^ pair >> 29) * UINT64_C(0x9e3779b97f4a7c15) >> b->shift);
    while (b->merges[i].rank != SF_BPE_NONE && b->merges[i].pair != pair) i = (i + 1) & b->mask;
    return &b->merges[i];
}

/* triples: left, right and made token of each merge, in the order of their ranks; of a pair that comes twice the later one counts. 0, or
 * -1 without memory: then nothing is held. */
static inline int sf_bpe_init(sf_bpe_t *b, const uint32_t *triples, uint32_t n, const uint32_t letters[256]) {
    int bits = 4;
    while (UINT64_C(3) << bits < (uint64_t)n * 4 + 4) bits++;
    b->mask = (UINT32_C(1) << bits) - 1;
    b->shift = 64 - bits;
    b->merges = malloc(((size_t)b->mask + 1) * sizeof *b->merges);
    b->work = malloc(sizeof *b->work);
    if (!b->merges || !b->work) {
        free(b->merges), free(b->work);
        b->merges = NULL, b->work = NULL;
        return -1;
    }
    memset(b->merges, 0xff, ((size_t)b->mask + 1) * sizeof *b->merges);
    for (uint32_t rank = 0; rank < n; rank++) {
        const uint32_t *merge = triples + 3 * (size_t)rank;
        *_sf_bpe_place(b, merge[0], merge[1]) = (sf_merge_t){(uint64_t)merge[0] << 32 | merge[1], rank, merge[2]};
    }
    memcpy(b->letters, letters, sizeof b->letters);
    return 0;
}

static inline void sf_bpe_free(sf_bpe_t *b) { free(b->merges), free(b->work); }

static inline void _sf_bpe_sink(uint64_t *heap, uint32_t n, uint32_t i) {
    uint64_t item = heap[i];
    for (uint32_t child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && heap[child + 1] < heap[child]) child++;
        if (heap[child] >= item) break;
        heap[i] = heap[child];
    }
    heap[i] = item;
}

static inline void _sf_bpe_rise(uint64_t *heap, uint32_t i) {
    uint64_t item = heap[i];
    for (; i && heap[(i - 1) / 2] > item; i = (i - 1) / 2) heap[i] = heap[(i - 1) / 2];
    heap[i] = item;
}

/* The pair that begins at `place` has become another one. */
static inline void _sf_bpe_pair(const sf_bpe_t *b, const uint32_t *ids, uint32_t place, uint32_t n) {
    struct sf_bpe_long *w = b->work;
    uint32_t right = w->behind[place];
    const sf_merge_t *pair = right < n ? _sf_bpe_place(b, ids[place], ids[right]) : NULL;
    w->pairs[place] = pair && pair->rank != SF_BPE_NONE ? pair : NULL;
    if (w->pairs[place]) w->heap[w->n_heap++] = (uint64_t)pair->rank << 32 | place;
}

/* ids: one for each of the `n` bytes. What is left of them comes to lie in front. */
static inline uint32_t _sf_bpe_long(const sf_bpe_t *b, uint32_t *ids, uint32_t n) {
    struct sf_bpe_long *w = b->work;
    uint32_t left = 0;
    w->n_heap = 0;
    for (uint32_t i = 0; i < n; i++) {
        w->before[i] = (uint16_t)(i - 1), w->behind[i] = (uint16_t)(i + 1);
        _sf_bpe_pair(b, ids, i, n);
    }
    for (uint32_t i = w->n_heap / 2; i--;) _sf_bpe_sink(w->heap, w->n_heap, i);
    while (w->n_heap) {
        uint64_t first = w->heap[0];
        uint32_t place = (uint32_t)first, held;
        w->heap[0] = w->heap[--w->n_heap];
        _sf_bpe_sink(w->heap, w->n_heap, 0);
        if (!w->pairs[place] || w->pairs[place]->rank != first >> 32) continue; /* no more; a pair that is gone never comes again */
        ids[place] = w->pairs[place]->id;
        uint32_t right = w->behind[place];
        w->pairs[right] = NULL;
        w->behind[place] = w->behind[right];
        if (w->behind[place] < n) w->before[w->behind[place]] = (uint16_t)place;
        held = w->n_heap;
        _sf_bpe_pair(b, ids, place, n);
        if (w->n_heap > held) _sf_bpe_rise(w->heap, held);
        if (!place) continue;
        held = w->n_heap;
        _sf_bpe_pair(b, ids, w->before[place], n);
        if (w->n_heap > held) _sf_bpe_rise(w->heap, held);
    }
    for (uint32_t i = 0; i < n; i = w->behind[i]) ids[left++] = ids[i];
    return left;
}

/* word: 1 to SF_BPE_MAX_BYTES bytes; ids: room for as many. How many they are; 0 when a byte has no token of its own. */
static inline uint32_t sf_bpe_word(const sf_bpe_t *b, const char *word, size_t n_bytes, uint32_t *ids) {
    const sf_merge_t *pairs[SF_BPE_SHORT_BYTES]; /* of each token and the one behind it */
    uint32_t n = (uint32_t)n_bytes;
    for (uint32_t i = 0; i < n; i++)
        if ((ids[i] = b->letters[(uint8_t)word[i]]) == SF_BPE_NONE) return 0;
    if (n > SF_BPE_SHORT_BYTES) return _sf_bpe_long(b, ids, n);
    for (uint32_t i = 0; i + 1 < n; i++) pairs[i] = _sf_bpe_place(b, ids[i], ids[i + 1]);
    for (;;) {
        uint32_t at = 0, lowest = SF_BPE_NONE;
        for (uint32_t i = 0; i + 1 < n; i++)
            if (pairs[i]->rank < lowest) lowest = pairs[i]->rank, at = i;
        if (lowest == SF_BPE_NONE) return n;
        ids[at] = pairs[at]->id;
        n--;
        for (uint32_t i = at + 1; i < n; i++) ids[i] = ids[i + 1], pairs[i - 1] = pairs[i];
        if (at) pairs[at - 1] = _sf_bpe_place(b, ids[at - 1], ids[at]);
        if (at + 1 < n) pairs[at] = _sf_bpe_place(b, ids[at], ids[at + 1]);
    }
}
#endif
