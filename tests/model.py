"""Reference models of the compiled modules: the smallest Python that is obviously right.

The compiled modules are compared with these by property tests; nothing at run time imports them.
"""

import hashlib
import itertools
from typing import Any

import xxhash

# ---- sglfast._radix ----


class RadixCacheModel:
    """What sglfast._radix.RadixCache does, with a real tree: every block knows its parent, users and last use."""

    def __init__(self, capacity_blocks: int) -> None:
        self.capacity_blocks = capacity_blocks
        self.parent: dict[int, int | None] = {}
        self.users: dict[int, int] = {}
        self.last_use: dict[int, int] = {}
        self.clock = 0
        self.evicted_blocks = 0

    def _use(self, chain: list[int]) -> None:
        """Renew a prefix, deepest block first: a parent is never older than its child."""
        for key in reversed(chain):
            self.clock += 1
            self.last_use[key] = self.clock

    def _leaves(self) -> list[int]:
        parents = set(self.parent.values())
        return [key for key in self.parent if key not in parents]

    def match(self, chain: list[int]) -> int:
        cached = 0
        while cached < len(chain) and chain[cached] in self.parent:
            cached += 1
        self._use(chain[:cached])
        return cached

    def insert(self, chain: list[int]) -> tuple[int, int, list[int]]:
        evicted = []
        start = self.match(chain)
        stop = start
        for key in chain[start:]:
            if len(self.parent) == self.capacity_blocks:
                free = [leaf for leaf in self._leaves() if not self.users[leaf] and leaf not in chain[:stop]]
                if not free:
                    break
                oldest = min(free, key=self.last_use.__getitem__)
                del self.parent[oldest], self.users[oldest], self.last_use[oldest]
                evicted.append(oldest)
            self.parent[key] = chain[stop - 1] if stop else None
            self.users[key] = 0
            self._use([key])
            stop += 1
        self._use(chain[:stop])
        self.evicted_blocks += len(evicted)
        return start, stop, evicted

    def lock(self, chain: list[int]) -> None:
        if any(key not in self.parent for key in chain):
            raise ValueError("not cached")
        for key in chain:
            self.users[key] += 1

    def unlock(self, chain: list[int]) -> None:
        if any(not self.users.get(key) for key in chain):
            raise ValueError("not locked")
        for key in chain:
            self.users[key] -= 1
        self._use([key for key in chain if not self.users[key]])

    def clear(self) -> None:
        if any(self.users.values()):
            raise ValueError("in use")
        self.parent.clear()
        self.users.clear()
        self.last_use.clear()


# ---- sglfast._blockhash ----


def page_hashes(token_ids: list[int], page_size: int, *, bigram: bool = False, max_pages: int = -1, cache_salt: bytes = b"") -> list[int]:
    """Block keys of a prompt, as spec/kv_events.md 2.1-2.3 tells it: units, pages, chained digests."""
    units: list[tuple[int, ...]] = list(itertools.pairwise(token_ids)) if bigram else [(token,) for token in token_ids]
    digest = hashlib.sha256(b"sglang-cache-salt-v1\0" + cache_salt).digest() if cache_salt else b""
    keys: list[int] = []
    for start in range(0, len(units) - page_size + 1, page_size):
        if len(keys) == max_pages:
            break
        ids = [token for unit in units[start : start + page_size] for token in unit]
        if max(ids) < 2**32:
            page = b"".join(token.to_bytes(4, "little") for token in ids)
        else:
            page = b"\xff" + b"".join(token.to_bytes(8, "little") for token in ids)
        digest = hashlib.sha256(digest + page).digest()
        keys.append(int.from_bytes(digest[:8], "big"))
    return keys


def token_hashes(
    token_ids: list[int], page_size: int, *, bigram: bool = False, max_pages: int = -1, seed: int = 0, parent: int = 0
) -> list[int]:
    """Block keys of the token route, as cext/blockhash.pyx tells them."""
    keys: list[int] = []
    for start in range(0, len(token_ids) - bigram - page_size + 1, page_size):
        if len(keys) == max_pages:
            break
        ids = token_ids[start : start + page_size + bigram]
        mark, n_bytes = (b"", 4) if max(ids) < 2**32 else (b"\xff", 8)
        page = mark + b"".join(token.to_bytes(n_bytes, "little") for token in ids)
        parent = xxhash.xxh3_64_intdigest(parent.to_bytes(8, "little") + page, seed)
        keys.append(parent)
    return keys


# ---- sglfast._hashtree ----


class HashTreeModel:
    """What TreeWriter and TreeReader do, with a dict: key -> set of (rank, tier), in the order in which keys came to life."""

    def __init__(self, capacity_blocks: int) -> None:
        self.capacity_blocks = capacity_blocks
        self.owners: dict[int, set[tuple[int, int]]] = {}
        self.stored_total = self.removed_total = self.evicted_total = self.generation = 0

    def _owns(self, rank: int, key: int, tiers: int = 7) -> bool:
        return any(owner == rank and tiers >> tier & 1 for owner, tier in self.owners.get(key, ()))

    def reset(self) -> None:
        self.owners.clear()
        self.generation += 1

    def store(self, rank: int, tier: int, keys: list[int]) -> int:
        added = 0
        for key in keys:
            if key not in self.owners:
                if len(self.owners) == self.capacity_blocks:
                    del self.owners[next(iter(self.owners))]
                    self.evicted_total += 1
                self.owners[key] = set()
            added += not self._owns(rank, key)
            self.owners[key].add((rank, tier))
        self.stored_total += added
        return added

    def remove(self, rank: int, tiers: int, keys: list[int]) -> int:
        gone = 0
        for key in keys:
            if self._owns(rank, key):
                self.owners[key] -= {(rank, tier) for tier in range(3) if tiers >> tier & 1}
                gone += not self._owns(rank, key)
                if not self.owners[key]:
                    del self.owners[key]
        self.removed_total += gone
        return gone

    def clear(self, rank: int) -> int:
        return self.remove(rank, 7, list(self.owners))

    def match(self, keys: list[int], tiers: int) -> dict[int, int]:
        """Overlap in blocks of each rank that has one."""
        overlaps: dict[int, int] = {}
        alive = {rank for owners in self.owners.values() for rank, _ in owners}
        for depth, key in enumerate(keys, 1):
            alive = {rank for rank in alive if self._owns(rank, key, tiers)}
            overlaps |= dict.fromkeys(alive, depth)
        return overlaps

    def owned_blocks(self, rank: int) -> int:
        return sum(self._owns(rank, key) for key in self.owners)


# ---- sglfast._counters.RankLoads ----


def rank_choices(
    loads: list[tuple[int, int]],
    overlaps: dict[int, int],
    prompt_tokens: int,
    enough_tokens: float,
    abs_threshold: int,
    rel_threshold: float,
) -> tuple[set[int], str]:
    """(ranks that may be chosen, why): loads: (requests, tokens in flight) of each; overlaps: tokens of the prompt by rank."""
    low = min(requests for requests, _ in loads)
    fit = {rank for rank, (requests, _) in enumerate(loads) if requests - low <= abs_threshold or requests <= low * rel_threshold}
    longest = max(overlaps.values(), default=0)
    owners = {rank for rank, tokens in overlaps.items() if tokens == longest}
    if longest > enough_tokens and owners & fit:
        fewest = min(loads[rank][0] for rank in owners & fit)
        return {rank for rank in owners & fit if loads[rank][0] == fewest}, "hit"

    def work(rank: int) -> tuple[int, int]:
        return loads[rank][1] + max(0, prompt_tokens - overlaps.get(rank, 0)), loads[rank][0]

    least = min(map(work, fit))
    return {rank for rank in fit if work(rank) == least}, "overloaded" if longest > enough_tokens else "least"


# ---- sglfast._predicted ----

PROMPT_FIELDS = ("input_ids", "messages", "prompt", "input", "text")  # the first that a body has is its prompt
CONTEXT_FIELDS = (
    "model", "tools", "cache_salt", "lora_path", "extra_key", "chat_template_kwargs", "instructions", "reasoning_effort",
)  # fmt: skip


def text_cuts(prompt_bytes: int, keys_max: int = 192) -> list[int]:
    """Where the pieces of a prompt end: steps of 128 bytes, from 2 KiB on a sixteenth of the last power of two."""
    cuts: list[int] = []
    at = 0
    while len(cuts) < keys_max:
        at += max(128, 1 << at.bit_length() - 1 >> 4 if at else 0)
        if at > prompt_bytes:
            break
        cuts.append(at)
    return cuts


def text_keys(members: dict[str, bytes]) -> tuple[list[int], int]:
    """Keys of a body's prompt and its bytes; members: the raw JSON value of each name."""
    prompt = next((members[name] for name in PROMPT_FIELDS if members.get(name, b"")[:1] in {b'"', b"[", b"{"}), b"")
    context = [(i, members[name]) for i, name in enumerate(CONTEXT_FIELDS) if members.get(name, b"null") != b"null"]
    key = sum(xxhash.xxh3_64_intdigest(value) * (2 * i + 3) for i, value in context)
    keys: list[int] = []
    at = 0
    for cut in text_cuts(len(prompt)) or [len(prompt)] * (len(prompt) >= 16):
        piece = xxhash.xxh3_64_intdigest(prompt[at:cut])
        key = xxhash.xxh3_64_intdigest((key % 2**64).to_bytes(8, "little") + piece.to_bytes(8, "little"))
        keys.append(key or 1)
        at = cut
    return keys, len(prompt)


class PredictedModel:
    """A table of predictions: sets of eight ways, each [key, touched_ms, ranks in flight, ranks that keep it], in their places."""

    def __init__(self, n_sets: int) -> None:
        self.sets: list[list[list[Any] | None]] = [[None] * 8 for _ in range(n_sets)]
        self.evicted = 0

    def _set(self, key: int) -> list[list[Any] | None]:
        return self.sets[key * len(self.sets) >> 64]

    def find(self, key: int) -> list[Any] | None:
        return next((way for way in self._set(key) if way is not None and way[0] == key), None)

    def add(self, key: int, rank: int, kind: int, now_ms: int) -> None:
        """kind: 2 = in flight, 3 = kept."""
        way = self.find(key)
        if way is None:
            places = self._set(key)
            free = [place for place, held in enumerate(places) if held is None]
            oldest = min(range(8), key=lambda place: (places[place] or [0, 0])[1])
            self.evicted += not free
            way = places[free[0] if free else oldest] = [key, now_ms, set(), set()]
        way[1] = now_ms
        way[kind].add(rank)

    def drop(self, key: int, rank: int, kind: int) -> None:
        way = self.find(key)
        if way is not None:
            way[kind].discard(rank)
            if not way[2] and not way[3]:
                places = self._set(key)
                places[places.index(way)] = None

    def settle(self, key: int, rank: int) -> None:
        way = self.find(key)
        if way is not None:
            way[3].add(rank)
            self.drop(key, rank, 2)

    def clear(self, ranks: list[int]) -> None:
        for key in [way[0] for places in self.sets for way in places if way is not None]:
            for rank in ranks:
                self.drop(key, rank, 2)
                self.drop(key, rank, 3)

    def owners(self, key: int, now_ms: int, flight_ms: int, kept_ms: float) -> tuple[set[int], set[int]]:
        """(ranks that were routed the key, those in flight)."""
        way = self.find(key)
        if way is None:
            return set(), set()
        age_ms = max(0, now_ms - way[1])
        flying = set(way[2]) if age_ms <= flight_ms else set()
        return flying | (set(way[3]) if age_ms <= kept_ms else set()), flying

    def kept_blocks(self, rank: int) -> int:
        return sum(way is not None and rank in way[3] for places in self.sets for way in places)
