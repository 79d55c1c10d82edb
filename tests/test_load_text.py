"""Prompt text: exact numbers of tokens, the same text for the same block, well-formed requests."""

import json

import pytest

from sglfast.errors import ConfigError
from sglfast.load.text import PATHS, PromptWriter, RequestWriter
from sglfast.load.trace import BLOCK_TOKENS, TraceRequest
from sglfast.prompt.tokenizer import DEMO_TOKENIZER_PATH, load_tokenizer

TOKENIZER = load_tokenizer(DEMO_TOKENIZER_PATH)


@pytest.fixture(scope="module")
def prompts() -> PromptWriter:
    return PromptWriter(TOKENIZER)


def tokens_of(prompts: PromptWriter, request: TraceRequest) -> list[int]:
    return TOKENIZER.encode(b"".join(prompts.prompt_parts(request)).decode(), False)


@pytest.mark.parametrize("length", [1, 511, 512, 513, 1024, 1337])
def test_prompt_has_exactly_the_tokens(prompts: PromptWriter, length: int) -> None:
    request = TraceRequest(0, length, 1, list(range(-(-length // BLOCK_TOKENS))))
    assert len(tokens_of(prompts, request)) == length


def test_equal_ids_are_equal_tokens_and_others_differ_at_once(prompts: PromptWriter) -> None:
    one = tokens_of(prompts, TraceRequest(0, 1100, 1, [5, 6, 7]))
    two = tokens_of(prompts, TraceRequest(0, 1400, 1, [5, 6, 8]))
    assert one[:1024] == two[:1024]
    assert one[1024 : 1024 + 16] != two[1024 : 1024 + 16]
    assert one == tokens_of(PromptWriter(TOKENIZER), TraceRequest(0, 1100, 1, [5, 6, 7]))


def test_first_pages_of_many_blocks_are_distinct(prompts: PromptWriter) -> None:
    pages = {prompts.block(block_id, 16) for block_id in range(5000)}
    assert len(pages) == 5000


def test_cut_block_is_the_beginning_of_the_full_one(prompts: PromptWriter) -> None:
    assert prompts.block(9).startswith(prompts.block(9, 100) + b" ")


def test_text_is_as_long_as_english(prompts: PromptWriter) -> None:
    assert 4.0 < sum(len(prompts.block(block_id)) for block_id in range(50)) / (50 * BLOCK_TOKENS) < 5.5


def test_cache_is_bounded_and_keeps_what_was_used_last() -> None:
    prompts = PromptWriter(TOKENIZER, cache_bytes=10_000)
    shared = prompts.block(0)
    for block_id in range(1, 200):
        prompts.block(block_id)
        assert prompts.block(0) is shared
        assert sum(map(len, prompts._cache.values())) == prompts._used_bytes <= 10_000


def split(data: bytes) -> tuple[bytes, dict[str, str], dict[str, object]]:
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    assert int(headers["content-length"]) == len(body)
    return first.encode(), headers, json.loads(body)


@pytest.mark.parametrize("endpoint", list(PATHS))
def test_requests(prompts: PromptWriter, endpoint: str) -> None:
    request = TraceRequest(0, 700, 40, [3, 4])
    text = b"".join(prompts.prompt_parts(request)).decode()
    first, headers, body = split(RequestWriter(prompts, endpoint, 'my "model"', "h:1").request(request))
    assert first == f"POST {PATHS[endpoint]} HTTP/1.1".encode()
    assert (headers["host"], headers["x-sglfast-kv"]) == ("h:1", "1")
    common = {"ignore_eos": True, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 40}
    assert (
        body
        == {
            "completions": {"model": 'my "model"', "prompt": text, **common},
            "chat": {"model": 'my "model"', "messages": [{"role": "user", "content": text}], **common},
            "generate": {"text": text, "stream": True, "sampling_params": {"ignore_eos": True, "temperature": 0, "max_new_tokens": 40}},
        }[endpoint]
    )


@pytest.mark.parametrize(("output", "cap", "sent"), [(40, 0, 40), (40, 8, 8), (5, 8, 5), (0, 0, 1), (0, 8, 1)])
def test_output_tokens(prompts: PromptWriter, output: int, cap: int, sent: int) -> None:
    data = RequestWriter(prompts, "completions", "m", "h:1", cap).request(TraceRequest(0, 5, output, [1]))
    assert split(data)[2]["max_tokens"] == sent


def test_tokenizer_with_too_few_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglfast.load.text.single_token_words", lambda _: ["one", "two"])
    with pytest.raises(ConfigError, match="has 2 words"):
        PromptWriter(TOKENIZER)
