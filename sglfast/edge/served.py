"""Which workers can be chosen: the worker table and the breakers as pools by model, and the pool that a request asks for.

Runs in: shards, event loop. Contract: rebuilt only when the version of the worker table or of the breakers moves; a request costs two
    atomic loads for that. The choice within a pool is edge/route's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglfast import _workers, errors
from sglfast._breaker import CLOSED
from sglfast._relay import RouterBase
from sglfast.edge.bootstrap import address_of
from sglfast.edge.pairs import Decodes, make_decodes
from sglfast.edge.policy import NO_PROMPT
from sglfast.edge.pools import Pool, policy_for, why_unserved
from sglfast.edge.ranks import ranks_of
from sglfast.edge.request import model_of
from sglfast.edge.upstream import Upstream
from sglfast.shm import WorkerView, read_workers

if TYPE_CHECKING:
    from sglfast.edge.shard import Shard

_UNREADABLE_PAUSE_S = 10.0


class Served(RouterBase):
    """The pools as the worker table has them now."""

    def __init__(self, shard: Shard) -> None:
        super().__init__(shard.segment)
        self._shard = shard
        self._unreadable_until_s = 0.0
        self._table_version = -1
        self.views: list[WorkerView] = []  # all workers in the table
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
        self.make_pools()
        # Last, and as it was before the first slot was read: whatever came in between, or went wrong, is looked at again.
        self.seen_version = version
        # From here on no choice is made by an older version: control waits for this word (control/followers).
        self._shard.segment.process_saw(self._shard.process_slot, table_version)

    def _follow_table(self, views: list[WorkerView]) -> None:
        """Have connections for the workers that there are, and no others."""
        old, self._upstreams = self._upstreams, {}
        self.views = views
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

    def make_pools(self) -> None:
        """The pools of the workers that may be chosen."""
        breakers = self._shard.breakers
        ready = [view for view in self.views if view.state == _workers.READY]
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
        for view in self.views:
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
        self._follow_table(self.views)
        self.make_pools()

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
            model = _base_of(model)
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

    def model_in(self, body: bytes) -> str | None:
        """The model of the workers that a body asks for, also when none of them can be chosen; None: it names none that they have."""
        if len(self.models) == 1:
            return self.models[0]
        model = model_of(body)
        model = self.adapters.get(model, model) if model is not None else None
        return _base_of(model) if model is not None and model not in self.models else model


def _base_of(model: str) -> str:
    """Of SGLang's "base:adapter" the base model."""
    return model.partition(":")[0].strip()
