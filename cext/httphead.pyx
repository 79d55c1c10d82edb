"""HTTP/1.x heads and chunked framing for the relay: one pass, no object per header.

Runs in: shards, on the request path; never blocks; allocates one result object and its few bytes.
Contract: `scan_request` and `scan_response` look at one head at the start of `data` (bytes). They return the head, or MORE (0: not
    all there), UNUSUAL (-1: hand a request to llhttp, refuse an answer), TOO_LARGE (-2: no end within the limit, or
    more than 128 header lines). Results own copies; nothing points into `data`. Strictness and formats: cext/sf_http.h, cext/sf_chunks.h.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stddef cimport size_t
from libc.stdint cimport int16_t, int64_t, uint8_t, uint16_t, uint32_t
from libc.string cimport memcpy

cimport cython
from sf_chunks cimport SF_CH_DONE, SF_CH_SIZE, sf_chunks_feed


cdef extern from "sf_http.h" nogil:
    enum:
        SF_HTTP_OK
        SF_HTTP_MORE
        SF_HTTP_UNUSUAL
        SF_HTTP_TOO_LARGE
        SF_CONN_CLOSE
        SF_CONN_KEEP_ALIVE

    ctypedef struct sf_line_t:
        const char *name
        uint32_t value_off
        uint32_t value_len

    ctypedef struct sf_head_t:
        int64_t content_length
        uint32_t head_len
        uint32_t n_lines
        uint32_t n_hosts
        uint8_t is_chunked
        uint8_t connection
        uint8_t expects_continue
        uint8_t expects_other
        uint8_t minor_version
        uint8_t is_event_stream
        uint8_t wants_kv
        uint8_t names_rank
        int16_t request_id
        int16_t other_id
        int16_t origin
        uint16_t status
        uint32_t method_len
        uint32_t target_off
        uint32_t target_len
        uint32_t start_line_len
        sf_line_t *lines

    int sf_scan_request(sf_head_t *head, const char *base, size_t length) noexcept
    int sf_scan_response(sf_head_t *head, const char *base, size_t length) noexcept
    size_t sf_kept_len(const sf_head_t *head) noexcept
    char *sf_copy_kept(const sf_head_t *head, char *out) noexcept


MORE = SF_HTTP_MORE
UNUSUAL = SF_HTTP_UNUSUAL
TOO_LARGE = SF_HTTP_TOO_LARGE


@cython.final
@cython.freelist(64)
cdef class RequestHead:
    """A client's request head.

    method, target: bytes; content_length: -1 = not given; kept: the end-to-end header lines to hand on, each with CRLF, without
    Host, framing and hop-by-hop lines; request_id: value of x-request-id (has_request_id), else of x-correlation-id, x-trace-id or
    request-id, or None; origin: value of Origin, which is not handed on, or None; head_bytes: size of the head in `data`; names_rank:
    the client says itself which data-parallel rank of a worker it wants.
    """


@cython.final
@cython.freelist(64)
cdef class ResponseHead:
    """A worker's answer head. `kept` starts with the status line (as HTTP/1.1) and holds the end-to-end lines and the framing."""


cdef bytes kept_lines(const sf_head_t *head, const char *start, size_t start_len):
    cdef bytes out = PyBytes_FromStringAndSize(NULL, start_len + sf_kept_len(head))
    memcpy(PyBytes_AS_STRING(out), start, start_len)
    sf_copy_kept(head, PyBytes_AS_STRING(out) + start_len)
    return out


cdef bytes value_of(const sf_head_t *head, int line):
    return PyBytes_FromStringAndSize(head.lines[line].name + head.lines[line].value_off, head.lines[line].value_len)


cpdef object scan_request(bytes data, Py_ssize_t limit):
    """RequestHead, or MORE, UNUSUAL, TOO_LARGE. limit: bytes that a head may have."""
    cdef sf_head_t head
    cdef const char *base = PyBytes_AS_STRING(data)
    cdef Py_ssize_t size = PyBytes_GET_SIZE(data)
    cdef int code = sf_scan_request(&head, base, size if size < limit else limit)
    if code == SF_HTTP_MORE:
        return SF_HTTP_TOO_LARGE if size >= limit else SF_HTTP_MORE
    if code != SF_HTTP_OK:
        return code
    if head.minor_version == 1 and head.n_hosts != 1 or head.n_hosts > 1:
        return SF_HTTP_UNUSUAL  # RFC 9112 3.2: llhttp does not count, so the slow path refuses it by name
    cdef RequestHead out = RequestHead.__new__(RequestHead)
    out.method = PyBytes_FromStringAndSize(base, head.method_len)
    out.target = PyBytes_FromStringAndSize(base + head.target_off, head.target_len)
    out.kept = kept_lines(&head, base, 0)
    if head.request_id >= 0:
        out.request_id = value_of(&head, head.request_id)
        out.has_request_id = True
    elif head.other_id >= 0:
        out.request_id = value_of(&head, head.other_id)
    if head.origin >= 0:
        out.origin = value_of(&head, head.origin)
    out.content_length = head.content_length
    out.head_bytes = head.head_len
    out.n_hosts = head.n_hosts
    out.is_chunked = head.is_chunked
    out.is_http10 = head.minor_version == 0
    out.keeps_alive = not head.connection & SF_CONN_CLOSE and (
        head.minor_version == 1 or head.connection & SF_CONN_KEEP_ALIVE
    )
    out.expects_continue = head.expects_continue and head.minor_version == 1
    out.expects_other = head.expects_other
    out.wants_kv = head.wants_kv
    out.names_rank = head.names_rank
    return out


cpdef object scan_response(bytes data, Py_ssize_t limit):
    """ResponseHead, or MORE, UNUSUAL, TOO_LARGE. limit: bytes that a head may have."""
    cdef sf_head_t head
    cdef const char *base = PyBytes_AS_STRING(data)
    cdef Py_ssize_t size = PyBytes_GET_SIZE(data)
    cdef int code = sf_scan_response(&head, base, size if size < limit else limit)
    if code == SF_HTTP_MORE:
        return SF_HTTP_TOO_LARGE if size >= limit else SF_HTTP_MORE
    if code != SF_HTTP_OK:
        return code
    cdef ResponseHead out = ResponseHead.__new__(ResponseHead)
    out.status = head.status
    out.kept = kept_lines(&head, base, head.start_line_len)
    PyBytes_AS_STRING(out.kept)[7] = c"1"  # our own version, whatever the worker's (RFC 9110 2.5)
    out.content_length = head.content_length
    out.head_bytes = head.head_len
    out.is_chunked = head.is_chunked
    out.keeps_alive = not head.connection & SF_CONN_CLOSE and (
        head.minor_version == 1 or head.connection & SF_CONN_KEEP_ALIVE
    )
    out.has_request_id = head.request_id >= 0
    out.is_event_stream = head.is_event_stream
    return out


cdef int append_piece(void *sink, const char *piece, size_t size) noexcept with gil:
    try:
        (<list>sink).append(PyBytes_FromStringAndSize(piece, size))
    except BaseException:
        return -1
    return 0


@cython.final
cdef class Chunks:
    """Chunked framing, followed over any cutting of the bytes (RFC 9112 7.1); extensions and trailers are bounded."""

    def __cinit__(self):
        self.chunks.left = 0
        self.chunks.state = SF_CH_SIZE

    cpdef Py_ssize_t follow(self, bytes data, Py_ssize_t start=0) except -3:
        """Index behind the end of the body, -1 when it goes on, -2 when the framing is malformed."""
        cdef int64_t used
        used = sf_chunks_feed(&self.chunks, PyBytes_AS_STRING(data) + start, PyBytes_GET_SIZE(data) - start, NULL, NULL)
        if used < 0:
            return -2
        return start + used if self.chunks.state == SF_CH_DONE else -1

    def decode(self, bytes data, Py_ssize_t start, list pieces):
        """As `follow`; the payload is appended to `pieces`."""
        cdef int64_t used
        used = sf_chunks_feed(&self.chunks, PyBytes_AS_STRING(data) + start, PyBytes_GET_SIZE(data) - start, append_piece,
                              <void *>pieces)
        if used == -1:
            return -2
        if used < 0:
            raise MemoryError
        return start + used if self.chunks.state == SF_CH_DONE else -1

    @property
    def is_between(self):
        """The bytes so far end between two chunks: something well-formed may be put there."""
        return self.chunks.state == SF_CH_SIZE
