"""sim/output.py: answers depend on seed and prompt alone, and read back as the tokens they were made of."""

import pytest
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import models, pre_tokenizers

from sglfast.prompt.tokenizer import DEMO_TOKENIZER_PATH, Tokenizer, load_tokenizer
from sglfast.sim.output import MAX_OUTPUT_TOKENS, NATURAL_TOKENS, OutputText


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(DEMO_TOKENIZER_PATH)


@pytest.fixture(scope="module")
def output(tokenizer: Tokenizer) -> OutputText:
    return OutputText(tokenizer, 7)


def test_text_and_ids_are_the_same_answer(tokenizer: Tokenizer, output: OutputText) -> None:
    for start in (0, 12_345, 2**64 - 1):
        ids = output.token_ids(start, 300)
        text = output.text(start, 0, 300)
        assert len(ids) == 300
        assert tokenizer.decode(ids) == text
        # What a client sends back must hit the blocks of the ids: also behind a template's newline and before its end.
        prefix = "<|im_start|>assistant\n"
        again = tokenizer.encode(f"{prefix}{text}<|im_end|>", False)
        n = len(tokenizer.encode(prefix, False))
        assert again[n : n + 300] == ids


def test_pieces_join_to_the_whole(output: OutputText) -> None:
    whole = output.text(99, 0, 50)
    assert output.text(99, 0, 1) + output.text(99, 1, 2) + output.text(99, 2, 50) == whole
    assert output.text(99, 5, 5) == ""
    assert output.token_ids(99, 0) == []


def test_the_longest_answer_exists_from_every_start(output: OutputText) -> None:
    for start in (0, 65_535, 2**64 - 1):
        assert len(output.token_ids(start, MAX_OUTPUT_TOKENS)) == MAX_OUTPUT_TOKENS
        assert len(output.text(start, 0, MAX_OUTPUT_TOKENS).split()) == MAX_OUTPUT_TOKENS


def test_seed_and_prompt_decide(tokenizer: Tokenizer, output: OutputText) -> None:
    same = OutputText(tokenizer, 7)
    other = OutputText(tokenizer, 8)
    keys, tail = b"12345678" * 3, [5, 2**63]
    assert output.start_of(keys, tail) == same.start_of(keys, tail)
    assert output.text(3, 0, 20) == same.text(3, 0, 20)
    assert output.start_of(keys, tail) != other.start_of(keys, tail)
    assert output.text(3, 0, 20) != other.text(3, 0, 20)
    assert output.start_of(keys, tail) != output.start_of(keys, [5])
    assert output.start_of(keys, tail) != output.start_of(keys[:-1] + b"9", tail)
    starts = {output.start_of(n.to_bytes(8, "little"), []) for n in range(1000)}
    assert len(starts) == 1000
    assert {output.natural_tokens(start) for start in starts} <= set(range(NATURAL_TOKENS, 2 * NATURAL_TOKENS + 1))
    assert len({output.natural_tokens(start) for start in starts}) > 50


def test_eos_is_the_tokenizers(tokenizer: Tokenizer, output: OutputText) -> None:
    assert output.eos_token_id == tokenizer.encode("<|im_end|>", False)[0]


def test_a_tokenizer_without_words_still_answers() -> None:
    letters = RustTokenizer(models.BPE(vocab={letter: n for n, letter in enumerate("abcdefgh")}, merges=[]))
    letters.pre_tokenizer = pre_tokenizers.Whitespace()
    output = OutputText(Tokenizer(letters, None, {}), 1)
    assert len(output.token_ids(4, 10)) == 10
    assert len(output.text(4, 0, 10)) == 10
    assert output.eos_token_id is None
