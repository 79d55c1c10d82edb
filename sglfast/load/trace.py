"""Traces of the Mooncake format: read one, make one up, and say what a perfect cache would get from it.

Runs in: `sglfast replay`, `sglfast demo`.
Contract: one JSON object a line, {"timestamp": ms, "input_length": tokens, "output_length": tokens, "hash_ids": [ids of the
    prompt's 512-token blocks]}; equal ids mean equal content up to and including that block (kvcache-ai/Mooncake,
    FAST25-release/traces). A trace in memory is a list in order of time. A line that breaks the format raises ConfigError
    with its number.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import msgspec

from sglfast.errors import ConfigError

BLOCK_TOKENS = 512


class TraceRequest(msgspec.Struct, frozen=True):
    """One request: when (ms from the trace's zero), how much (tokens), the ids of its blocks (the last cut to input_length)."""

    timestamp: Annotated[float, msgspec.Meta(ge=0)]
    input_length: Annotated[int, msgspec.Meta(ge=1)]
    output_length: Annotated[int, msgspec.Meta(ge=0)]
    hash_ids: list[Annotated[int, msgspec.Meta(ge=0)]]


@dataclass(frozen=True, slots=True, kw_only=True)
class SyntheticShape:
    """What a made-up trace looks like. Conversations begin as a Poisson process; each turn's prompt is the whole history.

    users: number of conversations; turns: mean number of turns (geometric); system_prompts: how many different ones there are;
    think_time_s: mean pause between two turns (exponential); message and answer lengths are exponential around their means.
    """

    users: int = 200
    turns: float = 5.0
    arrivals_per_s: float = 2.0
    think_time_s: float = 8.0
    system_prompts: int = 4
    system_prompt_blocks: int = 4
    message_tokens: int = 400
    answer_tokens: int = 150


def read_trace(path: str, limit: int | None = None) -> list[TraceRequest]:
    """The first `limit` requests of a file (None = all), in order of time. Raises ConfigError."""
    decoder = msgspec.json.Decoder(TraceRequest)
    requests: list[TraceRequest] = []
    try:
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if limit is not None and len(requests) >= limit:
                    break
                if line.strip():
                    requests.append(_checked(decoder.decode(line), path, number))
    except OSError as error:
        raise ConfigError(f"trace {path}: cannot be read: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"trace {path}, line {number}: {error}") from error
    if not requests:
        raise ConfigError(f"trace {path}: holds no request")
    requests.sort(key=lambda request: request.timestamp)
    return requests


def _checked(request: TraceRequest, path: str, number: int) -> TraceRequest:
    blocks = -(-request.input_length // BLOCK_TOKENS)
    if len(request.hash_ids) != blocks:
        raise ConfigError(
            f"trace {path}, line {number}: input_length {request.input_length} is {blocks} blocks of {BLOCK_TOKENS} tokens,"
            f" but hash_ids has {len(request.hash_ids)}"
        )
    return request


def synthetic_trace(shape: SyntheticShape, seed: int) -> list[TraceRequest]:
    """Conversations with shared system prompts and growing histories, in order of time; the same seed gives the same trace.

    A turn's last, partly filled block has an id of its own, as in the Mooncake traces: the next turn fills it with more.
    """
    rng = random.Random(seed)
    next_id = shape.system_prompts * shape.system_prompt_blocks
    trace: list[TraceRequest] = []
    begin_s = 0.0
    for _ in range(shape.users):
        begin_s += rng.expovariate(shape.arrivals_per_s)
        first = rng.randrange(shape.system_prompts) * shape.system_prompt_blocks
        full_blocks = list(range(first, first + shape.system_prompt_blocks))
        length_tokens = len(full_blocks) * BLOCK_TOKENS
        at_s = begin_s
        while True:
            length_tokens += 1 + int(rng.expovariate(1 / shape.message_tokens))
            output_tokens = 1 + int(rng.expovariate(1 / shape.answer_tokens))
            while (len(full_blocks) + 1) * BLOCK_TOKENS <= length_tokens:
                full_blocks.append(next_id)
                next_id += 1
            hash_ids = list(full_blocks)
            if length_tokens % BLOCK_TOKENS:
                hash_ids.append(next_id)
                next_id += 1
            trace.append(TraceRequest(round(at_s * 1000), length_tokens, output_tokens, hash_ids))
            if rng.random() * shape.turns < 1:
                break
            length_tokens += output_tokens
            at_s += rng.expovariate(1 / shape.think_time_s)
    trace.sort(key=lambda request: request.timestamp)
    return trace


def infinite_cache_hit_ratio(trace: Sequence[TraceRequest], warmup: int = 0) -> float:
    """Share (0..1) of block references that were seen before: what one worker with an infinite cache gets.

    The first `warmup` requests fill the cache but are not counted.
    """
    seen: set[int] = set()
    hits = references = 0
    for position, request in enumerate(trace):
        if position >= warmup:
            references += len(request.hash_ids)
            hits += sum(block in seen for block in request.hash_ids)
        seen.update(request.hash_ids)
    return hits / references if references else 0.0


def infinite_cache_token_ratio(trace: Sequence[TraceRequest], page_tokens: int, warmup: int = 0) -> float:
    """Share (0..1) of prompt tokens that an infinite cache of whole pages serves.

    An engine matches leading tokens only, at most input_length - 1 of them, cut to a page (spec/kv_events.md 2.8).
    """
    seen: set[int] = set()
    cached = total = 0
    for position, request in enumerate(trace):
        if position >= warmup:
            known = next((n for n, block in enumerate(request.hash_ids) if block not in seen), len(request.hash_ids))
            matchable = min(known * BLOCK_TOKENS, request.input_length - 1)
            cached += matchable // page_tokens * page_tokens
            total += request.input_length
        seen.update(request.hash_ids)
    return cached / total if total else 0.0
