"""Training of the demo tokenizer: `python -m sglfast.prompt.train [FOLDER]` writes the files of prompt/demo_tokenizer.

Runs in: a developer's shell, never in a process of sglfast.

Contract: the same Python and `tokenizers` versions give the same bytes (the corpus is the running Python's standard
    library). The shipped files are the reference; nothing trains at run time.

Why a tokenizer of our own: the simulator, the demo and the tests need a real byte-level BPE that costs what real ones
    cost per character, and no model's tokenizer may be shipped with the package. Whole common words are forced into
    the vocabulary, so that a load generator can write prompts of an exact length in tokens.
"""

import ast
import json
import random
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 8192
COMMON_WORDS = 2600
# How often every common word occurs at least: more than most letter pairs of the docstrings, so BPE merges it whole.
WORD_REPEATS = 400
SENTENCE_WORDS = 12
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SEED = 20_261
WORD = re.compile(r"(?<![^\s(])[a-z]{3,10}(?=[\s.,;:)])")

# ChatML, with tools as one JSON schema a line in the system message and calls as JSON objects between tags.
CHAT_TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- 'Functions you may call:\\n<tools>' }}
    {%- for tool in tools %}
        {{- '\\n' + tool | tojson }}
    {%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if not (tools and loop.first and message.role == 'system') %}
        {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>' + {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}
            {{- '</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def stdlib_docstrings() -> Iterator[str]:
    """Yield the docstrings of the standard library's modules, classes and functions, in order of path and line."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        folders = path.relative_to(root).parts[:-1]
        if {"test", "tests", "site-packages", "idlelib"} & set(folders):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # lib2to3 keeps files that are broken on purpose
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text:
                    yield text


def common_words(texts: list[str]) -> list[str]:
    """Return the COMMON_WORDS most frequent lowercase words of 3..10 letters, ties in alphabetical order."""
    counts = Counter(word for text in texts for word in WORD.findall(text))
    return sorted(counts, key=lambda word: (-counts[word], word))[:COMMON_WORDS]


def synthetic_sentences(words: list[str]) -> Iterator[str]:
    """Yield English-like sentences in which every word occurs WORD_REPEATS times, seeded."""
    shuffle = random.Random(SEED).shuffle
    bag = list(words)
    for _ in range(WORD_REPEATS):
        shuffle(bag)
        for start in range(0, len(bag), SENTENCE_WORDS):
            # With "The" in front every word of the bag follows a space, which becomes part of its token.
            yield "The " + " ".join(bag[start : start + SENTENCE_WORDS]) + "."


def train() -> Tokenizer:
    """Train the byte-level BPE: split regex of GPT-2, no prefix space, VOCAB_SIZE tokens, specials last."""
    texts = list(stdlib_docstrings())
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, *synthetic_sentences(common_words(texts))], trainer)
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return tokenizer


def write_folder(folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    train().save(str(folder / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 131_072,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    text = json.dumps(config, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_folder(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "demo_tokenizer")
