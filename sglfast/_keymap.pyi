from typing import Any, final

@final
class KeyMap:
    """Engine hash -> block key of one rank. Lists are n little-endian uint64 in a bytes-like object."""

    def __len__(self) -> int: ...
    def put(self, hashes: Any, keys: Any) -> None:
        """Remember the key of each hash. Raises ValueError when there are not as many of both."""
    def get(self, hash_: int) -> int | None:
        """Return the key of one hash, None when it is unknown."""
    def find(self, hashes: Any) -> tuple[bytes, bytes]:
        """Return (known hashes, their keys) in the order of `hashes`; unknown ones are left out."""
    def drop(self, hashes: Any, but_for: bytes = b"") -> None:
        """Forget the hashes; but_for: one byte a hash, nonzero = keep it, empty = keep none. Raises ValueError on another length."""
    def items(self) -> tuple[bytes, bytes]:
        """Return (all hashes, their keys) in no order."""
    def clear(self) -> None:
        """Forget everything, and give the memory back."""
