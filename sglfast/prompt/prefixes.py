"""What is known of the beginnings of texts: the state of their key chains, found by a digest of the beginning.

Runs in: shards (the loop and the tokenizer's thread); any thread may use it.
Contract: bounded bytes, least recently used out first. A beginning is recognized by 128 bits of XXH3 over its UTF-8, seeded per process,
    with the length of the text and everything else that decides about its keys. A wrong hit would need two texts with one digest:
    it is not to be expected by chance, and a client cannot look for one without the seed; its harm would be one wrong hint.
Why not the texts themselves: a conversation of n messages would be kept n times.
"""

import os
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Protocol

import xxhash

from sglfast._blockhash import KeyChain

_OVERHEAD_BYTES = 400  # objects and the digest around one prefix
Name = tuple[bytes, int, object]  # digest, characters, whatever else decides


@dataclass(frozen=True, slots=True)
class Prefix:
    """Chains that stand behind a beginning of a text, and the keys so far; never changed, so chains are copied before use."""

    chains: tuple[KeyChain, ...]
    keys: tuple[bytes, ...]

    @property
    def size_bytes(self) -> int:
        """What it costs to remember."""
        return _OVERHEAD_BYTES + sum(len(keys) for keys in self.keys) + sum(12 * chain.page_size + 150 for chain in self.chains)


class Sized(Protocol):
    """What a cache may hold."""

    @property
    def size_bytes(self) -> int:
        """What it costs to remember."""


class PrefixCache:
    """What is known of beginnings, by name, bounded. seed: makes the names; it must not leave the process."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._size_bytes = 0
        self._prefixes: OrderedDict[object, Sized] = OrderedDict()
        self._lock = threading.Lock()
        self.seed = int.from_bytes(os.urandom(8))

    def names(self, text: str, ends: list[int], kind: object) -> list[Name]:
        """Names of text[:end] for ascending `ends`, in one pass. Raises UnicodeEncodeError for half of a surrogate pair."""
        state = xxhash.xxh3_128(seed=self.seed)
        names: list[Name] = []
        start = 0
        for end in ends:
            state.update(text[start:end].encode())
            names.append((state.digest(), end, kind))
            start = end
        return names

    def longest(self, names: list[Name]) -> tuple[int, Prefix] | None:
        """(characters, prefix) of the last of `names` that is known, or None."""
        for name in reversed(names):
            prefix = self.get(name)
            if isinstance(prefix, Prefix):
                return name[1], prefix
        return None

    def get(self, name: object) -> Sized | None:
        """What is known by a name, or None."""
        known = self._prefixes.get(name)
        if known is not None:
            with self._lock:
                if name in self._prefixes:  # it may have gone meanwhile
                    self._prefixes.move_to_end(name)
        return known

    def first(self, names: list[bytes]) -> Sized | None:
        """What is known by the first of `names` by which anything is, or None."""
        prefixes = self._prefixes
        for name in names:
            if name in prefixes:  # most are not, and a call for each costs more than this
                known = prefixes.get(name)
                with self._lock:
                    if name in prefixes:  # it may have gone meanwhile
                        prefixes.move_to_end(name)
                return known
        return None

    def put(self, name: object, value: Sized) -> None:
        """Remember something, dropping what was least recently used when there is no room; what is huge is not remembered."""
        size_bytes = value.size_bytes
        if size_bytes > self._limit_bytes // 4:
            return
        with self._lock:
            prefixes = self._prefixes
            known = prefixes.get(name)
            if known is not None:
                self._size_bytes -= known.size_bytes
                prefixes.move_to_end(name)
            prefixes[name] = value
            self._size_bytes += size_bytes
            while self._size_bytes > self._limit_bytes:
                self._size_bytes -= prefixes.popitem(last=False)[1].size_bytes

    @property
    def size_bytes(self) -> int:
        """Bytes of all that is held now."""
        return self._size_bytes
