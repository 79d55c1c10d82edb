"""The second half of a pair: which decode worker goes with a prefill worker.

Runs in: shards, event loop. Theory: the KV cache that the prefill worker has made is carried to the decode worker; between two on one host
    that is cheapest. So by default the decode worker is one on the prefill worker's host, unless it has more than twice the
    median load, else the least loaded; --decode-policy names a policy of the usual ones instead (spec/router.md 4.4; unlike there, of
    several on that host the least loaded counts, and ties break at random).
Contract: the workers here may be chosen, breakers included. A decode worker counts requests, no tokens: its prompts are computed elsewhere.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from sglfast import _counters
from sglfast.edge.policy import Policy, Prompt
from sglfast.edge.policy.least_load import LeastLoad
from sglfast.edge.pools import Pool, Route, policy_for

if TYPE_CHECKING:
    from sglfast._counters import Loads
    from sglfast.config import ServeConfig
    from sglfast.edge.predict import Prediction
    from sglfast.edge.upstream import Upstream
    from sglfast.shm import WorkerView

# Beyond the words of shm.DECISIONS in a column: a pair's decision is counted with its prefill worker.
NO_DECISION = 16


class Decodes(Pool):
    """The decode workers of one model. shut_hosts: where there are others, whose breakers are open; is_affine: by host, as above."""

    __slots__ = ("_by_host", "_shut_hosts", "is_affine")

    def __init__(
        self, model: str | None, workers: list[WorkerView], upstreams: list[Upstream], policy: Policy | None, shut_hosts: set[str]
    ) -> None:
        super().__init__(model, workers, upstreams, policy or LeastLoad())
        self.is_affine = policy is None
        self._shut_hosts = shut_hosts
        self._by_host: dict[str, array[int]] = {}
        for worker, upstream in zip(workers, upstreams, strict=True):
            self._by_host.setdefault(upstream.host, array("i")).append(worker.worker_idx)

    def choose(self, host: str, loads: Loads, prompt: Prompt) -> tuple[int, int]:
        """(position, shard word that counts this choice or 0) for a prefill worker on `host`."""
        idxs = self.view.worker_idxs
        if not self.is_affine:
            return self.policy.choose(self.view, loads, prompt)[0], 0
        peers = self._by_host.get(host)
        word = _counters.S_AFFINITY_BREAKER if host in self._shut_hosts else 0
        if peers is not None:
            at, load = loads.least(peers)
            # The median m is below x when more than half of the loads are: load > 2m and m > 0, without sorting them.
            half = len(idxs) // 2
            if loads.count_below(idxs, (load + 1) // 2) <= half or loads.count_below(idxs, 1) > half:
                return idxs.index(peers[at]), _counters.S_AFFINITY_SAME_HOST
            word = _counters.S_AFFINITY_LOAD
        return loads.least(idxs)[0], word


def make_decodes(
    model: str | None,
    workers: list[WorkerView],
    upstreams: list[Upstream],
    shut_hosts: set[str],
    kept: Pool | None,
    config: ServeConfig,
    loads: Loads,
) -> Decodes:
    """The decode side of a pool. kept: the pool as it was, whose policy goes on."""
    name = config.decode_policy
    before = kept.decodes.policy if kept is not None and kept.decodes is not None else None
    policy = policy_for(name, workers, before, config, loads) if name is not None else None
    return Decodes(model, workers, upstreams, policy, shut_hosts)


def pair(decodes: Decodes, position: int, first: Route, prediction: Prediction | None = None) -> Route:
    """The route of both: the decode worker at a position, behind the prefill worker of `first`."""
    rank = decodes.workers[position].rank_base
    return Route(first.pool, decodes.upstreams[position], NO_DECISION, rank=rank, prediction=prediction, prefill=first)
