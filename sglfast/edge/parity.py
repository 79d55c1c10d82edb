"""The parity loop, shard's half: what the KV index predicted for a request against what the worker's answer reports.

Runs in: shards, once per piece of an answer whose prompt was keyed. Contract: nothing is buffered or parsed; the last
    `"cached_tokens": N` of a piece counts (OpenAI's usage.prompt_tokens_details, SGLang's meta_info). Inside a JSON string the quotes
    would be escaped, so no text of a model can look like it. A number cut in two by the network is a sample missed, no harm.
    Workers that report nothing (SGLang without --enable-cache-report) give no samples. Judged in control/parity.
"""

from sglfast import _counters

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
