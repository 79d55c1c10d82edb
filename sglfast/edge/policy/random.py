"""random: every worker alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglfast.edge.policy import RANDOM, PoolView, Prompt

if TYPE_CHECKING:
    from sglfast._counters import Loads


class Random:
    """A worker drawn at random."""

    name = "random"
    needs_prompt = False
    plain_decision = RANDOM

    def score(self, requests: int, work_tokens: int) -> float | None:
        return None

    def choose(self, pool: PoolView, loads: Loads, prompt: Prompt) -> tuple[int, int]:
        return loads.random_below(len(pool)), RANDOM
