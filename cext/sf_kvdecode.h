/* One pass over a KV event batch (msgpack): to runs of block keys (consecutive events of one kind and tier become one run), or, with
 * `wants_tokens`, to events with their token ids for whoever makes keys of those.
 *
 * It knows what engines send when nothing is special: both event shapes, hashes that are integers or bytes, known media, no adapter;
 * cache groups and empty extra keys only with tokens, salts only without. All else (another type or width than expected, a key twice, a
 * salt that is not ASCII, trailing bytes, deep nesting, an extension) ends with SF_KV_UNUSUAL and the caller takes the general
 * decoder, which decides whether it is an error. So this one may refuse whatever it likes, but what it accepts must mean the same
 * there. Every read is checked against the end; no allocation here except the growing arrays of sf_kv_t, which the caller frees.
 */
#ifndef SF_KVDECODE_H
#define SF_KVDECODE_H

#include "sf_kvread.h"

#define SF_KV_MAX_HASHES 65536u /* an event; the bound of wire/kv_events */

/* Add keys that end at `n_end` of `keys` to the last run, or begin one. */
static inline int sf_kv_run(sf_kv_t *kv, uint32_t kind, uint32_t tiers, uint64_t n_keys, uint64_t n_end)
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
    kv->runs[kv->n_runs++] = (sf_kv_run_t){kind, tiers, n_end - n_keys, n_keys};
    return SF_KV_OK;
}

/* A block's hash: an integer, or the last 8 of some bytes. */
static inline int sf_kv_hash(sf_kv_t *kv, uint64_t *out)
{
    uint64_t n;
    if (!sf_kv_has(kv, 2) || *kv->p != 0xc4) return sf_kv_int(kv, out);
    n = kv->p[1];
    if (n < 8 || !sf_kv_has(kv, 2 + n)) return SF_KV_UNUSUAL;
    *out = sf_kv_be(kv->p + 2 + n - 8, 8);
    kv->p += 2 + n;
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
            if (sf_kv_hash(kv, &kv->keys[kv->n_keys])) return SF_KV_UNUSUAL;
            kv->n_keys++;
        }
    }
    *n_keys = (uint64_t)count;
    return SF_KV_OK;
}

/* Append the token ids of an event: 4 bytes each, so nothing that needs more. */
static inline int sf_kv_tokens(sf_kv_t *kv, sf_kv_event_t *event)
{
    int64_t count = sf_kv_array(kv);
    const uint8_t *p = kv->p, *end = kv->end;
    uint32_t *out;
    if (count < 0 || !sf_kv_has(kv, (uint64_t)count)) return SF_KV_UNUSUAL;
    if (kv->n_tokens + (uint64_t)count > kv->tokens_room) {
        uint64_t room = 2 * (kv->n_tokens + (uint64_t)count) + 1024;
        uint32_t *tokens = (uint32_t *)realloc(kv->tokens, room * sizeof *tokens);
        if (!tokens) return SF_KV_NO_MEMORY;
        kv->tokens = tokens;
        kv->tokens_room = room;
    }
    event->first_token = kv->n_tokens;
    event->n_tokens = (uint64_t)count;
    out = kv->tokens + kv->n_tokens;
    for (; count; count--) {
        if (p < end && *p < 0x80) {
            *out++ = *p++;
        } else if (end - p >= 3 && *p == 0xcd) {
            *out++ = (uint32_t)p[1] << 8 | p[2];
            p += 3;
        } else if (end - p >= 5 && *p == 0xce) {
            uint32_t value;
            memcpy(&value, p + 1, 4);
            *out++ = __builtin_bswap32(value);
            p += 5;
        } else {
            uint64_t value;
            kv->p = p;
            if (sf_kv_int(kv, &value) || value >> 32) return SF_KV_UNUSUAL;
            *out++ = (uint32_t)value;
            p = kv->p;
        }
    }
    kv->p = p;
    kv->n_tokens += event->n_tokens;
    return SF_KV_OK;
}

/* nil, or an array of nothing but nils; *count = how many, -1 for nil. */
static inline int sf_kv_nils(sf_kv_t *kv, int64_t *count)
{
    int64_t n;
    *count = -1;
    if (sf_kv_nil(kv)) return SF_KV_OK;
    n = *count = sf_kv_array(kv);
    if (n < 0) return SF_KV_UNUSUAL;
    for (; n; n--)
        if (!sf_kv_nil(kv)) return SF_KV_UNUSUAL;
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
    SF_KV_F_TYPE, SF_KV_F_HASHES, SF_KV_F_PARENT, SF_KV_F_TOKENS, SF_KV_F_SIZE, SF_KV_F_MEDIUM, SF_KV_F_EXTRA, SF_KV_F_GROUP, SF_KV_F_SPEC,
    SF_KV_F_NIL, SF_KV_F_SALT, SF_KV_F_OTHER
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
    /* Told of an adapter: usual only when nil. */
    if (SF_KV_IS(key, "lora_id") || SF_KV_IS(key, "lora_name")) return SF_KV_F_NIL;
    if (SF_KV_IS(key, "extra_keys")) return SF_KV_F_EXTRA;
    if (SF_KV_IS(key, "group_idx")) return SF_KV_F_GROUP;
    if (SF_KV_IS(key, "kv_cache_spec_kind")) return SF_KV_F_SPEC;
    return SF_KV_F_OTHER;
}

typedef struct {
    sf_kv_event_t event;
    sf_kv_str_t type, medium;
    int64_t n_extra; /* blocks that extra_keys speaks of, -1 = none */
} sf_kv_fields_t;

static inline int sf_kv_ascii(sf_kv_t *kv, sf_kv_str_t *text)
{
    if (sf_kv_nil(kv)) {
        text->p = NULL;
        text->n = 0;
        return SF_KV_OK;
    }
    if (sf_kv_string(kv, text)) return SF_KV_UNUSUAL;
    for (uint32_t i = 0; i < text->n; i++)
        if (text->p[i] >= 0x80) return SF_KV_UNUSUAL;
    return SF_KV_OK;
}

static inline int sf_kv_value(sf_kv_t *kv, int field, sf_kv_fields_t *f)
{
    uint64_t number = 0;
    sf_kv_str_t text;
    switch (field) {
    case SF_KV_F_TYPE:
        return sf_kv_string(kv, &f->type);
    case SF_KV_F_HASHES:
        f->event.start = kv->n_keys;
        return sf_kv_hashes(kv, &f->event.count);
    case SF_KV_F_PARENT:
        if (sf_kv_nil(kv)) return SF_KV_OK;
        f->event.has_parent = 1;
        return sf_kv_hash(kv, &f->event.parent);
    case SF_KV_F_TOKENS:
        return kv->wants_tokens ? sf_kv_tokens(kv, &f->event) : sf_kv_skip(kv, 0);
    case SF_KV_F_SIZE:
        if (sf_kv_int(kv, &number) || number >> 32) return SF_KV_UNUSUAL;
        f->event.block_size = (uint32_t)number;
        return SF_KV_OK;
    case SF_KV_F_MEDIUM:
        return sf_kv_ascii(kv, &f->medium);
    case SF_KV_F_SALT:
        if (sf_kv_ascii(kv, &text)) return SF_KV_UNUSUAL;
        return kv->wants_tokens && text.n ? SF_KV_UNUSUAL : SF_KV_OK;
    case SF_KV_F_OTHER:
        return sf_kv_skip(kv, 0);
    }
    if (!kv->wants_tokens || field == SF_KV_F_NIL) return sf_kv_nil(kv) ? SF_KV_OK : SF_KV_UNUSUAL;
    if (field == SF_KV_F_EXTRA) return sf_kv_nils(kv, &f->n_extra);
    if (sf_kv_nil(kv)) return SF_KV_OK;
    if (field == SF_KV_F_GROUP) {
        if (sf_kv_int(kv, &number) || number >> 31) return SF_KV_UNUSUAL;
        f->event.group = (int64_t)number;
        return SF_KV_OK;
    }
    if (sf_kv_ascii(kv, &text)) return SF_KV_UNUSUAL;
    /* sliding_window_mla is a window, too. */
    f->event.spec = memmem(text.p, text.n, "full", 4) || (memmem(text.p, text.n, "mla", 3) && !memmem(text.p, text.n, "sliding", 7))
                        ? SF_KV_SPEC_MAIN
                        : SF_KV_SPEC_OTHER;
    return SF_KV_OK;
}

static int sf_kv_event(sf_kv_t *kv)
{
    static const int8_t order[10] = {
        SF_KV_F_TYPE, SF_KV_F_HASHES, SF_KV_F_PARENT, SF_KV_F_TOKENS, SF_KV_F_SIZE, SF_KV_F_NIL, SF_KV_F_MEDIUM, SF_KV_F_NIL,
        SF_KV_F_EXTRA, SF_KV_F_GROUP,
    };
    static const int8_t order_removed[4] = {SF_KV_F_TYPE, SF_KV_F_HASHES, SF_KV_F_MEDIUM, SF_KV_F_GROUP};
    sf_kv_fields_t f = {.event = {.group = -1}, .n_extra = -1};
    sf_kv_str_t key;
    uint32_t seen = 0, needed;
    int64_t n;
    int code, field, is_removal;

    n = sf_kv_map(kv);
    if (n >= 0) {
        for (int64_t i = 0; i < n; i++) {
            if (sf_kv_string(kv, &key)) return SF_KV_UNUSUAL;
            field = sf_kv_field(&key);
            if (field < SF_KV_F_NIL && seen >> field & 1) return SF_KV_UNUSUAL; /* twice */
            seen |= UINT32_C(1) << field;
            code = sf_kv_value(kv, field, &f);
            if (code) return code;
        }
        if (!f.type.p) return SF_KV_UNUSUAL;
    } else {
        n = sf_kv_array(kv);
        if (n < 1 || sf_kv_string(kv, &f.type)) return SF_KV_UNUSUAL;
        is_removal = SF_KV_IS(&f.type, "BlockRemoved");
        if (n > (is_removal ? 4 : SF_KV_IS(&f.type, "BlockStored") ? 10 : 1)) return SF_KV_UNUSUAL;
        seen = 1u << SF_KV_F_TYPE;
        for (int64_t i = 1; i < n; i++) {
            field = is_removal ? order_removed[i] : order[i];
            seen |= UINT32_C(1) << field;
            code = sf_kv_value(kv, field, &f);
            if (code) return code;
        }
    }
    kv->n_events++;
    if (SF_KV_IS(&f.type, "AllBlocksCleared")) {
        if (seen & 1u << SF_KV_F_HASHES) return SF_KV_UNUSUAL;
        f.event.kind = SF_KV_CLEAR;
        f.event.tiers = 7;
    } else {
        is_removal = SF_KV_IS(&f.type, "BlockRemoved");
        if (!is_removal && !SF_KV_IS(&f.type, "BlockStored")) return SF_KV_UNUSUAL;
        needed = 1u << SF_KV_F_HASHES;
        if (!is_removal) needed |= 1u << SF_KV_F_PARENT | 1u << SF_KV_F_TOKENS | 1u << SF_KV_F_SIZE;
        if ((seen & needed) != needed) return SF_KV_UNUSUAL;
        if (f.n_extra >= 0 && (uint64_t)f.n_extra != f.event.count) return SF_KV_UNUSUAL;
        f.event.kind = is_removal ? SF_KV_REMOVE : SF_KV_STORE;
        if (sf_kv_tiers(f.medium.p ? &f.medium : NULL, is_removal, &f.event.tiers)) return SF_KV_UNUSUAL;
    }
    if (!kv->wants_tokens) return sf_kv_run(kv, f.event.kind, f.event.tiers, f.event.count, kv->n_keys);
    if (kv->n_events > kv->events_room) {
        uint64_t room = 2 * kv->n_events + 16;
        sf_kv_event_t *events = (sf_kv_event_t *)realloc(kv->events, room * sizeof *events);
        if (!events) return SF_KV_NO_MEMORY;
        kv->events = events;
        kv->events_room = room;
    }
    kv->events[kv->n_events - 1] = f.event;
    return SF_KV_OK;
}

/* kv->p, kv->end = the payload, kv->wants_tokens as wanted, the rest zero, or what batches before it have left. */
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

/* Where a batch begins in what was made of those before it. */
typedef struct {
    uint64_t n_keys, n_runs, n_last, n_events, n_tokens;
} sf_kv_mark_t;

static inline sf_kv_mark_t sf_kv_mark(const sf_kv_t *kv)
{
    return (sf_kv_mark_t){kv->n_keys, kv->n_runs, kv->n_runs ? kv->runs[kv->n_runs - 1].count : 0, kv->n_events, kv->n_tokens};
}

/* Take back all that was made since the mark. */
static inline void sf_kv_undo(sf_kv_t *kv, const sf_kv_mark_t *mark)
{
    kv->n_keys = mark->n_keys;
    kv->n_runs = mark->n_runs;
    kv->n_events = mark->n_events;
    kv->n_tokens = mark->n_tokens;
    if (mark->n_runs) kv->runs[mark->n_runs - 1].count = mark->n_last;
}
#endif
