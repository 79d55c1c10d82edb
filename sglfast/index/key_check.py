"""Does a rank key its blocks as shards do? One root block tells, recomputed from its own tokens.

Runs in: index. Pure. Why: a shard finds a block only if it computes the engine's key from the prompt. EAGLE pairs, another block size,
    another format or another engine make all keys differ, and then every lookup misses without a word. Where the hashes are
    SGLang's chain of the same tokens cut in another way, that way is named. On the token route the keys are ours, so there only
    block size and pairs can differ.
Source: spec/kv_events.md 2.1 to 2.3, 2.8.
"""

from sglfast._blockhash import page_keys
from sglfast.shm import REASON_BLOCK_SIZE, REASON_HASH_MISMATCH, REASON_NONE, REASON_PAIRS, REASON_SINGLES
from sglfast.wire.kv_events import BlockStored, decode_token_ids

_CHECKED_PAGES = 4
# Tried where an event's hashes do not fit what it says of itself.
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)

Found = tuple[int, str]
_AGREES: Found = (REASON_NONE, "")


def disagreement(event: BlockStored, *, block_size: int, is_bigram: bool, is_by_tokens: bool) -> Found | None:
    """(position in RANK_REASONS, sentence), (0, "") when keys agree; None when this event cannot tell.

    It cannot without tokens, and on the SHA route not when its hashes are a LoRA adapter's. block_size, is_bigram: what shards use for
    the worker. Raises KvEventError when the token ids cannot be read.
    """
    is_adapter = event.lora_name is not None or event.lora_id is not None
    if (is_adapter and not is_by_tokens) or not event.block_size or not event.keys:
        return None
    units = decode_token_ids(event.token_ids)
    if not units:
        return None
    has_pairs = isinstance(units[0], tuple)
    tokens = [unit[0] if isinstance(unit, tuple) else unit for unit in units]
    last = units[-1]
    if isinstance(last, tuple):
        tokens.append(last[1])
    if event.block_size != block_size:
        hint = f" (for --kv-endpoint: block_size={event.block_size})" if is_by_tokens else ""
        return REASON_BLOCK_SIZE, f"its blocks hold {event.block_size} tokens, {block_size} are expected{hint}"
    if has_pairs != is_bigram:
        return _pairs(has_pairs)
    if is_by_tokens:
        return _AGREES
    try:
        if _is_chain(event, tokens, block_size, is_bigram=is_bigram):
            return _AGREES
        for bigram in (False, True):
            for size in _SIZES:
                if (size, bigram) != (block_size, is_bigram) and _is_chain(event, tokens, size, is_bigram=bigram):
                    return _pairs(bigram) if size == block_size else _cut_otherwise(size, block_size)
    except ValueError as error:
        return REASON_HASH_MISMATCH, f"its token ids cannot be hashed: {error}"
    return REASON_HASH_MISMATCH, "its block hashes are not SGLang's SHA-256 chain of the event's tokens"


def _pairs(are_pairs: bool) -> Found:
    if are_pairs:
        return REASON_PAIRS, "its blocks are keyed by pairs of tokens (EAGLE), single tokens are expected"
    return REASON_SINGLES, "its blocks are keyed by single tokens, pairs of tokens (EAGLE) are expected"


def _cut_otherwise(size: int, expected: int) -> Found:
    return REASON_BLOCK_SIZE, f"its block hashes are those of blocks of {size} tokens, {expected} are expected"


def _is_chain(event: BlockStored, tokens: list[int], size: int, *, is_bigram: bool) -> bool:
    """Are the first hashes SGLang's chain of the tokens, cut so?"""
    used = tokens[: _CHECKED_PAGES * size + is_bigram]
    keys = page_keys(used, size, bigram=is_bigram, max_pages=_CHECKED_PAGES, cache_salt=(event.cache_salt or "").encode())
    n_bytes = min(len(keys), len(event.keys))
    return n_bytes > 0 and keys[:n_bytes] == event.keys[:n_bytes]
