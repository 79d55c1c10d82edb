/* Where the messages of a chat body stand: one pass over its JSON (RFC 8259), as strict about structure as a split of it needs.
 *
 *   body = white-space { members } white-space, one member is "messages": [ {...} , {...} ], one may be "tools", others are stepped over
 *
 * Law: when this takes a body, the body is valid JSON exactly if each message is, and the tools, and so is the body with [] in place of
 * the messages and null in place of the tools; and then its "messages" and "tools" are those found here. It follows from what is checked:
 * the bytes between the pieces (white space, one comma each), that both names are written once and as they are (a name with an escape
 * could be the same one), and that what follows the first is an array of objects. Inside the pieces only strings are told from all else
 * and brackets counted, so that in a valid body the ends are right; in an invalid one some piece is invalid, which its reader finds. Tests
 * hold it against a parser.
 *
 * Bounds: one step per byte at most, no recursion, 64 bytes at a time inside strings; at most SF_JSON_MESSAGES messages.
 */
#ifndef SF_JSON_H
#define SF_JSON_H

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __SSE2__
#include <immintrin.h>
#endif

#define SF_JSON_MESSAGES (1 << 16) /* each costs some 60 ns here; who sends more has time */

enum { SF_JSON_OK = 0, SF_JSON_UNUSUAL = -1, SF_JSON_NO_MEMORY = -2 };

typedef struct {
    uint64_t start, end; /* of the object in the body */
    int is_flat;         /* no object or array inside it */
} sf_json_message_t;

typedef struct {
    sf_json_message_t *messages; /* the caller frees them, whatever was returned */
    uint32_t n_messages, capacity;
    uint64_t array_start, array_end; /* of the whole array in the body */
    uint64_t tools_start, tools_end; /* of the value; 0 and 0 for none */
} sf_json_chat_t;

static inline const char *_sf_json_space(const char *p, const char *end) {
    while (p < end && (*p == ' ' || *p == '\n' || *p == '\r' || *p == '\t')) p++;
    return p;
}

#ifdef __SSE2__
/* Bit i: whether byte i of the 64 at `p` is `ch`. */
static inline uint64_t _sf_json_places(const char *p, char ch) {
    const __m128i wanted = _mm_set1_epi8(ch);
    uint64_t found = 0;
    for (int i = 0; i < 4; i++)
        found |= (uint64_t)(uint32_t)_mm_movemask_epi8(_mm_cmpeq_epi8(_mm_loadu_si128((const __m128i *)p + i), wanted)) << 16 * i;
    return found;
}

__attribute__((target("avx2"))) static inline uint64_t _sf_json_places_avx2(const char *p, char ch) {
    const __m256i wanted = _mm256_set1_epi8(ch);
    const __m256i low = _mm256_cmpeq_epi8(_mm256_loadu_si256((const __m256i *)p), wanted);
    const __m256i high = _mm256_cmpeq_epi8(_mm256_loadu_si256((const __m256i *)p + 1), wanted);
    return (uint32_t)_mm256_movemask_epi8(low) | (uint64_t)(uint32_t)_mm256_movemask_epi8(high) << 32;
}

/* Which of 64 bytes are escaped, when backslashes stand side by side. A byte is escaped when the run of backslashes before it is odd: each
 * run is added to its own first bit, so that the carry ends behind it, and the parity of both places tells its length (the method is that
 * of Langdale and Lemire, "Parsing Gigabytes of JSON per Second", 3.1.1). carried: 1 = the first byte is escaped; then the same of the
 * next 64. */
static inline uint64_t _sf_json_escaped(uint64_t slashes, uint64_t *carried) {
    const uint64_t even = UINT64_C(0x5555555555555555);
    uint64_t ends, follows;
    slashes &= ~*carried;
    follows = slashes << 1 | *carried;
    *carried = __builtin_add_overflow(slashes & ~even & ~follows, slashes, &ends);
    return (even ^ ends << 1) & follows;
}

/* The first quote that is not escaped, or the place from which on less than 64 bytes are left, which is then not inside an escape. */
#define SF_JSON_LONG_QUOTE(name, attributes, places) \
    attributes static const char *name(const char *p, const char *end) { \
        uint64_t carried = 0; \
        for (; end - p >= 64; p += 64) { \
            uint64_t quotes = places(p, '"'), slashes = places(p, '\\'), escaped = slashes << 1 | carried; \
            if (__builtin_expect(!(slashes & escaped), 1)) carried = slashes >> 63; /* each alone, as nearly all are */ \
            else escaped = _sf_json_escaped(slashes, &carried); \
            quotes &= ~escaped; \
            if (quotes) return p + __builtin_ctzll(quotes); \
        } \
        return p + carried; \
    }
SF_JSON_LONG_QUOTE(_sf_json_long_quote, , _sf_json_places)
SF_JSON_LONG_QUOTE(_sf_json_long_quote_avx2, __attribute__((target("avx2"))), _sf_json_places_avx2)
#endif

/* p: behind the opening quote. The place of the closing one, NULL when there is none. is_narrow: without registers of 32 bytes. */
static inline const char *sf_json_string_end(const char *p, const char *end, int is_narrow) {
#ifdef __SSE2__
    /* 64 bytes at a time without a jump that depends on the text. */
    if (end - p >= 64) p = !is_narrow && __builtin_cpu_supports("avx2") ? _sf_json_long_quote_avx2(p, end) : _sf_json_long_quote(p, end);
#endif
    while (p < end) {
        if (*p == '"') return p;
        p += *p == '\\' ? 2 : 1; /* whatever is escaped, it ends no string */
    }
    return NULL;
}

static inline const char *_sf_json_quote(const char *p, const char *end) { return sf_json_string_end(p, end, 0); }

/* p: at an opening bracket. Behind the one that closes it, NULL when there is none. depth: the deepest nesting seen, 1 = no inner one. */
static inline const char *_sf_json_container(const char *p, const char *end, uint64_t *depth) {
    uint64_t level = 0;
    *depth = 0;
    while (p < end) {
        char ch = *p++;
        if (ch == '"') {
            p = _sf_json_quote(p, end);
            if (!p) return NULL;
            p++;
        } else if (ch == '{' || ch == '[') {
            if (++level > *depth) *depth = level;
        } else if ((ch == '}' || ch == ']') && --level == 0) return p;
    }
    return NULL;
}

/* p: at the first byte of a value. Behind it, NULL when there is no end. */
static inline const char *_sf_json_value(const char *p, const char *end) {
    uint64_t depth;
    if (p == end) return NULL;
    if (*p == '{' || *p == '[') return _sf_json_container(p, end, &depth);
    if (*p == '"') {
        p = _sf_json_quote(p + 1, end);
        return p ? p + 1 : NULL;
    }
    while (p < end && *p != ',' && *p != '}' && *p != ']' && *p != '"') p++;
    return p;
}

/* p: at the "[" of the messages. Behind its "]", NULL when it is unusual or (code) memory is out. */
static inline const char *_sf_json_messages(sf_json_chat_t *chat, const char *base, const char *p, const char *end, int *code) {
    for (p++;; p++) {
        uint64_t depth;
        p = _sf_json_space(p, end);
        if (p == end || *p != '{' || chat->n_messages == SF_JSON_MESSAGES) return NULL;
        if (chat->n_messages == chat->capacity) {
            uint32_t capacity = chat->capacity ? 4 * chat->capacity : 32;
            sf_json_message_t *grown = realloc(chat->messages, capacity * sizeof *grown);
            if (!grown) {
                *code = SF_JSON_NO_MEMORY;
                return NULL;
            }
            chat->messages = grown;
            chat->capacity = capacity;
        }
        sf_json_message_t *message = &chat->messages[chat->n_messages++];
        message->start = (uint64_t)(p - base);
        p = _sf_json_container(p, end, &depth);
        if (!p) return NULL;
        message->end = (uint64_t)(p - base);
        message->is_flat = depth == 1;
        p = _sf_json_space(p, end);
        if (p == end) return NULL;
        if (*p == ']') return p + 1;
        if (*p != ',') return NULL;
    }
}

/* `chat` must be all zero. SF_JSON_UNUSUAL: not of the form above, so another reader must decide what it is. */
static inline int sf_json_scan_chat(sf_json_chat_t *chat, const char *base, size_t len) {
    const char *end = base + len, *p = _sf_json_space(base, end);
    int code = SF_JSON_UNUSUAL;

    if (p == end || *p != '{') return code;
    do {
        const char *name = _sf_json_space(p + 1, end), *name_end;
        if (name == end || *name != '"') return code;
        name_end = _sf_json_quote(++name, end);
        if (!name_end || memchr(name, '\\', (size_t)(name_end - name))) return code;
        p = _sf_json_space(name_end + 1, end);
        if (p == end || *p != ':') return code;
        p = _sf_json_space(p + 1, end);
        if (name_end - name == 8 && !memcmp(name, "messages", 8)) {
            if (chat->n_messages || p == end || *p != '[') return code;
            chat->array_start = (uint64_t)(p - base);
            p = _sf_json_messages(chat, base, p, end, &code);
            if (!p) return code;
            chat->array_end = (uint64_t)(p - base);
        } else {
            const char *value = p;
            p = _sf_json_value(p, end);
            if (p && name_end - name == 5 && !memcmp(name, "tools", 5)) {
                if (chat->tools_end || p == value) return code;
                chat->tools_start = (uint64_t)(value - base);
                chat->tools_end = (uint64_t)(p - base);
            }
        }
        if (!p) return code;
        p = _sf_json_space(p, end);
    } while (p < end && *p == ',');
    if (p == end || *p != '}' || _sf_json_space(p + 1, end) != end) return code;
    return chat->n_messages ? SF_JSON_OK : code;
}
#endif
