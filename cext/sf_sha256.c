/* See sf_sha256.h. The portable kernel follows FIPS 180-4 section 6.2.2 line by line; the other does the same with the
 * x86 SHA extensions (Intel SDM volume 2, SHA256RNDS2, SHA256MSG1, SHA256MSG2), four rounds at a time.
 */
#include "sf_sha256.h"

#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

typedef void (*sf_compress_t)(uint32_t h[8], const uint8_t *data, size_t blocks);

/* FIPS 180-4, 4.2.2: fractional parts of the cube roots of the first 64 primes. */
static const uint32_t K[64] __attribute__((aligned(16))) = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

static inline uint32_t load_be32(const uint8_t *p)
{
    return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3];
}

static inline void store_be32(uint8_t *p, uint32_t x)
{
    p[0] = (uint8_t)(x >> 24);
    p[1] = (uint8_t)(x >> 16);
    p[2] = (uint8_t)(x >> 8);
    p[3] = (uint8_t)x;
}

static inline uint32_t rotr(uint32_t x, int n) { return x >> n | x << (32 - n); }

static void compress_portable(uint32_t h[8], const uint8_t *data, size_t blocks)
{
    uint32_t w[64];

    for (; blocks; blocks--, data += SF_SHA256_BLOCK_BYTES) {
        uint32_t a = h[0], b = h[1], c = h[2], d = h[3], e = h[4], f = h[5], g = h[6], hh = h[7];

        for (int t = 0; t < 16; t++)
            w[t] = load_be32(data + 4 * t);
        for (int t = 16; t < 64; t++) {
            uint32_t s0 = rotr(w[t - 15], 7) ^ rotr(w[t - 15], 18) ^ w[t - 15] >> 3;
            uint32_t s1 = rotr(w[t - 2], 17) ^ rotr(w[t - 2], 19) ^ w[t - 2] >> 10;
            w[t] = s1 + w[t - 7] + s0 + w[t - 16];
        }
        for (int t = 0; t < 64; t++) {
            uint32_t big1 = rotr(e, 6) ^ rotr(e, 11) ^ rotr(e, 25);
            uint32_t big0 = rotr(a, 2) ^ rotr(a, 13) ^ rotr(a, 22);
            uint32_t t1 = hh + big1 + ((e & f) ^ (~e & g)) + K[t] + w[t];
            uint32_t t2 = big0 + ((a & b) ^ (a & c) ^ (b & c));
            hh = g, g = f, f = e, e = d + t1, d = c, c = b, b = a, a = t1 + t2;
        }
        h[0] += a, h[1] += b, h[2] += c, h[3] += d, h[4] += e, h[5] += f, h[6] += g, h[7] += hh;
    }
}

#if defined(__x86_64__)
/* The instructions keep the eight working variables as two registers: a,b,e,f and c,d,g,h, the first in the top lane. */
__attribute__((target("sha,sse4.1,ssse3")))
static void compress_shani(uint32_t h[8], const uint8_t *data, size_t blocks)
{
    const __m128i swap = _mm_set_epi8(12, 13, 14, 15, 8, 9, 10, 11, 4, 5, 6, 7, 0, 1, 2, 3);
    __m128i abef = _mm_set_epi32((int)h[0], (int)h[1], (int)h[4], (int)h[5]);
    __m128i cdgh = _mm_set_epi32((int)h[2], (int)h[3], (int)h[6], (int)h[7]);
    uint32_t lanes[8];

    for (; blocks; blocks--, data += SF_SHA256_BLOCK_BYTES) {
        const __m128i abef_before = abef, cdgh_before = cdgh;
        __m128i w[4]; /* the last 16 schedule words, four in each, as a ring */

#pragma GCC unroll 16
        for (int group = 0; group < 16; group++) {
            __m128i sum;

            if (group < 4) {
                w[group] = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(data + 16 * group)), swap);
            } else {
                __m128i next = _mm_sha256msg1_epu32(w[group & 3], w[(group + 1) & 3]);
                next = _mm_add_epi32(next, _mm_alignr_epi8(w[(group + 3) & 3], w[(group + 2) & 3], 4));
                w[group & 3] = _mm_sha256msg2_epu32(next, w[(group + 3) & 3]);
            }
            sum = _mm_add_epi32(w[group & 3], _mm_load_si128((const __m128i *)(K + 4 * group)));
            cdgh = _mm_sha256rnds2_epu32(cdgh, abef, sum);
            abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(sum, 0x0e));
        }
        abef = _mm_add_epi32(abef, abef_before);
        cdgh = _mm_add_epi32(cdgh, cdgh_before);
    }
    _mm_storeu_si128((__m128i *)lanes, abef);
    _mm_storeu_si128((__m128i *)(lanes + 4), cdgh);
    h[0] = lanes[3], h[1] = lanes[2], h[4] = lanes[1], h[5] = lanes[0];
    h[2] = lanes[7], h[3] = lanes[6], h[6] = lanes[5], h[7] = lanes[4];
}

static int has_sha_instructions(void)
{
    unsigned a, b, c, d;

    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_SSSE3) || !(c & bit_SSE4_1))
        return 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & bit_SHA);
}
#endif

static sf_compress_t compress = compress_portable;

int sf_sha256_setup(int force_portable)
{
    compress = compress_portable;
#if defined(__x86_64__)
    if (!force_portable && has_sha_instructions()) {
        compress = compress_shani;
        return 1;
    }
#endif
    return 0;
}

void sf_sha256_start(sf_sha256_t *s)
{
    /* FIPS 180-4, 5.3.3: fractional parts of the square roots of the first eight primes. */
    static const uint32_t first[8] = {
        0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19,
    };
    memcpy(s->h, first, sizeof first);
    s->total_bytes = 0;
}

void sf_sha256_add(sf_sha256_t *s, const void *data, size_t length)
{
    const uint8_t *p = data;
    size_t filled = s->total_bytes % SF_SHA256_BLOCK_BYTES, blocks;

    s->total_bytes += length;
    if (filled) {
        size_t part = SF_SHA256_BLOCK_BYTES - filled;
        if (length < part) {
            memcpy(s->block + filled, p, length);
            return;
        }
        memcpy(s->block + filled, p, part);
        compress(s->h, s->block, 1);
        p += part, length -= part;
    }
    blocks = length / SF_SHA256_BLOCK_BYTES;
    if (blocks)
        compress(s->h, p, blocks);
    memcpy(s->block, p + blocks * SF_SHA256_BLOCK_BYTES, length % SF_SHA256_BLOCK_BYTES);
}

void sf_sha256_finish(sf_sha256_t *s, uint8_t digest[SF_SHA256_DIGEST_BYTES])
{
    size_t filled = s->total_bytes % SF_SHA256_BLOCK_BYTES;
    uint64_t bits = s->total_bytes * 8;

    s->block[filled++] = 0x80;
    if (filled > SF_SHA256_BLOCK_BYTES - 8) {
        memset(s->block + filled, 0, SF_SHA256_BLOCK_BYTES - filled);
        compress(s->h, s->block, 1);
        filled = 0;
    }
    memset(s->block + filled, 0, SF_SHA256_BLOCK_BYTES - 8 - filled);
    store_be32(s->block + 56, (uint32_t)(bits >> 32));
    store_be32(s->block + 60, (uint32_t)bits);
    compress(s->h, s->block, 1);
    for (int i = 0; i < 8; i++)
        store_be32(digest + 4 * i, s->h[i]);
}
