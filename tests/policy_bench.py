"""What the tests of policies share: loads in real shared memory that a test sets, and how even a spread is."""

from __future__ import annotations

import os
from collections import Counter

from edge_harness import indexes

from sglfast import shm
from sglfast._counters import Column, Loads
from sglfast.edge.policy import Hit, Policy, PoolView, Prompt


class Pool:
    """Workers 0..n-1 whose load is spread over the columns of two shards."""

    def __init__(self, n: int) -> None:
        fd, segment = shm.create(max_workers=64, max_ranks=64, max_shards=2, capacity_blocks=1024)
        os.close(fd)  # the mapping stays
        self.columns = [Column(segment, shard) for shard in range(2)]
        self.loads = Loads(segment)
        self.view = PoolView(indexes(*range(n)))

    def load(self, worker_idx: int, requests: int, tokens: int = 0, shard: int = 0) -> None:
        """So many requests more in flight at a worker, with so many tokens in all."""
        for number in range(requests):
            self.columns[shard].begin(worker_idx, tokens if number == 0 else 0, 0, 0)

    def picks(self, policy: Policy, count: int = 400, prompt: Prompt | None = None) -> Counter[tuple[int, int]]:
        """How often each (position, decision) is chosen while the loads stand still."""
        prompt = prompt or Prompt()
        return Counter(policy.choose(self.view, self.loads, prompt) for _ in range(count))


def prompt(prompt_blocks: int, block_size: int = 64, **blocks: int) -> Prompt:
    """A keyed prompt of which the worker at position `pN` holds so many leading blocks."""
    hits = tuple(Hit(int(name[1:]), int(name[1:]), count, count * block_size) for name, count in blocks.items())
    return Prompt(prompt_blocks * block_size, prompt_blocks, hits, True)


def chi_square(counts: Counter[tuple[int, int]], cells: int) -> float:
    """Pearson's statistic against an even spread over so many cells."""
    expected = counts.total() / cells
    return sum((found - expected) ** 2 / expected for found in [*counts.values(), *[0] * (cells - len(counts))])


# Even spreads stay below it but for one run in ten million: quantile of chi-square for cells - 1 degrees of freedom.
CHI_SQUARE_LIMIT = {2: 28.4, 3: 32.2, 4: 35.4, 8: 45.8}
