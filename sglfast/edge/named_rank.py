"""The data-parallel rank that a client asks for itself: which it is, and the choice as it is then.

Runs in: shards, event loop; only for requests to steered workers (edge/ranks.py) that name a rank. Contract: the request goes out as its
    client wrote it. What is read here is what the engine reads (wire/server_info.py tells where): the rank counts the load and the
    prediction. One that is none of the worker's counts nothing: the engine refuses it, and that answer is the client's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec

from sglfast.edge.header_lines import value_of
from sglfast.edge.policy import Hit

if TYPE_CHECKING:
    from sglfast.edge.pools import Route

_OVERRIDE, _HEADER = b"x-override-routed-dp-rank", b"x-data-parallel-rank"
# Reading a larger body would hold the loop for more than a millisecond; nobody is the worse for a rank that is not counted.
_READ_BYTES = 1 << 19


class _Fields(msgspec.Struct):
    routed_dp_rank: int | None = None
    data_parallel_rank: int | None = None


_decode = msgspec.json.Decoder(_Fields).decode


def named_rank(kept: bytes, body: bytes, ways: bytes, kind: int) -> int | None:
    """The rank that a request names, as the worker counts them, None when that cannot be told.

    kept: its header lines; ways: of the worker, shm.WorkerRecord.rank_ways; kind: as Endpoint has it.
    """
    try:
        if ways[kind : kind + 1] == b"h":
            header = value_of(kept, _OVERRIDE) or value_of(kept, _HEADER)
            if header is not None:
                return int(header)
            if b"r" not in ways:
                return None  # an engine without the field
        if len(body) > _READ_BYTES:
            return None
        fields = _decode(body)
    except (ValueError, msgspec.DecodeError, RecursionError):
        return None
    return fields.data_parallel_rank if fields.routed_dp_rank is None or ways[kind : kind + 1] == b"d" else fields.routed_dp_rank


def at_rank(route: Route, dp_rank: int) -> Route | None:
    """The route to another rank of its worker, as the worker counts them; None when it has no such rank."""
    if not 0 <= dp_rank < route.upstream.dp_size:
        return None
    if dp_rank == route.dp_rank:
        return route
    rank = route.rank - route.dp_rank + dp_rank
    pool, prompt = route.pool, route.prompt
    position = pool.positions.get(rank)
    moved = replace(route, rank=rank, dp_rank=dp_rank, predicted_tokens=-1, basis=(b"", -1))
    if not prompt.is_keyed or position is None:
        return moved
    hit = (prompt.by_rank or {}).get(rank) or Hit(position, rank, 0, 0)
    return replace(
        moved,
        overlap_blocks=pool.known_tokens(replace(hit, position=position), prompt) // pool.block_tokens(position, prompt),
        uncached_tokens=prompt.prompt_tokens - hit.overlap_tokens,
        prediction=None if route.prediction is None else route.prediction._replace(rank=rank),
    )
