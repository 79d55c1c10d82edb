/* XXH3-64: the hash behind the token route's block keys. Arbitrary length, with seed; little-endian 64-bit machines only.
 *
 * Written after the published description of the algorithm (xxHash, doc/xxhash_spec.md, section XXH3); compared with the `xxhash`
 * package over every length border. Four ways by length: 0-16, 17-128, 129-240 bytes, and longer ones in stripes of 64 bytes
 * over eight accumulators. The longer ones use a secret that depends on the seed, which the caller makes once per seed.
 */
#ifndef SF_XXH3_H
#define SF_XXH3_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>
#ifdef __SSE2__
#include <immintrin.h>
#endif

#define SF_XXH3_SECRET_BYTES 192
#define SF_XXH3_STRIPE_BYTES 64
#define SF_XXH3_STRIPES_PER_BLOCK ((SF_XXH3_SECRET_BYTES - SF_XXH3_STRIPE_BYTES) / 8)

#define SF_P32_1 UINT32_C(0x9e3779b1)
#define SF_P32_2 UINT32_C(0x85ebca77)
#define SF_P32_3 UINT32_C(0xc2b2ae3d)
#define SF_P64_1 UINT64_C(0x9e3779b185ebca87)
#define SF_P64_2 UINT64_C(0xc2b2ae3d27d4eb4f)
#define SF_P64_3 UINT64_C(0x165667b19e3779f9)
#define SF_P64_4 UINT64_C(0x85ebca77c2b2ae63)
#define SF_P64_5 UINT64_C(0x27d4eb2f165667c5)

static const uint8_t sf_xxh3_secret[SF_XXH3_SECRET_BYTES] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

static inline uint32_t sf_read32(const void *p) { uint32_t x; memcpy(&x, p, 4); return x; }
static inline uint64_t sf_read64(const void *p) { uint64_t x; memcpy(&x, p, 8); return x; }
static inline uint64_t sf_rotl64(uint64_t x, int n) { return x << n | x >> (64 - n); }

static inline uint64_t sf_mul_fold(uint64_t a, uint64_t b)
{
    unsigned __int128 product = (unsigned __int128)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

static inline uint64_t sf_xxh64_avalanche(uint64_t h)
{
    h = (h ^ h >> 33) * SF_P64_2;
    h = (h ^ h >> 29) * SF_P64_3;
    return h ^ h >> 32;
}

static inline uint64_t sf_xxh3_avalanche(uint64_t h)
{
    h = (h ^ h >> 37) * UINT64_C(0x165667919e3779f9);
    return h ^ h >> 32;
}

static inline uint64_t sf_xxh3_0_to_16(const uint8_t *p, size_t n, uint64_t seed)
{
    const uint8_t *s = sf_xxh3_secret;

    if (n > 8) {
        uint64_t low = sf_read64(p) ^ ((sf_read64(s + 24) ^ sf_read64(s + 32)) + seed);
        uint64_t high = sf_read64(p + n - 8) ^ ((sf_read64(s + 40) ^ sf_read64(s + 48)) - seed);
        return sf_xxh3_avalanche(n + __builtin_bswap64(low) + high + sf_mul_fold(low, high));
    }
    if (n >= 4) {
        uint64_t h;
        seed ^= (uint64_t)__builtin_bswap32((uint32_t)seed) << 32;
        h = sf_read32(p + n - 4) + ((uint64_t)sf_read32(p) << 32);
        h ^= (sf_read64(s + 8) ^ sf_read64(s + 16)) - seed;
        h ^= sf_rotl64(h, 49) ^ sf_rotl64(h, 24);
        h *= UINT64_C(0x9fb21c651e98df25);
        h ^= (h >> 35) + n;
        h *= UINT64_C(0x9fb21c651e98df25);
        return h ^ h >> 28;
    }
    if (n) {
        uint32_t mixed = (uint32_t)p[0] << 16 | (uint32_t)p[n >> 1] << 24 | p[n - 1] | (uint32_t)n << 8;
        return sf_xxh64_avalanche(mixed ^ ((sf_read32(s) ^ sf_read32(s + 4)) + seed));
    }
    return sf_xxh64_avalanche(seed ^ sf_read64(s + 56) ^ sf_read64(s + 64));
}

static inline uint64_t sf_xxh3_mix16(const uint8_t *p, const uint8_t *s, uint64_t seed)
{
    return sf_mul_fold(sf_read64(p) ^ (sf_read64(s) + seed), sf_read64(p + 8) ^ (sf_read64(s + 8) - seed));
}

static inline uint64_t sf_xxh3_17_to_240(const uint8_t *p, size_t n, uint64_t seed)
{
    const uint8_t *s = sf_xxh3_secret;
    uint64_t acc = n * SF_P64_1;

    if (n <= 128) {
        for (size_t i = (n - 1) / 32; i < 4; i--) {
            acc += sf_xxh3_mix16(p + 16 * i, s + 32 * i, seed);
            acc += sf_xxh3_mix16(p + n - 16 * (i + 1), s + 32 * i + 16, seed);
        }
        return sf_xxh3_avalanche(acc);
    }
    for (size_t i = 0; i < 8; i++) acc += sf_xxh3_mix16(p + 16 * i, s + 16 * i, seed);
    acc = sf_xxh3_avalanche(acc);
    for (size_t i = 8; i < n / 16; i++) acc += sf_xxh3_mix16(p + 16 * i, s + 16 * (i - 8) + 3, seed);
    acc += sf_xxh3_mix16(p + n - 16, s + 136 - 17, seed);
    return sf_xxh3_avalanche(acc);
}

#ifdef __SSE2__
/* The eight accumulators, two to a register; the same numbers as the plain form below. */
static inline __m128i sf_xxh3_lane(__m128i acc, __m128i value, const uint8_t *s)
{
    __m128i keyed = _mm_xor_si128(value, _mm_loadu_si128((const __m128i *)s));
    __m128i product = _mm_mul_epu32(keyed, _mm_srli_epi64(keyed, 32));
    return _mm_add_epi64(_mm_add_epi64(acc, _mm_shuffle_epi32(value, _MM_SHUFFLE(1, 0, 3, 2))), product);
}

static inline void sf_xxh3_stripe(__m128i acc[4], const uint8_t *p, const uint8_t *s)
{
    for (int i = 0; i < 4; i++) acc[i] = sf_xxh3_lane(acc[i], _mm_loadu_si128((const __m128i *)p + i), s + 16 * i);
}

static inline void sf_xxh3_scramble(__m128i acc[4], const uint8_t *s)
{
    const __m128i prime = _mm_set1_epi64x(SF_P32_1);
    for (int i = 0; i < 4; i++) {
        __m128i mixed = _mm_xor_si128(_mm_xor_si128(acc[i], _mm_srli_epi64(acc[i], 47)), _mm_loadu_si128((const __m128i *)s + i));
        __m128i high = _mm_slli_epi64(_mm_mul_epu32(_mm_srli_epi64(mixed, 32), prime), 32);
        acc[i] = _mm_add_epi64(_mm_mul_epu32(mixed, prime), high);
    }
}
typedef __m128i sf_xxh3_acc_t[4];
#else
static inline void sf_xxh3_stripe(uint64_t acc[8], const uint8_t *p, const uint8_t *s)
{
    for (int i = 0; i < 8; i++) {
        uint64_t value = sf_read64(p + 8 * i), keyed = value ^ sf_read64(s + 8 * i);
        acc[i ^ 1] += value;
        acc[i] += (uint64_t)(uint32_t)keyed * (keyed >> 32);
    }
}

static inline void sf_xxh3_scramble(uint64_t acc[8], const uint8_t *s)
{
    for (int i = 0; i < 8; i++) acc[i] = (acc[i] ^ acc[i] >> 47 ^ sf_read64(s + 8 * i)) * SF_P32_1;
}
typedef uint64_t sf_xxh3_acc_t[8];
#endif

static const uint64_t sf_xxh3_start[8] = {SF_P32_3, SF_P64_1, SF_P64_2, SF_P64_3, SF_P64_4, SF_P32_2, SF_P64_5, SF_P32_1};

#ifdef __SSE2__
/* Four accumulators to a register, where the processor can. */
__attribute__((target("avx2"))) static inline void sf_xxh3_stripe_avx2(__m256i acc[2], const uint8_t *p, const uint8_t *s)
{
    for (int i = 0; i < 2; i++) {
        __m256i value = _mm256_loadu_si256((const __m256i *)p + i);
        __m256i keyed = _mm256_xor_si256(value, _mm256_loadu_si256((const __m256i *)s + i));
        __m256i product = _mm256_mul_epu32(keyed, _mm256_srli_epi64(keyed, 32));
        acc[i] = _mm256_add_epi64(_mm256_add_epi64(acc[i], _mm256_shuffle_epi32(value, _MM_SHUFFLE(1, 0, 3, 2))), product);
    }
}

__attribute__((target("avx2"))) static inline void sf_xxh3_scramble_avx2(__m256i acc[2], const uint8_t *s)
{
    const __m256i prime = _mm256_set1_epi64x(SF_P32_1);
    for (int i = 0; i < 2; i++) {
        __m256i mixed = _mm256_xor_si256(acc[i], _mm256_srli_epi64(acc[i], 47));
        mixed = _mm256_xor_si256(mixed, _mm256_loadu_si256((const __m256i *)s + i));
        __m256i high = _mm256_slli_epi64(_mm256_mul_epu32(_mm256_srli_epi64(mixed, 32), prime), 32);
        acc[i] = _mm256_add_epi64(_mm256_mul_epu32(mixed, prime), high);
    }
}
typedef __m256i sf_xxh3_acc_avx2_t[2];
#endif

#define SF_XXH3_ACCUMULATE(name, attributes, acc_t, stripe, scramble) \
    attributes static void name(uint64_t out[8], const uint8_t *p, size_t n, const uint8_t *s) \
    { \
        const size_t block = SF_XXH3_STRIPE_BYTES * SF_XXH3_STRIPES_PER_BLOCK; \
        const uint8_t *last = s + SF_XXH3_SECRET_BYTES - SF_XXH3_STRIPE_BYTES, *end = p + n; \
        acc_t acc; \
\
        memcpy(acc, sf_xxh3_start, sizeof sf_xxh3_start); \
        for (; (size_t)(end - p) > block; p += block) { \
            for (int i = 0; i < SF_XXH3_STRIPES_PER_BLOCK; i++) stripe(acc, p + SF_XXH3_STRIPE_BYTES * i, s + 8 * i); \
            scramble(acc, last); \
        } \
        for (; end - p > SF_XXH3_STRIPE_BYTES; p += SF_XXH3_STRIPE_BYTES, s += 8) stripe(acc, p, s); \
        stripe(acc, end - SF_XXH3_STRIPE_BYTES, last - 7); \
        memcpy(out, acc, sizeof sf_xxh3_start); \
    }
SF_XXH3_ACCUMULATE(sf_xxh3_accumulate_base, , sf_xxh3_acc_t, sf_xxh3_stripe, sf_xxh3_scramble)
#ifdef __SSE2__
SF_XXH3_ACCUMULATE(sf_xxh3_accumulate_avx2, __attribute__((target("avx2"))), sf_xxh3_acc_avx2_t, sf_xxh3_stripe_avx2, sf_xxh3_scramble_avx2)
#endif

/* The eight accumulators after an input of more than 240 bytes. */
static inline void sf_xxh3_accumulate(uint64_t out[8], const uint8_t *p, size_t n, const uint8_t *s)
{
#ifdef __SSE2__
    if (__builtin_cpu_supports("avx2")) {
        sf_xxh3_accumulate_avx2(out, p, n, s);
        return;
    }
#endif
    sf_xxh3_accumulate_base(out, p, n, s);
}

/* A number out of the accumulators, from `secret` on. */
static inline uint64_t sf_xxh3_merge(const uint64_t acc[8], const uint8_t *secret, uint64_t h)
{
    for (int i = 0; i < 4; i++)
        h += sf_mul_fold(acc[2 * i] ^ sf_read64(secret + 16 * i), acc[2 * i + 1] ^ sf_read64(secret + 16 * i + 8));
    return sf_xxh3_avalanche(h);
}

/* As sf_xxh3_long, on any processor. */
static inline uint64_t sf_xxh3_long_narrow(const uint8_t *p, size_t n, const uint8_t *s)
{
    uint64_t acc[8];
    sf_xxh3_accumulate_base(acc, p, n, s);
    return sf_xxh3_merge(acc, s + 11, n * SF_P64_1);
}

static inline uint64_t sf_xxh3_long(const uint8_t *p, size_t n, const uint8_t *s)
{
    uint64_t acc[8];
    sf_xxh3_accumulate(acc, p, n, s);
    return sf_xxh3_merge(acc, s + 11, n * SF_P64_1);
}

/* The secret for long inputs under `seed`; make it once and give it to sf_xxh3 with the same seed. */
static inline void sf_xxh3_make_secret(uint8_t secret[SF_XXH3_SECRET_BYTES], uint64_t seed)
{
    for (int i = 0; i < SF_XXH3_SECRET_BYTES; i += 16) {
        uint64_t low = sf_read64(sf_xxh3_secret + i) + seed, high = sf_read64(sf_xxh3_secret + i + 8) - seed;
        memcpy(secret + i, &low, 8);
        memcpy(secret + i + 8, &high, 8);
    }
}

static inline uint64_t sf_xxh3(const void *data, size_t n, uint64_t seed, const uint8_t *secret)
{
    if (n <= 16) return sf_xxh3_0_to_16(data, n, seed);
    if (n <= 240) return sf_xxh3_17_to_240(data, n, seed);
    return sf_xxh3_long(data, n, secret);
}

#ifdef __SSE2__
/* sf_xxh3_keyed for 8 + n bytes of more than 240 and of one block at most, so that nothing is scrambled and the stripes' sums may come
 * in any order: that with the key comes last, from registers. A key that was just stored and is loaded again with its neighbours in one
 * load of 16 bytes would stall the chain for longer than all the rest takes. */
static inline uint64_t sf_xxh3_block_keyed(uint64_t key, const uint8_t *p, size_t n, const uint8_t *s)
{
    const size_t stripes = (n + 8 - 1) / SF_XXH3_STRIPE_BYTES; /* before the last one, which may overlap */
    __m128i acc[4];
    uint64_t out[8];

    memcpy(acc, sf_xxh3_start, sizeof acc);
    for (size_t i = 1; i < stripes; i++) sf_xxh3_stripe(acc, p + SF_XXH3_STRIPE_BYTES * i - 8, s + 8 * i);
    sf_xxh3_stripe(acc, p + n - SF_XXH3_STRIPE_BYTES, s + SF_XXH3_SECRET_BYTES - SF_XXH3_STRIPE_BYTES - 7);
    for (int i = 1; i < 4; i++) acc[i] = sf_xxh3_lane(acc[i], _mm_loadu_si128((const __m128i *)(p - 8 + 16 * i)), s + 16 * i);
    acc[0] = sf_xxh3_lane(acc[0], _mm_set_epi64x((int64_t)sf_read64(p), (int64_t)key), s);
    memcpy(out, acc, sizeof out);
    return sf_xxh3_merge(out, s + 11, (n + 8) * SF_P64_1);
}
#endif

/* As sf_xxh3 of the key's 8 bytes and the `n` bytes at `data` behind them; `scratch` has room for both. */
static inline uint64_t sf_xxh3_keyed(uint64_t key, const void *data, size_t n, uint64_t seed, const uint8_t *secret, uint8_t *scratch)
{
#ifdef __SSE2__
    if (n + 8 > 240 && n + 8 <= SF_XXH3_STRIPE_BYTES * SF_XXH3_STRIPES_PER_BLOCK) return sf_xxh3_block_keyed(key, data, n, secret);
#endif
    memcpy(scratch, &key, 8);
    memcpy(scratch + 8, data, n);
    return sf_xxh3(scratch, n + 8, seed, secret);
}

/* 128 bits under `seed`, the low half first. Above 240 bytes it is XXH3-128; below, where that has formulas of its own for every
 * length, XXH3-64 under two seeds: as good a name for some bytes, and no other program reads it. */
static inline void sf_xxh3_name(const void *data, size_t n, uint64_t seed, const uint8_t *secret, uint64_t out[2])
{
    if (n <= 240) {
        out[0] = sf_xxh3(data, n, seed, secret);
        out[1] = sf_xxh3(data, n, seed ^ SF_P64_5, secret);
        return;
    }
    uint64_t acc[8];
    sf_xxh3_accumulate(acc, data, n, secret);
    out[0] = sf_xxh3_merge(acc, secret + 11, n * SF_P64_1);
    out[1] = sf_xxh3_merge(acc, secret + SF_XXH3_SECRET_BYTES - 64 - 11, ~(n * SF_P64_2));
}
#endif
