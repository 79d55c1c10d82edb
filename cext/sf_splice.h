/* What is read of a JSON body without parsing it, before keys are put at its end: where that is, and whether it may hold a batch.
 *
 * All of it rests on one thing: inside of a JSON string a quote stands behind a backslash, so a name with both of its quotes is a key
 * or a value of its own. Keys that spell a letter as \uXXXX are not found: nobody writes them. */
#ifndef SF_SPLICE_H
#define SF_SPLICE_H

#include "sf_rid.h"

/* Index of the brace that ends a JSON object; -1 when the text begins or ends with anything else. *is_empty: it has no key. */
static int64_t sf_splice_place(const char *text, size_t length, int *is_empty) {
    size_t at = 0, end = length;
    while (at < length && sf_is_blank(text[at])) at++;
    while (end > at && sf_is_blank(text[end - 1])) end--;
    if (end < at + 2 || text[at] != '{' || text[end - 1] != '}') return -1;
    at++;
    while (sf_is_blank(text[at])) at++; /* ends at the brace at the latest */
    *is_empty = at == end - 1;
    return (int64_t)(end - 1);
}

/* What stands behind `"name":` at an index of its first quote; 0 when no key stands there. */
static inline char sf_behind_key(const char *text, size_t length, size_t at, size_t name_length) {
    at += name_length + 2;
    while (at < length && sf_is_blank(text[at])) at++;
    if (at >= length || text[at] != ':') return 0;
    at++;
    while (at < length && sf_is_blank(text[at])) at++;
    return at < length ? text[at] : 0;
}

/* Has the text a key "n" with a number other than 0 and 1? 16 bytes at a time, because every chat is searched for it. */
static int sf_has_n(const char *text, size_t length) {
    size_t at = 0;
    for (; at + 3 <= length; at++) {
        for (; at + 18 <= length; at += 16) {
            uint64_t found[2];
            sf_16_bytes first, second, third;
            memcpy(&first, text + at, 16);
            memcpy(&second, text + at + 1, 16);
            memcpy(&third, text + at + 2, 16);
            first = (sf_16_bytes)((first == '"') & (second == 'n') & (third == '"'));
            memcpy(found, &first, 16);
            if (found[0] | found[1]) {
                at += found[0] ? __builtin_ctzll(found[0]) / 8 : 8 + __builtin_ctzll(found[1]) / 8;
                break;
            }
        }
        if (at + 3 <= length && !memcmp(text + at, "\"n\"", 3)) {
            size_t number = at + 3;
            char digit = sf_behind_key(text, length, at, 1);
            if (digit >= '2' && digit <= '9') return 1;
            if (digit == '1') {
                while (text[number] != '1') number++;
                number++;
                if (number < length && ((text[number] >= '0' && text[number] <= '9') || text[number] == 'e' || text[number] == 'E'))
                    return 1;
            }
        }
    }
    return 0;
}

/* Has the text a key `"name"` (quotes in `quoted`) with an array of strings, or of arrays? One of numbers is a single prompt. */
static int sf_has_list(const char *text, size_t length, const char *quoted, size_t quoted_length) {
    const char *at = text, *end = text + length;
    while ((at = (const char *)memmem(at, (size_t)(end - at), quoted, quoted_length))) {
        if (sf_behind_key(text, length, (size_t)(at - text), quoted_length - 2) == '[') {
            const char *item = (const char *)memchr(at, '[', (size_t)(end - at)) + 1;
            while (item < end && sf_is_blank(*item)) item++;
            if (item < end && (*item == '"' || *item == '[')) return 1;
        }
        at += quoted_length;
    }
    return 0;
}

/* May the body ask for several answers at once? kind: 0 = chat, 1 = completions, 2 = SGLang's /generate; never for others.
 * A yes may be wrong (the key is nested somewhere), a no is right. */
static int sf_may_be_batch(const char *text, size_t length, int kind) {
    if (kind < 0 || kind > 2) return 0;
    if (sf_has_n(text, length)) return 1;
    if (kind == 1) return sf_has_list(text, length, "\"prompt\"", 8);
    return kind == 2 && (sf_has_list(text, length, "\"text\"", 6) || sf_has_list(text, length, "\"input_ids\"", 11));
}
#endif
