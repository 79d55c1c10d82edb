/* msgpack values of a KV event batch, read from the front: what the batch becomes, and one function a kind of value.
 *
 * Each returns SF_KV_UNUSUAL (headers: -1) on anything but that kind, and then the place in the bytes means nothing any more: the whole
 * batch is given up. Every read is checked against the end. Only the kinds that engines send are known.
 */
#ifndef SF_KVREAD_H
#define SF_KVREAD_H

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define SF_KV_MAX_DEPTH 8

enum { SF_KV_OK = 0, SF_KV_UNUSUAL = -1, SF_KV_NO_MEMORY = -2 };
enum { SF_KV_STORE = 0, SF_KV_REMOVE = 1, SF_KV_CLEAR = 2 };

typedef struct {
    uint32_t kind;
    uint32_t tiers; /* mask; 0 = no tier of ours: such runs are left out */
    uint64_t start; /* first key, and how many */
    uint64_t count;
} sf_kv_run_t;

/* What an event says; all but kind, tiers, start and count only with tokens. */
typedef struct {
    uint32_t kind;
    uint32_t tiers; /* as of a run, but 0 is here, too */
    uint64_t start; /* of its hashes in `keys`, and how many */
    uint64_t count;
    uint64_t parent;
    uint64_t first_token; /* in `tokens`, and how many */
    uint64_t n_tokens;
    int64_t group; /* of a hybrid model's caches, -1 = not told */
    uint32_t block_size;
    uint8_t has_parent;
    uint8_t spec; /* SF_KV_SPEC_* */
} sf_kv_event_t;

enum { SF_KV_SPEC_UNTOLD = 0, SF_KV_SPEC_MAIN = 1, SF_KV_SPEC_OTHER = 2 };
enum { SF_KV_DEVICE = 1 }; /* bit of the tiers, as wire.kv_events.DEVICE */

typedef struct {
    const uint8_t *p, *end;
    uint64_t *keys;
    uint64_t n_keys, keys_room;
    sf_kv_run_t *runs;
    uint64_t n_runs, runs_room;
    uint64_t n_events;
    int wants_tokens;
    uint32_t *tokens;
    uint64_t n_tokens, tokens_room;
    sf_kv_event_t *events;
    uint64_t events_room;
} sf_kv_t;

static inline void sf_kv_free(sf_kv_t *kv)
{
    free(kv->keys);
    free(kv->runs);
    free(kv->tokens);
    free(kv->events);
}

typedef struct {
    const uint8_t *p;
    uint32_t n;
} sf_kv_str_t;

static inline uint64_t sf_kv_be(const uint8_t *p, int n_bytes)
{
    uint64_t value = 0;
    for (int i = 0; i < n_bytes; i++) value = value << 8 | p[i];
    return value;
}

static inline int sf_kv_has(const sf_kv_t *kv, uint64_t n) { return (uint64_t)(kv->end - kv->p) >= n; }

/* Count of an array or map header; `fix` is 0x90 or 0x80, `wide` the 16-bit tag. -1: not one. */
static inline int64_t sf_kv_header(sf_kv_t *kv, uint8_t fix, uint8_t wide)
{
    int n_bytes;
    int64_t count;
    if (!sf_kv_has(kv, 1)) return -1;
    if ((*kv->p & 0xf0) == fix) return *kv->p++ & 0x0f;
    if (*kv->p == wide) n_bytes = 2;
    else if (*kv->p == wide + 1) n_bytes = 4;
    else return -1;
    if (!sf_kv_has(kv, 1 + (uint64_t)n_bytes)) return -1;
    count = (int64_t)sf_kv_be(kv->p + 1, n_bytes);
    kv->p += 1 + n_bytes;
    return count;
}
static inline int64_t sf_kv_array(sf_kv_t *kv) { return sf_kv_header(kv, 0x90, 0xdc); }
static inline int64_t sf_kv_map(sf_kv_t *kv) { return sf_kv_header(kv, 0x80, 0xde); }

static inline int sf_kv_nil(sf_kv_t *kv)
{
    if (!sf_kv_has(kv, 1) || *kv->p != 0xc0) return 0;
    kv->p++;
    return 1;
}

static inline int sf_kv_string(sf_kv_t *kv, sf_kv_str_t *out)
{
    uint32_t head = 1;
    if (!sf_kv_has(kv, 1)) return SF_KV_UNUSUAL;
    if ((*kv->p & 0xe0) == 0xa0) {
        out->n = *kv->p & 0x1f;
    } else if (*kv->p == 0xd9) {
        if (!sf_kv_has(kv, 2)) return SF_KV_UNUSUAL;
        out->n = kv->p[1];
        head = 2;
    } else {
        return SF_KV_UNUSUAL; /* a longer string is nothing that we look at */
    }
    if (!sf_kv_has(kv, (uint64_t)head + out->n)) return SF_KV_UNUSUAL;
    out->p = kv->p + head;
    kv->p += head + out->n;
    return SF_KV_OK;
}

static inline int sf_kv_is(const sf_kv_str_t *s, const char *text, uint32_t n) { return s->n == n && !memcmp(s->p, text, n); }
#define SF_KV_IS(s, text) sf_kv_is(s, text, sizeof(text) - 1)

/* An integer of any width; its 64 bits as two's complement. */
static inline int sf_kv_int(sf_kv_t *kv, uint64_t *out)
{
    static const int8_t widths[8] = {1, 2, 4, 8, 1, 2, 4, 8}; /* cc..cf unsigned, d0..d3 signed */
    uint8_t tag;
    int n_bytes;
    if (!sf_kv_has(kv, 1)) return SF_KV_UNUSUAL;
    tag = *kv->p;
    if (tag < 0x80 || tag >= 0xe0) {
        *out = (uint64_t)(int64_t)(int8_t)tag;
        kv->p++;
        return SF_KV_OK;
    }
    if (tag < 0xcc || tag > 0xd3) return SF_KV_UNUSUAL;
    n_bytes = widths[tag - 0xcc];
    if (!sf_kv_has(kv, 1 + (uint64_t)n_bytes)) return SF_KV_UNUSUAL;
    *out = sf_kv_be(kv->p + 1, n_bytes);
    if (tag >= 0xd0 && n_bytes < 8 && *out >> (8 * n_bytes - 1)) *out |= ~UINT64_C(0) << (8 * n_bytes);
    kv->p += 1 + n_bytes;
    return SF_KV_OK;
}

/* Pass over one value of any plain type. */
static int sf_kv_skip(sf_kv_t *kv, int depth)
{
    uint8_t tag;
    uint64_t n = 0;
    if (depth > SF_KV_MAX_DEPTH || !sf_kv_has(kv, 1)) return SF_KV_UNUSUAL;
    tag = *kv->p;
    if (tag < 0x80 || tag >= 0xe0 || tag == 0xc0 || tag == 0xc2 || tag == 0xc3) {
        kv->p++;
        return SF_KV_OK;
    }
    if ((tag & 0xe0) == 0xa0) n = 1 + (uint64_t)(tag & 0x1f);
    else if (tag == 0xca) n = 5;
    else if (tag == 0xcb) n = 9;
    else if (tag >= 0xcc && tag <= 0xd3) n = 1 + (UINT64_C(1) << ((tag - 0xcc) & 3));
    else if ((tag >= 0xc4 && tag <= 0xc6) || (tag >= 0xd9 && tag <= 0xdb)) {
        int n_bytes = 1 << (tag >= 0xd9 ? tag - 0xd9 : tag - 0xc4);
        if (!sf_kv_has(kv, 1 + (uint64_t)n_bytes)) return SF_KV_UNUSUAL;
        n = 1 + (uint64_t)n_bytes + sf_kv_be(kv->p + 1, n_bytes);
    }
    if (n) {
        if (!sf_kv_has(kv, n)) return SF_KV_UNUSUAL;
        kv->p += n;
        return SF_KV_OK;
    }
    int64_t count = sf_kv_array(kv);
    if (count < 0) {
        count = sf_kv_map(kv);
        if (count < 0) return SF_KV_UNUSUAL;
        count *= 2;
    }
    for (; count; count--) {
        /* The bulk of a batch is arrays of small token ids: no call for those. */
        if (kv->p < kv->end && *kv->p < 0x80) {
            kv->p++;
        } else if (sf_kv_has(kv, 3) && *kv->p == 0xcd) {
            kv->p += 3;
        } else if (sf_kv_has(kv, 5) && *kv->p == 0xce) {
            kv->p += 5;
        } else {
            int code = sf_kv_skip(kv, depth + 1);
            if (code) return code;
        }
    }
    return SF_KV_OK;
}
#endif
