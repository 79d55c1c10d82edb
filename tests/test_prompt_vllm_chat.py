"""sglfast.prompt.vllm_chat against what vLLM's own code makes of the same bodies."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from sglfast.prompt.chat import UnkeyableError
from sglfast.prompt.vllm_chat import chat_input

RECORDED = Path(__file__).parent / "golden" / "vllm_recorded"
GOLDEN = json.loads((RECORDED / "chat_0.33.0.json").read_bytes())["cases"]
OLDER = json.loads((RECORDED / "chat_0.20.2.json").read_bytes())["cases"]
# What vLLM takes and we leave out, because it is not known how the worker was started, or which version it is.
LEFT_OUT = ("chat_template", "truncate_prompt_tokens")


def in_order(value: Any) -> str:
    """As JSON, since the order of keys is part of the prompt."""
    return json.dumps(value)


def is_left_out(body: dict[str, Any]) -> bool:
    roles = {message["role"] for message in body["messages"]}
    return not body["messages"] or "developer" in roles or any(name in body for name in LEFT_OUT)


def test_golden_is_worth_something() -> None:
    assert len(GOLDEN) == len(OLDER) > 150
    kept = [case for case in GOLDEN if not case["refused"]]
    assert sum(bool(case["tools"]) for case in kept) > 30
    assert sum("tool_calls" in str(case["messages"]) for case in kept) > 15
    assert sum(is_left_out(case["body"]) for case in kept) < 15


@pytest.mark.parametrize("case", GOLDEN, ids=range(len(GOLDEN)))
def test_golden(case: dict[str, Any]) -> None:
    body = copy.deepcopy(case["body"])
    if case["refused"] or is_left_out(body):
        with pytest.raises(UnkeyableError):
            chat_input(body, case["content_format"])
        return
    given = chat_input(body, case["content_format"])
    assert in_order(given.messages) == in_order(case["messages"])
    assert in_order(given.tools) == in_order(case["tools"])
    kwargs = dict(case["kwargs"])
    assert given.add_generation_prompt == kwargs.pop("add_generation_prompt")
    assert given.continues == kwargs.pop("continue_final_message")
    assert given.kwargs == kwargs
    assert body == case["body"], "the body was changed"


def test_older_versions_agree_on_what_is_usual() -> None:
    """Where they do not, their blocks are not found; those cases are named in the module."""
    differ = [
        (new["body"], new["content_format"])
        for new, old in zip(GOLDEN, OLDER, strict=True)
        if not old["refused"] and (new["refused"] or any(in_order(new[what]) != in_order(old[what]) for what in ("messages", "tools")))
    ]
    assert len(differ) == 17


@pytest.mark.parametrize("kind", [["text"], {"a": 1}, 5])
def test_a_part_of_no_known_type_is_named(kind: object) -> None:
    body = {"messages": [{"role": "user", "content": [{"type": kind, "text": "x"}]}]}
    with pytest.raises(UnkeyableError, match="type of a content part must be a string"):
        chat_input(body, "string")


def test_a_call_id_that_is_null_is_none() -> None:
    given = chat_input({"messages": [{"role": "tool", "content": "hi", "tool_call_id": None}]}, "string")
    assert given.messages == [{"role": "tool", "content": "hi"}]
