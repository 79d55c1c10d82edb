/* Chunked framing of HTTP/1.1 bodies, followed over any cutting of the bytes. Grammar: RFC 9112 7.1, without the optional white space
 * of extensions.
 *
 *   SIZE -> SIZE_DIGITS -> (EXT_* ->) SIZE_LF -> DATA -> DATA_CR -> DATA_LF -> SIZE        (size > 0)
 *                                     SIZE_LF -> TRAILER -> (TRAILER_NAME -> TRAILER_VALUE -> TRAILER_LF -> TRAILER)* -> END_LF -> DONE
 *   anything that does not fit -> BROKEN, for ever
 *
 * Law: what this takes, llhttp (strict) takes with the same body and end; tests/fuzz_httphead.py holds the two against each other.
 */
#ifndef SF_CHUNKS_H
#define SF_CHUNKS_H

#include "sf_http.h" /* character classes */

enum { SF_CH_SIZE, SF_CH_SIZE_DIGITS, SF_CH_EXT, SF_CH_EXT_NAME, SF_CH_EXT_EQUALS, SF_CH_EXT_TOKEN, SF_CH_EXT_QUOTED, SF_CH_EXT_PAIR,
       SF_CH_EXT_END, SF_CH_SIZE_LF, SF_CH_DATA, SF_CH_DATA_CR, SF_CH_DATA_LF, SF_CH_TRAILER, SF_CH_TRAILER_NAME,
       SF_CH_TRAILER_VALUE, SF_CH_TRAILER_LF, SF_CH_END_LF, SF_CH_DONE, SF_CH_BROKEN };
#define SF_CH_LINE_LIMIT 16384 /* extensions and trailers: a peer that sends more plays games */

typedef struct {
    uint64_t left; /* data bytes of the present chunk still to come */
    uint32_t state;
    uint32_t line_bytes; /* spent on extensions and trailers */
    char name[18];       /* of the present trailer, lower case, as much as tells framing fields from others */
    uint8_t name_len;
} sf_chunks_t;

/* The state after a byte of an extension, SF_CH_BROKEN when it does not fit. */
static inline uint32_t _sf_extension(uint32_t state, char ch) {
    uint8_t byte = (uint8_t)ch;
    switch (state) {
    case SF_CH_EXT: return sf_token[byte] ? SF_CH_EXT_NAME : SF_CH_BROKEN;
    case SF_CH_EXT_NAME:
        if (sf_token[byte]) return SF_CH_EXT_NAME;
        if (ch == '=') return SF_CH_EXT_EQUALS;
        break;
    case SF_CH_EXT_EQUALS:
        if (ch == '"') return SF_CH_EXT_QUOTED;
        return sf_token[byte] ? SF_CH_EXT_TOKEN : SF_CH_BROKEN;
    case SF_CH_EXT_TOKEN:
        if (sf_token[byte]) return SF_CH_EXT_TOKEN;
        break;
    case SF_CH_EXT_QUOTED:
        if (ch == '"') return SF_CH_EXT_END;
        if (ch == '\\') return SF_CH_EXT_PAIR;
        return sf_value[byte] ? SF_CH_EXT_QUOTED : SF_CH_BROKEN;
    case SF_CH_EXT_PAIR: return sf_value[byte] ? SF_CH_EXT_QUOTED : SF_CH_BROKEN;
    default: break;
    }
    return ch == ';' ? SF_CH_EXT : ch == '\r' ? SF_CH_SIZE_LF : SF_CH_BROKEN;
}

static inline int _sf_is_framing(const sf_chunks_t *c) {
    return (c->name_len == 14 && !memcmp(c->name, "content-length", 14))
        || (c->name_len == 17 && !memcmp(c->name, "transfer-encoding", 17));
}

/* Follow the framing over `len` bytes. Data pieces are reported through `emit` when it is not NULL. Returns bytes consumed
 * (less than len only at the end of the body, state SF_CH_DONE), or -1 when the framing is malformed (state SF_CH_BROKEN). */
static inline int64_t sf_chunks_feed(sf_chunks_t *c, const char *base, size_t len,
                                     int (*emit)(void *, const char *, size_t), void *sink) {
    const char *p = base, *end = base + len;
    while (p < end && c->state != SF_CH_DONE) {
        char ch = *p;
        switch (c->state) {
        case SF_CH_SIZE:
        case SF_CH_SIZE_DIGITS: {
            int digit = ch >= '0' && ch <= '9' ? ch - '0' : ch >= 'a' && ch <= 'f' ? ch - 'a' + 10
                        : ch >= 'A' && ch <= 'F' ? ch - 'A' + 10 : -1;
            if (digit >= 0) {
                if (c->left >> 56) goto broken;
                c->left = c->left * 16 + (uint64_t)digit;
                c->state = SF_CH_SIZE_DIGITS;
            } else if (c->state == SF_CH_SIZE) goto broken;
            else if (ch == '\r') c->state = SF_CH_SIZE_LF;
            else if (ch == ';') c->state = SF_CH_EXT;
            else goto broken;
            p++;
            break;
        }
        case SF_CH_EXT: case SF_CH_EXT_NAME: case SF_CH_EXT_EQUALS: case SF_CH_EXT_TOKEN: case SF_CH_EXT_QUOTED:
        case SF_CH_EXT_PAIR: case SF_CH_EXT_END:
            c->state = _sf_extension(c->state, ch);
            if (c->state == SF_CH_BROKEN || ++c->line_bytes > SF_CH_LINE_LIMIT) goto broken;
            p++;
            break;
        case SF_CH_SIZE_LF:
            if (ch != '\n') goto broken;
            c->state = c->left ? SF_CH_DATA : SF_CH_TRAILER;
            p++;
            break;
        case SF_CH_DATA: {
            size_t n = (size_t)(end - p) < c->left ? (size_t)(end - p) : (size_t)c->left;
            if (emit && emit(sink, p, n)) return -2;
            p += n;
            c->left -= n;
            if (!c->left) c->state = SF_CH_DATA_CR;
            break;
        }
        case SF_CH_DATA_CR:
            if (ch != '\r') goto broken;
            c->state = SF_CH_DATA_LF;
            p++;
            break;
        case SF_CH_DATA_LF:
            if (ch != '\n') goto broken;
            c->state = SF_CH_SIZE;
            p++;
            break;
        case SF_CH_TRAILER:
            if (ch == '\r') {
                c->state = SF_CH_END_LF;
                p++;
                break;
            }
            c->name_len = 0;
            c->state = SF_CH_TRAILER_NAME;
            if (ch == ':') goto broken;
            break; /* the same byte again, as the name's first */
        case SF_CH_TRAILER_NAME:
            if (++c->line_bytes > SF_CH_LINE_LIMIT) goto broken;
            if (ch == ':') {
                if (_sf_is_framing(c)) goto broken; /* RFC 9110 6.5.1: never in a trailer */
                c->state = SF_CH_TRAILER_VALUE;
            } else if (!sf_token[(uint8_t)ch]) goto broken;
            else if (c->name_len < sizeof c->name) c->name[c->name_len++] = (char)(ch >= 'A' && ch <= 'Z' ? ch | 0x20 : ch);
            p++;
            break;
        case SF_CH_TRAILER_VALUE:
            if (ch == '\r') c->state = SF_CH_TRAILER_LF;
            else if (!sf_value[(uint8_t)ch] || ++c->line_bytes > SF_CH_LINE_LIMIT) goto broken;
            p++;
            break;
        case SF_CH_TRAILER_LF:
            if (ch != '\n') goto broken;
            c->state = SF_CH_TRAILER;
            p++;
            break;
        case SF_CH_END_LF:
            if (ch != '\n') goto broken;
            c->state = SF_CH_DONE;
            p++;
            break;
        default: goto broken;
        }
    }
    return p - base;
broken:
    c->state = SF_CH_BROKEN;
    return -1;
}
#endif
