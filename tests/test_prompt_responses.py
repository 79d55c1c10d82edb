"""sglfast.prompt.responses: what of a `/v1/responses` body is a conversation."""

from pathlib import Path
from typing import Any

import pytest

from sglfast.prompt.keys import PromptReader, RequestKind
from sglfast.prompt.responses import as_chat
from sglfast.prompt.template import ChatTemplate
from sglfast.prompt.tokenizer import DEMO_TOKENIZER_PATH, load_tokenizer


@pytest.fixture(scope="module")
def reader() -> PromptReader:
    return PromptReader(load_tokenizer(DEMO_TOKENIZER_PATH))


def said(role: str, *texts: str) -> dict[str, Any]:
    return {
        "type": "message",
        "role": role,
        "id": "m1",
        "status": "completed",
        "content": [{"type": "input_text", "text": t} for t in texts],
    }


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


CALL = {"type": "function_call", "call_id": "c1", "id": "fc1", "name": "f", "arguments": '{"a": 1}'}
CALLED = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}


@pytest.mark.parametrize(
    ("body", "messages"),
    [
        ({"input": "hello"}, [{"role": "user", "content": "hello"}]),
        ({"input": "hello", "instructions": "be brief"}, [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]),
        (
            {"input": [{"role": "user", "content": "a"}, {"type": "message", "role": "assistant", "content": "b"}]},
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        ),
        ({"input": [said("user", "a", "b")]}, [{"role": "user", "content": parts("a", "b")}]),
        # System messages go together, a developer's have a label.
        (
            {"instructions": "s", "input": [said("user", "a"), said("developer", "d", "e"), {"role": "system", "content": "t"}]},
            [{"role": "system", "content": "s\n\nDeveloper instructions:\nd\n\ne\n\nt"}, {"role": "user", "content": parts("a")}],
        ),
        # What an assistant does in a row is one message.
        (
            {"input": [{"type": "reasoning", "summary": [{"text": "hm"}]}, said("assistant", "x"), CALL, CALL | {"arguments": "[1]"}]},
            [
                {
                    "role": "assistant",
                    "reasoning_content": "hm",
                    "content": parts("x"),
                    "tool_calls": [CALLED, CALLED | {"function": {"name": "f", "arguments": "{}"}}],
                }
            ],
        ),
        (
            {"input": [{"role": "assistant", "content": "x"}, {"role": "assistant", "content": "y"}, said("assistant", "z")]},
            [{"role": "assistant", "content": parts("x\n\ny", "z")}],
        ),
        (
            {"input": [CALL, {"type": "function_call_output", "call_id": "c1", "output": [{"text": "1"}, {"text": "2"}]}]},
            [{"role": "assistant", "tool_calls": [CALLED]}, {"role": "tool", "tool_call_id": "c1", "content": "12"}],
        ),
        ({"input": [{"role": "user", "content": "a"}, {"type": "reasoning", "summary": []}]}, [{"role": "user", "content": "a"}]),
    ],
)
def test_conversations(body: dict[str, Any], messages: list[dict[str, str]], reader: PromptReader) -> None:
    assert as_chat(body, lambda: False)["messages"] == messages
    prompt = reader.text_of(RequestKind.RESPONSES, body | {"cache_salt": "s"})
    assert prompt.text == reader.text_of(RequestKind.CHAT, {"messages": as_chat(body, lambda: True)["messages"]}).text
    assert prompt.text
    assert prompt.cache_salt == "s"


def test_system_messages_stay_where_the_template_prints_them() -> None:
    body = {"instructions": "s", "input": [said("user", "a"), {"role": "system", "content": "t"}]}
    roles = [message["role"] for message in as_chat(body, lambda: True)["messages"]]
    assert roles == ["system", "user", "system"]


@pytest.mark.parametrize(
    ("template", "takes"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", True),
        ("{% for m in messages %}{{ m.content | trim }}{{ bos_token }}{% endfor %}", True),
        ("{{ messages[0].content }}{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}", False),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", False),
        # The engine tries this with bare jinja2.
        ("{{ bos_token + 'x' }}{% for m in messages %}{{ m.content }}{% endfor %}", False),
        ("{{ strftime_now('%Y') }}{% for m in messages %}{{ m.content }}{% endfor %}", False),
        ("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}", False),
        ("{% for m in messages[1:] %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}{% endfor %}", False),
    ],
)
def test_which_templates_print_a_system_message_between_others(template: str, takes: bool) -> None:
    assert ChatTemplate(template, {"bos_token": "<s>"}).takes_inline_system is takes


def test_tools_and_reasoning() -> None:
    tool = {"type": "function", "name": "f", "parameters": {"type": "object"}}
    body = {"input": "a", "tools": [tool], "tool_choice": {"type": "function", "name": "f"}, "reasoning": {"effort": "low"}}
    chat = as_chat(body, lambda: False)
    function = {"name": "f", "description": None, "parameters": {"type": "object"}, "strict": False}
    assert list(chat["tools"][0]["function"].items()) == list(function.items())
    assert chat["tool_choice"] == {"type": "function", "function": {"name": "f"}}
    assert chat["reasoning_effort"] == "low"
    assert as_chat(body | {"tool_choice": {"type": "web_search"}}, lambda: False)["tool_choice"] == "auto"
    assert as_chat({"input": "a", "reasoning": {"summary": "auto"}}, lambda: False)["reasoning_effort"] == "medium"
    assert "reasoning_effort" not in as_chat({"input": "a", "reasoning": None}, lambda: False)


def test_harmony_is_written_by_the_engine(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((Path(DEMO_TOKENIZER_PATH) / name).read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}<|start|>{{ m.role }}<|channel|>{{ m.content }}{% endfor %}")
    reader = PromptReader(load_tokenizer(str(tmp_path)))
    assert reader.text_of(RequestKind.RESPONSES, {"input": "a"}).reason == "template"
    assert reader.text_of(RequestKind.CHAT, {"messages": [{"role": "user", "content": "a"}]}).text


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"input": "a", "previous_response_id": "r1"}, "session"),
        ({"input": "a", "tools": [{"type": "web_search"}]}, "session"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "media"),
        ({"input": [{"type": "item_reference", "id": "i"}]}, "session"),
        ({"input": [{"type": "reasoning", "summary": [], "encrypted_content": "x"}]}, "session"),
        ({"input": [{"role": "wizard", "content": "a"}]}, "malformed"),
        ({"input": ["text"]}, "media"),
        ({"input": 5}, "malformed"),
        ({"input": [{"type": "function_call_output", "output": [{"text": None}]}]}, "malformed"),
        ({"input": [{"type": "reasoning", "summary": [{"text": 5}]}]}, "malformed"),
        ({"input": "x", "instructions": ["a"]}, "malformed"),
        ({"input": "x", "instructions": [{"x": 1}]}, "malformed"),
        ({}, "malformed"),
    ],
)
def test_what_cannot_be_keyed_is_named(body: dict[str, Any], reason: str, reader: PromptReader) -> None:
    prompt = reader.text_of(RequestKind.RESPONSES, body)
    assert prompt.text is None
    assert prompt.reason == reason


def test_paths_without_a_prompt(reader: PromptReader) -> None:
    prompt = reader.text_of(RequestKind.OTHER, {"query": "a", "documents": ["b"]})
    assert (prompt.text, prompt.token_ids, prompt.reason) == (None, None, "no_prompt")
