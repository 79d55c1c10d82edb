from typing import Self, final

@final
class RadixCache:
    """The KV blocks of one simulated rank, with leaf-LRU eviction; blocks in use stay.

    Keys are chains: n little-endian uint64 in bytes, each standing for its whole prefix. `-1` blocks means all of them.
    Every method raises ValueError when the bytes are no whole words or a count is out of range.
    """

    def __new__(cls, capacity_blocks: int) -> Self:
        """Hold at most `capacity_blocks` (1 .. 2**29); memory grows with use, 40 bytes a block. Raises ValueError."""
    def match(self, keys: bytes, max_blocks: int = -1) -> int:
        """Return how many leading blocks are cached (at most `max_blocks`) and make them the most recently used."""
    def insert(self, keys: bytes, n_blocks: int = -1) -> tuple[int, int, bytes]:
        """Cache the first `n_blocks`, evicting the least recently used leaves when the cache is full.

        Return (start, stop, evicted): blocks start..stop of the chain are new, stop < n_blocks when everything else is in
        use; `evicted` are the keys that went, oldest first (they went before the new ones came).
        """
    def lock(self, keys: bytes, n_blocks: int = -1) -> None:
        """Count one more user of each of the first `n_blocks`. ValueError, and nothing changed, when one is not cached."""
    def unlock(self, keys: bytes, n_blocks: int = -1) -> None:
        """Take back one `lock` of the same blocks; unused blocks become the most recently used. ValueError as in `lock`."""
    def clear(self) -> None:
        """Forget everything. ValueError, and nothing changed, while a block is locked."""
    def keys(self) -> bytes:
        """Return the keys of all cached blocks, in no particular order."""
    @property
    def capacity_blocks(self) -> int: ...
    @property
    def used_blocks(self) -> int: ...
    @property
    def locked_blocks(self) -> int:
        """Blocks with at least one user."""
    @property
    def evicted_blocks(self) -> int:
        """Blocks evicted since the cache was made; `clear` does not count."""
