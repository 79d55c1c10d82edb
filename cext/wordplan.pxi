# Part of wordtable.pyx, which documents it: what a text becomes before the tokenizer is asked, which is ids that are known, and between
# them the runs of text that are not.

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


# What is not known of a text yet: from where on, and the last word of that.
cdef struct run_t:
    const char *start  # NULL: there is none
    const char *last


cdef inline const sf_word_t *_find(lexicon_t *lexicon, const char *p, size_t size, uint64_t *hash) noexcept nogil:
    hash[0] = sf_words_hash(&lexicon.words, p, size)
    return sf_words_get(&lexicon.words, hash[0], p, size) if size <= SF_WORDS_MAX_BYTES else NULL


cdef int _take(lexicon_t *lexicon, plan_t *plan, run_t *run, const char *p, const char *stop, uint64_t hash,
               const sf_word_t *known) noexcept nogil:
    """A word into the plan. known, hash: as `_find` has them."""
    cdef uint32_t merged[SF_BPE_MAX_BYTES]
    cdef const uint32_t *ids = merged
    cdef uint32_t n_ids = 0
    cdef size_t size = stop - p
    cdef bint came = False
    if known != NULL:
        ids, n_ids = known.data, known.n_ids
    else:
        if size <= SF_WORDS_MAX_BYTES:
            came = sf_words_came(&lexicon.words, hash)
        if size <= SF_BPE_MAX_BYTES and lexicon.bpe.merges != NULL and not _is_left(lexicon, hash):
            n_ids = sf_bpe_word(&lexicon.bpe, p, size, merged)
            if came and n_ids:
                sf_words_put(&lexicon.words, p, size, merged, n_ids)
    if n_ids == 0 and not came:
        if run.start == NULL:
            run.start = p
        run.last = p
        return 0
    if run.start != NULL and _close_run(lexicon, plan, run.start, run.last, p):
        return -1
    run.start = NULL
    return _add_ids(plan, ids, n_ids) if n_ids else _add_gap(plan, p, stop, True)


cdef int _plan_scripts(lexicon_t *lexicon, plan_t *plan, run_t *run, const char *p, const char *end) noexcept nogil:
    """A stretch that is not all ASCII, or of a pattern that is written out for all scripts at once."""
    cdef const char *part
    cdef const char *stop
    cdef const sf_word_t *known
    cdef uint64_t hash
    cdef bint is_foreign
    while p < end:
        part = _part_end(lexicon, plan, p, end, &is_foreign)
        if is_foreign:
            if run.start == NULL:
                run.start = p
            run.last = p
            p = part
        while p < part:
            if p >= plan.turn:
                _give_way(plan, p)
            stop = sf_unitoken_end(lexicon.scripts, lexicon.kind, p, part)
            known = _find(lexicon, p, stop - p, &hash)
            if _take(lexicon, plan, run, p, stop, hash, known):
                return -1
            p = stop
    return 0


cdef int _make_plan(lexicon_t *lexicon, const char *p, const char *end, plan_t *plan) noexcept nogil:
    cdef run_t run = run_t(NULL, NULL)
    cdef const char *stretch
    cdef const char *stop
    cdef const sf_word_t *known
    cdef uint64_t hash
    while p < end:
        stretch = sf_stretch_end(p, end)
        if lexicon.kind >= SF_PRE_DEEPSEEK3 or not sf_is_ascii(p, stretch):
            if _plan_scripts(lexicon, plan, &run, p, stretch):
                return -1
            p = stretch
        while p < stretch:
            if p >= plan.turn:
                _give_way(plan, p)
            stop = sf_pretoken_end(lexicon.kind, p, stretch)
            known = _find(lexicon, p, stop - p, &hash)
            if known != NULL and run.start == NULL:  # nearly always
                if _add_ids(plan, known.data, known.n_ids):
                    return -1
            elif _take(lexicon, plan, &run, p, stop, hash, known):
                return -1
            p = stop
    return _add_gap(plan, run.start, end, False) if run.start != NULL else 0


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
