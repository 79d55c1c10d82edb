"""Choosing a worker: the KV index's answer for a prompt, the policy, and the next choice when one fails.

Runs in: shards, event loop. Contract: `choose` calls back exactly once with a Route or the Reason of a refusal. Which workers there are
    to choose from is edge/served's.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from sglfast import _counters, errors
from sglfast.edge.failover import best_left, least_left, rows_left
from sglfast.edge.mishap import report
from sglfast.edge.overlap import look_up
from sglfast.edge.pairs import pair
from sglfast.edge.policy import FAILOVER, NO_PROMPT, Hit, Prompt
from sglfast.edge.pools import Pool, Route
from sglfast.edge.predict import BLOCK_TOKENS, NOTHING, Found, Predictor, predicted, with_guesses
from sglfast.edge.request import Endpoint, Facts, PromptKeyer
from sglfast.edge.served import Served
from sglfast.shm import PARITY_OK, RANK_STATES, Variant

if TYPE_CHECKING:
    from sglfast.edge.shard import Shard

_NO_FACTS = Facts(0, {}, "the policy asks for no prompt")
_NO_BASIS = (b"", -1)
_NO_KEYS: Mapping[Variant, bytes] = {}


class Router(Served):
    """The choice among the workers that are served."""

    def __init__(self, shard: Shard, keyer: PromptKeyer | None) -> None:
        super().__init__(shard)
        self.keyer = keyer
        self._predictor: Predictor | None = None  # made when a policy first has a use for it

    def make_pools(self) -> None:
        super().make_pools()
        reads_prompts = any(pool.needs_prompt for pool in self.pools.values())
        if reads_prompts and self._predictor is None and self._shard.segment.prediction_blocks:
            self._predictor = Predictor(self._shard.segment, self._shard.process_slot - 1)

    def choose(
        self,
        endpoint: Endpoint,
        body: bytes,
        then: Callable[[Route | errors.Reason], None],
        is_wanted: Callable[[], bool] | None = None,
    ) -> None:
        """Find a worker for a request and call `then`, at once unless a long prompt is being tokenized.

        is_wanted: whether somebody waits for it still; else nothing is chosen, and the Reason that `then` gets means nothing.
        """
        pool = self.pool_of(body)
        if isinstance(pool, errors.Reason):
            then(pool)
        elif not pool.needs_prompt:
            position, decision = pool.policy.choose(pool.view, self._shard.loads, NO_PROMPT)
            route = pool.plain_route(position)
            if route.decision != decision:
                route = replace(route, decision=decision)
            then(self._with_decode(pool, position, route))
        elif self.keyer is None or not pool.variants:
            then(self._choose_keyed(pool, Facts(0, {}, "no tokenizer, or no worker publishes KV events"), body))
        else:
            chosen = pool

            def found(facts: Facts) -> None:
                is_left = is_wanted is not None and not is_wanted()
                then(errors.INTERNAL_ERROR if is_left else self._choose_after(chosen, facts, body))

            self.keyer.key(endpoint.kind, body, pool.variants, found, is_wanted=is_wanted)

    def _choose_after(self, pool: Pool, facts: Facts, body: bytes) -> Route | errors.Reason:
        # A prompt may have spent a while in the tokenizer's thread: its pool may have changed or gone. And then nobody is above us who
        # would answer the client when something fails here.
        try:
            self.refresh()
            now = self.pools.get(pool.model)
            return self._choose_keyed(now, facts, body) if now is not None else self.closed.get(pool.model, errors.NO_HEALTHY_WORKERS)
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
        policy = pool.exact_policy if prompt.is_looked_up else pool.policy
        position, decision = policy.choose(pool.view, self._shard.loads, prompt)
        route = self._route(pool, position, decision, prompt, found, facts.keys)
        if prompt.is_keyed:
            column.add_worker(route.upstream.worker_idx, _counters.W_PROMPT_BLOCKS, route.prompt_blocks)
            column.add_worker(route.upstream.worker_idx, _counters.W_OVERLAP_BLOCKS, route.overlap_blocks)
        return route if pool.decodes is None else self._with_decode(pool, position, route, facts, body)

    def _with_decode(self, pool: Pool, position: int, first: Route, facts: Facts = _NO_FACTS, body: bytes = b"") -> Route:
        """The route itself, or with a decode worker when the chosen one computes prompts only."""
        decodes = pool.decodes
        if decodes is None or not pool.is_prefill(position):
            return first
        prompt, found = self.compare(decodes, facts, body) if decodes.needs_prompt else (NO_PROMPT, NOTHING)
        second, word = decodes.choose(first.upstream.host, self._shard.loads, prompt)
        if word:
            self._shard.column.add(word)
        prediction = None
        if found.keys and self._predictor is not None:
            worker = decodes.workers[second]
            rank = next((hit.rank for hit in prompt.hits if hit.position == second), worker.rank_base)
            prediction = predicted(worker, rank, found.keys, is_kept=decodes.is_approximate_at(second, prompt))
        return pair(decodes, second, first, prediction)

    def _route(
        self, pool: Pool, position: int, decision: int, prompt: Prompt, found: Found, keys: Mapping[Variant, bytes] = _NO_KEYS
    ) -> Route:
        worker = pool.workers[position]
        upstream = pool.upstreams[position]
        hit, steered_to = None, None
        if pool.ranks is not None and position in pool.ranks.positions:
            hit, _ = pool.ranks.pick(worker, position, prompt)
            steered_to = hit.rank
        if not prompt.is_keyed:
            rank = worker.rank_base if steered_to is None else steered_to
            return Route(pool, upstream, decision, rank=rank, dp_rank=rank - worker.rank_base)
        column, predictor = self._shard.column, self._predictor
        if hit is None:
            hit = next((hit for hit in prompt.hits if hit.position == position), None) or Hit(position, worker.rank_base, 0, 0)
        is_approximate = pool.is_approximate_at(position, prompt)
        block_tokens = BLOCK_TOKENS if is_approximate else worker.block_size
        known_tokens = hit.overlap_tokens if is_approximate else hit.overlap_tokens - hit.guessed_tokens  # what events say, if they do
        predicted_tokens = -1 if is_approximate else known_tokens
        prediction = None
        if hit.guessed_tokens and predictor is not None:
            column.add(_counters.S_PREDICTED)
            # Whether the worker has it in time is not known, so its report says nothing about what events said.
            if predictor.is_in_flight(worker, steered_to):
                predicted_tokens = -1
        if found.keys and predictor is not None:
            prediction = predicted(worker, hit.rank, found.keys, is_kept=is_approximate)
        overlap_blocks = known_tokens // block_tokens
        basis = _NO_BASIS
        if predicted_tokens >= 0 and keys:
            # The pool may have changed since its keys were asked for.
            chain = keys.get(pool.by_rank[hit.rank][1], b"") if len(keys) > 1 else next(iter(keys.values()))
            is_busy = self._shard.loads.requests(worker.worker_idx) > 0
            basis = (
                chain[8 * overlap_blocks : 8 * overlap_blocks + 8],
                self._shard.ranks.get(hit.rank, _counters.R_BLOCKS_REMOVED) if is_busy else -1,
            )
        return Route(
            pool,
            upstream,
            decision,
            uncached_tokens=prompt.prompt_tokens - hit.overlap_tokens,
            rank=hit.rank,
            dp_rank=hit.rank - worker.rank_base,
            overlap_blocks=overlap_blocks,
            prompt_blocks=prompt.prompt_tokens // block_tokens,
            predicted_tokens=predicted_tokens,
            basis=basis,
            is_trusted=worker.parity == PARITY_OK,
            is_estimated=prompt.is_estimated,
            is_approximate=is_approximate,
            prediction=prediction,
            prompt=prompt,
        )

    def compare(self, pool: Pool, facts: Facts, body: bytes) -> tuple[Prompt, Found]:
        """What a policy is to know of a prompt: the KV index's answer, with what the router itself sent where.

        The latter is left out where it could not matter: less than an eighth of the prompt is left to compute.
        """
        prompt = look_up(self._shard.tree, pool, facts)
        if self._predictor is None:
            return prompt, NOTHING
        if not pool.is_silent and (prompt.is_keyed or not pool.is_approximate):
            best_tokens = max((hit.overlap_tokens for hit in prompt.hits), default=0)
            if not prompt.is_keyed or 8 * best_tokens >= 7 * prompt.prompt_tokens:
                return prompt, NOTHING
        found = self._predictor.look_up(pool, body)
        return (with_guesses(prompt, found) if found.keys else prompt), found

    def note(self, route: Route) -> None:
        """The request goes to the route's worker now."""
        if self._predictor is not None and route.prediction is not None:
            self._predictor.note(route.prediction)

    def settle(self, route: Route) -> None:
        """The request's first token came, or it left its worker without one."""
        if self._predictor is not None and route.prediction is not None:
            self._predictor.settle(route.prediction)

    def next_choice(self, failed: Route, tried: tuple[int, ...]) -> Route | None:
        """A worker of the pool, or a pair, for one more attempt, or None when the pool is empty.

        One that was not tried yet; when all were, one that has not just failed; else the one that has. Of these one below
        `--worker-max-in-flight`, if there is one. Of a pair whose decode worker has failed the prefill worker stays: it has the prompt
        in its cache by now.
        """
        self.refresh()
        first = failed.prefill or failed
        pool = self.pools.get(first.pool.model)
        if pool is None:
            return None
        loads, decodes, limit = self._shard.loads, pool.decodes, self._shard.config.worker_max_in_flight
        idxs = pool.view.worker_idxs
        has_second = decodes is not None and any(idx not in tried for idx in decodes.view.worker_idxs)
        if has_second and first.upstream.worker_idx not in tried and first.upstream in pool.upstreams and failed.prefill is not None:
            position = pool.upstreams.index(first.upstream)
            again = replace(first, pool=pool, decision=FAILOVER, predicted_tokens=-1)
        else:
            # Where every decode worker has failed, those that need none go first.
            alone = array("i", [idx for place, idx in enumerate(idxs) if not pool.is_prefill(place) and idx not in tried])
            left = rows_left(alone if alone and not has_second else idxs, loads, tried, limit)
            position, prompt = best_left(pool, left, loads, first.prompt)
            found = Found(first.prediction.keys) if first.prediction is not None else NOTHING
            # What was known is too old by now to be held against the worker's report.
            again = replace(self._route(pool, position, FAILOVER, prompt, found), predicted_tokens=-1)
        if decodes is None or not pool.is_prefill(position):
            return again
        return pair(decodes, least_left(decodes.view.worker_idxs, loads, tried, limit), again)

    def is_overtaken(self, route: Route, outcome_word: int, cached_tokens: int) -> bool:
        """Whether what events say of the worker's cache has changed since the choice in a way that explains a wrong prediction.

        Between choice and prefill a request waits, and what runs meanwhile stores and drops blocks. Of what is too low that is known: the
        block behind the predicted ones is the rank's by now, by the keys that we make. Of what is too high it is not: blocks that were
        dropped are stored again by the request itself. So there it is enough that any were dropped. cached_tokens: as reported; all
        tokens of a prompt, or more, are in no engine's cache before it computes the last one.
        """
        next_key, removed_blocks = route.basis
        if outcome_word == _counters.W_PARITY_LOW:
            if not route.is_estimated and cached_tokens >= route.prompt.prompt_tokens:
                return False
            tree = self._shard.tree
            return bool(next_key) and tree.match(next_key) > 0 and tree.overlap(route.rank) > 0
        return removed_blocks >= 0 and self._shard.ranks.get(route.rank, _counters.R_BLOCKS_REMOVED) != removed_blocks

    def describe(self, route: Route) -> bytes:
        """Value of the answer header `x-sglfast-kv`: what was predicted for this request."""
        state = "APPROXIMATE" if route.is_approximate else "BLIND"
        if not route.is_approximate and route.rank in route.pool.by_rank:
            state = RANK_STATES[self._shard.ranks.get(route.rank, _counters.R_STATE) & 3]
            if state == "EXACT" and not route.is_trusted:
                state = "DEGRADED"
        return (
            f"worker={route.upstream.url}; rank={route.dp_rank}; overlap_blocks={route.overlap_blocks}; "
            f"prompt_blocks={route.prompt_blocks}; state={state}"
        ).encode()
