/* Byte-pair encoding of one word: the merges of a model, in a table by the pair that they merge.
 *
 *   merges [2^k] of {pair, rank, id}: left and right token -> how early the merge comes, and the token that it makes
 *
 * Law: the ids of a word are what is left when, as long as two neighbours have a merge, those of the lowest rank are merged, the first of
 * them where there are several (Sennrich, Haddow and Birch, "Neural Machine Translation of Rare Words with Subword Units", 3.2). It begins
 * with one token for each byte. Tokenizers keep a heap of pairs, and so do we for long words, as scripts without spaces have them; for
 * words of few bytes a walk over all ranks is shorter.
 *
 * A character of three bytes (a sign) may begin as the tokens that its own bytes become, when they certainly become so before a part of
 * it joins anything else. A merge of a part with what stands outside comes first only if its rank is lower than that of one of the
 * sign's own merges still to come, since the first of these can be made from the begin on, and each next one after it. So it is
 * enough that the sign's highest rank is lower than the lowest one by which any of its parts at the edge, on its way, joins a token
 * outside. The model's merges tell those; the few with ASCII outside are left out of account, and signs beside ASCII begin as bytes.
 *
 * Memory: 16 bytes a place, at most three quarters of them taken; 280,000 merges take 8 MiB, 446,000 of gpt-oss 16 MiB. 512 KiB
 * for pairs of letters, 256 KiB for signs, 170 KiB to work with for long words.
 */
#ifndef SF_BPE_H
#define SF_BPE_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define SF_BPE_SHORT 32 /* tokens */
#define SF_BPE_MAX_BYTES 4096
#define SF_BPE_NONE UINT32_MAX
#define SF_BPE_SIGN 256
#define SF_BPE_SIGNS 0x10000u

/* What becomes of a pair: how early, and which token. rank: SF_BPE_NONE = nothing. */
typedef struct {
    uint32_t rank, id;
} sf_made_t;

typedef struct {
    uint64_t pair; /* left << 32 | right */
    sf_made_t made; /* of rank SF_BPE_NONE: the place is free */
} sf_merge_t;

/* A long word while it is merged. A token is known by its first byte's place; what has become part of the one before it makes nothing. */
typedef struct {
    sf_made_t made[SF_BPE_MAX_BYTES]; /* of the token and the one behind it */
    uint16_t before[SF_BPE_MAX_BYTES], behind[SF_BPE_MAX_BYTES];
    uint16_t bytes[SF_BPE_MAX_BYTES]; /* each token of the begin: a byte, or SF_BPE_SIGN */
    uint64_t heap[3 * SF_BPE_MAX_BYTES]; /* rank << 32 | place, of pairs that were there once */
    uint32_t n_heap;
} sf_bpe_work_t;

typedef struct {
    sf_merge_t *merges; /* NULL: there are none */
    uint32_t mask;
    int shift;
    uint32_t letters[256]; /* the token of each byte; SF_BPE_NONE = there is none */
    sf_made_t *of_letters; /* [256 * 256] what two bytes become: most of what is asked, and of few places, where scripts have no spaces */
    uint32_t *signs; /* [SF_BPE_SIGNS] the token as which a sign begins; SF_BPE_NONE: as its bytes */
    sf_bpe_work_t *work;
} sf_bpe_t;

/* The place of a pair, or the free one where it would stand. */
static inline sf_merge_t *_sf_bpe_place(const sf_bpe_t *b, uint32_t left, uint32_t right) {
    uint64_t pair = (uint64_t)left << 32 | right;
    uint32_t i = (uint32_t)((pair ^ pair >> 29) * UINT64_C(0x9e3779b97f4a7c15) >> b->shift);
    while (b->merges[i].made.rank != SF_BPE_NONE && b->merges[i].pair != pair) i = (i + 1) & b->mask;
    return &b->merges[i];
}

static inline void sf_bpe_free(sf_bpe_t *b) { free(b->merges), free(b->of_letters), free(b->signs), free(b->work); }

/* triples: left, right and made token of each merge, in the order of their ranks; of a pair that comes twice the later one counts. 0, or
 * -1 without memory: then nothing is held. */
static inline int sf_bpe_init(sf_bpe_t *b, const uint32_t *triples, uint32_t n, const uint32_t letters[256]) {
    int bits = 4;
    while (UINT64_C(3) << bits < (uint64_t)n * 4 + 4) bits++;
    b->mask = (UINT32_C(1) << bits) - 1;
    b->shift = 64 - bits;
    b->merges = malloc(((size_t)b->mask + 1) * sizeof *b->merges);
    b->of_letters = malloc(65536 * sizeof *b->of_letters);
    b->signs = malloc(SF_BPE_SIGNS * sizeof *b->signs);
    b->work = malloc(sizeof *b->work);
    if (!b->merges || !b->of_letters || !b->signs || !b->work) {
        sf_bpe_free(b);
        b->merges = NULL, b->of_letters = NULL, b->signs = NULL, b->work = NULL;
        return -1;
    }
    memset(b->signs, 0xff, SF_BPE_SIGNS * sizeof *b->signs);
    memset(b->merges, 0xff, ((size_t)b->mask + 1) * sizeof *b->merges);
    for (uint32_t rank = 0; rank < n; rank++) {
        const uint32_t *merge = triples + 3 * (size_t)rank;
        *_sf_bpe_place(b, merge[0], merge[1]) = (sf_merge_t){(uint64_t)merge[0] << 32 | merge[1], {rank, merge[2]}};
    }
    memcpy(b->letters, letters, sizeof b->letters);
    for (uint32_t i = 0; i < 65536; i++) b->of_letters[i] = _sf_bpe_place(b, letters[i >> 8], letters[i & 255])->made;
    return 0;
}

static inline sf_made_t _sf_bpe_made(const sf_bpe_t *b, uint32_t left, uint32_t right) { return _sf_bpe_place(b, left, right)->made; }

/* What the tokens `i` and `i` + 1 of a word's begin become. */
static inline sf_made_t _sf_bpe_first_made(const sf_bpe_t *b, const uint16_t *bytes, const uint32_t *ids, uint32_t i) {
    if (bytes[i] < SF_BPE_SIGN && bytes[i + 1] < SF_BPE_SIGN) return b->of_letters[(uint32_t)bytes[i] << 8 | bytes[i + 1]];
    return _sf_bpe_made(b, ids[i], ids[i + 1]);
}

/* The tokens with which a word begins, and how many; 0 when a byte has none. */
static inline uint32_t _sf_bpe_begin(const sf_bpe_t *b, const uint8_t *word, size_t n_bytes, uint16_t *bytes, uint32_t *ids) {
    uint32_t n = 0;
    for (size_t i = 0; i < n_bytes; i++, n++) {
        if (word[i] >= 0xe0 && word[i] < 0xf0 && n_bytes - i >= 3 && (!i || word[i - 1] >= 0x80) && (i + 3 == n_bytes || word[i + 3] >= 0x80)) {
            ids[n] = b->signs[(word[i] & 0xfu) << 12 | (word[i + 1] & 0x3fu) << 6 | (word[i + 2] & 0x3fu)];
            if (ids[n] != SF_BPE_NONE) {
                bytes[n] = SF_BPE_SIGN, i += 2;
                continue;
            }
        }
        bytes[n] = word[i];
        if ((ids[n] = b->letters[word[i]]) == SF_BPE_NONE) return 0;
    }
    return n;
}

/* The token of a sign, when its bytes become one before any part of it, or all of it, joins what stands outside. */
static inline uint32_t _sf_bpe_sign(const sf_bpe_t *b, const uint8_t bytes[3], const uint32_t *joins, uint32_t n_tokens) {
    uint32_t left = b->letters[bytes[0]], middle = b->letters[bytes[1]], right = b->letters[bytes[2]], highest, second;
    sf_made_t front = b->of_letters[bytes[0] << 8 | bytes[1]], back = b->of_letters[bytes[1] << 8 | bytes[2]], whole;
    if (left >= n_tokens || middle >= n_tokens || right >= n_tokens || (front.rank & back.rank) == SF_BPE_NONE) return SF_BPE_NONE;
    int is_front = front.rank <= back.rank;
    second = is_front ? front.id : back.id;
    whole = is_front ? _sf_bpe_made(b, second, right) : _sf_bpe_made(b, left, second);
    if (whole.rank == SF_BPE_NONE || second >= n_tokens) return SF_BPE_NONE;
    highest = is_front ? front.rank : back.rank;
    if (whole.rank > highest) highest = whole.rank;
    /* The sign itself, too: another that is finished later in truth may be what the one before it joins first. */
    if (whole.id >= n_tokens || joins[whole.id] <= highest) return SF_BPE_NONE;
    return joins[left] > highest && joins[right] > highest && joins[second] > highest ? whole.id : SF_BPE_NONE;
}

/* Find out which signs may begin as one token. joins: of each of the `n_tokens` tokens the lowest rank by which it, being a
 * character or having a part of one at its begin or end, joins what stands outside and is no ASCII. */
static inline void sf_bpe_find_signs(sf_bpe_t *b, const uint32_t *joins, uint32_t n_tokens) {
    for (uint32_t code = 0x800; code < SF_BPE_SIGNS; code++) {
        uint8_t bytes[3] = {(uint8_t)(0xe0 | code >> 12), (uint8_t)(0x80 | (code >> 6 & 0x3f)), (uint8_t)(0x80 | (code & 0x3f))};
        b->signs[code] = _sf_bpe_sign(b, bytes, joins, n_tokens);
    }
}

static inline void _sf_bpe_sink(uint64_t *heap, uint32_t n, uint32_t i) {
    uint64_t item = heap[i];
    for (uint32_t child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && heap[child + 1] < heap[child]) child++;
        if (heap[child] >= item) break;
        heap[i] = heap[child];
    }
    heap[i] = item;
}

static inline void _sf_bpe_push(sf_bpe_work_t *w, uint64_t item) {
    uint32_t i = w->n_heap++;
    for (; i && w->heap[(i - 1) / 2] > item; i = (i - 1) / 2) w->heap[i] = w->heap[(i - 1) / 2];
    w->heap[i] = item;
}

/* The pair that begins at `place` has become another one. */
static inline void _sf_bpe_renew(const sf_bpe_t *b, const uint32_t *ids, uint32_t place, uint32_t n) {
    sf_bpe_work_t *w = b->work;
    uint32_t right = w->behind[place];
    w->made[place] = right < n ? _sf_bpe_made(b, ids[place], ids[right]) : (sf_made_t){SF_BPE_NONE, 0};
    if (w->made[place].rank != SF_BPE_NONE) _sf_bpe_push(w, (uint64_t)w->made[place].rank << 32 | place);
}

/* ids: the `n` tokens of the begin. What is left of them comes to lie in front. */
static inline uint32_t _sf_bpe_long(const sf_bpe_t *b, uint32_t n, uint32_t *ids) {
    sf_bpe_work_t *w = b->work;
    uint32_t left = 0;
    w->n_heap = 0;
    for (uint32_t i = 0; i < n; i++) {
        w->before[i] = (uint16_t)(i - 1), w->behind[i] = (uint16_t)(i + 1);
        w->made[i] = i + 1 < n ? _sf_bpe_first_made(b, w->bytes, ids, i) : (sf_made_t){SF_BPE_NONE, 0};
        if (w->made[i].rank != SF_BPE_NONE) w->heap[w->n_heap++] = (uint64_t)w->made[i].rank << 32 | i;
    }
    for (uint32_t i = w->n_heap / 2; i--;) _sf_bpe_sink(w->heap, w->n_heap, i);
    while (w->n_heap) {
        uint64_t first = w->heap[0];
        uint32_t place = (uint32_t)first, right = w->behind[place];
        w->heap[0] = w->heap[--w->n_heap];
        _sf_bpe_sink(w->heap, w->n_heap, 0);
        if (w->made[place].rank != first >> 32) continue; /* no more; a pair that is gone never comes again */
        ids[place] = w->made[place].id;
        w->made[right].rank = SF_BPE_NONE;
        w->behind[place] = w->behind[right];
        if (w->behind[place] < n) w->before[w->behind[place]] = (uint16_t)place;
        _sf_bpe_renew(b, ids, place, n);
        if (place) _sf_bpe_renew(b, ids, w->before[place], n);
    }
    for (uint32_t i = 0; i < n; i = w->behind[i]) ids[left++] = ids[i];
    return left;
}

/* word: 1 to SF_BPE_MAX_BYTES bytes; ids: room for as many. How many they are; 0 when a byte has no token of its own. */
static inline uint32_t sf_bpe_word(const sf_bpe_t *b, const char *word, size_t n_bytes, uint32_t *ids) {
    sf_made_t made[SF_BPE_SHORT]; /* of each token and the one behind it */
    uint16_t *bytes = b->work->bytes;
    uint32_t n = _sf_bpe_begin(b, (const uint8_t *)word, n_bytes, bytes, ids);
    if (n > SF_BPE_SHORT) return _sf_bpe_long(b, n, ids);
    for (uint32_t i = 0; i + 1 < n; i++) made[i] = _sf_bpe_first_made(b, bytes, ids, i);
    for (;;) {
        uint32_t at = 0, lowest = SF_BPE_NONE;
        for (uint32_t i = 0; i + 1 < n; i++)
            if (made[i].rank < lowest) lowest = made[i].rank, at = i;
        if (lowest == SF_BPE_NONE) return n;
        ids[at] = made[at].id;
        n--;
        for (uint32_t i = at + 1; i < n; i++) ids[i] = ids[i + 1], made[i - 1] = made[i];
        if (at) made[at - 1] = _sf_bpe_made(b, ids[at - 1], ids[at]);
        if (at + 1 < n) made[at] = _sf_bpe_made(b, ids[at], ids[at + 1]);
    }
}
#endif
