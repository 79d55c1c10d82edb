"""Texts on which tokenizers are known to differ: with them a tokenizer is tried before a theory about it is believed (prompt/pieces.py).

Runs in: shards and simulator, when the tokenizer is loaded.
"""

import random
from collections.abc import Iterator

_HARD_PARTS = [
    "a",
    "B",
    "don't",
    " ",
    "  ",
    "\n",
    "\t",
    "'s",
    "'LL",
    "é",
    "e\u0301",
    "ß",
    "漢字",
    "12",
    "3.4",
    "!?",
    "_x",
    "🙂",
    "\u200d",
    "ﬁ",
]
_HARD_PARTS += ["word", "Word", "x y", "the", "ing", "今天，我们", "。", "\u3000", "한국어", "かな・ー", "👩\u200d💻", "\ufe0f", "２０"]
_HARD_ASCII = [
    *(chr(code) for code in range(128)),
    "'",
    " ",
    " ",
    "\n",
    "\r\n",
    "'re",
    "'VE",
    "'d",
    " '",
    "  ",
    "   ",
    "ab",
    " cd",
    "2026",
    " 1",
]


def hard_text(rng: random.Random, tokens: list[str], parts: int) -> str:
    """A text of fewer than so many parts on which tokenizers are known to differ."""
    return "".join(rng.choice(tokens if tokens and rng.random() < 0.1 else _HARD_PARTS) for _ in range(rng.randrange(parts)))


def hard_texts(tokens: list[str]) -> Iterator[str]:
    rng = random.Random(2)
    for _ in range(150):
        yield hard_text(rng, tokens, 12)
        yield "".join(rng.choice(_HARD_ASCII) for _ in range(rng.randrange(24)))
