/* What a JSON body says of a data-parallel rank, without parsing it: whether it names one, and where a field may be put in front. */
#ifndef SF_RANK_H
#define SF_RANK_H

#include "sf_rid.h"

/* Where in these 16 bytes an `_r....."` may begin whose sixth byte is a quote: the end of both names below. */
static inline sf_16_bytes sf_rank_ends(const char *text) {
    sf_16_bytes first, second, sixth;
    memcpy(&first, text, 16);
    memcpy(&second, text + 1, 16);
    memcpy(&sixth, text + 5, 16);
    return (sf_16_bytes)((first == '_') & (second == 'r') & (sixth == '"'));
}

/* Is this the end of `"routed_dp_rank"` or `"data_parallel_rank"`, quotes included? at: of `_rank"`; six bytes are there. */
static inline int sf_is_rank_name(const char *text, size_t at) {
    if (memcmp(text + at, "_rank\"", 6)) return 0;
    return (at >= 10 && !memcmp(text + at - 10, "\"routed_dp", 10)) || (at >= 14 && !memcmp(text + at - 14, "\"data_parallel", 14));
}

/* Does the JSON text hold one of these strings? A quote inside of a string stands behind a backslash, so it is a key or a value of its
 * own (or the end of a string, which is as rare). */
static int sf_names_rank(const char *text, size_t length) {
    size_t at = 0;
    for (; at + 69 <= length; at += 64) {
        uint64_t found[2];
        sf_16_bytes any = sf_rank_ends(text + at) | sf_rank_ends(text + at + 16) | sf_rank_ends(text + at + 32) | sf_rank_ends(text + at + 48);
        memcpy(found, &any, 16);
        if (found[0] | found[1])
            for (size_t i = at; i < at + 64; i++)
                if (sf_is_rank_name(text, i)) return 1;
    }
    for (; at + 6 <= length; at++)
        if (sf_is_rank_name(text, at)) return 1;
    return 0;
}

/* Index behind the brace of a JSON object that has a key, where a field may be put that equal ones behind it override; -1 for all else. */
static int64_t sf_front_place(const char *text, size_t length) {
    size_t at = 0, place;
    while (at < length && sf_is_blank(text[at])) at++;
    if (at == length || text[at] != '{') return -1;
    place = ++at;
    while (at < length && sf_is_blank(text[at])) at++;
    return at < length && text[at] == '"' ? (int64_t)place : -1; /* else an empty object, or no JSON in UTF-8 */
}
#endif
