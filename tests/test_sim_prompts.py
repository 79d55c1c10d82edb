"""sim/prompts.py: prompts become the engine's tokens and keys, and those that cannot are refused."""

import pytest

from sglfast._blockhash import page_keys
from sglfast.errors import PromptError
from sglfast.prompt.keys import PromptText, RequestKind
from sglfast.prompt.tokenizer import DEMO_TOKENIZER_PATH, Tokenizer, load_tokenizer
from sglfast.sim.output import OutputText
from sglfast.sim.prompts import LONG_PROMPT_CHARS, Prompts
from sglfast.sim.requests import RequestError
from sglfast.sim.settings import SimSettings


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(DEMO_TOKENIZER_PATH)


@pytest.fixture(scope="module")
def prompts(tokenizer: Tokenizer) -> Prompts:
    settings = SimSettings(page_size=4, cache_tokens=40_000)
    return Prompts(settings, tokenizer, OutputText(tokenizer, 0))


@pytest.mark.parametrize("text", ["a few words of text", "word " * LONG_PROMPT_CHARS])
def test_text(prompts: Prompts, tokenizer: Tokenizer, text: str) -> None:
    for salt in ("", "tenant"):
        prompt = prompts.read(PromptText(text=text, cache_salt=salt))
        assert list(prompt.token_ids) == tokenizer.encode(text, False)
        assert prompt.keys == page_keys(prompt.token_ids, 4, cache_salt=salt.encode())
        assert prompt.cache_salt == salt
        # The second time a short one comes from memory; it is the same.
        assert prompts.read(PromptText(text=text, cache_salt=salt)) == prompt


def test_the_start_depends_on_every_token(prompts: Prompts) -> None:
    starts = {prompts.read(PromptText(token_ids=ids)).start for ids in ([1, 2, 3, 4, 5], [1, 2, 3, 4, 6], [2, 2, 3, 4, 5])}
    assert len(starts) == 3


def test_ids_of_64_bits_are_kept(prompts: Prompts) -> None:
    ids = [1, 2**32, 3, 2**64 - 1, 5]
    prompt = prompts.read(PromptText(token_ids=ids))
    assert list(prompt.token_ids) == ids
    assert prompt.keys == page_keys(ids, 4)


def test_a_chat_body(prompts: Prompts, tokenizer: Tokenizer) -> None:
    body = {"messages": [{"role": "user", "content": "hello"}]}
    prompt = prompts.read(prompts.reader.text_of(RequestKind.CHAT, body))
    assert tokenizer.decode(list(prompt.token_ids)).endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize("ids", [[1, -1], [1, 2**64], ["a"], [1, 2, 3, 4, -5], [1.5]])
def test_ids_that_no_engine_takes(prompts: Prompts, ids: list[int]) -> None:
    with pytest.raises(PromptError, match="token ids must be integers"):
        prompts.read(PromptText(token_ids=ids))


def test_lengths_that_no_engine_takes(prompts: Prompts) -> None:
    with pytest.raises(RequestError, match="no tokens"):
        prompts.read(PromptText(token_ids=[]))
    prompts.read(PromptText(token_ids=[1] * 40_000))
    with pytest.raises(RequestError, match=r"40001 tokens.*context length \(40000"):
        prompts.read(PromptText(token_ids=[1] * 40_001))
