# What a text becomes before the tokenizer is asked: ids that are known, and between them the runs of text that are not.
# Included by wordtable.pyx.

# Some ids that are known, and the run of words behind them that is not.
cdef struct gap_t:
    uint32_t n_ids
    uint32_t is_word  # to be remembered
    const char *start
    const char *end


cdef struct plan_t:
    uint32_t *ids
    size_t n_ids, ids_room
    gap_t *gaps
    size_t n_gaps, gaps_room
    const char *turn  # where other threads get the GIL


cdef int _add_ids(plan_t *plan, const uint32_t *ids, size_t n) noexcept nogil:
    cdef void *grown
    if plan.n_ids + n > plan.ids_room:
        grown = realloc(plan.ids, (2 * plan.ids_room + n + 64) * sizeof(uint32_t))
        if grown == NULL:
            return -1
        plan.ids = <uint32_t *> grown
        plan.ids_room = 2 * plan.ids_room + n + 64
    memcpy(plan.ids + plan.n_ids, ids, n * sizeof(uint32_t))
    plan.n_ids += n
    return 0


cdef inline void _copy_ids(uint32_t *to, const uint32_t *ids, size_t n) noexcept nogil:
    if n:  # an array without items has no memory, which memcpy does not take even for nothing
        memcpy(to, ids, n * sizeof(uint32_t))


cdef int _add_gap(plan_t *plan, const char *start, const char *end, bint is_word) noexcept nogil:
    cdef void *grown
    if plan.n_gaps == plan.gaps_room:
        grown = realloc(plan.gaps, (2 * plan.gaps_room + 16) * sizeof(gap_t))
        if grown == NULL:
            return -1
        plan.gaps = <gap_t *> grown
        plan.gaps_room = 2 * plan.gaps_room + 16
    plan.gaps[plan.n_gaps] = gap_t(<uint32_t> plan.n_ids, is_word, start, end)
    plan.n_gaps += 1
    return 0


# So much text takes a millisecond when each word is new.
cdef enum:
    TURN_BYTES = 32768
    TURN_US = 50


cdef void _give_way(plan_t *plan, const char *p) noexcept nogil:
    """Let another thread have the GIL. Others may change the table here: no pointer into it is kept over this.

    With a pause, or nobody would get it: who waits is woken by the release, and finds it taken again.
    """
    cdef PyThreadState *state = PyEval_SaveThread()
    usleep(TURN_US)
    PyEval_RestoreThread(state)
    plan.turn = p + TURN_BYTES


# Bits of the hashes of words that are left to the tokenizer; some few others share theirs.
cdef enum:
    LEFT_BITS = 1 << 16


# All that is known of words.
cdef struct lexicon_t:
    sf_words_t words
    sf_bpe_t bpe
    int kind  # of the pattern
    const uint8_t *scripts  # what each character is; NULL: words are cut in ASCII text only
    uint64_t left[LEFT_BITS / 64]


cdef inline bint _is_left(const lexicon_t *lexicon, uint64_t hash) noexcept nogil:
    return lexicon.left[hash >> 48 >> 6] >> (hash >> 48 & 63) & 1


cdef inline bint _is_space(const lexicon_t *lexicon, const char *p) noexcept nogil:
    return p[0] == 32 or 9 <= p[0] <= 13 or (lexicon.scripts != NULL and sf_uni_is_space(lexicon.scripts, p))


cdef int _close_run(const lexicon_t *lexicon, plan_t *plan, const char *run, const char *last, const char *end) noexcept nogil:
    # last: the run's last word. White space in front of a word is cut before its last character, at the end of a text it is not: so a
    # run that ends inside of white space is no text of its own.
    if last > run and _is_space(lexicon, last) and _is_space(lexicon, sf_uni_before(last)):
        return _add_gap(plan, run, last, False) or _add_gap(plan, last, end, False)
    return _add_gap(plan, run, end, False)


cdef const char *_part_end(const lexicon_t *lexicon, plan_t *plan, const char *p, const char *end, bint *is_foreign) noexcept nogil:
    """Where a part of a stretch ends that is not all ASCII: all of it where nothing is known of scripts, else up to a cut."""
    cdef sf_uni_stretch_t part = sf_uni_stretch_t(0, 0)
    cdef const char *stop = p
    cdef const char *turn
    is_foreign[0] = True
    if lexicon.scripts == NULL:
        return end
    while True:
        turn = _character(stop + TURN_BYTES, end) if end - stop > TURN_BYTES else end
        stop = sf_uni_stretch_end(lexicon.scripts, stop, turn, &part)
        if stop < turn or turn == end:
            is_foreign[0] = part.is_foreign != 0
            return stop
        _give_way(plan, stop)


cdef inline const char *_character(const char *p, const char *end) noexcept nogil:
    """The first character's begin from `p` on."""
    while p < end and (p[0] & 0xC0) == 0x80:
        p += 1
    return p


cdef int _make_plan(lexicon_t *lexicon, const char *p, const char *end, plan_t *plan) noexcept nogil:
    cdef const char *run = NULL  # begin of what is not known
    cdef const char *last = NULL  # word of that
    cdef const char *stretch
    cdef const char *part
    cdef const char *stop
    cdef const sf_word_t *known
    cdef const uint32_t *ids
    cdef uint32_t merged[SF_BPE_MAX_BYTES]
    cdef uint32_t n_ids
    cdef uint64_t hash
    cdef bint came, is_ascii, is_foreign
    while p < end:
        stretch = sf_stretch_end(p, end)
        is_ascii = sf_is_ascii(p, stretch)
        while p < stretch:
            part = stretch
            if not is_ascii:
                part = _part_end(lexicon, plan, p, stretch, &is_foreign)
                if is_foreign:
                    if run == NULL:
                        run = p
                    last = p
                    p = part
                    continue
            while p < part:
                if p >= plan.turn:
                    _give_way(plan, p)
                if is_ascii and lexicon.kind < SF_PRE_DEEPSEEK3:
                    stop = sf_pretoken_end(lexicon.kind, p, part)
                else:
                    stop = sf_unitoken_end(lexicon.scripts, lexicon.kind, p, part)
                n_ids = 0
                ids = NULL
                came = False
                if stop - p <= SF_WORDS_MAX_BYTES:
                    hash = sf_words_hash(&lexicon.words, p, stop - p)
                    known = sf_words_get(&lexicon.words, hash, p, stop - p)
                    if known != NULL:
                        ids, n_ids = known.data, known.n_ids
                    else:
                        came = sf_words_came(&lexicon.words, hash)
                        if lexicon.bpe.merges != NULL and not _is_left(lexicon, hash):
                            ids, n_ids = merged, sf_bpe_word(&lexicon.bpe, p, stop - p, merged)
                            if came and n_ids:
                                sf_words_put(&lexicon.words, p, stop - p, merged, n_ids)
                elif stop - p <= SF_BPE_MAX_BYTES and lexicon.bpe.merges != NULL:
                    if not _is_left(lexicon, sf_words_hash(&lexicon.words, p, stop - p)):
                        ids, n_ids = merged, sf_bpe_word(&lexicon.bpe, p, stop - p, merged)
                if n_ids == 0 and not came:
                    if run == NULL:
                        run = p
                    last = p
                else:
                    if run != NULL and _close_run(lexicon, plan, run, last, p):
                        return -1
                    run = NULL
                    if _add_ids(plan, ids, n_ids) if n_ids else _add_gap(plan, p, stop, True):
                        return -1
                p = stop
    return _add_gap(plan, run, end, False) if run != NULL else 0


cdef int _make_whole_plan(lexicon_t *lexicon, const sf_tokens_t *tokens, const char *p, const char *end, plan_t *plan) noexcept nogil:
    """With the added tokens, which stand between texts that are cut each for itself."""
    cdef const sf_token_t *token = NULL
    cdef const char *stop
    while p < end:
        stop = sf_tokens_find(tokens, p, end, &token)
        if _make_plan(lexicon, p, stop, plan):
            return -1
        if stop < end:
            if _add_ids(plan, &token.id, 1):
                return -1
            stop += token.n_bytes
        p = stop
    return 0
