"""The workers that a request for a model may be given to, as one pool; what a choice among them is.

Runs in: shards, event loop; made anew when the worker table or a breaker changes. Contract: a pool's workers are those that may take a
    request first: regular workers, and prefill workers as long as there is a decode worker for the second half (edge/pairs.py).
    The policy sees no difference between them. What needs nothing of a request is made once here.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sglfast import errors
from sglfast.edge.policy import NO_PROMPT, Hit, Policy, PoolView, Prompt
from sglfast.edge.policy.approximate import ApproximateCacheAware
from sglfast.edge.policy.cache_aware import CacheAware
from sglfast.edge.policy.least_load import LeastLoad
from sglfast.edge.policy.power_of_two import PowerOfTwo
from sglfast.edge.policy.random import Random
from sglfast.edge.policy.round_robin import RoundRobin
from sglfast.edge.predict import BLOCK_TOKENS, Prediction
from sglfast.shm import Variant, WorkerView

if TYPE_CHECKING:
    from sglfast._counters import Loads
    from sglfast.config import ServeConfig
    from sglfast.edge.pairs import Decodes
    from sglfast.edge.ranks import Ranks
    from sglfast.edge.upstream import Upstream


@dataclass(frozen=True, slots=True)
class Route:
    """A choice: the worker's connections, what its cache holds of the prompt, and why it was chosen.

    is_estimated: prompt_blocks and uncached_tokens count a part of the prompt by its characters; is_approximate: overlap_blocks tells
    what the worker was sent before, not what its events say; prediction: what is noted when the request goes there, until its first token;
    prefill: of a pair the policy's choice, of which all these are true; the route itself is then the decode worker's, without load.
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
    # What tells whether they hold still when the answer comes: the key of the block behind them, empty = the prompt has none; blocks that
    # the rank had dropped, -1 = it had nothing else to do, so nothing was on its way.
    basis: tuple[bytes, int] = (b"", -1)
    is_trusted: bool = True  # the worker's reports agree with the predictions
    is_estimated: bool = False
    is_approximate: bool = False
    prediction: Prediction | None = None
    prefill: Route | None = None
    prompt: Prompt = NO_PROMPT  # for a further attempt

    @property
    def rows(self) -> tuple[int, ...]:
        """Rows in shared memory of the one worker, or of the two."""
        if self.prefill is None:
            return (self.upstream.worker_idx,)
        return self.prefill.upstream.worker_idx, self.upstream.worker_idx


class Pool:
    """The workers of one model that may take a request first. decodes: None when they are all regular; ranks: None when no worker of
    them is told which of its ranks is to serve a request."""

    needs_prompt: bool
    variants: tuple[Variant, ...]

    __slots__ = (
        "_ranked_routes",
        "by_rank",
        "decodes",
        "exact_policy",
        "is_approximate",
        "is_silent",
        "model",
        "needs_prompt",
        "plain_routes",
        "policy",
        "positions",
        "ranks",
        "upstreams",
        "variants",
        "view",
        "workers",
    )

    def __init__(
        self,
        model: str | None,
        workers: list[WorkerView],
        upstreams: list[Upstream],
        policy: Policy,
        decodes: Decodes | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.model = model
        self.workers = workers
        self.upstreams = upstreams
        self.policy = policy
        self.decodes = decodes
        self.ranks = ranks
        self.needs_prompt = policy.needs_prompt or (decodes is not None and decodes.needs_prompt)
        self.view = PoolView(array("i", [worker.worker_idx for worker in workers]))
        # Routes without a prompt are alike for every request of a policy: made once.
        self.plain_routes = [
            Route(self, upstream, policy.plain_decision, rank=worker.rank_base) for worker, upstream in zip(workers, upstreams, strict=True)
        ]
        self._ranked_routes = (
            {place: _routes_of_ranks(self, place) for place in ranks.positions} if ranks is not None and not self.needs_prompt else {}
        )
        # How the workers cut prompts into blocks; one way in a pool of equals.
        variants = {worker.variant for worker in workers if worker.block_size}
        if decodes is not None and decodes.needs_prompt:
            variants.update(decodes.variants)
        self.variants = tuple(sorted(variants))
        self.by_rank: dict[int, tuple[int, Variant]] = {
            worker.rank_base + rank: (position, worker.variant)
            for position, worker in enumerate(workers)
            if worker.block_size
            for rank in range(worker.dp_size)
        }
        # Predictions are kept for all ranks; of some workers, or of all, nothing else is known.
        self.positions = {worker.rank_base + rank: position for position, worker in enumerate(workers) for rank in range(worker.dp_size)}
        self.is_approximate = isinstance(policy, ApproximateCacheAware)
        self.exact_policy = policy.exact() if isinstance(policy, ApproximateCacheAware) else policy
        self.is_silent = not all(worker.block_size for worker in workers)

    def plain_route(self, position: int) -> Route:
        """The route to a worker that was chosen without a prompt, to its idlest rank where ranks are chosen."""
        routes = self._ranked_routes.get(position)
        if routes is None or self.ranks is None:
            return self.plain_routes[position]
        return routes[self.ranks.idlest(self.workers[position])]

    def is_prefill(self, position: int) -> bool:
        """Whether the worker computes prompts only: another has to make the tokens behind them."""
        return self.workers[position].record.role == "prefill"

    def is_full(self, loads: Loads, limit: int, tried: tuple[int, ...] = ()) -> bool:
        """Whether no request can be given away without some worker getting more than `limit` of them.

        tried: rows of workers that have failed the request; they do not count as long as there are others.
        """
        decodes = self.decodes
        idxs = self.view.worker_idxs
        if decodes is not None and loads.least(_others(decodes.view.worker_idxs, tried))[1] >= limit:
            idxs = array("i", [idx for position, idx in enumerate(idxs) if not self.is_prefill(position)])
        return not idxs or loads.least(_others(idxs, tried))[1] >= limit

    def policy_of(self, prompt: Prompt) -> Policy:
        """The policy for this prompt: token ids are looked up without a tokenizer, too, and then nothing about them is approximate."""
        return self.exact_policy if prompt.is_looked_up else self.policy

    def is_approximate_at(self, position: int, prompt: Prompt) -> bool:
        """Whether what is known of the prompt in the worker's cache is what it was sent, not what its events say."""
        return (self.is_approximate and not prompt.is_looked_up) or not self.workers[position].block_size

    def block_tokens(self, position: int, prompt: Prompt) -> int:
        """The unit of the worker's overlap."""
        return BLOCK_TOKENS if self.is_approximate_at(position, prompt) else self.workers[position].block_size

    def known_tokens(self, hit: Hit, prompt: Prompt) -> int:
        """Overlap as users and the parity loop are to see it: where there are events, nothing that they do not say."""
        return hit.overlap_tokens if self.is_approximate_at(hit.position, prompt) else hit.overlap_tokens - hit.guessed_tokens


def _routes_of_ranks(pool: Pool, position: int) -> list[Route]:
    worker, upstream, decision = pool.workers[position], pool.upstreams[position], pool.policy.plain_decision
    return [Route(pool, upstream, decision, rank=worker.rank_base + rank, dp_rank=rank) for rank in range(worker.dp_size)]


def _others(idxs: array[int], tried: tuple[int, ...]) -> array[int]:
    return (array("i", [idx for idx in idxs if idx not in tried]) or idxs) if tried else idxs


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


def policy_for(name: str, workers: list[WorkerView], kept: Policy | None, config: ServeConfig, loads: Loads) -> Policy:
    """`make_policy` for these workers, or the one that they had when that is of the same kind: its turn goes on."""
    fresh = make_policy(name, config, loads, has_events=any(worker.block_size for worker in workers))
    return kept if kept is not None and type(kept) is type(fresh) else fresh


def why_unserved(roles: dict[str, int]) -> errors.Reason | None:
    """Why a model cannot be served whatever its breakers say; None when it can. roles: how many of its workers are ready, by role."""
    if roles.get("regular") or (roles.get("prefill") and roles.get("decode")):
        return None
    if "regular" in roles:
        return errors.NO_HEALTHY_WORKERS
    return errors.NO_DECODE_WORKERS_AVAILABLE if roles.get("prefill") else errors.NO_PREFILL_WORKERS_AVAILABLE
