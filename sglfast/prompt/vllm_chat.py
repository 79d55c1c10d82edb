"""The body of `/v1/chat/completions` -> what vLLM gives the chat template, where it differs from SGLang (prompt/chat.py).

Runs in: shard.

Contract: follows vLLM 0.33 (renderers/chat_utils, entrypoints/openai/chat_completion/protocol.py) field by field, by what its own code
    made of tests/golden/vllm_recorded. vLLM tells no router its version; where older ones differ (arguments that are no object, thoughts
    of the assistant under their old name, `reasoning_effort`), their blocks of such a conversation are not found.
    Parts of a text are joined by newlines; every content is a list of parts for a template that walks over parts; an assistant's last
    message stays one; all tools are shown whatever `tool_choice` says.
What depends on flags of the worker that nobody tells is taken at its default: --chat-template-content-format,
    --default-chat-template-kwargs, --exclude-tools-when-tool-choice-none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import orjson

from sglfast.prompt.chat import ChatInput, UnkeyableError, malformed, objects_of

if TYPE_CHECKING:
    from sglfast.prompt.vllm_format import ContentFormat

# What a content part can hold besides the fields that templates see.
_PART_FIELDS = frozenset(
    {
        *("audio_embeds", "audio_url", "closed", "data", "file", "image_embeds", "image_pil", "image_url", "input_audio", "name"),
        *("prompt_cache_breakpoint", "refusal", "text", "thinking", "type", "uuid", "video_embeds", "video_url"),
    }
)
_TEXT_FIELDS = {"text": "text", "refusal": "refusal", "thinking": "thinking"}
_MEDIA_TYPES = frozenset(
    {
        *("image_url", "image_embeds", "image_pil", "input_image", "audio_url", "audio_embeds", "input_audio"),
        *("video_url", "video_embeds", "prompt_embeds", "file"),
    }
)
# Words that vLLM sets itself or takes as arguments of the renderer; two of them it overrides without a word.
_REFUSED_KWARGS = frozenset({"messages", "tools", "conversation", "chat_template", "tokenize", "return_dict"})
_OVERRIDDEN_KWARGS = ("add_generation_prompt", "continue_final_message")
_BILLING_LINE = "x-anthropic-billing-header"


def chat_input(body: Mapping[str, Any], content_format: ContentFormat) -> ChatInput:
    """Return the template's input for a chat body; raises UnkeyableError."""
    raw_messages = body.get("messages")
    if not isinstance(raw_messages, list) or not raw_messages:
        raise malformed("messages must be a non-empty array")
    messages = [message_input(raw, content_format) for raw in raw_messages]
    refuse_unknowable(body)
    return ChatInput(
        messages,
        tools_input(body),
        kwargs_input(body),
        "",
        add_generation_prompt=body.get("add_generation_prompt") is not False,
        continues=bool(body.get("continue_final_message")),
        add_special_tokens=bool(body.get("add_special_tokens")),
    )


def is_plain(body: Mapping[str, Any]) -> bool:
    """Whether the prompt ends as nearly every one: with the words that open the assistant's turn, and no special tokens around it."""
    return not (body.get("add_generation_prompt") is False or body.get("continue_final_message") or body.get("add_special_tokens"))


def refuse_unknowable(body: Mapping[str, Any]) -> None:
    """Raise UnkeyableError for fields by which the worker makes a prompt that cannot be known here."""
    if body.get("chat_template") is not None:
        raise UnkeyableError("template", "the request brings a chat template of its own")
    if body.get("truncate_prompt_tokens") is not None:
        raise UnkeyableError("template", "the engine cuts this prompt (truncate_prompt_tokens)")


def message_input(raw: object, content_format: ContentFormat) -> dict[str, Any]:
    """Return one message with the fields that vLLM keeps, its content in the form that the template expects."""
    if not isinstance(raw, dict) or not isinstance(raw.get("role"), str):
        raise malformed("every message must be an object with a role")
    role = raw["role"]
    content = raw.get("content")
    if role == "system":
        content = _without_billing_line(content)
    elif role == "user" and content is None and "content" in raw:
        raise malformed("a user message must have content")
    elif role == "developer":
        raise UnkeyableError("template", "messages of the role developer are made system messages by some versions of vLLM only")
    message = {"role": role, "content": _content(content, role, content_format)}
    if len(raw) == 2 and "content" in raw:
        return message  # nearly every one
    if role == "assistant":
        calls = raw.get("tool_calls")
        if calls:
            message["tool_calls"] = [_tool_call(call) for call in objects_of(calls, "tool_calls")]
        thoughts = raw.get("reasoning")
        thoughts = raw.get("reasoning_content") if thoughts is None else thoughts
        if isinstance(thoughts, dict):
            raise UnkeyableError("media", "the assistant's reasoning is given as embeddings")
        if thoughts is not None:
            message["reasoning"] = message["reasoning_content"] = thoughts
    elif role == "tool" and raw.get("tool_call_id") is not None:
        message["tool_call_id"] = raw["tool_call_id"]
    for field in ("name", "task"):
        if isinstance(raw.get(field), str):
            message[field] = raw[field]
    return message


def _content(content: object, role: str, content_format: ContentFormat) -> str | list[dict[str, Any]]:
    """Return message content: for "openai" a list of parts, also of a plain string; else the texts, joined by newlines."""
    if isinstance(content, str):
        return content if content_format == "string" or role == "tool" else [{"type": "text", "text": content}]
    if content is None:
        content = []
    if not isinstance(content, list):
        raise malformed("content must be a string or an array of parts")
    parts = [part for raw in content if (part := _part(raw)) is not None]
    if content_format == "openai" and (role != "tool" or any(part["type"] != "text" for part in parts)):
        return parts
    return "\n".join(part["name"] if part["type"] == "tool_reference" else part["text"] for part in parts)


def _part(raw: object) -> dict[str, Any] | None:
    """Return a content part as templates that walk over parts see it; None for one without text."""
    if isinstance(raw, str):
        return {"type": "text", "text": raw}
    if not isinstance(raw, dict):
        raise malformed("a content part must be an object or a string")
    kind = raw.get("type")
    if kind is not None and not isinstance(kind, str):
        raise malformed("the type of a content part must be a string")
    if raw.get("uuid") is not None or kind in _MEDIA_TYPES:
        raise UnkeyableError("media", f"a content part of type {kind!r}: its token ids are known to the engine alone")
    if kind == "tool_reference" and isinstance(raw.get("name"), str):
        return {"type": kind, "name": raw["name"]}
    field = _TEXT_FIELDS.get(kind) if isinstance(kind, str) else None
    if field is None or not isinstance(raw.get(field), str):
        raise malformed(f"a content part of type {kind!r} is not one that vLLM takes")
    part = {"type": "text", "text": raw[field]}
    if len(raw) > 2:
        part.update((key, value) for key, value in raw.items() if key not in _PART_FIELDS)
    return part


def _without_billing_line(content: object) -> object:
    """Drop Claude Code's first line, which is another one in each request, from a system message."""
    if isinstance(content, str):
        return _rest_of(content) if content.startswith(_BILLING_LINE) else content
    if not isinstance(content, list):
        return content
    parts: list[object] = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part
        if not isinstance(text, str) or not text.startswith(_BILLING_LINE):
            parts.append(part)
            continue
        for rest in _rest_of(text):
            parts.append({**part, "text": rest["text"]} if isinstance(part, dict) else rest["text"])
    return parts


def _rest_of(text: str) -> list[dict[str, Any]]:
    rest = text.partition("\n")[2]
    return [{"type": "text", "text": rest}] if rest else []


def _tool_call(raw: dict[str, Any]) -> dict[str, Any]:
    """Return a call of the conversation so far, its keys in vLLM's order; arguments are an object, whatever stood there."""
    function = raw.get("function")
    if not isinstance(function, dict) or raw.get("type") != "function" or not isinstance(raw.get("id"), str):
        raise malformed("a tool call must have an id, the type function and a function")
    arguments, name = function.get("arguments"), function.get("name")
    if not isinstance(arguments, str) or not isinstance(name, str):
        raise malformed("the function of a tool call must have a name, and arguments as text")
    try:
        parsed = orjson.loads(arguments)
    except orjson.JSONDecodeError:
        parsed = None
    known: dict[str, Any] = {"arguments": parsed if isinstance(parsed, dict) else {}, "name": name}
    known.update((key, value) for key, value in function.items() if key not in known)
    call: dict[str, Any] = {"id": raw["id"], "function": known, "type": "function"}
    call.update((key, value) for key, value in raw.items() if key not in call)
    return call


def tools_input(body: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Return the tools that the template sees: all that the request has."""
    raw_tools = body.get("tools")
    if raw_tools is None:
        return None
    if raw_tools == []:
        raise malformed("tools must not be an empty array")
    return [_tool(tool) for tool in objects_of(raw_tools, "tools")]


def _tool(raw: dict[str, Any]) -> dict[str, Any]:
    function = raw.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise malformed("every tool must have a function with a name")
    is_deferred = raw.get("defer_loading")
    kept = {"name": function["name"], "description": function.get("description"), "parameters": function.get("parameters")}
    if function.get("strict") is not None:
        kept["strict"] = function["strict"]
    own_deferred = is_deferred if function.get("defer_loading") is None else function["defer_loading"]
    if own_deferred is not None:
        kept["defer_loading"] = own_deferred
    tool = {"type": raw.get("type", "function"), "function": kept}
    return tool if is_deferred is None else {**tool, "defer_loading": is_deferred}


def kwargs_input(body: Mapping[str, Any], template_kwargs: str = "") -> dict[str, Any]:
    """Return the template's variables: chat_template_kwargs, over them documents and reasoning_effort.

    template_kwargs: is not looked at, because vLLM tells no router its defaults.
    """
    raw = body.get("chat_template_kwargs")
    if raw is not None and not isinstance(raw, dict):
        raise malformed("chat_template_kwargs must be an object")
    kwargs: dict[str, Any] = dict(raw or {})
    if not _REFUSED_KWARGS.isdisjoint(kwargs):
        raise UnkeyableError("template", f"chat_template_kwargs sets {', '.join(sorted(_REFUSED_KWARGS.intersection(kwargs)))}")
    effort = body.get("reasoning_effort")
    if effort is not None:
        if not isinstance(effort, str):
            raise malformed("reasoning_effort must be a word")
        kwargs.setdefault("enable_thinking", effort != "none")
        kwargs["reasoning_effort"] = effort
    for name in _OVERRIDDEN_KWARGS:
        kwargs.pop(name, None)
    if body.get("documents") is not None:
        kwargs["documents"] = body["documents"]
    return kwargs
