"""Choosing a worker: pools by model, the KV index's answer for a prompt, the policy, and the next choice when one fails.

Runs in: shards, event loop. Contract: `choose` calls back exactly once with a Route or the Reason of a refusal. The structures here
    are rebuilt only when the version of the worker table or of the breakers moves; a request costs two atomic loads for that.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from sglfast import _counters, _workers, errors
from sglfast._breaker import CLOSED
from sglfast._relay import RouterBase
from sglfast.edge.bootstrap import address_of
from sglfast.edge.failover import best_left, least_left, rows_left
from sglfast.edge.mishap import report
from sglfast.edge.overlap import look_up
from sglfast.edge.pairs import Decodes, make_decodes, pair
from sglfast.edge.policy import FAILOVER, NO_PROMPT, Hit, Prompt
from sglfast.edge.pools import Pool, Route, policy_for, why_unserved
from sglfast.edge.predict import BLOCK_TOKENS, NOTHING, Found, Predictor, predicted, with_guesses
from sglfast.edge.ranks import ranks_of
from sglfast.edge.request import Endpoint, Facts, PromptKeyer, model_of
from sglfast.edge.upstream import Upstream
from sglfast.shm import PARITY_OK, RANK_STATES, Variant, WorkerView, read_workers

if TYPE_CHECKING:
    from sglfast.edge.shard import Shard

_NO_FACTS = Facts(0, {}, "the policy asks for no prompt")
_NO_BASIS = (b"", -1)
_NO_KEYS: Mapping[Variant, bytes] = {}
_UNREADABLE_PAUSE_S = 10.0


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
        self.adapters: dict[str, str] = {}  # name of an adapter that is asked for as a model -> its base model
        self.closed: dict[str | None, errors.Reason] = {}  # models without a pool, and why: breakers, or half of a pair
        self.ready_workers = 0  # those that are shut included, those whose other half is missing not

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
            upstream.bootstrap = address_of(upstream.host, view.record)
            upstream.dp_size = view.dp_size
            upstream.rank_ways = None  # a role may change in place; _make_pool says so of those that are steered
            if self._shard.request_log is not None:
                upstream.log_label = self._shard.request_log.label(view.record.model, view.record.url, view.record.role)
        for upstream in old.values():
            upstream.close()
        if old:
            self._shard.cut(set(old.values()))
        self.models = sorted({view.record.model for view in views if view.record.model is not None})
        bases = {name: view.record.model for view in views for name in view.record.adapter_models if view.record.model is not None}
        self.adapters = {name: model for name, model in bases.items() if name not in self.models}

    def _make_pools(self) -> None:
        """The pools of the workers that may be chosen."""
        breakers = self._shard.breakers
        ready = [view for view in self._views if view.state == _workers.READY]
        by_model: dict[str | None, list[WorkerView]] = {}
        shut: list[WorkerView] = []
        for view in ready:
            upstream = self._upstream_of(view)
            upstream.needs_probe = breakers.is_on and breakers.table.state(view.worker_idx) != CLOSED
            if not breakers.is_on or breakers.table.is_selectable(view.worker_idx):
                by_model.setdefault(view.record.model, []).append(view)
            else:
                shut.append(view)
        self._shut = [self._upstream_of(view) for view in shut]
        before, self.pools = self.pools, {}
        for model, workers in by_model.items():
            pool = self._make_pool(model, workers, shut, before.get(model))
            if pool is not None:
                self.pools[model] = pool
        reads_prompts = any(pool.needs_prompt for pool in self.pools.values())
        if reads_prompts and self._predictor is None and self._shard.segment.prediction_blocks:
            self._predictor = Predictor(self._shard.segment, self._shard.process_slot - 1)
        self._count_ready()
        is_alone = len(self.pools) == 1 and len(self.models) <= 1
        only = self.only = next(iter(self.pools.values())) if is_alone else None
        self.plain_routes = None
        if only is not None and only.decodes is None and not only.needs_prompt:
            self.plain_rank = only.plain_route if only.ranks is not None else None
            self.plain_choose = only.policy.choose
            self.plain_arguments = (only.view, self._shard.loads, NO_PROMPT)
            self.plain_routes = only.plain_routes

    def _upstream_of(self, view: WorkerView) -> Upstream:
        return self._upstreams[(view.worker_idx, view.generation)]

    def _make_pool(self, model: str | None, workers: list[WorkerView], shut: list[WorkerView], before: Pool | None) -> Pool | None:
        """The pool of a model's workers that may be chosen, if any can take a request first. before: as it was."""
        config, loads = self._shard.config, self._shard.loads
        seconds = [worker for worker in workers if worker.record.role == "decode"]
        # A prefill worker is none without a second half.
        firsts = [worker for worker in workers if worker.record.role == "regular" or (seconds and worker.record.role == "prefill")]
        if not firsts:
            return None
        name: str = config.policy
        decodes: Decodes | None = None
        if any(worker.record.role == "prefill" for worker in firsts):
            name = config.prefill_policy or name
            shut_hosts = {self._upstream_of(view).host for view in shut if view.record.model == model and view.record.role == "decode"}
            upstreams = [self._upstream_of(worker) for worker in seconds]
            decodes = make_decodes(model, seconds, upstreams, shut_hosts, before, config, loads)
        policy = policy_for(name, firsts, before.policy if before is not None else None, config, loads)
        upstreams = [self._upstream_of(worker) for worker in firsts]
        ranks = ranks_of(firsts, policy, config, self._shard.rank_loads)
        for position, (worker, upstream) in enumerate(zip(firsts, upstreams, strict=True)):
            if ranks is not None and position in ranks.positions:
                upstream.rank_ways = upstream.doubt.ways(worker, self._shard.loop.time())
            else:
                upstream.doubt.end()
        return Pool(model, firsts, upstreams, policy, decodes, ranks)

    def _count_ready(self) -> None:
        """Which workers can serve, breakers or not, and why there is no pool where there could be one."""
        known: dict[str | None, dict[str, int]] = {}  # model -> role -> ready workers
        for view in self._views:
            roles = known.setdefault(view.record.model, {})
            roles[view.record.role] = roles.get(view.record.role, 0) + (view.state == _workers.READY)
        self.closed = {}
        self.ready_workers = 0
        for model, roles in known.items():
            reason = why_unserved(roles)
            if reason is None:
                is_pair = bool(roles.get("prefill") and roles.get("decode"))
                self.ready_workers += sum(roles.values()) if is_pair else roles["regular"]
            if model not in self.pools and reason is not errors.NO_HEALTHY_WORKERS:
                self.closed[model] = reason or errors.BREAKER_OPEN

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
        model = self.adapters.get(model, model) if model is not None else None
        # A pool that does not know its model takes any name.
        pool = self.pools.get(model) or self.pools.get(None)
        if pool is None and model is not None and ":" in model and model not in self.models:
            model = model.partition(":")[0].strip()  # SGLang's "base:adapter"
            pool = self.pools.get(model)
        if pool is not None:
            return pool
        # As above: a model that nobody knows takes any name, and so does one that is alone.
        if self.closed:
            reason = self.closed.get(model) or self.closed.get(None)
            if reason is None and len(self.models) <= 1:
                reason = next(iter(self.closed.values()))
            if reason is not None:
                return reason
        if model in self.models or not self.pools:
            return errors.NO_HEALTHY_WORKERS
        return errors.MODEL_NOT_FOUND if model else errors.MISSING_MODEL

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
