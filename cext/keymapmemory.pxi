# Part of keymap.pyx, which documents it: where a table lies, how it grows there, and how the next process takes it over.
#
# A map has a region of a file that outlives the process (a memfd of control's), or anonymous memory of its own:
#
#   0 +-------------+----------------+---------------------------------+----------
#     | header_t    | table of 256   | table of 512 slots              | 1024 ...
#     +-------------+----------------+---------------------------------+----------
#   0             4 KiB            8 KiB                             16 KiB
#
# A table of n slots has the place from byte 16 n to byte 32 n, so tables of two sizes never overlap: another size is filled beside the
# one in use, then one word makes it the table. All but the header and the one table is zero, and takes no memory.

cdef extern from "linux/falloc.h" nogil:
    int FALLOC_FL_PUNCH_HOLE
    int FALLOC_FL_KEEP_SIZE

cdef extern from "fcntl.h" nogil:
    int fallocate(int fd, int mode, off_t offset, off_t n_bytes)

cdef extern from "unistd.h" nogil:
    ssize_t pwrite(int fd, const void *data, size_t n_bytes, off_t offset)

cdef enum:
    c_FIRST_SLOTS = 256

# "KEYMAP", and the version of this layout.
cdef uint64_t MAGIC = 0x3130_50414d59454b


cdef struct header_t:
    uint64_t magic
    uint64_t owner    # whose hashes these are: KeyMap's argument
    uint64_t n_slots  # of the table in use; 0 = there is none


cdef inline uint64_t table_bytes(uint64_t n_slots) noexcept nogil:
    return n_slots * sizeof(entry_t)


cdef char *memory_map(KeyMap self, uint64_t n_slots) noexcept nogil:
    """The region up to the end of a table of this size; NULL when there is no memory, or the region is smaller."""
    cdef size_t n_bytes = 2 * table_bytes(n_slots)
    cdef void *base
    if n_bytes > self.region_bytes:
        return NULL
    if self.fd < 0:
        base = mmap(NULL, n_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    else:
        base = mmap(NULL, n_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, self.fd, self.offset)
    return NULL if base == MAP_FAILED else <char *>base


cdef int memory_punch(KeyMap self, uint64_t start, uint64_t end) noexcept nogil:
    """Give these bytes of the region back; they are zero then."""
    if self.fd < 0 or start >= end:
        return 0
    return fallocate(self.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, self.offset + start, end - start)


cdef void memory_use(KeyMap self, char *base, uint64_t n_slots) noexcept nogil:
    self.base = base
    self.table.slots = <entry_t *>(base + table_bytes(n_slots))
    self.table.n_slots = n_slots
    self.table.count = 0


cdef void memory_unmap(KeyMap self) noexcept nogil:
    """Be a map without memory, which is an empty one. What is in the region stays there."""
    if self.base != NULL:
        munmap(self.base, 2 * table_bytes(self.table.n_slots))
    self.base = NULL
    self.nothing.hash = 0
    self.table.slots = &self.nothing
    self.table.n_slots = 1
    self.table.count = 0


cdef int memory_resize(KeyMap self, uint64_t n_slots) noexcept nogil:
    """Bring all pairs into a table of another size, which has room for them. -1: no memory, and nothing has changed."""
    return memory_replace(self, n_slots, True)


cdef int memory_replace(KeyMap self, uint64_t n_slots, bint with_pairs) noexcept nogil:
    """Use a table of another size, with all pairs or with none. -1: no memory, and nothing has changed."""
    cdef table_t old = self.table
    cdef char *old_base = self.base
    cdef char *base = memory_map(self, n_slots)
    cdef header_t *header = <header_t *>base
    cdef uint64_t i
    if base == NULL:
        return -1
    memory_use(self, base, n_slots)
    for i in range(old.n_slots if with_pairs else 0):
        if old.slots[i].hash:
            table_put(&self.table, old.slots[i].hash, old.slots[i].key)
    sf_store(&header.owner, self.owner)
    sf_store(&header.magic, MAGIC)
    sf_store(&header.n_slots, n_slots)
    if old_base != NULL:
        if memory_punch(self, table_bytes(old.n_slots), 2 * table_bytes(old.n_slots)):
            memset(old.slots, 0, table_bytes(old.n_slots))
        munmap(old_base, 2 * table_bytes(old.n_slots))
    return 0


cdef void memory_release(KeyMap self) noexcept nogil:
    """Forget all pairs and give the region back."""
    cdef header_t none
    memory_unmap(self)
    if self.fd < 0:
        return
    memset(&none, 0, sizeof(none))
    # Without a header what is left of a table is nobody's. A region that cannot be emptied is not used again.
    if pwrite(self.fd, &none, sizeof(none), self.offset) < 0 or memory_punch(self, 0, self.region_bytes):
        self.fd = -1


cdef int memory_adopt(KeyMap self) noexcept nogil:
    """Take over what is in the region; 0 when it is a table of our owner's, which is whole then. -1: it is none, and the map is empty."""
    cdef header_t found
    cdef uint64_t i, n_slots, n_full = 0
    cdef bint is_whole = True
    cdef char *base
    if self.fd < 0:
        return -1
    base = memory_map(self, c_FIRST_SLOTS)
    if base == NULL:
        return -1
    found = (<header_t *>base)[0]
    munmap(base, 2 * table_bytes(c_FIRST_SLOTS))
    n_slots = found.n_slots
    if found.magic != MAGIC or found.owner != self.owner or n_slots < c_FIRST_SLOTS or n_slots & n_slots - 1:
        return -1
    if n_slots > self.region_bytes // (2 * sizeof(entry_t)):
        return -1
    base = memory_map(self, n_slots)
    if base == NULL:
        return -1
    memory_use(self, base, n_slots)
    for i in range(n_slots):
        n_full += self.table.slots[i].hash != 0
    # One pair may be there twice. A fuller table was not left by a writer, and looking for something in it might not end.
    if n_full > n_slots // 4 * 3 + 1:
        memory_unmap(self)
        return -1
    self.table.count = n_full
    for i in range(n_slots):
        if self.table.slots[i].hash and table_find(&self.table, self.table.slots[i].hash) != &self.table.slots[i]:
            is_whole = False
            break
    # What a cut change of size has left beside the table.
    if memory_punch(self, table_bytes(c_FIRST_SLOTS), table_bytes(n_slots)) or \
            memory_punch(self, 2 * table_bytes(n_slots), self.region_bytes):
        memory_unmap(self)
        return -1
    if is_whole:
        return 0
    # Another kill on the way changes nothing: this or that table is the one in use, and both have all pairs.
    n_slots = n_slots >> 1 if n_slots > c_FIRST_SLOTS and n_full * 8 <= n_slots * 3 else n_slots << 1
    if memory_resize(self, n_slots):
        memory_unmap(self)
        return -1
    return 0
