"""Texts to token ids word by word: known words cost a look-up, new ones a walk over their merges, all else goes to the tokenizer in as
few runs as can be.

Runs in: shards (the loop and the tokenizer's thread; the GIL is held, so a WordTable may be used from any thread, and offered to others
    every TURN_BYTES, so that no text keeps the loop waiting). Bounded memory, all of it taken at construction (cext/sf_words.h,
    cext/sf_bpe.h).
Contract: `encode` gives what the tokenizer gives for the text, provided that the ids of a text are those of its words one after another;
    prompt/pieces.py finds out whether a tokenizer is so, and says why it should be.
"""

cimport cython
from cpython cimport array
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcpy
from posix.unistd cimport usleep

import array
from bisect import bisect_right


cdef extern from "Python.h":
    bint PyUnicode_IS_ASCII(str)
    void *PyUnicode_DATA(str)
    Py_ssize_t PyUnicode_GET_LENGTH(str)
    ctypedef struct PyThreadState:
        pass
    PyThreadState *PyEval_SaveThread() noexcept nogil
    void PyEval_RestoreThread(PyThreadState *) noexcept nogil

cdef extern from "sf_bpe.h" nogil:
    enum:
        SF_BPE_MAX_BYTES

    ctypedef struct sf_merge_t:
        pass

    ctypedef struct sf_bpe_t:
        sf_merge_t *merges

    int sf_bpe_init(sf_bpe_t *bpe, const uint32_t *triples, uint32_t n, const uint32_t *letters) noexcept
    void sf_bpe_find_signs(sf_bpe_t *bpe, const uint32_t *joins, uint32_t n_tokens) noexcept
    void sf_bpe_free(sf_bpe_t *bpe) noexcept
    uint32_t sf_bpe_word(const sf_bpe_t *bpe, const char *word, size_t n_bytes, uint32_t *ids) noexcept

cdef extern from "sf_words.h" nogil:
    enum:
        SF_WORDS_MAX_BYTES

    ctypedef struct sf_word_t:
        uint32_t n_bytes
        uint32_t n_ids
        const uint32_t *data

    ctypedef struct sf_words_t:
        uint64_t seed

    ctypedef struct sf_token_t:
        const char *text
        uint32_t n_bytes
        uint32_t id
        uint32_t stop

    ctypedef struct sf_tokens_t:
        const sf_token_t *tokens
        size_t n_tokens
        uint8_t firsts[256]

    const char *sf_tokens_find(const sf_tokens_t *tokens, const char *p, const char *end, const sf_token_t **found) noexcept
    int sf_words_init(sf_words_t *words, size_t n_bytes, uint64_t seed) noexcept
    void sf_words_free(sf_words_t *words) noexcept
    uint64_t sf_words_hash(const sf_words_t *words, const char *word, size_t n) noexcept
    const sf_word_t *sf_words_get(sf_words_t *words, uint64_t hash, const char *word, size_t n) noexcept
    int sf_words_came(sf_words_t *words, uint64_t hash) noexcept
    void sf_words_put(sf_words_t *words, const char *word, size_t n, const uint32_t *ids, size_t n_ids) noexcept
    const char *sf_stretch_end(const char *p, const char *end) noexcept
    bint sf_is_ascii(const char *p, const char *end) noexcept

cdef extern from "sf_pretoken.h" nogil:
    enum:
        SF_PRE_GPT2
        SF_PRE_LLAMA3
        SF_PRE_QWEN2
        SF_PRE_O200K
        SF_PRE_TEKKEN
        SF_PRE_DEEPSEEK3
        SF_PRE_KINDS

    const char *sf_pretoken_end(int kind, const char *p, const char *end) noexcept

cdef extern from "sf_unitoken.h" nogil:
    enum:
        SF_UNI_CHARS
        SF_UNI_FOREIGN
        SF_UNI_IDEOGRAPH
        SF_UNI_FRONT
        SF_UNI_BACK

    ctypedef struct sf_uni_stretch_t:
        int last
        int is_foreign

    const char *sf_unitoken_end(const uint8_t *table, int kind, const char *p, const char *end) noexcept
    const char *sf_uni_stretch_end(const uint8_t *table, const char *p, const char *end, sf_uni_stretch_t *stretch) noexcept
    bint sf_uni_is_space(const uint8_t *table, const char *p) noexcept
    const char *sf_uni_before(const char *p) noexcept


GPT2 = SF_PRE_GPT2
LLAMA3 = SF_PRE_LLAMA3
QWEN2 = SF_PRE_QWEN2
O200K = SF_PRE_O200K
TEKKEN = SF_PRE_TEKKEN
DEEPSEEK3 = SF_PRE_DEEPSEEK3
SCRIPT_CHARS = SF_UNI_CHARS
FOREIGN = SF_UNI_FOREIGN
IDEOGRAPH = SF_UNI_IDEOGRAPH
FRONT = SF_UNI_FRONT
BACK = SF_UNI_BACK

cdef array.array _ZERO = array.array("I")

include "wordplan.pxi"


@cython.final
cdef class WordTable:
    """Words and their token ids; see the stub."""

    cdef lexicon_t lexicon
    cdef sf_tokens_t tokens
    cdef sf_token_t *token_list
    cdef tuple token_texts  # what the list points into
    cdef bytes scripts  # what the lexicon points into
    cdef readonly Py_ssize_t size_bytes
    cdef readonly int pattern

    def __cinit__(self, Py_ssize_t size_bytes, uint64_t seed, int pattern, dict tokens not None, letters=None, merges=None, joins=None,
                  bytes scripts=None):
        if size_bytes < 65536 or size_bytes > 1 << 34:
            raise ValueError(f"a table of words takes from 64 KiB to 16 GiB, not {size_bytes} bytes")
        if pattern < 0 or pattern >= SF_PRE_KINDS:
            raise ValueError(f"there is no pattern {pattern}")
        _check_scripts(scripts, pattern)
        self.size_bytes = size_bytes
        self.pattern = pattern
        self.lexicon.kind = pattern
        if scripts is not None:
            self.scripts = scripts
            self.lexicon.scripts = <const uint8_t *> PyBytes_AS_STRING(scripts)
        if sf_words_init(&self.lexicon.words, size_bytes, seed):
            raise MemoryError
        if merges is not None:
            self._take_merges(letters, merges, joins)
        # As sf_tokens_t wants them.
        self.token_texts = tuple(sorted([text.encode() for text in tokens], key=lambda text: (-len(text), text)))
        lengths = [-len(text) for text in self.token_texts]
        self.token_list = <sf_token_t *> calloc(len(tokens) + 1, sizeof(sf_token_t))
        if self.token_list == NULL:
            raise MemoryError
        self.tokens.tokens = self.token_list
        self.tokens.n_tokens = len(tokens)
        cdef Py_ssize_t i
        cdef bytes utf8
        for i in range(len(tokens)):
            utf8 = self.token_texts[i]
            if not utf8:
                raise ValueError("an added token must have a text")
            self.token_list[i].text = PyBytes_AS_STRING(utf8)
            self.token_list[i].n_bytes = PyBytes_GET_SIZE(utf8)
            self.token_list[i].id = tokens[utf8.decode()]
            self.token_list[i].stop = bisect_right(lengths, -len(utf8))
            self.tokens.firsts[<uint8_t> self.token_list[i].text[0]] = True

    def __dealloc__(self):
        sf_words_free(&self.lexicon.words)
        sf_bpe_free(&self.lexicon.bpe)
        free(self.token_list)

    cdef _take_merges(self, array.array letters, array.array merges, array.array joins):
        if letters is None or letters.typecode != "I" or merges.typecode != "I" or len(letters) != 256 or len(merges) % 3:
            raise ValueError('letters are 256 ids and merges three ids each, both in arrays of type "I"')
        if sf_bpe_init(&self.lexicon.bpe, merges.data.as_uints, len(merges) // 3, letters.data.as_uints):
            raise MemoryError
        if joins is not None:
            if joins.typecode != "I":
                raise ValueError('joins are ranks, in an array of type "I"')
            sf_bpe_find_signs(&self.lexicon.bpe, joins.data.as_uints, len(joins))

    def merged(self, str word not None):
        cdef uint32_t ids[SF_BPE_MAX_BYTES]
        cdef uint32_t n_ids, i
        cdef bytes utf8 = word.encode()
        cdef Py_ssize_t size = PyBytes_GET_SIZE(utf8)
        if self.lexicon.bpe.merges == NULL or size == 0 or size > SF_BPE_MAX_BYTES:
            return None
        n_ids = sf_bpe_word(&self.lexicon.bpe, PyBytes_AS_STRING(utf8), size, ids)
        return [ids[i] for i in range(n_ids)] if n_ids else None

    def leave(self, str word not None):
        cdef bytes utf8 = word.encode()
        cdef uint64_t hash = sf_words_hash(&self.lexicon.words, PyBytes_AS_STRING(utf8), PyBytes_GET_SIZE(utf8))
        self.lexicon.left[hash >> 48 >> 6] |= <uint64_t> 1 << (hash >> 48 & 63)

    def learn(self, str word not None, ids):
        cdef bytes utf8 = word.encode()
        cdef array.array known = array.array("I", ids)
        sf_words_put(&self.lexicon.words, PyBytes_AS_STRING(utf8), PyBytes_GET_SIZE(utf8), known.data.as_uints, len(known))

    def encode(self, str text not None, encode_all):
        cdef bytes utf8 = b""
        cdef const char *base
        cdef Py_ssize_t size
        if PyUnicode_IS_ASCII(text):
            base, size = <const char *> PyUnicode_DATA(text), PyUnicode_GET_LENGTH(text)
        else:
            utf8 = text.encode()
            base, size = PyBytes_AS_STRING(utf8), PyBytes_GET_SIZE(utf8)
        cdef plan_t plan
        plan.ids = NULL
        plan.gaps = NULL
        plan.n_ids = plan.ids_room = plan.n_gaps = plan.gaps_room = 0
        plan.turn = base + TURN_BYTES
        try:
            if _make_whole_plan(&self.lexicon, &self.tokens, base, base + size, &plan):
                raise MemoryError
            return self._fill(&plan, encode_all)
        finally:
            free(plan.ids)
            free(plan.gaps)

    cdef array.array _fill(self, plan_t *plan, encode_all):
        cdef array.array out, ids
        cdef list filled = []
        cdef Py_ssize_t total = plan.n_ids, at = 0
        cdef size_t taken = 0, i
        cdef gap_t *gap
        if plan.n_gaps:
            runs = [PyUnicode_DecodeUTF8(plan.gaps[i].start, plan.gaps[i].end - plan.gaps[i].start, NULL) for i in range(plan.n_gaps)]
            for run in encode_all(runs):
                ids = array.array("I", run)
                total += len(ids)
                filled.append(ids)
            if len(filled) != plan.n_gaps:
                raise ValueError(f"{plan.n_gaps} texts gave {len(filled)} lists of token ids")
        out = array.clone(_ZERO, total, zero=False)
        for i in range(plan.n_gaps):
            gap = &plan.gaps[i]
            _copy_ids(out.data.as_uints + at, plan.ids + taken, gap.n_ids - taken)
            at += gap.n_ids - taken
            taken = gap.n_ids
            ids = <array.array> filled[i]
            _copy_ids(out.data.as_uints + at, ids.data.as_uints, len(ids))
            at += len(ids)
            if gap.is_word:
                sf_words_put(&self.lexicon.words, gap.start, gap.end - gap.start, ids.data.as_uints, len(ids))
        _copy_ids(out.data.as_uints + at, plan.ids + taken, plan.n_ids - taken)
        return out


cdef int _check_scripts(bytes scripts, int pattern) except -1:
    if scripts is None:
        if pattern >= SF_PRE_DEEPSEEK3:
            raise ValueError(f"pattern {pattern} needs a table of scripts")
    elif PyBytes_GET_SIZE(scripts) != SF_UNI_CHARS:
        raise ValueError(f"a table of scripts has {SF_UNI_CHARS} bytes, not {PyBytes_GET_SIZE(scripts)}")
    return 0


def words_of(str text not None, int pattern, bytes scripts=None):
    if pattern < 0 or pattern >= SF_PRE_KINDS or (scripts is None and not PyUnicode_IS_ASCII(text)):
        raise ValueError("only ASCII text is cut without a table of scripts, and only by a pattern that there is")
    _check_scripts(scripts, pattern)
    cdef bytes utf8 = text.encode()
    cdef const uint8_t *table = <const uint8_t *> PyBytes_AS_STRING(scripts) if scripts is not None else NULL
    cdef const char *p = PyBytes_AS_STRING(utf8)
    cdef const char *end = p + PyBytes_GET_SIZE(utf8)
    cdef const char *stop
    cdef list words = []
    while p < end:
        stop = sf_unitoken_end(table, pattern, p, end) if table != NULL else sf_pretoken_end(pattern, p, end)
        words.append(PyUnicode_DecodeUTF8(p, stop - p, NULL))
        p = stop
    return words
