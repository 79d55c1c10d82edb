"""Reference models of the compiled modules: the smallest Python that is obviously right.

The compiled modules are compared with these by property tests; nothing at run time imports them.
"""

import hashlib
import itertools

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
