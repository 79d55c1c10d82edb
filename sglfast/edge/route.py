"""Choosing a worker: pools by model, the KV index's answer for a prompt, the policy, and the next choice when one fails.

Runs in: shards, event loop. Contract: `choose` calls back exactly once with a Route or the Reason of a refusal. The structures here
    are rebuilt only when the version of the worker table or of the breakers moves; a request costs two atomic loads for that.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sglfast import _counters, _workers, errors
from sglfast._breaker import CLOSED
from sglfast._relay import RouterBase
from sglfast.edge.mishap import report
from sglfast.edge.policy import FAILOVER, Hit, Policy, PoolView, Prompt
from sglfast.edge.policy.approximate import ApproximateCacheAware
from sglfast.edge.policy.cache_aware import CacheAware
from sglfast.edge.policy.least_load import LeastLoad
from sglfast.edge.policy.power_of_two import PowerOfTwo
from sglfast.edge.policy.random import Random
from sglfast.edge.policy.round_robin import RoundRobin
from sglfast.edge.predict import BLOCK_TOKENS, NOTHING, Found, Prediction, Predictor, with_guesses
from sglfast.edge.request import Endpoint, Facts, PromptKeyer, model_of
from sglfast.edge.upstream import Upstream
from sglfast.shm import PARITY_OK, Variant, WorkerView, read_workers

if TYPE_CHECKING:
    from sglfast._counters import Loads
    from sglfast.config import ServeConfig
    from sglfast.edge.shard import Shard

_NO_PROMPT = Prompt()
_UNREADABLE_PAUSE_S = 10.0
_STATES = ("BLIND", "SYNCING", "EXACT", "DEGRADED")


@dataclass(frozen=True, slots=True)
class Route:
    """A choice: the worker's connections, what its cache holds of the prompt, and why it was chosen.

    is_estimated: prompt_blocks and uncached_tokens count a part of the prompt by its characters; is_approximate: overlap_blocks tells
    what the worker was sent before, not what its events say; prediction: what was noted of this choice, to be settled at its first token.
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
    is_approximate: bool = False
    prediction: Prediction | None = None


class Pool:
    """The ready workers of one model."""

    __slots__ = (
        "by_rank",
        "is_approximate",
        "is_silent",
        "model",
        "plain_routes",
        "policy",
        "positions",
        "upstreams",
        "variants",
        "view",
        "workers",
    )

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
        # Predictions are kept for all ranks; of some workers, or of all, nothing else is known.
        self.positions = {worker.rank_base + rank: position for position, worker in enumerate(workers) for rank in range(worker.dp_size)}
        self.is_approximate = isinstance(policy, ApproximateCacheAware)
        self.is_silent = not all(worker.block_size for worker in workers)

    def is_approximate_at(self, position: int) -> bool:
        """Whether what is known of the worker's cache is what it was sent, not what its events say."""
        return self.is_approximate or not self.workers[position].block_size

    def block_tokens(self, position: int) -> int:
        """The unit of the worker's overlap."""
        return BLOCK_TOKENS if self.is_approximate_at(position) else self.workers[position].block_size

    def known_tokens(self, hit: Hit) -> int:
        """Overlap as users and the parity loop are to see it: where there are events, nothing that they do not say."""
        return hit.overlap_tokens if self.is_approximate_at(hit.position) else hit.overlap_tokens - hit.guessed_tokens


def make_policy(name: str, config: ServeConfig, loads: Loads, *, has_events: bool) -> Policy:
    """The policy of a flag's value; `auto` is cache_aware for workers that publish events when there is a tokenizer.

    Without either of these, cache_aware is the approximate one, unless predictions are off.
    """
    is_exact = has_events and config.tokenizer_path is not None
    if name == "auto":
        name = "cache_aware" if is_exact else "least_load"
    if name == "cache_aware":
        kind = CacheAware if is_exact or not config.prediction_blocks else ApproximateCacheAware
        return kind(
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
        self._predictor: Predictor | None = None  # made when a policy first has a use for it
        self._unreadable_until_s = 0.0
        self._table_version = -1
        self._views: list[WorkerView] = []
        self._upstreams: dict[tuple[int, int], Upstream] = {}  # (slot, generation)
        self._shut: list[Upstream] = []  # ready, but their breakers do not let them be chosen
        self.pools: dict[str | None, Pool] = {}
        self.only: Pool | None = None  # the one pool, when no worker, also of those that are down, has another model
        self.models: list[str] = []
        self.shut_models: set[str | None] = set()  # all whose ready workers are shut
        self.ready_workers = 0  # those that are shut included

    def refresh(self) -> None:
        """Follow the worker table and the breakers when their version has moved, and say so; else it costs one call.

        Cost then: one read per slot when the table has changed, else a look at each worker's breaker.
        """
        version = self._shard.breakers.table.version()
        if version == self.seen_version or self._shard.loop.time() < self._unreadable_until_s:
            return
        table = self._shard.table
        table_version = table.version()
        if table_version != self._table_version:
            try:
                views = read_workers(table)
            except RuntimeError as error:
                # Its writer was stopped inside a slot: what is known serves on. Not tried by every request, because it takes a second.
                self._shard.log.warning("the worker table cannot be read now: %s", error)
                self._unreadable_until_s = self._shard.loop.time() + _UNREADABLE_PAUSE_S
                return
            self._follow_table(views)
            self._table_version = table_version
        self._make_pools()
        # Last, and as it was before the first slot was read: whatever came in between, or went wrong, is looked at again.
        self.seen_version = version
        # From here on no choice is made by an older version: control waits for this word (control/followers).
        self._shard.segment.process_saw(self._shard.process_slot, table_version)

    def _follow_table(self, views: list[WorkerView]) -> None:
        """Have connections for the workers that there are, and no others."""
        old, self._upstreams = self._upstreams, {}
        self._views = views
        aborts = not self._shard.config.disable_abort_on_disconnect
        for view in views:
            key = (view.worker_idx, view.generation)
            upstream = old.pop(key, None) or Upstream(self._shard, view.worker_idx, view.generation, view.record.url)
            self._upstreams[key] = upstream
            upstream.is_out = view.state == _workers.UNHEALTHY
            upstream.takes_rid = aborts and view.record.takes_rid
            upstream.key_line = self._shard.key_line(view.record.api_key)
            if self._shard.request_log is not None:
                upstream.log_label = self._shard.request_log.label(view.record.model, view.record.url)
        for upstream in old.values():
            upstream.close()
        if old:
            self._shard.cut(set(old.values()))
        self.models = sorted({view.record.model for view in views if view.record.model is not None})

    def _make_pools(self) -> None:
        """The pools of the workers that may be chosen."""
        config, loads, breakers = self._shard.config, self._shard.loads, self._shard.breakers
        ready = [view for view in self._views if view.state == _workers.READY]
        by_model: dict[str | None, list[WorkerView]] = {}
        self._shut = []
        for view in ready:
            upstream = self._upstreams[(view.worker_idx, view.generation)]
            upstream.needs_probe = breakers.is_on and breakers.table.state(view.worker_idx) != CLOSED
            if not breakers.is_on or breakers.table.is_selectable(view.worker_idx):
                by_model.setdefault(view.record.model, []).append(view)
            else:
                self._shut.append(upstream)
        policies = {model: pool.policy for model, pool in self.pools.items()}
        self.pools = {}
        for model, workers in by_model.items():
            upstreams = [self._upstreams[(worker.worker_idx, worker.generation)] for worker in workers]
            fresh = make_policy(config.policy, config, loads, has_events=any(worker.block_size for worker in workers))
            kept = policies.get(model)
            self.pools[model] = Pool(model, workers, upstreams, kept if type(kept) is type(fresh) and kept else fresh)
        reads_prompts = any(pool.policy.needs_prompt for pool in self.pools.values())
        if reads_prompts and self._predictor is None and self._shard.segment.prediction_blocks:
            self._predictor = Predictor(self._shard.segment, self._shard.process_slot - 1)
        self.ready_workers = len(ready)
        self.shut_models = {view.record.model for view in ready} - self.pools.keys()
        is_alone = len(self.pools) == 1 and len(self.models) <= 1
        only = self.only = next(iter(self.pools.values())) if is_alone else None
        self.plain_routes = None
        if only is not None and not only.policy.needs_prompt:
            self.plain_choose = only.policy.choose
            self.plain_arguments = (only.view, self._shard.loads, _NO_PROMPT)
            self.plain_routes = only.plain_routes

    @property
    def worker_count(self) -> int:
        """Workers in the table, whatever their state."""
        return len(self._upstreams)

    def renew_policies(self) -> None:
        """Make the policies anew, and what is said of workers: the settings that they were made of have changed."""
        self.pools = {}
        self._follow_table(self._views)
        self._make_pools()

    def sweep(self, before_s: float) -> None:
        """Close connections to workers that have been idle since before `before_s`; give workers that were shut their chance."""
        for upstream in self._upstreams.values():
            upstream.sweep(before_s)
        for upstream in self._shut:
            self._shard.breakers.wake(upstream)

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
        # As above: a model that nobody knows takes any name, and so does one that is alone.
        if self.shut_models and (model in self.shut_models or None in self.shut_models or len(self.models) <= 1):
            return errors.BREAKER_OPEN
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
            then(self._choose_keyed(pool, Facts(0, {}, "no tokenizer, or no worker publishes KV events"), body))
        else:
            chosen = pool
            self.keyer.key(endpoint.kind, body, pool.variants, lambda facts: then(self._choose_after(chosen, facts, body)))

    def _choose_after(self, pool: Pool, facts: Facts, body: bytes) -> Route | errors.Reason:
        # A prompt may have spent a while in the tokenizer's thread: its pool may have changed or gone. And then nobody is above us who
        # would answer the client when something fails here.
        try:
            self.refresh()
            now = self.pools.get(pool.model)
            return self._choose_keyed(now, facts, body) if now is not None else errors.NO_HEALTHY_WORKERS
        except Exception as error:
            report(self._shard.log, error)
            return errors.INTERNAL_ERROR

    def _choose_keyed(self, pool: Pool, facts: Facts, body: bytes) -> Route:
        column = self._shard.column
        prompt, found = self.compare(pool, facts, body)
        if prompt.is_keyed:
            column.add(_counters.S_PROMPTS_KEYED)
            column.add(_counters.S_PROMPT_TOKENS, prompt.prompt_tokens)
        else:
            column.add(_counters.S_PROMPTS_UNKEYED)
        position, decision = pool.policy.choose(pool.view, self._shard.loads, prompt)
        return self._route(pool, position, decision, prompt, found)

    def _route(self, pool: Pool, position: int, decision: int, prompt: Prompt, found: Found) -> Route:
        worker = pool.workers[position]
        upstream = pool.upstreams[position]
        if not prompt.is_keyed:
            return Route(pool, upstream, decision, rank=worker.rank_base)
        column, predictor = self._shard.column, self._predictor
        hit = next((hit for hit in prompt.hits if hit.position == position), None) or Hit(position, worker.rank_base, 0, 0)
        is_approximate, block_tokens, known_tokens = pool.is_approximate_at(position), pool.block_tokens(position), pool.known_tokens(hit)
        predicted_tokens = -1 if is_approximate else known_tokens
        prediction = None
        if hit.guessed_tokens and predictor is not None:
            column.add(_counters.S_PREDICTED)
            # Whether the worker has it in time is not known, so its report says nothing about what events said.
            if predictor.is_in_flight(worker):
                predicted_tokens = -1
        if found.keys and predictor is not None:
            prediction = predictor.sent(worker, hit.rank, found.keys, is_kept=is_approximate)
        prompt_blocks = prompt.prompt_tokens // block_tokens
        overlap_blocks = known_tokens // block_tokens
        column.add_worker(worker.worker_idx, _counters.W_PROMPT_BLOCKS, prompt_blocks)
        column.add_worker(worker.worker_idx, _counters.W_OVERLAP_BLOCKS, overlap_blocks)
        return Route(
            pool,
            upstream,
            decision,
            uncached_tokens=prompt.prompt_tokens - hit.overlap_tokens,
            rank=hit.rank,
            dp_rank=hit.rank - worker.rank_base,
            overlap_blocks=overlap_blocks,
            prompt_blocks=prompt_blocks,
            predicted_tokens=predicted_tokens,
            is_trusted=worker.parity == PARITY_OK,
            is_estimated=prompt.is_estimated,
            is_approximate=is_approximate,
            prediction=prediction,
        )

    def compare(self, pool: Pool, facts: Facts, body: bytes) -> tuple[Prompt, Found]:
        """What a policy is to know of a prompt: the KV index's answer, with what the router itself sent where.

        The latter is left out where it could not matter: less than an eighth of the prompt is left to compute.
        """
        prompt = self.look_up(pool, facts)
        if self._predictor is None:
            return prompt, NOTHING
        if not (pool.is_silent or pool.is_approximate):
            best_tokens = max((hit.overlap_tokens for hit in prompt.hits), default=0)
            if not prompt.is_keyed or 8 * best_tokens >= 7 * prompt.prompt_tokens:
                return prompt, NOTHING
        found = self._predictor.look_up(pool, body)
        return (with_guesses(prompt, found) if found.keys else prompt), found

    def settle(self, route: Route) -> None:
        """The request's first token came, or it left its worker without one."""
        if self._predictor is not None and route.prediction is not None:
            self._predictor.settle(route.prediction)

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
        """The least loaded worker of the pool for one more attempt, or None when the pool is empty.

        One that was not tried yet; when all were, one that has not just failed; else the one that has. Only after a failure, so a
        scan is fine.
        """
        self.refresh()
        pool = self.pools.get(failed.pool.model)
        if pool is None:
            return None
        idxs = pool.view.worker_idxs
        left = array("i", [idx for idx in idxs if idx not in tried]) or array("i", [idx for idx in idxs if idx != tried[-1]]) or idxs
        position = idxs.index(left[self._shard.loads.least(left)[0]])
        worker, prediction = pool.workers[position], failed.prediction
        if prediction is not None and self._predictor is not None:
            is_kept = pool.is_approximate_at(position)
            prediction = self._predictor.sent(worker, worker.rank_base, prediction.keys, is_kept=is_kept)
        upstream = pool.upstreams[position]
        return Route(pool, upstream, FAILOVER, failed.uncached_tokens, rank=worker.rank_base, prediction=prediction)

    def describe(self, route: Route) -> bytes:
        """Value of the answer header `x-sglfast-kv`: what was predicted for this request."""
        state = "APPROXIMATE" if route.is_approximate else "BLIND"
        if not route.is_approximate and route.rank in route.pool.by_rank:
            state = _STATES[self._shard.ranks.get(route.rank, _counters.R_STATE) & 3]
            if state == "EXACT" and not route.is_trusted:
                state = "DEGRADED"
        return (
            f"worker={route.upstream.url}; rank={route.dp_rank}; overlap_blocks={route.overlap_blocks}; "
            f"prompt_blocks={route.prompt_blocks}; state={state}"
        ).encode()
