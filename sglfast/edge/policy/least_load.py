"""least_load: the worker with the fewest requests in flight, summed over all shards."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglfast.edge.policy import LEAST_LOAD, PoolView, Prompt

if TYPE_CHECKING:
    from sglfast._counters import Loads


class LeastLoad:
    """The global minimum; reads every worker of the pool, because a sample is what power_of_two is for."""

    name = "least_load"
    needs_prompt = False
    plain_decision = LEAST_LOAD

    def score(self, requests: int, work_tokens: int) -> float | None:
        return requests

    def choose(self, pool: PoolView, loads: Loads, prompt: Prompt) -> tuple[int, int]:
        return loads.least(pool.worker_idxs)[0], LEAST_LOAD
