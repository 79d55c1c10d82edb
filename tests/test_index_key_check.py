"""One root block tells whether shards will find a rank's blocks, and if not, why: the way of cutting is named."""

import itertools
from typing import Any

import msgspec
import pytest

from sglfast._blockhash import page_keys
from sglfast.errors import KvEventError
from sglfast.index.key_check import Found, disagreement
from sglfast.shm import RANK_REASONS
from sglfast.wire.kv_events import BlockStored

TOKENS = list(range(1000, 1257))
AGREES = (0, "")


def root(*, said: int = 64, cut: int = 64, bigram: bool = False, pairs: bool = False, **fields: Any) -> BlockStored:
    """A root store of 256 tokens that says `said` tokens a block; its hashes are those of blocks of `cut`, of pairs if `bigram`."""
    ids: list[Any] = [list(pair) for pair in itertools.pairwise(TOKENS)] if pairs else TOKENS[:256]
    keys = page_keys(TOKENS if bigram else TOKENS[:256], cut, bigram=bigram, cache_salt=fields.get("cache_salt", "").encode())
    return BlockStored(keys, None, msgspec.Raw(msgspec.msgpack.encode(ids)), said, **fields)


def check(event: BlockStored, *, block_size: int = 64, is_bigram: bool = False, is_by_tokens: bool = False) -> Found | None:
    return disagreement(event, block_size=block_size, is_bigram=is_bigram, is_by_tokens=is_by_tokens)


def test_agreement() -> None:
    assert check(root()) == AGREES
    assert check(root(cache_salt="s")) == AGREES
    assert check(root(said=16, cut=16), block_size=16) == AGREES
    assert check(root(bigram=True, pairs=True), is_bigram=True) == AGREES
    assert check(root(cut=16), is_by_tokens=True) == AGREES, "on the token route hashes are names"


def test_what_cannot_tell() -> None:
    assert check(root(lora_name="ad")) is None
    assert check(root(lora_id=3)) is None
    assert check(BlockStored(b"12345678", None, msgspec.Raw(b"\x90"), 64)) is None
    assert check(BlockStored(b"12345678", None, msgspec.Raw(b"\x90"), 0)) is None
    assert check(root(lora_name="ad"), is_by_tokens=True) == AGREES


@pytest.mark.parametrize(
    ("event", "is_bigram", "reason", "words"),
    [
        (root(said=16, cut=16), False, "another number of tokens", "its blocks hold 16 tokens, 64 are expected"),
        (root(cut=16), False, "another number of tokens", "its block hashes are those of blocks of 16 tokens, 64 are expected"),
        (root(bigram=True, pairs=True), False, "the worker says single tokens", "keyed by pairs of tokens (EAGLE), single"),
        (root(bigram=True), False, "the worker says single tokens", "keyed by pairs of tokens (EAGLE), single"),
        (root(), True, "the worker says pairs", "keyed by single tokens, pairs"),
        (root(pairs=True), True, "the worker says pairs", "keyed by single tokens, pairs"),
        (root(cut=3), False, "differ from the SHA-256 chain", "not SGLang's SHA-256 chain"),
    ],
)
def test_what_disagrees_is_named(event: BlockStored, is_bigram: bool, reason: str, words: str) -> None:
    found = check(event, is_bigram=is_bigram)
    assert found is not None
    assert reason in RANK_REASONS[found[0]]
    assert words in found[1]


def test_by_tokens_only_the_cut_can_differ() -> None:
    for event, words in ((root(said=16), "16 tokens"), (root(pairs=True), "pairs")):
        found = check(event, is_by_tokens=True)
        assert found is not None
        assert words in found[1]


def test_unreadable_tokens() -> None:
    with pytest.raises(KvEventError):
        check(BlockStored(b"12345678", None, msgspec.Raw(msgspec.msgpack.encode(["a"])), 64))
    found = check(BlockStored(b"12345678", None, msgspec.Raw(msgspec.msgpack.encode([-1] * 64)), 64))
    assert found is not None
    assert "cannot be hashed" in found[1]
