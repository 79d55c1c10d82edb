# Part of blockhash.pyx, which documents it: a chain that goes on.


@cython.final
cdef class KeyChain:
    """The chain of one text that becomes known bit by bit; see the stub."""

    cdef readonly Py_ssize_t page_size
    cdef readonly bint bigram
    cdef readonly Py_ssize_t tokens
    cdef readonly Py_ssize_t pages
    cdef chain_t chain
    cdef Py_ssize_t n_waiting  # ids behind the last full page; with bigram also that page's last id, which begins the next
    cdef uint8_t *waiting      # room for one page of ids (and one more for bigram), then scratch for one page and a key

    def __cinit__(self, Py_ssize_t page_size, *, bint bigram=False, bytes cache_salt not None=b"", seed=None, uint64_t parent=0):
        if page_size < 1 or page_size > 1 << 24:
            raise ValueError(f"page_size must be from 1 to 2**24 tokens, not {page_size}")
        if seed is not None and cache_salt:
            raise ValueError("the token route has its salt in the seed")
        if seed is None and parent:
            raise ValueError("a chain of the SHA route starts from no key")
        self.page_size = page_size
        self.bigram = bigram
        self.waiting = <uint8_t *> PyMem_RawMalloc(4 * (page_size + 1) + 8 * page_size + 16)
        if self.waiting == NULL:
            raise MemoryError
        self.chain.is_sha = seed is None
        self.chain.parent = parent
        self.chain.has_prior = False
        if seed is not None:
            self.chain.seed = seed
            sf_xxh3_make_secret(self.chain.secret, self.chain.seed)
        else:
            self.chain.has_prior = _salt_digest(cache_salt, self.chain.digest)

    def __dealloc__(self):
        PyMem_RawFree(self.waiting)

    def copy(self):
        cdef KeyChain other = KeyChain.__new__(KeyChain, self.page_size)
        other.bigram = self.bigram
        other.tokens = self.tokens
        other.pages = self.pages
        other.n_waiting = self.n_waiting
        other.chain = self.chain
        memcpy(other.waiting, self.waiting, 4 * self.n_waiting)
        return other

    @property
    def missing(self):
        return self.page_size + self.bigram - self.n_waiting

    def extend(self, tokens):
        cdef Py_buffer view
        _open_uint32(tokens, &view)
        try:
            return self._extend(<const uint8_t *> view.buf, view.len // 4)
        finally:
            PyBuffer_Release(&view)

    cdef bytes _extend(self, const uint8_t *ids, Py_ssize_t count):
        cdef Py_ssize_t full = self.page_size + self.bigram, taken = 0, pages
        cdef uint8_t *scratch = self.waiting + 4 * (self.page_size + 1)
        cdef bytes keys
        cdef char *out
        self.tokens += count
        if self.n_waiting + count < full:
            memcpy(self.waiting + 4 * self.n_waiting, ids, 4 * count)
            self.n_waiting += count
            return b""
        pages = (self.n_waiting + count - self.bigram) // self.page_size
        keys = PyBytes_FromStringAndSize(NULL, pages * sizeof(uint64_t))
        out = PyBytes_AS_STRING(keys)
        self.pages += pages
        if self.n_waiting:
            # Complete the page that began before where it waits. The others are hashed where they lie.
            taken = full - self.n_waiting
            memcpy(self.waiting + 4 * self.n_waiting, ids, 4 * taken)
            self.c_hash(self.waiting, 1, scratch, out)
            out += sizeof(uint64_t)
            pages -= 1
            taken -= self.bigram  # the last id of a page of pairs begins the next one
        if pages:
            self.c_hash(ids + 4 * taken, pages, scratch, out)
            taken += pages * self.page_size
        self.n_waiting = count - taken
        memcpy(self.waiting, ids + 4 * taken, 4 * self.n_waiting)
        return keys

    cdef void c_hash(self, const uint8_t *ids, Py_ssize_t pages, uint8_t *scratch, char *keys) noexcept nogil:
        cdef chain_t *chain = &self.chain
        if chain.is_sha:
            _chain_narrow(ids, self.page_size, self.bigram, pages, chain.has_prior, chain.digest, scratch, keys)
            chain.has_prior = True
        else:
            _chain_tokens(ids, 4, self.page_size, self.bigram, pages, chain, scratch, keys)
            memcpy(&chain.parent, keys + 8 * (pages - 1), 8)
