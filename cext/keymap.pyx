"""Engine hash -> block key: what the token route remembers of a rank's blocks. 16 bytes an entry, at most 3/4 full.

Runs in: index, one map a rank that has blocks keyed by their tokens; under the rank's lock. Never shared between processes.
Contract: hashes and keys are n little-endian uint64 in one bytes-like object each. A hash has one key; putting it again replaces
    the key. Deletion shifts entries back, so a map that churns does not grow; it shrinks when it is cleared or pruned.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

cimport cython

cdef enum:
    c_FIRST_SLOTS = 256

# Hash 0 marks a free slot; a real hash 0 is kept as this one.
cdef uint64_t HASH_ZERO = 0x9e3779b97f4a7c15


cdef struct entry_t:
    uint64_t hash
    uint64_t key


cdef inline uint64_t _word(const void *words, uint64_t i) noexcept nogil:
    cdef uint64_t value
    memcpy(&value, <const char *>words + 8 * i, 8)
    return value


cdef inline uint64_t _hash_at(const void *words, uint64_t i) noexcept nogil:
    cdef uint64_t value = _word(words, i)
    return value if value else HASH_ZERO


@cython.final
cdef class KeyMap:
    cdef entry_t *slots
    cdef uint64_t n_slots  # power of two
    cdef uint64_t count

    def __cinit__(self):
        self._make(c_FIRST_SLOTS)

    def __dealloc__(self):
        free(self.slots)

    def __len__(self):
        return self.count

    cdef _make(self, uint64_t n_slots):
        cdef entry_t *slots = <entry_t *>calloc(n_slots, sizeof(entry_t))
        if slots == NULL:
            raise MemoryError
        free(self.slots)
        self.slots = slots
        self.n_slots = n_slots
        self.count = 0

    cdef inline uint64_t c_home(self, uint64_t hash_) noexcept nogil:
        # Engine hashes are strong, but nothing obliges them to be.
        return hash_ * <uint64_t>0xd6e8feb86659fd93 >> 32 & self.n_slots - 1

    cdef inline entry_t *c_find(self, uint64_t hash_) noexcept nogil:
        """The entry of `hash_`, or the free one where it would go."""
        cdef uint64_t i = self.c_home(hash_)
        while self.slots[i].hash and self.slots[i].hash != hash_:
            i = i + 1 & self.n_slots - 1
        return &self.slots[i]

    cdef void c_delete(self, entry_t *entry) noexcept nogil:
        cdef uint64_t mask = self.n_slots - 1
        cdef uint64_t hole = entry - self.slots
        cdef uint64_t i = hole
        while True:
            i = i + 1 & mask
            if not self.slots[i].hash:
                break
            if (i - self.c_home(self.slots[i].hash) & mask) >= (i - hole & mask):
                self.slots[hole] = self.slots[i]
                hole = i
        self.slots[hole].hash = 0
        self.count -= 1

    cdef _resize(self, uint64_t n_slots):
        cdef entry_t *old = self.slots
        cdef uint64_t n_old = self.n_slots, i
        self.slots = NULL
        try:
            self._make(n_slots)
        except MemoryError:
            self.slots = old
            raise
        for i in range(n_old):
            if old[i].hash:
                self.c_find(old[i].hash)[0] = old[i]
                self.count += 1
        free(old)

    def put(self, hashes, keys):
        """Remember the key of each hash. Raises ValueError when there are not as many of both."""
        cdef Py_buffer hash_view, key_view
        cdef uint64_t i, n
        cdef entry_t *entry
        PyObject_GetBuffer(hashes, &hash_view, PyBUF_SIMPLE)
        try:
            PyObject_GetBuffer(keys, &key_view, PyBUF_SIMPLE)
            try:
                if hash_view.len != key_view.len or hash_view.len & 7:
                    raise ValueError(f"{hash_view.len} bytes of hashes and {key_view.len} bytes of keys are not whole pairs of words")
                n = hash_view.len >> 3
                while (self.count + n) * 4 > self.n_slots * 3:
                    self._resize(self.n_slots * 2)
                for i in range(n):
                    entry = self.c_find(_hash_at(hash_view.buf, i))
                    if not entry.hash:
                        entry.hash = _hash_at(hash_view.buf, i)
                        self.count += 1
                    entry.key = _word(key_view.buf, i)
            finally:
                PyBuffer_Release(&key_view)
        finally:
            PyBuffer_Release(&hash_view)

    def get(self, hash_):
        """The key of one hash, None when it is unknown."""
        cdef uint64_t value = hash_
        cdef entry_t *entry = self.c_find(value if value else HASH_ZERO)
        return entry.key if entry.hash else None

    def find(self, hashes):
        """(known hashes, their keys), in the order of `hashes`; unknown ones are left out."""
        cdef Py_buffer view
        cdef uint64_t i, n_found = 0
        cdef entry_t *entry
        cdef char *out_hashes
        cdef char *out_keys
        PyObject_GetBuffer(hashes, &view, PyBUF_SIMPLE)
        try:
            if view.len & 7:
                raise ValueError(f"hashes must be whole 8-byte words, not {view.len} bytes")
            found = PyBytes_FromStringAndSize(NULL, view.len)
            keys = PyBytes_FromStringAndSize(NULL, view.len)
            out_hashes = PyBytes_AS_STRING(found)
            out_keys = PyBytes_AS_STRING(keys)
            for i in range(<uint64_t>view.len >> 3):
                entry = self.c_find(_hash_at(view.buf, i))
                if entry.hash:
                    memcpy(out_hashes + 8 * n_found, <char *>view.buf + 8 * i, 8)
                    memcpy(out_keys + 8 * n_found, &entry.key, 8)
                    n_found += 1
            if 8 * n_found == <uint64_t>view.len:
                return found, keys
            return found[:8 * n_found], keys[:8 * n_found]
        finally:
            PyBuffer_Release(&view)

    def drop(self, hashes, but_for=b""):
        """Forget the hashes, unknown ones are passed over. but_for: one byte a hash, nonzero = keep it; empty = keep none.

        Raises ValueError when `but_for` is neither empty nor as long as the list.
        """
        cdef Py_buffer view
        cdef uint64_t i
        cdef entry_t *entry
        cdef const unsigned char[:] kept = but_for
        PyObject_GetBuffer(hashes, &view, PyBUF_SIMPLE)
        try:
            if view.len & 7 or kept.shape[0] and kept.shape[0] != view.len >> 3:
                raise ValueError(f"{view.len} bytes of hashes do not go with {kept.shape[0]} marks")
            for i in range(<uint64_t>view.len >> 3):
                if kept.shape[0] and kept[i]:
                    continue
                entry = self.c_find(_hash_at(view.buf, i))
                if entry.hash:
                    self.c_delete(entry)
        finally:
            PyBuffer_Release(&view)

    def items(self):
        """(all hashes, their keys), in no order."""
        cdef uint64_t i, n = 0, value
        hashes = PyBytes_FromStringAndSize(NULL, 8 * self.count)
        keys = PyBytes_FromStringAndSize(NULL, 8 * self.count)
        for i in range(self.n_slots):
            if self.slots[i].hash:
                value = self.slots[i].hash
                if value == HASH_ZERO:
                    value = 0
                memcpy(PyBytes_AS_STRING(hashes) + 8 * n, &value, 8)
                memcpy(PyBytes_AS_STRING(keys) + 8 * n, &self.slots[i].key, 8)
                n += 1
        return hashes, keys

    def clear(self):
        """Forget everything, and give the memory back."""
        self._make(c_FIRST_SLOTS)
