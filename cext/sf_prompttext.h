/* A request body to keys of its prompt, from the raw bytes: no parsing into objects, no template, no tokens.
 *
 *   prompt   the raw JSON value of the first of input_ids, messages, prompt, input, text that is a string, an array or an object
 *   context  what else decides about a KV cache: model, tools, cache_salt, ...: the chain begins with a hash of their raw values; null
 *            is as good as nothing
 *   pieces   the prompt is cut at fixed places: every 128 bytes up to 2 KiB, from there 16 times in each doubling; a prompt of 16 bytes or
 *            more that ends before the first cut is one piece
 *   key i    = XXH3-64(key i-1 || XXH3-64(piece i))
 *
 * Equal beginnings of the raw prompt thus have equal keys up to the last cut inside them: at most a sixteenth less than what is
 * shared, with a number of keys that grows with the logarithm of the length. A client that writes the same conversation in another
 * way (spaces, escapes, order of names) shares nothing with itself: a key is a hint, not a proof.
 *
 * Bodies that are no JSON give keys of something or none; nothing outside of the body is read. Bounds: one step per byte at most over
 * SF_TEXT_SCAN_BYTES bytes, no recursion; what lies behind them counts as prompt when the prompt has begun by then.
 */
#ifndef SF_PROMPTTEXT_H
#define SF_PROMPTTEXT_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include "sf_xxh3.h"

#define SF_TEXT_SCAN_BYTES (UINT64_C(4) << 20)
#define SF_TEXT_KEYS_MAX 192u /* the cut at SF_TEXT_SCAN_BYTES */
#define SF_TEXT_STEP 128u
#define SF_TEXT_WHOLE_MIN 16u /* shorter ones have too few tokens for a share of them to mean anything */

typedef struct {
    const char *prompt; /* NULL: the body has none */
    uint64_t prompt_bytes;
    uint64_t context; /* hash of all that is not prompt and decides about the KV cache */
} sf_text_t;

/* Where piece i of a prompt ends, i from 1; 0 for i = 0. */
static inline uint64_t sf_text_cut(uint32_t i) {
    if (i <= 16) return (uint64_t)i * SF_TEXT_STEP;
    uint32_t doubling = (i - 17) / 16, step = (i - 17) % 16 + 1;
    return (uint64_t)(16 + step) * SF_TEXT_STEP << doubling;
}

static inline const char *_sf_skip_space(const char *p, const char *end) {
    while (p < end && (*p == ' ' || *p == '\n' || *p == '\r' || *p == '\t')) p++;
    return p;
}

/* p: behind an opening quote. Behind the closing one, NULL when there is none. */
static inline const char *_sf_skip_string(const char *p, const char *end) {
    while (p < end) {
#ifdef __SSE2__
        const __m128i quote = _mm_set1_epi8('"'), escape = _mm_set1_epi8('\\');
        for (; end - p >= 16; p += 16) {
            __m128i chunk = _mm_loadu_si128((const __m128i *)p);
            int found = _mm_movemask_epi8(_mm_or_si128(_mm_cmpeq_epi8(chunk, quote), _mm_cmpeq_epi8(chunk, escape)));
            if (found) {
                p += __builtin_ctz((unsigned)found);
                break;
            }
        }
        if (p == end) return NULL;
#endif
        if (*p == '"') return p + 1;
        if (*p != '\\') p++;
        else if (end - p < 2) return NULL;
        else p += 2; /* whatever is escaped, it ends no string */
    }
    return NULL;
}

/* p: at an opening bracket. Behind the one that closes it, NULL when there is none. */
static inline const char *_sf_skip_container(const char *p, const char *end) {
    uint64_t depth = 0;
    while (p < end) {
#ifdef __SSE2__
        /* '[' and '{', ']' and '}' differ in one bit. */
        const __m128i quote = _mm_set1_epi8('"'), bit = _mm_set1_epi8(0x20), open = _mm_set1_epi8('{'), close = _mm_set1_epi8('}');
        for (; end - p >= 16; p += 16) {
            __m128i chunk = _mm_loadu_si128((const __m128i *)p), low = _mm_or_si128(chunk, bit);
            __m128i bracket = _mm_or_si128(_mm_cmpeq_epi8(low, open), _mm_cmpeq_epi8(low, close));
            int found = _mm_movemask_epi8(_mm_or_si128(bracket, _mm_cmpeq_epi8(chunk, quote)));
            if (found) {
                p += __builtin_ctz((unsigned)found);
                break;
            }
        }
        if (p == end) return NULL;
#endif
        char ch = *p++;
        if (ch == '"') {
            p = _sf_skip_string(p, end);
            if (!p) return NULL;
        } else if (ch == '{' || ch == '[') depth++;
        else if ((ch == '}' || ch == ']') && --depth == 0) return p;
    }
    return NULL;
}

/* p: at the first byte of a value. Behind it, NULL when it has no end. */
static inline const char *_sf_skip_value(const char *p, const char *end) {
    if (p == end) return NULL;
    if (*p == '{' || *p == '[') return _sf_skip_container(p, end);
    if (*p == '"') return _sf_skip_string(p + 1, end);
    while (p < end && *p != ',' && *p != '}' && *p != ' ' && *p != '\n' && *p != '\r' && *p != '\t') p++;
    return p;
}

/* Rank of a member's name: 1.. = a prompt, the lower the better; -1.. = context; 0 = neither. */
static inline int _sf_text_role(const char *name, uint64_t n) {
    static const char *const prompts[] = {"input_ids", "messages", "prompt", "input", "text"};
    static const char *const context[] = {"model", "tools", "cache_salt", "lora_path", "extra_key", "chat_template_kwargs",
                                          "instructions", "reasoning_effort"};
    for (int i = 0; i < (int)(sizeof prompts / sizeof *prompts); i++)
        if (strlen(prompts[i]) == n && !memcmp(prompts[i], name, n)) return i + 1;
    for (int i = 0; i < (int)(sizeof context / sizeof *context); i++)
        if (strlen(context[i]) == n && !memcmp(context[i], name, n)) return -1 - i;
    return 0;
}

/* Find prompt and context in a body of n bytes. */
static inline void sf_text_find(sf_text_t *text, const char *body, uint64_t n) {
    const char *end = body + (n < SF_TEXT_SCAN_BYTES ? n : SF_TEXT_SCAN_BYTES), *p = _sf_skip_space(body, end);
    int best = 0;
    memset(text, 0, sizeof *text);
    if (p == end || *p != '{') return;
    do {
        const char *name = _sf_skip_space(p + 1, end), *value;
        if (name == end || *name != '"') return;
        p = _sf_skip_string(++name, end);
        if (!p) return;
        int role = _sf_text_role(name, (uint64_t)(p - 1 - name)), is_text;
        p = _sf_skip_space(p, end);
        if (p == end || *p != ':') return;
        value = _sf_skip_space(p + 1, end);
        if (value == end) return;
        is_text = *value == '"' || *value == '[' || *value == '{';
        p = _sf_skip_value(value, end);
        if (role > 0 && is_text && (!best || role <= best) && (p || end < body + n)) {
            best = role;
            text->prompt = value;
            text->prompt_bytes = p ? (uint64_t)(p - value) : (uint64_t)(body + n - value);
        }
        if (!p) return;
        /* A sum, so that the order of the names does not count. */
        if (role < 0 && (p - value != 4 || memcmp(value, "null", 4)))
            text->context += sf_xxh3(value, (size_t)(p - value), 0, sf_xxh3_secret) * (uint64_t)(1 - 2 * role);
        p = _sf_skip_space(p, end);
    } while (p < end && *p == ',');
}

/* The key behind a piece. link: the chain so far, and where its next hash goes. */
static inline uint64_t _sf_text_key(uint64_t *link, const char *piece, uint64_t n_bytes) {
    link[1] = sf_xxh3(piece, n_bytes, 0, sf_xxh3_secret);
    link[0] = sf_xxh3_0_to_16((const uint8_t *)link, 2 * sizeof *link, 0);
    return link[0] ? link[0] : 1;
}

/* Keys of the prompt's pieces, at most SF_TEXT_KEYS_MAX; none is 0. Returns how many. */
static inline uint32_t sf_text_keys(const sf_text_t *text, uint64_t *keys) {
    uint64_t link[2] = {text->context, 0}, at = 0, cut;
    uint32_t n = 0;
    while (n < SF_TEXT_KEYS_MAX && (cut = sf_text_cut(n + 1)) <= text->prompt_bytes) {
        keys[n++] = _sf_text_key(link, text->prompt + at, cut - at);
        at = cut;
    }
    if (!n && text->prompt_bytes >= SF_TEXT_WHOLE_MIN) keys[n++] = _sf_text_key(link, text->prompt, text->prompt_bytes);
    return n;
}
#endif
