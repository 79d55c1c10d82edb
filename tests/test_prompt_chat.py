"""sglfast.prompt.chat against what SGLang 0.5.23's own code makes of the same bodies."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from sglfast.prompt.chat import UnkeyableError, chat_input, second_try
from sglfast.shm import Dialect, ToolForm, Variant, dialect_of

GOLDEN = json.loads((Path(__file__).parent / "golden" / "prompt" / "sglang_chat_0.5.23.json").read_bytes())["cases"]
USER = {"role": "user", "content": "hi"}


def in_order(value: Any) -> str:
    """As JSON, since the order of keys is part of the prompt."""
    return json.dumps(value)


def test_golden_is_worth_something() -> None:
    kept = [case for case in GOLDEN if not case["refused"]]
    assert len(kept) > 100
    assert sum(bool(case["tools"]) for case in kept) > 20
    assert sum(bool(case["continuation"]) for case in kept) > 5
    assert sum("thinking" in case["kwargs"] for case in kept) > 20


@pytest.mark.parametrize("case", GOLDEN, ids=range(len(GOLDEN)))
def test_golden(case: dict[str, Any]) -> None:
    body = copy.deepcopy(case["body"])
    if case["refused"]:
        with pytest.raises(UnkeyableError):
            chat_input(body, case["content_format"])
        return
    given = chat_input(body, case["content_format"])
    assert in_order(given.messages) == in_order(case["messages"])
    assert in_order(given.tools) == in_order(case["tools"])
    assert given.kwargs == case["kwargs"]
    assert given.continuation == case["continuation"]
    assert body == case["body"], "the body was changed"


class TestRefused:
    @pytest.mark.parametrize(
        ("body", "reason"),
        [
            ({}, "malformed"),
            ({"messages": []}, "malformed"),
            ({"messages": "hi"}, "malformed"),
            ({"messages": ["hi"]}, "malformed"),
            ({"messages": [{"content": "hi"}]}, "malformed"),
            ({"messages": [{"role": "wizard", "content": "hi"}]}, "malformed"),
            ({"messages": [{"role": "user"}]}, "malformed"),
            ({"messages": [{"role": "user", "content": 5}]}, "malformed"),
            ({"messages": [{"role": "user", "content": [5]}]}, "malformed"),
            ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "malformed"),
            ({"messages": [{"role": "user", "content": [{"type": "thinking", "text": "x"}]}]}, "malformed"),
            ({"messages": [USER], "tools": {}}, "malformed"),
            ({"messages": [USER], "tools": [{"function": {}}]}, "malformed"),
            ({"messages": [USER], "chat_template_kwargs": []}, "malformed"),
            ({"messages": [USER], "reasoning_effort": "huge"}, "malformed"),
            ({"messages": [USER], "reasoning_effort": True}, "malformed"),
            ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "malformed"),
            ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}]}, "malformed"),
            ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": "[]"}}]}]}, "malformed"),
            ({"messages": [{"role": "assistant", "content": "x"}], "continue_final_message": True}, "malformed"),
        ],
    )
    def test_malformed(self, body: dict[str, Any], reason: str) -> None:
        for content_format in ("string", "openai"):
            with pytest.raises(UnkeyableError) as caught:
                chat_input(body, content_format)
            assert caught.value.reason == reason
            assert str(caught.value)

    @pytest.mark.parametrize("kind", ["image_url", "video_url", "audio_url", "input_audio"])
    def test_media(self, kind: str) -> None:
        content = [{"type": "text", "text": "what is it?"}, {"type": kind, kind: {"url": "data:,"}}]
        for content_format in ("string", "openai"):
            with pytest.raises(UnkeyableError, match=kind) as caught:
                chat_input({"messages": [{"role": "user", "content": content}]}, content_format)
            assert caught.value.reason == "media"


TOOL = {"type": "function", "function": {"parameters": {"type": "dict"}, "name": "f", "extra": 1}}
DEFERRED = {"function": {"name": "g", "description": "d", "strict": True}, "defer_loading": True}


@pytest.mark.parametrize(
    ("form", "expected", "again"),
    [
        (
            "kept",
            [
                {
                    "type": "function",
                    "function": {"parameters": {"type": "object"}, "name": "f", "description": None},
                    "defer_loading": None,
                },
                {
                    "type": "function",
                    "function": {"name": "g", "description": "d", "strict": True, "parameters": None, "defer_loading": True},
                    "defer_loading": True,
                },
            ],
            {"parameters": {"type": "object"}, "name": "f", "description": None},
        ),
        (
            "deferrable",
            [
                {
                    "type": "function",
                    "function": {"description": None, "name": "f", "parameters": {"type": "object"}, "strict": False},
                    "defer_loading": None,
                },
                {
                    "type": "function",
                    "function": {"description": "d", "name": "g", "parameters": None, "strict": True, "defer_loading": True},
                    "defer_loading": True,
                },
            ],
            {"description": None, "name": "f", "parameters": {"type": "object"}, "strict": False},
        ),
        (
            "wrapped",
            [
                {"type": "function", "function": {"description": None, "name": "f", "parameters": {"type": "object"}, "strict": False}},
                {"type": "function", "function": {"description": "d", "name": "g", "parameters": None, "strict": True}},
            ],
            {"description": None, "name": "f", "parameters": {"type": "object"}, "strict": False},
        ),
        (
            "flat",
            [
                {"description": None, "name": "f", "parameters": {"type": "object"}, "strict": False},
                {"description": "d", "name": "g", "parameters": None, "strict": True},
            ],
            {"function": {"description": None, "name": "f", "parameters": {"type": "object"}, "strict": False}},
        ),
    ],
)
def test_tools_as_versions_of_the_engine_have_them(form: ToolForm, expected: list[dict[str, Any]], again: dict[str, Any]) -> None:
    body = {"messages": [USER], "tools": [TOOL, DEFERRED]}
    tools = chat_input(body, "string", Dialect(form)).tools
    assert tools is not None
    assert in_order(tools) == in_order(expected)
    assert in_order(second_try(tools, form)[0]) == in_order(again)
    named = chat_input(body | {"tool_choice": {"function": {"name": "g"}}}, "string", Dialect(form)).tools
    assert in_order(named) == in_order(expected[1:])


def test_mixed_versions_get_tools_as_the_newest_has_them() -> None:
    assert dialect_of([]) == Dialect("kept", "")
    forms: list[ToolForm] = ["flat", "deferrable", "wrapped"]
    assert dialect_of([Variant(16, dialect=Dialect(form, '{"a":1}')) for form in forms]) == Dialect("deferrable", '{"a":1}')


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {"enable_thinking": False, "x": [1]}),
        ({"chat_template_kwargs": {"enable_thinking": True}}, {"enable_thinking": True, "x": [1]}),
        ({"reasoning_effort": "none", "chat_template_kwargs": {"x": 2}}, {"enable_thinking": False, "thinking": False, "x": 2}),
        ({"reasoning_effort": "low"}, {"enable_thinking": True, "thinking": True, "x": [1]}),
    ],
)
def test_variables_that_the_engine_adds(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    dialect = Dialect(template_kwargs='{"enable_thinking":false,"x":[1]}')
    kwargs = chat_input({"messages": [USER], **fields}, "string", dialect).kwargs
    effort = fields.get("reasoning_effort")
    assert kwargs == expected | ({} if effort is None else {"reasoning_effort": effort})
    effortful = Dialect(template_kwargs='{"reasoning_effort":"max"}')
    assert chat_input({"messages": [USER], **fields}, "string", effortful).kwargs["reasoning_effort"] == "max"
