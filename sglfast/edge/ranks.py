"""Which data-parallel rank of the chosen worker: each has a KV cache of its own, so the worker alone is half an answer.

Runs in: shards, event loop; only for pools with workers whose requests are steered (config/dp_steering.py). Theory: as among workers
    (edge/policy/cache_aware.py), with the same thresholds. A long overlap decides, unless its rank is overloaded against its siblings;
    else the least work before the first token, so that an idle rank wins over a short overlap. Load is what this router's shards
    steered to a rank; requests that name a rank themselves, or cannot, are the worker's and no rank's.
Contract: a choice is a tree rank of that worker; how the worker is told, and that the load is counted there, is the relay's part
    (`ExchangeBase.steer`). What is known of the prompt is looked up once, for all ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from sglfast.config.dp_steering import is_steered
from sglfast.edge.policy import Hit, Prompt
from sglfast.edge.policy.cache_aware import CacheAware

if TYPE_CHECKING:
    from sglfast._counters import RankLoads
    from sglfast.config import ServeConfig
    from sglfast.edge.policy import Policy
    from sglfast.shm import WorkerView


class Ranks:
    """The ranks of a pool's steered workers. owned: all of them, by their numbers in the tree; positions: of those workers."""

    __slots__ = ("_balance", "_cache_threshold", "_loads", "owned", "positions")

    def __init__(self, workers: dict[int, WorkerView], config: ServeConfig, loads: RankLoads) -> None:
        self._loads = loads
        self.positions = frozenset(workers)
        self.owned = frozenset(worker.rank_base + rank for worker in workers.values() for rank in range(worker.dp_size))
        self._cache_threshold = config.cache_threshold
        self._balance = (config.balance_abs_threshold, config.balance_rel_threshold)

    def idlest(self, worker: WorkerView) -> int:
        """The rank for a prompt that nothing is known of, as the worker counts it."""
        return self._loads.pick(worker.rank_base, worker.dp_size, (), 0, 0.0, *self._balance)[0] - worker.rank_base

    def pick(self, worker: WorkerView, position: int, prompt: Prompt) -> tuple[Hit, int]:
        """(what the chosen rank holds of the prompt, why it was chosen: _counters.RANK_*). Cost: its ranks x shards words."""
        base, known = worker.rank_base, prompt.by_rank or {}
        owners = [hit for rank in range(base, base + worker.dp_size) if (hit := known.get(rank)) is not None] if known else []
        enough_tokens = self._cache_threshold * prompt.prompt_tokens
        if worker.block_size:
            enough_tokens = self._cache_threshold * (prompt.prompt_tokens // worker.block_size * worker.block_size)
        overlaps = [(hit.rank, hit.overlap_tokens) for hit in owners]
        rank, why = self._loads.pick(base, worker.dp_size, overlaps, prompt.prompt_tokens, enough_tokens, *self._balance)
        hit = known.get(rank)
        if hit is None:
            return Hit(position, rank, 0, 0), why
        # The prompt may have been looked up in a pool of other workers, before one of them failed.
        return Hit(position, rank, hit.overlap_blocks, hit.overlap_tokens, hit.guessed_tokens), why


def ranks_of(workers: Iterable[WorkerView], policy: Policy, config: ServeConfig, loads: RankLoads) -> Ranks | None:
    """The ranks of those of a pool's workers whose requests are steered; None when there are none."""
    is_by_cache = isinstance(policy, CacheAware)  # without a tokenizer, too: token ids are looked up all the same
    steered = {position: worker for position, worker in enumerate(workers) if is_steered(worker, config, is_by_cache=is_by_cache)}
    return Ranks(steered, config, loads) if steered else None
