"""What a tokenizer takes each character for: the table by which compiled code cuts text of any script as the tokenizer does.

Runs in: shards, when the tokenizer is loaded.
Theory: word patterns ask of a character whether it is a letter, a digit, white space, and so on. Which it is depends on the version of
    Unicode in the tokenizers library, so the library is asked itself, once for each class and for all characters together. What it
    says of a character does not depend on its neighbours.
    A normalizer (NFC) changes some characters, and others by their neighbours. All text of which each character stays as it is
    wherever it stands is not changed at all (UAX #15, section 9.1: combining class 0 and no "Maybe" or "No" in NFC_Quick_Check);
    Unicode never takes that back for a character that is assigned, so Python's own tables are as good as the library's.
Contract: `scripts_of` gives _wordtable.SCRIPT_CHARS bytes, for characters that words are cut at in compiled code; all others are FOREIGN,
    and text with them is the tokenizer's. What is called foreign without need costs speed, not exactness.
"""

import unicodedata
from functools import cache

from tokenizers import Regex, pre_tokenizers

from sglfast import _wordtable

# The planes' parts in which people write today; half of surrogate pairs are no characters.
_REACH = (range(0xD800), range(0xE000, 0x10000), range(0x1F000, 0x1FC00))
_LETTER, _DIGIT, _SPACE, _MARK, _PUNCT, _APOSTROPHE = 1, 2, 3, 4, 5, 6  # as in cext/sf_unitoken.h
_CLASSES = {_LETTER: r"\p{L}+", _DIGIT: r"\p{N}+", _SPACE: r"\s+"}
_CASED_CLASSES = {**_CLASSES, _MARK: r"\p{M}+"}
# What each pattern asks besides, and by which bits it is told.
_MORE_CLASSES = {
    _wordtable.O200K: {**_CASED_CLASSES, _APOSTROPHE: "'+"},
    _wordtable.TEKKEN: _CASED_CLASSES,
    _wordtable.DEEPSEEK3: {**_CASED_CLASSES, _PUNCT: r"[\p{P}\p{S}]+"},
}
_CASES = {_wordtable.FRONT: r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+", _wordtable.BACK: r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"}
_FLAGS = {
    _wordtable.O200K: _CASES,
    _wordtable.TEKKEN: _CASES,
    _wordtable.DEEPSEEK3: {_wordtable.IDEOGRAPH: "[一-龥\u3040-ゟ゠-ヿ]+"},
}
# Without regard to case it is an s, which patterns with 's in them look for.
_LONG_S = 0x17F


@cache
def scripts_of(pattern: int, is_normalized: bool) -> bytes:
    """The table for a pattern of _wordtable; is_normalized: text goes through NFC before it is cut."""
    table = bytearray([_wordtable.FOREIGN]) * _wordtable.SCRIPT_CHARS
    for codes in _REACH:
        table[codes.start : codes.stop] = bytes(len(codes))
    for kind, regex in _MORE_CLASSES.get(pattern, _CLASSES).items():
        for codes in _matches(regex):
            table[codes.start : codes.stop] = bytes([kind]) * len(codes)
    for flag, regex in _FLAGS.get(pattern, {}).items():
        for codes in _matches(regex):
            table[codes.start : codes.stop] = bytes(byte | flag for byte in table[codes.start : codes.stop])
    for code in (_LONG_S, *(_changing() if is_normalized else ())):
        table[code] = _wordtable.FOREIGN
    return bytes(table)


@cache
def _matches(regex: str) -> list[range]:
    """Runs of characters, all of which the library takes for what the pattern names."""
    cutter = pre_tokenizers.Split(Regex(regex), "removed", invert=True)
    found = []
    for codes in _REACH:
        runs = cutter.pre_tokenize_str("".join(map(chr, codes)))
        found += [range(codes.start + start, codes.start + stop) for _, (start, stop) in runs]
    return found


@cache
def _changing() -> list[int]:
    """Characters that NFC changes, or that Python does not know, or that may change with another one before or behind them."""
    pairs = (unicodedata.decomposition(chr(code)).split() for code in range(0x10000))
    seconds = {pair[1] for pair in pairs if len(pair) == 2 and not pair[0].startswith("<")}
    return [code for codes in _REACH for code in codes if code >= 0x80 and _is_changing(code, seconds)]


def _is_changing(code: int, seconds: set[str]) -> bool:
    char = chr(code)
    is_jamo = 0x1160 <= code < 0x1200  # vowels and finals, which join with what stands before
    return (
        is_jamo
        or unicodedata.category(char) == "Cn"
        or unicodedata.combining(char) != 0
        or f"{code:04X}" in seconds
        or not unicodedata.is_normalized("NFC", char)
    )
