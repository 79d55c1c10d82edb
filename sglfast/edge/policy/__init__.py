"""Policies: one small class each, `choose(pool, loads, prompt) -> (position in the pool, decision)`.

Pure: facts and a view of the shared loads in, a choice out; no I/O, no clock. Ties break at random, never by index. A decision is a
position in shm.DECISIONS.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from sglfast.shm import DECISIONS

if TYPE_CHECKING:
    from sglfast._counters import Loads

(ROUND_ROBIN, RANDOM, POWER_OF_TWO, LEAST_LOAD, CACHE_HIT, CACHE_MISS, IMBALANCED, UNKEYED, FAILOVER) = range(len(DECISIONS))


@dataclass(frozen=True, slots=True)
class Hit:
    """A worker that holds the beginning of the prompt. position: in the pool; rank: the worker's rank that holds most.

    guessed_tokens: those of overlap_tokens that no event has confirmed (edge/predict).
    """

    position: int
    rank: int
    overlap_blocks: int
    overlap_tokens: int
    guessed_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the KV index says of one prompt. prompt_tokens: 0 = unknown, then `hits` is empty.

    is_estimated: prompt_tokens and prompt_blocks count what lies behind every overlap by its characters; by_rank: tree rank -> its own
    hit, for workers whose ranks are chosen too (edge/ranks); None = nothing is known of such; is_looked_up: the KV index was asked.
    """

    prompt_tokens: int = 0
    prompt_blocks: int = 0
    hits: tuple[Hit, ...] = ()
    is_keyed: bool = False
    is_estimated: bool = False
    by_rank: Mapping[int, Hit] | None = None
    is_looked_up: bool = False


NO_PROMPT = Prompt()


@dataclass(frozen=True, slots=True)
class PoolView:
    """Workers that may be chosen. worker_idxs: their rows in shared memory, int32."""

    worker_idxs: array[int] = field(default_factory=lambda: array("i"))

    def __len__(self) -> int:
        return len(self.worker_idxs)


class Policy(Protocol):
    """How a worker is chosen from a pool of at least one."""

    name: str  # as the flag --policy has it
    needs_prompt: bool
    plain_decision: int  # the decision of a choice that looked at no prompt

    def choose(self, pool: PoolView, loads: Loads, prompt: Prompt) -> tuple[int, int]:
        """(position in the pool, decision)."""

    def score(self, requests: int, work_tokens: int) -> float | None:
        """What the policy minimises, from requests in flight and tokens to compute first; None when it compares nothing."""
