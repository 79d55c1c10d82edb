"""The radix cache of one simulated rank: which KV blocks it holds, which are in use, and which goes next.

Runs in: the simulator, one object a rank; with the GIL, never blocks. All costs are O(blocks of the call).
Contract: a prompt is its chain of block keys, n little-endian uint64 in `bytes` (what `sglfast._blockhash.page_keys`
    returns); a key stands for its whole prefix. Callers pass true chains and unlock exactly what they locked.
    A block in use (locked) is never evicted. Eviction takes the least recently used leaf, as SGLang's default policy does.

Why no tree: every operation works on a prefix of a chain and renews it from the deepest block up, so a parent is always
newer than its children; and locks hold whole prefixes, so a block without a lock has no locked child. Hence the oldest
block without a lock is always a leaf, and one hash table (key -> node) with one list of the unlocked nodes, oldest first,
does what a radix tree and a heap do.

    slots:  [ 0 | 7 | 0 | 3 | 9 | 0 ... ]     open addressing, linear probing, 0 = empty, else index of a node
    nodes:  [ sentinel | key, prev, next, locks | ... ]
            next = more recently used; node 0 closes the ring; free nodes chain by next
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free, realloc

cimport cython

cdef enum:
    FIRST_NODES = 1024
    # Node indexes are 32-bit and the table has up to four slots a node.
    MAX_CAPACITY_BLOCKS = 1 << 29


cdef struct node_t:
    uint64_t key
    uint32_t prev
    uint32_t next
    uint32_t locks
    uint32_t reserved


cdef struct cache_t:
    node_t *nodes
    uint32_t *slots
    uint32_t *path  # nodes of the chain in hand
    uint64_t slot_mask
    uint64_t allocated_nodes  # with the sentinel
    uint64_t fresh_node  # nodes from here on were never used
    uint32_t free_node
    uint64_t path_blocks
    uint64_t capacity_blocks
    uint64_t used_blocks
    uint64_t locked_blocks
    uint64_t evicted_blocks


cdef inline uint64_t c_home(const cache_t *cache, uint64_t key) noexcept nogil:
    # Engine keys are uniform already; the multiplication is for callers whose keys are small numbers.
    return ((key * <uint64_t>0x9E3779B97F4A7C15) >> 20) & cache.slot_mask


cdef inline uint64_t c_slot_of(const cache_t *cache, uint64_t key) noexcept nogil:
    """The slot that holds `key`, or the empty one where it belongs."""
    cdef uint64_t slot = c_home(cache, key)
    while cache.slots[slot] and cache.nodes[cache.slots[slot]].key != key:
        slot = (slot + 1) & cache.slot_mask
    return slot


cdef inline void c_unlink(cache_t *cache, uint32_t node) noexcept nogil:
    cdef node_t *nodes = cache.nodes
    nodes[nodes[node].prev].next = nodes[node].next
    nodes[nodes[node].next].prev = nodes[node].prev


cdef inline void c_link_newest(cache_t *cache, uint32_t node) noexcept nogil:
    cdef node_t *nodes = cache.nodes
    nodes[node].prev = nodes[0].prev
    nodes[node].next = 0
    nodes[nodes[0].prev].next = node
    nodes[0].prev = node


cdef inline void c_hold(cache_t *cache, uint32_t node) noexcept nogil:
    if cache.nodes[node].locks == 0:
        c_unlink(cache, node)
        cache.locked_blocks += 1
    cache.nodes[node].locks += 1


cdef void c_release(cache_t *cache, uint64_t n) noexcept nogil:
    """Take one lock from each of the first n nodes of the path, deepest first, so that parents end up newer."""
    cdef uint32_t node
    while n:
        n -= 1
        node = cache.path[n]
        cache.nodes[node].locks -= 1
        if cache.nodes[node].locks == 0:
            c_link_newest(cache, node)
            cache.locked_blocks -= 1


cdef int c_reserve_nodes(cache_t *cache, uint64_t wanted) noexcept nogil:
    """Have room for `wanted` blocks in all; 0, or -1 without memory (nothing changed then)."""
    cdef uint64_t total = cache.allocated_nodes, n_slots, slot, old
    cdef uint32_t *slots
    cdef node_t *nodes
    if wanted < total:
        return 0
    while total <= wanted:
        total *= 2
    n_slots = 2 * total
    slots = <uint32_t *>calloc(n_slots, sizeof(uint32_t))
    if slots == NULL:
        return -1
    nodes = <node_t *>realloc(cache.nodes, total * sizeof(node_t))
    if nodes == NULL:
        free(slots)
        return -1
    cache.nodes = nodes
    cache.allocated_nodes = total
    cdef uint32_t *old_slots = cache.slots
    cdef uint64_t old_mask = cache.slot_mask
    cache.slots = slots
    cache.slot_mask = n_slots - 1
    for old in range(old_mask + 1):
        if old_slots[old]:
            slot = c_slot_of(cache, nodes[old_slots[old]].key)
            slots[slot] = old_slots[old]
    free(old_slots)
    return 0


cdef int c_reserve_path(cache_t *cache, uint64_t n) noexcept nogil:
    cdef uint32_t *path
    if n <= cache.path_blocks:
        return 0
    path = <uint32_t *>realloc(cache.path, n * sizeof(uint32_t))
    if path == NULL:
        return -1
    cache.path = path
    cache.path_blocks = n
    return 0


cdef uint32_t c_add(cache_t *cache, uint64_t slot, uint64_t key) noexcept nogil:
    """A new block with one lock, in the empty `slot`; room must have been reserved."""
    cdef uint32_t node = cache.free_node
    if node:
        cache.free_node = cache.nodes[node].next
    else:
        node = <uint32_t>cache.fresh_node
        cache.fresh_node += 1
    cache.nodes[node].key = key
    cache.nodes[node].locks = 1
    cache.slots[slot] = node
    cache.used_blocks += 1
    cache.locked_blocks += 1
    return node


cdef void c_drop(cache_t *cache, uint32_t node) noexcept nogil:
    """Forget an unlocked block; later blocks of its run of slots move back, so that no probe meets a hole."""
    cdef uint64_t hole = c_slot_of(cache, cache.nodes[node].key)
    cdef uint64_t slot = hole, home
    c_unlink(cache, node)
    while True:
        slot = (slot + 1) & cache.slot_mask
        if cache.slots[slot] == 0:
            break
        home = c_home(cache, cache.nodes[cache.slots[slot]].key)
        # Move back unless its home lies cyclically in (hole, slot].
        if ((slot - home) & cache.slot_mask) >= ((slot - hole) & cache.slot_mask):
            cache.slots[hole] = cache.slots[slot]
            hole = slot
    cache.slots[hole] = 0
    cache.nodes[node].next = cache.free_node
    cache.free_node = node
    cache.used_blocks -= 1


cdef uint64_t c_walk(cache_t *cache, const uint64_t *keys, uint64_t n) noexcept nogil:
    """Put the nodes of the leading cached blocks into the path; how many."""
    cdef uint64_t i
    for i in range(n):
        cache.path[i] = cache.slots[c_slot_of(cache, keys[i])]
        if cache.path[i] == 0:
            return i
    return n


cdef uint64_t c_match(cache_t *cache, const uint64_t *keys, uint64_t n) noexcept nogil:
    cdef uint64_t matched = c_walk(cache, keys, n), i = matched
    while i:
        i -= 1
        if cache.nodes[cache.path[i]].locks == 0:
            c_unlink(cache, cache.path[i])
            c_link_newest(cache, cache.path[i])
    return matched


cdef uint64_t c_insert(
    cache_t *cache, const uint64_t *keys, uint64_t n, uint64_t *stored_from, uint64_t *evicted, uint64_t *n_evicted
) noexcept nogil:
    """Insert a chain, evicting as needed; the block after the last one stored. The chain is held while it grows."""
    cdef uint64_t i, slot
    cdef uint32_t oldest
    n_evicted[0] = 0
    stored_from[0] = c_walk(cache, keys, n)
    for i in range(stored_from[0]):
        c_hold(cache, cache.path[i])
    i = stored_from[0]
    while i < n:
        slot = c_slot_of(cache, keys[i])
        if cache.slots[slot]:  # only in a chain that is none (a key that occurs twice)
            cache.path[i] = cache.slots[slot]
            c_hold(cache, cache.path[i])
            i += 1
            continue
        if cache.used_blocks == cache.capacity_blocks:
            oldest = cache.nodes[0].next
            if oldest == 0:
                break
            evicted[n_evicted[0]] = cache.nodes[oldest].key
            n_evicted[0] += 1
            cache.evicted_blocks += 1
            c_drop(cache, oldest)
            slot = c_slot_of(cache, keys[i])
        cache.path[i] = c_add(cache, slot, keys[i])
        i += 1
    c_release(cache, i)
    return i


@cython.final
cdef class RadixCache:
    """See sglfast/_radix.pyi."""

    cdef cache_t cache

    def __cinit__(self, long long capacity_blocks):
        if not 1 <= capacity_blocks <= MAX_CAPACITY_BLOCKS:
            raise ValueError(f"capacity_blocks must be 1..{MAX_CAPACITY_BLOCKS}, not {capacity_blocks}")
        self.cache.capacity_blocks = capacity_blocks
        self.cache.allocated_nodes = FIRST_NODES
        self.cache.fresh_node = 1
        self.cache.slot_mask = 2 * FIRST_NODES - 1
        self.cache.nodes = <node_t *>calloc(FIRST_NODES, sizeof(node_t))
        self.cache.slots = <uint32_t *>calloc(2 * FIRST_NODES, sizeof(uint32_t))
        if self.cache.nodes == NULL or self.cache.slots == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.cache.nodes)
        free(self.cache.slots)
        free(self.cache.path)

    cdef uint64_t _n_blocks(self, bytes keys, Py_ssize_t n_blocks) except? 0:
        """Blocks that a call works on, with room for their path."""
        cdef Py_ssize_t given = PyBytes_GET_SIZE(keys) // 8
        if PyBytes_GET_SIZE(keys) % 8:
            raise ValueError(f"keys must be whole 64-bit words, not {PyBytes_GET_SIZE(keys)} bytes")
        if n_blocks == -1:
            n_blocks = given
        if not 0 <= n_blocks <= given:
            raise ValueError(f"n_blocks must be 0..{given} for these keys, not {n_blocks}")
        if c_reserve_path(&self.cache, n_blocks):
            raise MemoryError
        return n_blocks

    def match(self, bytes keys not None, Py_ssize_t max_blocks=-1):
        cdef uint64_t n = self._n_blocks(keys, max_blocks)
        return c_match(&self.cache, <const uint64_t *>PyBytes_AS_STRING(keys), n)

    def insert(self, bytes keys not None, Py_ssize_t n_blocks=-1):
        cdef uint64_t n = self._n_blocks(keys, n_blocks)
        cdef uint64_t stored_from = 0, stored_to, n_evicted = 0
        cdef uint64_t wanted = min(self.cache.used_blocks + n, self.cache.capacity_blocks)
        cdef uint64_t *evicted = <uint64_t *>calloc(n + 1, sizeof(uint64_t))
        if evicted == NULL or c_reserve_nodes(&self.cache, wanted):
            free(evicted)
            raise MemoryError
        stored_to = c_insert(
            &self.cache, <const uint64_t *>PyBytes_AS_STRING(keys), n, &stored_from, evicted, &n_evicted
        )
        try:
            return stored_from, stored_to, PyBytes_FromStringAndSize(<const char *>evicted, 8 * n_evicted)
        finally:
            free(evicted)

    def lock(self, bytes keys not None, Py_ssize_t n_blocks=-1):
        cdef uint64_t n = self._n_blocks(keys, n_blocks), i
        cdef uint64_t cached = c_walk(&self.cache, <const uint64_t *>PyBytes_AS_STRING(keys), n)
        if cached < n:
            raise ValueError(f"block {cached} of {n} is not cached, so it cannot be locked")
        for i in range(n):
            c_hold(&self.cache, self.cache.path[i])

    def unlock(self, bytes keys not None, Py_ssize_t n_blocks=-1):
        cdef uint64_t n = self._n_blocks(keys, n_blocks), i
        cdef uint64_t cached = c_walk(&self.cache, <const uint64_t *>PyBytes_AS_STRING(keys), n)
        cdef uint64_t taken = 0
        # A key may stand twice in what is no true chain: so the locks are counted down, and given back before all else.
        while taken < n and taken < cached and self.cache.nodes[self.cache.path[taken]].locks:
            self.cache.nodes[self.cache.path[taken]].locks -= 1
            taken += 1
        for i in range(taken):
            self.cache.nodes[self.cache.path[i]].locks += 1
        if taken < n:
            raise ValueError(f"block {taken} of {n} is not locked")
        c_release(&self.cache, n)

    def clear(self):
        cdef uint64_t slot
        if self.cache.locked_blocks:
            raise ValueError(f"{self.cache.locked_blocks} blocks are locked: a cache in use cannot be cleared")
        for slot in range(self.cache.slot_mask + 1):
            self.cache.slots[slot] = 0
        self.cache.nodes[0].prev = self.cache.nodes[0].next = 0
        self.cache.fresh_node = 1
        self.cache.free_node = 0
        self.cache.used_blocks = 0

    def keys(self):
        cdef uint64_t slot, n = 0
        cdef bytes keys = PyBytes_FromStringAndSize(NULL, 8 * self.cache.used_blocks)
        cdef uint64_t *out = <uint64_t *>PyBytes_AS_STRING(keys)
        for slot in range(self.cache.slot_mask + 1):
            if self.cache.slots[slot]:
                out[n] = self.cache.nodes[self.cache.slots[slot]].key
                n += 1
        return keys

    @property
    def capacity_blocks(self):
        return self.cache.capacity_blocks

    @property
    def used_blocks(self):
        return self.cache.used_blocks

    @property
    def locked_blocks(self):
        return self.cache.locked_blocks

    @property
    def evicted_blocks(self):
        return self.cache.evicted_blocks
