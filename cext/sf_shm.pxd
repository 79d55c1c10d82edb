# Extern declarations of sf_shm.h for Cython; the header is the documentation.
from libc.stdint cimport uint8_t, uint32_t, uint64_t


cdef extern from "sf_shm.h" nogil:
    enum:
        SF_LAYOUT_MAJOR
        SF_LAYOUT_MINOR
        SF_TIERS
        SF_SHARD_WORDS
        SF_WORKER_WORDS
        SF_RANK_WORDS
        SF_LOAD_WORDS
        SF_WORKER_BLOB_BYTES
        SF_PAGE
        SF_WORKERS_MAX
        SF_RANKS_MAX
        SF_SHARDS_MAX
        SF_WAYS
        SF_RING_WORDS
        SF_OK
        SF_NOT_SGLFAST
        SF_OTHER_LAYOUT
        SF_WRONG_SIZE

    const uint64_t SF_CAPACITY_MAX
    const uint64_t SF_PREDICTIONS_MAX

    ctypedef struct sf_header_t:
        uint64_t magic
        uint32_t layout_major
        uint32_t layout_minor
        uint64_t total_bytes
        uint64_t max_workers
        uint64_t max_ranks
        uint64_t max_shards
        uint64_t tree_slots
        uint64_t tree_stride
        uint64_t tree_capacity_blocks
        uint64_t process_offset
        uint64_t workers_offset
        uint64_t ranks_offset
        uint64_t columns_offset
        uint64_t column_stride
        uint64_t tree_offset
        uint64_t slots_offset
        uint64_t prediction_blocks
        uint64_t prediction_sets
        uint64_t prediction_set_bytes
        uint64_t predictions_offset
        uint64_t rings_offset
        uint64_t ring_stride
        uint64_t sets_offset
        uint64_t state
        uint64_t workers_version
        uint64_t control_heartbeat_ms
        uint64_t drain_deadline_ms
        uint64_t rate_due_us
        uint64_t breaker_epoch

    ctypedef struct sf_process_t:
        uint64_t pid
        uint64_t started_ms
        uint64_t heartbeat_ms
        uint64_t restarts
        uint64_t is_ready
        uint64_t workers_seen

    ctypedef struct sf_worker_t:
        uint64_t seq
        uint64_t generation
        uint64_t state
        uint64_t rank_base
        uint64_t dp_size
        uint64_t block_size
        uint64_t flags
        uint64_t blob_bytes
        uint8_t blob[1]

    ctypedef struct sf_rank_t:
        uint64_t words[32]

    ctypedef struct sf_tree_t:
        uint64_t version
        uint64_t live_blocks
        uint64_t stored_total
        uint64_t removed_total
        uint64_t evicted_total
        uint64_t generation
        uint64_t hidden[16]

    ctypedef struct sf_predictions_t:
        uint64_t doorbell
        uint64_t records_total
        uint64_t refused_total
        uint64_t evicted_total
        uint64_t trimmed_total

    ctypedef struct sf_ring_t:
        uint64_t head
        uint64_t dropped_total
        uint64_t tail

    uint64_t sf_load(const uint64_t *word) noexcept
    void sf_store(uint64_t *word, uint64_t value) noexcept
    uint64_t _sf_load(const uint64_t *word) noexcept
    void _sf_store(uint64_t *word, uint64_t value) noexcept
    void _sf_add(uint64_t *word, uint64_t delta) noexcept
    void sf_fence_acquire() noexcept
    void sf_fence_release() noexcept
    void sf_pause() noexcept
    void sf_write_begin(uint64_t *version) noexcept
    void sf_write_end(uint64_t *version) noexcept

    sf_header_t *sf_header(void *base) noexcept
    sf_process_t *sf_process(void *base, uint64_t slot) noexcept
    sf_worker_t *sf_worker(void *base, uint64_t worker_idx) noexcept
    sf_rank_t *sf_rank(void *base, uint64_t rank) noexcept
    uint64_t *sf_breaker(void *base, uint64_t worker_idx) noexcept
    uint64_t *sf_column(void *base, uint64_t shard) noexcept
    uint64_t *sf_column_worker(uint64_t *column, uint64_t worker_idx) noexcept
    uint64_t *sf_column_rank(uint64_t *column, uint64_t max_workers, uint64_t rank) noexcept
    sf_tree_t *sf_tree(void *base) noexcept
    char *sf_slots(void *base) noexcept
    sf_predictions_t *sf_predictions(void *base) noexcept
    sf_ring_t *sf_ring(void *base, uint64_t shard) noexcept
    uint64_t sf_plan(sf_header_t *header, uint64_t max_workers, uint64_t max_ranks, uint64_t max_shards,
                     uint64_t capacity_blocks, uint64_t prediction_blocks) noexcept
    int sf_check(const void *base, uint64_t nbytes) noexcept
