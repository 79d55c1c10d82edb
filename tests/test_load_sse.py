"""What is read from a stream: the first output and the token counts."""

import json

import pytest

from sglfast.load.sse import TAIL_BYTES, Usage, has_output, read_usage, stream_error


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"choices": [{"delta": {"role": "assistant", "content": ""}}]}, False),
        ({"choices": [{"delta": {"role": "assistant"}}]}, False),
        ({"choices": [{"delta": {"content": "a"}}]}, True),
        ({"choices": [{"delta": {"reasoning_content": "a"}}]}, True),
        ({"choices": [{"delta": {"tool_calls": [{"index": 0}]}}]}, True),
        ({"choices": [{"text": ""}]}, False),
        ({"choices": [{"text": "a"}]}, True),
        ({"choices": [], "usage": {"prompt_tokens": 1}}, False),
        ({"text": "a", "meta_info": {}}, True),
        ({"text": "", "output_ids": [5]}, True),
        ({"text": "", "meta_info": {}}, False),
        ([1], False),
    ],
)
def test_has_output(value: object, expected: bool) -> None:
    assert has_output(b"data: " + json.dumps(value).encode() + b"\r") is expected


def test_the_end_has_no_output() -> None:
    assert not has_output(b"data: [DONE]")
    assert not has_output(b"data: {broken")


def test_usage_of_openai() -> None:
    first = b'data: {"choices":[{"text":"a \\"usage\\": {}"}],"usage":null}\n\n'
    last = b'data: {"choices":[],"usage": {"prompt_tokens":9,"completion_tokens":2,"prompt_tokens_details":{"cached_tokens":4}}}\n\n'
    assert read_usage(first + last + b"data: [DONE]\n\n") == Usage(9, 4, 2)
    # A server that repeats a null after the counts.
    assert read_usage(last + first + b"data: [DONE]\n\n") == Usage(9, 4, 2)


def test_usage_without_details() -> None:
    for details in ("", ',"prompt_tokens_details":null'):
        assert read_usage(b'data: {"usage":{"prompt_tokens":9,"completion_tokens":2%b}}' % details.encode()) == Usage(9, -1, 2)


def test_no_usage() -> None:
    assert read_usage(b'data: {"choices":[{"text":"a"}]}\n\ndata: [DONE]\n\n') == Usage()
    assert read_usage(b'data: {"usage":{"prompt_tokens":') == Usage()


def test_usage_of_generate_when_the_tail_begins_inside_the_event() -> None:
    info = {"prompt_tokens": 9, "cached_tokens": 4, "completion_tokens": 2, "finish_reason": {"type": "length"}}
    stream = b"data: " + json.dumps({"text": "x" * TAIL_BYTES, "meta_info": info}).encode() + b"\n\ndata: [DONE]\n\n"
    tail = stream[-TAIL_BYTES:]
    assert not tail.startswith(b"data:")
    assert read_usage(tail) == Usage(9, 4, 2)
    assert stream_error(tail) == ""


def test_carriage_returns() -> None:
    assert stream_error(b'data: {"choices":[]}\r\n\r\ndata: [DONE]\r\n\r\n') == ""
