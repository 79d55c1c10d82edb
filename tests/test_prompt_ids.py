"""sglfast.prompt.ids: keys of prompts that are token ids, with nothing loaded that reads text."""

import subprocess
import sys

import pytest

from sglfast._blockhash import page_keys
from sglfast.errors import PromptError
from sglfast.prompt.ids import IdsKeyer, pages_max
from sglfast.prompt.keys import PromptReader, PromptText, RequestKind
from sglfast.prompt.lazy import LazyKeyer
from sglfast.prompt.tokenizer import DEMO_TOKENIZER_PATH, load_tokenizer
from sglfast.shm import Variant

IDS = [number * 7919 % 8000 for number in range(1000)]
VARIANTS = (Variant(16), Variant(64), Variant(16, bigram=True))


def keys_of(keyer: IdsKeyer | LazyKeyer, prompt: PromptText) -> tuple[int, bool, dict[Variant, bytes]]:
    keying = keyer.begin(prompt, VARIANTS)
    assert keying.run(None, 0)
    return keying.keys


@pytest.mark.parametrize("salt", ["", "s"])
@pytest.mark.parametrize("count", [1, 16, 17, 18, 65, 1000])
def test_keys_are_those_that_a_shard_with_a_tokenizer_makes(count: int, salt: str) -> None:
    prompt = PromptText(token_ids=IDS[:count], cache_salt=salt)
    found = keys_of(IdsKeyer(), prompt)
    assert found == keys_of(LazyKeyer(load_tokenizer(DEMO_TOKENIZER_PATH), 1 << 20), prompt)
    assert found[:2] == (count, False)
    expected = page_keys(IDS[:count], 16, max_pages=pages_max(count, VARIANTS[0]), cache_salt=salt.encode())
    assert found[2][VARIANTS[0]] == expected
    assert len(expected) // 8 == (count - 1) // 16


@pytest.mark.parametrize("ids", [[1, "2"] * 100, [-1] * 100, [1 << 70] * 100, [1.5] * 100])
def test_what_no_engine_accepts(ids: list[int]) -> None:
    with pytest.raises(PromptError, match="no block keys can be made"):
        IdsKeyer().begin(PromptText(token_ids=ids), VARIANTS).run(None)


def test_text_is_refused_by_name() -> None:
    prompt = PromptReader(None).text_of(RequestKind.GENERATE, {"text": "hello"})
    with pytest.raises(PromptError, match="no tokenizer is loaded"):
        IdsKeyer().begin(prompt, VARIANTS)


def test_nothing_that_reads_text_is_loaded() -> None:
    """Tokenizers and templates are most of a shard's memory."""
    code = "import sys, sglfast.edge.main; print([name for name in sys.modules if name.split('.')[0] in ('tokenizers', 'jinja2')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"
