"""What a load generator reads from a stream of OpenAI or SGLang server-sent events: the first output, the end, the token counts.

Runs in: `sglfast replay`, `sglfast demo`.
Contract: no state and no I/O. Events between the first output and the end are never parsed, so the functions for the end take
    the last bytes of the stream (TAIL_BYTES are enough), which may begin in the middle of an event.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

# The usage object is the end of a stream; an event before it may hold a whole text (`/generate` repeats it).
TAIL_BYTES = 16 << 10


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one answer; what the server did not report is -1."""

    prompt_tokens: int = -1
    cached_tokens: int = -1
    output_tokens: int = -1


def has_output(line: bytes) -> bool:
    """Whether an SSE data line carries generated output (and not only a role, a usage or the end)."""
    try:
        event = orjson.loads(line[5:])
    except orjson.JSONDecodeError:  # [DONE], or what is found out at the end
        return False
    if not isinstance(event, dict):
        return False
    for choice in event.get("choices") or ():
        if choice.get("text"):
            return True
        delta = choice.get("delta") or {}
        if delta.get("content") or delta.get("reasoning_content") or delta.get("tool_calls"):
            return True
    return bool(event.get("text") or event.get("output_ids"))


def stream_error(tail: bytes) -> str:
    """What is wrong with the end of a stream; "" = it ended well."""
    lines = [line for line in tail[-TAIL_BYTES:].split(b"\n") if line.startswith(b"data:")]
    is_done = bool(lines) and lines[-1][5:].strip() == b"[DONE]"
    last = lines[-2:-1] if is_done else lines[-1:]
    if last:
        try:
            event = orjson.loads(last[0][5:])
        except orjson.JSONDecodeError:
            return "bad_event" if is_done else "stream_incomplete"
        if isinstance(event, dict) and event.get("error"):
            return "stream_error"
    return "" if is_done else "stream_incomplete"


def read_usage(tail: bytes) -> Usage:
    """The token counts of the last `usage` (OpenAI) or `meta_info` (SGLang's /generate) object of a stream."""
    counts = _last_object(tail, b'"usage"')
    details: object = counts.get("prompt_tokens_details")
    if not counts:
        counts = details = _last_object(tail, b'"meta_info"')
    return Usage(_count(counts, "prompt_tokens"), _count(details, "cached_tokens"), _count(counts, "completion_tokens"))


def _last_object(tail: bytes, key: bytes) -> dict[str, Any]:
    """The object after the last `key:` of the tail that is not null. A key inside a JSON string has escaped quotes."""
    end = len(tail)
    while (at := tail.rfind(key, 0, end)) >= 0:
        text = tail[at + len(key) :].decode("utf-8", "replace").lstrip(" :")
        end = at
        if text.startswith("{"):
            try:
                value, _ = json.JSONDecoder().raw_decode(text)
            except json.JSONDecodeError:
                continue
            if isinstance(value, dict):
                return value
    return {}


def _count(values: object, name: str) -> int:
    value = values.get(name) if isinstance(values, Mapping) else None
    return value if isinstance(value, int) else -1
