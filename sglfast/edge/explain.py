"""POST /explain/<path>: what the router would do with this request, and why. Nothing is forwarded or counted.

Runs in: shards, event loop (the prompt's tokens in the tokenizer's thread, as for a request). Contract: the answer is made by the same
    look-up and the same policy as a request's, on a copy of the policy, so that even a turn of round_robin is not used up. Candidates
    are all workers of the model; those that are not ready say so, and what they hold all the same. Scores are what the policy
    minimises, null where it compares nothing; they, and the choice, count predictions (edge/predict) as overlap, `overlap_blocks` does
    not where there are events.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sglfast import _counters, _workers, errors
from sglfast._hashtree import ANY_TIER
from sglfast.edge.policy import CACHE_HIT, CACHE_MISS, IMBALANCED, UNKEYED, Hit, Prompt
from sglfast.edge.request import Endpoint, Facts
from sglfast.shm import DECISIONS, WorkerView, read_workers

if TYPE_CHECKING:
    from sglfast.edge.pools import Pool
    from sglfast.edge.shard import Shard

PREFIX = b"/explain"
TIERS = {"device": 1, "host": 2, "disk": 4}
_NOT_READY = {
    _workers.JOINING: "has not passed a health check yet",
    _workers.UNHEALTHY: "fails its health checks",
    _workers.DRAINING: "is draining: it finishes its requests and takes no new ones",
    _workers.READY: "its circuit is open: its requests have failed",
}
_APPROXIMATE_WHY = {
    CACHE_HIT: "was sent the longest part of the prompt, more than --cache-threshold of it",
    CACHE_MISS: "is least loaded, and no worker was sent more than --cache-threshold of the prompt",
}
_WHY = {
    CACHE_HIT: "holds the longest part of the prompt, more than --cache-threshold of its blocks",
    CACHE_MISS: "has the least work before the first token (score)",
    IMBALANCED: "is least loaded, and the pool is out of balance: caches are ignored",
    UNKEYED: "is least loaded; the prompt could not be compared with caches",
}


_DECODE_WHY = {
    _counters.S_AFFINITY_SAME_HOST: "is on the prefill worker's host",
    _counters.S_AFFINITY_BREAKER: "is least loaded; the circuit of the one on the prefill worker's host is open",
    _counters.S_AFFINITY_LOAD: "is least loaded; the one on the prefill worker's host has more than twice the median load",
}
_RANK_WHY = {
    _counters.RANK_HIT: "holds the longest part of the prompt, more than --cache-threshold of its blocks",
    _counters.RANK_LEAST: "has the least work before the first token",
    _counters.RANK_OVERLOADED: "has the least work before the first token; whoever holds the most is overloaded against its siblings",
}
_NOT_BETTER = "was not better than the choice"
_NO_SECOND = "has no decode worker to go with it"


def explain(shard: Shard, endpoint: Endpoint, body: bytes, then: Callable[[dict[str, Any] | errors.Reason], None]) -> None:
    """Call `then` with the explanation, or with the reason why there is no choice."""
    pool = shard.router.pool_of(body)
    if isinstance(pool, errors.Reason):
        then(pool)
    elif shard.router.keyer is None or not pool.variants:
        why = "no tokenizer is loaded" if shard.router.keyer is None else "no worker publishes KV events"
        then(_explanation(shard, pool, Facts(0, {}, why), body))
    else:
        # A reader wants the whole prompt counted, although the choice would not need it.
        keyer = shard.router.keyer
        keyer.key(endpoint.kind, body, pool.variants, lambda facts: then(_explanation(shard, pool, facts, body)), is_whole=True)


def _explanation(shard: Shard, pool: Pool, facts: Facts, body: bytes) -> dict[str, Any]:
    prompt, found = shard.router.compare(pool, facts, body)
    policy, is_approximate = pool.policy_of(prompt), pool.is_approximate and not prompt.is_looked_up
    position, decision = copy.copy(policy).choose(pool.view, shard.loads, prompt)
    known = [view for view in read_workers(shard.table) if view.record.model == pool.model]
    by_tier = {name: _held(shard, known, facts, tier) for name, tier in TIERS.items()}
    sent = {place: int(share * prompt.prompt_tokens) // pool.block_tokens(place, prompt) for place, (_, share) in found.shares.items()}
    hits = {hit.position: hit for hit in prompt.hits}
    candidates = [
        _candidate(shard, pool, prompt, place, hits.get(place), _in_tiers(by_tier, pool.workers[place], sent.get(place, 0)))
        for place in range(len(pool.workers))
    ]
    candidates[position]["why"] = (_APPROXIMATE_WHY if is_approximate else _WHY).get(decision) or _WHY.get(
        decision, f"is the choice of {DECISIONS[decision]}"
    )
    held = _held(shard, known, facts)
    chosen_from = {view.worker_idx for view in pool.workers}
    others = [
        _unready(shard, view, held.get(view.worker_idx, (0, view.rank_base)), _in_tiers(by_tier, view), has_second=pool.decodes is not None)
        for view in known
        if view.worker_idx not in chosen_from and view.record.role != "decode"
    ]
    sizes = sorted({variant.block_size for variant in pool.variants})
    chosen = candidates[position]
    return {
        "model": pool.model,
        "policy": policy.name,
        "block_size": sizes[0] if len(sizes) == 1 else sizes or None,
        "prompt_tokens": prompt.prompt_tokens,
        "prompt_blocks": prompt.prompt_blocks,
        "is_approximate": is_approximate,
        "unkeyed_because": None if prompt.is_keyed else facts.why_unkeyed or None,
        "candidates": candidates + others,
        "choice": {"worker": chosen["worker"], "rank": chosen["rank"], "decision": DECISIONS[decision]},
        "decode": _decode_side(shard, pool, position, known, facts, body) if pool.is_prefill(position) else None,
    }


def _decode_side(shard: Shard, pool: Pool, position: int, known: list[WorkerView], facts: Facts, body: bytes) -> dict[str, Any] | None:
    """The decode worker that would go with the chosen prefill worker, and those that there are. known: all workers of the model."""
    if pool.decodes is None:
        return None
    decodes = copy.copy(pool.decodes)
    decodes.policy = copy.copy(decodes.policy)
    prompt = shard.router.compare(decodes, facts, body)[0] if decodes.needs_prompt else Prompt()
    place, word = decodes.choose(pool.upstreams[position].host, shard.loads, prompt)
    chosen = decodes.upstreams[place].url
    may_be_chosen = {view.worker_idx for view in decodes.workers}
    candidates = []
    for view in known:
        if view.record.role == "decode":
            is_eligible = view.worker_idx in may_be_chosen
            why = _NOT_BETTER if is_eligible else _NOT_READY[view.state]
            row = {"worker": view.record.url, "load": {"requests": shard.loads.requests(view.worker_idx)}, "eligible": is_eligible}
            candidates.append(
                row | {"why": (_DECODE_WHY.get(word) or f"is the choice of {decodes.policy.name}") if view.record.url == chosen else why}
            )
    return {"worker": chosen, "policy": "affinity" if decodes.is_affine else decodes.policy.name, "candidates": candidates}


def _held(shard: Shard, known: list[WorkerView], facts: Facts, tiers: int = ANY_TIER) -> dict[int, tuple[int, int]]:
    """worker_idx -> (leading blocks that the worker holds in these tiers alone, its rank that holds most)."""
    owners = {view.rank_base + rank: view for view in known if view.block_size for rank in range(view.dp_size)}
    found: dict[int, tuple[int, int]] = {}
    for variant, keys in facts.keys.items():
        if keys and shard.tree.match(keys, tiers):
            for rank, blocks in shard.tree.hits():
                owner = owners.get(rank)
                if owner is not None and owner.variant == variant and blocks > found.get(owner.worker_idx, (0, 0))[0]:
                    found[owner.worker_idx] = blocks, rank
    return found


def _in_tiers(by_tier: dict[str, dict[int, tuple[int, int]]], view: WorkerView, sent_blocks: int = 0) -> dict[str, int]:
    """A worker's overlap in each tier."""
    return {name: held.get(view.worker_idx, (0, 0))[0] for name, held in by_tier.items()} | {"predicted": sent_blocks}


def _candidate(shard: Shard, pool: Pool, prompt: Prompt, position: int, hit: Hit | None, in_tiers: dict[str, int]) -> dict[str, Any]:
    view = pool.workers[position]
    requests, tokens = shard.loads.requests(view.worker_idx), shard.loads.tokens(view.worker_idx)
    overlap_tokens = hit.overlap_tokens if hit is not None else 0
    ranks: list[dict[str, Any]] = []
    if pool.ranks is not None and position in pool.ranks.positions:
        hit, why = pool.ranks.pick(view, position, prompt)
        ranks = [_rank(shard, pool, position, prompt, rank) for rank in range(view.dp_size)]
        ranks[hit.rank - view.rank_base]["why"] = _RANK_WHY[why]
    return {
        "worker": view.record.url,
        "rank": hit.rank - view.rank_base if hit is not None else 0,
        "ranks": ranks,
        "overlap_blocks": _known_blocks(pool, prompt, hit),
        "overlap_blocks_by_tier": in_tiers,
        "load": {"requests": requests, "tokens": tokens},
        "score": pool.policy_of(prompt).score(requests, tokens + prompt.prompt_tokens - overlap_tokens),
        "eligible": True,
        "why": _NOT_BETTER,
    }


def _known_blocks(pool: Pool, prompt: Prompt, hit: Hit | None) -> int:
    return pool.known_tokens(hit, prompt) // pool.block_tokens(hit.position, prompt) if hit is not None else 0


def _rank(shard: Shard, pool: Pool, position: int, prompt: Prompt, rank: int) -> dict[str, Any]:
    """A rank of a worker whose requests are steered."""
    tree_rank = pool.workers[position].rank_base + rank
    requests, tokens = shard.rank_loads.of(tree_rank)
    overlap_blocks = _known_blocks(pool, prompt, (prompt.by_rank or {}).get(tree_rank))
    return {"rank": rank, "overlap_blocks": overlap_blocks, "load": {"requests": requests, "tokens": tokens}, "why": _NOT_BETTER}


def _unready(shard: Shard, view: WorkerView, held: tuple[int, int], in_tiers: dict[str, int], *, has_second: bool) -> dict[str, Any]:
    """A worker that cannot be chosen now. held: as of _held."""
    return {
        "worker": view.record.url,
        "rank": held[1] - view.rank_base,
        "ranks": [],
        "overlap_blocks": held[0],
        "overlap_blocks_by_tier": in_tiers,
        "load": {"requests": shard.loads.requests(view.worker_idx), "tokens": shard.loads.tokens(view.worker_idx)},
        "score": None,
        "eligible": False,
        "why": _NO_SECOND if view.record.role == "prefill" and view.state == _workers.READY and not has_second else _NOT_READY[view.state],
    }
