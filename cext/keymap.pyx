"""Engine hash -> block key: what the token route remembers of a rank's blocks. 16 bytes an entry, at most 3/4 full.

Runs in: index, one map a rank that has blocks keyed by their tokens; under the rank's lock. Never shared between processes.
Contract: hashes and keys are n little-endian uint64 in one bytes-like object each. A hash has one key; putting it again replaces
    the key. Deletion shifts entries back, so a map that churns does not grow; it shrinks when it is cleared or pruned.
    `place` is the token route in one pass, from a batch's bytes to runs of keys: for batches in which all is usual; for the others it
    returns None, the map is as it was, and index/token_route.py does the same event by event (tests compare the two).
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset

cimport cython

cdef extern from "sf_xxh3.h" nogil:
    int SF_XXH3_SECRET_BYTES
    void sf_xxh3_make_secret(uint8_t *secret, uint64_t seed) noexcept
    uint64_t sf_xxh3(const void *data, size_t n, uint64_t seed, const uint8_t *secret) noexcept

cdef extern from "sf_kvdecode.h" nogil:
    enum:
        SF_KV_OK
        SF_KV_NO_MEMORY
        SF_KV_STORE
        SF_KV_REMOVE
        SF_KV_CLEAR
        SF_KV_SPEC_UNTOLD
        SF_KV_SPEC_OTHER

    ctypedef struct sf_kv_run_t:
        uint32_t kind
        uint32_t tiers
        uint64_t start
        uint64_t count

    ctypedef struct sf_kv_event_t:
        uint32_t kind
        uint32_t tiers
        uint64_t start
        uint64_t count
        uint64_t parent
        uint64_t first_token
        uint64_t n_tokens
        int64_t group
        uint32_t block_size
        uint8_t has_parent
        uint8_t spec

    ctypedef struct sf_kv_t:
        const uint8_t *p
        const uint8_t *end
        uint64_t *keys
        uint64_t n_keys
        sf_kv_run_t *runs
        uint64_t n_runs
        uint64_t n_events
        int wants_tokens
        uint32_t *tokens
        sf_kv_event_t *events

    int sf_kv_batch(sf_kv_t *kv) noexcept
    int sf_kv_run(sf_kv_t *kv, uint32_t kind, uint32_t tiers, uint64_t n_keys, uint64_t n_end) noexcept
    void sf_kv_free(sf_kv_t *kv) noexcept

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


cdef inline bytes _packed(const uint64_t *words, uint64_t n):
    return PyBytes_FromStringAndSize(<const char *>words, 8 * n)


# What `place` makes of a batch, besides the runs of keys in its sf_kv_t.
cdef struct placed_t:
    uint64_t seed
    uint64_t block_size
    int64_t main_group
    uint8_t *page            # room for a key and a page of token ids
    uint8_t secret[192]
    uint64_t n_keys          # keys made so far; they take the room of the hashes, of which there are never fewer
    uint64_t *removed        # known hashes that removals named
    uint64_t n_removed
    uint64_t max_removed
    uint64_t n_orphans
    uint64_t n_orphans_live  # since the last clear
    bint is_cleared


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

    cdef inline void c_put(self, uint64_t hash_, uint64_t key) noexcept nogil:
        """`hash_` as `_hash_at` gives it; there must be room."""
        cdef entry_t *entry = self.c_find(hash_)
        if not entry.hash:
            entry.hash = hash_
            self.count += 1
        entry.key = key

    cdef inline bint c_is_main(self, const sf_kv_event_t *event, placed_t *placed) noexcept nogil:
        if event.group < 0:
            return True
        if event.kind == SF_KV_STORE and event.spec != SF_KV_SPEC_UNTOLD:
            if event.spec == SF_KV_SPEC_OTHER:
                return False
            placed.main_group = event.group
        return event.group == placed.main_group

    cdef uint64_t c_chain(self, sf_kv_t *kv, const sf_kv_event_t *event, placed_t *placed) noexcept nogil:
        """Keys of a store's blocks from their tokens, chained to the parent's; returns how many, 0 for orphans."""
        cdef uint64_t i, hash_, key = 0
        cdef uint64_t n_bytes = 4 * placed.block_size
        cdef entry_t *parent
        if event.has_parent:
            parent = self.c_find(event.parent if event.parent else HASH_ZERO)
            if not parent.hash:
                return 0
            key = parent.key
        if event.n_tokens != event.count * placed.block_size:
            return 0
        for i in range(event.count):
            memcpy(placed.page, &key, 8)
            memcpy(placed.page + 8, kv.tokens + event.first_token + i * placed.block_size, n_bytes)
            key = sf_xxh3(placed.page, 8 + n_bytes, placed.seed, placed.secret)
            hash_ = _hash_at(kv.keys, event.start + i)
            self.c_put(hash_, key)
            kv.keys[placed.n_keys + i] = key
        return event.count

    cdef uint64_t c_resolve(self, sf_kv_t *kv, const sf_kv_event_t *event, placed_t *placed) noexcept nogil:
        """Keys of blocks that are known by their hashes; returns how many. Those of a removal are noted."""
        cdef uint64_t i, hash_, n_found = 0
        cdef entry_t *entry
        for i in range(event.count):
            hash_ = _word(kv.keys, event.start + i)
            entry = self.c_find(hash_ if hash_ else HASH_ZERO)
            if not entry.hash:
                continue
            kv.keys[placed.n_keys + n_found] = entry.key
            n_found += 1
            if event.kind == SF_KV_REMOVE:
                placed.removed[placed.n_removed] = hash_
                placed.n_removed += 1
        return n_found

    cdef int c_place(self, sf_kv_t *kv, placed_t *placed) noexcept nogil:
        """All events in order. Cannot fail but for memory: the batch was checked, and the map has room."""
        cdef uint64_t i, n_found
        cdef sf_kv_event_t *event
        for i in range(kv.n_events):
            event = &kv.events[i]
            n_found = 0
            if event.kind == SF_KV_CLEAR:
                memset(self.slots, 0, self.n_slots * sizeof(entry_t))
                self.count = 0
                placed.n_orphans_live = 0
                placed.is_cleared = True
            elif not event.tiers or not self.c_is_main(event, placed):
                continue
            elif event.kind == SF_KV_STORE:
                n_found = self.c_chain(kv, event, placed) if event.n_tokens else self.c_resolve(kv, event, placed)
                placed.n_orphans += event.count - n_found
                placed.n_orphans_live += event.count - n_found
            else:
                n_found = self.c_resolve(kv, event, placed)
            placed.n_keys += n_found
            if (n_found or event.kind == SF_KV_CLEAR) and sf_kv_run(kv, event.kind, event.tiers, n_found, placed.n_keys):
                return SF_KV_NO_MEMORY
        return SF_KV_OK

    cdef int c_prepare(self, sf_kv_t *kv, placed_t *placed) noexcept nogil:
        """Look whether all events are of the route's block size, and count what will be needed; 1 when one is not."""
        cdef uint64_t i
        for i in range(kv.n_events):
            if kv.events[i].kind == SF_KV_STORE and kv.events[i].n_tokens and kv.events[i].block_size != placed.block_size:
                return 1
            if kv.events[i].kind == SF_KV_REMOVE:
                placed.max_removed += kv.events[i].count
        return 0

    def place(self, payload, *, uint64_t seed, uint32_t block_size, int64_t main_group=0):
        """The token route's keys of a whole batch; see the stub."""
        cdef Py_buffer view
        cdef sf_kv_t kv
        cdef placed_t placed
        cdef uint64_t i
        cdef int code
        memset(&kv, 0, sizeof(kv))
        memset(&placed, 0, sizeof(placed))
        kv.wants_tokens = 1
        placed.seed = seed
        placed.block_size = block_size
        placed.main_group = main_group
        PyObject_GetBuffer(payload, &view, PyBUF_SIMPLE)
        try:
            kv.p = <const uint8_t *>view.buf
            kv.end = kv.p + view.len
            with nogil:
                code = sf_kv_batch(&kv)
                if code == SF_KV_OK:
                    code = self.c_prepare(&kv, &placed)
            if code == SF_KV_NO_MEMORY:
                raise MemoryError
            if code != SF_KV_OK:
                return None
            self._make_room(kv.n_keys - placed.max_removed)
            placed.page = <uint8_t *>malloc(8 + 4 * placed.block_size)
            placed.removed = <uint64_t *>malloc(8 * placed.max_removed + 8)
            if placed.page == NULL or placed.removed == NULL:
                raise MemoryError
            with nogil:
                sf_xxh3_make_secret(placed.secret, placed.seed)
                code = self.c_place(&kv, &placed)
            if code:
                raise MemoryError
            if placed.is_cleared and self.count * 8 < self.n_slots:
                self._resize(max(c_FIRST_SLOTS, self.n_slots >> 2))
            return (
                kv.n_events, placed.n_orphans, placed.n_orphans_live, placed.main_group,
                [(kv.runs[i].kind, kv.runs[i].tiers, _packed(kv.keys + kv.runs[i].start, kv.runs[i].count)) for i in range(kv.n_runs)],
                _packed(placed.removed, placed.n_removed),
            )
        finally:
            PyBuffer_Release(&view)
            sf_kv_free(&kv)
            free(placed.page)
            free(placed.removed)

    cdef _make_room(self, uint64_t n):
        while (self.count + n) * 4 > self.n_slots * 3:
            self._resize(self.n_slots * 2)

    def put(self, hashes, keys):
        """Remember the key of each hash. Raises ValueError when there are not as many of both."""
        cdef Py_buffer hash_view, key_view
        cdef uint64_t i, n
        PyObject_GetBuffer(hashes, &hash_view, PyBUF_SIMPLE)
        try:
            PyObject_GetBuffer(keys, &key_view, PyBUF_SIMPLE)
            try:
                if hash_view.len != key_view.len or hash_view.len & 7:
                    raise ValueError(f"{hash_view.len} bytes of hashes and {key_view.len} bytes of keys are not whole pairs of words")
                n = hash_view.len >> 3
                self._make_room(n)
                for i in range(n):
                    self.c_put(_hash_at(hash_view.buf, i), _word(key_view.buf, i))
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
