"""sglfast.prompt.responses: what of a `/v1/responses` body is a conversation."""

from typing import Any

import pytest

from sglfast.prompt.keys import PromptReader, RequestKind
from sglfast.prompt.responses import as_chat
from sglfast.prompt.tokenizer import DEMO_TOKENIZER_PATH, load_tokenizer


@pytest.fixture(scope="module")
def reader() -> PromptReader:
    return PromptReader(load_tokenizer(DEMO_TOKENIZER_PATH))


@pytest.mark.parametrize(
    ("body", "messages"),
    [
        ({"input": "hello"}, [{"role": "user", "content": "hello"}]),
        ({"input": "hello", "instructions": "be brief"}, [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]),
        (
            {"input": [{"role": "user", "content": "a"}, {"type": "message", "role": "assistant", "content": "b"}]},
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        ),
    ],
)
def test_conversations(body: dict[str, Any], messages: list[dict[str, str]], reader: PromptReader) -> None:
    assert as_chat(body)["messages"] == messages
    prompt = reader.text_of(RequestKind.RESPONSES, body | {"cache_salt": "s"})
    assert prompt.text == reader.text_of(RequestKind.CHAT, {"messages": messages}).text
    assert prompt.text
    assert prompt.cache_salt == "s"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"input": "a", "previous_response_id": "r1"}, "session"),
        ({"input": "a", "tools": [{"type": "web_search"}]}, "session"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "media"),
        ({"input": [{"type": "function_call_output", "output": "1"}]}, "media"),
        ({"input": ["text"]}, "media"),
        ({"input": 5}, "malformed"),
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
