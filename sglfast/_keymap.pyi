from typing import Any, Self, final

@final
class KeyMap:
    """Engine hash -> block key of one rank. Lists are n little-endian uint64 in a bytes-like object.

    fd, offset, region_bytes: the part of a file of which the map may take what it needs, and which no other map uses; the caller keeps the
    descriptor open. -1: memory of its own, which dies with it. owner: whose hashes these are, 64 bits; `adopt` looks at it.
    Raises ValueError for a region that is too small or does not begin at a multiple of 65,536.
    Whatever makes it larger raises MemoryError when there is no memory or the region is full; then nothing has changed.
    """

    def __new__(cls, fd: int = -1, offset: int = 0, region_bytes: int = 17592186044416, owner: int = 0) -> Self: ...
    def __len__(self) -> int: ...
    def put(self, hashes: Any, keys: Any) -> None:
        """Remember the key of each hash. Raises ValueError when there are not as many of both."""
    def place(
        self, payload: Any, *, seed: int, block_size: int, main_group: int = -1
    ) -> tuple[int, int, int, int, list[tuple[int, int, bytes]], bytes] | None:
        """Make the token route's keys of a KV event batch, and remember them by the engine's hashes.

        seed, block_size (tokens): of `token_keys`; main_group: number of the main attention among a hybrid model's caches, -1 = not
        told yet, and then 0 counts.
        Return (events, orphans, orphans since the last clear, main_group as the batch tells it, runs as of `_kvdecode.runs`, hashes
        that removals named and the map knows): what of the last the rank does not own any more after the runs is to be dropped.
        None when the batch is not entirely usual; then nothing has changed.
        """
    def place_batches(
        self, payloads: Any, ends: Any, first: int = 0, *, seed: int, block_size: int, main_group: int = -1
    ) -> tuple[int, tuple[int, int, int, int, list[tuple[int, int, bytes]], bytes] | None]:
        """Do what `place` does with several batches as if they were one, from number `first` on up to one that is not entirely usual.

        payloads: one behind the other; ends: where each ends, as native uint64. Return (batches, as `place`, None for none of them).
        Raises ValueError when these do not go together.
        """
    def get(self, hash_: int) -> int | None:
        """Return the key of one hash, None when it is unknown."""
    def find(self, hashes: Any) -> tuple[bytes, bytes]:
        """Return (known hashes, their keys) in the order of `hashes`; unknown ones are left out."""
    def drop(self, hashes: Any, but_for: bytes = b"") -> None:
        """Forget the hashes; but_for: one byte a hash, nonzero = keep it, empty = keep none. Raises ValueError on another length."""
    @property
    def places(self) -> int:
        """How many pairs the table could hold if it were full; it changes with `put`, `place` and `clear`."""
    def items(self, start: int = 0, end: int = 18446744073709551615) -> tuple[bytes, bytes]:
        """Return (hashes, their keys) of the pairs in the table's places from `start` up to `end`, by default of all, in no order.

        What is dropped lets others move to lower places: who goes through a table in parts and drops some begins with the last part.
        """
    def clear(self) -> None:
        """Forget everything; at most 8 KiB are kept, for what comes next."""
    def release(self) -> None:
        """Forget everything, and give all memory back, also what another process left there."""
    def adopt(self) -> bool:
        """Take over what another process, however it ended, left in the region for the same owner, and go on with it.

        False when there is nothing such, or nothing that can be trusted: the map is empty then, and what is in the region must be released.
        Cost: a look at each place of the table.
        """
