"""Choosing a worker: pools by model, the KV index's answer for a prompt, the policy, and the next choice when one fails.

Runs in: shards, event loop. Contract: `choose` calls back exactly once with a Route or the Reason of a refusal. The structures here
    are rebuilt only when the version of the worker table moves; a request costs one atomic load for that.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sglfast import _counters, _workers, errors
from sglfast._relay import RouterBase
from sglfast.edge.policy import FAILOVER, Hit, Policy, PoolView, Prompt
from sglfast.edge.policy.cache_aware import CacheAware
from sglfast.edge.policy.least_load import LeastLoad
from sglfast.edge.policy.power_of_two import PowerOfTwo
from sglfast.edge.policy.random import Random
from sglfast.edge.policy.round_robin import RoundRobin
from sglfast.edge.request import Endpoint, Facts, PromptKeyer, model_of
from sglfast.edge.upstream import Upstream
from sglfast.shm import PARITY_OK, Variant, WorkerView, read_workers

if TYPE_CHECKING:
    from sglfast._counters import Loads
    from sglfast.config import ServeConfig
    from sglfast.edge.shard import Shard

_NO_PROMPT = Prompt()
_STATES = ("BLIND", "SYNCING", "EXACT", "DEGRADED")


@dataclass(frozen=True, slots=True)
class Route:
    """A choice: the worker's connections, what its cache holds of the prompt, and why it was chosen.

    is_estimated: prompt_blocks and uncached_tokens count a part of the prompt by its characters.
    """

    pool: Pool
    upstream: Upstream
    decision: int
    uncached_tokens: int = 0
    rank: int = 0  # of the KV index
    dp_rank: int = 0  # the same as the worker counts it
    overlap_blocks: int = 0
    prompt_blocks: int = 0
    predicted_tokens: int = -1  # of the prompt, in the worker's cache; -1 = nobody looked
    is_trusted: bool = True  # the worker's reports agree with the predictions
    is_estimated: bool = False


class Pool:
    """The ready workers of one model."""

    __slots__ = ("by_rank", "model", "plain_routes", "policy", "upstreams", "variants", "view", "workers")

    def __init__(self, model: str | None, workers: list[WorkerView], upstreams: list[Upstream], policy: Policy) -> None:
        self.model = model
        self.workers = workers
        self.upstreams = upstreams
        self.policy = policy
        self.view = PoolView(array("i", [worker.worker_idx for worker in workers]))
        # Routes without a prompt are alike for every request of a policy: made once.
        self.plain_routes = [
            Route(self, upstream, policy.plain_decision, rank=worker.rank_base) for worker, upstream in zip(workers, upstreams, strict=True)
        ]
        # How the workers cut prompts into blocks; one way in a pool of equals.
        self.variants = tuple(sorted({worker.variant for worker in workers if worker.block_size}))
        self.by_rank: dict[int, tuple[int, Variant]] = {
            worker.rank_base + rank: (position, worker.variant)
            for position, worker in enumerate(workers)
            if worker.block_size
            for rank in range(worker.dp_size)
        }


def make_policy(name: str, config: ServeConfig, loads: Loads, *, has_events: bool) -> Policy:
    """The policy of a flag's value; `auto` is cache_aware for workers that publish events when there is a tokenizer."""
    if name == "auto":
        name = "cache_aware" if has_events and config.tokenizer_path is not None else "least_load"
    if name == "cache_aware":
        return CacheAware(
            cache_threshold=config.cache_threshold,
            balance_abs_threshold=config.balance_abs_threshold,
            balance_rel_threshold=config.balance_rel_threshold,
        )
    if name == "round_robin":
        return RoundRobin(loads)
    if name == "power_of_two":
        return PowerOfTwo()
    return Random() if name == "random" else LeastLoad()


class Router(RouterBase):
    """The pools as the worker table has them now, and the choice among them."""

    def __init__(self, shard: Shard, keyer: PromptKeyer | None) -> None:
        super().__init__(shard.segment)
        self._shard = shard
        self.keyer = keyer
        self._upstreams: dict[tuple[int, int], Upstream] = {}  # (slot, generation)
        self.pools: dict[str | None, Pool] = {}
        self.only: Pool | None = None  # the one pool, when no worker, also of those that are down, has another model
        self.models: list[str] = []

    def refresh(self) -> None:
        """Follow the worker table when its version has moved, and say so. Cost then: one read per slot."""
        version = self._shard.table.version()
        if version == self.seen_version:
            return
        self.seen_version = version
        views = read_workers(self._shard.table)
        old, self._upstreams = self._upstreams, {}
        ready: dict[str | None, list[WorkerView]] = {}
        for view in views:
            key = (view.worker_idx, view.generation)
            upstream = old.pop(key, None)
            upstream = self._upstreams[key] = upstream or Upstream(self._shard, view.worker_idx, view.record.url)
            upstream.key_line = self._shard.key_line(view.record.api_key)
            if self._shard.request_log is not None:
                upstream.log_label = self._shard.request_log.label(view.record.model, view.record.url)
            if view.state == _workers.READY:
                ready.setdefault(view.record.model, []).append(view)
        for upstream in old.values():
            upstream.close()
        if old:
            self._shard.cut(set(old.values()))
        policies = {model: pool.policy for model, pool in self.pools.items()}
        self.pools = {}
        for model, workers in ready.items():
            upstreams = [self._upstreams[(worker.worker_idx, worker.generation)] for worker in workers]
            config = self._shard.config
            fresh = make_policy(config.policy, config, self._shard.loads, has_events=any(worker.block_size for worker in workers))
            kept = policies.get(model)
            self.pools[model] = Pool(model, workers, upstreams, kept if type(kept) is type(fresh) and kept else fresh)
        self.models = sorted({view.record.model for view in views if view.record.model is not None})
        is_alone = len(self.pools) == 1 and len(self.models) <= 1
        only = self.only = next(iter(self.pools.values())) if is_alone else None
        self.plain_routes = None
        if only is not None and not only.policy.needs_prompt:
            self.plain_choose = only.policy.choose
            self.plain_arguments = (only.view, self._shard.loads, _NO_PROMPT)
            self.plain_routes = only.plain_routes
        # From here on no choice is made by an older version: control waits for this word (control/followers).
        self._shard.segment.process_saw(self._shard.process_slot, version)

    @property
    def worker_count(self) -> int:
        """Workers in the table, whatever their state."""
        return len(self._upstreams)

    def renew_policies(self) -> None:
        """Make the policies anew: the settings that they were made of have changed."""
        self.pools = {}
        self.seen_version = (1 << 64) - 1  # as before the first look
        self.refresh()

    def sweep(self, before_s: float) -> None:
        """Close connections to workers that have been idle since before `before_s`."""
        for upstream in self._upstreams.values():
            upstream.sweep(before_s)

    def pool_of(self, body: bytes) -> Pool | errors.Reason:
        """The pool for a body, or why there is none. The body is read only when the workers serve several models."""
        self.refresh()
        if self.only is not None:
            return self.only
        model = model_of(body)
        # A pool that does not know its model takes any name.
        pool = self.pools.get(model) or self.pools.get(None)
        if pool is None and model is not None and ":" in model and model not in self.models:
            model = model.partition(":")[0].strip()  # SGLang's "base:adapter"
            pool = self.pools.get(model)
        if pool is not None:
            return pool
        if model in self.models or not self.pools:
            return errors.NO_HEALTHY_WORKERS
        return errors.MODEL_NOT_FOUND if model else errors.MISSING_MODEL

    def choose(self, endpoint: Endpoint, body: bytes, then: Callable[[Route | errors.Reason], None]) -> None:
        """Find a worker for a request and call `then`, at once unless a long prompt is being tokenized."""
        pool = self.pool_of(body)
        if isinstance(pool, errors.Reason):
            then(pool)
        elif not pool.policy.needs_prompt:
            position, decision = pool.policy.choose(pool.view, self._shard.loads, _NO_PROMPT)
            route = pool.plain_routes[position]
            if route.decision != decision:
                route = Route(pool, pool.upstreams[position], decision)
            then(route)
        elif self.keyer is None or not pool.variants:
            then(self._choose_keyed(pool, Facts(0, {}, "no tokenizer, or no worker publishes KV events")))
        else:
            chosen = pool
            self.keyer.key(endpoint.kind, body, pool.variants, lambda facts: then(self._choose_after(chosen, facts)))

    def _choose_after(self, pool: Pool, facts: Facts) -> Route | errors.Reason:
        # A prompt may have spent a while in the tokenizer's thread: its pool may have changed or gone.
        self.refresh()
        now = self.pools.get(pool.model)
        return self._choose_keyed(now, facts) if now is not None else errors.NO_HEALTHY_WORKERS

    def _choose_keyed(self, pool: Pool, facts: Facts) -> Route:
        column = self._shard.column
        prompt = self.look_up(pool, facts)
        if prompt.is_keyed:
            column.add(_counters.S_PROMPTS_KEYED)
            column.add(_counters.S_PROMPT_TOKENS, prompt.prompt_tokens)
        else:
            column.add(_counters.S_PROMPTS_UNKEYED)
        position, decision = pool.policy.choose(pool.view, self._shard.loads, prompt)
        return self._route(pool, position, decision, prompt)

    def _route(self, pool: Pool, position: int, decision: int, prompt: Prompt) -> Route:
        worker = pool.workers[position]
        upstream = pool.upstreams[position]
        if not prompt.is_keyed:
            return Route(pool, upstream, decision, rank=worker.rank_base)
        prompt_blocks = prompt.prompt_tokens // worker.block_size if worker.block_size else prompt.prompt_blocks
        hit = next((hit for hit in prompt.hits if hit.position == position), None) or Hit(position, worker.rank_base, 0, 0)
        column = self._shard.column
        column.add_worker(worker.worker_idx, _counters.W_PROMPT_BLOCKS, prompt_blocks)
        column.add_worker(worker.worker_idx, _counters.W_OVERLAP_BLOCKS, hit.overlap_blocks)
        return Route(
            pool,
            upstream,
            decision,
            uncached_tokens=prompt.prompt_tokens - hit.overlap_tokens,
            rank=hit.rank,
            dp_rank=hit.rank - worker.rank_base,
            overlap_blocks=hit.overlap_blocks,
            prompt_blocks=prompt_blocks,
            predicted_tokens=hit.overlap_tokens if worker.block_size else -1,
            is_trusted=worker.parity == PARITY_OK,
            is_estimated=prompt.is_estimated,
        )

    def look_up(self, pool: Pool, facts: Facts) -> Prompt:
        """Ask the KV index. Cost: one walk per way of cutting blocks, then the few ranks that hold something."""
        if not facts.keys:
            return _NO_PROMPT
        tree = self._shard.tree
        best: dict[int, Hit] = {}
        prompt_blocks = 0
        for variant, keys in facts.keys.items():
            block_size = variant.block_size
            prompt_blocks = max(prompt_blocks, facts.prompt_tokens // block_size)
            if not keys or not tree.match(keys):
                continue
            for rank, overlap_blocks in tree.hits():
                owner = pool.by_rank.get(rank)
                if owner is None or owner[1] != variant:
                    continue
                position = owner[0]
                known = best.get(position)
                if known is None or overlap_blocks > known.overlap_blocks:
                    best[position] = Hit(position, rank, overlap_blocks, overlap_blocks * block_size)
        return Prompt(facts.prompt_tokens, prompt_blocks, tuple(best.values()), True, facts.is_estimated)

    def next_choice(self, failed: Route, tried: tuple[int, ...]) -> Route | None:
        """The least loaded worker of the pool that was not tried yet, or None. Only after a failure, so a scan is fine."""
        self.refresh()
        pool = self.pools.get(failed.pool.model)
        if pool is None:
            return None
        untried = array("i", [idx for idx in pool.view.worker_idxs if idx not in tried])
        if not untried:
            return None
        position = pool.view.worker_idxs.index(untried[self._shard.loads.least(untried)[0]])
        rank = pool.workers[position].rank_base
        return Route(pool, pool.upstreams[position], FAILOVER, failed.uncached_tokens, rank=rank)

    def describe(self, route: Route) -> bytes:
        """Value of the answer header `x-sglfast-kv`: what was predicted for this request."""
        state = "BLIND"
        if route.rank in route.pool.by_rank:
            state = _STATES[self._shard.ranks.get(route.rank, _counters.R_STATE) & 3]
            if state == "EXACT" and not route.is_trusted:
                state = "DEGRADED"
        return (
            f"worker={route.upstream.url}; rank={route.dp_rank}; overlap_blocks={route.overlap_blocks}; "
            f"prompt_blocks={route.prompt_blocks}; state={state}"
        ).encode()
