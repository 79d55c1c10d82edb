"""Prompts that are token ids already: their block keys, which need no tokenizer.

Runs in: shards (the loop and the tokenizer's thread). Contract: loads neither tokenizers nor jinja2, so that a shard without a tokenizer
    can look such prompts up all the same. Ids are those of the client's body: what no engine accepts raises PromptError.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from sglfast._blockhash import page_keys, token_keys
from sglfast.errors import PromptError
from sglfast.prompt.adapters import starts_of
from sglfast.prompt.keys import PromptText
from sglfast.shm import Variant

# keys -> how many leading ones of them some single rank owns without a hole; TreeReader.match is one.
Probe = Callable[[bytes], int]


class Keys(NamedTuple):
    """Block keys of a prompt by variant, 8 bytes each, as far as they matter. tokens: of the whole prompt."""

    tokens: int
    is_estimated: bool
    keys: dict[Variant, bytes]


def pages_max(tokens: int, variant: Variant) -> int:
    """Blocks of a prompt that an engine can have: it computes the last token itself."""
    return max(0, (tokens - 1 - variant.bigram) // variant.block_size)


class IdsKeying:
    """One prompt of token ids on its way to its keys: `run` once, then `keys`."""

    __slots__ = ("_asked", "_ids", "_result", "_salt", "_variants")

    def __init__(self, ids: Sequence[int], cache_salt: str, variants: tuple[Variant, ...], asked: tuple[str, str]) -> None:
        self._ids = ids
        self._salt = cache_salt
        self._variants = variants
        self._asked = asked
        self._result: Keys | None = None

    @property
    def keys(self) -> Keys:
        """The result, after `run`."""
        assert self._result is not None
        return self._result

    def run(self, _probe: Probe | None, _budget_chars: int = 0) -> bool:
        """All keys, whoever owns them: ids are hashed faster than anybody could be asked. Returns True. Raises PromptError."""
        ids = self._ids
        found: dict[Variant, bytes] = {}
        try:
            salt = self._salt.encode()
            for variant, start in zip(self._variants, starts_of(self._variants, *self._asked, self._salt), strict=True):
                size, bigram, n_max = variant.block_size, variant.bigram, pages_max(len(ids), variant)
                if start is None:
                    found[variant] = page_keys(ids, size, bigram=bigram, max_pages=n_max, cache_salt=salt)
                else:
                    found[variant] = token_keys(ids, size, bigram=bigram, max_pages=n_max, seed=start.seed, parent=start.parent)
        except (TypeError, ValueError) as error:  # UnicodeError is a ValueError
            raise PromptError(f"no block keys can be made of this prompt: {error}") from error
        self._result = Keys(len(ids), False, found)
        return True


class IdsKeyer:
    """What a LazyKeyer is with a tokenizer: for prompts of token ids only."""

    tokenizer = None

    def begin(self, prompt: PromptText, variants: Sequence[Variant], asked: tuple[str, str] = ("", "")) -> IdsKeying:
        """Begin with a prompt that has token ids; raises PromptError for one that has none. asked: as of LazyKeyer.begin."""
        if prompt.token_ids is None:
            raise PromptError(prompt.detail or "no tokenizer is loaded for this model")
        return IdsKeying(prompt.token_ids, prompt.cache_salt, tuple(variants), asked)
