"""The token route's keys: XXH3-64 against the xxhash package, the chain against its formula in Python, bad input."""

import array
import os
import struct

import pytest
import xxhash
from hypothesis import example, given
from hypothesis import strategies as st
from model import token_hashes

from sglfast._blockhash import chain_seed, token_keys, xxh3

U64 = 2**64 - 1
SEEDS = st.sampled_from((0, 1, 1337, 2**63, U64)) | st.integers(0, U64)


def keys_of(packed: bytes) -> list[int]:
    return list(struct.unpack(f"<{len(packed) // 8}Q", packed))


@pytest.mark.parametrize("seed", [0, 1, 2**63 + 12345, U64])
def test_xxh3_of_every_length(seed: int) -> None:
    """All lengths from 0 to 4096, with them every border of the algorithm: 3, 8, 16, 128, 240, blocks of 1024."""
    data = os.urandom(4097)
    for n in range(4097):
        hashed = xxhash.xxh3_64_intdigest(data[:n], seed)
        assert xxh3(data[:n], seed) == hashed, n
        assert xxh3(data[:n], seed, is_narrow=True) == hashed, n


@given(st.binary(max_size=300), SEEDS)
def test_xxh3_of_any_bytes(data: bytes, seed: int) -> None:
    assert xxh3(data, seed) == xxhash.xxh3_64_intdigest(data, seed)


@given(
    st.lists(st.integers(0, 2**32 - 1) | st.integers(0, U64), max_size=60),
    st.integers(1, 9),
    st.booleans(),
    st.integers(-1, 5),
    SEEDS,
    SEEDS,
)
@example([1] * 60, 59, True, -1, 0, 0)
def test_chain_is_its_formula(tokens: list[int], page_size: int, bigram: bool, max_pages: int, seed: int, parent: int) -> None:
    keys = keys_of(token_keys(tokens, page_size, bigram=bigram, max_pages=max_pages, seed=seed, parent=parent))
    assert keys == token_hashes(tokens, page_size, bigram=bigram, max_pages=max_pages, seed=seed, parent=parent)
    if max(tokens, default=0) < 2**32:
        buffer = array.array("I", tokens)
        assert keys == keys_of(token_keys(buffer, page_size, bigram=bigram, max_pages=max_pages, seed=seed, parent=parent))


@pytest.mark.parametrize("bigram", [False, True])
def test_chain_of_every_page_size(bigram: bool) -> None:
    """Page sizes from 1 to 300: with them every way that the hash of a key and a page can take, and the borders between them."""
    for page_size in range(1, 301):
        tokens = [(page_size * 977 + i * 31) % 128_000 for i in range(2 * page_size + 1)]
        expected = token_hashes(tokens, page_size, bigram=bigram, seed=7, parent=U64)
        assert keys_of(token_keys(tokens, page_size, bigram=bigram, seed=7, parent=U64)) == expected, page_size
        assert keys_of(token_keys(array.array("I", tokens), page_size, bigram=bigram, seed=7, parent=U64)) == expected, page_size


@given(st.lists(st.integers(0, 2**40), min_size=4, max_size=60), st.integers(1, 5), st.booleans(), SEEDS)
def test_chain_continues_from_any_key(tokens: list[int], page_size: int, bigram: bool, seed: int) -> None:
    whole = keys_of(token_keys(tokens, page_size, bigram=bigram, seed=seed))
    for page in range(1, len(whole)):
        rest = token_keys(tokens[page * page_size :], page_size, bigram=bigram, seed=seed, parent=whole[page - 1])
        assert keys_of(rest) == whole[page:]


def test_seed_is_its_formula_and_keeps_things_apart() -> None:
    def expected(block_size: int, bigram: bool, *texts: str) -> int:
        data = struct.pack("<IB", block_size, bigram)
        for text in texts:
            data += struct.pack("<I", len(text.encode())) + text.encode()
        return xxhash.xxh3_64_intdigest(data)

    seeds = [
        (chain_seed("m", 64), expected(64, False, "m", "", "")),
        (chain_seed("m", 16), expected(16, False, "m", "", "")),
        (chain_seed("m", 64, bigram=True), expected(64, True, "m", "", "")),
        (chain_seed("n", 64), expected(64, False, "n", "", "")),
        (chain_seed("m", 64, lora_name="ä"), expected(64, False, "m", "ä", "")),
        (chain_seed("m", 64, cache_salt="ä"), expected(64, False, "m", "", "ä")),
        (chain_seed("", 64, lora_name="m"), expected(64, False, "", "m", "")),
    ]
    for seed, want in seeds:
        assert seed == want
    assert len({seed for seed, _ in seeds}) == len(seeds)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="page_size"):
        token_keys([1], 0)
    with pytest.raises(ValueError, match="token id 1"):
        token_keys([1, -1], 2)
    with pytest.raises(ValueError, match="uint32"):
        token_keys(array.array("H", [1, 2]), 1)
    with pytest.raises(OverflowError):
        token_keys([1], 1, parent=2**64)
    with pytest.raises(OverflowError):
        token_keys([1], 1, seed=-1)
    assert token_keys([], 1) == token_keys([1, 2], 3) == b""
