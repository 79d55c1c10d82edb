from array import array
from collections.abc import Callable, Sequence
from typing import final

GPT2: int
LLAMA3: int
QWEN2: int
O200K: int
TEKKEN: int
DEEPSEEK3: int
SCRIPT_CHARS: int  # length of a table of scripts in bytes, which are the characters from U+0000 on
FOREIGN: int
IDEOGRAPH: int
FRONT: int
BACK: int

@final
class WordTable:
    """Words that came twice and their token ids, in `size_bytes` of memory (at least 64 KiB); what was used least recently goes first.

    seed: 64 random bits, so that nobody can choose words that fall on one place; pattern: GPT2, LLAMA3 or another of these, how the
    tokenizer cuts text into words; tokens: what is taken out of a text before all else, with its id; the longest where several begin at one
    place. letters, merges: a model of byte-pair encoding, for words that are not known: the id of each of the 256 bytes, and of
    each merge the left, the right and the made token, in the order of their ranks; arrays of type "I". 2^32 - 1 stands for a byte without
    a token. joins: by token, the lowest rank by which it joins what stands outside of the character that it begins or ends, or
    2^32 - 1 (cext/sf_bpe.h says what for); None = not known. scripts: what each character is (prompt/scripts.py); None = only ASCII text
    is cut. The merges take up to 43 bytes each and 1 MiB, beside `size_bytes`. Raises ValueError, MemoryError.
    """

    size_bytes: int
    pattern: int
    def __new__(
        cls,
        size_bytes: int,
        seed: int,
        pattern: int,
        tokens: dict[str, int],
        letters: array[int] | None = None,
        merges: array[int] | None = None,
        joins: array[int] | None = None,
        scripts: bytes | None = None,
    ) -> WordTable: ...
    def encode(self, text: str, encode_all: Callable[[list[str]], Sequence[Sequence[int]]]) -> array[int]:
        """Token ids of a text, as an array of type "I".

        encode_all: gives the ids of each of some pieces of the text; called at most once. What it raises comes out; ValueError when it
        returns another number of lists; UnicodeEncodeError for half of a surrogate pair.
        """

    def merged(self, word: str) -> list[int] | None:
        """What the merges make of a word, whatever else is known of it; None without merges, or for a word that they are not asked for."""

    def leave(self, word: str) -> None:
        """Leave a word to the tokenizer, which does not go by the merges there."""

    def learn(self, word: str, ids: Sequence[int]) -> None:
        """Enter a word at once; what is long is not entered."""

def words_of(text: str, pattern: int, scripts: bytes | None = None) -> list[str]:
    """A text cut by a pattern; one with characters that are FOREIGN is cut in some way. Raises ValueError where there is no table of
    scripts and the text is not ASCII, or the pattern cannot do without."""
