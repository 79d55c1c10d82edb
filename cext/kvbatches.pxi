# Part of kvdecode.pyx and keymap.pyx: batches that came one behind the other, as `_kvsocket` hands them over.


# payloads: all of them; number i ends at word i of `ends`. Both belong to the views.
cdef struct batches_t:
    Py_buffer payloads
    Py_buffer ends
    uint64_t first  # the batch to begin with
    uint64_t count  # of all


cdef inline uint64_t batches_end(const batches_t *batches, uint64_t i) noexcept nogil:
    cdef uint64_t end
    memcpy(&end, <const char *>batches.ends.buf + 8 * i, 8)
    return end


cdef inline const uint8_t *batches_start(const batches_t *batches, uint64_t i) noexcept nogil:
    """Where batch i begins, and the one before it ends."""
    return <const uint8_t *>batches.payloads.buf + (batches_end(batches, i - 1) if i else 0)


cdef int batches_open(batches_t *batches, payloads, ends, uint64_t first) except -1:
    """Raises ValueError when the ends are not those of batches in `payloads`, or there is no batch `first`. To be closed, else."""
    cdef uint64_t i, end = 0
    PyObject_GetBuffer(payloads, &batches.payloads, PyBUF_SIMPLE)
    try:
        PyObject_GetBuffer(ends, &batches.ends, PyBUF_SIMPLE)
    except BaseException:
        PyBuffer_Release(&batches.payloads)
        raise
    batches.first = first
    batches.count = batches.ends.len >> 3
    for i in range(batches.count):
        if batches_end(batches, i) < end:
            break
        end = batches_end(batches, i)
    else:
        if not batches.ends.len & 7 and end == <uint64_t>batches.payloads.len and first <= batches.count:
            return 0
    batches_close(batches)
    raise ValueError(f"the ends given are not those of batches in {len(payloads)} bytes, with one of number {first}")


cdef void batches_close(batches_t *batches) noexcept:
    PyBuffer_Release(&batches.payloads)
    PyBuffer_Release(&batches.ends)
