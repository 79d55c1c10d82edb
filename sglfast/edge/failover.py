"""Whom to ask when a worker has failed a request, or is full: among which workers, and which of them.

Runs in: shards, event loop; only after a failure, so a scan of the pool is fine.
"""

from __future__ import annotations

from array import array
from dataclasses import replace
from typing import TYPE_CHECKING

from sglfast.edge.policy import PoolView, Prompt

if TYPE_CHECKING:
    from sglfast._counters import Loads
    from sglfast.edge.pools import Pool


def rows_left(idxs: array[int], loads: Loads, tried: tuple[int, ...], limit: int) -> array[int]:
    """Those rows that were not tried; when all were, those that have not just failed; else all. Of these the ones with fewer than
    `limit` requests (0 = no limit), if there are any: else the caller has to wait for one."""
    untried = [idx for idx in idxs if idx not in tried]
    groups = [untried] if untried else [[idx for idx in idxs if idx != tried[-1]] or [*idxs], [*idxs]]
    with_room = ([idx for idx in group if not limit or loads.requests(idx) < limit] for group in groups)
    return array("i", next(filter(None, with_room), groups[0]))


def least_left(idxs: array[int], loads: Loads, tried: tuple[int, ...], limit: int) -> int:
    """Position of the least loaded of them."""
    left = rows_left(idxs, loads, tried, limit)
    return idxs.index(left[loads.least(left)[0]])


def best_left(pool: Pool, left: array[int], loads: Loads, prompt: Prompt) -> tuple[int, Prompt]:
    """(position of one of these rows in the pool, the prompt as it is to be seen there).

    What the policy says if one of them holds some of the prompt, else the least loaded. prompt: as another pool had it; hits go by their
    ranks, which last longer than positions.
    """
    idxs = pool.view.worker_idxs
    owners = {place: hit for hit in prompt.hits if (place := pool.positions.get(hit.rank)) is not None and idxs[place] in left}
    if owners:
        hits = tuple(replace(hit, position=left.index(idxs[place])) for place, hit in owners.items())
        position = idxs.index(left[pool.policy_of(prompt).choose(PoolView(left), loads, replace(prompt, hits=hits))[0]])
    else:
        position = idxs.index(left[loads.least(left)[0]])
    return position, replace(prompt, hits=tuple(replace(hit, position=place) for place, hit in owners.items()))
