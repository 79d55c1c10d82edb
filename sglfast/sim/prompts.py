"""Prompts of all workers of one process: prompt -> token ids, block keys and the start of the answer.

Runs in: sim; any thread. Contract: `read` is pure; it raises PromptError (text or ids that no engine takes) and RequestError (no
    tokens, or more than the cache holds). The last short prompts are remembered whole, because load generators repeat them
    and tokenizing is four fifths of what a request costs here.

Why not the reader's cache of pieces: the router uses it, and a double that tokenizes whole prompts proves it right.
"""

import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from sglfast._blockhash import page_keys
from sglfast.errors import PromptError
from sglfast.prompt.keys import PromptReader, PromptText
from sglfast.prompt.tokenizer import Tokenizer
from sglfast.sim.output import OutputText, TokenIds
from sglfast.sim.requests import RequestError
from sglfast.sim.settings import SimSettings

# About 3 ms of tokenizing: longer prompts leave the event loop.
LONG_PROMPT_CHARS = 16_384
REMEMBERED_PROMPTS = 128


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as the engine wants it. Shared by requests: nobody may change token_ids.

    token_ids: an array, a tenth of a list's memory (thousands of long prompts may wait); a list when ids need 64 bits.
    keys: of its full blocks; start: see output.OutputText.
    """

    token_ids: TokenIds
    keys: bytes
    start: int
    cache_salt: str


class Prompts:
    """Reads prompts. reader: finds them in a body; output: answers them."""

    def __init__(self, settings: SimSettings, tokenizer: Tokenizer, output: OutputText) -> None:
        self._page_size = settings.page_size
        self._limit_tokens = settings.context_tokens
        self._output = output
        self._remembered = lru_cache(REMEMBERED_PROMPTS)(self._read)
        self.reader = PromptReader(tokenizer)

    def read(self, prompt: PromptText) -> Prompt:
        """Return the prompt in tokens. Raises PromptError, RequestError."""
        if prompt.text is None or len(prompt.text) > LONG_PROMPT_CHARS:
            return self._prompt_of(self.reader.tokens_of(prompt), prompt.cache_salt)
        return self._remembered(prompt.text, prompt.add_special_tokens, prompt.continuation, prompt.cache_salt)

    def _read(self, text: str, adds_special_tokens: bool, continuation: str, cache_salt: str) -> Prompt:
        prompt = PromptText(text=text, add_special_tokens=adds_special_tokens, continuation=continuation)
        return self._prompt_of(self.reader.tokens_of(prompt), cache_salt)

    def _prompt_of(self, given: Sequence[int], cache_salt: str) -> Prompt:
        n, page_size = len(given), self._page_size
        if n == 0:
            raise RequestError(400, "The prompt has no tokens.")
        if n > self._limit_tokens:
            limit = self._limit_tokens
            raise RequestError(400, f"The input ({n} tokens) is longer than the model's context length ({limit} tokens).")
        try:
            token_ids = _packed(given)
            keys = page_keys(token_ids, page_size, cache_salt=cache_salt.encode())
            start = self._output.start_of(keys, token_ids[n - n % page_size :])
        except (ValueError, TypeError, OverflowError) as error:
            raise PromptError(f"token ids must be integers from 0 to 2**64 - 1: {error}") from None
        return Prompt(token_ids, keys, start, cache_salt)


def _packed(token_ids: Sequence[int]) -> TokenIds:
    try:
        return array.array("I", token_ids)
    except OverflowError:
        return list(token_ids)
