"""Chat bodies as raw bytes: where their messages stand, and a name for every beginning of the conversation.

Runs in: shards, on the request path; never blocks. A ChatScan keeps the body and 40 bytes a message.
Contract: `scan_chat` reads no more than it must to split the body; what it cannot split is None and belongs to a parser. A split body
    is valid JSON exactly if `context`, `tools` and each message are (cext/sf_json.h), and nothing here has looked at that.
    `name(n)` is the same for two bodies exactly if their first n messages are the same bytes; what stands between them, and all else
    in the body, does not count. It is 128 bits of XXH3 chained over the messages: by chance two differing ones are not to be
    expected, and without the seed, which never leaves the process, a client cannot look for them; a wrong one would cost a wrong hint.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset


cdef extern from "sf_json.h" nogil:
    enum:
        SF_JSON_OK
        SF_JSON_NO_MEMORY

    ctypedef struct sf_json_message_t:
        uint64_t start
        uint64_t end
        int is_flat

    ctypedef struct sf_json_chat_t:
        sf_json_message_t *messages
        uint32_t n_messages
        uint64_t array_start
        uint64_t array_end
        uint64_t tools_start
        uint64_t tools_end

    const char *sf_json_string_end(const char *p, const char *end, int is_narrow) noexcept
    int sf_json_scan_chat(sf_json_chat_t *chat, const char *base, size_t length) noexcept

cdef extern from "sf_xxh3.h" nogil:
    void sf_xxh3_make_secret(uint8_t *secret, uint64_t seed) noexcept
    void sf_xxh3_name(const void *data, size_t n, uint64_t seed, const uint8_t *secret, uint64_t *out) noexcept


cdef struct name_t:
    uint64_t halves[2]


# The secret of the seed that was used last: a process has one.
cdef uint64_t _seed = 0
cdef uint8_t _secret[192]
sf_xxh3_make_secret(_secret, _seed)


cdef void _name_messages(const sf_json_chat_t *chat, const char *base, uint64_t seed, const uint8_t *secret, name_t *names) noexcept nogil:
    """names[i]: of the first i messages, one more than there are messages."""
    cdef uint64_t link[4]
    cdef uint32_t i
    names[0].halves[0] = names[0].halves[1] = 0
    for i in range(chat.n_messages):
        memcpy(link, names[i].halves, 16)
        sf_xxh3_name(base + chat.messages[i].start, chat.messages[i].end - chat.messages[i].start, seed, secret, link + 2)
        sf_xxh3_name(link, 32, seed, secret, names[i + 1].halves)


cdef void _name_context(const sf_json_chat_t *chat, const char *base, size_t size, uint64_t seed, const uint8_t *secret,
                        name_t *name) noexcept nogil:
    cdef uint64_t parts[5]
    sf_xxh3_name(base, chat.array_start, seed, secret, parts)
    sf_xxh3_name(base + chat.array_end, size - chat.array_end, seed, secret, parts + 2)
    parts[4] = chat.array_start
    sf_xxh3_name(parts, 40, seed, secret, name.halves)


cdef const char *_bytes_of(bytes kind) except NULL:
    if PyBytes_GET_SIZE(kind) != 16:
        raise ValueError(f"a kind has 16 bytes, not {PyBytes_GET_SIZE(kind)}")
    return PyBytes_AS_STRING(kind)


@cython.final
@cython.freelist(16)
cdef class ChatScan:
    """One body; see the stub."""

    cdef readonly bytes body
    cdef sf_json_chat_t chat
    cdef name_t *names
    cdef name_t context_halves

    def __dealloc__(self):
        free(self.chat.messages)
        free(self.names)

    def __len__(self):
        return self.chat.n_messages

    cdef int _check(self, Py_ssize_t position) except -1:
        if position < 0 or position >= self.chat.n_messages:
            raise IndexError(f"message {position} of {self.chat.n_messages}")
        return 0

    def start(self, Py_ssize_t position):
        self._check(position)
        return self.chat.messages[position].start

    def end(self, Py_ssize_t position):
        self._check(position)
        return self.chat.messages[position].end

    def message(self, Py_ssize_t position):
        self._check(position)
        cdef sf_json_message_t *message = &self.chat.messages[position]
        return PyBytes_FromStringAndSize(PyBytes_AS_STRING(self.body) + message.start, message.end - message.start)

    def is_flat(self, Py_ssize_t position):
        """Whether this message and all behind it hold no object and no array."""
        self._check(position)
        cdef Py_ssize_t i
        for i in range(position, self.chat.n_messages):
            if not self.chat.messages[i].is_flat:
                return False
        return True

    cdef bytes _name(self, Py_ssize_t count, const char *kind):
        cdef name_t name = self.names[count]
        cdef uint64_t mixed[2]
        if kind != NULL:
            memcpy(mixed, kind, 16)
            name.halves[0] ^= mixed[0]
            name.halves[1] ^= mixed[1]
        return PyBytes_FromStringAndSize(<char *> name.halves, 16)

    def name(self, Py_ssize_t count, bytes kind=None):
        if count < 0 or count > self.chat.n_messages:
            raise IndexError(f"{count} of {self.chat.n_messages} messages")
        cdef const char *bytes_of_kind = NULL
        if kind is not None:
            bytes_of_kind = _bytes_of(kind)
        return self._name(count, bytes_of_kind)

    def beginnings(self, Py_ssize_t limit, Py_ssize_t last, Py_ssize_t first, bytes kind not None):
        if limit < 0 or limit > self.chat.n_messages or last < 0 or first < 0:
            raise IndexError(f"{limit} of {self.chat.n_messages} messages, {last} and {first}")
        cdef const char *bytes_of_kind = _bytes_of(kind)
        cdef list found = []
        cdef Py_ssize_t count
        for count in range(limit, max(0, limit - last), -1):
            found.append(self._name(count, bytes_of_kind))
        for count in range(min(first, limit - last), 0, -1):
            found.append(self._name(count, bytes_of_kind))
        return found

    @property
    def context_name(self):
        return PyBytes_FromStringAndSize(<char *> self.context_halves.halves, 16)

    @property
    def context(self):
        # In the order in which the two stand in the body.
        cdef Py_ssize_t a = self.chat.array_start, a_end = self.chat.array_end, b = self.chat.tools_start, b_end = self.chat.tools_end
        cdef const char *first = "[]"
        cdef const char *second = "null"
        if b_end == 0:
            b = b_end = PyBytes_GET_SIZE(self.body)
            second = ""
        elif b < a:
            a, a_end, b, b_end = b, b_end, a, a_end
            first, second = second, first
        cdef bytes body = self.body
        return b"".join((body[:a], first, body[a_end:b], second, body[b_end:]))

    @property
    def tools(self):
        return self.body[self.chat.tools_start:self.chat.tools_end]


def string_end(bytes text not None, *, bint is_narrow=False):
    cdef const char *base = PyBytes_AS_STRING(text)
    cdef const char *found = sf_json_string_end(base, base + PyBytes_GET_SIZE(text), is_narrow)
    return -1 if found == NULL else found - base


def scan_chat(bytes body not None, uint64_t seed):
    global _seed
    cdef ChatScan scan = ChatScan.__new__(ChatScan)
    cdef const char *base = PyBytes_AS_STRING(body)
    memset(&scan.chat, 0, sizeof(sf_json_chat_t))
    scan.names = NULL
    cdef int code = sf_json_scan_chat(&scan.chat, base, PyBytes_GET_SIZE(body))
    if code == SF_JSON_NO_MEMORY:
        raise MemoryError
    if code != SF_JSON_OK:
        return None
    scan.names = <name_t *> malloc((scan.chat.n_messages + 1) * sizeof(name_t))
    if scan.names == NULL:
        raise MemoryError
    if seed != _seed:
        sf_xxh3_make_secret(_secret, seed)
        _seed = seed
    scan.body = body
    _name_messages(&scan.chat, base, seed, _secret, scan.names)
    _name_context(&scan.chat, base, PyBytes_GET_SIZE(body), seed, _secret, &scan.context_halves)
    return scan
