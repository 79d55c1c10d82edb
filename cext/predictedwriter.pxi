# Part of predicted.pyx, which documents it: the writer of the table, in index.


# A settled prompt of a rank with events, until GRACE_MS are over.
cdef struct settled_t:
    settled_t *next
    uint64_t due_ms
    uint64_t generation
    uint32_t rank
    uint32_t n_keys
    uint64_t keys[1]


cdef int compare_times(const void *a, const void *b) noexcept nogil:
    cdef uint64_t left = (<const uint64_t *>a)[0], right = (<const uint64_t *>b)[0]
    return (left > right) - (left < right)


@cython.final
cdef class PredictionWriter:
    cdef sf_predicted_t table
    cdef sf_predictions_t *header
    cdef void *base
    cdef object segment
    cdef uint64_t *generations  # per rank: of the worker that has it, 0 = nobody
    cdef settled_t *first
    cdef settled_t *last
    cdef uint64_t n_settled
    cdef uint64_t max_ranks
    cdef uint64_t max_shards
    cdef int pid

    def __cinit__(self, segment):
        self.base = open_segment(segment)
        self.segment = segment
        self.header = sf_predictions(self.base)
        self.max_ranks = sf_header(self.base).max_ranks
        self.max_shards = sf_header(self.base).max_shards
        self.pid = os.getpid()
        sf_predicted_init(&self.table, self.base)
        self.generations = <uint64_t *>calloc(self.max_ranks, sizeof(uint64_t))
        if self.generations == NULL:
            raise MemoryError

    def __dealloc__(self):
        while self.first != NULL:
            self.c_forget_first()
        free(self.generations)

    # ---- nogil layer ----

    cdef void c_forget_first(self) noexcept nogil:
        cdef settled_t *gone = self.first
        self.first = gone.next
        if self.first == NULL:
            self.last = NULL
        self.n_settled -= 1
        free(gone)

    cdef void c_settle(self, uint32_t rank, uint64_t generation, const uint64_t *keys, uint32_t n_keys, uint64_t now_ms) noexcept nogil:
        cdef uint32_t i
        cdef settled_t *settled = NULL
        if self.n_settled < c_SETTLED_MAX:
            settled = <settled_t *>malloc(sizeof(settled_t) + n_keys * sizeof(uint64_t))
        if settled == NULL:
            for i in range(n_keys):
                sf_pdrop(&self.table, keys[i], rank, SF_FLIGHT)
            return
        for i in range(n_keys):
            sf_psettle(&self.table, keys[i], rank)
        settled.next = NULL
        settled.due_ms = now_ms + c_GRACE_MS
        settled.generation = generation
        settled.rank = rank
        settled.n_keys = n_keys
        memcpy(settled.keys, keys, n_keys * sizeof(uint64_t))
        if self.last == NULL:
            self.first = settled
        else:
            self.last.next = settled
        self.last = settled
        self.n_settled += 1

    cdef void c_expire(self, uint64_t now_ms) noexcept nogil:
        cdef settled_t *due
        cdef uint32_t i
        while self.first != NULL and self.first.due_ms <= now_ms:
            due = self.first
            if self.generations[due.rank] == due.generation:
                for i in range(due.n_keys):
                    sf_pdrop(&self.table, due.keys[i], due.rank, SF_KEPT)
            self.c_forget_first()

    cdef bint c_apply(self, const uint64_t *record, uint64_t now_ms) noexcept nogil:
        """Whether the record was good."""
        cdef uint64_t op = record[0] >> 56
        cdef uint32_t rank = <uint32_t>(record[0] >> 32 & 0xffffff)
        cdef uint32_t i = <uint32_t>record[0]
        if rank >= self.max_ranks or not record[1] or self.generations[rank] != record[1]:
            return False
        if op == SF_OP_SETTLED:
            self.c_settle(rank, record[1], record + 2, i, now_ms)
        elif op == SF_OP_SENT or op == SF_OP_KEEP:
            # The beginning last: where all have one time, the end of a prompt is found older than its beginning.
            while i:
                i -= 1
                if sf_padd(&self.table, record[2 + i], rank, SF_FLIGHT if op == SF_OP_SENT else SF_KEPT, now_ms):
                    _sf_add(&self.header.evicted_total, 1)
        else:
            return False
        return True

    cdef uint64_t c_drain(self, uint64_t now_ms) noexcept nogil:
        cdef uint64_t record[SF_RECORD_WORDS]
        cdef uint64_t done = 0, shard, _turn
        cdef sf_ring_t *ring
        cdef int n_words
        for shard in range(self.max_shards):
            ring = sf_ring(self.base, shard)
            for _turn in range(c_RECORDS_A_TURN):
                n_words = sf_ring_pop(ring, record)
                if n_words == 0:
                    break
                done += 1
                if n_words < 0 or not self.c_apply(record, now_ms):
                    _sf_add(&self.header.refused_total, 1)
                else:
                    _sf_add(&self.header.records_total, 1)
                if n_words > 0:
                    sf_ring_popped(ring, n_words)
        return done

    cdef void c_clear(self, const uint64_t *ranks) noexcept nogil:
        """ranks: a bitset."""
        cdef uint64_t i, w, left
        cdef int way
        cdef uint64_t *set
        cdef uint64_t *bits
        for i in range(self.table.n_sets):
            set = <uint64_t *>(self.table.sets + i * self.table.set_bytes)
            for way in range(<int>SF_WAYS):
                if not _sf_load(set + way):
                    continue
                bits = sf_pbits(&self.table, set, way, SF_FLIGHT)
                left = 0
                for w in range(2 * self.table.words):
                    sf_store(bits + w, _sf_load(bits + w) & ~ranks[w % self.table.words])
                    left |= _sf_load(bits + w)
                if not left:
                    sf_store(set + way, 0)

    cdef uint64_t c_trim(self, uint32_t rank, uint64_t cap, uint64_t *times, uint64_t n) noexcept nogil:
        """times: room for the rank's n keys. Drops the oldest beyond `cap`; returns how many."""
        cdef uint64_t i, found = 0, gone = 0, limit_ms, word = rank >> 6
        cdef int way
        cdef uint64_t *set
        for i in range(self.table.n_sets):
            set = <uint64_t *>(self.table.sets + i * self.table.set_bytes)
            for way in range(<int>SF_WAYS):
                if found < n and _sf_load(sf_pbits(&self.table, set, way, SF_KEPT) + word) >> (rank & 63) & 1:
                    times[found] = _sf_load(set + SF_WAYS + way)
                    found += 1
        if found <= cap:
            return 0
        qsort(times, found, sizeof(uint64_t), compare_times)
        limit_ms = times[found - cap - 1]
        for i in range(self.table.n_sets):
            set = <uint64_t *>(self.table.sets + i * self.table.set_bytes)
            for way in range(<int>SF_WAYS):
                if gone == found - cap:
                    return gone
                if _sf_load(set + SF_WAYS + way) <= limit_ms:
                    if _sf_load(sf_pbits(&self.table, set, way, SF_KEPT) + word) >> (rank & 63) & 1:
                        sf_pdrop_way(&self.table, set, way, rank, SF_KEPT)
                        gone += 1
        return gone

    cdef void c_count(self, uint64_t *counts) noexcept nogil:
        cdef uint64_t i, w, owners
        cdef int way
        cdef uint64_t *set
        for i in range(self.table.n_sets):
            set = <uint64_t *>(self.table.sets + i * self.table.set_bytes)
            for way in range(<int>SF_WAYS):
                if not _sf_load(set + way):
                    continue
                for w in range(self.table.words):
                    owners = _sf_load(sf_pbits(&self.table, set, way, SF_KEPT) + w)
                    while owners:
                        counts[w * 64 + <uint64_t>__builtin_ctzll(owners)] += 1
                        owners &= owners - 1

    # ---- Python layer: one thread at a time ----

    def _check(self, unsigned int rank):
        if rank >= self.max_ranks:
            raise ValueError(f"rank {rank} is outside 0..{self.max_ranks - 1}")
        if os.getpid() != self.pid:
            raise RuntimeError("a PredictionWriter belongs to the process that made it: the table has one writer")

    def own(self, unsigned int rank, uint64_t generation):
        """Records of the rank are applied when they name this generation of its worker; 0 = of no worker."""
        self._check(rank)
        self.generations[rank] = generation

    def drain(self, uint64_t now_ms=0):
        """Apply what shards have put into their rings, and forget what is over; returns the number of records, 0 = rings are empty."""
        cdef uint64_t done
        self._check(0)
        with nogil:
            if now_ms == 0:
                now_ms = sf_coarse_ms()
            done = self.c_drain(now_ms)
            self.c_expire(now_ms)
        return done

    def wait(self, unsigned int timeout_ms, unsigned int nap_us=0):
        """Nap, then sleep until a shard puts something into its ring, a settled prompt is due, or the time is over."""
        cdef uint64_t now_ms
        cdef uint64_t limit_ms = timeout_ms
        with nogil:
            if nap_us:
                usleep(nap_us)
            if self.first != NULL:
                now_ms = sf_coarse_ms()
                limit_ms = min(limit_ms, self.first.due_ms - now_ms if self.first.due_ms > now_ms else 0)
            sf_await_doorbell(self.header, limit_ms, has_records, <void *>self.base)

    def wake(self):
        """End a `wait` of another thread."""
        sf_ring_doorbell(self.header)

    def clear(self, ranks):
        """Forget all of these ranks, a sequence of int. Cost: one pass over the table, a millisecond for 10 MB."""
        cdef uint64_t mask[16]  # SF_RANKS_MAX bits
        cdef unsigned int rank
        for rank in range(16):
            mask[rank] = 0
        for rank in ranks:
            self._check(rank)
            mask[rank >> 6] |= <uint64_t>1 << (rank & 63)
        # Nothing was ever written: do not make the kernel back it all with memory.
        if _sf_load(&self.header.records_total):
            with nogil:
                self.c_clear(mask)

    def kept_blocks(self):
        """Keys that each rank keeps, as a list by rank. Cost: one pass over the table."""
        cdef uint64_t *counts = <uint64_t *>calloc(self.max_ranks, sizeof(uint64_t))
        if counts == NULL:
            raise MemoryError
        if _sf_load(&self.header.records_total):
            with nogil:
                self.c_count(counts)
        found = [counts[rank] for rank in range(<int>self.max_ranks)]
        free(counts)
        return found

    def trim(self, uint64_t cap):
        """Drop the oldest keys of every rank that keeps more than `cap`; returns how many. Cost: two passes for each such rank."""
        cdef uint64_t *times
        cdef uint64_t n, gone = 0
        cdef uint32_t rank
        self._check(0)
        for rank, n in enumerate(self.kept_blocks()):
            if n <= cap:
                continue
            times = <uint64_t *>malloc(n * sizeof(uint64_t))
            if times == NULL:
                raise MemoryError
            with nogil:
                gone += self.c_trim(rank, cap, times, n)
            free(times)
        _sf_add(&self.header.trimmed_total, gone)
        return gone
