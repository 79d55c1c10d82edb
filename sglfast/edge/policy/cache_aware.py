"""cache_aware: where the prompt's KV cache is, unless the load says otherwise.

1. Requests in flight differ by more than `balance_abs_threshold` and the busiest has more than `balance_rel_threshold` times the
   idlest: the least loaded worker (the cache of a worker that drowns is worth nothing).
2. Some worker holds more than `cache_threshold` of the prompt's blocks: the longest overlap; among equals the least loaded.
3. Otherwise the least work before the first token: uncached prompt tokens that the worker was sent and has not answered, plus those
   of this prompt that it does not hold. A short overlap thus counts for what it is worth, and an idle worker wins over it.
Thresholds and their defaults are sgl-router's (spec/router.md 4.2); step 3 replaces its plain minimum of requests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglfast import _counters
from sglfast.edge.policy import CACHE_HIT, CACHE_MISS, IMBALANCED, UNKEYED, Hit, PoolView, Prompt

if TYPE_CHECKING:
    from sglfast._counters import Loads


class CacheAware:
    """Longest overlap within a balanced pool."""

    name = "cache_aware"
    needs_prompt = True
    plain_decision = UNKEYED

    def __init__(self, *, cache_threshold: float, balance_abs_threshold: int, balance_rel_threshold: float) -> None:
        self._cache_threshold = cache_threshold
        self._balance_abs_threshold = balance_abs_threshold
        self._balance_rel_threshold = balance_rel_threshold

    def score(self, requests: int, work_tokens: int) -> float | None:
        return work_tokens

    def least_loaded_because(self, pool: PoolView, loads: Loads, prompt: Prompt) -> int | None:
        """The decision for the least loaded worker where caches have no say: step 1, or a prompt of which nothing is known."""
        low, high = loads.span(pool.worker_idxs)
        if high - low > self._balance_abs_threshold and high > low * self._balance_rel_threshold:
            return IMBALANCED
        return None if prompt.is_keyed else UNKEYED

    def choose(self, pool: PoolView, loads: Loads, prompt: Prompt) -> tuple[int, int]:
        why = self.least_loaded_because(pool, loads, prompt)
        if why is not None:
            return loads.least(pool.worker_idxs)[0], why
        hits = prompt.hits
        if not hits:
            return loads.least(pool.worker_idxs, _counters.W_INFLIGHT_TOKENS)[0], CACHE_MISS
        best_tokens, best_blocks = max((hit.overlap_tokens, hit.overlap_blocks) for hit in hits)
        # Workers of one pool may cut prompts differently. Without a block: a prediction of less than one, only its load counts.
        block_tokens = best_tokens // best_blocks if best_blocks else 0
        if block_tokens and best_tokens > self._cache_threshold * (prompt.prompt_tokens // block_tokens * block_tokens):
            owners = [hit for hit in hits if hit.overlap_tokens == best_tokens]
            return lightest(owners, pool, loads).position, CACHE_HIT
        # Only owners can beat the least queued of all: compare those few with it.
        position, queued_tokens = loads.least(pool.worker_idxs, _counters.W_INFLIGHT_TOKENS)
        least_tokens = queued_tokens + prompt.prompt_tokens
        ties = 1
        for hit in hits:
            work_tokens = loads.tokens(pool.worker_idxs[hit.position]) + prompt.prompt_tokens - hit.overlap_tokens
            if work_tokens < least_tokens:
                position, least_tokens, ties = hit.position, work_tokens, 1
            elif work_tokens == least_tokens:
                ties += 1
                if loads.random_below(ties) == 0:
                    position = hit.position
        return position, CACHE_MISS


def lightest(hits: list[Hit], pool: PoolView, loads: Loads) -> Hit:
    """The hit whose worker has the fewest requests in flight; ties at random."""
    best = hits[0]
    if len(hits) == 1:
        return best
    least, ties = -1, 1
    for hit in hits:
        load = loads.requests(pool.worker_idxs[hit.position])
        if least < 0 or load < least:
            best, least, ties = hit, load, 1
        elif load == least:
            ties += 1
            if loads.random_below(ties) == 0:
                best = hit
    return best
