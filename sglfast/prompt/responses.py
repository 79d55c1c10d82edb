"""Bodies of `/v1/responses` as the chat conversation that SGLang makes of them.

Runs in: shard, simulator. Contract: `as_chat` follows SGLang 0.5.23 (serving_responses.py): `instructions` and the input's items become
    messages, what an assistant said in a row one message, and system messages go together to the front, unless the template
    prints them where they stand. What depends on the engine's own state or tools is honestly unkeyable.
"""

from collections.abc import Callable, Mapping
from typing import Any

import orjson

from sglfast.prompt.chat import UnkeyableError, malformed

Message = dict[str, Any]
_DEVELOPER_LABEL = "Developer instructions:"
# Of an item; a message has none of them.
_ITEM_FIELDS = frozenset({"id", "status", "type"})
_TEXT_PARTS = frozenset({"input_text", "output_text", "text"})
_KEPT_FIELDS = ("model", "cache_salt", "chat_template_kwargs", "parallel_tool_calls")
_BETWEEN = "\n\n"


def as_chat(body: Mapping[str, Any], takes_inline_system: Callable[[], bool]) -> dict[str, Any]:
    """Return the chat body; raises UnkeyableError. takes_inline_system: whether the template prints a system message between others."""
    if body.get("previous_response_id"):
        raise UnkeyableError("session", "the engine puts the previous response's turns before this prompt")
    messages: list[Message] = []
    if body.get("instructions"):
        messages.append({"role": "system", "content": body["instructions"]})
    given = body.get("input")
    if isinstance(given, str):
        messages.append({"role": "user", "content": given})
    elif isinstance(given, list):
        messages += [message for item in given if (message := _message(item)) is not None]
    else:
        raise malformed("input must be a string or an array of items")
    messages = _merged(messages)
    if any(message.get("role") == "system" for message in messages) and not takes_inline_system():
        messages = _system_first(messages)
    chat = {name: body[name] for name in _KEPT_FIELDS if name in body} | {"messages": messages}
    reasoning = body.get("reasoning")
    if isinstance(reasoning, dict):
        chat["reasoning_effort"] = reasoning.get("effort", "medium")
    return chat | _tools(body)


def _tools(body: Mapping[str, Any]) -> dict[str, Any]:
    tools = body.get("tools") or []
    if not isinstance(tools, list) or any(not isinstance(tool, dict) or tool.get("type") != "function" for tool in tools):
        raise UnkeyableError("session", "the engine describes its own tools in the prompt")
    if not tools:
        return {}
    functions = [
        {
            "name": tool.get("name"),
            "description": tool.get("description"),
            "parameters": tool.get("parameters"),
            "strict": bool(tool.get("strict")),
        }
        for tool in tools
    ]
    choice = body.get("tool_choice", "auto")
    if isinstance(choice, dict):
        inner = choice.get("function")
        name = choice.get("name") or (inner.get("name") if isinstance(inner, dict) else None)
        choice = {"type": "function", "function": {"name": name}} if choice.get("type") == "function" and name else "auto"
    return {"tools": [{"type": "function", "function": function} for function in functions], "tool_choice": choice}


def _message(item: object) -> Message | None:
    """Return the message that an item of the input becomes; None for thoughts without a text."""
    if not isinstance(item, dict):
        raise UnkeyableError("media", "an item of input that is no object")
    if item.get("role") == "developer":
        item = item | {"role": "system", "content": _labelled(item.get("content"))}
    match item.get("type"):
        case None | "message":
            message = {name: value for name, value in item.items() if value is not None and name not in _ITEM_FIELDS}
            if isinstance(message.get("content"), list):
                message["content"] = [_part(part) for part in message["content"]]
            return message
        case "function_call":
            function = {"name": item.get("name"), "arguments": _arguments(item.get("arguments"))}
            call = {"id": item.get("call_id") or item.get("id"), "type": "function", "function": function}
            return {"role": "assistant", "tool_calls": [call]}
        case "function_call_output":
            output = item.get("output", "")
            if isinstance(output, list):
                output = "".join(part.get("text", "") for part in output if isinstance(part, dict))
            return {"role": "tool", "tool_call_id": item.get("call_id"), "content": output}
        case "reasoning":
            texts = _texts(item.get("summary")) or _texts(item.get("content"))
            if not texts and item.get("encrypted_content"):
                raise UnkeyableError("session", "thoughts that only the engine can read")
            return {"role": "assistant", "reasoning_content": "\n".join(texts)} if texts else None
    raise UnkeyableError("session", f"an item of type {item.get('type')!r}: what it becomes is known to the engine alone")


def _labelled(content: object) -> object:
    """Return a developer's content with the label that tells it from the other system messages."""
    if isinstance(content, str):
        return f"{_DEVELOPER_LABEL}\n{content}"
    if not isinstance(content, list):
        return content
    for at, part in enumerate(content):
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            return [*content[:at], part | {"text": f"{_DEVELOPER_LABEL}\n{part['text']}"}, *content[at + 1 :]]
    return [{"type": "input_text", "text": _DEVELOPER_LABEL}, *content]


def _part(part: object) -> dict[str, Any]:
    if isinstance(part, dict) and part.get("type") in _TEXT_PARTS and isinstance(part.get("text", ""), str):
        return {"type": "text", "text": part.get("text", "")}
    raise UnkeyableError("media", "a part of a message that is no text")


def _arguments(given: object) -> str:
    """Return a call's arguments as JSON of an object; what is none becomes an empty one."""
    if isinstance(given, dict):
        return orjson.dumps(given).decode()
    try:
        return given if isinstance(given, str) and isinstance(orjson.loads(given), dict) else "{}"
    except orjson.JSONDecodeError:
        return "{}"


def _texts(parts: object) -> list[str]:
    return [part["text"] for part in parts if isinstance(part, dict) and part.get("text")] if isinstance(parts, list) else []


def _merged(messages: list[Message]) -> list[Message]:
    """Return the messages with those of an assistant that follow each other made one."""
    merged: list[Message] = []
    for message in messages:
        last = merged[-1] if merged else {}
        if (
            message.get("role") == "assistant" == last.get("role")
            and (message.get("phase") == last.get("phase") or last.keys() == {"role", "reasoning_content"})
        ):  # fmt: skip
            merged[-1] = _joined(last, message)
        else:
            merged.append(message)
    return merged


def _joined(first: Message, second: Message) -> Message:
    both = dict(first)
    if second.get("phase") is not None:
        both["phase"] = second["phase"]
    content = second.get("content")
    if content:
        before = first.get("content")
        if not before:
            both["content"] = content
        elif isinstance(before, str) and isinstance(content, str):
            both["content"] = before + _BETWEEN + content
        else:
            both["content"] = _as_parts(before) + _as_parts(content)
    if second.get("tool_calls"):
        both["tool_calls"] = [*(first.get("tool_calls") or []), *second["tool_calls"]]
    thoughts = second.get("reasoning_content")
    if thoughts:
        before = first.get("reasoning_content")
        both["reasoning_content"] = f"{before}\n{thoughts}" if before else thoughts
    return both


def _as_parts(content: object) -> list[Any]:
    return list(content) if isinstance(content, list) else [{"type": "text", "text": content}]


def _system_first(messages: list[Message]) -> list[Message]:
    """Return the messages with the texts of all system messages in one at the front."""
    texts: list[str] = []
    for message in messages:
        content = message.get("content") if message.get("role") == "system" else None
        if isinstance(content, str):
            texts.append(content)
        elif isinstance(content, list):
            texts += [part["text"] for part in content]
    others = [message for message in messages if message.get("role") != "system"]
    return [{"role": "system", "content": _BETWEEN.join(texts)}, *others] if texts else others
