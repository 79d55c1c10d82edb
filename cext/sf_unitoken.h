/* Where byte-level BPE tokenizers cut text of any script before they merge anything: the patterns of sf_pretoken.h for all of Unicode, and
 * those that are more than one pattern.
 *
 *   DEEPSEEK3   three cuts, each inside of what the one before has left: \p{N}{1,3}, then [U+4E00-U+9FA5 U+3040-U+309F U+30A0-U+30FF]+, then
 *               [!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+
 *
 * What \p{L}, \p{N}, \s and the others are is read from a table with a byte for each character, which prompt/scripts.py makes by asking
 * the tokenizer's own library: versions of Unicode differ. A character that the library must see itself is FOREIGN: what the table does not
 * reach, and where text is normalized, all that is changed by its neighbours or by itself.
 *
 * Law: for text without a foreign character the function gives what the patterns match at that place, in a text that ends at `end`. All
 * text is valid UTF-8.
 */
#ifndef SF_UNITOKEN_H
#define SF_UNITOKEN_H

#include "sf_pretoken.h"

/* The low three bits of a character's byte; the first four are _SF_OTHER.. of sf_pretoken.h. An apostrophe is of its own kind where a word
 * may go on with one. */
enum { _SF_MARK = 4, _SF_PUNCT = 5, _SF_APOSTROPHE = 6, _SF_KIND = 7 };
/* Of O200K and TEKKEN: [\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}], with which words begin, and [\p{Ll}\p{Lm}\p{Lo}\p{M}], with which they go on. */
#define SF_UNI_FRONT 0x08
#define SF_UNI_BACK 0x10
#define SF_UNI_IDEOGRAPH 0x40 /* of the second cut of DEEPSEEK3 */
#define SF_UNI_FOREIGN 0x80
#define SF_UNI_CHARS 0x20000u /* the table's length */
#define _SF_NONE (-1)         /* no character: here the text ends */

/* A character's byte, and where the next one begins. */
static inline int _sf_uni_at(const uint8_t *table, const char *at, const char **next) {
    const uint8_t *p = (const uint8_t *)at;
    uint32_t code;
    if (p[0] < 0x80) {
        *next = at + 1;
        return table[p[0]];
    }
    if (p[0] < 0xe0) {
        code = (p[0] & 0x1fu) << 6 | (p[1] & 0x3fu);
        *next = at + 2;
    } else if (p[0] < 0xf0) {
        code = (p[0] & 0xfu) << 12 | (p[1] & 0x3fu) << 6 | (p[2] & 0x3fu);
        *next = at + 3;
    } else {
        code = (p[0] & 7u) << 18 | (p[1] & 0x3fu) << 12 | (p[2] & 0x3fu) << 6 | (p[3] & 0x3fu);
        *next = at + 4;
    }
    return code < SF_UNI_CHARS ? table[code] : SF_UNI_FOREIGN;
}

/* A part of the text in which all cuts are made with one of the patterns: between `p` and `end`, of DEEPSEEK3 only as far as the characters
 * are all of the second cut, or all not, and no digits. */
typedef struct {
    const uint8_t *table;
    const char *end;
    int is_split, flag;
} _sf_uni_t;

static inline int _sf_uni_kind(const _sf_uni_t *u, const char *p, const char **next) {
    if (p == u->end) return _SF_NONE;
    int byte = _sf_uni_at(u->table, p, next), kind = byte & _SF_KIND;
    return u->is_split && ((byte & SF_UNI_IDEOGRAPH) != u->flag || kind == _SF_DIGIT) ? _SF_NONE : kind;
}

/* Behind the characters from `p` on whose kinds are among those of the bits of `kinds`, at most `most` of them. */
static inline const char *_sf_uni_run(const _sf_uni_t *u, const char *p, int kinds, int most) {
    const char *next = p;
    for (int kind; most && (kind = _sf_uni_kind(u, p, &next)) >= 0 && kinds >> kind & 1; most--) p = next;
    return p;
}

#define _SF_BIT(kind) (1 << (kind))
#define _SF_ANY INT32_MAX

static inline int _sf_is_line_end(char ch) { return ch == '\r' || ch == '\n'; }

/* \s*[\r\n]+|\s+(?!\S)|\s+ at white space; has_lines: with the first of them. */
static inline const char *_sf_uni_space(const _sf_uni_t *u, const char *p, int has_lines) {
    const char *begin = p, *last = p, *line = NULL, *next = p;
    int kind;
    while ((kind = _sf_uni_kind(u, p, &next)) == _SF_SPACE) {
        if (_sf_is_line_end(*p)) line = next;
        last = p, p = next;
    }
    if (has_lines && line) return line;
    return kind == _SF_NONE || last == begin ? p : last;
}

static inline const char *_sf_uni_gpt2_end(const _sf_uni_t *u, const char *p) {
    const char *found = _sf_contraction(p, u->end, 0), *body = p + (*p == ' ' && p + 1 < u->end), *next;
    if (found) return found;
    int kind = _sf_uni_kind(u, body, &next);
    return kind == _SF_SPACE ? _sf_uni_space(u, p, 0) : _sf_uni_run(u, body, _SF_BIT(kind), _SF_ANY);
}

static inline const char *_sf_uni_llama3_end(const _sf_uni_t *u, const char *p, int digits) {
    const char *found = _sf_contraction(p, u->end, 0x20), *next = p, *behind;
    if (found) return found;
    int kind = _sf_uni_kind(u, p, &next);
    if (kind == _SF_LETTER) return _sf_uni_run(u, next, _SF_BIT(_SF_LETTER), _SF_ANY);
    if (kind == _SF_DIGIT) return _sf_uni_run(u, p, _SF_BIT(_SF_DIGIT), digits);
    int second = _sf_uni_kind(u, next, &behind);
    if (!_sf_is_line_end(*p) && second == _SF_LETTER) return _sf_uni_run(u, next, _SF_BIT(_SF_LETTER), _SF_ANY);
    if (kind == _SF_OTHER || (*p == ' ' && second == _SF_OTHER)) {
        found = _sf_uni_run(u, next, _SF_BIT(_SF_OTHER), _SF_ANY);
        while (found < u->end && _sf_is_line_end(*found)) found++;
        return found;
    }
    return _sf_uni_space(u, p, 1);
}

static inline int _sf_is_punct(char ch) {
    return (ch >= '!' && ch <= '/') || (ch >= ':' && ch <= '@') || (ch >= '[' && ch <= '`') || (ch >= '{' && ch <= '~');
}

static inline const char *_sf_uni_deepseek3_end(_sf_uni_t *u, const char *p) {
    const int letters = _SF_BIT(_SF_LETTER) | _SF_BIT(_SF_MARK);
    const char *next, *behind, *found;
    int byte = _sf_uni_at(u->table, p, &next), kind = byte & _SF_KIND;
    if (kind == _SF_DIGIT) return _sf_uni_run(u, p, _SF_BIT(_SF_DIGIT), 3);
    u->is_split = 1;
    u->flag = byte & SF_UNI_IDEOGRAPH;
    if (_sf_is_punct(*p)) {
        for (found = next; found < u->end && (uint8_t)((*found | 0x20) - 'a') < 26;) found++;
        if (found > next) return found;
    }
    if (letters >> kind & 1) return _sf_uni_run(u, next, letters, _SF_ANY);
    int second = _sf_uni_kind(u, next, &behind);
    if (kind != _SF_PUNCT && !_sf_is_line_end(*p) && second >= 0 && letters >> second & 1) return _sf_uni_run(u, behind, letters, _SF_ANY);
    if (kind == _SF_PUNCT || (*p == ' ' && second == _SF_PUNCT)) {
        found = _sf_uni_run(u, next, _SF_BIT(_SF_PUNCT), _SF_ANY);
        while (!u->flag && found < u->end && _sf_is_line_end(*found)) found++; /* no digit, nor of the second cut, which U+309B is */
        return found;
    }
    if (kind == _SF_SPACE) return _sf_uni_space(u, p, 1);
    /* What no pattern matches stays together, up to where one does. */
    for (;;) {
        p = next, kind = second;
        if (kind != _SF_OTHER) return p;
        next = behind, second = _sf_uni_kind(u, next, &behind);
        if (second >= 0 && letters >> second & 1) return p;
    }
}

/* A word of O200K from its first letter or mark on. *is_whole: it has the second part, which is sought first; what the first one has taken
 * too much of is given back for that. */
static inline const char *_sf_uni_cased_word(const _sf_uni_t *u, const char *p, int *is_whole) {
    const char *next = p, *either = NULL; /* behind the last character that both parts have */
    int byte = 0;
    *is_whole = 1;
    for (; p < u->end && (byte = _sf_uni_at(u->table, p, &next)) & SF_UNI_FRONT; p = next)
        if (byte & SF_UNI_BACK) either = next;
    if (p < u->end && byte & SF_UNI_BACK) {
        do p = next;
        while (p < u->end && _sf_uni_at(u->table, p, &next) & SF_UNI_BACK);
        return p;
    }
    if (either) return either;
    *is_whole = 0;
    return p;
}

static inline const char *_sf_uni_o200k_end(const _sf_uni_t *u, const char *p, int digits, int has_contractions) {
    const int others = _SF_BIT(_SF_OTHER) | _SF_BIT(_SF_MARK) | _SF_BIT(_SF_APOSTROPHE), cased = SF_UNI_FRONT | SF_UNI_BACK;
    const char *next, *behind, *found;
    int kind = _sf_uni_at(u->table, p, &next) & _SF_KIND, is_before = 0, is_whole;
    if (kind == _SF_DIGIT) return _sf_uni_run(u, p, _SF_BIT(_SF_DIGIT), digits);
    if (kind != _SF_LETTER) is_before = !_sf_is_line_end(*p) && next < u->end && _sf_uni_at(u->table, next, &behind) & cased;
    if (kind == _SF_LETTER || kind == _SF_MARK || is_before) {
        p = _sf_uni_cased_word(u, is_before ? next : p, &is_whole);
        if (kind == _SF_MARK && !is_whole) return next; /* a word of two parts by itself */
        found = has_contractions && p < u->end ? _sf_contraction(p, u->end, 0x20) : NULL;
        return found ? found : p;
    }
    if (others >> kind & 1 || (*p == ' ' && next < u->end && others >> _sf_uni_kind(u, next, &behind) & 1)) {
        found = _sf_uni_run(u, next, others, _SF_ANY);
        while (found < u->end && (_sf_is_line_end(*found) || *found == '/')) found++;
        return found;
    }
    return _sf_uni_space(u, p, 1);
}

/* p < end. */
static inline const char *sf_unitoken_end(const uint8_t *table, int kind, const char *p, const char *end) {
    _sf_uni_t u = {table, end, 0, 0};
    switch (kind) {
    case SF_PRE_GPT2: return _sf_uni_gpt2_end(&u, p);
    case SF_PRE_DEEPSEEK3: return _sf_uni_deepseek3_end(&u, p);
    case SF_PRE_O200K:
    case SF_PRE_TEKKEN: return _sf_uni_o200k_end(&u, p, kind == SF_PRE_O200K ? 3 : 1, kind == SF_PRE_O200K);
    default: return _sf_uni_llama3_end(&u, p, kind == SF_PRE_LLAMA3 ? 3 : 1);
    }
}

/* What is found on the way through a text by sf_uni_stretch_end. */
typedef struct {
    int last; /* byte of the character before */
    int is_foreign;
} sf_uni_stretch_t;

/* Where the stretch ends that goes on at `p`: behind a letter and before a character that no pattern has in a word with a letter before it;
 * `end` when that comes before. Neither character is foreign, so that nothing is normalized over the cut. At the stretch's begin, *stretch
 * is {0}. */
static inline const char *sf_uni_stretch_end(const uint8_t *table, const char *p, const char *end, sf_uni_stretch_t *stretch) {
    const int ends = _SF_BIT(_SF_OTHER) | _SF_BIT(_SF_SPACE) | _SF_BIT(_SF_PUNCT);
    const char *next;
    for (; p < end; p = next) {
        int byte = _sf_uni_at(table, p, &next), last = stretch->last;
        if ((last & (_SF_KIND | SF_UNI_FOREIGN)) == _SF_LETTER && !(byte & SF_UNI_FOREIGN) && ends >> (byte & _SF_KIND) & 1 &&
            !(last & byte & SF_UNI_IDEOGRAPH))
            return p;
        stretch->is_foreign |= byte & SF_UNI_FOREIGN;
        stretch->last = byte;
    }
    return end;
}

/* Whether the character that begins at `p` is white space. */
static inline int sf_uni_is_space(const uint8_t *table, const char *p) {
    const char *next;
    return (_sf_uni_at(table, p, &next) & _SF_KIND) == _SF_SPACE;
}

/* Where the character begins that ends before `p`. */
static inline const char *sf_uni_before(const char *p) {
    do p--;
    while (((uint8_t)*p & 0xc0) == 0x80);
    return p;
}
#endif
