"""round_robin: each shard turns through the pool; shards start at different places."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglfast.edge.policy import ROUND_ROBIN, PoolView, Prompt

if TYPE_CHECKING:
    from sglfast._counters import Loads


class RoundRobin:
    """The next worker in slot order, which is stable while workers come and go."""

    name = "round_robin"
    needs_prompt = False
    plain_decision = ROUND_ROBIN

    def __init__(self, loads: Loads) -> None:
        self._turn = loads.random_below(1 << 20)

    def score(self, requests: int, work_tokens: int) -> float | None:
        return None

    def choose(self, pool: PoolView, loads: Loads, prompt: Prompt) -> tuple[int, int]:
        self._turn += 1
        return self._turn % len(pool), ROUND_ROBIN
