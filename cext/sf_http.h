/* One strict pass over an HTTP/1.x head: find the few headers that matter, note which lines to hand on.
 *
 * Law: what this accepts, llhttp (strict) accepts with the same meaning; tests/fuzz_httphead.py holds the two against each other.
 * Everything else is SF_HTTP_UNUSUAL: requests then go to llhttp, answers of workers are refused. More than SF_MAX_HEADERS lines are
 * SF_HTTP_TOO_LARGE, whatever they say. Formats: RFC 9112.
 */
#ifndef SF_HTTP_H
#define SF_HTTP_H

#include <stdint.h>
#include <string.h>
#include <strings.h>

enum { SF_HTTP_OK = 1, SF_HTTP_MORE = 0, SF_HTTP_UNUSUAL = -1, SF_HTTP_TOO_LARGE = -2 };
enum { SF_CONN_CLOSE = 1, SF_CONN_KEEP_ALIVE = 2, SF_CONN_NAMES = 4 };
#define SF_MAX_HEADERS 128

typedef struct {
    const char *name;
    uint32_t name_len;
    uint32_t value_off; /* from name */
    uint32_t value_len;
    uint32_t line_len; /* with CRLF */
    uint8_t is_dropped;
} sf_line_t;

typedef struct {
    int64_t content_length; /* -1: not given */
    uint32_t head_len;      /* bytes up to and including the empty line */
    uint32_t n_lines;
    uint32_t n_hosts;
    uint8_t is_chunked;
    uint8_t connection; /* SF_CONN_* */
    uint8_t expects_continue;
    uint8_t expects_other;
    uint8_t minor_version;
    uint8_t is_event_stream;
    uint8_t wants_kv;
    uint8_t names_rank; /* it says itself which data-parallel rank it wants */
    int16_t request_id; /* line number or -1: x-request-id, ... */
    int16_t other_id;   /* ... else what holds an id too: x-correlation-id before x-trace-id before request-id */
    int16_t origin;     /* line number or -1 */
    uint8_t other_id_rank;
    uint16_t status;
    uint32_t method_len;
    uint32_t target_off;
    uint32_t target_len;
    uint32_t start_line_len; /* with CRLF */
    sf_line_t lines[SF_MAX_HEADERS];
} sf_head_t;

/* RFC 9110 token characters */
static const uint8_t sf_token[256] = {
    ['!'] = 1, ['#'] = 1, ['$'] = 1, ['%'] = 1, ['&'] = 1, ['\''] = 1, ['*'] = 1, ['+'] = 1, ['-'] = 1, ['.'] = 1, ['^'] = 1,
    ['_'] = 1, ['`'] = 1, ['|'] = 1, ['~'] = 1,
    ['0' ... '9'] = 1, ['A' ... 'Z'] = 1, ['a' ... 'z'] = 1,
};
/* field values: HTAB, SP, visible ASCII, obs-text */
static const uint8_t sf_value[256] = {['\t'] = 1, [' ' ... '~'] = 1, [0x80 ... 0xff] = 1};

static inline int sf_name_is(const sf_line_t *line, const char *lower, uint32_t len) {
    return line->name_len == len && strncasecmp(line->name, lower, len) == 0;
}
#define SF_NAME(line, literal) sf_name_is(line, literal, sizeof(literal) - 1)

static inline int sf_value_is(const sf_line_t *line, const char *lower, uint32_t len) {
    return line->value_len == len && strncasecmp(line->name + line->value_off, lower, len) == 0;
}
#define SF_VALUE(line, literal) sf_value_is(line, literal, sizeof(literal) - 1)

/* Tokens of a Connection value; 0 when the value is no token list. */
static inline int _sf_connection(sf_head_t *head, const sf_line_t *line) {
    const char *p = line->name + line->value_off, *end = p + line->value_len;
    while (p < end) {
        while (p < end && (*p == ' ' || *p == '\t' || *p == ',')) p++;
        const char *start = p;
        while (p < end && sf_token[(uint8_t)*p]) p++;
        size_t len = (size_t)(p - start);
        if (len == 5 && !strncasecmp(start, "close", 5)) head->connection |= SF_CONN_CLOSE;
        else if (len == 10 && !strncasecmp(start, "keep-alive", 10)) head->connection |= SF_CONN_KEEP_ALIVE;
        else if (len) head->connection |= SF_CONN_NAMES;
        while (p < end && (*p == ' ' || *p == '\t')) p++;
        if (p < end && *p != ',') return 0;
    }
    return 1;
}

/* Drop the lines that a Connection header names (RFC 9110 7.6.1), never those that frame the body: without them the next hop
 * would not find its end. Rare: only when one names something. */
static inline void _sf_drop_named(sf_head_t *head) {
    for (uint32_t c = 0; c < head->n_lines; c++) {
        const sf_line_t *line = &head->lines[c];
        if (!SF_NAME(line, "connection")) continue;
        const char *p = line->name + line->value_off, *end = p + line->value_len;
        while (p < end) {
            while (p < end && !sf_token[(uint8_t)*p]) p++;
            const char *start = p;
            while (p < end && sf_token[(uint8_t)*p]) p++;
            for (uint32_t i = 0; p > start && i < head->n_lines; i++) {
                sf_line_t *named = &head->lines[i];
                if (!sf_name_is(named, start, (uint32_t)(p - start))) continue;
                if (SF_NAME(named, "content-length") || SF_NAME(named, "transfer-encoding")) continue;
                named->is_dropped = 1;
                if (head->request_id == (int16_t)i) head->request_id = -1;
            }
        }
    }
}

static inline void _sf_other_id(sf_head_t *head, uint32_t i, uint8_t rank) {
    if (head->lines[i].value_len && rank > head->other_id_rank) {
        head->other_id = (int16_t)i;
        head->other_id_rank = rank;
    }
}

/* Meaning of one header line. Dropped lines: hop-by-hop ones, and what the router writes anew. */
static inline int _sf_header(sf_head_t *head, uint32_t i, int is_request) {
    sf_line_t *line = &head->lines[i];
    const char *value = line->name + line->value_off;
    switch (line->name_len) {
    case 2: line->is_dropped = SF_NAME(line, "te"); break;
    case 4:
        if (is_request && SF_NAME(line, "host")) {
            head->n_hosts++;
            line->is_dropped = 1;
        }
        break;
    case 6:
        if (is_request && SF_NAME(line, "expect")) {
            if (SF_VALUE(line, "100-continue")) head->expects_continue = 1;
            else head->expects_other = 1;
            line->is_dropped = 1;
        } else if (is_request && SF_NAME(line, "origin")) {
            if (head->origin < 0) head->origin = (int16_t)i;
            line->is_dropped = 1; /* who may call from a browser is the router's to say */
        }
        break;
    case 7: line->is_dropped = SF_NAME(line, "upgrade"); break;
    case 10:
        if (SF_NAME(line, "connection")) {
            if (!_sf_connection(head, line)) return SF_HTTP_UNUSUAL;
            line->is_dropped = 1;
        } else if (SF_NAME(line, "keep-alive")) line->is_dropped = 1;
        else if (is_request && SF_NAME(line, "x-trace-id")) _sf_other_id(head, i, 2);
        else if (is_request && SF_NAME(line, "request-id")) _sf_other_id(head, i, 1);
        break;
    case 12:
        if (SF_NAME(line, "x-request-id")) {
            if (line->value_len == 0) line->is_dropped = 1; /* as good as none: one is made */
            else if (head->request_id < 0) head->request_id = (int16_t)i;
        } else if (is_request && SF_NAME(line, "x-sglfast-kv")) {
            if (SF_VALUE(line, "1") || SF_VALUE(line, "true")) head->wants_kv = 1;
            line->is_dropped = 1;
        } else if (!is_request && SF_NAME(line, "content-type"))
            head->is_event_stream = line->value_len >= 17 && !strncasecmp(value, "text/event-stream", 17);
        break;
    case 14:
        if (SF_NAME(line, "content-length")) {
            if (head->content_length >= 0 || line->value_len == 0 || line->value_len > 18) return SF_HTTP_UNUSUAL;
            int64_t length = 0;
            for (uint32_t k = 0; k < line->value_len; k++) {
                if (value[k] < '0' || value[k] > '9') return SF_HTTP_UNUSUAL;
                length = length * 10 + (value[k] - '0');
            }
            head->content_length = length;
            line->is_dropped = (uint8_t)is_request;
        }
        break;
    case 16:
        if (SF_NAME(line, "proxy-connection")) line->is_dropped = 1;
        else if (is_request && SF_NAME(line, "x-correlation-id")) _sf_other_id(head, i, 3);
        break;
    case 17:
        if (SF_NAME(line, "transfer-encoding")) {
            /* white space behind it: llhttp takes a blank, not a tab, and reads another framing then */
            if (head->is_chunked || !SF_VALUE(line, "chunked") || line->line_len != line->value_off + line->value_len + 2)
                return SF_HTTP_UNUSUAL;
            head->is_chunked = 1;
            line->is_dropped = (uint8_t)is_request;
        }
        break;
    case 18: line->is_dropped = SF_NAME(line, "proxy-authenticate"); break;
    case 19: line->is_dropped = SF_NAME(line, "proxy-authorization"); break;
    case 20:
        if (is_request && SF_NAME(line, "x-data-parallel-rank")) head->names_rank = 1;
        break;
    case 25: /* SGLang's, where it is told to heed such headers */
        if (is_request && SF_NAME(line, "x-override-routed-dp-rank")) head->names_rank = 1;
        break;
    default: break;
    }
    return SF_HTTP_OK;
}

/* Header lines from `p` up to the empty line. */
static inline int _sf_headers(sf_head_t *head, const char *base, const char *p, const char *end, int is_request) {
    for (;;) {
        if (p >= end) return SF_HTTP_MORE;
        if (*p == '\r') {
            if (p + 1 >= end) return SF_HTTP_MORE;
            if (p[1] != '\n') return SF_HTTP_UNUSUAL;
            head->head_len = (uint32_t)(p + 2 - base);
            break;
        }
        if (head->n_lines == SF_MAX_HEADERS) return SF_HTTP_TOO_LARGE;
        sf_line_t *line = &head->lines[head->n_lines];
        line->name = p;
        line->is_dropped = 0;
        while (p < end && sf_token[(uint8_t)*p]) p++;
        if (p >= end) return SF_HTTP_MORE;
        if (*p != ':' || p == line->name) return SF_HTTP_UNUSUAL;
        line->name_len = (uint32_t)(p - line->name);
        p++;
        while (p < end && (*p == ' ' || *p == '\t')) p++;
        line->value_off = (uint32_t)(p - line->name);
        const char *start = p;
        while (p < end && sf_value[(uint8_t)*p]) p++;
        if (p + 1 >= end) return p < end && *p != '\r' ? SF_HTTP_UNUSUAL : SF_HTTP_MORE;
        if (p[0] != '\r' || p[1] != '\n') return SF_HTTP_UNUSUAL;
        const char *last = p;
        while (last > start && (last[-1] == ' ' || last[-1] == '\t')) last--;
        line->value_len = (uint32_t)(last - start);
        p += 2;
        line->line_len = (uint32_t)(p - line->name);
        int code = _sf_header(head, head->n_lines, is_request);
        if (code != SF_HTTP_OK) return code;
        head->n_lines++;
    }
    /* both lengths: request smuggling or a broken peer */
    if (head->is_chunked && (head->content_length >= 0 || head->minor_version == 0)) return SF_HTTP_UNUSUAL;
    if (head->connection & SF_CONN_NAMES) _sf_drop_named(head);
    return SF_HTTP_OK;
}

static inline void _sf_head_init(sf_head_t *head) {
    memset(head, 0, offsetof(sf_head_t, lines));
    head->content_length = -1;
    head->request_id = -1;
    head->other_id = -1;
    head->origin = -1;
}

/* `METHOD SP target SP HTTP/1.x CRLF headers CRLF`; the target is `/...` or `*` in visible ASCII without `#`. */
static inline int sf_scan_request(sf_head_t *head, const char *base, size_t len) {
    const char *p = base, *end = base + len;
    _sf_head_init(head);
    while (p < end && p < base + 11 && *p >= 'A' && *p <= 'Z') p++;
    if (p >= end) return SF_HTTP_MORE;
    if (*p != ' ' || p == base) return SF_HTTP_UNUSUAL;
    head->method_len = (uint32_t)(p - base);
    switch (head->method_len) {
    case 3: if (memcmp(base, "GET", 3) && memcmp(base, "PUT", 3)) return SF_HTTP_UNUSUAL; break;
    case 4: if (memcmp(base, "POST", 4) && memcmp(base, "HEAD", 4)) return SF_HTTP_UNUSUAL; break;
    case 5: if (memcmp(base, "PATCH", 5)) return SF_HTTP_UNUSUAL; break;
    case 6: if (memcmp(base, "DELETE", 6)) return SF_HTTP_UNUSUAL; break;
    case 7: if (memcmp(base, "OPTIONS", 7)) return SF_HTTP_UNUSUAL; break;
    default: return SF_HTTP_UNUSUAL;
    }
    head->target_off = (uint32_t)(++p - base);
    if (p >= end) return SF_HTTP_MORE;
    if (*p != '/' && *p != '*') return SF_HTTP_UNUSUAL;
    while (p < end && *p > ' ' && *p < 0x7f && *p != '#') p++;
    if (p >= end) return SF_HTTP_MORE;
    head->target_len = (uint32_t)(p - base) - head->target_off;
    if (end - p < 11) return memcmp(p, " HTTP/1.1\r\n", (size_t)(end - p)) && memcmp(p, " HTTP/1.0\r\n", (size_t)(end - p))
                                 ? SF_HTTP_UNUSUAL : SF_HTTP_MORE;
    if (memcmp(p, " HTTP/1.", 8) || (p[8] != '1' && p[8] != '0') || p[9] != '\r' || p[10] != '\n') return SF_HTTP_UNUSUAL;
    head->minor_version = (uint8_t)(p[8] - '0');
    p += 11;
    head->start_line_len = (uint32_t)(p - base);
    return _sf_headers(head, base, p, end, 1);
}

/* `HTTP/1.x SP status [SP reason] CRLF headers CRLF` */
static inline int sf_scan_response(sf_head_t *head, const char *base, size_t len) {
    const char *p = base, *end = base + len;
    _sf_head_init(head);
    if (len < 13) return memcmp(base, "HTTP/1.", len < 7 ? len : 7) ? SF_HTTP_UNUSUAL : SF_HTTP_MORE;
    if (memcmp(p, "HTTP/1.", 7) || (p[7] != '1' && p[7] != '0') || p[8] != ' ') return SF_HTTP_UNUSUAL;
    head->minor_version = (uint8_t)(p[7] - '0');
    for (p += 9; p < base + 12; p++) {
        if (*p < '0' || *p > '9') return SF_HTTP_UNUSUAL;
        head->status = (uint16_t)(head->status * 10 + (*p - '0'));
    }
    if (head->status < 100 || head->status > 599 || (*p != ' ' && *p != '\r')) return SF_HTTP_UNUSUAL;
    while (p < end && sf_value[(uint8_t)*p]) p++;
    if (p + 1 >= end) return p < end && *p != '\r' ? SF_HTTP_UNUSUAL : SF_HTTP_MORE;
    if (p[0] != '\r' || p[1] != '\n') return SF_HTTP_UNUSUAL;
    p += 2;
    head->start_line_len = (uint32_t)(p - base);
    return _sf_headers(head, base, p, end, 0);
}

/* Bytes of all kept lines. */
static inline size_t sf_kept_len(const sf_head_t *head) {
    size_t n = 0;
    for (uint32_t i = 0; i < head->n_lines; i++) n += head->lines[i].is_dropped ? 0 : head->lines[i].line_len;
    return n;
}
/* Copy the kept lines, neighbours in one go; returns the end. */
static inline char *sf_copy_kept(const sf_head_t *head, char *out) {
    uint32_t i = 0;
    while (i < head->n_lines) {
        if (head->lines[i].is_dropped) { i++; continue; }
        const char *start = head->lines[i].name;
        size_t n = 0;
        for (; i < head->n_lines && !head->lines[i].is_dropped; i++) n += head->lines[i].line_len;
        memcpy(out, start, n);
        out += n;
    }
    return out;
}
#endif
