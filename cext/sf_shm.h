/* THE shared-memory layout of sglfast. One segment (memfd) is created by control and mapped by index and every shard.
 *
 *   0 +---------------------------------------------------------------+
 *     | sf_header_t                     4096 B    writer: control     |
 *     +---------------------------------------------------------------+
 *     | sf_process_t[1 + max_shards]      64 B    writer: that process| slot 0 = index, slot 1 + s = shard s
 *     +---------------------------------------------------------------+
 *     | sf_worker_t[max_workers]        4096 B    writer: control     | seqlock per worker, one version for the table
 *     +---------------------------------------------------------------+
 *     | sf_rank_t[max_ranks]             256 B    writer: index       | state and counters of a rank's event stream
 *     +---------------------------------------------------------------+
 *     | breaker[max_workers]               8 B    writers: shards     | see sf_breaker.h: the one exception to the law below
 *     +---------------------------------------------------------------+
 *     | column[max_shards + 1]                    writer: that shard  | last column: sums of dead shards, writer: control
 *     |   4096 B of shard words, 256 B a worker, then 16 B a rank     |
 *     +---------------------------------------------------------------+
 *     | sf_tree_t                       4096 B    writer: index       | version (seqlock of the whole tree), sizes, counts
 *     +---------------------------------------------------------------+
 *     | tree slots[tree_slots]   tree_stride B    writer: index       | key, then one owner bitset per tier
 *     +---------------------------------------------------------------+
 *     | sf_predictions_t                4096 B    writer: index       | doorbell and totals of what follows; without
 *     +---------------------------------------------------------------+ predictions these three sections are not there
 *     | ring[max_shards]           ring_stride B  writer: that shard  | what a shard routed, on its way to index (the tail: index)
 *     +---------------------------------------------------------------+
 *     | sets[prediction_sets] prediction_set_bytes writer: index      | what was routed and is not known from events, sf_predicted.h
 *     +---------------------------------------------------------------+
 *
 * Law: one writer per word, for ever (but for the breakers and their epoch, the rate's word and the doorbell); no lock between processes;
 * every word is a naturally aligned uint64_t that is read and written atomically. No pointers: indexes and offsets only. Sections
 * start on a 4096-byte border. Any change in size, order or meaning below is a new SF_LAYOUT_MAJOR (tests/golden/layout.json holds
 * the current one); attach refuses another major.
 */
#ifndef SF_SHM_H
#define SF_SHM_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define SF_MAGIC UINT64_C(0x31545341464c4753) /* "SGLFAST1" in little-endian bytes */
#define SF_LAYOUT_MAJOR 5u
#define SF_LAYOUT_MINOR 0u
#define SF_PAGE 4096u
#define SF_TIERS 3u /* device, host, disk */
#define SF_WORKER_BLOB_BYTES (SF_PAGE - 64u)
#define SF_SHARD_WORDS 512u
#define SF_WORKER_WORDS 32u
#define SF_RANK_WORDS 32u
#define SF_LOAD_WORDS 2u       /* of a rank in a column: the requests and the tokens that were steered to it */
#define SF_WORKERS_MAX 65536u
#define SF_RANKS_MAX 1024u
#define SF_SHARDS_MAX 1024u
/* Slots (4/3 of it) are numbered in 32 bits, see treelogs.pxi. */
#define SF_CAPACITY_MAX (UINT64_C(1) << 31)
#define SF_PREDICTIONS_MAX (UINT64_C(1) << 28)
#define SF_WAYS 8u             /* predicted keys a set */
#define SF_RING_WORDS 16384u   /* a power of two; 20 ms of 5,000 prompts/s of 32 KB that each leave a record twice */

_Static_assert(sizeof(void *) == 8, "sglfast needs a 64-bit machine");
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "sglfast needs a little-endian machine");
_Static_assert(__atomic_always_lock_free(8, 0), "64-bit atomics must be lock free");

typedef struct { /* exported */
    uint64_t magic;
    uint32_t layout_major;
    uint32_t layout_minor;
    uint64_t total_bytes;
    uint64_t max_workers;
    uint64_t max_ranks; /* multiple of 64 */
    uint64_t max_shards;
    uint64_t tree_slots;
    uint64_t tree_stride;         /* bytes a slot */
    uint64_t tree_capacity_blocks; /* live keys at most; the rest of the slots keeps probes short */
    uint64_t process_offset;
    uint64_t workers_offset;
    uint64_t ranks_offset;
    uint64_t columns_offset;
    uint64_t column_stride;
    uint64_t tree_offset;
    uint64_t slots_offset;
    uint64_t prediction_blocks; /* predicted keys at most, 0 = no predictions */
    uint64_t prediction_sets;
    uint64_t prediction_set_bytes;
    uint64_t predictions_offset;
    uint64_t rings_offset;
    uint64_t ring_stride;
    uint64_t sets_offset;
    uint64_t unused;
    /* the words below change while the program runs; on a cache line of their own */
    uint64_t state;           /* SF_STATE_* */
    uint64_t workers_version; /* +1 after every change of the worker table */
    uint64_t control_heartbeat_ms;
    uint64_t drain_deadline_ms; /* wall clock, 0 = not draining */
    uint64_t breaker_epoch; /* +1 whenever a breaker lets a worker in or out; by any shard and by control */
    uint64_t pad[3];
    uint64_t rate_due_us; /* monotonic; written by all shards by compare-and-swap: see cext/admission.pyx */
    uint64_t reserved[479];
} sf_header_t;

typedef struct { /* exported */
    uint64_t pid;
    uint64_t started_ms; /* wall clock */
    uint64_t heartbeat_ms;
    uint64_t restarts; /* writer: control */
    uint64_t is_ready;
    uint64_t workers_seen; /* version of the worker table that the process acts by */
    uint64_t reserved[2];
} sf_process_t;

typedef struct { /* exported */
    uint64_t seq;        /* odd while control writes this worker */
    uint64_t generation; /* +1 whenever the slot is given to another worker; 0 = never used */
    uint64_t state;      /* SF_WORKER_* */
    uint64_t rank_base;  /* first rank of this worker in the owner bitsets */
    uint64_t dp_size;    /* ranks */
    uint64_t block_size; /* tokens, 0 = publishes no KV events */
    uint64_t flags;      /* SF_WORKER_FLAG_* */
    uint64_t blob_bytes;
    uint8_t blob[SF_WORKER_BLOB_BYTES]; /* msgpack of sglfast.shm.WorkerRecord: what is read only when the table changes */
} sf_worker_t;

typedef struct { /* exported */
    uint64_t words[SF_RANK_WORDS]; /* enum sf_rank_word */
} sf_rank_t;

typedef struct { /* exported */
    uint64_t version; /* seqlock: odd while index writes */
    uint64_t pad[7];
    uint64_t live_blocks;
    uint64_t stored_total;
    uint64_t removed_total;
    uint64_t evicted_total;
    uint64_t generation; /* +1 each time an index process empties the tree at its start */
    uint64_t hidden[SF_RANKS_MAX / 64]; /* ranks that are being cleared: they own nothing, whatever stands in the slots */
    uint64_t reserved[483];
} sf_tree_t;

typedef struct { /* exported */
    /* 1 while index sleeps. The one word with several writers: index sets it, the shard that rings takes it back by an atomic
     * exchange, so that exactly one of them pays for waking it. */
    uint64_t doorbell;
    uint64_t pad[7];
    uint64_t records_total;
    uint64_t refused_total; /* records of ranks that had another owner by then, and such as no shard writes */
    uint64_t evicted_total; /* keys that made room for others */
    uint64_t trimmed_total; /* owners dropped because their rank had too many */
    uint64_t reserved[500];
} sf_predictions_t;

typedef struct { /* exported */
    uint64_t head; /* words ever written; writer: shard */
    uint64_t dropped_total; /* records that found no room; writer: shard */
    uint64_t pad[6];
    uint64_t tail; /* words ever read; writer: index */
    uint64_t reserved[503];
} sf_ring_t; /* then SF_RING_WORDS words */

enum { SF_STATE_STARTING = 0, SF_STATE_SERVING = 1, SF_STATE_DRAINING = 2, SF_STATE_STOPPED = 3 };
enum { SF_WORKER_FREE = 0, SF_WORKER_JOINING = 1, SF_WORKER_READY = 2, SF_WORKER_UNHEALTHY = 3, SF_WORKER_DRAINING = 4 };
enum { SF_WORKER_FLAG_BIGRAM = 1, SF_WORKER_FLAG_TOKENS = 2 };

_Static_assert(sizeof(sf_header_t) == SF_PAGE, "header");
_Static_assert(offsetof(sf_header_t, state) == 192, "run-time words start a cache line");
_Static_assert(sizeof(sf_process_t) == 64, "process slot");
_Static_assert(sizeof(sf_worker_t) == SF_PAGE, "worker");
_Static_assert(offsetof(sf_worker_t, blob) == 64, "worker blob");
_Static_assert(sizeof(sf_rank_t) == 256, "rank");
_Static_assert(sizeof(sf_tree_t) == SF_PAGE, "tree header");
_Static_assert(offsetof(sf_tree_t, live_blocks) == 64, "tree version has a cache line of its own");
_Static_assert(sizeof(sf_predictions_t) == SF_PAGE, "predictions");
_Static_assert(sizeof(sf_ring_t) == SF_PAGE, "ring");
_Static_assert(offsetof(sf_ring_t, tail) == 64, "head and tail have a cache line each");

/* ---- atomics: the more underscores, the fewer guarantees ---- */
static inline uint64_t sf_load(const uint64_t *word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }
static inline void sf_store(uint64_t *word, uint64_t value) { __atomic_store_n(word, value, __ATOMIC_RELEASE); }
static inline uint64_t _sf_load(const uint64_t *word) { return __atomic_load_n(word, __ATOMIC_RELAXED); }
static inline void _sf_store(uint64_t *word, uint64_t value) { __atomic_store_n(word, value, __ATOMIC_RELAXED); }
/* Single writer: a plain read-modify-write by the owner, seen whole by all others. */
static inline void _sf_add(uint64_t *word, uint64_t delta) { _sf_store(word, _sf_load(word) + delta); }
static inline void sf_fence_acquire(void) { __atomic_thread_fence(__ATOMIC_ACQUIRE); }
static inline void sf_fence_release(void) { __atomic_thread_fence(__ATOMIC_RELEASE); }
static inline void sf_pause(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#else
    __asm__ __volatile__("" ::: "memory");
#endif
}

/* Seqlock, writer side (pairs with sf_read_begin / sf_read_retry). An odd version left by a writer that died is taken up. */
static inline void sf_write_begin(uint64_t *version) {
    _sf_store(version, _sf_load(version) | 1u);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}
static inline void sf_write_end(uint64_t *version) { sf_store(version, (_sf_load(version) | 1u) + 1u); }

/* ---- addresses ---- */
static inline uint64_t _sf_round_up(uint64_t value, uint64_t unit) { return (value + unit - 1) / unit * unit; }
static inline sf_header_t *sf_header(void *base) { return (sf_header_t *)base; }
static inline sf_process_t *sf_process(void *base, uint64_t slot) {
    return (sf_process_t *)((char *)base + sf_header(base)->process_offset) + slot;
}
static inline sf_worker_t *sf_worker(void *base, uint64_t worker_idx) {
    return (sf_worker_t *)((char *)base + sf_header(base)->workers_offset) + worker_idx;
}
static inline sf_rank_t *sf_rank(void *base, uint64_t rank) {
    return (sf_rank_t *)((char *)base + sf_header(base)->ranks_offset) + rank;
}
static inline uint64_t *sf_breaker(void *base, uint64_t worker_idx) {
    sf_header_t *header = sf_header(base);
    return (uint64_t *)((char *)base + _sf_round_up(header->ranks_offset + header->max_ranks * sizeof(sf_rank_t), SF_PAGE)) + worker_idx;
}
static inline uint64_t *sf_column(void *base, uint64_t shard) {
    return (uint64_t *)((char *)base + sf_header(base)->columns_offset + shard * sf_header(base)->column_stride);
}
static inline uint64_t *sf_column_worker(uint64_t *column, uint64_t worker_idx) {
    return column + SF_SHARD_WORDS + worker_idx * SF_WORKER_WORDS;
}
/* `rank` is one of the tree's, so that it has its words before its worker is known. */
static inline uint64_t *sf_column_rank(uint64_t *column, uint64_t max_workers, uint64_t rank) {
    return column + SF_SHARD_WORDS + max_workers * SF_WORKER_WORDS + rank * SF_LOAD_WORDS;
}
static inline sf_tree_t *sf_tree(void *base) { return (sf_tree_t *)((char *)base + sf_header(base)->tree_offset); }
static inline char *sf_slots(void *base) { return (char *)base + sf_header(base)->slots_offset; }

static inline sf_predictions_t *sf_predictions(void *base) {
    return (sf_predictions_t *)((char *)base + sf_header(base)->predictions_offset);
}
static inline sf_ring_t *sf_ring(void *base, uint64_t shard) {
    return (sf_ring_t *)((char *)base + sf_header(base)->rings_offset + shard * sf_header(base)->ring_stride);
}

/* Bytes of one tree slot: a key and SF_TIERS bitsets; 32 B at 64 ranks (two slots a cache line), whole lines above. */
static inline uint64_t sf_tree_stride(uint64_t max_ranks) {
    uint64_t bytes = 8 + SF_TIERS * (max_ranks / 64) * 8;
    return bytes <= 32 ? 32 : _sf_round_up(bytes, 64);
}

/* Bytes of one set of predicted keys: SF_WAYS keys, their times, and two owner bitsets each; whole cache lines. */
static inline uint64_t sf_prediction_set_bytes(uint64_t max_ranks) { return SF_WAYS * (8 + 8 + 2 * (max_ranks / 64) * 8); }

/* Fill `header` for the given sizes; returns the segment's size in bytes. Accepts: sizes 1..SF_*_MAX (no sum below overflows
 * then), max_ranks a multiple of 64, prediction_blocks 0..SF_PREDICTIONS_MAX. */
static inline uint64_t sf_plan(sf_header_t *header, uint64_t max_workers, uint64_t max_ranks, uint64_t max_shards,
                               uint64_t capacity_blocks, uint64_t prediction_blocks) {
    memset(header, 0, sizeof *header);
    header->magic = SF_MAGIC;
    header->layout_major = SF_LAYOUT_MAJOR;
    header->layout_minor = SF_LAYOUT_MINOR;
    header->max_workers = max_workers;
    header->max_ranks = max_ranks;
    header->max_shards = max_shards;
    header->tree_capacity_blocks = capacity_blocks;
    header->tree_slots = capacity_blocks + capacity_blocks / 3 + 64; /* load factor <= 3/4: about 2.5 probes a hit */
    header->tree_stride = sf_tree_stride(max_ranks);
    header->column_stride =
        _sf_round_up((SF_SHARD_WORDS + max_workers * SF_WORKER_WORDS + max_ranks * SF_LOAD_WORDS) * 8, SF_PAGE);
    header->process_offset = SF_PAGE;
    header->workers_offset = _sf_round_up(header->process_offset + (1 + max_shards) * sizeof(sf_process_t), SF_PAGE);
    header->ranks_offset = header->workers_offset + max_workers * sizeof(sf_worker_t);
    header->columns_offset = _sf_round_up(header->ranks_offset + max_ranks * sizeof(sf_rank_t), SF_PAGE);
    header->columns_offset += _sf_round_up(max_workers * 8, SF_PAGE); /* the breakers */
    header->tree_offset = header->columns_offset + (max_shards + 1) * header->column_stride;
    header->slots_offset = header->tree_offset + sizeof(sf_tree_t);
    header->total_bytes = _sf_round_up(header->slots_offset + header->tree_slots * header->tree_stride, SF_PAGE);
    if (prediction_blocks) {
        header->prediction_blocks = prediction_blocks;
        header->prediction_sets = (prediction_blocks + SF_WAYS - 1) / SF_WAYS;
        header->prediction_set_bytes = sf_prediction_set_bytes(max_ranks);
        header->predictions_offset = header->total_bytes;
        header->rings_offset = header->predictions_offset + sizeof(sf_predictions_t);
        header->ring_stride = sizeof(sf_ring_t) + SF_RING_WORDS * 8;
        header->sets_offset = header->rings_offset + max_shards * header->ring_stride;
        header->total_bytes = _sf_round_up(header->sets_offset + header->prediction_sets * header->prediction_set_bytes, SF_PAGE);
    }
    return header->total_bytes;
}

enum { SF_OK = 0, SF_NOT_SGLFAST = -1, SF_OTHER_LAYOUT = -2, SF_WRONG_SIZE = -3 };

/* Check a mapping of `bytes` bytes before anything else is read from it. */
static inline int sf_check(const void *base, uint64_t bytes) {
    const sf_header_t *header = (const sf_header_t *)base;
    sf_header_t plan;
    if (bytes < SF_PAGE || header->magic != SF_MAGIC) return SF_NOT_SGLFAST;
    if (header->layout_major != SF_LAYOUT_MAJOR) return SF_OTHER_LAYOUT;
    /* x - 1 >= MAX refuses 0 too. Readers keep bitsets of SF_RANKS_MAX bits on their stack. */
    if (header->max_ranks - 1 >= SF_RANKS_MAX || header->max_ranks % 64 || header->max_shards - 1 >= SF_SHARDS_MAX ||
        header->max_workers - 1 >= SF_WORKERS_MAX || header->tree_capacity_blocks - 1 >= SF_CAPACITY_MAX ||
        header->prediction_blocks > SF_PREDICTIONS_MAX)
        return SF_WRONG_SIZE;
    sf_plan(&plan, header->max_workers, header->max_ranks, header->max_shards, header->tree_capacity_blocks,
            header->prediction_blocks);
    plan.layout_minor = header->layout_minor;
    if (memcmp(&plan, header, offsetof(sf_header_t, state)) || header->total_bytes > bytes) return SF_WRONG_SIZE;
    return SF_OK;
}
#endif
