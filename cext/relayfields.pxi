# What the router writes into a request of its own: the rid, the rank, the length; and where it may. Part of relay.pyx.

cdef extern from "sf_rid.h" nogil:
    int64_t sf_rid_place(const char *text, size_t length) noexcept

cdef extern from "sf_rank.h" nogil:
    int sf_names_rank(const char *text, size_t length) noexcept
    int64_t sf_front_place(const char *text, size_t length) noexcept


def rid_place(bytes body not None):
    """Index behind the brace of a JSON object that has a key but no string "rid" anywhere, where one may be put; -1 for all else."""
    return sf_rid_place(PyBytes_AS_STRING(body), PyBytes_GET_SIZE(body))


def names_rank(bytes body not None):
    """Whether a JSON body may say itself which data-parallel rank it wants; a no is certain."""
    return sf_names_rank(PyBytes_AS_STRING(body), PyBytes_GET_SIZE(body)) != 0


def retarget(RequestHead head not None, bytes target not None):
    """Hand a request on under another target, which is not looked at again."""
    head.target = target


cdef inline char *put(char *end, bytes data) noexcept:
    memcpy(end, PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))
    return end + PyBytes_GET_SIZE(data)


cdef int put_length(char *out, uint64_t size) noexcept:
    # `content-length: SIZE` and the end of a head; returns its length, at most 40 bytes.
    cdef char *end
    memcpy(out, b"content-length: ", 16)
    end = put_number(out + 16, size)
    memcpy(end, b"\r\n\r\n", 4)
    return end + 4 - out


cdef int put_rank_field(char *out, char way, int dp_rank, bint is_first) noexcept:
    # `{"routed_dp_rank":3,`, the brace only where nothing is in front of it; returns its length, at most 48 bytes.
    cdef char *end = out
    if is_first:
        end[0] = c"{"
        end += 1
    end = put_text(end, b'"routed_dp_rank":' if way == c"r" else b'"data_parallel_rank":')
    end = put_number(end, dp_rank)
    end[0] = c","
    return end + 1 - out
