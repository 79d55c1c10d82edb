"""The parity loop, shard's half: what the KV index predicted for a request against what the worker's answer reports.

Runs in: shards, once per piece of an answer whose prompt was keyed. Contract: nothing is buffered or parsed; the last
    `"cached_tokens": N` of a piece counts (OpenAI's usage.prompt_tokens_details, SGLang's meta_info). Inside a JSON string the quotes
    would be escaped, so no text of a model can look like it. A number cut in two by the network is a sample missed, no harm.
    Workers that report nothing (SGLang without --enable-cache-report) give no samples, nor do answers that a worker has compressed
    because their client takes that (`accept-encoding`): they are passed on as they are. Judged in control/parity.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglfast import _counters

if TYPE_CHECKING:
    from sglfast._hashtree import TreeReader
    from sglfast.edge.pools import Route

_NAME = b'"cached_tokens":'


def cached_tokens_in(piece: bytes) -> int:
    """The last number of cached tokens that a piece of an answer reports; -1 = none."""
    start = piece.rfind(_NAME)
    if start < 0:
        return -1
    start += len(_NAME)
    end = start
    size = len(piece)
    while end < size and end - start < 20 and piece[end] in b" 0123456789":
        end += 1
    digits = piece[start:end].strip()
    # A number is whole only when something else stands behind it.
    return int(digits) if digits.isdigit() and end < size and piece[end] in b",} \r\n" else -1


def outcome_word(predicted_tokens: int, cached_tokens: int) -> int:
    """The worker word that counts this sample. Both are whole blocks when the router is right."""
    if cached_tokens == predicted_tokens:
        return _counters.W_PARITY_EXACT
    return _counters.W_PARITY_HIGH if predicted_tokens > cached_tokens else _counters.W_PARITY_LOW


def is_impossible(tree: TreeReader, route: Route, cached_tokens: int) -> bool:
    """Whether a worker reports more of a prompt than any cache can have, and not because its prompt is another one.

    An engine computes the last token itself, so never is all of a prompt found. That the prompts are the same shows by the block behind
    the predicted ones, which has come since; where all of the prompt's blocks were predicted, by these.
    """
    if route.is_estimated or cached_tokens < route.prompt.prompt_tokens:
        return False
    next_key = route.basis[0]
    return tree.match(next_key) > 0 and tree.overlap(route.rank) > 0 if next_key else route.predicted_tokens > 0
