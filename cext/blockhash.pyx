"""Token ids -> block keys: the SHA-256 chain that SGLang publishes in its KV events, and our own XXH3 chain for other engines.

Runs in: shard (once per request), index (checks a rank's first root block; every block on the token route), simulator.

SHA route (`page_keys`): key i is the first 8 bytes, as a big-endian number, of digest i; digest i = SHA-256(digest i-1 || page i), nothing
    before page 0, or the salt's digest (spec/kv_events.md 2.1-2.3). A page is its ids as 4 bytes little-endian each; with
    bigram each unit is an id and its successor; a page that holds an id of 2^32 or more is the byte 0xff and all its ids as
    8 bytes. Ids behind the last full page are not looked at. The GIL is held: 8192 tokens take some 30 microseconds.

Token route (`token_keys`): key i = XXH3-64(key i-1 as 8 bytes little-endian || page i, seed), 0 before page 0, so that a chain
    continues from any key. Page i is its ids as 4 bytes little-endian each; with bigram the ids i*P .. i*P + P, one more than P; a
    page that holds an id of 2^32 or more is the byte 0xff and all its ids as 8 bytes. The seed (`chain_seed`) keeps models, block
    sizes, adapters and salts apart.

Why chain on the whole digest: a key alone (8 bytes) cannot continue a chain of the SHA route; so all keys are made from the root
    on, or by a KeyChain (of either route), which keeps the digest and the ids behind the last full page. A KeyChain must not be
    shared between threads.
"""

import os

cimport cython
from cpython.buffer cimport PyBUF_C_CONTIGUOUS, PyBUF_FORMAT, PyBuffer_Release, PyObject_CheckBuffer, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.mem cimport PyMem_RawFree, PyMem_RawMalloc
from cpython.object cimport PyObject
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, strcmp


cdef extern from "Python.h":
    long long PyLong_AsLongLong(PyObject *) noexcept
    unsigned long long PyLong_AsUnsignedLongLong(PyObject *) noexcept
    bint PyLong_Check(PyObject *) noexcept
    PyObject *PyErr_Occurred() noexcept
    void PyErr_Clear() noexcept
    object PySequence_Fast(object, const char *)
    Py_ssize_t PySequence_Fast_GET_SIZE(object)
    PyObject **PySequence_Fast_ITEMS(object)

cdef extern from *:
    """
    _Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "pages are hashed in place: little-endian machines only");
    """

cdef extern from "sf_pylong.h":
    bint sf_uint32_of_longs(PyObject **items, Py_ssize_t count, uint32_t *ids) noexcept

cdef extern from "sf_sha256.h":
    ctypedef struct sf_sha256_t:
        uint32_t h[8]
    int SF_SHA256_DIGEST_BYTES
    int sf_sha256_setup(int force_portable)
    void sf_sha256_start(sf_sha256_t *s) noexcept nogil
    void sf_sha256_add(sf_sha256_t *s, const void *data, size_t length) noexcept nogil
    void sf_sha256_finish(sf_sha256_t *s, uint8_t *digest) noexcept nogil

cdef extern from "sf_xxh3.h":
    int SF_XXH3_SECRET_BYTES
    void sf_xxh3_make_secret(uint8_t *secret, uint64_t seed) noexcept nogil
    uint64_t sf_xxh3(const void *data, size_t n, uint64_t seed, const uint8_t *secret) noexcept nogil
    uint64_t sf_xxh3_long_narrow(const uint8_t *p, size_t n, const uint8_t *secret) noexcept nogil
    uint64_t sf_xxh3_keyed(
        uint64_t key, const void *data, size_t n, uint64_t seed, const uint8_t *secret, uint8_t *scratch
    ) noexcept nogil


cdef enum Code:
    OK, NOT_AN_INT, OUT_OF_RANGE

SALT_PREFIX = b"sglang-cache-salt-v1\0"

_wanted = os.environ.get("SGLFAST_SHA", "")
if _wanted not in ("", "portable"):
    raise ValueError(f"SGLFAST_SHA must be 'portable' or unset, not {_wanted!r}")
_KERNEL = "shani" if sf_sha256_setup(_wanted == "portable") else "portable"


def kernel():
    return _KERNEL


# What one call makes keys with: SHA-256 after a salt, or XXH3 with a seed from a parent's key on.
cdef struct chain_t:
    bint is_sha
    bint has_prior        # SHA-256: digest holds the digest before page 0
    uint8_t digest[32]
    uint64_t seed         # XXH3
    uint64_t parent
    uint8_t secret[192]


def page_keys(tokens, Py_ssize_t page_size, *, bint bigram=False, Py_ssize_t max_pages=-1, bytes cache_salt not None=b""):
    cdef chain_t chain
    chain.is_sha = True
    chain.has_prior = _salt_digest(cache_salt, chain.digest)
    return _keys(tokens, page_size, bigram, max_pages, &chain)


def token_keys(
    tokens, Py_ssize_t page_size, *, bint bigram=False, Py_ssize_t max_pages=-1, uint64_t seed=0, uint64_t parent=0
):
    cdef chain_t chain
    chain.is_sha = False
    chain.seed = seed
    chain.parent = parent
    sf_xxh3_make_secret(chain.secret, seed)
    return _keys(tokens, page_size, bigram, max_pages, &chain)


def xxh3(data, uint64_t seed=0, *, bint is_narrow=False):
    cdef Py_buffer view
    cdef uint8_t secret[192]
    cdef uint64_t value
    PyObject_GetBuffer(data, &view, PyBUF_C_CONTIGUOUS)
    sf_xxh3_make_secret(secret, seed)
    if is_narrow and view.len > 240:
        value = sf_xxh3_long_narrow(<const uint8_t *> view.buf, view.len, secret)
    else:
        value = sf_xxh3(view.buf, view.len, seed, secret)
    PyBuffer_Release(&view)
    return value


def chain_seed(str model not None, unsigned int block_size, *, bint bigram=False, str lora_name not None="", str cache_salt not None=""):
    parts = [text.encode("utf-8", "surrogatepass") for text in (model, lora_name, cache_salt)]
    head = block_size.to_bytes(4, "little") + (b"\1" if bigram else b"\0")
    return xxh3(head + b"".join([len(part).to_bytes(4, "little") + part for part in parts]))


cdef _keys(tokens, Py_ssize_t page_size, bint bigram, Py_ssize_t max_pages, chain_t *chain):
    if page_size < 1:
        raise ValueError(f"page_size must be at least 1 token, not {page_size}")
    if not isinstance(tokens, (list, tuple)) and PyObject_CheckBuffer(tokens):
        return _keys_of_buffer(tokens, page_size, bigram, max_pages, chain)
    return _keys_of_sequence(tokens, page_size, bigram, max_pages, chain)


include "keychain.pxi"


cdef inline Py_ssize_t _pages(Py_ssize_t tokens, Py_ssize_t page_size, bint bigram, Py_ssize_t max_pages) noexcept nogil:
    cdef Py_ssize_t units = tokens - 1 if bigram and tokens else tokens
    cdef Py_ssize_t pages = units // page_size
    return max_pages if 0 <= max_pages < pages else pages


cdef _keys_of_buffer(tokens, Py_ssize_t page_size, bint bigram, Py_ssize_t max_pages, chain_t *chain):
    """Hash the buffer where it lies. It may be misaligned: its bytes are only ever copied or fed to SHA-256."""
    cdef Py_buffer view
    _open_uint32(tokens, &view)
    try:
        return _chain(
            <const uint8_t *> view.buf, 4, page_size, bigram,
            _pages(view.len // 4, page_size, bigram, max_pages), chain
        )
    finally:
        PyBuffer_Release(&view)


cdef int _open_uint32(tokens, Py_buffer *view) except -1:
    """Open a buffer of ids, which the caller must release. Raises ValueError, then there is nothing to release."""
    try:
        PyObject_GetBuffer(tokens, view, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT)
    except BufferError as error:
        raise ValueError(f"a buffer of token ids must be contiguous: {error}") from error
    if view.ndim == 1 and view.itemsize == 4 and _is_uint32(view.format):
        return 0
    cdef object text = (
        f"a buffer of token ids must be one-dimensional uint32, not {view.ndim}-dimensional of format "
        f"{'B' if view.format == NULL else view.format.decode()!r}"
    )
    PyBuffer_Release(view)
    raise ValueError(text)


cdef bint _is_uint32(const char *format) noexcept:
    if format == NULL:
        return False
    if format[0] in (b"@", b"=", b"<"):
        format += 1
    return strcmp(format, "I") == 0 or strcmp(format, "L") == 0


cdef _keys_of_sequence(tokens, Py_ssize_t page_size, bint bigram, Py_ssize_t max_pages, chain_t *chain):
    cdef object items = PySequence_Fast(tokens, "token ids must be a sequence of int or a buffer of uint32")
    cdef Py_ssize_t pages = _pages(PySequence_Fast_GET_SIZE(items), page_size, bigram, max_pages)
    if pages == 0:
        return b""
    cdef Py_ssize_t count = pages * page_size + bigram
    cdef uint32_t *narrow = <uint32_t *> PyMem_RawMalloc(count * sizeof(uint32_t))
    if narrow == NULL:
        raise MemoryError
    try:
        if sf_uint32_of_longs(PySequence_Fast_ITEMS(items), count, narrow):
            return _chain(<const uint8_t *> narrow, 4, page_size, bigram, pages, chain)
    finally:
        PyMem_RawFree(narrow)
    return _keys_of_unusual_ints(items, count, page_size, bigram, pages, chain)


cdef _keys_of_unusual_ints(items, Py_ssize_t count, Py_ssize_t page_size, bint bigram, Py_ssize_t pages, chain_t *chain):
    """All ids there are, subclasses of int too, and what is no id."""
    cdef uint64_t *ids = <uint64_t *> PyMem_RawMalloc(count * sizeof(uint64_t))
    if ids == NULL:
        raise MemoryError
    cdef Py_ssize_t bad = 0
    cdef uint64_t all_bits = 0
    cdef Code code
    try:
        code = _read_ids(PySequence_Fast_ITEMS(items), count, ids, &all_bits, &bad)
        if code == NOT_AN_INT:
            raise TypeError(f"token id {bad} must be an int, is a {type(items[bad]).__name__}")
        if code == OUT_OF_RANGE:
            raise ValueError(f"token id {bad} must be from 0 to 2**64 - 1, is {items[bad]}")
        if all_bits >> 32:
            return _chain(<const uint8_t *> ids, 8, page_size, bigram, pages, chain)
        _narrow(ids, <uint8_t *> ids, count)
        return _chain(<const uint8_t *> ids, 4, page_size, bigram, pages, chain)
    finally:
        PyMem_RawFree(ids)


cdef Code _read_ids(PyObject **items, Py_ssize_t count, uint64_t *ids, uint64_t *all_bits, Py_ssize_t *bad) noexcept:
    """Read `count` Python ints. No Python code runs in between (only real ints are converted), so `items` stays valid."""
    cdef Py_ssize_t i
    cdef long long small
    cdef uint64_t bits = 0
    for i in range(count):
        bad[0] = i
        if not PyLong_Check(items[i]):
            return NOT_AN_INT
        small = PyLong_AsLongLong(items[i])
        if small >= 0:
            ids[i] = <uint64_t> small
        else:
            # -1 stands for an overflow as well as for itself; an id from 2^63 on overflows here and fits unsigned.
            if small != -1 or PyErr_Occurred() == NULL:
                return OUT_OF_RANGE
            PyErr_Clear()
            ids[i] = PyLong_AsUnsignedLongLong(items[i])
            if PyErr_Occurred() != NULL:
                PyErr_Clear()
                return OUT_OF_RANGE
        bits |= ids[i]
    all_bits[0] = bits
    return OK


cdef void _narrow(const uint64_t *ids, uint8_t *narrow, Py_ssize_t count) noexcept nogil:
    """Write ids below 2^32 as 4 bytes each; in place is allowed, since writing never overtakes reading."""
    cdef Py_ssize_t i
    cdef uint32_t id32
    for i in range(count):
        id32 = <uint32_t> ids[i]
        memcpy(narrow + 4 * i, &id32, 4)


cdef bytes _chain(
    const uint8_t *ids, int id_bytes, Py_ssize_t page_size, bint bigram, Py_ssize_t pages, chain_t *chain
):
    """Make the keys of `pages` full pages of ids of 4 or 8 bytes each."""
    if pages == 0:
        return b""
    cdef bytes keys = PyBytes_FromStringAndSize(NULL, pages * sizeof(uint64_t))
    # Room for one page of pairs of 8-byte ids, and for a key and a mark before a page.
    cdef uint8_t *scratch = <uint8_t *> PyMem_RawMalloc(page_size * 16 + 32)
    if scratch == NULL:
        raise MemoryError
    if not chain.is_sha:
        _chain_tokens(ids, id_bytes, page_size, bigram, pages, chain, scratch, PyBytes_AS_STRING(keys))
    elif id_bytes == 4:
        _chain_narrow(ids, page_size, bigram, pages, chain.has_prior, chain.digest, scratch, PyBytes_AS_STRING(keys))
    else:
        _chain_wide(
            <const uint64_t *> ids, page_size, bigram, pages, chain.has_prior, chain.digest, scratch, PyBytes_AS_STRING(keys)
        )
    PyMem_RawFree(scratch)
    return keys


cdef void _chain_tokens(
    const uint8_t *ids, int id_bytes, Py_ssize_t page_size, bint bigram, Py_ssize_t pages, const chain_t *chain,
    uint8_t *scratch, char *keys
) noexcept nogil:
    cdef Py_ssize_t page, count = page_size + bigram
    cdef uint64_t key = chain.parent
    for page in range(pages):
        if id_bytes == 4:
            key = sf_xxh3_keyed(key, ids, 4 * count, chain.seed, chain.secret, scratch)
        else:
            key = _wide_page_key(key, <const uint64_t *> ids, count, chain, scratch)
        memcpy(keys + 8 * page, &key, 8)
        ids += id_bytes * page_size


cdef uint64_t _wide_page_key(
    uint64_t key, const uint64_t *ids, Py_ssize_t count, const chain_t *chain, uint8_t *scratch
) noexcept nogil:
    """The key of a page in a prompt in which some id needs more than 4 bytes."""
    cdef Py_ssize_t i
    cdef size_t n_bytes = 4 * count
    cdef uint64_t bits = 0
    for i in range(count):
        bits |= ids[i]
    memcpy(scratch, &key, 8)
    if bits >> 32:
        scratch[8] = 0xff
        n_bytes = 1 + 8 * count
        memcpy(scratch + 9, ids, 8 * count)
    else:
        _narrow(ids, scratch + 8, count)
    return sf_xxh3(scratch, 8 + n_bytes, chain.seed, chain.secret)


cdef bint _salt_digest(bytes cache_salt, uint8_t *digest):
    """Write the digest that stands before page 0 of a salted prompt; returns False for no salt."""
    cdef sf_sha256_t sha
    cdef bytes prefix = SALT_PREFIX
    if not cache_salt:
        return False
    sf_sha256_start(&sha)
    sf_sha256_add(&sha, PyBytes_AS_STRING(prefix), PyBytes_GET_SIZE(prefix))
    sf_sha256_add(&sha, PyBytes_AS_STRING(cache_salt), PyBytes_GET_SIZE(cache_salt))
    sf_sha256_finish(&sha, digest)
    return True


cdef inline void _finish_page(sf_sha256_t *sha, uint8_t *digest, char *key) noexcept nogil:
    cdef uint64_t value
    sf_sha256_finish(sha, digest)
    value = <uint64_t> sha.h[0] << 32 | sha.h[1]
    memcpy(key, &value, sizeof(value))


cdef void _chain_narrow(
    const uint8_t *ids, Py_ssize_t page_size, bint bigram, Py_ssize_t pages, bint has_prior, uint8_t *digest,
    uint8_t *scratch, char *keys
) noexcept nogil:
    cdef sf_sha256_t sha
    cdef Py_ssize_t page, j
    cdef const uint8_t *first = ids
    for page in range(pages):
        sf_sha256_start(&sha)
        if has_prior or page:
            sf_sha256_add(&sha, digest, SF_SHA256_DIGEST_BYTES)
        if bigram:
            for j in range(page_size):
                memcpy(scratch + 8 * j, first + 4 * j, 8)  # an id and its successor lie side by side
            sf_sha256_add(&sha, scratch, 8 * page_size)
        else:
            sf_sha256_add(&sha, first, 4 * page_size)
        _finish_page(&sha, digest, keys + 8 * page)
        first += 4 * page_size


cdef void _chain_wide(
    const uint64_t *ids, Py_ssize_t page_size, bint bigram, Py_ssize_t pages, bint has_prior, uint8_t *digest,
    uint8_t *scratch, char *keys
) noexcept nogil:
    """As _chain_narrow, for prompts in which some id needs more than 4 bytes; each page has the form its own ids need."""
    cdef sf_sha256_t sha
    cdef Py_ssize_t page, j, unit_ids = 2 if bigram else 1
    cdef uint64_t bits
    cdef uint8_t wide_mark = 0xff
    cdef const uint64_t *first = ids
    for page in range(pages):
        bits = 0
        for j in range(page_size + bigram):
            bits |= first[j]
        sf_sha256_start(&sha)
        if has_prior or page:
            sf_sha256_add(&sha, digest, SF_SHA256_DIGEST_BYTES)
        if bits >> 32:
            sf_sha256_add(&sha, &wide_mark, 1)
            for j in range(page_size):
                memcpy(scratch + 8 * unit_ids * j, first + j, 8 * unit_ids)
            sf_sha256_add(&sha, scratch, 8 * unit_ids * page_size)
        else:
            for j in range(page_size):
                _narrow(first + j, scratch + 4 * unit_ids * j, unit_ids)
            sf_sha256_add(&sha, scratch, 4 * unit_ids * page_size)
        _finish_page(&sha, digest, keys + 8 * page)
        first += page_size
