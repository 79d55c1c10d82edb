"""The text that simulated workers answer with: words of the tokenizer's vocabulary, decided by seed and prompt alone.

Runs in: sim. Contract: a start is a number of 64 bits made from the prompt; equal prompts under one seed start equally, on
    every worker. Nothing is computed per token: an answer is a slice of one long ring of words that is made at start.

Why whole words: a client sends the answer back with its next turn. The engine has cached the blocks of the ids it
    generated, so the text must tokenize to the same ids again, as a real model's mostly does. Words with a leading space
    that are one token each do, in any order; the first word has no space, because templates put a newline before it.
"""

import array
import random
from typing import TypeAlias

import xxhash

from sglfast.errors import ConfigError
from sglfast.prompt.tokenizer import Tokenizer, single_token_words

RING_TOKENS = 1 << 16
# The longest answer; longer requests are refused as above the context length.
MAX_OUTPUT_TOKENS = RING_TOKENS
# A model ends most answers itself: after this many tokens, plus up to as many again.
NATURAL_TOKENS = 128
MIN_WORDS = 16
FALLBACK_WORDS = 4096

TokenIds: TypeAlias = "list[int] | array.array[int]"


class OutputText:
    """Answers of any length from a start. eos_token_id: what a naturally ended answer is said to have stopped at."""

    __slots__ = ("_first_ids", "_first_words", "_ids", "_seed", "_words", "eos_token_id")

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        self._seed = seed & 0xFFFF_FFFF_FFFF_FFFF
        eos = tokenizer.encode(tokenizer.special_tokens.get("eos_token", ""), False)
        self.eos_token_id: int | None = eos[0] if len(eos) == 1 else None
        words, first = _vocabulary(tokenizer, seed)
        self._first_words, self._first_ids = zip(*first, strict=True)
        ring = random.Random(seed).choices(words, k=RING_TOKENS)
        # Twice around, so that a slice never wraps.
        self._words = [word for word, _ in ring] * 2
        self._ids = [token_id for _, token_id in ring] * 2

    def start_of(self, keys: bytes, tail: TokenIds) -> int:
        """Return the start for a prompt: the keys of its full blocks (any number) and the token ids after them."""
        return xxhash.xxh3_64_intdigest(keys[-8:] + array.array("Q", tail).tobytes(), self._seed)

    def natural_tokens(self, start: int) -> int:
        """Return after how many tokens the model would end this answer: NATURAL_TOKENS .. 2 * NATURAL_TOKENS."""
        return NATURAL_TOKENS + (start >> 32) % (NATURAL_TOKENS + 1)

    def token_ids(self, start: int, n_tokens: int) -> list[int]:
        """Return the ids of the answer's first `n_tokens` (at most MAX_OUTPUT_TOKENS)."""
        if n_tokens == 0:
            return []
        at = start % RING_TOKENS
        return [self._first_ids[start % len(self._first_ids)], *self._ids[at + 1 : at + n_tokens]]

    def text(self, start: int, since: int, until: int) -> str:
        """Return the text of tokens since..until of the answer."""
        if since >= until:
            return ""
        at = start % RING_TOKENS
        if since:
            return "".join(self._words[at + since : at + until])
        return "".join((self._first_words[start % len(self._first_words)], *self._words[at + 1 : at + until]))


def _vocabulary(tokenizer: Tokenizer, seed: int) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Return (text, token id) of the words that may follow, and of those that may begin an answer."""
    try:
        plain = single_token_words(tokenizer)
    except ConfigError:
        plain = []
    following = [(" " + word, tokenizer.encode(" " + word, False)[0]) for word in plain]
    first = [(word, ids[0]) for word in plain if len(ids := tokenizer.encode(word, False)) == 1]
    if len(following) >= MIN_WORDS and first:
        return following, first
    # A tokenizer without such words: any printable entries; what they are read back as does not matter then.
    order = list(range(tokenizer.vocab_size))
    random.Random(seed).shuffle(order)
    entries: list[tuple[str, int]] = []
    for token_id in order:
        text = tokenizer.decode([token_id], skip_special_tokens=True)
        if text.strip() and text.isprintable() and "\ufffd" not in text:
            entries.append((text, token_id))
            if len(entries) == FALLBACK_WORDS:
                break
    if not entries:
        raise ConfigError("this tokenizer has no printable entry in its vocabulary: no answer can be written with it")
    return entries, entries
