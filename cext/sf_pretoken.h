/* Where byte-level BPE tokenizers cut ASCII text before they merge anything: the patterns of the models of today, written out.
 *
 *   GPT2     's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
 *   LLAMA3   (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+
 *   QWEN2    as LLAMA3, with \p{N}
 *   O200K    of words with their case, and what may follow on one:
 *            [^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|
 *            [^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|
 *            \p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+
 *   TEKKEN   as O200K, with \p{N} and without what may follow
 *
 * Law: for ASCII text the function gives what the pattern matches at that place, in a text that ends at `end`.
 */
#ifndef SF_PRETOKEN_H
#define SF_PRETOKEN_H

#include <stddef.h>
#include <stdint.h>

/* From DEEPSEEK3 on: for text of any script only (sf_unitoken.h). */
enum { SF_PRE_GPT2, SF_PRE_LLAMA3, SF_PRE_QWEN2, SF_PRE_O200K, SF_PRE_TEKKEN, SF_PRE_DEEPSEEK3, SF_PRE_KINDS };

enum { _SF_OTHER, _SF_LETTER, _SF_DIGIT, _SF_SPACE };

static const uint8_t _sf_pre_class[128] = {
    ['\t'] = _SF_SPACE, ['\n'] = _SF_SPACE, ['\v'] = _SF_SPACE, ['\f'] = _SF_SPACE, ['\r'] = _SF_SPACE, [' '] = _SF_SPACE,
    ['0' ... '9'] = _SF_DIGIT, ['A' ... 'Z'] = _SF_LETTER, ['a' ... 'z'] = _SF_LETTER,
};

static inline int _sf_class(const char *p) { return _sf_pre_class[(uint8_t)*p & 127]; }

/* Behind the bytes of one class from `p` on. */
static inline const char *_sf_pre_run(const char *p, const char *end, int class) {
    while (p < end && _sf_class(p) == class) p++;
    return p;
}

/* 's 't 'm 'd 're 've 'll: behind it, or NULL. fold: 0x20 for either case, else 0. */
static inline const char *_sf_contraction(const char *p, const char *end, char fold) {
    if (*p != '\'' || end - p < 2) return NULL;
    char first = (char)(p[1] | fold), second = end - p > 2 ? (char)(p[2] | fold) : 0;
    if (first == 's' || first == 't' || first == 'm' || first == 'd') return p + 2;
    if ((first == 'r' || first == 'v') ? second == 'e' : first == 'l' && second == 'l') return p + 3;
    return NULL;
}

/* \s+(?!\S)|\s+ at white space: all of it at the end of the text, else all but its last, unless that is the only one. */
static inline const char *_sf_pre_space(const char *p, const char *end) {
    const char *stop = _sf_pre_run(p, end, _SF_SPACE);
    return stop == end || stop - p == 1 ? stop : stop - 1;
}

static inline const char *_sf_gpt2_end(const char *p, const char *end) {
    const char *found = _sf_contraction(p, end, 0), *body = p + (*p == ' ' && p + 1 < end);
    if (found) return found;
    int class = _sf_class(body);
    return class == _SF_SPACE ? _sf_pre_space(p, end) : _sf_pre_run(body, end, class);
}

static inline const char *_sf_pre_digits(const char *p, const char *end, int most) {
    const char *found = p + 1;
    while (found < end && found - p < most && _sf_class(found) == _SF_DIGIT) found++;
    return found;
}

/* ` ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+` at what no word begins with. more: may follow as line ends do. */
static inline const char *_sf_pre_rest(const char *p, const char *end, char more) {
    const char *body = p + (*p == ' ' && p + 1 < end), *found;
    if (_sf_class(body) == _SF_OTHER) {
        body = _sf_pre_run(body, end, _SF_OTHER);
        while (body < end && (*body == '\r' || *body == '\n' || *body == more)) body++;
        return body;
    }
    found = _sf_pre_run(p, end, _SF_SPACE);
    while (found > p && found[-1] != '\r' && found[-1] != '\n') found--;
    return found > p ? found : _sf_pre_space(p, end);
}

static inline const char *_sf_llama3_end(const char *p, const char *end, int digits) {
    const char *found = _sf_contraction(p, end, 0x20);
    int class = _sf_class(p);
    if (found) return found;
    if (class == _SF_LETTER) return _sf_pre_run(p, end, _SF_LETTER);
    if (class == _SF_DIGIT) return _sf_pre_digits(p, end, digits);
    if (*p != '\r' && *p != '\n' && p + 1 < end && _sf_class(p + 1) == _SF_LETTER) return _sf_pre_run(p + 1, end, _SF_LETTER);
    return _sf_pre_rest(p, end, '\n');
}

static inline const char *_sf_o200k_end(const char *p, const char *end, int digits, int has_contractions) {
    const char *found;
    int class = _sf_class(p);
    if (class == _SF_DIGIT) return _sf_pre_digits(p, end, digits);
    if (class != _SF_LETTER) {
        if (*p == '\r' || *p == '\n' || p + 1 == end || _sf_class(p + 1) != _SF_LETTER) return _sf_pre_rest(p, end, '/');
        p++;
    }
    while (p < end && (uint8_t)(*p - 'A') < 26) p++;
    while (p < end && (uint8_t)(*p - 'a') < 26) p++;
    found = has_contractions && p < end ? _sf_contraction(p, end, 0x20) : NULL;
    return found ? found : p;
}

/* p < end, ASCII. */
static inline const char *sf_pretoken_end(int kind, const char *p, const char *end) {
    if (kind == SF_PRE_GPT2) return _sf_gpt2_end(p, end);
    if (kind >= SF_PRE_O200K) return _sf_o200k_end(p, end, kind == SF_PRE_O200K ? 3 : 1, kind == SF_PRE_O200K);
    return _sf_llama3_end(p, end, kind == SF_PRE_LLAMA3 ? 3 : 1);
}
#endif
