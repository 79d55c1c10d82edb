"""Runs of live KV events out of a SUB socket: libzmq's own receive calls, without a Python object a frame.

Runs in: index, in the thread of the rank whose socket it is. Contract: a message is of a run when it has three frames, its topic is the
    wanted one, its sequence has 8 bytes and is the number that comes next; whatever else comes is handed over as its frames, and
    wire.frames says what it is. Messages keep their order. A read takes what is there and never waits; it drops the GIL.
The functions come out of the libzmq that pyzmq has loaded, so that there is one of it in the process and nothing is needed to build:
    those declared below are part of its stable interface since 3.2 (zmq.h: zmq_msg_t is 64 bytes, aligned as a pointer).
Why: pyzmq takes 3 us for a message's frames; here a block's whole way from the socket to the tree takes less.
Source: spec/kv_events.md 1.2.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint8_t, uint64_t, uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcmp, memcpy
from posix.dlfcn cimport RTLD_LAZY, dlclose, dlerror, dlopen, dlsym

cimport cython

import zmq


cdef extern from *:
    """
    #include <stdalign.h>
    typedef struct { alignas(void *) unsigned char bytes[64]; } sf_zmq_msg_t;
    _Static_assert(sizeof(sf_zmq_msg_t) == 64, "zmq_msg_t of zmq.h");

    static struct {
        int (*init)(sf_zmq_msg_t *);
        int (*recv)(sf_zmq_msg_t *, void *, int);
        int (*close)(sf_zmq_msg_t *);
        void *(*data)(sf_zmq_msg_t *);
        size_t (*size)(const sf_zmq_msg_t *);
        int (*more)(const sf_zmq_msg_t *);
    } sf_zmq;
    """
    ctypedef struct sf_zmq_msg_t:
        pass

    struct sf_zmq_t:
        int (*init)(sf_zmq_msg_t *) noexcept nogil
        int (*recv)(sf_zmq_msg_t *, void *, int) noexcept nogil
        int (*close)(sf_zmq_msg_t *) noexcept nogil
        void *(*data)(sf_zmq_msg_t *) noexcept nogil
        size_t (*size)(const sf_zmq_msg_t *) noexcept nogil
        int (*more)(const sf_zmq_msg_t *) noexcept nogil

    sf_zmq_t sf_zmq

cdef extern from "dlfcn.h" nogil:
    int RTLD_NOLOAD

cdef enum:
    c_MESSAGES = 256
    c_DONTWAIT = 1  # ZMQ_DONTWAIT

cdef enum:
    c_MORE      # a limit was reached: there may be more
    c_EMPTY     # nothing is left to read
    c_UNUSUAL   # a message that is not of the run lies in `frames`, up to its last frame or its third
    c_ERROR     # libzmq's errno

RUN_MESSAGES = c_MESSAGES


cdef void *_symbol(void *library, str name) except NULL:
    cdef void *found = dlsym(library, name.encode())
    if found == NULL:
        raise ImportError(f"sglfast reads KV events with libzmq's {name}, which the libzmq of pyzmq {zmq.__version__} does not show")
    return found


cdef _load():
    """Find libzmq's functions behind the extension module that pyzmq has loaded."""
    cdef void *library
    try:
        from zmq.backend.cython import _zmq
        path = _zmq.__file__
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"sglfast reads KV events with pyzmq's compiled backend, and this pyzmq {zmq.__version__} has none: {error}"
        ) from error
    library = dlopen(path.encode(), RTLD_NOLOAD | RTLD_LAZY)
    if library == NULL:
        raise ImportError(f"pyzmq's {path} cannot be looked into for libzmq's functions: {dlerror().decode(errors='replace')}")
    try:
        sf_zmq.init = <int (*)(sf_zmq_msg_t *) noexcept nogil>_symbol(library, "zmq_msg_init")
        sf_zmq.recv = <int (*)(sf_zmq_msg_t *, void *, int) noexcept nogil>_symbol(library, "zmq_msg_recv")
        sf_zmq.close = <int (*)(sf_zmq_msg_t *) noexcept nogil>_symbol(library, "zmq_msg_close")
        sf_zmq.data = <void *(*)(sf_zmq_msg_t *) noexcept nogil>_symbol(library, "zmq_msg_data")
        sf_zmq.size = <size_t (*)(const sf_zmq_msg_t *) noexcept nogil>_symbol(library, "zmq_msg_size")
        sf_zmq.more = <int (*)(const sf_zmq_msg_t *) noexcept nogil>_symbol(library, "zmq_msg_more")
    finally:
        dlclose(library)  # the module itself stays loaded


_load()


cdef inline int receive(void *socket, sf_zmq_msg_t *frame) noexcept nogil:
    """The next frame, if it is there; 0 or an errno. A message that was begun is there to its end."""
    while sf_zmq.recv(frame, socket, c_DONTWAIT) < 0:
        if errno != EINTR:
            return errno
    return 0


cdef inline bint is_next(sf_zmq_msg_t *frame, uint64_t seq) noexcept nogil:
    """Is it the sequence frame of number `seq`, and is that below 2**63?"""
    cdef uint64_t value = 0
    cdef const uint8_t *data
    cdef int i
    if sf_zmq.size(frame) != 8:
        return False
    data = <const uint8_t *>sf_zmq.data(frame)
    for i in range(8):
        value = value << 8 | data[i]
    return value == seq and not value >> 63


@cython.final
cdef class LiveSocket:
    cdef object socket
    cdef void *handle
    cdef bytes topic            # the one wanted; None = whatever the subscription lets through
    cdef sf_zmq_msg_t *batches  # payloads of the run: the first n_batches of c_MESSAGES, and room for one that is not of it
    cdef sf_zmq_msg_t frames[2]  # topic and sequence of the message that is being read
    cdef uint64_t n_batches
    cdef uint64_t n_bytes
    cdef uint64_t n_messages    # taken from the socket
    cdef uint64_t n_frames      # of the message that is being read
    cdef int error

    def __cinit__(self, socket, bytes topic=None):
        cdef uint64_t i
        self.socket = socket
        self.handle = <void *><uintptr_t>socket.underlying
        self.topic = topic
        self.batches = <sf_zmq_msg_t *>malloc((c_MESSAGES + 1) * sizeof(sf_zmq_msg_t))
        if self.batches == NULL:
            raise MemoryError
        for i in range(c_MESSAGES + 1):
            sf_zmq.init(&self.batches[i])
        for i in range(2):
            sf_zmq.init(&self.frames[i])

    def __dealloc__(self):
        cdef uint64_t i
        if self.batches == NULL:
            return
        for i in range(c_MESSAGES + 1):
            sf_zmq.close(&self.batches[i])
        for i in range(2):
            sf_zmq.close(&self.frames[i])
        free(self.batches)

    cdef sf_zmq_msg_t *c_frame(self, uint64_t i) noexcept nogil:
        """Frame i of the message that is being read, the first three of it."""
        return &self.frames[i] if i < 2 else &self.batches[self.n_batches]

    cdef int c_receive(self) noexcept nogil:
        """The first three frames of the next message, or all if it has fewer; 0 or an errno."""
        self.n_frames = 0
        while True:
            self.error = receive(self.handle, self.c_frame(self.n_frames))
            if self.error:
                return self.error
            self.n_frames += 1
            if self.n_frames == 3 or not sf_zmq.more(self.c_frame(self.n_frames - 1)):
                return 0

    cdef bint c_has_more(self) noexcept nogil:
        """Of the message that is being read, are there more than the frames at hand?"""
        return sf_zmq.more(self.c_frame(self.n_frames - 1))

    cdef bint c_is_ours(self, const char *topic, size_t n_bytes) noexcept nogil:
        return topic == NULL or (sf_zmq.size(&self.frames[0]) == n_bytes and memcmp(sf_zmq.data(&self.frames[0]), topic, n_bytes) == 0)

    cdef int c_pass(self) noexcept nogil:
        """Read the rest of a message and forget it; 0 or an errno."""
        while self.c_has_more():
            self.n_frames = 1
            self.error = receive(self.handle, &self.frames[0])
            if self.error:
                return self.error
        return 0

    cdef int c_read(
        self, bint wants_run, uint64_t next_seq, uint64_t max_messages, uint64_t max_bytes, const char *topic, size_t n_topic
    ) noexcept nogil:
        self.n_batches = self.n_bytes = self.n_messages = 0
        while self.n_messages < max_messages and self.n_bytes < max_bytes:
            if self.c_receive():
                return c_EMPTY if self.error == EAGAIN and not self.n_frames else c_ERROR
            self.n_messages += 1
            if not self.c_is_ours(topic, n_topic):
                if self.c_pass():
                    return c_ERROR
                continue
            if not wants_run or self.n_frames != 3 or self.c_has_more() or not is_next(&self.frames[1], next_seq):
                return c_UNUSUAL
            self.n_bytes += sf_zmq.size(&self.batches[self.n_batches])
            self.n_batches += 1
            next_seq += 1
        return c_MORE

    cdef void c_pack(self, char *payloads, char *ends) noexcept nogil:
        """Take the run's payloads out of their messages."""
        cdef uint64_t i, n, end = 0
        for i in range(self.n_batches):
            n = sf_zmq.size(&self.batches[i])
            memcpy(payloads + end, sf_zmq.data(&self.batches[i]), n)
            end += n
            memcpy(ends + 8 * i, &end, 8)

    cdef void c_empty(self) noexcept nogil:
        """Give libzmq its memory back."""
        cdef uint64_t i
        for i in range(self.n_batches + 1):
            sf_zmq.close(&self.batches[i])
            sf_zmq.init(&self.batches[i])

    cdef list _frames(self):
        """All frames of the message that is being read."""
        cdef uint64_t i
        cdef list frames = [_bytes_of(self.c_frame(i)) for i in range(self.n_frames)]
        while self.c_has_more():
            self.n_frames = 1
            self.error = receive(self.handle, &self.frames[0])
            if self.error:
                raise _error(self.error)
            frames.append(_bytes_of(&self.frames[0]))
        return frames

    def read(self, next_seq=None, unsigned long long max_messages=c_MESSAGES, unsigned long long max_bytes=1 << 18):
        cdef bint wants_run = next_seq is not None
        cdef uint64_t seq = next_seq if wants_run else 0
        cdef const char *topic = NULL
        cdef size_t n_topic = 0
        cdef int code
        if self.socket.closed:
            raise zmq.ZMQError(zmq.ENOTSOCK)
        if self.topic is not None:
            topic = self.topic
            n_topic = len(self.topic)
        try:
            with nogil:
                code = self.c_read(wants_run, seq, min(max_messages, <unsigned long long>c_MESSAGES), max_bytes, topic, n_topic)
            # After a run the error is for the next call: it will be there again.
            if code == c_ERROR and (self.n_frames or not self.n_batches):
                raise _error(self.error)
            payloads = PyBytes_FromStringAndSize(NULL, self.n_bytes)
            ends = PyBytes_FromStringAndSize(NULL, 8 * self.n_batches)
            self._pack(payloads, ends)
            return payloads, ends, self._frames() if code == c_UNUSUAL else None, self.n_messages, code == c_EMPTY
        finally:
            self.c_empty()

    cdef _pack(self, bytes payloads, bytes ends):
        cdef char *to_payloads = PyBytes_AS_STRING(payloads)
        cdef char *to_ends = PyBytes_AS_STRING(ends)
        with nogil:
            self.c_pack(to_payloads, to_ends)


cdef bytes _bytes_of(sf_zmq_msg_t *frame):
    return PyBytes_FromStringAndSize(<const char *>sf_zmq.data(frame), sf_zmq.size(frame))


cdef _error(int code):
    return (zmq.ContextTerminated if code == zmq.ETERM else zmq.ZMQError)(code)
