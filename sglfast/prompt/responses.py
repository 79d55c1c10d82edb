"""Bodies of `/v1/responses` as the chat conversation that SGLang makes of them.

Runs in: shard, simulator. Source: SGLang's serving_responses.py. `instructions` become a system message, an `input` text a user
    message, a list of messages stands as it is. What depends on the engine's own state or tools is honestly unkeyable.
"""

from collections.abc import Mapping
from typing import Any

from sglfast.prompt.chat import UnkeyableError


def as_chat(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the chat body; raises UnkeyableError."""
    if body.get("previous_response_id"):
        raise UnkeyableError("session", "the engine puts the previous response's turns before this prompt")
    if body.get("tools"):
        raise UnkeyableError("session", "the engine describes its own tools in the prompt")
    messages: list[dict[str, Any]] = []
    if body.get("instructions"):
        messages.append({"role": "system", "content": body["instructions"]})
    given = body.get("input")
    if isinstance(given, str):
        messages.append({"role": "user", "content": given})
    elif isinstance(given, list):
        messages += [_message(item) for item in given]
    else:
        raise UnkeyableError("malformed", "input must be a string or an array of messages")
    return {name: body[name] for name in ("model", "cache_salt", "chat_template_kwargs") if name in body} | {"messages": messages}


def _message(item: object) -> dict[str, Any]:
    if not isinstance(item, dict) or item.get("type", "message") != "message" or not isinstance(item.get("content"), str):
        raise UnkeyableError("media", "an item of input that is no message with a text")
    return {"role": item.get("role"), "content": item["content"]}
