/* Byte-pair encoding of one short word: the merges of a model, in a table by the pair that they merge.
 *
 *   merges [2^k] of {pair, rank, id}: left and right token -> how early the merge comes, and the token that it makes
 *
 * Law: the ids of a word are what is left when, as long as two neighbours have a merge, those of the lowest rank are merged, the first of
 * them where there are several (Sennrich, Haddow and Birch, "Neural Machine Translation of Rare Words with Subword Units", 3.2). It begins
 * with one token for each byte. Tokenizers keep a heap of pairs; for words of so few bytes a walk over all ranks is shorter.
 *
 * Memory: 16 bytes a place, at most three quarters of them taken; 280,000 merges, as the largest models of today have, take 8 MiB.
 */
#ifndef SF_BPE_H
#define SF_BPE_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define SF_BPE_MAX_BYTES 32
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
    uint32_t letters[128]; /* the token of each ASCII byte; SF_BPE_NONE = there is none */
} sf_bpe_t;

/* The place of a pair, or the free one where it would stand. */
static inline sf_merge_t *_sf_bpe_place(const sf_bpe_t *b, uint32_t left, uint32_t right) {
    uint64_t pair = (uint64_t)left << 32 | right;
    uint32_t i = (uint32_t)((pair ^ pair >> 29) * UINT64_C(0x9e3779b97f4a7c15) >> b->shift);
    while (b->merges[i].rank != SF_BPE_NONE && b->merges[i].pair != pair) i = (i + 1) & b->mask;
    return &b->merges[i];
}

/* triples: left, right and made token of each merge, in the order of their ranks; of a pair that comes twice the later one counts. 0, or
 * -1 without memory: then nothing is held. */
static inline int sf_bpe_init(sf_bpe_t *b, const uint32_t *triples, uint32_t n, const uint32_t letters[128]) {
    int bits = 4;
    while (UINT64_C(3) << bits < (uint64_t)n * 4 + 4) bits++;
    b->mask = (UINT32_C(1) << bits) - 1;
    b->shift = 64 - bits;
    b->merges = malloc(((size_t)b->mask + 1) * sizeof *b->merges);
    if (!b->merges) return -1;
    memset(b->merges, 0xff, ((size_t)b->mask + 1) * sizeof *b->merges);
    for (uint32_t rank = 0; rank < n; rank++) {
        const uint32_t *merge = triples + 3 * (size_t)rank;
        *_sf_bpe_place(b, merge[0], merge[1]) = (sf_merge_t){(uint64_t)merge[0] << 32 | merge[1], rank, merge[2]};
    }
    memcpy(b->letters, letters, sizeof b->letters);
    return 0;
}

static inline void sf_bpe_free(sf_bpe_t *b) { free(b->merges); }

/* word: 1 to SF_BPE_MAX_BYTES bytes of ASCII; ids: room for as many. How many they are; 0 when a byte has no token of its own. */
static inline uint32_t sf_bpe_word(const sf_bpe_t *b, const char *word, size_t n_bytes, uint32_t *ids) {
    const sf_merge_t *pairs[SF_BPE_MAX_BYTES]; /* of each token and the one behind it */
    uint32_t n = (uint32_t)n_bytes;
    for (uint32_t i = 0; i < n; i++)
        if ((ids[i] = b->letters[(uint8_t)word[i] & 127]) == SF_BPE_NONE) return 0;
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
