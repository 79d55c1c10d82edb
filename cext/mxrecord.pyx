"""Tensor descriptors of ModelExpress records, taken out of a publish and put into an answer without making an object of each.

Runs in: the metadata service, in threads beside its loop. Contract: what takes time runs without the GIL. What `split` accepts is
    a well-formed message of the schema, text fields of descriptors in UTF-8 included; all else is a ValueError that says what is wrong.
    Groups, which proto3 cannot express, are refused.
Why: a publish may hold 100 MiB in a million descriptors. protobuf's Python parser would hold the GIL, and so the loop, for all of it.
Format: protobuf wire format, docs "encoding"; numbers of the fields from spec/modelexpress.md 1.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

cdef enum:
    OK, CUT, VARINT, WIRE_TYPE, NUMBER, UTF8

cdef enum:
    W_VARINT = 0, W_64 = 1, W_LEN = 2, W_32 = 5

cdef enum:  # numbers of fields
    F_WORKER = 2          # of PublishMetadataRequest
    F_TENSORS = 3         # of WorkerMetadata
    F_TENSOR_SOURCE = 20
    F_ARTIFACT_SOURCE = 21
    F_SOURCE_TENSORS = 1  # of TensorSourceMetadata
    F_NAME = 1            # of TensorDescriptor
    F_DTYPE = 5

cdef enum:
    TAG_RECORD = 0x0a  # field 1, W_LEN: how records are kept

_TEXTS = {
    CUT: "it ends in the middle of a field",
    VARINT: "a number of it has more than 64 bits",
    WIRE_TYPE: "a field has an unknown wire type, or is a group",
    NUMBER: "a field has a number that no field can have",
    UTF8: "a tensor's name or dtype is not UTF-8",
}


cdef struct Span:
    const uint8_t *p
    const uint8_t *end


cdef struct Field:
    uint64_t number
    int wire_type
    const uint8_t *start  # of its tag
    Span body             # of a W_LEN field


cdef struct Parts:
    uint8_t *small    # the request without descriptors
    uint8_t *worker   # scratch: the worker being read, without descriptors
    uint8_t *source   # scratch: the tensor source being read, without descriptors
    uint8_t *legacy   # WorkerMetadata.tensors, as records
    uint8_t *payload  # TensorSourceMetadata.tensors, as records
    size_t n_small
    size_t n_legacy_bytes
    size_t n_payload_bytes
    uint64_t n_legacy
    uint64_t n_payload


cdef inline int read_varint(Span *span, uint64_t *out) noexcept nogil:
    cdef uint64_t value = 0
    cdef int shift = 0
    cdef uint8_t byte
    while True:
        if span.p == span.end:
            return CUT
        byte = span.p[0]
        span.p += 1
        if shift == 63 and byte > 1:
            return VARINT
        value |= <uint64_t>(byte & 0x7f) << shift
        if byte < 0x80:
            out[0] = value
            return OK
        shift += 7


cdef inline size_t put_varint(uint8_t *out, uint64_t value) noexcept nogil:
    cdef size_t n = 0
    while value >= 0x80:
        out[n] = <uint8_t>(value | 0x80)
        value >>= 7
        n += 1
    out[n] = <uint8_t>value
    return n + 1


cdef inline int next_field(Span *span, Field *field) noexcept nogil:
    """Reads one field and moves behind it; the span is not empty."""
    cdef uint64_t tag = 0, value = 0
    cdef int code
    field.start = span.p
    code = read_varint(span, &tag)
    if code:
        return code
    field.number = tag >> 3
    field.wire_type = tag & 7
    if field.number == 0 or field.number > 0x1fffffff:
        return NUMBER
    if field.wire_type == W_VARINT:
        return read_varint(span, &value)
    if field.wire_type == W_LEN:
        code = read_varint(span, &value)
        if code:
            return code
    elif field.wire_type == W_64:
        value = 8
    elif field.wire_type == W_32:
        value = 4
    else:
        return WIRE_TYPE
    if value > <uint64_t>(span.end - span.p):
        return CUT
    field.body.p = span.p
    span.p += value
    field.body.end = span.p
    return OK


cdef inline bint is_utf8(Span text) noexcept nogil:
    """RFC 3629: no overlong forms, no surrogates, nothing above U+10FFFF."""
    cdef const uint8_t *p = text.p
    cdef uint8_t lead, low, high
    cdef int more
    while p != text.end:
        lead = p[0]
        p += 1
        if lead < 0x80:
            continue
        low, high = 0x80, 0xbf
        if 0xc2 <= lead <= 0xdf:
            more = 1
        elif 0xe0 <= lead <= 0xef:
            more = 2
            if lead == 0xe0:
                low = 0xa0
            elif lead == 0xed:
                high = 0x9f
        elif 0xf0 <= lead <= 0xf4:
            more = 3
            if lead == 0xf0:
                low = 0x90
            elif lead == 0xf4:
                high = 0x8f
        else:
            return False
        if text.end - p < more:
            return False
        while more:
            if p[0] < low or p[0] > high:
                return False
            low, high = 0x80, 0xbf
            p += 1
            more -= 1
    return True


cdef inline int check_descriptor(Span span) noexcept nogil:
    cdef Field field
    cdef int code
    while span.p != span.end:
        code = next_field(&span, &field)
        if code:
            return code
        if field.wire_type == W_LEN and (field.number == F_NAME or field.number == F_DTYPE) and not is_utf8(field.body):
            return UTF8
    return OK


cdef inline size_t put_record(uint8_t *out, Span body) noexcept nogil:
    cdef size_t n = 1, length = body.end - body.p
    out[0] = TAG_RECORD
    n += put_varint(out + n, length)
    memcpy(out + n, body.p, length)
    return n + length


cdef inline size_t put_message(uint8_t *out, uint64_t number, const uint8_t *body, size_t length) noexcept nogil:
    cdef size_t n = put_varint(out, number << 3 | W_LEN)
    n += put_varint(out + n, length)
    memcpy(out + n, body, length)
    return n + length


cdef int split_source(Span span, Parts *parts, size_t *n_left) noexcept nogil:
    cdef Field field
    cdef int code
    n_left[0] = 0
    while span.p != span.end:
        code = next_field(&span, &field)
        if code:
            return code
        if field.number == F_SOURCE_TENSORS and field.wire_type == W_LEN:
            code = check_descriptor(field.body)
            if code:
                return code
            parts.n_payload_bytes += put_record(parts.payload + parts.n_payload_bytes, field.body)
            parts.n_payload += 1
        else:
            memcpy(parts.source + n_left[0], field.start, span.p - field.start)
            n_left[0] += span.p - field.start
    return OK


cdef int split_worker(Span span, Parts *parts) noexcept nogil:
    cdef Field field
    cdef size_t n = 0, n_source = 0
    cdef int code
    while span.p != span.end:
        code = next_field(&span, &field)
        if code:
            return code
        if field.number == F_TENSORS and field.wire_type == W_LEN:
            code = check_descriptor(field.body)
            if code:
                return code
            parts.n_legacy_bytes += put_record(parts.legacy + parts.n_legacy_bytes, field.body)
            parts.n_legacy += 1
        elif field.number == F_TENSOR_SOURCE and field.wire_type == W_LEN:
            code = split_source(field.body, parts, &n_source)
            if code:
                return code
            n += put_message(parts.worker + n, F_TENSOR_SOURCE, parts.source, n_source)
        else:
            if field.number == F_ARTIFACT_SOURCE and field.wire_type == W_LEN:  # the other member of its oneof: the last one stands
                parts.n_payload_bytes = 0
                parts.n_payload = 0
            memcpy(parts.worker + n, field.start, span.p - field.start)
            n += span.p - field.start
    parts.n_small += put_message(parts.small + parts.n_small, F_WORKER, parts.worker, n)
    return OK


cdef int split_request(Span span, Parts *parts) noexcept nogil:
    cdef Field field
    cdef int code
    while span.p != span.end:
        code = next_field(&span, &field)
        if code:
            return code
        if field.number == F_WORKER and field.wire_type == W_LEN:
            code = split_worker(field.body, parts)
            if code:
                return code
        else:
            memcpy(parts.small + parts.n_small, field.start, span.p - field.start)
            parts.n_small += span.p - field.start
    return OK


cdef int set_tags(uint8_t *p, size_t length, uint8_t tag) noexcept nogil:
    """Writes `tag` over the tag of every record."""
    cdef Span span
    cdef uint64_t n = 0
    cdef int code
    span.p = p
    span.end = p + length
    while span.p != span.end:
        if span.p[0] != TAG_RECORD:
            return WIRE_TYPE
        p[span.p - <const uint8_t *>p] = tag
        span.p += 1
        code = read_varint(&span, &n)
        if code:
            return code
        if n > <uint64_t>(span.end - span.p):
            return CUT
        span.p += n
    return OK


def split(bytes request):
    cdef Span span
    cdef Parts parts
    cdef int code
    cdef size_t n = PyBytes_GET_SIZE(request)
    span.p = <const uint8_t *>PyBytes_AS_STRING(request)
    span.end = span.p + n
    parts.n_small = parts.n_legacy_bytes = parts.n_payload_bytes = 0
    parts.n_legacy = parts.n_payload = 0
    # One arena of five parts. None outgrows the request: what is written again has tags and lengths in their shortest form.
    # Pages that are never written are never there.
    cdef uint8_t *arena = <uint8_t *>malloc(5 * n + 1)
    if arena == NULL:
        raise MemoryError
    try:
        parts.small, parts.worker, parts.source = arena, arena + n, arena + 2 * n
        parts.legacy, parts.payload = arena + 3 * n, arena + 4 * n
        with nogil:
            code = split_request(span, &parts)
        if code:
            raise ValueError(_TEXTS[code])
        return (
            PyBytes_FromStringAndSize(<char *>parts.small, parts.n_small),
            PyBytes_FromStringAndSize(<char *>parts.legacy, parts.n_legacy_bytes), parts.n_legacy,
            PyBytes_FromStringAndSize(<char *>parts.payload, parts.n_payload_bytes), parts.n_payload,
        )
    finally:
        free(arena)


def retag(bytes records, int number):
    cdef size_t n = PyBytes_GET_SIZE(records)
    cdef bytes result = PyBytes_FromStringAndSize(NULL, n)
    cdef uint8_t *out = <uint8_t *>PyBytes_AS_STRING(result)
    cdef const char *source = PyBytes_AS_STRING(records)
    cdef int code
    if not 1 <= number <= 15:
        raise ValueError("the number of the field must be 1 to 15: its tag has one byte")
    with nogil:
        memcpy(out, source, n)
        code = set_tags(out, n, <uint8_t>(number << 3 | W_LEN))
    if code:
        raise ValueError(_TEXTS[code])
    return result
