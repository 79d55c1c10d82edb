"""cache_aware for workers whose KV caches are not known from events: where the prompt's beginning was sent before.

1. Requests in flight differ by more than `balance_abs_threshold` and the busiest has more than `balance_rel_threshold` times the
   idlest: the least loaded worker.
2. Some worker was sent more than `cache_threshold` of the prompt: the one that was sent most; among equals the least loaded.
3. Otherwise the least loaded worker.
What is compared may be long out of a worker's cache, so a small share counts for nothing. The steps and the meaning of the thresholds
are those of SGLang's gateway (spec/gateway.md 1.2); unlike there, ties break at random and an unhealthy worker is never the answer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglfast.edge.policy import CACHE_HIT, CACHE_MISS, PoolView, Prompt
from sglfast.edge.policy.cache_aware import CacheAware, lightest

if TYPE_CHECKING:
    from sglfast._counters import Loads


class ApproximateCacheAware(CacheAware):
    """Longest known share within a balanced pool."""

    def exact(self) -> CacheAware:
        """The policy for prompts that can be looked up in the KV index all the same, with the same thresholds."""
        return CacheAware(
            cache_threshold=self._cache_threshold,
            balance_abs_threshold=self._balance_abs_threshold,
            balance_rel_threshold=self._balance_rel_threshold,
        )

    def score(self, requests: int, work_tokens: int) -> float | None:
        return requests

    def choose(self, pool: PoolView, loads: Loads, prompt: Prompt) -> tuple[int, int]:
        why = self.least_loaded_because(pool, loads, prompt)
        if why is not None:
            return loads.least(pool.worker_idxs)[0], why
        best_tokens = max((hit.overlap_tokens for hit in prompt.hits), default=0)
        if best_tokens > self._cache_threshold * prompt.prompt_tokens:
            owners = [hit for hit in prompt.hits if hit.overlap_tokens == best_tokens]
            return lightest(owners, pool, loads).position, CACHE_HIT
        return loads.least(pool.worker_idxs)[0], CACHE_MISS
