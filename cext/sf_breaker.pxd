# Extern declarations of sf_breaker.h for Cython; the header is the documentation.
from libc.stdint cimport uint64_t


cdef extern from "sf_breaker.h" nogil:
    enum:
        SF_BREAKER_CLOSED
        SF_BREAKER_OPEN
        SF_BREAKER_HALF_OPEN
        SF_BREAKER_SAME
        SF_BREAKER_BUSY
        SF_BREAKER_CLAIMED
        SF_BREAKER_NEEDLESS
        SF_BREAKER_TICKS_PER_S

    const uint64_t SF_BREAKER_COUNT_MAX
    const uint64_t SF_BREAKER_TICKS_MASK
    const uint64_t SF_BREAKER_SPAN_MAX
    const uint64_t SF_BREAKER_TROUBLE

    ctypedef struct sf_breaker_t:
        uint64_t state
        uint64_t count
        uint64_t prober
        uint64_t generation
        uint64_t since

    sf_breaker_t sf_breaker_unpack(uint64_t word) noexcept
    int sf_breaker_is_selectable(uint64_t word) noexcept
    void sf_breaker_reset(uint64_t *word, uint64_t generation) noexcept
    int sf_breaker_failed(uint64_t *word, uint64_t generation, int is_probe, uint64_t threshold, uint64_t window,
                          uint64_t now) noexcept
    int sf_breaker_succeeded(uint64_t *word, uint64_t generation, uint64_t prober, uint64_t threshold,
                             uint64_t now) noexcept
    int sf_breaker_claim(uint64_t *word, uint64_t generation, uint64_t prober) noexcept
    int sf_breaker_release(uint64_t *word, uint64_t prober) noexcept
    int sf_breaker_wake(uint64_t *word, uint64_t span, uint64_t now) noexcept
    void sf_breaker_announce(void *base) noexcept
