from collections.abc import Sequence
from typing import final

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

def token_keys(
    tokens: Sequence[int] | ReadableBuffer,
    page_size: int,
    *,
    bigram: bool = False,
    max_pages: int = -1,
    seed: int = 0,
    parent: int = 0,
) -> bytes:
    """Return the token route's keys of the full pages of `tokens`: 8 bytes each, native uint64.

    seed: from `chain_seed`; parent: key of the block before the first one, 0 at the root; the rest as in `page_keys`.
    key i = XXH3-64(key i-1 as 8 bytes little-endian || ids of page i as 4 bytes little-endian each, seed); a bigram page is
    page_size + 1 ids; a page with an id of 2**32 or more is the byte 0xff and its ids as 8 bytes each.
    Raises as `page_keys`; OverflowError when seed or parent is no uint64.
    """

def chain_seed(model: str, block_size: int, *, bigram: bool = False, lora_name: str = "", cache_salt: str = "") -> int:
    """Return the seed of `token_keys`, equal for shards and index when all of these are.

    XXH3-64 with seed 0 of: block_size as 4 bytes little-endian, bigram as one byte (0 or 1), then for each of model, lora_name
    and cache_salt ("" = none) its UTF-8 length as 4 bytes little-endian and its UTF-8 bytes.
    """

def xxh3(data: ReadableBuffer, seed: int = 0, *, is_narrow: bool = False) -> int:
    """Return the XXH3-64 hash of some contiguous bytes. is_narrow: as on a processor without registers of 32 bytes."""

@final
class KeyChain:
    """`page_keys` of a text whose tokens become known bit by bit: each token is hashed once. With `seed`: its `token_keys`.

    tokens, pages: how many of each so far. Raises ValueError: page_size below 1 or above 2**24, both a salt and a seed (from
    `chain_seed`, which has the salt in it), a parent without a seed; OverflowError when the seed or the parent is no uint64. Of one
    thread at a time.
    """

    @property
    def page_size(self) -> int: ...
    @property
    def bigram(self) -> bool: ...
    @property
    def tokens(self) -> int: ...
    @property
    def pages(self) -> int: ...
    @property
    def missing(self) -> int:
        """Tokens until the next page is full; at least 1."""

    def __new__(
        cls, page_size: int, *, bigram: bool = False, cache_salt: bytes = b"", seed: int | None = None, parent: int = 0
    ) -> KeyChain: ...
    def extend(self, tokens: ReadableBuffer) -> bytes:
        """Go on with `tokens`, a contiguous buffer of uint32; return the keys of the pages that are full now and were not before.

        Raises ValueError for a buffer of another kind, then nothing has changed.
        """

    def copy(self) -> KeyChain:
        """Return a chain that goes on from here by itself."""
