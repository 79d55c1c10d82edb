"""power_of_two: the less loaded of two workers drawn at random. Cost does not grow with the pool."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglfast.edge.policy import POWER_OF_TWO, PoolView, Prompt

if TYPE_CHECKING:
    from sglfast._counters import Loads


class PowerOfTwo:
    """Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", 2001."""

    name = "power_of_two"
    needs_prompt = False
    plain_decision = POWER_OF_TWO

    def score(self, requests: int, work_tokens: int) -> float | None:
        return requests

    def choose(self, pool: PoolView, loads: Loads, prompt: Prompt) -> tuple[int, int]:
        return loads.lighter_of_two(pool.worker_idxs), POWER_OF_TWO
