"""What the chats of prompt_path.py and icount_prompts.py are about, and a tokenizer that knows some Chinese.

Prose and code are Python's own documentation and code. Nobody's Chinese text lies on every machine, so that one is made: words of
one to four common characters, as frequent as words are (Zipf), in clauses and sentences with the punctuation that belongs there. It
says nothing, but it is as long, as varied and as free of spaces as what people write, which is all that a tokenizer notices.
"""

import argparse
import inspect
import itertools
import json
import random
import tarfile
import typing
import zipfile
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from sglfast.prompt.tokenizer import DEMO_TOKENIZER_PATH

KINDS = ("prose", "code", "chinese", "mixed")
Messages = list[dict[str, Any]]
# What an agent that works on files can call: 10 KB as they are sent with each request.
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": f"{verb}_{thing}",
            "description": f"Call this to {verb} a {thing} in the user's folder; says what was done, or why it could not be.",
            "parameters": {
                "type": "object",
                "properties": {
                    "path": {"type": "string", "description": f"Where the {thing} is, from the root of the project on."},
                    "pattern": {"type": "string", "description": f"Only lines of the {thing} that match this are looked at."},
                    "limit": {"type": "integer", "description": "How many lines there may be in the answer.", "default": 200},
                    "kind": {"type": "string", "enum": ["text", "binary", "link"], "description": "What it must be."},
                    "is_recursive": {"type": "boolean", "description": "Whether what stands inside it counts, too."},
                },
                "required": ["path"],
            },
        },
    }
    for verb in ("read", "write", "search")
    for thing in ("file", "folder", "diff", "log")
]
# Of Qwen 2 and 3.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_MADE_CHARS = 400_000
_LEXICON = 6000
_KANA = [chr(code) for code in (*range(0x3042, 0x3094), *range(0x30A2, 0x30F4))]
_EMOJI = ("🙂", "👍🏽", "👩\u200d💻", "❤\ufe0f", "🇯🇵", "🎉")
_ASIDES = ("Python 3.12", "GPU", "the cache", "vLLM", "３月１４日", "（笑）", "２０２６年", "https://example.org/a?b=1")


def source(kind: str) -> str:
    """Text of one of KINDS to talk about: the same characters each time."""
    if kind == "prose":
        return "".join(topics.values())
    if kind == "code":
        return "".join(Path(module.__file__ or "").read_text() for module in (argparse, typing, inspect, tarfile, zipfile))
    rng, text = random.Random(kind), ""
    words = _chinese_words(rng)
    others = ["".join(rng.choices(_KANA, k=rng.randrange(2, 6))) for _ in range(500)]
    parts, size = [], 0
    while size < _MADE_CHARS:
        text = _paragraph(rng, words, others if kind == "mixed" else [])
        parts.append(text)
        size += len(text)
    return "".join(parts)


def agent_chat(text: str, size: int, rounds: int, begin: int) -> Messages:
    """A system message, a question, and rounds of a call and its answer, of about `size` characters; another one for another `begin`."""
    share = size // (rounds + 1)
    messages = [{"role": "system", "content": text[begin : begin + share]}, {"role": "user", "content": "What is in the folder?"}]
    for number in range(1, rounds + 1):
        messages += agent_round(f"docs/{begin}/{number}.txt", text[begin + number * share : begin + (number + 1) * share])
    return messages


def agent_round(path: str, answer: str) -> Messages:
    """A call and its answer."""
    function = {"name": "read_file", "arguments": json.dumps({"path": path, "limit": 40})}
    call = {"role": "assistant", "content": "", "tool_calls": [{"id": "call_1", "type": "function", "function": function}]}
    return [call, {"role": "tool", "tool_call_id": "call_1", "content": answer}]


def tokenizer_of_chinese(folder: Path) -> str:
    """Train one of the form that Qwen's have (NFC, its pattern, merges of bytes) on all four kinds, into `folder`; returns its path."""
    rust = Tokenizer(models.BPE())
    rust.normalizer = normalizers.NFC()
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    rust.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_WORDS), "isolated"), bytes_of])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=16_384, initial_alphabet=alphabet, show_progress=False)
    rust.train_from_iterator([source(kind)[:_MADE_CHARS] for kind in KINDS], trainer)
    rust.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    rust.save(str(folder / "tokenizer.json"), pretty=False)
    config = json.loads(Path(DEMO_TOKENIZER_PATH, "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


def _chinese_words(rng: random.Random) -> "_Bag":
    # The first level of GB 2312: the 3,755 most frequent characters.
    cells = (bytes((row, column)) for row in range(0xB0, 0xD8) for column in range(0xA1, 0xFF))
    characters = [cell.decode("gb2312") for cell in cells if cell < b"\xd7\xfa"]
    rng.shuffle(characters)
    frequent = _Bag(characters)
    return _Bag(["".join(frequent.take(rng, rng.choice((1, 2, 2, 2, 2, 3, 4)))) for _ in range(_LEXICON)])


class _Bag:
    """Things to be taken out again and again, the n-th of them 1/n as often as the first."""

    def __init__(self, things: list[str]) -> None:
        self._things = things
        self._weights = list(itertools.accumulate(1 / rank for rank in range(8, len(things) + 8)))

    def take(self, rng: random.Random, count: int) -> list[str]:
        return rng.choices(self._things, cum_weights=self._weights, k=count)


def _paragraph(rng: random.Random, words: _Bag, others: list[str]) -> str:
    return "".join(_sentence(rng, words, others) for _ in range(rng.randrange(2, 7))) + "\n\n"


def _sentence(rng: random.Random, words: _Bag, others: list[str]) -> str:
    clauses = []
    for _ in range(rng.randrange(1, 5)):
        clause = words.take(rng, rng.randrange(3, 10))
        if others and rng.random() < 0.5:
            clause.insert(
                rng.randrange(len(clause)), rng.choice((rng.choice(_ASIDES), rng.choice(_EMOJI), "".join(rng.choices(others, k=3))))
            )
        clauses.append("".join(clause))
    return rng.choice("，，，、；：").join(clauses) + rng.choice("。。。！？")
