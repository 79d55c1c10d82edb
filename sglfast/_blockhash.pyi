from collections.abc import Sequence

from _typeshed import ReadableBuffer

SALT_PREFIX: bytes

def kernel() -> str:
    """Return the SHA-256 kernel in use: "shani" or "portable" (forced with the environment's SGLFAST_SHA=portable)."""

def page_keys(
    tokens: Sequence[int] | ReadableBuffer,
    page_size: int,
    *,
    bigram: bool = False,
    max_pages: int = -1,
    cache_salt: bytes = b"",
) -> bytes:
    """Return the block keys of the full pages of `tokens`: 8 bytes each, native uint64.

    tokens: a sequence of int, or a contiguous buffer of uint32 (array('I'), numpy); page_size: tokens a page;
    bigram: pages of overlapping pairs, (n - 1) // page_size of them; max_pages: at most so many, -1 for all.
    Raises ValueError: page_size below 1, an id below 0 or above 2**64 - 1, a buffer of another kind;
    TypeError: an id that is no int. Format: spec/kv_events.md 2.1-2.3.
    """
