"""sglfast._radix: the simulator's radix cache, against its model and at its edges."""

import struct
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from model import RadixCacheModel

from sglfast._radix import RadixCache


def packed(chain: list[int]) -> bytes:
    return struct.pack(f"<{len(chain)}Q", *chain)


def unpacked(keys: bytes) -> list[int]:
    return list(struct.unpack(f"<{len(keys) // 8}Q", keys))


# Inverse of the multiplier of the module's hash: keys made with it can be put into any slot of the table.
UNHASH = pow(0x9E3779B97F4A7C15, -1, 2**64)


def key_of(prefix: int, kind: str) -> int:
    """The block key of a numbered prefix: small neighbours, scattered, or all in three slots at the table's end."""
    match kind:
        case "small":
            return prefix
        case "scattered":
            return prefix * 0xD6E8FEB86659FD93 % 2**64
        case _:
            return ((-1 + prefix % 3) % 2048 << 20 | prefix) * UNHASH % 2**64


def chain_of(path: list[int], kind: str) -> list[int]:
    """Block keys of a path in the tree of all prompts: one key a prefix."""
    keys, prefix = [], 1
    for branch in path:
        prefix = prefix * 3 + branch
        keys.append(key_of(prefix, kind))
    return keys


paths = st.lists(st.integers(0, 2), max_size=8)


class RadixMachine(RuleBasedStateMachine):
    """The same calls on the cache and on its model give the same answers, errors and contents."""

    @initialize(capacity=st.integers(1, 24), kind=st.sampled_from(["small", "scattered", "crowded"]))
    def start(self, capacity: int, kind: str) -> None:
        self.kind = kind
        self.cache = RadixCache(capacity)
        self.model = RadixCacheModel(capacity)
        self.locked: list[list[int]] = []

    @rule(path=paths)
    def match(self, path: list[int]) -> None:
        chain = chain_of(path, self.kind)
        assert self.cache.match(packed(chain)) == self.model.match(chain)

    @rule(path=paths, max_blocks=st.integers(0, 8))
    def match_capped(self, path: list[int], max_blocks: int) -> None:
        chain = chain_of(path, self.kind)
        max_blocks = min(max_blocks, len(chain))
        assert self.cache.match(packed(chain), max_blocks) == self.model.match(chain[:max_blocks])

    @rule(path=paths)
    def insert(self, path: list[int]) -> None:
        chain = chain_of(path, self.kind)
        start, stop, evicted = self.cache.insert(packed(chain))
        assert (start, stop, unpacked(evicted)) == self.model.insert(chain)

    @rule(path=paths, n=st.integers(0, 8))
    def insert_part(self, path: list[int], n: int) -> None:
        chain = chain_of(path, self.kind)
        n = min(n, len(chain))
        start, stop, evicted = self.cache.insert(packed(chain), n)
        assert (start, stop, unpacked(evicted)) == self.model.insert(chain[:n])

    @rule(path=paths)
    def lock_what_is_cached(self, path: list[int]) -> None:
        chain = chain_of(path, self.kind)
        chain = chain[: self.model.match(chain)]
        assert self.cache.match(packed(chain)) == len(chain)
        self.cache.lock(packed(chain))
        self.model.lock(chain)
        self.locked.append(chain)

    @rule(path=paths)
    def lock_anything(self, path: list[int]) -> None:
        chain = chain_of(path, self.kind)
        try:
            self.model.lock(chain)
        except ValueError:
            with pytest.raises(ValueError, match="is not cached"):
                self.cache.lock(packed(chain))
        else:
            self.cache.lock(packed(chain))
            self.locked.append(chain)

    @rule(data=st.data())
    def unlock(self, data: Any) -> None:
        if self.locked:
            chain = self.locked.pop(data.draw(st.integers(0, len(self.locked) - 1)))
            self.cache.unlock(packed(chain))
            self.model.unlock(chain)

    @rule()
    def clear(self) -> None:
        if self.model.users and any(self.model.users.values()):
            with pytest.raises(ValueError, match="in use"):
                self.cache.clear()
        else:
            self.cache.clear()
            self.model.clear()

    @invariant()
    def same_contents(self) -> None:
        assert sorted(unpacked(self.cache.keys())) == sorted(self.model.parent)
        assert self.cache.used_blocks == len(self.model.parent) <= self.cache.capacity_blocks
        assert self.cache.locked_blocks == sum(users > 0 for users in self.model.users.values())
        assert self.cache.evicted_blocks == self.model.evicted_blocks
        # A prefix never has a hole: every parent of a cached block is cached.
        assert all(parent is None or parent in self.model.parent for parent in self.model.parent.values())


RadixMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestRadixAgainstModel = RadixMachine.TestCase


def test_growth_keeps_every_block(rng: Any) -> None:
    cache = RadixCache(50_000)
    chain = [rng.getrandbits(64) for _ in range(20_000)]
    for length in (1, 1023, 1024, 1025, 9_000, 20_000):
        assert cache.insert(packed(chain[:length]))[1:] == (length, b"")
    assert cache.match(packed(chain)) == 20_000
    assert sorted(unpacked(cache.keys())) == sorted(chain)


def test_eviction_takes_the_oldest_prompt_from_its_end() -> None:
    cache = RadixCache(4)
    old, new = [1, 2], [11, 12]
    cache.insert(packed(old))
    cache.insert(packed(new))
    assert cache.insert(packed([21])) == (0, 1, packed([2]))
    assert cache.match(packed(old)) == 1
    # The match made the rest of the old prompt the newest, so now the other one pays.
    assert cache.insert(packed([31])) == (0, 1, packed([12]))


def test_a_chain_longer_than_the_cache_is_cut_short() -> None:
    cache = RadixCache(3)
    cache.insert(packed([91]))
    assert cache.insert(packed([1, 2, 3, 4, 5])) == (0, 3, packed([91]))
    assert cache.match(packed([1, 2, 3, 4, 5])) == 3


def test_blocks_in_use_stay() -> None:
    cache = RadixCache(2)
    cache.insert(packed([1, 2]))
    cache.lock(packed([1, 2]))
    assert cache.insert(packed([5, 6])) == (0, 0, b"")
    cache.unlock(packed([1, 2]))
    assert cache.insert(packed([5, 6])) == (0, 2, packed([2, 1]))


def test_a_key_that_occurs_twice_does_no_harm() -> None:
    cache = RadixCache(4)
    assert cache.insert(packed([7, 7, 8])) == (0, 3, b"")
    assert cache.used_blocks == 2
    assert cache.locked_blocks == 0
    cache.lock(packed([7, 7]))
    cache.unlock(packed([7, 7]))
    cache.lock(packed([7]))
    with pytest.raises(ValueError, match="block 1 of 2 is not locked"):
        cache.unlock(packed([7, 7]))
    assert cache.locked_blocks == 1
    cache.unlock(packed([7]))
    assert cache.locked_blocks == 0
    assert cache.insert(packed([1, 2, 3, 4]))[1] == 4


def test_key_zero_and_the_largest_key_are_keys_like_others() -> None:
    cache = RadixCache(2)
    chain = [0, 2**64 - 1]
    assert cache.match(packed(chain)) == 0
    cache.insert(packed(chain))
    assert cache.match(packed(chain)) == 2


def test_errors_say_what_is_wrong_and_change_nothing() -> None:
    with pytest.raises(ValueError, match="capacity_blocks must be 1"):
        RadixCache(0)
    cache = RadixCache(8)
    cache.insert(packed([1, 2]))
    with pytest.raises(ValueError, match="whole 64-bit words"):
        cache.match(b"1234567")
    with pytest.raises(ValueError, match=r"n_blocks must be 0\.\.1"):
        cache.insert(packed([9]), 2)
    with pytest.raises(ValueError, match="block 2 of 3 is not cached"):
        cache.lock(packed([1, 2, 3]))
    with pytest.raises(ValueError, match="block 0 of 2 is not locked"):
        cache.unlock(packed([1, 2]))
    assert (cache.used_blocks, cache.locked_blocks) == (2, 0)
