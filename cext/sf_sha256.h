/* SHA-256 (FIPS 180-4) over a stream of bytes, with the processor's SHA instructions where it has them.
 *
 * Runs in: every process that makes block keys. Contract: no allocation, no Python, no locks; a sf_sha256_t belongs to one
 *     thread. sf_sha256_setup must run once before anything else (the module's import does it); both kernels give the same
 *     bytes, the test hashes everything with each.
 * Why not OpenSSL: its context setup per page costs more than the page, and a prompt has hundreds of them.
 */
#ifndef SF_SHA256_H
#define SF_SHA256_H

#include <stddef.h>
#include <stdint.h>

#define SF_SHA256_DIGEST_BYTES 32
#define SF_SHA256_BLOCK_BYTES 64

typedef struct {
    uint32_t h[8];                          /* after sf_sha256_finish: the digest as eight big-endian words */
    uint64_t total_bytes;                   /* hashed so far */
    uint8_t block[SF_SHA256_BLOCK_BYTES];   /* bytes that do not fill a block yet: total_bytes % 64 of them */
} sf_sha256_t;

/* Choose the kernel; returns 1 for the SHA instructions, 0 for portable C. */
int sf_sha256_setup(int force_portable);

void sf_sha256_start(sf_sha256_t *s);
void sf_sha256_add(sf_sha256_t *s, const void *data, size_t length);
void sf_sha256_finish(sf_sha256_t *s, uint8_t digest[SF_SHA256_DIGEST_BYTES]);

#endif
