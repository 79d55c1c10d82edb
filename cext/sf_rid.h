/* Where a `rid` may be put into a JSON body without parsing it: one pass over the bytes, 64 at a time. */
#ifndef SF_RID_H
#define SF_RID_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef uint8_t sf_16_bytes __attribute__((vector_size(16)));

/* Where in these 16 bytes a string of three characters may begin whose first is an r. */
static inline sf_16_bytes sf_r_strings(const char *text) {
    sf_16_bytes left, first, right;
    memcpy(&left, text, 16);
    memcpy(&first, text + 1, 16);
    memcpy(&right, text + 4, 16);
    return (sf_16_bytes)((left == '"') & (first == 'r') & (right == '"'));
}

/* Does the JSON text hold the string "rid", quotes included? A quote inside of a string stands behind a backslash, so these five
 * bytes are a key or a value of their own (or the end of a string, which is as rare). */
static int sf_has_rid(const char *text, size_t length) {
    size_t at = 0;
    for (; at + 68 <= length; at += 64) {
        uint64_t found[2];
        sf_16_bytes any = sf_r_strings(text + at) | sf_r_strings(text + at + 16) | sf_r_strings(text + at + 32) |
                          sf_r_strings(text + at + 48);
        memcpy(found, &any, 16);
        if (found[0] | found[1])
            for (int i = 0; i < 64; i++)
                if (!memcmp(text + at + i, "\"rid\"", 5)) return 1;
    }
    for (; at + 5 <= length; at++)
        if (!memcmp(text + at, "\"rid\"", 5)) return 1;
    return 0;
}

static inline int sf_is_blank(char byte) { return byte == ' ' || byte == '\n' || byte == '\r' || byte == '\t'; }

/* Index behind the brace of an object that has a key but no string "rid" anywhere; -1 for all else. */
static int64_t sf_rid_place(const char *text, size_t length) {
    size_t at = 0, place;
    while (at < length && sf_is_blank(text[at])) at++;
    if (at == length || text[at] != '{') return -1;
    place = ++at;
    while (at < length && sf_is_blank(text[at])) at++;
    if (at == length || text[at] != '"') return -1; /* an empty object, or no JSON in UTF-8 */
    return sf_has_rid(text + at, length - at) ? -1 : (int64_t)place;
}
#endif
