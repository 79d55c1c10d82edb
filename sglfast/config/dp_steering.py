"""Whose requests are steered to a data-parallel rank: the one rule for shards, which do it, and control, which tells of it.

Runs in: control and shards. A worker with ranks has one KV cache a rank, so knowing the worker that holds a prompt is worth little
    while the worker hands its requests out by turns. Prefill workers choose by the bootstrap room (edge/bootstrap.py), decode
    workers compute no prompt: neither is steered.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglfast.config.settings import ServeConfig
    from sglfast.shm import WorkerView


def is_steered(worker: WorkerView, config: ServeConfig, *, is_by_cache: bool) -> bool:
    """Whether requests to this worker name a rank. is_by_cache: its pool's policy compares KV caches by events."""
    if worker.dp_size <= 1 or not worker.record.rank_ways or worker.record.role != "regular":
        return False
    return config.dp_aware or (is_by_cache and worker.block_size > 0 and not config.disable_dp_steering)


def may_be_steered(worker: WorkerView, config: ServeConfig) -> bool:
    """The same as far as the settings tell: a pool's policy is its shards' business."""
    by_cache = ("auto", "cache_aware") if config.tokenizer_path is not None else ("cache_aware",)
    is_by_cache = any(policy in by_cache for policy in (config.policy, config.prefill_policy))
    return is_steered(worker, config, is_by_cache=is_by_cache)
