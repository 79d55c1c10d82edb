"""Which ranks of the KV index are taken, and where there is room for a worker's.

Runs in: control. Contract: no rank has two owners. First fit; ranks are few (1024 at most), so a byte each is the simplest map.
"""


class RankRanges:
    """The ranks of an index of so many."""

    def __init__(self, max_ranks: int) -> None:
        self._taken = bytearray(max_ranks)

    @property
    def free(self) -> int:
        """Ranks that nobody has."""
        return self._taken.count(0)

    def take(self, count: int, *, is_last: bool = False) -> int | None:
        """First of `count` contiguous free ranks, now taken; None when there is no such gap. count: 1 or more.

        A multiple of `count`, where one is free: workers of one size then leave no gaps that are too small for another of them.
        is_last: from the other end, so that single ranks do not part what others need in one piece.
        """
        if count > len(self._taken):
            return None
        gap = bytes(count)
        base = self._taken.rfind(gap) if is_last else self._taken.find(gap)
        if base < 0:
            return None
        if not is_last:
            whole = range(0, len(self._taken) - count + 1, count)
            base = next((start for start in whole if self._taken.startswith(gap, start)), base)
        self._taken[base : base + count] = b"\1" * count
        return base

    def give_back(self, base: int, count: int) -> None:
        """Free the ranks base .. base + count - 1."""
        self._taken[base : base + count] = bytes(count)
