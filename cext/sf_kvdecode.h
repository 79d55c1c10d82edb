/* One pass over a KV event batch (msgpack) to runs of block keys: consecutive events of one kind and tier become one run.
 *
 * It knows what SGLang sends when nothing is special: both event shapes, integer hashes, known media, no adapter, no cache group. All
 * else (another type or width than expected, a key twice, a salt that is not ASCII, trailing bytes, deep nesting, an extension)
 * ends with SF_KV_UNUSUAL and the caller takes the general decoder, which decides whether it is an error. So this one may refuse
 * whatever it likes, but what it accepts must mean the same there. Every read is checked against the end; no allocation here except
 * the two growing arrays of sf_kv_t, which the caller frees.
 */
#ifndef SF_KVDECODE_H
#define SF_KVDECODE_H

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define SF_KV_MAX_HASHES 65536u /* an event; the bound of wire/kv_events */
#define SF_KV_MAX_DEPTH 8

enum { SF_KV_OK = 0, SF_KV_UNUSUAL = -1, SF_KV_NO_MEMORY = -2 };
enum { SF_KV_STORE = 0, SF_KV_REMOVE = 1, SF_KV_CLEAR = 2 };

typedef struct {
    uint32_t kind;
    uint32_t tiers; /* mask; 0 = no tier of ours: such runs are left out */
    uint64_t start; /* first key, and how many */
    uint64_t count;
} sf_kv_run_t;

typedef struct {
    const uint8_t *p, *end;
    uint64_t *keys;
    uint64_t n_keys, keys_room;
    sf_kv_run_t *runs;
    uint64_t n_runs, runs_room;
    uint64_t n_events;
} sf_kv_t;

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

static inline int sf_kv_run(sf_kv_t *kv, uint32_t kind, uint32_t tiers, uint64_t n_keys)
{
    sf_kv_run_t *last = kv->n_runs ? &kv->runs[kv->n_runs - 1] : NULL;
    if (last && last->kind == kind && last->tiers == tiers && kind != SF_KV_CLEAR) {
        last->count += n_keys;
        return SF_KV_OK;
    }
    if (kv->n_runs == kv->runs_room) {
        uint64_t room = kv->runs_room ? 2 * kv->runs_room : 16;
        sf_kv_run_t *runs = (sf_kv_run_t *)realloc(kv->runs, room * sizeof *runs);
        if (!runs) return SF_KV_NO_MEMORY;
        kv->runs = runs;
        kv->runs_room = room;
    }
    kv->runs[kv->n_runs++] = (sf_kv_run_t){kind, tiers, kv->n_keys - n_keys, n_keys};
    return SF_KV_OK;
}

/* Append the hashes of an event to the keys; *n_keys = how many. */
static inline int sf_kv_hashes(sf_kv_t *kv, uint64_t *n_keys)
{
    int64_t count = sf_kv_array(kv);
    /* A hash takes a byte at least, so that a short message cannot ask for much memory. */
    if (count < 0 || count > SF_KV_MAX_HASHES || !sf_kv_has(kv, (uint64_t)count)) return SF_KV_UNUSUAL;
    if (kv->n_keys + (uint64_t)count > kv->keys_room) {
        uint64_t room = 2 * (kv->n_keys + (uint64_t)count) + 64;
        uint64_t *keys = (uint64_t *)realloc(kv->keys, room * sizeof *keys);
        if (!keys) return SF_KV_NO_MEMORY;
        kv->keys = keys;
        kv->keys_room = room;
    }
    for (int64_t i = 0; i < count; i++) {
        if (sf_kv_has(kv, 9) && (*kv->p == 0xcf || *kv->p == 0xd3)) {
            uint64_t value;
            memcpy(&value, kv->p + 1, 8);
            kv->keys[kv->n_keys++] = __builtin_bswap64(value);
            kv->p += 9;
        } else {
            if (sf_kv_int(kv, &kv->keys[kv->n_keys])) return SF_KV_UNUSUAL;
            kv->n_keys++;
        }
    }
    *n_keys = (uint64_t)count;
    return SF_KV_OK;
}

/* Tiers of a medium as wire.kv_events.tier_mask; absent = NULL. */
static inline int sf_kv_tiers(const sf_kv_str_t *medium, int is_removal, uint32_t *tiers)
{
    if (!medium) *tiers = is_removal ? 7 : 1;
    else if (SF_KV_IS(medium, "GPU")) *tiers = 1;
    else if (SF_KV_IS(medium, "CPU_PINNED") || SF_KV_IS(medium, "CPU")) *tiers = 2;
    else if (SF_KV_IS(medium, "DISK") || SF_KV_IS(medium, "STORAGE")) *tiers = 4;
    else if (SF_KV_IS(medium, "EXTERNAL")) *tiers = 0;
    else return SF_KV_UNUSUAL;
    return SF_KV_OK;
}

enum {
    SF_KV_F_TYPE, SF_KV_F_HASHES, SF_KV_F_PARENT, SF_KV_F_TOKENS, SF_KV_F_SIZE, SF_KV_F_MEDIUM, SF_KV_F_NIL, SF_KV_F_SALT, SF_KV_F_OTHER
};

static inline int sf_kv_field(const sf_kv_str_t *key)
{
    if (SF_KV_IS(key, "type")) return SF_KV_F_TYPE;
    if (SF_KV_IS(key, "block_hashes")) return SF_KV_F_HASHES;
    if (SF_KV_IS(key, "parent_block_hash")) return SF_KV_F_PARENT;
    if (SF_KV_IS(key, "token_ids")) return SF_KV_F_TOKENS;
    if (SF_KV_IS(key, "block_size")) return SF_KV_F_SIZE;
    if (SF_KV_IS(key, "medium")) return SF_KV_F_MEDIUM;
    if (SF_KV_IS(key, "cache_salt")) return SF_KV_F_SALT;
    /* Told of vLLM or of an adapter: usual only when nil. */
    if (SF_KV_IS(key, "lora_id") || SF_KV_IS(key, "lora_name") || SF_KV_IS(key, "extra_keys") || SF_KV_IS(key, "group_idx") ||
        SF_KV_IS(key, "kv_cache_spec_kind"))
        return SF_KV_F_NIL;
    return SF_KV_F_OTHER;
}

static inline int sf_kv_value(sf_kv_t *kv, int field, sf_kv_str_t *text, uint64_t *n_keys)
{
    uint64_t number = 0;
    switch (field) {
    case SF_KV_F_TYPE:
        return sf_kv_string(kv, text);
    case SF_KV_F_HASHES:
        return sf_kv_hashes(kv, n_keys);
    case SF_KV_F_PARENT:
        return sf_kv_nil(kv) ? SF_KV_OK : sf_kv_int(kv, &number);
    case SF_KV_F_SIZE:
        if (sf_kv_int(kv, &number) || number >> 32) return SF_KV_UNUSUAL;
        return SF_KV_OK;
    case SF_KV_F_MEDIUM:
    case SF_KV_F_SALT:
        if (sf_kv_nil(kv)) {
            text->p = NULL;
            return SF_KV_OK;
        }
        if (sf_kv_string(kv, text)) return SF_KV_UNUSUAL;
        for (uint32_t i = 0; i < text->n; i++)
            if (text->p[i] >= 0x80) return SF_KV_UNUSUAL;
        return SF_KV_OK;
    case SF_KV_F_NIL:
        return sf_kv_nil(kv) ? SF_KV_OK : SF_KV_UNUSUAL;
    default:
        return sf_kv_skip(kv, 0);
    }
}

static int sf_kv_event(sf_kv_t *kv)
{
    static const int8_t order[8] = {
        SF_KV_F_TYPE, SF_KV_F_HASHES, SF_KV_F_PARENT, SF_KV_F_TOKENS, SF_KV_F_SIZE, SF_KV_F_NIL, SF_KV_F_MEDIUM, SF_KV_F_NIL,
    };
    sf_kv_str_t type = {NULL, 0}, medium = {NULL, 0}, salt, key;
    uint32_t seen = 0, tiers, needed;
    uint64_t n_keys = 0;
    int64_t n;
    int code, field, is_removal;

    n = sf_kv_map(kv);
    if (n >= 0) {
        for (int64_t i = 0; i < n; i++) {
            if (sf_kv_string(kv, &key)) return SF_KV_UNUSUAL;
            field = sf_kv_field(&key);
            if (field < SF_KV_F_NIL && seen >> field & 1) return SF_KV_UNUSUAL; /* twice */
            seen |= UINT32_C(1) << field;
            code = sf_kv_value(kv, field, field == SF_KV_F_TYPE ? &type : field == SF_KV_F_MEDIUM ? &medium : &salt, &n_keys);
            if (code) return code;
        }
        if (!type.p) return SF_KV_UNUSUAL;
    } else {
        n = sf_kv_array(kv);
        if (n < 1 || sf_kv_string(kv, &type)) return SF_KV_UNUSUAL;
        is_removal = SF_KV_IS(&type, "BlockRemoved");
        if (n > (is_removal ? 3 : SF_KV_IS(&type, "BlockStored") ? 8 : 1)) return SF_KV_UNUSUAL;
        seen = 1u << SF_KV_F_TYPE;
        for (int64_t i = 1; i < n; i++) {
            field = is_removal && i == 2 ? SF_KV_F_MEDIUM : order[i];
            seen |= UINT32_C(1) << field;
            code = sf_kv_value(kv, field, &medium, &n_keys);
            if (code) return code;
        }
    }
    kv->n_events++;
    if (SF_KV_IS(&type, "AllBlocksCleared")) {
        if (seen & 1u << SF_KV_F_HASHES) return SF_KV_UNUSUAL;
        return sf_kv_run(kv, SF_KV_CLEAR, 7, 0);
    }
    is_removal = SF_KV_IS(&type, "BlockRemoved");
    if (!is_removal && !SF_KV_IS(&type, "BlockStored")) return SF_KV_UNUSUAL;
    needed = 1u << SF_KV_F_HASHES;
    if (!is_removal) needed |= 1u << SF_KV_F_PARENT | 1u << SF_KV_F_TOKENS | 1u << SF_KV_F_SIZE;
    if ((seen & needed) != needed) return SF_KV_UNUSUAL;
    if (sf_kv_tiers(medium.p ? &medium : NULL, is_removal, &tiers)) return SF_KV_UNUSUAL;
    return sf_kv_run(kv, is_removal ? SF_KV_REMOVE : SF_KV_STORE, tiers, n_keys);
}

/* kv->p, kv->end = the payload, the rest zero. */
static int sf_kv_batch(sf_kv_t *kv)
{
    int64_t n_fields = sf_kv_array(kv), n_events;
    int code;
    if (n_fields < 2 || n_fields > 3 || !sf_kv_has(kv, 9) || *kv->p != 0xcb) return SF_KV_UNUSUAL;
    kv->p += 9;
    n_events = sf_kv_array(kv);
    if (n_events < 0) return SF_KV_UNUSUAL;
    for (; n_events; n_events--) {
        code = sf_kv_event(kv);
        if (code) return code;
    }
    if (n_fields == 3) {
        code = sf_kv_skip(kv, 0);
        if (code) return code;
    }
    return kv->p == kv->end ? SF_KV_OK : SF_KV_UNUSUAL;
}
#endif
