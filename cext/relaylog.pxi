# The lines of the request log: see sglfast/edge/request_log.py. Part of relay.pyx.

cdef enum:
    ID_BYTES = 256     # a longer request id or path is written by the slow way
    LABEL_BYTES = 1400
    LINE_BYTES = 4608  # more than all parts of a line at their longest
    BATCH_BYTES = 64 << 10

    c_W_CANCELLED = 8


cdef class RequestLogBase:
    """Makes lines and keeps them until `flush`, which is in Python, takes them.

    is_json: form of the lines; only_errors: leave out what was answered well; opening: what every line begins with, for text
    between the time and the fields, for JSON between the time and the request's id; decisions: names, by number.
    """

    cdef readonly bint is_json
    cdef readonly bint only_errors
    cdef bytes opening
    cdef tuple decisions
    cdef public list lines
    cdef public long long size_bytes
    cdef long long second
    cdef char stamp[16]

    def __init__(self, bint is_json, bint only_errors, bytes opening not None, tuple decisions not None):
        self.is_json = is_json
        self.only_errors = only_errors
        self.opening = opening
        self.decisions = decisions
        self.lines = []
        self.second = -1

    cpdef note(self, ExchangeBase exchange):
        """A request is over."""
        cdef const char *outcome = self.outcome_of(exchange)
        cdef bytes line
        if self.only_errors and outcome[0] == c"o":
            return
        line = self.line_of(exchange, outcome)
        if line is None:
            line = self.slow_line(exchange, outcome)
        self.lines.append(line)
        self.size_bytes += PyBytes_GET_SIZE(line)
        if self.size_bytes > BATCH_BYTES:
            self.flush()

    cdef const char *outcome_of(self, ExchangeBase exchange):
        cdef unsigned int word = exchange.outcome
        if word == c_W_OK:
            return b"ok"
        if word == c_W_CLIENT_ERRORS:
            return b"client_error"
        if word == c_W_BUSY:
            return b"busy"
        if word == c_W_CANCELLED:
            return b"cancelled"
        if word == 0:
            return b"cancelled" if exchange.status == 0 else b"refused"
        return b"cut" if exchange.has_answer and exchange.status < 500 else b"error"

    cdef bytes line_of(self, ExchangeBase exchange, const char *outcome):
        # The line; None when a part of it is too long or needs quotes.
        cdef char out[LINE_BYTES]
        cdef char *end
        cdef timespec now
        cdef bytes path = exchange.endpoint.path
        cdef bytes label = b""
        cdef bytes decision
        cdef UpstreamBase upstream
        cdef bint json = self.is_json
        cdef object route = exchange.last_route
        cdef PrefillLegBase pair = exchange.pair
        if pair is not None:
            route = pair.first
            if PyBytes_GET_SIZE(pair.decode.log_label) > LABEL_BYTES:
                return None
        if not is_plain(exchange.request_id) or not is_plain(path):
            return None
        if route is not None:
            upstream = route.upstream
            label = upstream.log_label
            if PyBytes_GET_SIZE(label) > LABEL_BYTES:
                return None
        clock_gettime(CLOCK_REALTIME, &now)
        if json:
            memcpy(out, b'{"ts":', 6)
            end = put_decimal(out + 6, now.tv_sec, now.tv_nsec // 1000, 6)
        else:
            if now.tv_sec != self.second:
                self.second = now.tv_sec
                text = self.time_of(now.tv_sec)
                memcpy(self.stamp, PyBytes_AS_STRING(text), 8)
            memcpy(out, self.stamp, 8)
            out[8] = c"."
            end = put_digits(out + 9, now.tv_nsec // 1000000, 3)
        end = put(end, self.opening)
        end = put(end, exchange.request_id)
        if json:
            end[0] = c'"'
            end += 1
        end = put_name(end, json, b"path", True)
        end = put(end, path)
        if json:
            end[0] = c'"'
            end += 1
        if route is not None:
            end = put(end, label)
            if pair is not None:
                end = put(end, pair.decode.log_label)
            if exchange.dp_rank >= 0:
                end = put_number(put_name(end, json, b"rank", False), exchange.dp_rank)
            end = put_name(end, json, b"decision", True)
            decision = self.decisions[route.decision]
            end = put(end, decision)
            if json:
                end[0] = c'"'
                end += 1
            if route.prompt_blocks:
                end = put_number(put_name(end, json, b"overlap_blocks", False), route.overlap_blocks)
                end = put_number(put_name(end, json, b"prompt_blocks", False), route.prompt_blocks)
        end = put_number(put_name(end, json, b"status", False), exchange.status)
        end = put_number(put_name(end, json, b"bytes_in", False), exchange.bytes_in)
        end = put_number(put_name(end, json, b"bytes_out", False), exchange.bytes_out)
        if exchange.has_body:
            end = put_decimal(put_name(end, json, b"ttft_ms", False), exchange.ttft_us // 1000, exchange.ttft_us % 1000, 3)
        cdef long long latency_us = <long long>((monotonic() - exchange.started_s) * 1e6)
        end = put_decimal(put_name(end, json, b"latency_ms", False), latency_us // 1000, latency_us % 1000, 3)
        if exchange.failed_attempts is not None:
            end = put_number(put_name(end, json, b"tried", False), len(exchange.failed_attempts.tried))
        end = put_name(end, json, b"outcome", True)
        end = put_text(end, outcome)
        if json:
            memcpy(end, b'"}', 2)
            end += 2
        end[0] = c"\n"
        return PyBytes_FromStringAndSize(out, end + 1 - out)


cdef bint is_plain(bytes text) noexcept:
    # Nothing that could be taken for the end of a field.
    cdef const unsigned char *at = <const unsigned char *>PyBytes_AS_STRING(text)
    cdef Py_ssize_t i, size = PyBytes_GET_SIZE(text)
    if size > ID_BYTES:
        return False
    for i in range(size):
        if at[i] <= 32 or at[i] >= 127 or at[i] == c'"' or at[i] == c"\\":
            return False
    return True


cdef inline char *put_text(char *end, const char *text) noexcept:
    cdef size_t size = strlen(text)
    memcpy(end, text, size)
    return end + size


cdef inline char *put_name(char *end, bint json, const char *name, bint is_text) noexcept:
    # `,"name":` and a quote before text, or ` name=`.
    if not json:
        end[0] = c" "
        end = put_text(end + 1, name)
        end[0] = c"="
        return end + 1
    memcpy(end, b',"', 2)
    end = put_text(end + 2, name)
    memcpy(end, b'":"', 3)
    return end + (3 if is_text else 2)


cdef char *put_number(char *end, long long value) noexcept:
    cdef char digits[20]
    cdef int n = 0
    if value < 0:
        value = 0
    while True:
        digits[n] = c"0" + value % 10
        n += 1
        value //= 10
        if value == 0:
            break
    for i in range(n):
        end[i] = digits[n - 1 - i]
    return end + n


cdef char *put_digits(char *end, long long value, int width) noexcept:
    cdef int i
    for i in range(width - 1, -1, -1):
        end[i] = c"0" + value % 10
        value //= 10
    return end + width


cdef char *put_decimal(char *end, long long whole, long long part, int width) noexcept:
    end = put_number(end, whole)
    end[0] = c"."
    return put_digits(end + 1, part, width)
