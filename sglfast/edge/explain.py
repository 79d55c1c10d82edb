"""POST /explain/<path>: what the router would do with this request, and why. Nothing is forwarded or counted.

Runs in: shards, event loop (the prompt's tokens in the tokenizer's thread, as for a request). Contract: the answer is made by the same
    look-up and the same policy as a request's, on a copy of the policy, so that even a turn of round_robin is not used up. Candidates
    are all workers of the model; those that are not ready say so, and what they hold all the same. Where none can be chosen, `choice` is
    null and `would_answer` what a request would get now, or after its wait. Scores are what the policy minimises, null where it
    compares nothing; they, and the choice, count predictions (edge/predict) as overlap, `overlap_blocks` does not where there are events.
"""

from __future__ import annotations

import copy
from array import array
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from sglfast import _counters, _workers, errors
from sglfast._hashtree import ANY_TIER
from sglfast.edge.failover import best_left, least_left
from sglfast.edge.policy import CACHE_HIT, CACHE_MISS, FAILOVER, IMBALANCED, NO_PROMPT, UNKEYED, Hit, Prompt
from sglfast.edge.pools import policy_for
from sglfast.edge.request import Endpoint, Facts
from sglfast.shm import DECISIONS, WorkerView

if TYPE_CHECKING:
    from sglfast.config import ServeConfig
    from sglfast.edge.pools import Pool
    from sglfast.edge.route import Router
    from sglfast.edge.shard import Shard
    from sglfast.shm import Variant

PREFIX = b"/explain"
TIERS = {"device": 1, "host": 2, "disk": 4}
_NOT_READY = {
    _workers.JOINING: "has not passed a health check yet",
    _workers.UNHEALTHY: "fails its health checks",
    _workers.DRAINING: "is draining: it finishes its requests and takes no new ones",
}
_SHUT = "its circuit is open: its requests have failed"
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
_FULL_WHY = "is the best of those that have fewer requests than --worker-max-in-flight"
_NOT_BETTER = "was not better than the choice"
_FULL = "has as many requests as --worker-max-in-flight lets it"
_SECONDS_FULL = "has no decode worker to go with it that has fewer requests than --worker-max-in-flight"
_NO_SECOND = "has no decode worker to go with it"
_NO_FIRST = "has no prefill worker to go with it"


def explain(shard: Shard, endpoint: Endpoint, body: bytes, then: Callable[[dict[str, Any] | errors.Reason], None]) -> None:
    """Call `then` with the explanation, or with the reason why there is nothing to explain: nobody has such a model."""
    router = shard.router
    pool = router.pool_of(body)
    if isinstance(pool, errors.Reason) and pool.status != errors.NO_HEALTHY_WORKERS.status:
        then(pool)
        return
    known = _known(router, pool, body)
    variants = tuple(sorted({view.variant for view in known if view.block_size})) if isinstance(pool, errors.Reason) else pool.variants
    if router.keyer is None or not variants:
        why = "no tokenizer is loaded" if router.keyer is None else "no worker publishes KV events"
        then(_explanation(shard, pool, known, Facts(0, {}, why), body))
    else:
        # A reader wants the whole prompt counted, although the choice would not need it.
        router.keyer.key(endpoint.kind, body, variants, lambda facts: then(_explanation(shard, pool, known, facts, body)), is_whole=True)


def _known(router: Router, pool: Pool | errors.Reason, body: bytes) -> list[WorkerView]:
    """The workers of the model, whatever their state, and those that may turn out to be: they have not told theirs yet."""
    if isinstance(pool, errors.Reason):
        wanted = (router.model_in(body), None)
        return [view for view in router.views if view.record.model in wanted]
    return [
        view for view in router.views if view.record.model == pool.model or (view.record.model is None and view.state != _workers.READY)
    ]


def _explanation(shard: Shard, pool: Pool | errors.Reason, known: list[WorkerView], facts: Facts, body: bytes) -> dict[str, Any]:
    by_tier = {name: _held(shard, known, facts, tier) for name, tier in TIERS.items()}
    held = _held(shard, known, facts)
    if isinstance(pool, errors.Reason):
        explained, chosen_from = _without_pool(shard, pool, known, facts), set[int]()
        has_second = any(view.record.role == "decode" and _why_not(shard, view) is None for view in known)
    else:
        explained = _with_pool(shard, pool, known, facts, body, by_tier)
        chosen_from = {view.worker_idx for view in pool.workers}
        has_second = pool.decodes is not None
    explained["candidates"] += [
        _unready(shard, view, held.get(view.worker_idx, (0, view.rank_base)), _in_tiers(by_tier, view), has_second=has_second)
        for view in known
        if view.worker_idx not in chosen_from and view.record.role != "decode"
    ]
    return explained


def _with_pool(
    shard: Shard, pool: Pool, known: list[WorkerView], facts: Facts, body: bytes, by_tier: dict[str, dict[int, tuple[int, int]]]
) -> dict[str, Any]:
    """The choice among the workers of a pool, unless --worker-max-in-flight leaves none, and these as candidates."""
    prompt, found = shard.router.compare(pool, facts, body)
    is_approximate = pool.is_approximate and not prompt.is_looked_up
    sent = {place: int(share * prompt.prompt_tokens) // pool.block_tokens(place, prompt) for place, (_, share) in found.shares.items()}
    hits = {hit.position: hit for hit in prompt.hits}
    candidates = [
        _candidate(shard, pool, prompt, place, hits.get(place), _in_tiers(by_tier, pool.workers[place], sent.get(place, 0)))
        for place in range(len(pool.workers))
    ]
    choice = _choice(shard, pool, prompt, [place for place, row in enumerate(candidates) if row["eligible"]])
    position, decision = choice or (-1, 0)
    chosen = candidates[position] if choice else None
    if chosen is not None:
        why = _FULL_WHY if decision == FAILOVER else (_APPROXIMATE_WHY if is_approximate else _WHY).get(decision) or _WHY.get(decision)
        chosen["why"] = why or f"is the choice of {DECISIONS[decision]}"
    shows_decode = chosen is None or pool.is_prefill(position)
    return {
        "model": pool.model,
        "policy": pool.policy_of(prompt).name,
        "block_size": _one_or_all(pool.variants),
        "prompt_tokens": prompt.prompt_tokens,
        "prompt_blocks": prompt.prompt_blocks,
        "is_approximate": is_approximate,
        "unkeyed_because": None if prompt.is_keyed else facts.why_unkeyed or None,
        "candidates": candidates,
        "choice": {"worker": chosen["worker"], "rank": chosen["rank"], "decision": DECISIONS[decision]} if chosen is not None else None,
        "would_answer": _after_wait(shard.config) if chosen is None else None,
        "decode": _decode_side(shard, pool, position if chosen is not None else None, known, facts, body) if shows_decode else None,
    }


def _without_pool(shard: Shard, reason: errors.Reason, known: list[WorkerView], facts: Facts) -> dict[str, Any]:
    """What is to be said where no worker of a model can be chosen, without its candidates."""
    config, loads = shard.config, shard.loads
    has_prefill = any(view.record.role == "prefill" for view in known)
    name = (config.prefill_policy if has_prefill else None) or config.policy
    decode_rows = [
        _decode_row(shard, view, _why_not(shard, view) or _NO_FIRST, is_eligible=False) for view in known if view.record.role == "decode"
    ]
    decode_policy = policy_for(config.decode_policy, known, None, config, loads).name if config.decode_policy is not None else "affinity"
    return {
        "model": next((view.record.model for view in known if view.record.model is not None), None),
        "policy": policy_for(name, known, None, config, loads).name,
        "block_size": _one_or_all(facts.keys),
        "prompt_tokens": facts.prompt_tokens,
        "prompt_blocks": max((facts.prompt_tokens // variant.block_size for variant in facts.keys), default=0),
        "is_approximate": False,
        "unkeyed_because": None if facts.keys else facts.why_unkeyed or None,
        "candidates": [],
        "choice": None,
        "would_answer": _would_answer(reason),
        "decode": {"worker": None, "policy": decode_policy, "candidates": decode_rows} if decode_rows else None,
    }


def _one_or_all(variants: Iterable[Variant]) -> int | list[int] | None:
    """The block size; all of them where there are several."""
    sizes = sorted({variant.block_size for variant in variants})
    return sizes[0] if len(sizes) == 1 else sizes or None


def _choice(shard: Shard, pool: Pool, prompt: Prompt, with_room: list[int]) -> tuple[int, int] | None:
    """(position, decision) as for a request now; None: it would have to wait. with_room: positions of those that take one more."""
    policy = pool.policy_of(prompt)
    position, decision = copy.copy(policy).choose(pool.view, shard.loads, prompt)
    if position in with_room:
        return position, decision
    left = array("i", [pool.view.worker_idxs[place] for place in with_room])
    return (best_left(pool, left, shard.loads, prompt if policy.needs_prompt else NO_PROMPT)[0], FAILOVER) if left else None


def _is_full(shard: Shard, view: WorkerView) -> bool:
    limit: int = shard.config.worker_max_in_flight
    return bool(limit) and shard.loads.requests(view.worker_idx) >= limit


def _would_answer(reason: errors.Reason, after_secs: float = 0.0) -> dict[str, Any]:
    """What a request would get instead of an answer. after_secs: until then it waits for a worker."""
    return {"status": reason.status, "code": reason.code, "message": reason.message, "after_secs": after_secs}


def _after_wait(config: ServeConfig) -> dict[str, Any]:
    """The same of one for which all workers are full."""
    if config.queue_size > 0 and config.queue_timeout_secs > 0:
        return _would_answer(errors.QUEUE_TIMEOUT, config.queue_timeout_secs)
    return _would_answer(errors.QUEUE_FULL)


def _decode_side(
    shard: Shard, pool: Pool, position: int | None, known: list[WorkerView], facts: Facts, body: bytes
) -> dict[str, Any] | None:
    """The decode worker that would go with the chosen prefill worker, and those that there are. position: None where there is no choice;
    known: all workers of the model."""
    if pool.decodes is None:
        return None
    decodes = copy.copy(pool.decodes)
    decodes.policy = copy.copy(decodes.policy)
    prompt = shard.router.compare(decodes, facts, body)[0] if decodes.needs_prompt else Prompt()
    chosen, chosen_why = None, ""
    if position is not None:
        place, word = decodes.choose(pool.upstreams[position].host, shard.loads, prompt)
        chosen_why = _DECODE_WHY.get(word) or f"is the choice of {decodes.policy.name}"
        if _is_full(shard, decodes.workers[place]):
            place = least_left(decodes.view.worker_idxs, shard.loads, (), shard.config.worker_max_in_flight)
            chosen_why = _FULL_WHY
        chosen = decodes.workers[place]
    may_be_chosen = {view.worker_idx for view in decodes.workers}
    candidates = []
    for view in known:
        if view.record.role == "decode":
            why_not = _FULL if _is_full(shard, view) else None
            if view.worker_idx not in may_be_chosen:
                why_not = _why_not(shard, view) or _SHUT
            is_chosen = chosen is not None and view.worker_idx == chosen.worker_idx
            why = chosen_why if is_chosen else why_not or _NOT_BETTER
            candidates.append(_decode_row(shard, view, why, is_eligible=why_not is None))
    url = chosen.record.url if chosen is not None else None
    return {"worker": url, "policy": "affinity" if decodes.is_affine else decodes.policy.name, "candidates": candidates}


def _decode_row(shard: Shard, view: WorkerView, why: str, *, is_eligible: bool) -> dict[str, Any]:
    return {"worker": view.record.url, "load": {"requests": shard.loads.requests(view.worker_idx)}, "eligible": is_eligible, "why": why}


def _why_not(shard: Shard, view: WorkerView) -> str | None:
    """Why a worker cannot be chosen whatever others there are; None: it can."""
    if view.state != _workers.READY:
        return _NOT_READY[view.state]
    breakers = shard.breakers
    return _SHUT if breakers.is_on and not breakers.table.is_selectable(view.worker_idx) else None


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
    why_not = _FULL if _is_full(shard, view) else None
    if pool.decodes is not None and pool.is_prefill(position) and all(_is_full(shard, second) for second in pool.decodes.workers):
        why_not = _SECONDS_FULL
    return {
        "worker": view.record.url,
        "rank": hit.rank - view.rank_base if hit is not None else 0,
        "ranks": ranks,
        "overlap_blocks": _known_blocks(pool, prompt, hit),
        "overlap_blocks_by_tier": in_tiers,
        "load": {"requests": requests, "tokens": tokens},
        "score": pool.policy_of(prompt).score(requests, tokens + prompt.prompt_tokens - overlap_tokens),
        "eligible": why_not is None,
        "why": why_not or _NOT_BETTER,
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
    """A worker that cannot be chosen now. held: as of _held; has_second: there is a decode worker for it."""
    needs_second = view.record.role == "prefill" and not has_second
    return {
        "worker": view.record.url,
        "rank": held[1] - view.rank_base,
        "ranks": [],
        "overlap_blocks": held[0],
        "overlap_blocks_by_tier": in_tiers,
        "load": {"requests": shard.loads.requests(view.worker_idx), "tokens": shard.loads.tokens(view.worker_idx)},
        "score": None,
        "eligible": False,
        "why": _why_not(shard, view) or (_NO_SECOND if needs_second else _SHUT),
    }
