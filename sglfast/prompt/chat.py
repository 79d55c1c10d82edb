"""The body of `/v1/chat/completions` -> what SGLang gives the chat template: messages, tools, template variables.

Runs in: shard, simulator, load generator.

Contract: `chat_input` follows SGLang 0.5.23 (entrypoints/openai/protocol.py and serving_chat.py) field by field, because
    templates print these objects as JSON: which keys exist, in which order and with which defaults, decides about tokens. Tools come
    as the workers' version has them, variables also from its own settings (shm.Dialect); where versions are mixed, as the newest has them.
    The body is never changed. What SGLang refuses with 400, and what nobody but the engine can know, raises UnkeyableError.

Not followed, each a false negative only: encoders in Python that some models have instead of a template (DeepSeek V3.2 and
    V4, Kimi K3), `--chat-template` with a built-in name.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import orjson

from sglfast.errors import PromptError
from sglfast.prompt.tool_schema import standard_types
from sglfast.shm import Dialect, ToolForm

if TYPE_CHECKING:
    from sglfast.prompt.template import ContentFormat

# Why a prompt has no block keys: values of PromptText.reason, and labels of a metric.
Reason = Literal[
    "malformed",  # the engine will refuse the body too
    "media",  # images, audio, video: the engine puts ids of its own there
    "several_prompts",  # a batch has no single prefix
    "session",  # the engine puts earlier turns before the text
    "no_prompt",  # the path carries no prompt that an engine caches
    "no_tokenizer",
    "no_chat_template",
    "template",  # the template refuses the conversation
]
GENERIC_ROLES = frozenset({"system", "assistant", "tool", "function", "developer", "latest_reminder", "root"})
# Roles whose `tools` are offered to the model.
TOOL_ROLES = frozenset({"root", "system", "developer"})
MEDIA_PART_TYPES = frozenset({"image_url", "video_url", "audio_url", "input_audio"})
# In the order in which SGLang's message model lists them; a user message has none of these.
MESSAGE_FIELDS = ("tool_call_id", "name", "phase", "reasoning_content", "tool_calls", "tools", "prefix")
TRUE_WORDS = frozenset({"1", "true", "yes", "y", "on"})
EFFORT_WORDS = frozenset({"none", "minimal", "low", "medium", "high", "xhigh", "ultra", "max"})


class UnkeyableError(PromptError):
    """A body from which no block keys can be made; `reason` says why in one word, the text in a sentence."""

    def __init__(self, reason: Reason, text: str) -> None:
        super().__init__(text)
        self.reason: Reason = reason


def malformed(text: str) -> UnkeyableError:
    """The error for a body that the engine will refuse, too; text: what is wrong with it, in a sentence."""
    return UnkeyableError("malformed", text)


@dataclass(frozen=True, slots=True)
class ChatInput:
    """What the template gets. continuation: text of the assistant that follows the rendered prompt, tokenized apart.

    Of vLLM only, else as they are here: whether the assistant's turn is opened at the end, whether the last message is to be gone on
    with, and whether the model's BOS or EOS goes around the text.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    kwargs: dict[str, Any]
    continuation: str
    add_generation_prompt: bool = True
    continues: bool = False
    add_special_tokens: bool = False

    @property
    def is_plain(self) -> bool:
        """Nothing of the last three is as only vLLM has it."""
        return self.add_generation_prompt and not self.continues and not self.add_special_tokens


def chat_input(body: Mapping[str, Any], content_format: ContentFormat, dialect: Dialect = Dialect()) -> ChatInput:  # noqa: B008 (immutable)
    """Return the template's input for a chat body (without `input_ids`); raises UnkeyableError."""
    raw_messages = body.get("messages")
    if not isinstance(raw_messages, list) or not raw_messages:
        raise malformed("messages must be a non-empty array")
    messages = [message_input(raw, content_format) for raw in raw_messages]
    continuation = ""
    last = messages[-1]
    if is_open(last):
        if body.get("continue_final_message"):
            continuation = last["content"]
            del messages[-1]
            if not messages:
                raise malformed("continue_final_message needs a message before the last one")
        else:
            messages[-1] = closed(last)
    return ChatInput(messages, tools_input(body, dialect.tools), kwargs_input(body, dialect.template_kwargs), continuation)


def is_open(last: Mapping[str, Any]) -> bool:
    """Whether a last message is a turn of the assistant that it may go on with.

    SGLang never lets a template print an open turn: it puts the text behind the generation prompt (continue_final_message), or else
    takes the message for one of the user (`closed`).
    """
    return last["role"] == "assistant" and isinstance(last["content"], str)


def closed(last: Mapping[str, Any]) -> dict[str, Any]:
    """An open last message as the template sees it."""
    return {"role": "user", "content": last["content"]}


def second_try(tools: Sequence[Mapping[str, Any]], tool_form: ToolForm) -> list[Any]:
    """Return the tools as SGLang gives them to a template that refuses the first form: without their OpenAI wrapper, or with one."""
    if tool_form == "flat":
        return [{"function": tool} for tool in tools]
    return [tool["function"] for tool in tools]


def message_input(raw: object, content_format: ContentFormat) -> dict[str, Any]:
    """Return one message with the fields that SGLang keeps, its content in the form that the template expects."""
    if not isinstance(raw, dict) or not isinstance(raw.get("role"), str):
        raise malformed("every message must be an object with a role")
    role = raw["role"]
    if role == "user":
        if raw.get("content") is None:
            raise malformed("a user message must have content")
        return {"role": role, "content": _content(raw["content"], role, content_format)}
    role = role.lower()
    if role not in GENERIC_ROLES:
        raise malformed(f"unknown role {role!r}")
    message = {"role": role, "content": _content(raw.get("content"), role, content_format)}
    if len(raw) == 2 and "content" in raw:
        return message  # nearly every one
    for field in MESSAGE_FIELDS:
        value = raw.get(field)
        if value is None:
            continue
        if field == "tool_calls":
            value = [_tool_call(call, is_parsed=role == "assistant") for call in objects_of(value, field)]
        elif field == "tools":
            value = [_kept(tool, is_offered=role in TOOL_ROLES) for tool in objects_of(value, field)]
        message[field] = value
    if content_format == "openai" and isinstance(raw.get("content"), list):
        message["content"] = message.pop("content")  # last, for a template that prints the message as it is
    return message


def objects_of(value: object, name: str) -> list[dict[str, Any]]:
    """A field that must be an array of objects; raises UnkeyableError, which names it."""
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise malformed(f"{name} must be an array of objects")
    return value


def _content(content: object, role: str, content_format: ContentFormat) -> str | list[dict[str, Any]]:
    """Return message content: a string stays one; parts are kept for "openai", else their texts are joined by a space."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    parts = [part for raw in objects_of(content, "content") if (part := _part(raw, role)) is not None]
    texts = [part["text"] for part in parts if part["type"] == "text"]
    # Results of tools are printed as one string by nearly every template, so SGLang joins them for both forms.
    if content_format == "string" or (role == "tool" and len(texts) == len(parts)):
        return " ".join(texts)
    return parts


def _part(raw: dict[str, Any], role: str) -> dict[str, Any] | None:
    """Return a content part with its known fields; None for thoughts, which no template sees."""
    kind = raw.get("type")
    if not isinstance(kind, str):
        raise malformed("a content part must have a type")
    if kind == "text" and isinstance(raw.get("text"), str):
        return {"type": "text", "text": raw["text"]}
    if kind in MEDIA_PART_TYPES:
        raise UnkeyableError("media", f"a content part of type {kind!r}: its token ids are known to the engine alone")
    if kind == "tool_reference" and isinstance(raw.get("name"), str):
        return {"type": kind, "name": raw["name"]}
    if kind in ("thinking", "reasoning") and role == "assistant":
        return None
    raise malformed(f"a content part of type {kind!r} is not one that SGLang takes in a {role} message")


def _tool_call(raw: dict[str, Any], is_parsed: bool) -> dict[str, Any]:
    """Return a call of the conversation so far; arguments of the assistant's calls come as JSON text and are parsed."""
    function = raw.get("function")
    if not isinstance(function, dict):
        raise malformed("a tool call must have a function")
    arguments = function.get("arguments")
    if is_parsed and isinstance(arguments, str):
        try:
            arguments = orjson.loads(arguments)
        except orjson.JSONDecodeError as error:
            raise malformed(f"the arguments of a tool call must be JSON: {error}") from error
        if not isinstance(arguments, dict):
            raise malformed("the arguments of a tool call must be a JSON object")
    return {
        "id": raw.get("id"),
        "index": raw.get("index"),
        "type": raw.get("type", "function"),
        "function": {"name": function.get("name"), "arguments": arguments},
    }


def _tool(raw: dict[str, Any], form: ToolForm) -> dict[str, Any]:
    """Return a tool that the model may call, as the template gets it."""
    tool = _kept(raw, is_offered=True)
    if form == "kept":
        return tool
    given = tool["function"]
    function = {"description": given["description"], "name": given["name"], "parameters": given["parameters"]}
    function["strict"] = bool(given.get("strict"))
    if form == "flat":
        return function
    if form == "wrapped":
        return {"type": tool["type"], "function": function}
    if "defer_loading" in given:
        function["defer_loading"] = given["defer_loading"]
    return tool | {"function": function}


def _kept(raw: dict[str, Any], is_offered: bool) -> dict[str, Any]:
    """Return a tool: the function's keys in the client's order, then those that it left out, as SGLang prints them.

    is_offered: the model may call it; only then SGLang looks at its schema and rewrites the type names.
    """
    function = raw.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise malformed("every tool must have a function with a name")
    is_deferred = raw.get("defer_loading")
    own_deferred = function.get("defer_loading")
    known = {
        "description": function.get("description"),
        "name": function["name"],
        "parameters": standard_types(function.get("parameters")) if is_offered else function.get("parameters"),
        "strict": function.get("strict"),
        "defer_loading": is_deferred if own_deferred is None else own_deferred,
    }
    order = [key for key in function if key in known] + [key for key in known if key not in function]
    kept = {key: known[key] for key in order if known[key] is not None or key not in ("strict", "defer_loading")}
    return {"type": raw.get("type", "function"), "function": kept, "defer_loading": is_deferred}


def tools_input(body: Mapping[str, Any], form: ToolForm = "kept") -> list[dict[str, Any]] | None:
    """Return the tools that the template sees: none for tool_choice "none", one for a named choice, else all."""
    raw_tools = body.get("tools")
    tools = [] if raw_tools is None else [_tool(tool, form) for tool in objects_of(raw_tools, "tools")]
    choice = body.get("tool_choice")
    if isinstance(choice, dict):
        function = choice.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        return [tool for tool in tools if tool.get("function", tool)["name"] == name] or None
    return tools if tools and choice != "none" else None


@functools.lru_cache(maxsize=64)
def _defaults_of(template_kwargs: str) -> dict[str, Any]:
    defaults: dict[str, Any] = orjson.loads(template_kwargs)
    return defaults


def kwargs_input(body: Mapping[str, Any], template_kwargs: str = "") -> dict[str, Any]:
    """Return the template's variables from chat_template_kwargs, reasoning_effort and reasoning; then those that the engine adds."""
    raw = body.get("chat_template_kwargs")
    if raw is not None and not isinstance(raw, dict):
        raise malformed("chat_template_kwargs must be an object")
    kwargs: dict[str, Any] = dict(raw or {})
    effort = body.get("reasoning_effort")
    is_thinking: bool | None = None
    reasoning = body.get("reasoning")
    if isinstance(reasoning, dict):
        wanted = reasoning.get("effort")
        wanted = reasoning.get("reasoning_effort") if wanted is None else wanted
        effort = effort if wanted is None else wanted
        enabled = reasoning.get("enabled")
        enabled = reasoning.get("enable") if enabled is None else enabled
        if enabled.strip().lower() in TRUE_WORDS if isinstance(enabled, str) else enabled:
            is_thinking = True
    if effort is not None:
        is_thinking = effort != "none"
    if is_thinking is not None:
        # Models read either name.
        kwargs.setdefault("thinking", is_thinking)
        kwargs.setdefault("enable_thinking", is_thinking)
    own_effort = kwargs.pop("reasoning_effort", None)
    effort = _effort(effort) if own_effort is None else own_effort
    if template_kwargs:
        # An effort of the request is taken out above; so one of the engine wins, as there.
        kwargs = {**_defaults_of(template_kwargs), **kwargs}
    return kwargs if effort is None else {"reasoning_effort": effort, **kwargs}


def _effort(value: object) -> str | float | None:
    """Return a reasoning effort as the template sees it: one of the words, or a float."""
    if value is None or (isinstance(value, str) and value in EFFORT_WORDS):
        return value
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    raise malformed(f"reasoning_effort {value!r} is neither a known word nor a number")
