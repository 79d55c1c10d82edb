"""Engine hash -> block key: what the token route remembers of a rank's blocks. 16 bytes an entry, at most 3/4 full.

Runs in: index, one map a rank that has blocks keyed by their tokens; used by the rank's thread alone. Its memory may be a region of a file
    that outlives the process: the next index process takes it over, however this one ended (index/key_maps.py hands regions out).
Contract: hashes and keys are n little-endian uint64 in one bytes-like object each. A hash has one key; putting it again replaces
    the key. Deletion shifts entries back, so a map that churns does not grow; it shrinks when it is cleared. An empty map has no memory.
    `place` is the token route in one pass, from a batch's bytes to runs of keys: for batches in which all is usual; for the others it
    returns None, the map is as it was, and index/token_route.py does the same event by event (tests compare the two). `place_batches` does
    it for a run of batches at once.
Why a file and no log of changes: a change is then one store into memory that the process has anyway, and none has to be undone.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset
from posix.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_NORESERVE, MAP_PRIVATE, MAP_SHARED, PROT_READ, PROT_WRITE, mmap, munmap
from posix.types cimport off_t

cimport cython
from sf_shm cimport sf_store

include "keymaptable.pxi"
include "kvbatches.pxi"
include "keymapplace.pxi"


cdef void place_begin(sf_kv_t *kv, placed_t *placed, uint64_t seed, uint32_t block_size, int64_t main_group) noexcept nogil:
    memset(kv, 0, sizeof(sf_kv_t))
    memset(placed, 0, sizeof(placed_t))
    kv.wants_tokens = 1
    placed.seed = seed
    placed.block_size = block_size
    placed.main_group = main_group


cdef void place_end(sf_kv_t *kv, placed_t *placed) noexcept nogil:
    sf_kv_free(kv)
    free(placed.page)
    free(placed.removed)


cdef inline bytes _packed(const uint64_t *words, uint64_t n):
    return PyBytes_FromStringAndSize(<const char *>words, 8 * n)


@cython.final
cdef class KeyMap:
    cdef table_t table
    cdef entry_t nothing  # the one free slot of a map without memory
    cdef char *base       # the region's mapping, up to the end of the table; NULL without memory
    cdef int fd           # -1 = memory of our own
    cdef uint64_t offset
    cdef uint64_t region_bytes
    cdef uint64_t owner

    def __cinit__(self, int fd=-1, uint64_t offset=0, uint64_t region_bytes=17592186044416, uint64_t owner=0):
        if region_bytes < 2 * table_bytes(c_FIRST_SLOTS) or offset % 65536 or offset >> 62:
            raise ValueError(f"a map cannot have {region_bytes} bytes from byte {offset} on: it needs 8192, from a multiple of 65536 on")
        self.fd = fd
        self.offset = offset
        self.region_bytes = region_bytes
        self.owner = owner
        memory_unmap(self)

    def __dealloc__(self):
        memory_unmap(self)

    def __len__(self):
        return self.table.count

    def place(self, payload, *, uint64_t seed, uint32_t block_size, int64_t main_group=c_UNTOLD_GROUP):
        """The token route's keys of a whole batch; see the stub."""
        cdef Py_buffer view
        cdef sf_kv_t kv
        cdef placed_t placed
        cdef int code
        place_begin(&kv, &placed, seed, block_size, main_group)
        PyObject_GetBuffer(payload, &view, PyBUF_SIMPLE)
        try:
            with nogil:
                code = decode_events(&kv, &placed, <const uint8_t *>view.buf, <const uint8_t *>view.buf + view.len)
            if code == SF_KV_NO_MEMORY:
                raise MemoryError
            return self._place(&kv, &placed) if code == SF_KV_OK else None
        finally:
            PyBuffer_Release(&view)
            place_end(&kv, &placed)

    def place_batches(self, payloads, ends, uint64_t first=0, *, uint64_t seed, uint32_t block_size, int64_t main_group=c_UNTOLD_GROUP):
        """The same for batches one behind the other, as many of them as are usual; see the stub."""
        cdef batches_t batches
        cdef sf_kv_t kv
        cdef placed_t placed
        cdef uint64_t n_done = 0
        cdef int code
        place_begin(&kv, &placed, seed, block_size, main_group)
        batches_open(&batches, payloads, ends, first)
        try:
            with nogil:
                code = decode_batches(&kv, &placed, &batches, &n_done)
            if code == SF_KV_NO_MEMORY:
                raise MemoryError
            return n_done, self._place(&kv, &placed) if n_done else None
        finally:
            batches_close(&batches)
            place_end(&kv, &placed)

    cdef _place(self, sf_kv_t *kv, placed_t *placed):
        """Make and remember the keys of events that were checked."""
        cdef uint64_t i
        cdef int code
        self._make_room(kv.n_keys - placed.max_removed)
        placed.page = <uint8_t *>malloc(8 + 4 * placed.block_size)
        placed.removed = <uint64_t *>malloc(8 * placed.max_removed + 8)
        if placed.page == NULL or placed.removed == NULL:
            raise MemoryError
        with nogil:
            sf_xxh3_make_secret(placed.secret, placed.seed)
            code = place_events(&self.table, kv, placed)
        if code:
            raise MemoryError
        if placed.is_cleared and self.table.count * 8 < self.table.n_slots and self.table.n_slots > c_FIRST_SLOTS:
            with nogil:
                memory_resize(self, max(c_FIRST_SLOTS, self.table.n_slots >> 2))  # without memory it stays as it is
        return (
            kv.n_events, placed.n_orphans, placed.n_orphans_live, placed.main_group,
            [(kv.runs[i].kind, kv.runs[i].tiers, _packed(kv.keys + kv.runs[i].start, kv.runs[i].count)) for i in range(kv.n_runs)],
            _packed(placed.removed, placed.n_removed),
        )

    cdef _make_room(self, uint64_t n):
        cdef uint64_t n_slots = max(c_FIRST_SLOTS, self.table.n_slots)
        cdef int code = 0
        while (self.table.count + n) * 4 > n_slots * 3:
            n_slots *= 2
        if n and n_slots != self.table.n_slots:
            with nogil:  # a second, with tens of millions of blocks
                code = memory_resize(self, n_slots)
        if code:
            raise MemoryError(f"no room for {self.table.count + n} engine hashes of a rank")

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
                    table_put(&self.table, _hash_at(hash_view.buf, i), _word(key_view.buf, i))
            finally:
                PyBuffer_Release(&key_view)
        finally:
            PyBuffer_Release(&hash_view)

    def get(self, hash_):
        """The key of one hash, None when it is unknown."""
        cdef uint64_t value = hash_
        cdef entry_t *entry = table_find(&self.table, value if value else HASH_ZERO)
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
                entry = table_find(&self.table, _hash_at(view.buf, i))
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
                entry = table_find(&self.table, _hash_at(view.buf, i))
                if entry.hash:
                    table_delete(&self.table, entry)
        finally:
            PyBuffer_Release(&view)

    @property
    def places(self):
        return self.table.n_slots

    def items(self, uint64_t start=0, uint64_t end=<uint64_t>-1):
        """(hashes, their keys) in the places from `start` to `end`, by default all, in no order."""
        cdef uint64_t i, n = 0, value
        end = min(end, self.table.n_slots)
        for i in range(start, end):
            n += self.table.slots[i].hash != 0
        hashes = PyBytes_FromStringAndSize(NULL, 8 * n)
        keys = PyBytes_FromStringAndSize(NULL, 8 * n)
        n = 0
        for i in range(start, end):
            if self.table.slots[i].hash:
                value = self.table.slots[i].hash
                if value == HASH_ZERO:
                    value = 0
                memcpy(PyBytes_AS_STRING(hashes) + 8 * n, &value, 8)
                memcpy(PyBytes_AS_STRING(keys) + 8 * n, &self.table.slots[i].key, 8)
                n += 1
        return hashes, keys

    def clear(self):
        """Forget everything, but for a small table: whoever is killed now leaves a map that is empty, not one that is missing."""
        if self.base == NULL:
            return
        with nogil:  # with tens of millions of blocks the kernel gets back a GiB
            if self.table.n_slots == c_FIRST_SLOTS or memory_replace(self, c_FIRST_SLOTS, False):
                table_clear(&self.table)

    def release(self):
        """Forget everything, and give the memory back, also what another process left in it."""
        with nogil:
            memory_release(self)

    def adopt(self):
        """Take over what another process left for the same owner; False when there is nothing, or nothing that can be trusted."""
        cdef int code
        with nogil:
            memory_unmap(self)
            code = memory_adopt(self)
        return code == 0


include "keymapmemory.pxi"
